package server

import (
	"crypto/x509"
	"encoding/hex"
	"errors"
	"net/http"
	"path/filepath"
	"time"

	"hawser/internal/admin"
	"hawser/internal/identity"
	"hawser/internal/pki"
	"hawser/internal/registry"
)

func (b *backend) serviceOf(r *http.Request, v registry.Service) (admin.Service, error) {
	out := admin.Service{Name: v.Name, State: string(v.State), Reason: v.Reason, Created: admin.UTC(v.Created), Grants: []admin.Grant{}}
	for _, g := range v.Grants {
		out.Grants = append(out.Grants, admin.Grant{Mode: string(g.Mode), Filter: g.Filter})
	}
	who := identity.Principal{Kind: identity.Service, Name: v.Name}
	if b.srv != nil {
		on := b.srv.br.Online(who)
		out.Online = &on
	}
	var err error
	out.Certificates, err = b.certificates(r, who)
	return out, err
}

func (b *backend) service(r *http.Request, name string) (any, error) {
	v, err := b.reg.Service(r.Context(), name)
	if err != nil {
		return nil, err
	}
	return b.serviceOf(r, v)
}

func (b *backend) services(r *http.Request) (any, error) {
	list, err := b.reg.Services(r.Context())
	if err != nil {
		return nil, err
	}
	out := make([]admin.Service, 0, len(list))
	for _, v := range list {
		s, err := b.serviceOf(r, v)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

func registryGrants(list []admin.Grant) []registry.Grant {
	out := make([]registry.Grant, 0, len(list))
	for _, g := range list {
		out = append(out, registry.Grant{Mode: registry.GrantMode(g.Mode), Filter: g.Filter})
	}
	return out
}

// serviceLeaf verifies a service's certificate.
func (b *backend) serviceLeaf(name string, der []byte) (registry.Certificate, error) {
	got, cert, err := pki.VerifyServiceLeaf(der, b.layout.Trust().ServiceCAs)
	if err == nil && got != name {
		err = errors.New("the certificate is that of " + got + ", not of " + name)
	}
	if err != nil {
		return registry.Certificate{}, admin.Errorf(admin.Invalid, "%v", err)
	}
	return registryCertificate(identity.Principal{Kind: identity.Service, Name: name}, 0, cert), nil
}

func (b *backend) addService(r *http.Request) (any, error) {
	var in admin.NewService
	if err := read(r, &in); err != nil {
		return nil, err
	}
	if err := identity.CheckName(in.Name); err != nil {
		return nil, admin.Errorf(admin.Invalid, "%q: %v", in.Name, err)
	}
	var cert *registry.Certificate
	if len(in.Certificate) > 0 {
		c, err := b.serviceLeaf(in.Name, in.Certificate)
		if err != nil {
			return nil, err
		}
		cert = &c
	}
	err := b.update(r, func(tx *registry.Tx, actor string) error {
		if err := tx.AddService(actor, in.Name, registryGrants(in.Grants)); err != nil || cert == nil {
			return err
		}
		return tx.AddCertificate(actor, *cert)
	})
	if err != nil {
		return nil, err
	}
	return b.service(r, in.Name)
}

func (b *backend) serviceCertificate(r *http.Request) (any, error) {
	var in struct {
		Certificate admin.Hex `json:"certificate"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	c, err := b.serviceLeaf(r.PathValue("name"), in.Certificate)
	if err != nil {
		return nil, err
	}
	return nil, b.update(r, func(tx *registry.Tx, actor string) error { return tx.AddCertificate(actor, c) })
}

func (b *backend) revokeService(r *http.Request) (any, error) {
	var in struct {
		Reason string `json:"reason"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	return nil, b.update(r, func(tx *registry.Tx, actor string) error {
		return tx.RevokeService(actor, r.PathValue("name"), in.Reason)
	})
}

func (b *backend) changeGrants(r *http.Request) (any, error) {
	var in struct {
		Give []admin.Grant `json:"give"`
		Take []admin.Grant `json:"take"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	name := r.PathValue("name")
	err := b.update(r, func(tx *registry.Tx, actor string) error {
		return tx.ChangeGrants(actor, name, registryGrants(in.Give), registryGrants(in.Take))
	})
	if err != nil {
		return nil, err
	}
	return b.service(r, name)
}

func (b *backend) requests(r *http.Request) (any, error) {
	list, err := b.reg.Requests(r.Context(), registry.RequestPending, maxPage)
	out := make([]admin.Request, 0, len(list))
	for _, q := range list {
		out = append(out, admin.Request{ID: q.ID, Kind: q.Kind, Subject: q.Subject, State: string(q.State), At: admin.UTC(q.At),
			File: filepath.Join(b.layout.RequestsDir(), q.ID+".json")})
	}
	return out, err
}

// newRequest keeps a request twice: in the file that is carried to the safe and
// in the registry, whose row says who asked.
func (b *backend) newRequest(r *http.Request) (any, error) {
	var in admin.File
	if err := read(r, &in); err != nil {
		return nil, err
	}
	req, err := pki.ParseRequest([]byte(in.Text))
	if err != nil {
		return nil, admin.Errorf(admin.Invalid, "%v", err)
	}
	if err := b.mayAsk(r, req); err != nil {
		return nil, err
	}
	path, err := b.layout.SaveRequest(req)
	if err != nil {
		return nil, err
	}
	hash := req.Hash()
	row := registry.Request{ID: hex.EncodeToString(hash[:]), Kind: req.Kind, Subject: req.Subject, Body: []byte(in.Text)}
	err = b.update(r, func(tx *registry.Tx, actor string) error { return tx.AddRequest(actor, row) })
	if err != nil {
		return nil, errors.Join(err, b.layout.DropRequest(req))
	}
	return admin.Request{ID: row.ID, Kind: row.Kind, Subject: row.Subject, State: string(registry.RequestPending),
		At: admin.UTC(time.Now()), File: path}, nil
}

// mayAsk refuses early what could not be imported later.
func (b *backend) mayAsk(r *http.Request, req *pki.Request) error {
	switch req.Kind {
	case pki.KindService:
		_, err := b.reg.Service(r.Context(), req.Subject)
		return err
	case pki.KindDevice:
		id, err := identity.ParseID(req.Subject)
		if err != nil {
			return err
		}
		d, err := b.reg.Device(r.Context(), id)
		if errors.Is(err, registry.ErrNotFound) {
			return b.notReserved(r, id)
		}
		if err != nil {
			return err
		}
		key, err := pki.KeyFingerprint(req.ParsedCSR().Pub)
		if err == nil && key != d.KeyHash {
			err = admin.Errorf(admin.Conflict, "device %s has another key\nhint: an id keeps its key for life; enrol this key under another id", id)
		}
		return err
	case pki.KindStation:
		return b.mayAskStation(r, req)
	}
	return nil
}

// importResult holds a result against the request that was kept here, and puts
// what was signed in its place.
func (b *backend) importResult(r *http.Request) (any, error) {
	var in admin.File
	if err := read(r, &in); err != nil {
		return nil, err
	}
	req, certs, err := b.layout.OpenResult([]byte(in.Text))
	if err != nil {
		return nil, admin.Errorf(admin.Invalid, "%v", err)
	}
	hash := req.Hash()
	id := hex.EncodeToString(hash[:])
	station := func(*registry.Tx, string) error { return nil }
	switch req.Kind {
	case pki.KindBroker:
		if err := b.installLeaves(certs); err != nil {
			return nil, err
		}
	case pki.KindStation:
		block, cert, err := b.stationResult(r, []byte(in.Text), req, certs)
		if err != nil {
			return nil, err
		}
		station = func(tx *registry.Tx, actor string) error { return tx.SignedBlock(actor, block.ID, cert) }
	}
	err = b.update(r, func(tx *registry.Tx, actor string) error {
		if err := station(tx, actor); err != nil {
			return err
		}
		if err := b.importCertificates(tx, actor, req, certs); err != nil {
			return err
		}
		return tx.EndRequest(actor, id, registry.RequestDone)
	})
	if err != nil {
		return nil, err
	}
	return admin.Imported{Kind: req.Kind, Subject: req.Subject}, b.layout.DropRequest(req)
}

func (b *backend) installLeaves(certs []*x509.Certificate) error {
	for _, c := range certs {
		if _, err := b.layout.InstallBrokerLeaf(c.Raw); err != nil {
			return err
		}
	}
	if b.srv == nil {
		return nil
	}
	return b.srv.leaves.reload()
}

func (b *backend) importCertificates(tx *registry.Tx, actor string, req *pki.Request, certs []*x509.Certificate) error {
	for _, c := range certs {
		switch req.Kind {
		case pki.KindDevice:
			id, err := identity.ParseID(req.Subject)
			if err != nil {
				return err
			}
			row, err := b.enrolment(id, admin.Enrolment{CSR: req.ParsedCSR().DER, Certificate: c.Raw, Class: req.Class})
			if err != nil {
				return err
			}
			if err := tx.Enrol(actor, row); err != nil {
				return err
			}
		case pki.KindService:
			cert, err := b.serviceLeaf(req.Subject, c.Raw)
			if err != nil {
				return err
			}
			if err := tx.AddCertificate(actor, cert); err != nil {
				return err
			}
		}
	}
	return nil
}

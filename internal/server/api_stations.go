package server

import (
	"crypto/rand"
	"crypto/x509"
	"errors"
	"net/http"
	"slices"
	"time"

	"hawser/internal/admin"
	"hawser/internal/factory"
	"hawser/internal/identity"
	"hawser/internal/pki"
	"hawser/internal/registry"
)

func (b *backend) stations(r *http.Request) (any, error) {
	list, err := b.reg.Stations(r.Context())
	if err != nil {
		return nil, err
	}
	out := make([]admin.Station, 0, len(list))
	for _, s := range list {
		v, err := b.stationOf(r, s)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

func (b *backend) station(r *http.Request, name string) (any, error) {
	s, err := b.reg.Station(r.Context(), name)
	if err != nil {
		return nil, err
	}
	return b.stationOf(r, s)
}

func (b *backend) stationOf(r *http.Request, s registry.Station) (admin.Station, error) {
	out := admin.Station{Name: s.Name, State: string(s.State), Reason: s.Reason, Key: s.KeyHash[:], Created: admin.UTC(s.Created),
		Lines: s.Lines, Imported: admin.UTC(s.Imported)}
	certs, err := b.reg.StationCertificates(r.Context(), s.Name)
	if err != nil {
		return out, err
	}
	if len(certs) > 0 {
		out.Until, out.Generation = admin.UTC(certs[0].NotAfter), certs[0].Generation
	}
	blocks, err := b.reg.Blocks(r.Context(), s.Name)
	for _, v := range blocks {
		out.Blocks = append(out.Blocks, admin.Block{ID: v.ID[:], IDs: v.Free + v.Used + v.Burnt, Left: v.Free, Units: v.Used, Burnt: v.Burnt,
			Anchors: v.Anchors, Created: admin.UTC(v.Created), Expires: admin.UTC(v.Expires), Signed: admin.UTC(v.Signed)})
		out.Units, out.Burnt = out.Units+v.Used, out.Burnt+v.Burnt
		if !v.Signed.IsZero() && time.Now().Before(v.Expires) {
			out.Left += v.Free
		}
	}
	return out, err
}

// reserveBlock registers the station, if it comes with its request for the first time, and
// gives it ids that nobody else will ever get.
func (b *backend) reserveBlock(r *http.Request) (any, error) {
	var in admin.NewBlock
	if err := read(r, &in); err != nil {
		return nil, err
	}
	block := registry.Block{Station: r.PathValue("name"), Expires: in.Expires.UTC().Truncate(time.Second)}
	switch err := pki.CheckStation(block.Station); {
	case err != nil:
		return nil, admin.Errorf(admin.Invalid, "%q: %v", block.Station, err)
	case in.Count < 1 || in.Count > factory.MaxBlockIDs:
		return nil, admin.Errorf(admin.Invalid, "a block has 1 to %d ids, not %d", factory.MaxBlockIDs, in.Count)
	case !block.Expires.After(time.Now()):
		return nil, admin.Errorf(admin.Invalid, "a block that expires at %s is of no use", block.Expires.Format(time.RFC3339))
	}
	csr, err := b.stationCSR(r, block.Station, in.CSR)
	if err != nil {
		return nil, err
	}
	if _, err := rand.Read(block.ID[:]); err != nil {
		return nil, err
	}
	_, set, err := b.layout.Anchors()
	if err != nil {
		return nil, err
	}
	block.Anchors = set.Sequence
	if err := b.reserveIDs(r, &block, csr, in.Count); err != nil {
		return nil, err
	}
	return admin.ReservedBlock{Station: block.Station, CSR: csr.DER, Block: block.ID[:], IDs: block.IDs, Expires: block.Expires}, nil
}

// stationCSR gives the request of the station's key: the one that came, which must be that
// of the key in force, or the one that is known.
func (b *backend) stationCSR(r *http.Request, name string, der []byte) (*pki.CSR, error) {
	if len(der) > 0 {
		csr, err := pki.ParseCSR(der)
		if err != nil {
			return nil, admin.Errorf(admin.Invalid, "%v", err)
		}
		return csr, nil
	}
	s, err := b.reg.Station(r.Context(), name)
	if errors.Is(err, registry.ErrNotFound) {
		return nil, admin.Errorf(admin.NotFound, "station %s is not known yet: nothing was reserved\nhint: --station-csr FILE, the station.csr that factory init wrote on the bench", name)
	}
	if err != nil {
		return nil, err
	}
	return pki.ParseCSR(s.CSR)
}

func (b *backend) reserveIDs(r *http.Request, block *registry.Block, csr *pki.CSR, count int) error {
	key, err := pki.KeyFingerprint(csr.Pub)
	if err != nil {
		return err
	}
	avoid, err := b.askedIDs(r)
	if err != nil {
		return err
	}
	err = b.update(r, func(tx *registry.Tx, actor string) error {
		if err := tx.RegisterStation(actor, block.Station, csr.DER, key); err != nil {
			return err
		}
		return tx.ReserveBlock(actor, block, count, avoid)
	})
	if errors.Is(err, registry.ErrKey) {
		return admin.Errorf(admin.Conflict, "station %s was registered with another key: nothing was reserved\n"+
			"hint: compare %s; a bench with a new key is renewed (hawser factory renew) or gets a name of its own", block.Station, "hawser factory station list --json")
	}
	return err
}

// askedIDs are the ids that were handed out and are no devices yet.
func (b *backend) askedIDs(r *http.Request) (map[identity.ID]bool, error) {
	requests, err := b.reg.Requests(r.Context(), registry.RequestPending, maxPage)
	if err != nil {
		return nil, err
	}
	ids := map[identity.ID]bool{}
	for _, q := range requests {
		if id, err := identity.ParseID(q.Subject); err == nil {
			ids[id] = true
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for id := range b.reserved {
		ids[id] = true
	}
	return ids, nil
}

// signedBlock holds a block file against what was reserved, and gives the station's
// certificate in it.
func (b *backend) signedBlock(r *http.Request, file []byte) (*factory.Block, registry.StationCertificate, error) {
	var none registry.StationCertificate
	block, err := b.layout.OpenBlock(file)
	if err != nil {
		return nil, none, admin.Errorf(admin.Invalid, "%v", err)
	}
	want, err := b.reg.Block(r.Context(), block.ID)
	if err != nil {
		return nil, none, err
	}
	anchors, _, ok := b.layout.AnchorSet(want.Anchors)
	if !ok || want.Station != block.Station || !want.Expires.Equal(block.Expires) || !slices.Equal(want.IDs, block.IDs) || string(anchors) != string(block.Anchors) {
		return nil, none, admin.Errorf(admin.Conflict, "block %s is not as it was reserved: nothing was imported", block.ID)
	}
	cert, err := b.stationCertificate(block.Station, block.StationCert.Raw)
	return block, cert, err
}

// stationCertificate verifies a certificate of the station called name.
func (b *backend) stationCertificate(name string, der []byte) (registry.StationCertificate, error) {
	got, generation, cert, err := pki.VerifyStationCA(der, b.layout.Trust().DeviceCAs)
	if err == nil && got != name {
		err = errors.New("the certificate is that of " + got + ", not of " + name)
	}
	if err != nil {
		return registry.StationCertificate{}, admin.Errorf(admin.Invalid, "%v", err)
	}
	return stationRow(name, generation, cert)
}

func stationRow(name string, generation int, cert *x509.Certificate) (c registry.StationCertificate, err error) {
	pub, err := pki.PublicKey(cert)
	if err != nil {
		return c, err
	}
	c = registry.StationCertificate{Fingerprint: pki.Fingerprint(cert.Raw), Station: name, Generation: uint32(generation), DER: cert.Raw,
		NotBefore: cert.NotBefore, NotAfter: cert.NotAfter}
	c.KeyHash, err = pki.KeyFingerprint(pub)
	return c, err
}

// blockSigned takes in a block that was signed where its ids were reserved.
func (b *backend) blockSigned(r *http.Request) (any, error) {
	var in struct {
		File admin.Hex `json:"file"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	block, cert, err := b.signedBlock(r, in.File)
	if err != nil {
		return nil, err
	}
	return nil, b.update(r, func(tx *registry.Tx, actor string) error { return tx.SignedBlock(actor, block.ID, cert) })
}

// stationResult reads the block out of a result that was held against its request.
func (b *backend) stationResult(r *http.Request, file []byte, req *pki.Request, certs []*x509.Certificate) (*factory.Block, registry.StationCertificate, error) {
	var none registry.StationCertificate
	text, err := pki.ResultBlock(file)
	if err != nil {
		return nil, none, admin.Errorf(admin.Invalid, "%v", err)
	}
	block, cert, err := b.signedBlock(r, text)
	if err != nil {
		return nil, none, err
	}
	if block.ID.String() != req.Station.Block || len(certs) != 1 || !certs[0].Equal(block.StationCert) {
		return nil, none, admin.Errorf(admin.Invalid, "the block in the result does not fit the request")
	}
	return block, cert, nil
}

// mayAskStation refuses a request for a block that was not reserved, or for another key.
func (b *backend) mayAskStation(r *http.Request, req *pki.Request) error {
	s, err := b.reg.Station(r.Context(), req.Subject)
	if err != nil {
		return err
	}
	key, err := pki.KeyFingerprint(req.ParsedCSR().Pub)
	if err != nil {
		return err
	}
	if key != s.KeyHash {
		return admin.Errorf(admin.Conflict, "station %s has another key", s.Name)
	}
	id, err := factory.ParseBlockID(req.Station.Block)
	if err != nil {
		return admin.Errorf(admin.Invalid, "%v", err)
	}
	block, err := b.reg.Block(r.Context(), id)
	if err == nil && (block.Station != s.Name || !block.Signed.IsZero()) {
		err = admin.Errorf(admin.Conflict, "block %s does not wait for a signature", id)
	}
	return err
}

// renewStation takes in a certificate for the station's key, which may be a new one.
func (b *backend) renewStation(r *http.Request) (any, error) {
	var in struct {
		CSR         admin.Hex `json:"csr"`
		Certificate admin.Hex `json:"certificate"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	name := r.PathValue("name")
	csr, err := pki.ParseCSR(in.CSR)
	if err != nil {
		return nil, admin.Errorf(admin.Invalid, "%v", err)
	}
	cert, err := b.stationCertificate(name, in.Certificate)
	if err != nil {
		return nil, err
	}
	key, err := pki.KeyFingerprint(csr.Pub)
	if err != nil {
		return nil, err
	}
	if key != cert.KeyHash {
		return nil, admin.Errorf(admin.Invalid, "the certificate is for another key than the request")
	}
	err = b.update(r, func(tx *registry.Tx, actor string) error { return tx.RenewStation(actor, csr.DER, cert) })
	if err != nil {
		return nil, err
	}
	return b.station(r, name)
}

func (b *backend) revokeStation(r *http.Request) (any, error) {
	var in struct {
		Reason string `json:"reason"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	return nil, b.update(r, func(tx *registry.Tx, actor string) error {
		return tx.RevokeStation(actor, r.PathValue("name"), in.Reason)
	})
}

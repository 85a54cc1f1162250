package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"hawser/internal/admin"
	"hawser/internal/identity"
	"hawser/internal/pki"
	"hawser/internal/registry"
)

// This file is about devices that know more than a registry that was restored:
// they got a certificate, a command or a configuration after the backup was taken.
// Nothing of that is believed by itself. It is listed, and an administrator decides.

// vouched is broker.Config.Vouched; nil in a fleet that was never restored.
func (s *Server) vouched() func([]byte) bool {
	if m, err := s.reg.Meta(context.Background()); err != nil || m.Restored.IsZero() {
		return nil
	}
	return func(der []byte) bool {
		_, err := s.unimported(der)
		return err == nil
	}
}

// unimported verifies a certificate that the registry does not have: it is of a
// device CA of this fleet, and its device, if it is known, is active and has the
// same key. It changes nothing.
func (s *Server) unimported(der []byte) (*registry.Certificate, error) {
	return unimported(context.Background(), s.reg, s.layout.Trust(), der)
}

func unimported(ctx context.Context, reg *registry.Registry, trust pki.Trust, der []byte) (*registry.Certificate, error) {
	id, generation, cert, err := pki.VerifyDeviceLeaf(der, trust.DeviceCAs)
	if errors.Is(err, pki.ErrIssuer) {
		id, generation, cert, err = stationLeaf(ctx, reg, trust, der)
	}
	if err != nil {
		return nil, err
	}
	c := registryCertificate(identity.DevicePrincipal(id), uint32(generation), cert)
	_, state, err := reg.CertificateOf(ctx, c.Fingerprint)
	if err == nil {
		return nil, fmt.Errorf("certificate %x is %s: %w", c.Fingerprint, state, registry.ErrExists)
	}
	if !errors.Is(err, registry.ErrNotFound) {
		return nil, err
	}
	d, err := reg.Device(ctx, id)
	if errors.Is(err, registry.ErrNotFound) {
		return &c, nil
	}
	if err != nil {
		return nil, err
	}
	pub, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return nil, registry.ErrKey
	}
	key, err := pki.KeyFingerprint(pub)
	switch {
	case err != nil:
		return nil, err
	case d.State != registry.DeviceActive:
		return nil, fmt.Errorf("device %s is %s: %w", id, d.State, registry.ErrState)
	case d.KeyHash != key:
		return nil, fmt.Errorf("device %s: %w", id, registry.ErrKey)
	}
	return &c, nil
}

// stationLeaf is pki.VerifyDeviceLeaf for what a station of this registry has signed.
func stationLeaf(ctx context.Context, reg *registry.Registry, trust pki.Trust, der []byte) (identity.ID, int, *x509.Certificate, error) {
	stations, err := reg.Stations(ctx)
	if err != nil {
		return 0, 0, nil, err
	}
	for _, s := range stations {
		if s.State != registry.StationActive {
			continue
		}
		certs, err := reg.StationCertificates(ctx, s.Name)
		if err != nil {
			return 0, 0, nil, err
		}
		for _, c := range certs {
			_, generation, station, err := pki.VerifyStationCA(c.DER, trust.DeviceCAs)
			if err != nil {
				continue // of a generation that was retired
			}
			if id, cert, err := pki.VerifyStationLeaf(der, station); err == nil {
				return id, generation, cert, nil
			}
		}
	}
	return 0, 0, nil, pki.ErrIssuer
}

// proven is broker.Config.Proven: the holder has shown that the key is its own.
func (s *Server) proven(der []byte) {
	s.work.do(func() {
		c, err := s.unimported(der)
		if err != nil {
			return // imported or barred since
		}
		id, _ := c.Principal.ID()
		a := registry.Ahead{Device: id, Kind: registry.AheadCertificate, Detail: fmt.Sprintf("%x", c.Fingerprint), DER: der, At: time.Now()}
		known, err := s.reg.AheadOf(context.Background(), id)
		for _, k := range known {
			if k.Kind == a.Kind && k.Detail == a.Detail {
				return // it comes again and again
			}
		}
		if err == nil {
			err = s.reg.Update(context.Background(), func(tx *registry.Tx) error { return tx.NoteAhead(a) })
		}
		if err != nil {
			s.log.Warn("a certificate that was never imported is not noted", "device", id, "error", err)
			return
		}
		s.log.Warn("a device has a certificate that the restored registry does not know", "device", id, "sha256", a.Detail)
	})
}

// maxGlance is how many devices status names.
const maxGlance = 10

// aheadAtAGlance counts the devices that know more and names the first of them.
func (b *backend) aheadAtAGlance(ctx context.Context) (n int, first []identity.ID, err error) {
	if n, err = b.reg.AheadCount(ctx); n == 0 || err != nil {
		return n, nil, err
	}
	list, err := b.reg.Ahead(ctx, 0, 4*maxGlance) // at most four rows each
	for _, a := range list {
		if len(first) < maxGlance && !slices.Contains(first, a.Device) {
			first = append(first, a.Device)
		}
	}
	return n, first, err
}

func (b *backend) ahead(r *http.Request) (any, error) {
	p := params{r: r}
	after := p.id("after")
	if p.err != nil {
		return nil, p.err
	}
	list, err := b.reg.Ahead(r.Context(), after, maxPage)
	out := make([]admin.Ahead, 0, len(list))
	for _, a := range list {
		_, err := b.reg.Device(r.Context(), a.Device)
		if err != nil && !errors.Is(err, registry.ErrNotFound) {
			return nil, err
		}
		out = append(out, admin.Ahead{Device: a.Device, Known: err == nil, What: string(a.Kind), Detail: a.Detail, At: admin.UTC(a.At)})
	}
	return out, err
}

// adopt imports what a device has proven, after the same checks again.
func (b *backend) adopt(r *http.Request) (any, error) {
	id, err := pathID(r)
	if err != nil {
		return nil, err
	}
	list, err := b.reg.AheadOf(r.Context(), id)
	if err != nil {
		return nil, err
	}
	var der []byte
	for _, a := range list {
		if a.Kind == registry.AheadCertificate {
			der = a.DER
		}
	}
	if der == nil {
		return nil, admin.Errorf(admin.NotFound, "device %s has shown no certificate that the registry does not have\nhint: hawser device list --ahead", id)
	}
	if _, err := b.reg.Device(r.Context(), id); errors.Is(err, registry.ErrNotFound) {
		return nil, admin.Errorf(admin.NotFound, "device %s is not in the registry, and without its CSR it cannot be\nhint: hawser device enroll --id %s --csr FILE", id, id)
	}
	c, err := unimported(r.Context(), b.reg, b.layout.Trust(), der)
	if err != nil {
		return nil, err
	}
	if err := b.update(r, func(tx *registry.Tx, actor string) error { return tx.AddCertificate(actor, *c) }); err != nil {
		return nil, err
	}
	c.State, c.At = registry.CertificateActive, time.Now()
	return certificateOf(*c), nil
}

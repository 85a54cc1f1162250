package bench

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"hawser/internal/factory"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// Enrolled is what a unit gets that has made its own key.
type Enrolled struct {
	ID          identity.ID
	Certificate []byte // DER
	Trust       []byte // a whole trust region, for firmware that keeps it as it is
	Key         string // pki.KeyFingerprint, hex
	Again       bool   // the key was enrolled before: this is the same certificate
	Ignored     bool   // the request asks for a subject or for extensions; they were not looked at
	Count       Count
}

// Enrol certifies the key of a request, PEM or DER. Its record is on disk before there is a
// certificate to hand out. A key that was enrolled before gets what it got then: the answer
// may not have reached the unit.
func (b *Bench) Enrol(request []byte) (*Enrolled, error) {
	csr, err := pki.ParseCSR(request)
	if err != nil {
		return nil, fmt.Errorf("%w: no id was used", err)
	}
	key, err := pki.KeyFingerprint(csr.Pub)
	if err != nil {
		return nil, err
	}
	v := &Enrolled{Key: hex.EncodeToString(key[:]), Ignored: asksForMore(csr.DER)}
	if id, ok := b.past.keys[key]; ok {
		return b.again(v, id)
	}
	id, block, err := b.reserve(time.Now())
	if err != nil {
		return nil, err
	}
	u, err := b.certify(id, block, csr.DER, factory.ByCSR)
	if err == nil {
		v.ID, v.Certificate = id, u.Cert.Raw
		v.Trust, err = trustOf(u.Cert, block)
	}
	if err != nil {
		return nil, b.spoil(id, err)
	}
	if err := b.record(u); err != nil {
		return nil, err
	}
	v.Count = b.Count(time.Now())
	return v, nil
}

// spoil burns an id that a request could not have, and gives the reason.
func (b *Bench) spoil(id identity.ID, err error) error {
	if berr := b.burn(id, err.Error(), time.Now()); berr != nil {
		return berr
	}
	return fmt.Errorf("%w: the id %s is burnt", err, id)
}

func (b *Bench) again(v *Enrolled, id identity.ID) (*Enrolled, error) {
	cert, err := x509.ParseCertificate(b.past.made[id])
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(b.blocks, func(l *factory.Block) bool { return slices.Contains(l.IDs, id) })
	if i < 0 {
		return nil, fmt.Errorf("this key was enrolled before, as %s, from a block that is not here", id)
	}
	v.ID, v.Certificate, v.Again, v.Count = id, cert.Raw, true, b.Count(time.Now())
	v.Trust, err = trustOf(cert, b.blocks[i])
	return v, err
}

// asksForMore reports whether a request names a subject or wants extensions.
func asksForMore(der []byte) bool {
	r, err := x509.ParseCertificateRequest(der)
	return err == nil && (len(r.Subject.Names) > 0 || len(r.Extensions) > 0)
}

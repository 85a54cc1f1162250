package fleet

import (
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"hawser/internal/identity"
	"hawser/internal/pki"
)

// byGeneration says in issued.journal that an older certificate answers for id and key.
const byGeneration = "generation"

// ErrRefused reports a device for which the safe does not sign; the text says why.
var ErrRefused = errors.New("refused")

// Resign is one device that a rollover asks a certificate for. What it says is the
// server's word, and counts for nothing beside what the safe knows.
type Resign struct {
	ID  identity.ID
	CSR []byte // DER
	Old []byte // its certificate of an older generation, DER; nil = none
}

// Resigned is the answer for one device: a certificate, or why there is none.
type Resigned struct {
	ID      identity.ID
	Cert    *x509.Certificate
	Refused error // ErrRefused
}

// resigning is one rollover at work.
type resigning struct {
	ca      *CA
	issuer  *pki.Issuer
	older   []*x509.Certificate // uncompromised device CAs before the new one
	flashed Flashed
	now     time.Time
}

// Flashed is what the safe's own copies of the station journals say: which id and key
// were made together. Both maps go by id or by hex KeyFingerprint.
type Flashed struct {
	KeyOf  map[string]string
	Holder map[string]string
}

// Resigner makes a function that answers parts of a rollover to generation n, in order.
// It signs on all cores; each part is in issued.journal, on disk, before its
// certificates are given away. A device whose id and key do not stand together in the
// station journals, in issued.journal or in an older generation whose CA is not marked
// compromised is refused, and the others are signed.
func (c *CA) Resigner(n uint32, flashed Flashed, now time.Time) (func([]Resign) ([]Resigned, error), error) {
	issuer, err := c.issuer(generationBase(n), pki.DeviceCA)
	if err != nil {
		return nil, err
	}
	r := &resigning{ca: c, issuer: issuer, flashed: flashed, now: now}
	for g := uint32(1); g < n; g++ {
		bad, err := c.Compromised(g)
		if err != nil {
			return nil, err
		}
		text, err := os.ReadFile(filepath.Join(c.dir, generationBase(g)+".crt"))
		if errors.Is(err, os.ErrNotExist) || bad {
			continue
		}
		if err != nil {
			return nil, err
		}
		ca, err := pki.ParseCert(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", generationBase(g), err)
		}
		r.older = append(r.older, ca)
	}
	return r.part, nil
}

func (r *resigning) part(list []Resign) ([]Resigned, error) {
	answers, entries := make([]Resigned, len(list)), make([]pki.Entry, len(list))
	err := eachOnAllCores(len(list), func(i int) error {
		answers[i].ID = list[i].ID
		cert, e, err := r.one(&list[i])
		if errors.Is(err, ErrRefused) {
			answers[i].Refused = err
			return nil
		}
		answers[i].Cert, entries[i] = cert, e
		return err
	})
	if err != nil {
		return nil, err
	}
	return answers, r.record(answers, entries)
}

// record writes what was signed. Two devices of one part that claim one key, or one id
// twice with two keys, are found here.
func (r *resigning) record(answers []Resigned, entries []pki.Entry) error {
	keyOf, holder := map[string]string{}, map[string]string{}
	var signed []pki.Entry
	for i, e := range entries {
		if answers[i].Cert == nil {
			continue
		}
		k, again := keyOf[e.Subject]
		id, taken := holder[e.Key]
		if again && k != e.Key || taken && id != e.Subject {
			answers[i].Cert, answers[i].Refused = nil, fmt.Errorf("%w: the request names this id or this key twice", ErrRefused)
			continue
		}
		keyOf[e.Subject], holder[e.Key] = e.Key, e.Subject
		signed = append(signed, e)
	}
	if len(signed) == 0 {
		return nil
	}
	return r.ca.journal.Append(signed...)
}

// one judges and signs for one device. It only reads what the parts share.
func (r *resigning) one(d *Resign) (*x509.Certificate, pki.Entry, error) {
	csr, err := pki.ParseCSR(d.CSR)
	if err != nil {
		return nil, pki.Entry{}, fmt.Errorf("%w: %v", ErrRefused, err)
	}
	key, err := pki.KeyFingerprint(csr.Pub)
	if err != nil {
		return nil, pki.Entry{}, err
	}
	vouched, err := r.vouch(d, csr, hex.EncodeToString(key[:]))
	if err != nil {
		return nil, pki.Entry{}, fmt.Errorf("%w: %v", ErrRefused, err)
	}
	cert, err := pki.IssueDeviceLeaf(r.issuer, d.ID, csr.Pub, r.now)
	if err != nil {
		return nil, pki.Entry{}, err
	}
	o := order{kind: pki.KindDevice, subject: d.ID.String(), pub: csr.Pub, vouched: vouched}
	return cert, entry(o, r.issuer, cert, key, r.now), nil
}

// vouch says who answers for id and key, and refuses what contradicts any record.
func (r *resigning) vouch(d *Resign, csr *pki.CSR, key string) (string, error) {
	id := d.ID.String()
	if err := r.ca.journal.CheckBound(pki.KindDevice, id, key); err != nil {
		return "", err
	}
	if k, ok := r.flashed.KeyOf[id]; ok && k != key {
		return "", fmt.Errorf("a station's journal has %s with another key", id)
	}
	if other, ok := r.flashed.Holder[key]; ok && other != id {
		return "", fmt.Errorf("a station's journal has this key for %s", other)
	}
	if r.ca.journal.Vouches(pki.KindDevice, id, key) || r.flashed.KeyOf[id] == key {
		return byJournal, nil
	}
	if d.Old == nil {
		return "", errors.New("no journal of this safe has this id with this key, and no older certificate came along")
	}
	name, _, old, err := pki.VerifyDeviceLeaf(d.Old, r.older)
	switch {
	case err != nil:
		return "", fmt.Errorf("no journal of this safe has this id with this key, and its older certificate does not count: %v", err)
	case name != d.ID:
		return "", fmt.Errorf("its older certificate is that of %s", name)
	case !csr.Pub.Equal(old.PublicKey):
		return "", errors.New("its older certificate is for another key")
	}
	return byGeneration, nil
}

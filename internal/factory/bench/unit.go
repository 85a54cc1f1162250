package bench

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"hawser/internal/factory"
	"hawser/internal/factory/keyroom"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// flags of the identity block: none is defined.
const flags = 0

// Result is how one unit ended.
type Result struct {
	Pass        bool
	ID          identity.ID // 0 if none was taken
	Stage       string      // of a failure: what was being done
	Reason      string      // of a failure: one line, and perhaps a line "hint: "
	ReadBack    bool        // what was written was read back and compared
	Locked      bool        // a debug read fails
	Block       factory.BlockID
	Certificate string // SHA-256 of the DER, hex
	Key         string // pki.KeyFingerprint, hex
	Count       Count
	Time        time.Time
}

// The stages of a unit, in their order.
const (
	stageKey     = "making the key"
	stageCertify = "certifying it"
	stageWrite   = "writing and reading back"
	stageReset   = "resetting the unit"
	stageLock    = "locking the unit"
)

// stageError is a failure of the unit, not of the bench.
type stageError struct {
	stage string
	err   error
}

func (e *stageError) Error() string { return e.err.Error() }
func (e *stageError) Unwrap() error { return e.err }

func at(stage string, err error) error {
	if err == nil {
		return nil
	}
	return &stageError{stage, err}
}

// unit makes a device of the unit that child has found. Whatever goes wrong burns the id; an
// error of its own is one of the bench, which must not go on.
func (b *Bench) unit(ctx context.Context, child *keyroom.Child) (*Result, *keyroom.Sight, error) {
	id, block, err := b.reserve(time.Now())
	if err != nil {
		return nil, nil, err
	}
	r := &Result{ID: id, Block: block.ID}
	made, err := b.make(ctx, child, id, block, r)
	if err == nil {
		if err := b.record(made); err != nil {
			return nil, nil, err
		}
		r.Pass = true
		return b.finish(r), keyroom.Written(id, flags), nil
	}
	seen := blame(err, r)
	if ctx.Err() != nil {
		r.Reason = "it was stopped from outside"
	}
	line, _, _ := strings.Cut(r.Stage+": "+r.Reason, "\n")
	if err := b.burn(id, line, time.Now()); err != nil {
		return nil, nil, err
	}
	return b.finish(r), seen, nil
}

// blame fills in why a unit failed, and gives how it was left if that is known.
func blame(err error, r *Result) *keyroom.Sight {
	r.Reason = err.Error()
	var stage *stageError
	if errors.As(err, &stage) {
		r.Stage = stage.stage
	}
	var f *keyroom.Failure
	if errors.As(err, &f) {
		return f.Sight
	}
	return nil
}

func (b *Bench) finish(r *Result) *Result {
	r.Time = time.Now()
	r.Count = b.Count(r.Time)
	return r
}

// make does everything to the unit. The journal is not touched.
func (b *Bench) make(ctx context.Context, child *keyroom.Child, id identity.ID, block *factory.Block, r *Result) (*factory.NewUnit, error) {
	der, err := child.Make(id, flags)
	if err != nil {
		return nil, at(stageKey, err)
	}
	u, err := b.certify(id, block, der, factory.ByProbe)
	if err != nil {
		return nil, at(stageCertify, err)
	}
	trust, err := trustOf(u.Cert, block)
	if err != nil {
		return nil, at(stageCertify, err)
	}
	if r.ReadBack, err = child.Write(trust); err != nil {
		return nil, at(stageWrite, err)
	}
	if err := child.Reset(); err != nil {
		return nil, at(stageReset, err)
	}
	child.Close()
	r.Locked, err = b.lockUnit(ctx, id)
	return u, at(stageLock, b.describe(r, u, err))
}

// describe names the certificate and the key of u in r, unless err is an error.
func (b *Bench) describe(r *Result, u *factory.NewUnit, err error) error {
	if err != nil {
		return err
	}
	csr, err := pki.ParseCSR(u.CSR)
	if err != nil {
		return err
	}
	key, err := pki.KeyFingerprint(csr.Pub)
	sum := pki.Fingerprint(u.Cert.Raw)
	r.Key, r.Certificate = hex.EncodeToString(key[:]), hex.EncodeToString(sum[:])
	return err
}

// certify signs the certificate of a request. Of the request it takes the public key and
// the proof of possession.
func (b *Bench) certify(id identity.ID, block *factory.Block, der []byte, how string) (*factory.NewUnit, error) {
	csr, err := pki.ParseCSR(der)
	if err != nil {
		return nil, err
	}
	key, err := pki.KeyFingerprint(csr.Pub)
	if err != nil {
		return nil, err
	}
	if other, ok := b.past.keys[key]; ok {
		return nil, fmt.Errorf("the key is that of %s", other)
	}
	ca, err := pki.NewIssuer(b.station, b.key, pki.StationCA)
	if err != nil {
		return nil, err
	}
	cert, err := pki.IssueDeviceLeaf(ca, id, csr.Pub, time.Now())
	if err != nil {
		return nil, err
	}
	return &factory.NewUnit{ID: id, Block: block.ID, Class: b.Settings.Class, Hardware: b.Settings.Hardware, How: how, CSR: csr.DER, Cert: cert}, nil
}

// trustOf is the trust region of a unit.
func trustOf(cert *x509.Certificate, block *factory.Block) ([]byte, error) {
	return factory.EncodeTrust([]factory.Entry{
		{Tag: factory.TagCertificate, Value: cert.Raw},
		{Tag: factory.TagAnchors, Value: block.Anchors},
	})
}

// record makes u a unit: with its return it is on disk.
func (b *Bench) record(u *factory.NewUnit) error {
	if err := b.journal.AppendUnit(*u, time.Now()); err != nil {
		return fmt.Errorf("%s is written into the unit, but not into the journal: the id is burnt at the next start, and the unit must be done again: %w", u.ID, err)
	}
	csr, err := pki.ParseCSR(u.CSR)
	if err != nil {
		return err
	}
	key, err := pki.KeyFingerprint(csr.Pub)
	if err == nil {
		b.past.add(u.ID, key, u.Cert.Raw)
	}
	return err
}

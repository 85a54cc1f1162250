package bench

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"

	"hawser/internal/factory"
	"hawser/internal/factory/keyroom"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// Verdict is what a unit holds and what is wrong with it.
type Verdict struct {
	ID          identity.ID // 0: there is no sound identity block
	Certificate string      // SHA-256 of the DER, hex; "" if there is none
	Key         string      // pki.KeyFingerprint of the key in the unit, hex
	Anchors     uint64      // sequence of the anchor set, 0 for none
	Recorded    string      // in this bench's journal: "unit", "burnt", "no", or "" if there is no journal
	Faults      []string    // in the order of checking; none: block, certificate and key agree
}

func (v *Verdict) fault(format string, args ...any) {
	v.Faults = append(v.Faults, fmt.Sprintf(format, args...))
}

// Checker verifies units. It needs neither the key of the station nor the bench to itself.
type Checker struct {
	Probe  string
	Child  []string          // as in Runner
	Wait   func(text string) // as in Runner
	blocks []*factory.Block  // none: a unit is only held against itself
	past   *ledger           // nil: no journal
}

// NewChecker reads what the bench in dir knows. probe, if not "", is used in place of the
// bench's, and then there need be no bench.
func NewChecker(dir, probe string) (*Checker, error) {
	c := &Checker{Probe: probe}
	s, err := readSettings(dir)
	if err != nil {
		if probe != "" {
			return c, nil
		}
		return nil, err
	}
	if probe == "" {
		c.Probe = s.Probe
	}
	if c.blocks, err = readBlocks(dir, s); err != nil {
		return nil, err
	}
	c.past, err = readLedger(journalPath(dir, s), &reserved{})
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	return c, err
}

// Verify waits for a unit, reads it back and lets it run again.
func (c *Checker) Verify(ctx context.Context) (*Verdict, error) {
	child, err := keyroom.Start(ctx, c.Child...)
	if err != nil {
		return nil, err
	}
	defer child.Close()
	child.Notice = c.Wait
	seen, err := child.Wait(c.Probe, nil)
	if err != nil {
		return nil, err
	}
	if seen.Blind {
		return nil, errors.New("this probe cannot read: the unit was not looked at\nhint: --probe gdb:...")
	}
	unit, err := child.Read()
	if err != nil {
		return nil, err
	}
	return c.judge(unit), nil
}

// judge holds the parts of a unit against each other and against what the bench knows.
func (c *Checker) judge(unit *keyroom.Reading) *Verdict {
	v := &Verdict{}
	if unit.Bad != "" {
		v.fault("identity block: %s", unit.Bad)
	} else {
		v.ID = unit.ID
	}
	entries, _, err := factory.ParseTrust(unit.Trust)
	if err != nil {
		v.fault("trust region: %v", err)
		return v
	}
	c.judgeCertificate(v, unit, factory.Value(entries, factory.TagCertificate))
	c.judgeAnchors(v, factory.Value(entries, factory.TagAnchors))
	return v
}

func (c *Checker) judgeCertificate(v *Verdict, unit *keyroom.Reading, der []byte) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		v.fault("certificate: %v", err)
		return
	}
	sum := pki.Fingerprint(der)
	v.Certificate = hex.EncodeToString(sum[:])
	if v.ID != 0 {
		key := pki.Fingerprint(unit.Public)
		v.Key = hex.EncodeToString(key[:])
		if cn := cert.Subject.CommonName; cn != v.ID.String() {
			v.fault("the certificate is for %q, the identity block for %s", cn, v.ID)
		}
		if !bytes.Equal(cert.RawSubjectPublicKeyInfo, unit.Public) {
			v.fault("the certificate is for another key than the one in the identity block")
		}
	}
	c.judgeIssuer(v, der)
	c.judgeRecord(v, der)
}

// judgeIssuer wants the signature of a station whose block this bench holds.
func (c *Checker) judgeIssuer(v *Verdict, der []byte) {
	if len(c.blocks) == 0 {
		return
	}
	for _, l := range c.blocks {
		if _, _, err := pki.VerifyStationLeaf(der, l.StationCert); err == nil {
			return
		}
	}
	v.fault("the certificate is not signed by this station")
}

// judgeRecord looks the unit up in the journal. A unit of another bench is none of ours to judge.
func (c *Checker) judgeRecord(v *Verdict, der []byte) {
	if c.past == nil || v.ID == 0 {
		return
	}
	have, made := c.past.made[v.ID]
	switch {
	case made && !bytes.Equal(have, der):
		v.Recorded = "unit"
		v.fault("the journal has another certificate for %s", v.ID)
	case made:
		v.Recorded = "unit"
	case c.past.burnt[v.ID]:
		v.Recorded = "burnt"
		v.fault("%s is burnt: this unit was never finished", v.ID)
	default:
		v.Recorded = "no"
	}
}

func (c *Checker) judgeAnchors(v *Verdict, file []byte) {
	set, err := pki.InspectAnchors(file)
	if err != nil {
		v.fault("anchor set: %v", err)
		return
	}
	v.Anchors = set.Sequence
	if len(c.blocks) > 0 && set.Fleet != c.blocks[0].Fleet {
		v.fault("the anchor set belongs to another fleet")
	}
}

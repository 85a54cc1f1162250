package bench

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"os"

	"hawser/internal/factory"
	"hawser/internal/identity"
)

// ledger is what the journal says about ids and keys.
type ledger struct {
	station *x509.Certificate // in force
	blocks  map[string]bool
	made    map[identity.ID][]byte // the unit's certificate, DER
	burnt   map[identity.ID]bool
	keys    map[[32]byte]identity.ID // pki.KeyFingerprint of units
}

func newLedger() *ledger {
	return &ledger{blocks: map[string]bool{}, made: map[identity.ID][]byte{}, burnt: map[identity.ID]bool{}, keys: map[[32]byte]identity.ID{}}
}

// used reports whether id was a unit's or burnt.
func (l *ledger) used(id identity.ID) bool {
	_, made := l.made[id]
	return made || l.burnt[id]
}

// readLedger checks the journal whole, and that it still begins with what was there when the
// last id was taken.
func readLedger(path string, r *reserved) (*ledger, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	l := newLedger()
	sum, err := factory.ReadJournal(f, factory.Known{}, func(line *factory.Line) error { return l.take(line, r) })
	if err != nil {
		return nil, fmt.Errorf("%s: %w\nhint: nothing is done with this bench before the journal is as it was", path, err)
	}
	if sum.Lines < r.Records {
		return nil, fmt.Errorf("%s: its end was cut off: it has %d lines and had %d when the last id was taken\n"+
			"hint: put the newest state of the file back", path, sum.Lines, r.Records)
	}
	l.station = sum.Cert
	return l, nil
}

func (l *ledger) take(line *factory.Line, r *reserved) error {
	if line.Number == r.Records && hex.EncodeToString(line.Hash[:]) != r.Head {
		return fmt.Errorf("%w: this is not the line that was there when the last id was taken", factory.ErrJournal)
	}
	switch line.What {
	case factory.Load:
		l.blocks[line.Block] = true
	case factory.Burnt:
		id, err := identity.ParseID(line.ID)
		if err != nil {
			return err
		}
		l.burnt[id] = true
	case factory.Made:
		l.add(line.Unit.ID, line.Unit.Key, line.Unit.Cert.Raw)
	}
	return nil
}

func (l *ledger) add(id identity.ID, key [32]byte, cert []byte) {
	l.made[id], l.keys[key] = bytes.Clone(cert), id
}

// Package bench is a flashing bench: its directory, and the loop that turns blank units
// into devices of the fleet, offline.
//
// It promises:
//   - an id is on disk as taken before it is used, and each id that was taken ends as one of
//     two records in the journal: a unit, once it was written, read back, reset and, where that
//     is demanded, locked; or burnt, with the reason. That holds wherever the bench loses
//     power: what was left open is burnt at the next start. No id and no key is used twice;
//   - the journal record of a unit is on disk before the unit is called done;
//   - the keys of units are not here: package keyroom makes them, in a process for each unit.
//     The key of the station is here, and in none of those processes;
//   - what is missing or damaged in the directory is named and refused, never made anew.
//
// One process holds a bench at a time.
package bench

import (
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"hawser/internal/durable"
	"hawser/internal/factory"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// Bench is an open bench directory. It is not safe for concurrent use.
type Bench struct {
	Settings Settings
	dir      string
	lock     *durable.FileLock
	key      crypto.Signer
	blocks   []*factory.Block // in the order of use
	journal  *factory.Journal
	past     *ledger
	reserved *reserved
	station  *x509.Certificate // in force
	Burnt    []identity.ID     // by Open: ids that a run left open which never came to its end
}

// Open opens a bench that has loaded a block. pass gives the passphrase of the station's key.
func Open(dir string, pass func() ([]byte, error), now time.Time) (*Bench, error) {
	s, err := readSettings(dir)
	if err != nil {
		return nil, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	b := &Bench{Settings: *s, dir: dir, lock: lock}
	if err := b.open(pass, now); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

func lockDir(dir string) (*durable.FileLock, error) {
	lock, err := durable.Lock(filepath.Join(dir, fileLock))
	if errors.Is(err, durable.ErrLocked) {
		return nil, fmt.Errorf("another process uses this bench: %w", err)
	}
	return lock, err
}

func (b *Bench) open(pass func() ([]byte, error), now time.Time) (err error) {
	if b.reserved, err = readReserved(b.dir); err != nil {
		return err
	}
	if b.blocks, err = readBlocks(b.dir, &b.Settings); err != nil {
		return err
	}
	if len(b.blocks) == 0 || b.Settings.Fleet == "" {
		return fmt.Errorf("no block of ids is loaded\nhint: hawser factory load --dir %s FILE.block", b.dir)
	}
	if b.key, err = pki.OpenKey(b.Settings.keyURI(b.dir), pass); err != nil {
		return err
	}
	if err := b.openJournal(now); err != nil {
		return err
	}
	if err := b.recordBlocks(now); err != nil {
		return err
	}
	return b.burnOpen(now)
}

// Close gives the bench up.
func (b *Bench) Close() error {
	var errs []error
	if b.journal != nil {
		errs = append(errs, b.journal.Close())
	}
	return errors.Join(append(errs, b.lock.Close())...)
}

// JournalPath is where the journal of the bench in dir lies.
func (b *Bench) JournalPath() string { return journalPath(b.dir, &b.Settings) }

func journalPath(dir string, s *Settings) string { return filepath.Join(dir, s.Station+".journal") }

// openJournal checks the journal whole. Only a bench that never took an id may be without
// one, and begins it.
func (b *Bench) openJournal(now time.Time) error {
	path := b.JournalPath()
	_, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && b.reserved.Records > 0:
		return fmt.Errorf("%s is missing, and units were made: which ids are used is not known, and none is given out\n"+
			"hint: put the file back from where it went", path)
	case errors.Is(err, fs.ErrNotExist):
		first := b.blocks[0]
		if err := factory.CreateJournal(path, b.key, first.Fleet, first.StationCert, now); err != nil {
			return err
		}
	}
	if b.past, err = readLedger(path, b.reserved); err != nil {
		return err
	}
	if b.journal, err = factory.OpenJournal(path, b.key); err != nil {
		return err
	}
	b.station = b.past.station
	return nil
}

// recordBlocks tells the journal of blocks, and of newer certificates of the station, that
// were loaded since. A block that the journal knows must be there: its ids may be used.
func (b *Bench) recordBlocks(now time.Time) error {
	for id := range b.past.blocks {
		if !slices.ContainsFunc(b.blocks, func(l *factory.Block) bool { return l.ID.String() == id }) {
			return fmt.Errorf("%s is missing\nhint: put the file back, or load the block again", blockPath(b.dir, id))
		}
	}
	for _, l := range b.blocks {
		if err := b.journal.AppendBlock(l.ID, now); err != nil {
			return err
		}
		if !l.StationCert.NotBefore.After(b.station.NotBefore) {
			continue
		}
		if err := b.journal.AppendRenew(l.StationCert, b.key, now); err != nil {
			return err
		}
		b.station = l.StationCert
	}
	return nil
}

// burnOpen burns the id that was taken by a run which did not come to its end.
func (b *Bench) burnOpen(now time.Time) error {
	id := b.reserved.ID
	if id == 0 || b.past.used(id) {
		return nil
	}
	if err := b.burn(id, "the bench stopped in the middle of the unit", now); err != nil {
		return err
	}
	b.Burnt = append(b.Burnt, id)
	return nil
}

func (b *Bench) burn(id identity.ID, reason string, now time.Time) error {
	if err := b.journal.AppendBurnt(id, reason, now); err != nil {
		return err
	}
	b.past.burnt[id] = true
	return nil
}

// ErrStop is why no further unit is begun: the end of ids, of a block or of the station's
// certificate.
var ErrStop = errors.New("no further unit is begun")

// next gives the next free id and its block.
func (b *Bench) next(now time.Time) (identity.ID, *factory.Block, error) {
	if now.After(b.station.NotAfter) {
		return 0, nil, fmt.Errorf("%w: the certificate of station %q expired at %s\nhint: hawser factory renew", ErrStop,
			b.Settings.Station, stamp(b.station.NotAfter))
	}
	var expired *factory.Block
	for _, l := range b.blocks {
		i := slices.IndexFunc(l.IDs, func(id identity.ID) bool { return !b.past.used(id) })
		switch {
		case i < 0:
		case !now.Before(l.Expires):
			expired = l
		default:
			return l.IDs[i], l, nil
		}
	}
	const hint = "\nhint: hawser factory reserve on the server, then hawser factory load here"
	if expired != nil {
		return 0, nil, fmt.Errorf("%w: block %s expired at %s%s", ErrStop, expired.ID, stamp(expired.Expires), hint)
	}
	return 0, nil, fmt.Errorf("%w: all ids are used up%s", ErrStop, hint)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// reserve takes the next id: it is on disk when it is given.
func (b *Bench) reserve(now time.Time) (identity.ID, *factory.Block, error) {
	id, block, err := b.next(now)
	if err != nil {
		return 0, nil, err
	}
	head := b.journal.Head()
	r := &reserved{ID: id, Records: b.journal.Lines(), Head: hex.EncodeToString(head[:])}
	if err := r.write(b.dir); err != nil {
		return 0, nil, err
	}
	b.reserved = r
	return id, block, nil
}

// Count is how far the bench is with its blocks.
type Count struct {
	Made int `json:"made"` // units
	Of   int `json:"of"`   // ids in all blocks
	Left int `json:"left"` // ids that can still be used
}

// Count counts over the blocks that are loaded.
func (b *Bench) Count(now time.Time) (c Count) {
	for _, l := range b.blocks {
		for _, id := range l.IDs {
			c.Of++
			_, made := b.past.made[id]
			switch {
			case made:
				c.Made++
			case !b.past.used(id) && now.Before(l.Expires):
				c.Left++
			}
		}
	}
	return c
}

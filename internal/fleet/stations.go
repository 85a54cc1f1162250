package fleet

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"hawser/internal/durable"
	"hawser/internal/factory"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// stationsDir holds the safe's own copies of the station journals, NAME.journal, each with
// NAME.head: number and hash of its last line.
const stationsDir = "journals"

// stationHead is how far a copy goes.
type stationHead struct {
	Lines uint64 `json:"lines"`
	Head  string `json:"head"` // SHA-256 of the last line, hex
}

// AddedJournal tells what AddJournal took in.
type AddedJournal struct {
	Station string
	Lines   uint64
	New     uint64 // lines that the copy before did not have
	Units   int
}

// AddJournal keeps a copy of a station's journal. Chain and signatures must hold, a device
// CA of this directory must have certified the station, it must continue the copy before,
// and no id and key may stand together otherwise than in any other record here.
func (c *CA) AddJournal(path string) (*AddedJournal, error) {
	station, err := stationOf(path)
	if err != nil {
		return nil, err
	}
	known, err := c.stationHead(station)
	if err != nil {
		return nil, err
	}
	others, err := c.Flashed()
	if err != nil {
		return nil, err
	}
	cas, err := c.deviceCAs()
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sum, err := factory.ReadJournal(f, known, func(l *factory.Line) error { return c.mayKeep(l, cas, others) })
	if err != nil {
		return nil, fmt.Errorf("%s: %w\nhint: nothing was kept of it", path, err)
	}
	if sum.Fleet != c.Fleet() {
		return nil, fmt.Errorf("%s is of another fleet", path)
	}
	out := &AddedJournal{Station: sum.Station, Lines: sum.Lines, New: sum.Lines - known.Lines, Units: sum.Units}
	return out, c.keepJournal(f, int64(sum.Torn), sum)
}

// stationOf reads the station's name out of the first line; it is checked with the rest.
func stationOf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	line, err := bufio.NewReader(io.LimitReader(f, 64<<10)).ReadBytes('\n')
	var r factory.Record
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	if err == nil {
		err = identity.CheckName(r.Station)
	}
	if err != nil {
		return "", fmt.Errorf("%s is no station's journal: %w", path, err)
	}
	return r.Station, nil
}

// mayKeep judges one new line of a journal.
func (c *CA) mayKeep(l *factory.Line, cas []*x509.Certificate, others Flashed) error {
	if l.What == factory.Begin || l.What == factory.Renew {
		_, _, _, err := pki.VerifyStationCA(l.Cert, cas)
		return err
	}
	if l.What != factory.Made {
		return nil
	}
	key := hex.EncodeToString(l.Unit.Key[:])
	if err := c.journal.CheckBound(pki.KindDevice, l.ID, key); err != nil {
		return err
	}
	return others.agree(l.ID, key)
}

// agree refuses an id or a key that stands with another in the journals.
func (f Flashed) agree(id, key string) error {
	if k, ok := f.KeyOf[id]; ok && k != key {
		return fmt.Errorf("a station's journal has %s with another key", id)
	}
	if other, ok := f.Holder[key]; ok && other != id {
		return fmt.Errorf("a station's journal has this key for %s", other)
	}
	return nil
}

// keepJournal writes the copy, then its head. A crash between leaves a copy that goes
// further than its head says, which the same AddJournal mends.
func (c *CA) keepJournal(f *os.File, torn int64, sum *factory.Summary) error {
	dir := filepath.Join(c.dir, stationsDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, ".journal-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // after the rename there is nothing left of that name
	_, err = io.CopyN(tmp, f, size-torn)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return fmt.Errorf("keep journal: %w", err)
	}
	if err := rename(tmp.Name(), filepath.Join(dir, sum.Station+".journal")); err != nil {
		return err
	}
	head, err := json.Marshal(stationHead{sum.Lines, hex.EncodeToString(sum.Head[:])})
	if err != nil {
		return err
	}
	return errors.Join(durable.WriteFile(filepath.Join(dir, sum.Station+".head"), append(head, '\n'), 0o600), durable.SyncDir(c.dir))
}

func (c *CA) stationHead(station string) (k factory.Known, err error) {
	path := filepath.Join(c.dir, stationsDir, station+".head")
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return k, nil
	}
	var h stationHead
	if err == nil {
		err = json.Unmarshal(text, &h)
	}
	if err != nil {
		return k, fmt.Errorf("%s: %w", path, err)
	}
	raw, err := hex.DecodeString(h.Head)
	if err != nil || len(raw) != len(k.Head) {
		return k, fmt.Errorf("%s is damaged\n%s", path, restoreHint)
	}
	k.Lines = h.Lines
	copy(k.Head[:], raw)
	return k, nil
}

// deviceCAs gives every device CA of this directory.
func (c *CA) deviceCAs() (cas []*x509.Certificate, err error) {
	bases, err := caBases(c.dir)
	if err != nil {
		return nil, err
	}
	for _, base := range bases {
		if deviceGeneration(base) == 0 {
			continue
		}
		ca, err := caCert(c.dir, base)
		if err != nil {
			return nil, err
		}
		cas = append(cas, ca)
	}
	return cas, nil
}

// Flashed reads the safe's copies of the station journals. Their signatures were checked
// when they were kept; that they are what was kept, their chains and heads tell.
func (c *CA) Flashed() (Flashed, error) {
	all := Flashed{KeyOf: map[string]string{}, Holder: map[string]string{}}
	entries, err := os.ReadDir(filepath.Join(c.dir, stationsDir))
	if errors.Is(err, fs.ErrNotExist) {
		return all, nil
	}
	for _, e := range entries {
		station, ok := strings.CutSuffix(e.Name(), ".journal")
		if !ok || strings.HasPrefix(station, ".") {
			continue
		}
		if err := c.readKept(station, all); err != nil {
			return all, fmt.Errorf("%s: %w\nhint: restore it from a backup, or bring the journal again: hawser ca journal add", e.Name(), err)
		}
	}
	return all, err
}

func (c *CA) readKept(station string, all Flashed) error {
	head, err := c.stationHead(station)
	if err != nil {
		return err
	}
	f, err := os.Open(filepath.Join(c.dir, stationsDir, station+".journal"))
	if err != nil {
		return err
	}
	defer f.Close()
	in := bufio.NewScanner(f)
	in.Buffer(nil, 64<<10)
	var prev [32]byte
	lines := uint64(0)
	for lines < head.Lines && in.Scan() {
		var r factory.Record
		if err := json.Unmarshal(in.Bytes(), &r); err != nil {
			return err
		}
		if r.Prev != hex.EncodeToString(prev[:]) {
			return fmt.Errorf("line %d does not continue the line before", lines+1)
		}
		prev = sha256.Sum256(in.Bytes())
		lines++
		if err := all.take(&r); err != nil {
			return err
		}
	}
	if err := in.Err(); err != nil {
		return err
	}
	if lines != head.Lines || !bytes.Equal(prev[:], head.Head[:]) {
		return errors.New("the copy is not what was kept")
	}
	return nil
}

func (f Flashed) take(r *factory.Record) error {
	if r.What != factory.Made {
		return nil
	}
	cert, err := x509.ParseCertificate(r.Cert)
	if err != nil {
		return err
	}
	pub, err := pki.PublicKey(cert)
	if err != nil {
		return err
	}
	print, err := pki.KeyFingerprint(pub)
	if err != nil {
		return err
	}
	key := hex.EncodeToString(print[:])
	f.KeyOf[r.ID], f.Holder[key] = key, r.ID
	return nil
}

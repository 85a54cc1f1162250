package fleet

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/internal/factory"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// bench is a station with its journal.
type bench struct {
	t       *testing.T
	station *pki.Issuer
	path    string
	units   map[identity.ID]*pki.CSR
}

func newBench(t *testing.T, ca *CA, name string) *bench {
	t.Helper()
	gen1, err := ca.issuer("device-1", pki.DeviceCA)
	must(t, err)
	key := newKey(t)
	cert, err := pki.IssueStationCA(gen1, name, &key.PublicKey, time.Now())
	must(t, err)
	b := &bench{t: t, path: filepath.Join(t.TempDir(), name+".journal"), units: map[identity.ID]*pki.CSR{}}
	b.station, err = pki.NewIssuer(cert, key, pki.StationCA)
	must(t, err)
	must(t, factory.CreateJournal(b.path, key, ca.Fleet(), cert, time.Now()))
	b.write(func(j *factory.Journal) error { return j.AppendBlock(factory.BlockID{1}, time.Now()) })
	return b
}

func (b *bench) write(fn func(*factory.Journal) error) {
	b.t.Helper()
	j, err := factory.OpenJournal(b.path, b.station.Signer)
	must(b.t, err)
	must(b.t, errors.Join(fn(j), j.Close()))
}

// unit flashes a device.
func (b *bench) unit(id identity.ID) {
	b.t.Helper()
	key := newKey(b.t)
	cert, err := pki.IssueDeviceLeaf(b.station, id, &key.PublicKey, time.Now())
	must(b.t, err)
	csr := csrOf(b.t, key)
	b.units[id] = csr
	b.write(func(j *factory.Journal) error {
		return j.AppendUnit(factory.NewUnit{ID: id, Block: factory.BlockID{1}, How: factory.ByProbe, CSR: csr.DER, Cert: cert}, time.Now())
	})
}

// TestSafeKeepsJournals: what a bench has recorded vouches in a rollover; a journal that
// was changed, does not go on, or contradicts a record is refused, and nothing is kept of it.
func TestSafeKeepsJournals(t *testing.T) {
	l := mustInit(t, true)
	ca := mustCA(t, l.CADir("a"), "")
	b := newBench(t, ca, "line1")
	b.unit(0x31)
	v, err := ca.AddJournal(b.path)
	must(t, err)
	if v.Units != 1 || v.New != 3 || v.Station != "line1" {
		t.Errorf("%+v", v)
	}
	early, err := os.ReadFile(b.path)
	must(t, err)
	b.unit(0x32)
	if v, err = ca.AddJournal(b.path); err != nil || v.New != 1 {
		t.Fatalf("%+v, %v", v, err)
	}
	must(t, os.WriteFile(filepath.Join(t.TempDir(), "x"), early, 0o600))
	refused := func(what string, text []byte, want string) {
		t.Helper()
		path := filepath.Join(t.TempDir(), "line1.journal")
		must(t, os.WriteFile(path, text, 0o600))
		if _, err := ca.AddJournal(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("a journal without its end", early, "cut off")
	whole, err := os.ReadFile(b.path)
	must(t, err)
	refused("a changed id", bytes.Replace(whole, []byte("00000032"), []byte("00000042"), 1), "line 4")

	other := newBench(t, ca, "line2")
	other.unit(0x31) // the same id, another key
	if _, err := ca.AddJournal(other.path); err == nil || !strings.Contains(err.Error(), "00000031") {
		t.Errorf("a journal that contradicts another: %v", err)
	}
	stranger := mustCA(t, mustInit(t, true).CADir("a"), "")
	if _, err := ca.AddJournal(newBench(t, stranger, "line3").path); err == nil {
		t.Error("a station of another fleet was taken")
	}

	_, err = ca.MakeGeneration(2, "", time.Now())
	must(t, err)
	flashed, err := ca.Flashed()
	must(t, err)
	sign, err := ca.Resigner(2, flashed, time.Now())
	must(t, err)
	got, err := sign([]Resign{{ID: 0x31, CSR: b.units[0x31].DER}, {ID: 0x32, CSR: b.units[0x32].DER}, {ID: 0x31, CSR: other.units[0x31].DER}})
	must(t, err)
	if got[0].Cert == nil || got[1].Cert == nil || got[2].Cert != nil {
		t.Errorf("%v, %v, %v", got[0].Refused, got[1].Refused, got[2].Refused)
	}
	ask := func(csr *pki.CSR) error {
		q, err := pki.NewRequest(l.FleetID(), pki.KindDevice, "00000032", csr)
		must(t, err)
		file, err := q.Encode()
		must(t, err)
		_, err = ca.SignRequest(file, func(string, string) (string, error) { return "", errors.New("asked") }, time.Now())
		return err
	}
	if err := ask(b.units[0x32]); err != nil {
		t.Errorf("a single request that the journal vouches for: %v", err)
	}
	if err := ask(other.units[0x31]); err == nil || errors.Is(err, ErrNotConfirmed) {
		t.Errorf("a single request that contradicts the journal: %v", err)
	}
	kept := filepath.Join(l.CADir("a"), stationsDir, "line1.journal")
	must(t, os.WriteFile(kept, bytes.Replace(whole, []byte("00000032"), []byte("00000042"), 1), 0o600))
	if _, err := ca.Flashed(); err == nil {
		t.Error("a copy that was changed in the safe vouches")
	}
}

// TestJournalOfSomebodyElse: a station that no device CA of this safe has certified.
func TestJournalOfSomebodyElse(t *testing.T) {
	l := mustInit(t, true)
	ca := mustCA(t, l.CADir("a"), "")
	key, err := pki.GenerateKey()
	must(t, err)
	thief, err := pki.IssueDeviceCA(key, pki.Name{Organisation: "Acme Pumps", Country: "DE"}, 1, time.Now())
	must(t, err)
	stationKey := newKey(t)
	cert, err := pki.IssueStationCA(thief, "line1", &stationKey.PublicKey, time.Now())
	must(t, err)
	path := filepath.Join(t.TempDir(), "line1.journal")
	must(t, factory.CreateJournal(path, stationKey, l.FleetID(), cert, time.Now()))
	if _, err := ca.AddJournal(path); err == nil {
		t.Errorf("the journal of a station under another CA was kept (fleet %s)", hex.EncodeToString(cert.SubjectKeyId))
	}
}

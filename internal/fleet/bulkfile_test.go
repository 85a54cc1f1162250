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

	"hawser/internal/identity"
	"hawser/internal/pki"
)

// bulkRequest writes a request for units and gives its path.
func bulkRequest(t testing.TB, fleet [16]byte, units []Resign) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "request.jsonl")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w, err := NewBulkWriter(f, &BulkHeader{Format: formatBulkRequest, Fleet: hex.EncodeToString(fleet[:]), Generation: 2, Rollover: 1,
		Nonce: strings.Repeat("ab", 16)})
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range units {
		if err := w.Add(&BulkLine{ID: u.ID, CSR: u.CSR, Certificate: u.Old}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.End(); err != nil {
		t.Fatal(err)
	}
	return path
}

func readAll(t *testing.T, path string) (lines []BulkLine) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	_, _, _, err = ReadBulk(f, func(_ *BulkHeader, l *BulkLine) error { lines = append(lines, *l); return nil })
	must(t, err)
	return lines
}

// TestSignBulkGoesOn: whatever a killed run has left, the next one makes a whole result of
// it; a damaged request signs nothing.
func TestSignBulkGoesOn(t *testing.T) {
	l := mustInit(t, true)
	ca := mustCA(t, l.CADir("a"), "")
	gen1, err := ca.issuer("device-1", pki.DeviceCA)
	must(t, err)
	var units []Resign
	for id := identity.ID(1); id <= 5; id++ {
		units = append(units, makeUnit(t, id, gen1).order())
	}
	units[3].Old, units[3].CSR = nil, units[4].CSR // swapped
	request := bulkRequest(t, l.FleetID(), units)
	out := filepath.Join(t.TempDir(), "result.jsonl")
	s, err := ca.SignBulk(request, out, "", time.Now(), nil)
	must(t, err)
	if s.Signed != 4 || len(s.Refused) != 1 || s.Refused[0].ID != 4 {
		t.Fatalf("%+v", s)
	}
	whole, err := os.ReadFile(out)
	must(t, err)
	lines := bytes.SplitAfter(whole, []byte("\n"))
	for cut := len(lines[0]); cut <= len(whole); cut += 97 {
		must(t, os.WriteFile(out+".part", whole[:cut], 0o644))
		s, err := ca.SignBulk(request, out, "", time.Now(), nil)
		must(t, err)
		got := readAll(t, out)
		if len(got) != 5 || got[3].Refused == "" || got[0].Certificate == nil {
			t.Fatalf("cut at %d: %d lines, %+v", cut, len(got), s)
		}
	}
	must(t, os.WriteFile(out+".part", bytes.Replace(whole, []byte(`"generation":2`), []byte(`"generation":3`), 1), 0o644))
	if _, err := ca.SignBulk(request, out, "", time.Now(), nil); err == nil {
		t.Error("a part of another result was gone on with")
	}
	before := ca.journal.Len()
	text, err := os.ReadFile(request)
	must(t, err)
	for _, bad := range [][]byte{text[:len(text)-9], bytes.Replace(text, []byte("00000001"), []byte("0000000A"), 1), append(bytes.Clone(text), 'x')} {
		must(t, os.WriteFile(request, bad, 0o644))
		if _, err := ca.SignBulk(request, out+"2", "", time.Now(), nil); !errors.Is(err, ErrBulk) {
			t.Errorf("a damaged request: %v", err)
		}
	}
	if ca.journal.Len() != before {
		t.Error("a damaged request was signed in part")
	}
}

func FuzzReadBulk(f *testing.F) {
	h := &BulkHeader{Format: formatBulkRequest, Fleet: strings.Repeat("01", 16), Generation: 2, Rollover: 1, Nonce: strings.Repeat("ab", 16)}
	var b bytes.Buffer
	w, err := NewBulkWriter(&b, h)
	if err != nil {
		f.Fatal(err)
	}
	if err := errors.Join(w.Add(&BulkLine{ID: 1, CSR: []byte{1}}), w.End()); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add([]byte(`{"end":"","count":0}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		n := 0
		h, count, _, err := ReadBulk(bytes.NewReader(data), func(*BulkHeader, *BulkLine) error { n++; return nil })
		if err == nil && (n != count || h.check() != nil) {
			t.Errorf("%d devices of %d, %+v", n, count, h)
		}
	})
}

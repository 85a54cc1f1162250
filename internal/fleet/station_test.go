package fleet

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"hawser/internal/factory"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

func order1(t *testing.T, l *Layout) *StationOrder {
	t.Helper()
	return &StationOrder{Station: "line1", CSR: csrOf(t, newKey(t)), Block: factory.BlockID{1}, IDs: []identity.ID{1, 2, 0xABCD1234},
		Expires: time.Now().Add(24 * time.Hour).Truncate(time.Second), Anchors: l.AnchorChain()}
}

func TestSignStation(t *testing.T) {
	l := mustInit(t, true)
	ca := mustCA(t, l.CADir("a"), "")
	o := order1(t, l)
	cert, file, err := ca.SignStation(o, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.OpenBlock(file)
	if err != nil || !slices.Equal(b.IDs, o.IDs) || !b.StationCert.Equal(cert) || b.ID != o.Block || !b.Expires.Equal(o.Expires) || !o.CSR.Pub.Equal(cert.PublicKey) {
		t.Fatal(b, err)
	}
	if name, gen, _, err := pki.VerifyStationCA(cert.Raw, l.Trust().DeviceCAs); err != nil || name != "line1" || gen != 1 {
		t.Error(name, gen, err)
	}
	text, err := os.ReadFile(filepath.Join(l.CADir("a"), journalFile))
	if err != nil || !strings.Contains(string(text), `"kind":"station","subject":"line1","block":"01000000000000000000000000000000"`) {
		t.Errorf("%v\n%s", err, text)
	}
	if _, err := mustInit(t, true).OpenBlock(file); err == nil {
		t.Error("another fleet took the block")
	}
	if _, err := ca.RenewStation("line1", o.CSR, time.Now()); err != nil {
		t.Error(err)
	}
	// An id that the CA gave to a device is in no block, whoever asks.
	if _, err := ca.EnrollDevice(7, csrOf(t, newKey(t)), "", time.Now()); err != nil {
		t.Fatal(err)
	}
	o.IDs = []identity.ID{6, 7}
	if _, _, err := ca.SignStation(o, time.Now()); !errors.Is(err, pki.ErrBound) {
		t.Error(err)
	}
	for want, bend := range map[string]func(*StationOrder){
		"expired":       func(o *StationOrder) { o.Expires = time.Now().Add(-time.Hour) },
		"1 to 5000 ids": func(o *StationOrder) { o.IDs = nil },
		"station name":  func(o *StationOrder) { o.Station = "Line 1" },
		"anchor set":    func(o *StationOrder) { o.Anchors = nil },
		"another fleet": func(o *StationOrder) { o.Anchors = mustInit(t, true).AnchorChain() },
	} {
		bad := order1(t, l)
		bend(bad)
		if _, _, err := ca.SignStation(bad, time.Now()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// At the safe: what is asked for is shown, and its subject typed, every time.
func TestStationRequestAtTheSafe(t *testing.T) {
	l := mustInit(t, false)
	ca, b := mustCA(t, l.CADir("a"), passA), mustCA(t, l.CADir("b"), passB)
	o := order1(t, l)
	r, err := o.Request(l.FleetID())
	if err != nil {
		t.Fatal(err)
	}
	path, err := l.SaveRequest(r)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var shown string
	if _, err := ca.SignRequest(file, func(_, _ string) (string, error) { return "line2", nil }, time.Now()); !errors.Is(err, ErrNotConfirmed) {
		t.Error("signed without being confirmed:", err)
	}
	if _, err := b.SignRequest(file, agree(&shown), time.Now()); err == nil {
		t.Error("ca-b signed a station")
	}
	for range 2 { // the second time it is typed again
		shown = ""
		result, err := ca.SignRequest(file, agree(&shown), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"kind     station", "subject  line1", "key      ", "ids      3, 00000001 to ABCD1234", "expires  ", "standby"} {
			if !strings.Contains(shown, want) {
				t.Errorf("no %q in what was shown:\n%s", want, shown)
			}
		}
		req, certs, err := l.OpenResult(result)
		if err != nil || req.Subject != "line1" || len(certs) != 1 {
			t.Fatal(err)
		}
		block, err := pki.ResultBlock(result)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := l.OpenBlock(block); err != nil || !got.StationCert.Equal(certs[0]) || !slices.Equal(got.IDs, o.IDs) {
			t.Error(err)
		}
	}
}

// A thief of the server would have new units trust his own broker: he asks for a block with
// anchors of his own making, in which everything holds but where they begin.
func TestSafeKnowsTheFirstAnchors(t *testing.T) {
	l := mustInit(t, true)
	dir := l.CADir("a")
	ca := mustCA(t, dir, "")
	o := order1(t, l)
	_, set, err := l.Anchors()
	if err != nil {
		t.Fatal(err)
	}
	name := pki.Name{Organisation: "Acme", Country: "DE"}
	thief, err := pki.IssueBrokerRoot(newKey(t), name, "B", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	forged := *set
	forged.Standby = thief.Cert // root A's certificate is public
	sign1, err := pki.SignAnchors(thief.Signer, &forged)
	if err != nil {
		t.Fatal(err)
	}
	o.Anchors = [][]byte{sign1}
	if _, _, err := ca.SignStation(o, time.Now()); err == nil || !strings.Contains(err.Error(), "not the one that this fleet began with") {
		t.Error("signed the thief's anchors:", err)
	}
	// A directory that has no copy still has its own root to compare.
	if err := os.Remove(filepath.Join(dir, firstAnchorsFile)); err != nil {
		t.Fatal(err)
	}
	other, err := pki.IssueBrokerRoot(newKey(t), name, "A", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	forged.InUse = other.Cert
	if sign1, err = pki.SignAnchors(thief.Signer, &forged); err != nil {
		t.Fatal(err)
	}
	o.Anchors = [][]byte{sign1}
	if _, _, err := ca.SignStation(o, time.Now()); err == nil || !strings.Contains(err.Error(), "does not name the root") {
		t.Error("signed anchors of two foreign roots:", err)
	}
	o.Anchors = l.AnchorChain()
	if _, _, err := ca.SignStation(o, time.Now()); err != nil {
		t.Error(err)
	}
}

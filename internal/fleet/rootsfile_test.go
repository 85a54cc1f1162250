package fleet

import (
	"bytes"
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"hawser/internal/pki"
)

func aRootsRequest(t testing.TB, l *Layout, domains ...string) []byte {
	t.Helper()
	leaves := []LeafCSR{}
	for _, d := range domains {
		key, err := l.NewBrokerKey(d)
		if err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, LeafCSR{d, string(pki.EncodeCSR(csrOf(t, key).DER))})
	}
	q, err := l.NewRootsRequest(2, leaves)
	if err != nil {
		t.Fatal(err)
	}
	file, err := q.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// TestSignRoots: the standby root answers, once its subject was typed, and what it gives
// can be installed.
func TestSignRoots(t *testing.T) {
	l := mustInit(t, true)
	domains, err := l.NextLeaves(1)
	must(t, err)
	if len(domains) != 2 {
		t.Fatalf("to be served under root B: %q", domains)
	}
	file := aRootsRequest(t, l, domains...)
	next := func(label string, name pki.Name) (*x509.Certificate, error) {
		return MakeRoot(l.CADir("c"), label, name, l.FleetID(), nil, time.Now())
	}
	typed := func(word string) Confirm { return func(string, string) (string, error) { return word, nil } }
	a, b := mustCA(t, l.CADir("a"), ""), mustCA(t, l.CADir("b"), "")
	if _, err := a.SignRoots(file, typed("anchors 2"), next, time.Now()); !errors.Is(err, ErrNotHere) {
		t.Errorf("root A signed: %v", err)
	}
	if _, err := b.SignRoots(file, typed("anchors 3"), next, time.Now()); !errors.Is(err, ErrNotConfirmed) {
		t.Errorf("signed without a confirmation: %v", err)
	}
	if _, err := b.SignRoots(bytes.Replace(file, []byte("8883"), []byte(" 8883"), 1), typed("anchors 2"), next, time.Now()); err == nil {
		t.Error("a changed request was signed")
	}
	other := mustCA(t, mustInit(t, true).CADir("b"), "")
	if _, err := other.SignRoots(file, typed("anchors 2"), next, time.Now()); err == nil {
		t.Error("the request of another fleet was signed")
	}
	out, err := b.SignRoots(file, typed("anchors 2"), next, time.Now())
	must(t, err)
	res, err := ParseRootsResult(out)
	must(t, err)
	_, err = l.InstallAnchors(res.Anchors)
	must(t, err)
	for _, text := range res.Leaves {
		cert, err := pki.ParseCert([]byte(text))
		must(t, err)
		_, err = l.InstallBrokerLeaf(cert.Raw)
		must(t, err)
	}
	root, err := l.LeafRoot(domains[0])
	must(t, err)
	if pki.RootLabel(root) != "B" || KindOfFile(out) != FileRootsResult || KindOfFile(file) != FileRootsRequest {
		t.Errorf("%s is served under root %s", domains[0], pki.RootLabel(root))
	}
}

func FuzzRootsFiles(f *testing.F) {
	q := &RootsRequest{Format: formatRootsRequest, Fleet: "01010101010101010101010101010101", Sequence: 2, Root: "b", Port: 8883,
		Domains: []string{"a.b"}, Leaves: []LeafCSR{}, Nonce: "ab010101010101010101010101010101"}
	file, err := q.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(file)
	f.Add([]byte(`{"format":"hawser roots result 1","request":"","anchors":"","leaves":[]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, err := ParseRootsRequest(data); err == nil {
			again, err := r.Encode()
			if err != nil || !bytes.Equal(again, data) {
				t.Errorf("another spelling was accepted: %q", data)
			}
		}
		_, _ = ParseRootsResult(data)
	})
}

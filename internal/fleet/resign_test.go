package fleet

import (
	"crypto/ecdsa"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/internal/identity"
	"hawser/internal/pki"
)

// unit is a device whose certificate of generation 1 the test made.
type unit struct {
	id  identity.ID
	key *ecdsa.PrivateKey
	csr *pki.CSR
	old []byte
}

func makeUnit(t *testing.T, id identity.ID, ca *pki.Issuer) unit {
	t.Helper()
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	u := unit{id: id, key: key, csr: csrOf(t, key)}
	cert, err := pki.IssueDeviceLeaf(ca, id, &key.PublicKey, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	u.old = cert.Raw
	return u
}

func (u unit) order() Resign { return Resign{ID: u.id, CSR: u.csr.DER, Old: u.old} }

// TestResignVouches: the safe signs what it knows, and refuses the rest by name.
func TestResignVouches(t *testing.T) {
	l := mustInit(t, true)
	ca := mustCA(t, l.CADir("a"), "")
	if _, err := ca.MakeGeneration(2, time.Now()); err != nil {
		t.Fatal(err)
	}
	gen1, err := ca.issuer("device-1", pki.DeviceCA)
	if err != nil {
		t.Fatal(err)
	}
	known, swapA, swapB := makeUnit(t, 0x10, gen1), makeUnit(t, 0x11, gen1), makeUnit(t, 0x12, gen1)
	recorded, flashed, stranger := makeUnit(t, 0x13, gen1), makeUnit(t, 0x14, gen1), makeUnit(t, 0x15, gen1)
	if _, err := ca.EnrollDevice(recorded.id, recorded.csr, "", time.Now()); err != nil {
		t.Fatal(err)
	}
	print, err := pki.KeyFingerprint(&flashed.key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	name, key := flashed.id.String(), hex.EncodeToString(print[:])
	sign, err := ca.Resigner(2, Flashed{KeyOf: map[string]string{name: key}, Holder: map[string]string{key: name}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	noOld := func(u unit) Resign { return Resign{ID: u.id, CSR: u.csr.DER} }
	damaged := known.order()
	damaged.ID, damaged.CSR = 0x16, append([]byte(nil), known.csr.DER...)
	damaged.CSR[len(damaged.CSR)-1] ^= 1
	got, err := sign([]Resign{
		known.order(), noOld(recorded), noOld(flashed),
		{ID: swapA.id, CSR: swapB.csr.DER, Old: swapA.old}, {ID: swapB.id, CSR: swapA.csr.DER, Old: swapA.old},
		{ID: recorded.id, CSR: stranger.csr.DER}, {ID: stranger.id, CSR: flashed.csr.DER, Old: flashed.old},
		noOld(stranger), damaged,
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"", "", "", "for another key", "is that of 00000011", "was certified with another key",
		"has this key for 00000014", "no journal", "wrong signature"} {
		text := fmt.Sprint(got[i].Refused)
		if (want == "") != (got[i].Cert != nil) || !strings.Contains(text, want) {
			t.Errorf("answer %d: %v, want %q", i, got[i].Refused, want)
		}
	}
}

// TestResignAfterTheft: what a stolen device CA has signed vouches for nothing, what the
// safe recorded itself still does.
func TestResignAfterTheft(t *testing.T) {
	l := mustInit(t, true)
	ca := mustCA(t, l.CADir("a"), "")
	gen1, err := ca.issuer("device-1", pki.DeviceCA)
	if err != nil {
		t.Fatal(err)
	}
	thief, honest := makeUnit(t, 0x20, gen1), makeUnit(t, 0x21, gen1)
	if _, err := ca.EnrollDevice(honest.id, honest.csr, "", time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.MakeGeneration(2, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(ca.MarkCompromised("device-1"), ca.MarkCompromised("device-1")); err != nil {
		t.Fatal(err)
	}
	sign, err := ca.Resigner(2, Flashed{}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	got, err := sign([]Resign{thief.order(), honest.order()})
	if err != nil {
		t.Fatal(err)
	}
	if got[0].Cert != nil || !errors.Is(got[0].Refused, ErrRefused) {
		t.Errorf("the thief's device: %v", got[0].Refused)
	}
	if got[1].Cert == nil {
		t.Errorf("the honest device: %v", got[1].Refused)
	}
	if err := ca.MarkCompromised("device-9"); !errors.Is(err, ErrNotHere) {
		t.Errorf("a CA that is not there was marked: %v", err)
	}
}

// TestAnchorSetsFollow: a second set is taken up, and the layout says so after a reopen,
// also where the installation was cut off.
func TestAnchorSetsFollow(t *testing.T) {
	l := mustInit(t, true)
	_, one, err := l.Anchors()
	if err != nil {
		t.Fatal(err)
	}
	b := mustCA(t, l.CADir("b"), "")
	name := pki.Name{Organisation: "Test", Country: "DE"}
	c, err := MakeRoot(filepath.Join(l.Dir, "ca-c"), "C", name, l.FleetID(), nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	set := &pki.AnchorSet{Fleet: one.Fleet, Sequence: 2, InUse: one.Standby, Standby: c, Port: one.Port, Domains: one.Domains}
	two, err := b.SignAnchors(set, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	other := *set
	other.Port++
	if _, err := b.SignAnchors(&other, time.Now()); err == nil {
		t.Error("a second set with the number 2 was signed")
	}
	a, err := mustCA(t, l.CADir("a"), "").issuer("root", pki.BrokerRoot)
	must(t, err)
	forged, err := pki.SignAnchors(a.Signer, set)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.InstallAnchors(forged); err == nil {
		t.Error("a set that root A has signed was taken")
	}
	old, _, err := l.Anchors()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.InstallAnchors(two); err != nil {
		t.Fatal(err)
	}
	must(t, l.ForgetRoots(1))
	must(t, os.WriteFile(l.AnchorsPath(), old, 0o644)) // as if cut off before the last step
	again, err := OpenLayout(l.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, set, err := again.Anchors(); err != nil || set.Sequence != 2 || len(again.Trust().BrokerRoots) != 3 {
		t.Fatalf("set %v, %d roots, %v", set, len(again.Trust().BrokerRoots), err)
	}
	if _, err := again.InstallAnchors(old); err == nil {
		t.Error("the old set was taken again")
	}
	must(t, again.ForgetRoots(2))
	if n := len(again.Trust().BrokerRoots); n != 3 {
		t.Errorf("root A was forgotten, under which a leaf is served (%d roots)", n)
	}
}

// TestRescueDomain: the last of several domains is served under the root that the
// device that is furthest behind accepts.
func TestRescueDomain(t *testing.T) {
	l := mustInit(t, true)
	domains := l.Config.Fleet.Domains
	name := pki.Name{Organisation: "Test", Country: "DE"}
	for i, letter := range []string{"b", "c"} {
		_, last, err := l.Anchors()
		must(t, err)
		next, err := MakeRoot(l.CADir(string("cd"[i])), string("CD"[i]), name, l.FleetID(), nil, time.Now())
		must(t, err)
		sign1, err := mustCA(t, l.CADir(letter), "").SignAnchors(&pki.AnchorSet{Fleet: last.Fleet, Sequence: last.Sequence + 1,
			InUse: last.Standby, Standby: next, Port: last.Port, Domains: last.Domains}, time.Now())
		must(t, err)
		_, err = l.InstallAnchors(sign1)
		must(t, err)
	}
	for _, v := range []struct {
		domain string
		oldest uint64
		want   string
	}{{domains[0], 1, "C"}, {domains[1], 1, "B"}, {domains[1], 2, "C"}, {domains[1], 3, "C"}, {domains[1], 0, "C"}} {
		root, err := l.WantedRoot(v.domain, v.oldest)
		if err != nil || pki.RootLabel(root) != v.want {
			t.Errorf("%s while set %d is used: root %s, %v; want %s", v.domain, v.oldest, pki.RootLabel(root), err, v.want)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

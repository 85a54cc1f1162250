package bench

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/internal/factory"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

func fixedTime() time.Time { return time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC) }

func must[T any](t testing.TB, v T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// safe is a fleet's device CA and its anchors.
type safe struct {
	ca      *pki.Issuer
	anchors []byte
}

func newSafe(t testing.TB) *safe {
	t.Helper()
	name := pki.Name{Organisation: "Acme Pumps", Country: "DE"}
	ca, err := pki.IssueDeviceCA(newKey(t), name, 1, fixedTime().AddDate(0, 0, -2))
	must(t, ca, err)
	a, err := pki.IssueBrokerRoot(newKey(t), name, "A", fixedTime())
	must(t, a, err)
	b, err := pki.IssueBrokerRoot(newKey(t), name, "B", fixedTime())
	must(t, b, err)
	set, err := pki.SignAnchors(b.Signer, &pki.AnchorSet{Fleet: [16]byte{7}, Sequence: 1, InUse: a.Cert, Standby: b.Cert, Port: 8883, Domains: []string{"mqtt.example.com"}})
	return &safe{ca, must(t, set, err)}
}

// station certifies the key of a bench's request, at a time.
func (s *safe) station(t testing.TB, dir, name string, at time.Time) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, fileCSR))
	csr, errCSR := pki.ParseCSR(must(t, text, err))
	must(t, csr, errCSR)
	c, err := pki.IssueStationCA(s.ca, name, csr.Pub, at)
	return must(t, c, err).Raw
}

// newBench is a bench with one block.
func newBench(t testing.TB, s *safe, uri string, pass func() ([]byte, error)) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "bench")
	_, err := Init(dir, Settings{Station: "line1", Key: uri, Trial: strings.HasPrefix(uri, "file:"),
		Probe: "gdb:127.0.0.1:1234,identity=0x20010000,trust=0x20011000"}, pass)
	must(t, dir, err)
	_, err = Load(dir, s.block(t, dir, 1, fixedTime()), "")
	must(t, dir, err)
	return dir
}

// block is one for a year, with the ids 16n and 16n+1.
func (s *safe) block(t testing.TB, dir string, n byte, at time.Time) []byte {
	t.Helper()
	_, _, cert, err := pki.VerifyStationCA(s.station(t, dir, "line1", at), []*x509.Certificate{s.ca.Cert})
	must(t, cert, err)
	file, err := factory.SignBlock(s.ca, &factory.Block{Fleet: [16]byte{7}, Station: "line1", ID: factory.BlockID{n},
		IDs: []identity.ID{identity.ID(n) * 16, identity.ID(n)*16 + 1}, Expires: at.AddDate(1, 0, 0), DeviceCA: s.ca.Cert, StationCert: cert, Anchors: s.anchors})
	return must(t, file, err)
}

// A certificate that has ended stops the bench; a new one for the same key, from the
// CA that it knows, lets it go on, and is in the journal.
func TestRenewStation(t *testing.T) {
	s := newSafe(t)
	dir := newBench(t, s, KeyFile, nil)
	before, err := os.ReadFile(filepath.Join(dir, fileCSR))
	must(t, before, err)
	path, err := Request(dir, nil)
	must(t, path, err)
	if after, err := os.ReadFile(path); err != nil || bytes.Equal(after, before) {
		t.Error("the request is not a fresh one:", err)
	}
	changed := filepath.Join(dir, "other.key")
	if err := pki.WriteKey(changed, newKey(t), nil); err != nil {
		t.Fatal(err)
	}
	set, err := readSettings(dir)
	must(t, set, err)
	set.Key = "file:other.key"
	if err := request(dir, set, nil); err == nil || !strings.Contains(err.Error(), "the key is another") {
		t.Error(err)
	}
	later := fixedTime().AddDate(1, 0, 1)
	b, err := Open(dir, nil, later)
	must(t, b, err)
	if _, _, err := b.next(later); err == nil || !strings.Contains(err.Error(), "hawser factory renew") {
		t.Error(err)
	}
	good := s.station(t, dir, "line1", later)
	other := newSafe(t)
	for name, der := range map[string][]byte{
		"another CA's":      other.station(t, dir, "line1", later),
		"another station's": s.station(t, dir, "line2", later),
		"an older one":      s.station(t, dir, "line1", fixedTime().AddDate(0, 0, -1)),
		"damaged":           good[:len(good)-1],
		"another key's":     issue(t, s, later),
	} {
		if _, err := b.Renew(der, later); err == nil {
			t.Errorf("%s was taken in", name)
		}
	}
	for range 2 { // twice is the same as once
		c, err := b.Renew(good, later)
		must(t, c, err)
	}
	lines := b.journal.Lines()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if b, err = Open(dir, nil, later); err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if !bytes.Equal(b.station.Raw, good) || b.journal.Lines() != lines {
		t.Error("the journal does not have it")
	}
	if _, _, err := b.next(later); err == nil || !strings.Contains(err.Error(), "block") { // the block's end is another matter
		t.Error(err)
	}
}

// When the fleet has a new device CA, the one before certifies no bench any more.
func TestRenewByTheOldCA(t *testing.T) {
	old, s := newSafe(t), newSafe(t)
	dir := newBench(t, old, KeyFile, nil)
	now := fixedTime().AddDate(0, 1, 0)
	ca := pki.Fingerprint(s.ca.Cert.Raw)
	_, err := Load(dir, s.block(t, dir, 2, now), hex.EncodeToString(ca[:]))
	must(t, dir, err)
	b, err := Open(dir, nil, now)
	must(t, b, err)
	defer b.Close()
	if _, err := b.Renew(old.station(t, dir, "line1", now.AddDate(0, 1, 0)), now); err == nil {
		t.Error("taken in from the old CA")
	}
	c, err := b.Renew(s.station(t, dir, "line1", now.AddDate(0, 1, 0)), now)
	must(t, c, err)
}

func issue(t testing.TB, s *safe, at time.Time) []byte {
	t.Helper()
	c, err := pki.IssueStationCA(s.ca, "line1", &newKey(t).PublicKey, at)
	return must(t, c, err).Raw
}

// A station whose key is on a token: made there, used, and given up.
func TestStationKeyOnToken(t *testing.T) {
	if _, err := exec.LookPath("softhsm2-util"); err != nil {
		t.Skip("the program softhsm2-util is missing")
	}
	tokens := t.TempDir()
	conf := filepath.Join(tokens, "softhsm2.conf")
	if err := os.WriteFile(conf, []byte("directories.tokendir = "+tokens+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", "line1", "--pin", "12345678", "--so-pin", "87654321").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	pin := func() ([]byte, error) { return []byte("12345678"), nil }
	s := newSafe(t)
	dir := newBench(t, s, "pkcs11:token=line1;object=station?module-path=/usr/lib/softhsm/libsofthsm2.so", pin)
	b, err := Open(dir, pin, fixedTime())
	must(t, b, err)
	c, err := b.Renew(s.station(t, dir, "line1", fixedTime().AddDate(0, 6, 0)), fixedTime())
	must(t, c, err)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, func() ([]byte, error) { return []byte("11111111"), nil }, fixedTime()); err == nil || !strings.Contains(err.Error(), "wrong PIN") {
		t.Error("the token was not given up, or takes any PIN:", err)
	}
}

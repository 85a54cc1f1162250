package factory

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"hawser/internal/identity"
	"hawser/internal/pki"
)

var update = flag.Bool("update", false, "write the test vectors anew")

func testNow() time.Time { return time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC) }

func acme() pki.Name { return pki.Name{Organisation: "Acme Pumps", Country: "DE"} }

// must ends the test on an error, else gives the value.
func must[T any](t testing.TB, v T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// fixedKey is the P-256 key whose scalar is 32 times b.
func fixedKey(t testing.TB, b byte) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), bytes.Repeat([]byte{b}, 32))
	return must(t, k, err)
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := pki.GenerateKey()
	return must(t, k, err)
}

// rig is a fleet with one station.
type rig struct {
	fleet    [16]byte
	deviceCA *pki.Issuer
	station  *pki.Issuer
	anchors  []byte
}

func newRig(t testing.TB) *rig {
	t.Helper()
	ca, err := pki.IssueDeviceCA(fixedKey(t, 0x41), acme(), 1, testNow())
	must(t, ca, err)
	r := &rig{fleet: [16]byte{7}, deviceCA: ca}
	r.station = r.newStation(t, "line1", fixedKey(t, 0x42))
	r.anchors = anchors(t, r.fleet)
	return r
}

func (r *rig) newStation(t testing.TB, name string, key *ecdsa.PrivateKey) *pki.Issuer {
	t.Helper()
	c, err := pki.IssueStationCA(r.deviceCA, name, &key.PublicKey, testNow())
	must(t, c, err)
	i, err := pki.NewIssuer(c, key, pki.StationCA)
	return must(t, i, err)
}

func anchors(t testing.TB, fleet [16]byte) []byte {
	t.Helper()
	a, err := pki.IssueBrokerRoot(fixedKey(t, 0x43), acme(), "A", testNow())
	must(t, a, err)
	b, err := pki.IssueBrokerRoot(fixedKey(t, 0x44), acme(), "B", testNow())
	must(t, b, err)
	set, err := pki.SignAnchors(b.Signer, &pki.AnchorSet{Fleet: fleet, Sequence: 1, InUse: a.Cert, Standby: b.Cert, Port: 8883, Domains: []string{"mqtt.example.com"}})
	return must(t, set, err)
}

func (r *rig) block() *Block {
	return &Block{Fleet: r.fleet, Station: "line1", ID: BlockID{1}, IDs: []identity.ID{0xABCD1234, 2, 3}, Expires: testNow(),
		DeviceCA: r.deviceCA.Cert, StationCert: r.station.Cert, Anchors: r.anchors}
}

func csr(t testing.TB, key *ecdsa.PrivateKey, tmpl x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &tmpl, key)
	return must(t, der, err)
}

// unit is a new unit under id, ready to be recorded.
func (r *rig) unit(t testing.TB, id identity.ID) NewUnit {
	t.Helper()
	key := newKey(t)
	cert, err := pki.IssueDeviceLeaf(r.station, id, &key.PublicKey, testNow())
	must(t, cert, err)
	return NewUnit{ID: id, Block: BlockID{1}, Class: "sensor-a", Hardware: 3, How: ByProbe, CSR: csr(t, key, x509.CertificateRequest{}), Cert: cert}
}

// journal makes a journal with block 1 and n units, and gives its path; it is closed.
func (r *rig) journal(t testing.TB, n int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "line1.journal")
	if err := CreateJournal(path, r.station.Signer, r.fleet, r.station.Cert, testNow()); err != nil {
		t.Fatal(err)
	}
	j := r.open(t, path)
	if err := j.AppendBlock(BlockID{1}, testNow()); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if err := j.AppendUnit(r.unit(t, identity.ID(i+1)), testNow()); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func (r *rig) open(t testing.TB, path string) *Journal {
	t.Helper()
	j, err := OpenJournal(path, r.station.Signer)
	return must(t, j, err)
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	return must(t, b, err)
}

func lines(b []byte) (out [][]byte) {
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		out = append(out, bytes.Clone(s.Bytes()))
	}
	return out
}

package device

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/veraison/go-cose"

	"hawser/internal/pki"
)

type anchorVector struct {
	Name    string   `json:"name"`
	Valid   bool     `json:"valid"`
	Standby string   `json:"pinned_standby"`
	Stored  uint64   `json:"stored_sequence"`
	Cose    string   `json:"cose"`
	Seq     uint64   `json:"sequence"`
	InUse   string   `json:"root_in_use"`
	Next    string   `json:"standby_root"`
	Port    uint16   `json:"port"`
	Domains []string `json:"domains"`
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func anchorVectors(t testing.TB) []anchorVector {
	t.Helper()
	data, err := os.ReadFile("../testdata/vectors/anchors.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Cases []anchorVector `json:"cases"`
	}
	if err := json.Unmarshal(data, &file); err != nil || len(file.Cases) < 30 {
		t.Fatal(len(file.Cases), err)
	}
	return file.Cases
}

// TestAnchorVectors: the verdicts on the shared vectors, which pki and C give too.
func TestAnchorVectors(t *testing.T) {
	for _, v := range anchorVectors(t) {
		standby, err := x509.ParseCertificate(unhex(t, v.Standby))
		if err != nil {
			t.Fatal(err)
		}
		set, err := verifyAnchors(unhex(t, v.Cose), standby, v.Stored)
		if (err == nil) != v.Valid {
			t.Errorf("%s: %v", v.Name, err)
		}
		if err == nil && (set.sequence != v.Seq || hex.EncodeToString(set.inUse.Raw) != v.InUse || hex.EncodeToString(set.standby.Raw) != v.Next ||
			set.port != v.Port || !slices.Equal(set.domains, v.Domains)) {
			t.Errorf("%s: %+v", v.Name, set)
		}
	}
}

// brokerRoot is a root as hawser init makes it.
func brokerRoot(t testing.TB, label string) *pki.Issuer {
	t.Helper()
	root, err := pki.IssueBrokerRoot(newKey(t, elliptic.P256()), pki.Name{Organisation: "Acme", Country: "DE"}, label, time.Now().Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// anchors signs a set with the key of by.
func anchors(t testing.TB, by *pki.Issuer, sequence uint64, inUse, standby *pki.Issuer, domains ...string) []byte {
	t.Helper()
	if domains == nil {
		domains = []string{testServer}
	}
	out, err := pki.SignAnchors(by.Signer, &pki.AnchorSet{Fleet: [16]byte{1}, Sequence: sequence, InUse: inUse.Cert, Standby: standby.Cert, Port: 8883, Domains: domains})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// FuzzAnchors: the device's verdict is that of pki, on whole messages and on payloads that
// the right key has signed.
func FuzzAnchors(f *testing.F) {
	// Fixed keys: each fuzzing process makes its own roots.
	root := func(b byte, label string) *pki.Issuer {
		key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), bytes.Repeat([]byte{b}, 32))
		if err != nil {
			f.Fatal(err)
		}
		r, err := pki.IssueBrokerRoot(key, pki.Name{Organisation: "Acme", Country: "DE"}, label, time.Unix(1790000000, 0))
		if err != nil {
			f.Fatal(err)
		}
		return r
	}
	a, b := root(0x11, "A"), root(0x22, "B")
	signer, err := cose.NewSigner(cose.AlgorithmES256, b.Signer)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(anchors(f, b, 1, a, b), false)
	for _, v := range anchorVectors(f) {
		sign1 := unhex(f, v.Cose)
		f.Add(sign1, false)
		if m, err := splitAnchors(sign1); err == nil {
			f.Add(m.payload, true)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, sign bool) {
		if sign {
			h := cose.Headers{Protected: cose.ProtectedHeader{cose.HeaderLabelAlgorithm: cose.AlgorithmES256}}
			var err error
			if data, err = cose.Sign1(rand.Reader, signer, h, data, []byte(anchorsAAD)); err != nil {
				return
			}
		}
		_, ours := verifyAnchors(data, b.Cert, 0)
		_, theirs := pki.VerifyAnchors(data, b.Cert, 0)
		if (ours == nil) != (theirs == nil) {
			t.Errorf("device: %v; pki: %v", ours, theirs)
		}
	})
}

// TestBornAnchors: what is beside the key is taken as it is, unless it is damaged.
func TestBornAnchors(t *testing.T) {
	a, b, c := brokerRoot(t, "A"), brokerRoot(t, "B"), brokerRoot(t, "C")
	for name, good := range map[string][]byte{"set 1": anchors(t, b, 1, a, b), "a later one": anchors(t, b, 2, b, c)} {
		if _, err := bornAnchors(good); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	good := anchors(t, b, 1, a, b)
	flipped := slices.Clone(good)
	flipped[len(flipped)-1] ^= 1
	for name, bad := range map[string][]byte{"one bit": flipped, "cut": good[:len(good)-1], "by a stranger": anchors(t, c, 1, a, b), "empty": {}} {
		if _, err := bornAnchors(bad); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	// The parser alone, for what was verified when it was stored.
	if set, err := heldAnchors(anchors(t, c, 7, a, b)); err != nil || set.sequence != 7 {
		t.Error(err)
	}
}

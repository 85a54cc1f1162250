package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/veraison/go-cose"
)

var update = flag.Bool("update", false, "write testdata/vectors/anchors.json anew")

const vectorFile = "../../testdata/vectors/anchors.json"

// vector is one case of the shared file; hex is lower case.
type vector struct {
	Name    string   `json:"name"`
	Valid   bool     `json:"valid"`
	Standby string   `json:"pinned_standby"` // DER of the standby root that the device pins
	Stored  uint64   `json:"stored_sequence"`
	Cose    string   `json:"cose"`
	Payload string   `json:"payload,omitempty"` // for the valid ones, as are the following
	Fleet   string   `json:"fleet,omitempty"`
	Seq     uint64   `json:"sequence,omitempty"`
	InUse   string   `json:"root_in_use,omitempty"`
	Next    string   `json:"standby_root,omitempty"`
	Port    uint16   `json:"port,omitempty"`
	Domains []string `json:"domains,omitempty"`
}

type vectors struct {
	Comment string            `json:"comment"`
	AAD     string            `json:"external_aad"`
	Keys    map[string]string `json:"private_keys"` // scalars; for tests only
	Cases   []vector          `json:"cases"`
}

// fixedKey is the P-256 key whose scalar is 32 times b.
func fixedKey(t testing.TB, b byte) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), bytes.Repeat([]byte{b}, 32))
	return must(t, k, err)
}

func fixedRoot(t testing.TB, b byte, label string) *Issuer {
	t.Helper()
	i, err := IssueBrokerRoot(fixedKey(t, b), acme(), label, testNow())
	return must(t, i, err)
}

func anchorSet(a, b *Issuer) *AnchorSet {
	return &AnchorSet{Fleet: [16]byte{0xde, 0xad, 0xbe, 0xef, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, Sequence: 1, InUse: a.Cert, Standby: b.Cert,
		Port: 8883, Domains: []string{"mqtt.example.com", "rescue.example.com"}}
}

// cosePayload signs any payload with any external data and headers.
func cosePayload(t testing.TB, key *ecdsa.PrivateKey, payload []byte, aad string, h cose.Headers) []byte {
	t.Helper()
	s, err := cose.NewSigner(cose.AlgorithmES256, key)
	must(t, s, err)
	if h.Protected == nil {
		h.Protected = cose.ProtectedHeader{cose.HeaderLabelAlgorithm: cose.AlgorithmES256}
	}
	out, err := cose.Sign1(rand.Reader, s, h, payload, []byte(aad))
	return must(t, out, err)
}

// badPayloads are signed by the right key and refused all the same.
func badPayloads(t testing.TB, s *AnchorSet) map[string][]byte {
	t.Helper()
	good, err := s.payload()
	must(t, good, err)
	enc := func(v any) []byte {
		m, err := cbor.CoreDetEncOptions().EncMode()
		must(t, m, err)
		b, err := m.Marshal(v)
		return must(t, b, err)
	}
	with := func(key int, v any) []byte {
		m := map[int]any{1: s.Fleet[:], 2: s.Sequence, 3: s.InUse.Raw, 4: s.Standby.Raw, 5: s.Port, 6: s.Domains}
		if v == nil {
			delete(m, key)
		} else {
			m[key] = v
		}
		return enc(m)
	}
	if !bytes.Equal(with(5, s.Port), good) {
		t.Fatal("the map is not what the payload is")
	}
	return map[string][]byte{
		"unknown key":              with(7, 1),
		"no sequence":              with(2, nil),
		"sequence 0":               with(2, 0),
		"short fleet id":           with(1, s.Fleet[:15]),
		"fleet id of zeros":        with(1, make([]byte, 16)),
		"port 0":                   with(5, 0),
		"port 65536":               with(5, 65536),
		"no domain":                with(6, []string{}),
		"nine domains":             with(6, strings.Split("a b c d e f g h i", " ")),
		"a domain twice":           with(6, []string{"a.b", "a.b"}),
		"a wildcard domain":        with(6, []string{"*.b"}),
		"one root in both roles":   with(4, s.InUse.Raw),
		"no root in use":           with(3, []byte{}),
		"a root that is none":      with(3, newServiceCA(t).Cert.Raw),
		"an intermediate root":     with(3, crossSigned(t)),
		"two roots with one name":  with(4, fixedRoot(t, 0x77, RootLabel(s.InUse)).Cert.Raw),
		"two roots with one key":   with(4, sameKeyRoot(t, s.InUse)),
		"bytes after the map":      append(good[:len(good):len(good)], 0),
		"an indefinite-length map": append(append([]byte{0xbf}, good[1:]...), 0xff),
		"a long form of a number":  bytes.Replace(good, []byte{2, 1, 3}, []byte{2, 0x18, 1, 3}, 1),
		"a key twice":              append([]byte{0xa7, 1, 0x40}, good[1:]...),
		"a number for the payload": {1},
	}
}

// crossSigned is a root's certificate that another root signed.
func crossSigned(t testing.TB) []byte {
	t.Helper()
	tmpl, err := template(BrokerRoot, testNow())
	must(t, tmpl, err)
	root := newRoot(t, "D")
	tmpl.Subject = root.Cert.Subject
	der, err := x509.CreateCertificate(rand.Reader, tmpl, root.Cert, newKey(t).Public(), root.Signer)
	return must(t, der, err)
}

// sameKeyRoot certifies the key of a fixed root under another name.
func sameKeyRoot(t testing.TB, c *x509.Certificate) []byte {
	t.Helper()
	for b := byte(1); b < 0x80; b++ {
		if k := fixedKey(t, b); k.PublicKey.Equal(c.PublicKey) {
			return fixedRoot(t, b, "Z").Cert.Raw
		}
	}
	t.Fatal("not a fixed root")
	return nil
}

func makeVectors(t *testing.T) vectors {
	t.Helper()
	a, b, c := fixedRoot(t, 0x11, "A"), fixedRoot(t, 0x22, "B"), fixedRoot(t, 0x33, "C")
	bKey := b.Signer.(*ecdsa.PrivateKey)
	set := anchorSet(a, b)
	sign := func(i *Issuer, s *AnchorSet) []byte {
		out, err := SignAnchors(i.Signer, s)
		return must(t, out, err)
	}
	first := sign(b, set)
	move := *set
	move.Sequence, move.InUse, move.Standby, move.Domains = 1<<32+1, b.Cert, c.Cert, []string{"localhost"}
	valid := func(name string, stored uint64, s *AnchorSet, msg []byte) vector {
		payload, err := s.payload()
		must(t, payload, err)
		return vector{name, true, hex.EncodeToString(b.Cert.Raw), stored, hex.EncodeToString(msg), hex.EncodeToString(payload),
			hex.EncodeToString(s.Fleet[:]), s.Sequence, hex.EncodeToString(s.InUse.Raw), hex.EncodeToString(s.Standby.Raw), s.Port, s.Domains}
	}
	payload, err := set.payload()
	must(t, payload, err)
	flipped := bytes.Clone(first)
	flipped[len(flipped)-1] ^= 1
	tampered := bytes.Replace(first, []byte("rescue"), []byte("rescux"), 1)
	v := vectors{Comment: "anchor sets: PROTOCOL.md; made by go test ./internal/pki -update", AAD: anchorsAAD,
		Keys:  map[string]string{"root_a": strings.Repeat("11", 32), "root_b": strings.Repeat("22", 32), "root_c": strings.Repeat("33", 32)},
		Cases: []vector{valid("first set", 0, set, first), valid("move to B and C", 1, &move, sign(b, &move))}}
	bad := func(name string, stored uint64, msg []byte) {
		v.Cases = append(v.Cases, vector{Name: name, Standby: hex.EncodeToString(b.Cert.Raw), Stored: stored, Cose: hex.EncodeToString(msg)})
	}
	bad("replayed", 1, first)
	bad("older than the one held", 2, first)
	bad("signed by the root in use", 0, sign(a, set))
	bad("signed by the root that it brings", 0, sign(c, &move))
	bad("one bit of the signature", 0, flipped)
	bad("one letter of a domain", 0, tampered)
	bad("no external data", 0, cosePayload(t, bKey, payload, "", cose.Headers{}))
	bad("another external data", 0, cosePayload(t, bKey, payload, "hawser-anchors-v2", cose.Headers{}))
	bad("an unprotected header", 0, cosePayload(t, bKey, payload, anchorsAAD, cose.Headers{Unprotected: cose.UnprotectedHeader{int64(4): []byte("k")}}))
	bad("no tag", 0, first[1:])
	bad("bytes after the message", 0, append(bytes.Clone(first), 0))
	bad("cut short", 0, first[:len(first)-1])
	bad("too large", 0, append(bytes.Clone(first), make([]byte, maxAnchors)...))
	payloads := badPayloads(t, set)
	for _, name := range slices.Sorted(maps.Keys(payloads)) {
		bad(name, 0, cosePayload(t, bKey, payloads[name], anchorsAAD, cose.Headers{}))
	}
	return v
}

// The shared vectors: what the device must accept and what it must refuse.
func TestAnchorVectors(t *testing.T) {
	if *update {
		b, err := encodeJSON(makeVectors(t))
		must(t, b, err)
		if err := os.WriteFile(vectorFile, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	file, err := os.ReadFile(vectorFile)
	must(t, file, err)
	var v vectors
	if err := json.Unmarshal(file, &v); err != nil {
		t.Fatal(err)
	}
	if len(v.Cases) != 15+len(badPayloads(t, anchorSet(fixedRoot(t, 0x11, "A"), fixedRoot(t, 0x22, "B")))) {
		t.Errorf("%d cases: the file is older than the test", len(v.Cases))
	}
	for _, c := range v.Cases {
		checkVector(t, c)
	}
}

func checkVector(t *testing.T, c vector) {
	t.Helper()
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		return must(t, b, err)
	}
	standby, err := x509.ParseCertificate(unhex(c.Standby))
	must(t, standby, err)
	s, err := VerifyAnchors(unhex(c.Cose), standby, c.Stored)
	if (err == nil) != c.Valid {
		t.Errorf("%s: %v", c.Name, err)
	}
	if err != nil || !c.Valid {
		return
	}
	payload, err := s.payload()
	must(t, payload, err)
	got := vector{c.Name, true, c.Standby, c.Stored, c.Cose, hex.EncodeToString(payload), hex.EncodeToString(s.Fleet[:]), s.Sequence,
		hex.EncodeToString(s.InUse.Raw), hex.EncodeToString(s.Standby.Raw), s.Port, s.Domains}
	if !reflect.DeepEqual(got, c) {
		t.Errorf("%s: got %+v\nwant %+v", c.Name, got, c)
	}
}

func TestAnchorsRefusals(t *testing.T) {
	a, b := newRoot(t, "A"), newRoot(t, "B")
	set := anchorSet(a, b)
	msg, err := SignAnchors(b.Signer, set)
	must(t, msg, err)
	if _, err := VerifyAnchors(msg, b.Cert, 1); !errors.Is(err, ErrReplayed) {
		t.Error(err)
	}
	if _, err := VerifyAnchors(msg, a.Cert, 0); err == nil || !strings.Contains(err.Error(), "not signed by the pinned standby root") {
		t.Error(err)
	}
	// A leaf, or a CA of another kind, is no pinned root, even if it signed.
	svc := newServiceCA(t)
	msg, err = SignAnchors(svc.Signer, set)
	must(t, msg, err)
	if _, err := VerifyAnchors(msg, svc.Cert, 0); err == nil {
		t.Error("a service CA changed the anchors")
	}
	if _, err := VerifyAnchors(append(msg, make([]byte, maxAnchors)...), b.Cert, 0); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Error("read a set of any size:", err)
	}
	set.Domains = nil
	if _, err := SignAnchors(b.Signer, set); err == nil {
		t.Error("signed a set without a domain")
	}
	set.Domains, set.Sequence = []string{"a.b"}, 0
	if _, err := SignAnchors(b.Signer, set); err == nil {
		t.Error("signed a set that no device would take")
	}
	set.Sequence = 1
	long := strings.Repeat("a.", 126)
	set.Domains = nil
	for _, d := range "abcdefgh" {
		set.Domains = append(set.Domains, long+string(d))
	}
	if out, err := SignAnchors(b.Signer, set); err != nil {
		t.Errorf("the largest set of %d bytes does not fit: %v", len(out), err)
	}
}

// The keys are fixed: each fuzzing process makes its own roots, and a seed must verify in all of them.
func FuzzVerifyAnchors(f *testing.F) {
	a, b := fixedRoot(f, 0x11, "A"), fixedRoot(f, 0x22, "B")
	msg, err := SignAnchors(b.Signer, anchorSet(a, b))
	f.Add(must(f, msg, err))
	f.Add(cosePayload(f, b.Signer.(*ecdsa.PrivateKey), []byte{0xa0}, anchorsAAD, cose.Headers{}))
	f.Fuzz(func(t *testing.T, data []byte) {
		if s, err := VerifyAnchors(data, b.Cert, 0); err == nil && (s.Sequence != 1 || !fixedKey(t, 0x11).PublicKey.Equal(s.InUse.PublicKey)) {
			t.Error("accepted a set that was never signed")
		}
	})
}

// The payload's parser, without a signature in front of it.
func FuzzAnchorPayload(f *testing.F) {
	s := anchorSet(fixedRoot(f, 0x11, "A"), fixedRoot(f, 0x22, "B"))
	good, err := s.payload()
	f.Add(must(f, good, err))
	for _, p := range badPayloads(f, s) {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := parseAnchors(data)
		if err != nil {
			return
		}
		if again, err := s.payload(); err != nil || !bytes.Equal(again, data) {
			t.Errorf("two spellings of one set: %v", err)
		}
	})
}

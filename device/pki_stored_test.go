package device

import (
	"bytes"
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"hawser/internal/message"
	"hawser/internal/pki"
)

// TestStoredPKIIsRefused where it is damaged or another device's, and left out where the device
// was provisioned anew.
func TestStoredPKIIsRefused(t *testing.T) {
	r := newPKIRig(t)
	whole := &pkiState{current: r.fresh, previous: r.old, set: anchors(t, r.b, 2, r.b, r.c), newSet: anchors(t, r.c, 3, r.c, r.d), offer: 7}
	load := func(blob []byte, edit func(*Config)) (*Device, error) {
		cfg := r.config()
		if err := r.store.Save(pkiName, blob); err != nil {
			t.Fatal(err)
		}
		if edit != nil {
			edit(&cfg)
		}
		return New(cfg)
	}
	d, err := load(whole.encode(), nil)
	if err != nil || !d.pki.same(whole) || d.pki.sequence != 2 || d.pki.newSequence != 3 {
		t.Fatal(err)
	}
	blob := whole.encode()
	for i := 1; i < len(blob); i += 97 {
		flipped := slices.Clone(blob)
		flipped[i] ^= 1
		for _, bad := range [][]byte{flipped, blob[:i]} {
			if _, err := load(bad, nil); err == nil || !strings.Contains(err.Error(), "damaged\nhint: ") {
				t.Fatalf("byte %d: %v", i, err)
			}
		}
	}
	stranger := &pkiState{current: r.certify(t, "00000001", &r.key.PublicKey)}
	if _, err := load(stranger.encode(), nil); err == nil || !strings.Contains(err.Error(), "another device") {
		t.Error(err)
	}
	foreign := func(c *Config) {
		c.Anchors, err = pki.SignAnchors(r.b.Signer, &pki.AnchorSet{Fleet: [16]byte{2}, Sequence: 1, InUse: r.a.Cert, Standby: r.b.Cert, Port: 1, Domains: []string{"a.b"}})
	}
	if _, err := load(blob, foreign); err == nil || !strings.Contains(err.Error(), "another fleet") {
		t.Error(err)
	}
	d, err = load(blob, func(c *Config) { c.Anchors = anchors(t, r.d, 4, r.c, r.d) })
	if err != nil || d.pki.set != nil || d.pki.newSet != nil || d.pki.current == nil {
		t.Error("provisioned anew:", err)
	}
	whole.newSet = anchors(t, r.b, 3, r.c, r.d) // as if the set in use had come later
	if d, err = load(whole.encode(), nil); err != nil || d.pki.set == nil || d.pki.newSet != nil {
		t.Error("a set that cannot be taken over:", err)
	}
}

func FuzzStoredPKI(f *testing.F) {
	f.Add((&pkiState{}).encode())
	f.Add((&pkiState{current: []byte{1}, pending: []byte{2, 3}, newSet: []byte{4}, offer: 9}).encode())
	f.Fuzz(func(t *testing.T, data []byte) {
		if p, err := parsePKI(data); err == nil && !bytes.Equal(p.encode(), data) {
			t.Errorf("%x came back as %x", data, p.encode())
		}
		// With the right sum, so that more than the sum is tested.
		if len(data) > 4 {
			data = withSum(data[:len(data)-4])
		}
		if p, err := parsePKI(data); err == nil && !bytes.Equal(p.encode(), data) {
			t.Errorf("%x came back as %x", data, p.encode())
		}
	})
}

// TestLoadTakesAnchors: what `hawser device add` writes is enough, and has to fit together.
func TestLoadTakesAnchors(t *testing.T) {
	r := newPKIRig(t)
	dir := t.TempDir()
	write := func(name string, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := pki.WriteKey(filepath.Join(dir, "device.key"), r.key, nil); err != nil {
		t.Fatal(err)
	}
	write("device.crt", pki.EncodeCert(r.old))
	write("ca.crt", append(pki.EncodeCert(r.a.Cert.Raw), pki.EncodeCert(r.b.Cert.Raw)...))
	write("anchors.cose", anchors(t, r.b, 1, r.a, r.b, "one.test", "rescue.test"))
	load := func() (*Device, error) {
		cfg, err := Load(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer cfg.Store.(*FileStore).Close()
		return New(cfg)
	}
	d, err := load()
	if err != nil || !slices.Equal(d.born.servers, []string{"one.test:8883", "rescue.test:8883"}) {
		t.Fatal(err)
	}
	write("anchors.cose", anchors(t, r.b, 1, r.a, r.b)[1:])
	if _, err := load(); err == nil || !strings.Contains(err.Error(), "the device's own anchor set: ") {
		t.Error(err)
	}
	write("anchors.cose", anchors(t, r.b, 2, r.b, r.c))
	if _, err := load(); err == nil || !strings.Contains(err.Error(), "not those of its anchor set") {
		t.Error(err)
	}
	if err := os.Remove(filepath.Join(dir, "anchors.cose")); err != nil {
		t.Fatal(err)
	}
	if _, err := load(); err == nil || !strings.Contains(err.Error(), "no server to connect to") {
		t.Error(err)
	}
}

// TestWithoutAnchors a device takes certificates, and nobody can change what it pins.
func TestWithoutAnchors(t *testing.T) {
	r := newPKIRig(t)
	cfg := r.config()
	cfg.Anchors, cfg.Servers, cfg.Roots = nil, []string{testServer}, []*x509.Certificate{r.a.Cert, r.b.Cert}
	start(t, cfg)
	p, _, reports := r.come()
	r.want(reports, inUse(0, r.old, 0))
	if got := p.offer(message.PKI{No: 1, Anchors: anchors(t, r.b, 1, r.a, r.b)}); got.State != message.PKIRefused || !strings.Contains(got.Text, "without an anchor set") {
		t.Errorf("%+v", got)
	}
	p.offer(message.PKI{No: 2, Certificate: r.fresh})
	p.gone()
	_, _, reports = r.come()
	r.want(reports, inUse(2, r.fresh, 0))
}

package e2e

import (
	"crypto/rand"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/internal/pki"
)

// replace writes a file of the fleet anew.
func (f *fleet) replace(path string, mode os.FileMode, change func([]byte) []byte) {
	f.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(path, change(b), mode); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		f.t.Fatal(err)
	}
}

// expire gives the fleet a broker certificate that ended yesterday, signed by its root.
func (f *fleet) expire() {
	f.t.Helper()
	cert := func(path string) *x509.Certificate {
		text, err := os.ReadFile(path)
		if err != nil {
			f.t.Fatal(err)
		}
		c, err := pki.ParseCert(text)
		if err != nil {
			f.t.Fatal(err)
		}
		return c
	}
	key, err := pki.ReadKey(f.path("ca-a", "root.key"), nil)
	if err != nil {
		f.t.Fatal(err)
	}
	leaf := cert(f.path("server", "broker-localhost.crt"))
	leaf.NotAfter = time.Now().AddDate(0, 0, -1).UTC()
	leaf.NotBefore = leaf.NotAfter.AddDate(-1, 0, 0)
	der, err := x509.CreateCertificate(rand.Reader, leaf, cert(f.path("ca-a", "root.crt")), leaf.PublicKey, key)
	if err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(f.path("server", "broker-localhost.crt"), pki.EncodeCert(der), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

// TestWrongFiles: what is wrong is said in one line with a hint, and nothing starts.
func TestWrongFiles(t *testing.T) {
	whole, other := newFleet(t), newFleet(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	server := func(name string) func(f *fleet) string {
		return func(f *fleet) string { return f.path("server", name) }
	}
	remove := func(name string) func(f *fleet) {
		return func(f *fleet) {
			if err := os.Remove(f.path(name)); err != nil {
				f.t.Fatal(err)
			}
		}
	}
	spoil := func(name string, mode os.FileMode, change func([]byte) []byte) func(f *fleet) {
		return func(f *fleet) { f.replace(server(name)(f), mode, change) }
	}
	same := func(b []byte) []byte { return b }
	steal := func(name string, mode os.FileMode) func(f *fleet) {
		return func(f *fleet) {
			f.replace(server(name)(f), mode, func([]byte) []byte {
				b, err := os.ReadFile(server(name)(other))
				if err != nil {
					f.t.Fatal(err)
				}
				return b
			})
		}
	}
	for name, c := range map[string]struct {
		wrong func(f *fleet)
		words []string
	}{
		"world-readable broker key":   {spoil("broker-localhost.key", 0o644, same), []string{"broker-localhost.key", "0644"}},
		"group-readable broker key":   {spoil("broker-localhost.key", 0o640, same), []string{"broker-localhost.key", "0640"}},
		"no broker key":               {remove("server/broker-localhost.key"), []string{"broker-localhost.key"}},
		"half a broker key":           {spoil("broker-localhost.key", 0o600, func(b []byte) []byte { return b[:len(b)/2] }), []string{"broker-localhost.key"}},
		"another fleet's broker key":  {steal("broker-localhost.key", 0o600), []string{"broker-localhost.key"}},
		"no broker certificate":       {remove("server/broker-localhost.crt"), []string{"broker-localhost.crt"}},
		"half a broker certificate":   {spoil("broker-localhost.crt", 0o644, func(b []byte) []byte { return b[:len(b)/2] }), []string{"broker-localhost.crt"}},
		"another fleet's certificate": {steal("broker-localhost.crt", 0o644), []string{"broker-localhost"}},
		"expired broker certificate":  {(*fleet).expire, []string{"broker certificate", "localhost", "expired"}},
		"another fleet's registry":    {steal("registry.db", 0o600), []string{"registry.db", "another fleet"}},
		"no configuration":            {remove("hawser.toml"), []string{"hawser.toml"}},
		"no broker roots":             {remove("server/broker-roots.crt"), []string{"broker-roots.crt"}},
		"no device CAs":               {remove("server/device-cas.crt"), []string{"device-cas.crt"}},
		"no service CAs":              {remove("server/service-cas.crt"), []string{"service-cas.crt"}},
		"no anchors":                  {remove("server/anchors.cose"), []string{"anchors.cose"}},
		"flipped anchors": {spoil("anchors.cose", 0o644, func(b []byte) []byte { b[len(b)-1] ^= 1; return b }),
			[]string{"anchors.cose"}},
		"unknown key":          {func(f *fleet) { f.configure("handshake_slots", "handshake_slotz") }, []string{"hawser.toml", "line ", "handshake_slotz"}},
		"value not to be":      {func(f *fleet) { f.configure("inflight = 32", "inflight = 0") }, []string{"hawser.toml", "inflight"}},
		"no TOML":              {func(f *fleet) { f.configure("inflight = 32", "inflight = = 32") }, []string{"hawser.toml", "line "}},
		"production with keys": {func(f *fleet) { f.configure("trial = true", "trial = false") }, []string{"a CA key lies in the fleet directory"}},
	} {
		t.Run(name, func(t *testing.T) {
			f := whole.copyOf(t)
			c.wrong(f)
			f.refused(c.words...)
		})
	}
	t.Run("port in use", func(t *testing.T) {
		for _, flag := range []string{"--listen", "--metrics"} {
			r := whole.hawser("serve", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", flag, taken.Addr().String())
			said := plainLines(r.stderr)
			if r.code != 1 || len(said) != 2 || !strings.Contains(said[0], taken.Addr().String()+" is in use") || !strings.HasPrefix(said[1], "hint: ") {
				t.Errorf("%s: exit code %d, %s", flag, r.code, r.stderr)
			}
		}
	})
	t.Run("the hint helps", func(t *testing.T) {
		f := whole.copyOf(t)
		f.expire()
		f.refused("expired")
		f.do("ca", "issue-broker")
		f.serve()
	})
	t.Run("second serve", func(t *testing.T) {
		f := whole.copyOf(t)
		s := f.serve()
		f.refused("another hawser works on", filepath.Base(f.dir))
		if _, err := raw(t.Context(), s.addr); err != nil {
			t.Errorf("the first one: %v", err)
		}
	})
}

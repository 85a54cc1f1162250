package check

import (
	"bytes"
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestWorld: what was saved is what is loaded, and it is never written over.
func TestWorld(t *testing.T) {
	w, dir := worldFiles(t)
	got, err := LoadWorld(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got.Domain != w.Domain || got.Device != w.Device || !bytes.Equal(got.deviceDER, w.deviceDER) || !got.deviceKey.Equal(w.deviceKey) ||
		!bytes.Equal(got.rootA.der, w.rootA.der) || !bytes.Equal(got.rootB.der, w.rootB.der) || !got.rootA.key.Equal(w.rootA.key) || !got.brokerKey.Equal(w.brokerKey) {
		t.Error("another world was loaded than was saved")
	}
	for _, x := range []*World{w, got} { // the honest broker is honest to the letter of Go's verifier too
		leaf, err := x509.ParseCertificate(x.broker[0])
		if err != nil {
			t.Fatal(err)
		}
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: w.pool(), DNSName: w.Domain}); err != nil {
			t.Error(err)
		}
	}
	if err := w.Save(dir); err == nil {
		t.Error("a world was written over another")
	}
	if _, err := OpenWorld(dir, "elsewhere.invalid"); err == nil || !strings.Contains(err.Error(), "localhost") {
		t.Errorf("a world for another name was opened: %v", err)
	}
	if _, err := LoadWorld(dir + "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no world: %v", err)
	}
	for _, name := range []string{fileKey, fileRootA, fileRootB, fileBrokerKey} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
}

// TestDamagedWorld: what is missing or does not fit is named, and nothing is made anew.
func TestDamagedWorld(t *testing.T) {
	for _, name := range []string{fileCert, fileKey, fileRootA, fileRootB, fileRootACert, fileRootBCert, fileBrokerKey} {
		for how, damage := range map[string]func(path string) error{"missing": os.Remove, "damaged": func(p string) error { return os.WriteFile(p, []byte("x"), 0o600) }} {
			_, dir := worldFiles(t)
			if err := damage(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
			if w, err := LoadWorld(dir); err == nil || w != nil {
				t.Errorf("%s %s: it was loaded", name, how)
			}
		}
	}
	_, dir := worldFiles(t)
	if err := os.Remove(filepath.Join(dir, fileCert)); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenWorld(dir, "localhost"); err == nil || !strings.Contains(err.Error(), fileCert) {
		t.Errorf("a world without its device: %v", err)
	}
	_, dir = worldFiles(t)
	_, other := worldFiles(t)
	text, err := os.ReadFile(filepath.Join(other, fileRootA))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, fileRootA), text, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadWorld(dir); err == nil || !strings.Contains(err.Error(), fileRootA) {
		t.Errorf("the key of another root: %v", err)
	}
}

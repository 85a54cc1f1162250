package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"

	"hawser/internal/check"
	"hawser/internal/factory"
	"hawser/internal/pki"
)

// TestCheckWorldForABench: what a bench writes into a unit is what the unit's own checks
// take, and belongs to the files beside it.
func TestCheckWorldForABench(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "desk")
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	a := &app{out: null, err: null}
	root := a.root()
	root.SetArgs([]string{"check", "world", dir, "--domain", "desk.example.com", "--port", "9883"})
	if err := root.Execute(); err != nil {
		t.Fatal(err)
	}
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	unit, err := factory.ParseIdentity(read("identity.bin"))
	if err != nil {
		t.Fatal(err)
	}
	entries, _, err := factory.ParseTrust(read("trust.bin"))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(factory.Value(entries, factory.TagCertificate))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), unit.Scalar)
	if err != nil || !key.PublicKey.Equal(cert.PublicKey) || cert.Subject.CommonName != unit.ID.String() {
		t.Fatalf("%v: the key of %s and the certificate of %q do not belong together", err, unit.ID, cert.Subject)
	}
	if err := pki.Lint(cert, pki.DeviceLeaf); err != nil {
		t.Error(err)
	}
	roots, err := check.LoadRoots(filepath.Join(dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	set, err := pki.VerifyAnchors(factory.Value(entries, factory.TagAnchors), roots[1], 0)
	if err != nil {
		t.Fatal(err)
	}
	if !set.InUse.Equal(roots[0]) || !set.Standby.Equal(roots[1]) || set.Port != 9883 || set.Domains[0] != "desk.example.com" {
		t.Errorf("anchor set %+v", set)
	}
	if i, err := os.Stat(filepath.Join(dir, "identity.bin")); err != nil || i.Mode().Perm() != 0o600 {
		t.Errorf("identity.bin holds a key, and has the mode %v (%v)", i.Mode(), err)
	}
}

package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/youmark/pkcs8"

	"hawser/internal/durable"
)

const passphrase = "correct horse battery"

func ask(p string) func() ([]byte, error) { return func() ([]byte, error) { return []byte(p), nil } }

// The openssl command reads our encrypted keys, says what they are encrypted with,
// and we read the ones it wrote.
func TestOpensslReadsOurKeys(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("the openssl command is missing")
	}
	key, dir := newKey(t), t.TempDir()
	for name, pass := range map[string][]byte{"encrypted.key": []byte(passphrase), "plain.key": nil} {
		path := filepath.Join(dir, name)
		if err := WriteKey(path, key, pass); err != nil {
			t.Fatal(err)
		}
		theirs := filepath.Join(dir, "openssl-"+name)
		args := []string{"pkcs8", "-topk8", "-in", path, "-out", theirs, "-passin", "pass:" + passphrase}
		if pass == nil {
			args = append(args, "-nocrypt")
		} else {
			args = append(args, "-passout", "pass:"+passphrase, "-scrypt", "-v2", "aes-256-cbc")
		}
		if out, err := exec.Command("openssl", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for _, p := range []string{path, theirs} {
			got, err := OpenKey("file:"+p, ask(passphrase))
			if err != nil || !key.Equal(got) {
				t.Errorf("%s: %v", p, err)
			}
		}
	}
	out, err := exec.Command("openssl", "asn1parse", "-in", filepath.Join(dir, "encrypted.key")).CombinedOutput()
	for _, want := range []string{":PBES2", ":scrypt", ":aes-256-cbc"} {
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%v: no %s in\n%s", err, want, out)
		}
	}
	if out, err := exec.Command("openssl", "pkey", "-in", filepath.Join(dir, "encrypted.key"), "-passin", "pass:wrong").CombinedOutput(); err == nil {
		t.Errorf("openssl opened it with a wrong passphrase\n%s", out)
	}
}

func TestKeyFiles(t *testing.T) {
	key, path := newKey(t), filepath.Join(t.TempDir(), "k")
	if err := WriteKey(path, key, []byte(passphrase)); err != nil {
		t.Fatal(err)
	}
	if err := WriteKey(path, newKey(t), nil); !errors.Is(err, fs.ErrExist) {
		t.Error("a key was overwritten:", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Error(info.Mode(), err)
	}
	if _, err := OpenKey("file:"+path, nil); !errors.Is(err, ErrNoPassphrase) {
		t.Error(err)
	}
	for _, wrong := range []string{"wrong", ""} {
		if _, err := ReadKey(path, ask(wrong)); !errors.Is(err, ErrPassphrase) {
			t.Errorf("%q: %v", wrong, err)
		}
	}
	boom := errors.New("no terminal")
	if _, err := ReadKey(path, func() ([]byte, error) { return nil, boom }); !errors.Is(err, boom) {
		t.Error(err)
	}
	if err := os.Chmod(path, 0o604); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadKey(path, ask(passphrase)); !errors.Is(err, durable.ErrExposed) {
		t.Error(err)
	}
	for _, uri := range []string{path, "file:", ""} {
		if _, err := OpenKey(uri, nil); err == nil || !strings.Contains(err.Error(), "not a file: or pkcs11: URI") {
			t.Errorf("%q: %v", uri, err)
		}
	}
	if _, err := MarshalKey(key, []byte{}); err == nil {
		t.Error("an empty passphrase left a key in the clear")
	}
}

func TestParseKeyRefuses(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	must(t, p384, err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, rsaKey, err)
	plain := func(k any) []byte {
		der, err := x509.MarshalPKCS8PrivateKey(k)
		return pem.EncodeToMemory(&pem.Block{Type: blockKey, Bytes: must(t, der, err)})
	}
	der, err := x509.MarshalECPrivateKey(newKey(t))
	must(t, der, err)
	good, err := MarshalKey(newKey(t), nil)
	must(t, good, err)
	for name, text := range map[string][]byte{"P-384": plain(p384), "RSA": plain(rsaKey), "nothing": nil, "two keys": append(good[:len(good):len(good)], good...),
		"SEC1": pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), "huge": append(good[:len(good):len(good)], make([]byte, maxKeyFile)...)} {
		if _, err := ParseKey(text, ask(passphrase)); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if _, err := MarshalKey(p384, nil); err == nil {
		t.Error("wrote a P-384 key")
	}
}

// What the file asks for is looked at before it is done: the passphrase function
// fails the test, for it is called only when scrypt is about to run.
func TestHostileKeyFiles(t *testing.T) {
	text, err := MarshalKey(newKey(t), []byte(passphrase))
	must(t, text, err)
	b, _ := pem.Decode(text)
	bend := func(f func(*pbes2)) []byte {
		var e pbes2
		if _, err := asn1.Unmarshal(b.Bytes, &e); err != nil {
			t.Fatal(err)
		}
		f(&e)
		der, err := asn1.Marshal(e)
		return must(t, der, err)
	}
	iv := func(n int) []byte {
		der, err := asn1.Marshal(make([]byte, n))
		return must(t, der, err)
	}
	for name, der := range map[string][]byte{
		"1 TiB of memory":    bend(func(e *pbes2) { e.Alg.Params.KDF.Params.N = 1 << 30 }),
		"1 GiB, quickly":     bend(func(e *pbes2) { e.Alg.Params.KDF.Params.N, e.Alg.Params.KDF.Params.P = 1<<20, 1 }),
		"a wide block":       bend(func(e *pbes2) { e.Alg.Params.KDF.Params.R = 1 << 20 }),
		"hours of time":      bend(func(e *pbes2) { e.Alg.Params.KDF.Params.P = 1 << 20 }),
		"N of 0":             bend(func(e *pbes2) { e.Alg.Params.KDF.Params.N = 0 }),
		"r below 0":          bend(func(e *pbes2) { e.Alg.Params.KDF.Params.R = -8 }),
		"a short key":        bend(func(e *pbes2) { e.Alg.Params.KDF.Params.KeyLength = 16 }),
		"half a block":       bend(func(e *pbes2) { e.Data = e.Data[:len(e.Data)-8] }),
		"no data":            bend(func(e *pbes2) { e.Data = nil }),
		"short IV":           bend(func(e *pbes2) { e.Alg.Params.Cipher.Parameters = asn1.RawValue{FullBytes: iv(8)} }),
		"another cipher":     bend(func(e *pbes2) { e.Alg.Params.Cipher.Algorithm = asn1.ObjectIdentifier{1, 2, 840, 113549, 3, 7} }),
		"PBES1":              bend(func(e *pbes2) { e.Alg.OID = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 10} }),
		"PBKDF2's name":      bend(func(e *pbes2) { e.Alg.Params.KDF.OID = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12} }),
		"bytes after it all": append(b.Bytes[:len(b.Bytes):len(b.Bytes)], 0),
	} {
		_, err := ParseKey(pem.EncodeToMemory(&pem.Block{Type: blockEncrypted, Bytes: der}), func() ([]byte, error) {
			t.Errorf("%s: was let through to scrypt", name)
			return nil, nil
		})
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzParseKey(f *testing.F) {
	for _, pass := range [][]byte{nil, []byte(passphrase)} {
		text, err := MarshalKey(fixedKey(f, 0x11), pass)
		f.Add(must(f, text, err))
	}
	cheap, err := pkcs8.MarshalPrivateKey(fixedKey(f, 0x11), []byte(passphrase), &pkcs8.Opts{Cipher: pkcs8.AES256CBC,
		KDFOpts: pkcs8.ScryptOpts{SaltSize: 8, CostParameter: 2, BlockSize: 1, ParallelizationParameter: 1}})
	f.Add(pem.EncodeToMemory(&pem.Block{Type: blockEncrypted, Bytes: must(f, cheap, err)}))
	f.Fuzz(func(t *testing.T, text []byte) {
		if k, err := ParseKey(text, ask(passphrase)); err == nil && k.Curve != elliptic.P256() {
			t.Error("another curve")
		}
	})
}

func BenchmarkOneGuess(b *testing.B) {
	text, err := MarshalKey(newKey(b), []byte(passphrase))
	must(b, text, err)
	for b.Loop() {
		if _, err := ParseKey(text, ask("wrong")); !errors.Is(err, ErrPassphrase) {
			b.Fatal(err)
		}
	}
}

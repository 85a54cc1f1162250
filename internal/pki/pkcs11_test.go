package pki

import (
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"hawser/internal/durable"
)

const softModule = "/usr/lib/softhsm/libsofthsm2.so"

// softToken makes a token called "safe" with the PIN 12345678 and gives the start of
// its URIs, up to the object's name.
func softToken(t *testing.T) func(object string) string {
	t.Helper()
	if _, err := OpenKey("pkcs11:token=a;object=b?module-path=/nowhere", nil); errors.Is(err, ErrNoPKCS11) {
		t.Skip(err)
	}
	if _, err := exec.LookPath("softhsm2-util"); err != nil {
		t.Skip("the program softhsm2-util is missing")
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "directories.tokendir = %s\nlog.level = ERROR\n", dir), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	hsm(t, "--init-token", "--free", "--label", "safe", "--pin", "12345678", "--so-pin", "87654321")
	return func(object string) string {
		return "pkcs11:token=safe;object=" + object + "?module-path=" + softModule
	}
}

func hsm(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("softhsm2-util", args...).CombinedOutput(); err != nil {
		t.Fatalf("softhsm2-util: %v\n%s", err, out)
	}
}

// A key made on a token does all that a CA key does, though it has nothing but Sign.
func TestTokenKeyAsCA(t *testing.T) {
	uri := softToken(t)
	key, err := CreateKey(uri("root"), ask("12345678"))
	must(t, key, err)
	if _, err := CreateKey(uri("root"), ask("12345678")); !errors.Is(err, ErrKeyThere) {
		t.Error("a key was made over another:", err)
	}
	if err := CloseKey(key); err != nil {
		t.Fatal(err)
	}
	key, err = OpenKey(uri("root"), ask("12345678"))
	must(t, key, err)
	defer CloseKey(key)
	now := time.Now()
	root, err := IssueBrokerRoot(key, Name{"Test", "DE"}, "A", now)
	must(t, root, err)
	leaf, err := IssueBrokerLeaf(root, "mqtt.example.com", &newKey(t).PublicKey, now)
	must(t, leaf, err)
	if err := leaf.CheckSignatureFrom(root.Cert); err != nil {
		t.Error(err)
	}
	standby, err := IssueBrokerRoot(newKey(t), Name{"Test", "DE"}, "B", now)
	must(t, standby, err)
	sign1, err := SignAnchors(key, &AnchorSet{Fleet: [16]byte{1}, Sequence: 1, InUse: standby.Cert, Standby: root.Cert, Port: 1, Domains: []string{"a.example"}})
	must(t, sign1, err)
	if _, err := VerifyAnchors(sign1, root.Cert, 0); err != nil {
		t.Error(err)
	}
	if _, err := key.Sign(nil, make([]byte, 32), crypto.SHA384); err == nil {
		t.Error("signed another hash than SHA-256")
	}
	signAtOnce(t, key)
}

// signAtOnce: a token key is used from all cores.
func signAtOnce(t *testing.T, key crypto.Signer) {
	t.Helper()
	pub, err := p256(key.Public())
	must(t, pub, err)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if err := ProveKey(key, pub); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

// A key that is brought to a token is the same key there, and cannot be had back.
func TestImportToToken(t *testing.T) {
	uri, mine := softToken(t), newKey(t)
	moved, err := ImportKey(uri("root"), mine, ask("12345678"))
	must(t, moved, err)
	if err := ProveKey(moved, &mine.PublicKey); err != nil {
		t.Error(err)
	}
	if err := ProveKey(moved, &newKey(t).PublicKey); err == nil {
		t.Error("a signature by another key was taken for proof")
	}
	for range 2 {
		if err := CloseKey(moved); err != nil {
			t.Error(err)
		}
	}
	if _, err := ImportKey(uri("root"), newKey(t), ask("12345678")); !errors.Is(err, ErrKeyThere) {
		t.Error("a key was brought over another:", err)
	}
	again, err := OpenKey(uri("root"), ask("12345678"))
	must(t, again, err)
	defer CloseKey(again)
	if !mine.PublicKey.Equal(again.Public()) {
		t.Error("another key is on the token")
	}
	checkNotExtractable(t)
}

// checkNotExtractable asks another PKCS#11 program.
func checkNotExtractable(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("pkcs11-tool"); err != nil {
		t.Log("the program pkcs11-tool is missing: what the token says of the key is checked by ImportKey alone")
		return
	}
	out, err := exec.Command("pkcs11-tool", "--module", softModule, "--login", "--pin", "12345678", "--list-objects", "--type", "privkey").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "sensitive") || strings.Contains(string(out), "extractable,") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestTokenErrors(t *testing.T) {
	uri := softToken(t)
	asked := 0
	pin := func(p string) func() ([]byte, error) {
		return func() ([]byte, error) { asked++; return []byte(p), nil }
	}
	for _, c := range []struct {
		uri, pin string
		want     error
		asks     int
	}{
		{uri("root"), "12345678", ErrNoKey, 1},
		{uri("root"), "87654321", ErrPIN, 1}, // one question, one try
		{uri("root"), "1", ErrPIN, 1},
		{strings.Replace(uri("root"), "=safe", "=other", 1), "12345678", ErrNoToken, 0},
		{"pkcs11:serial=77;object=root?module-path=" + softModule, "12345678", ErrNoToken, 0},
		{"pkcs11:token=safe;object=root?module-path=/nowhere/lib.so", "12345678", ErrModule, 0},
		{"pkcs11:token=safe;object=root?module-path=/etc/passwd", "12345678", ErrModule, 0},
		{uri("root") + "&pin-source=file:/nowhere", "12345678", fs.ErrNotExist, 0},
	} {
		asked = 0
		if _, err := OpenKey(c.uri, pin(c.pin)); !errors.Is(err, c.want) || asked != c.asks {
			t.Errorf("%s: asked %d times: %v", c.uri, asked, err)
		}
	}
	if _, err := OpenKey(uri("root"), nil); err == nil || !strings.Contains(err.Error(), "nobody to ask") {
		t.Error(err)
	}
	if _, err := OpenKey(uri("root"), ask("")); err == nil || !strings.Contains(err.Error(), "was not asked") {
		t.Error(err)
	}
}

func TestPINSource(t *testing.T) {
	uri := softToken(t)
	path := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(path, []byte("12345678\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	key, err := CreateKey(uri("a")+"&pin-source=file:"+path, nil)
	must(t, key, err)
	if _, ok := key.(io.Closer); !ok {
		t.Error("a token key cannot be closed")
	}
	if err := CloseKey(key); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenKey(uri("a")+"&pin-source=file:"+path, nil); !errors.Is(err, durable.ErrExposed) {
		t.Error(err)
	}
}

// Keys that are not ours to use, and a name that two keys have.
func TestOtherKeysOnTheToken(t *testing.T) {
	uri := softToken(t)
	dir := t.TempDir()
	for i, curve := range []string{"secp384r1", "prime256v1", "prime256v1"} {
		path := filepath.Join(dir, fmt.Sprint(i))
		if out, err := exec.Command("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:"+curve, "-out", path).CombinedOutput(); err != nil {
			t.Skipf("openssl: %v\n%s", err, out)
		}
		label := "twice"
		if i == 0 {
			label = "p384"
		}
		hsm(t, "--import", path, "--token", "safe", "--label", label, "--id", fmt.Sprintf("0%d", i+1), "--pin", "12345678")
	}
	if _, err := OpenKey(uri("p384"), ask("12345678")); err == nil || !strings.Contains(err.Error(), "not on the curve P-256") {
		t.Error(err)
	}
	if _, err := OpenKey(uri("twice"), ask("12345678")); err == nil || !strings.Contains(err.Error(), "give object and id") {
		t.Error(err)
	}
	key, err := OpenKey(uri("twice;id=%02"), ask("12345678"))
	must(t, key, err)
	digest := sha256.Sum256(nil)
	if _, err := key.Sign(nil, digest[:], crypto.SHA256); err != nil {
		t.Error(err)
	}
	if err := CloseKey(key); err != nil {
		t.Error(err)
	}
}

func TestCreateKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "k")
	if _, err := CreateKey("file:"+path, ask("")); err == nil {
		t.Error("an empty passphrase left a key in the clear")
	}
	key, err := CreateKey("file:"+path, ask(passphrase))
	must(t, key, err)
	again, err := OpenKey("file:"+path, ask(passphrase))
	if err != nil || !newPub(again).Equal(key.Public()) {
		t.Error(err)
	}
	if _, err := CreateKey("file:"+path, nil); !errors.Is(err, fs.ErrExist) {
		t.Error("a key was made over another:", err)
	}
	mine := newKey(t)
	moved, err := ImportKey("file:"+path+"2", mine, nil)
	if err != nil || ProveKey(moved, &mine.PublicKey) != nil {
		t.Error(err)
	}
}

func newPub(k crypto.Signer) interface{ Equal(crypto.PublicKey) bool } {
	return k.Public().(interface{ Equal(crypto.PublicKey) bool })
}

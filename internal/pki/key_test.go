package pki

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestX(t *testing.T) {
	k, _ := GenerateKey()
	b, err := MarshalKey(k, []byte("correct horse"))
	if err != nil {
		t.Fatal(err)
	}
	p := filepath.Join(t.TempDir(), "k")
	os.WriteFile(p, b, 0600)
	out, err := exec.Command("openssl", "pkey", "-in", p, "-passin", "pass:correct horse", "-text", "-noout").CombinedOutput()
	t.Logf("%s %v", out, err)
	k2, err := ParseKey(b, func() ([]byte, error) { return []byte("correct horse"), nil })
	if err != nil || !k2.Equal(k) {
		t.Fatal(err)
	}
	_, err = ParseKey(b, func() ([]byte, error) { return []byte("wrong horse"), nil })
	t.Log(err)
}

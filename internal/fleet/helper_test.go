package fleet

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"os/exec"
	"strings"
	"testing"

	"hawser/internal/pki"
)

func mustCA(t *testing.T, dir, pass string) *CA {
	t.Helper()
	ca, err := OpenCA(dir, ask(pass))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ca.Close() })
	return ca
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func csrOf(t testing.TB, key *ecdsa.PrivateKey) *pki.CSR {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.ParseCSR(der)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// openssl runs the openssl command and gives its output; a failure ends the test.
func openssl(t *testing.T, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("the openssl command is missing")
	}
	out, err := exec.Command("openssl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

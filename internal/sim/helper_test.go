package sim_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"testing"

	"hawser/internal/pki"
)

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

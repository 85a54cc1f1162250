// Package pki issues and checks every certificate, key file, anchor set and
// signing request of a fleet.
//
// It promises that a certificate leaves it only after the exact bytes that were
// signed were linted against the profile they belong to, that a CA takes nothing
// from a request but a public key whose holder proved possession, and that what
// another party hands in (a certificate, a result, an anchor set) is accepted
// whole or refused with the reason. Everything is P-256 and ECDSA with SHA-256.
// It imports leaves and libraries only and holds no state of its own.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
)

// maxPEM bounds what is read as one certificate or request, in bytes. Ours are
// under 1 KiB; the bound only keeps a wrong file from being parsed at length.
const maxPEM = 64 << 10

const (
	blockCert = "CERTIFICATE"
	blockCSR  = "CERTIFICATE REQUEST"
)

// ErrDomain reports a name under which no broker leaf is issued.
var ErrDomain = errors.New("a domain is a lower-case DNS name of letters, digits and hyphens, not an address and no wildcard")

// Fingerprint is what the broker pins: the SHA-256 of the certificate's DER.
func Fingerprint(der []byte) [32]byte { return sha256.Sum256(der) }

// KeyFingerprint is the SHA-256 of the SubjectPublicKeyInfo of pub: the name of
// a key in journals and in the registry, the same in every generation.
func KeyFingerprint(pub *ecdsa.PublicKey) ([32]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return [32]byte{}, fmt.Errorf("encode public key: %w", err)
	}
	return sha256.Sum256(der), nil
}

// CheckDomain reports whether s can be the one DNS name of a broker leaf:
// RFC 1123 labels in lower case, at most 253 characters, no trailing dot. The
// last label holds a letter, so that no IPv4 address passes for a name.
func CheckDomain(s string) error {
	if len(s) == 0 || len(s) > 253 {
		return ErrDomain
	}
	labels := strings.Split(s, ".")
	for _, l := range labels {
		if !labelOK(l) {
			return ErrDomain
		}
	}
	if strings.Trim(labels[len(labels)-1], "0123456789") == "" {
		return ErrDomain
	}
	return nil
}

func labelOK(l string) bool {
	if len(l) == 0 || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
		return false
	}
	for i := 0; i < len(l); i++ {
		c := l[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// EncodeCert gives the PEM text of a certificate's DER.
func EncodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: blockCert, Bytes: der})
}

// ParseCerts reads one or more PEM certificates and nothing else: other blocks
// and text after the last block are errors. Comments before a block are allowed.
func ParseCerts(text []byte) ([]*x509.Certificate, error) {
	if len(text) > maxPEM {
		return nil, fmt.Errorf("certificate file of %d bytes is larger than %d", len(text), maxPEM)
	}
	var out []*x509.Certificate
	for len(strings.TrimSpace(string(text))) > 0 {
		b, rest := pem.Decode(text)
		if b == nil {
			return nil, errors.New("not a PEM certificate")
		}
		if b.Type != blockCert {
			return nil, fmt.Errorf("PEM block %q where a certificate was expected", b.Type)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse certificate: %w", err)
		}
		out, text = append(out, c), rest
	}
	if len(out) == 0 {
		return nil, errors.New("no certificate in the file")
	}
	return out, nil
}

// ParseCert reads exactly one PEM certificate.
func ParseCert(text []byte) (*x509.Certificate, error) {
	cs, err := ParseCerts(text)
	if err != nil {
		return nil, err
	}
	if len(cs) != 1 {
		return nil, fmt.Errorf("%d certificates where one was expected", len(cs))
	}
	return cs[0], nil
}

// CSR is a certificate request whose self-signature was verified. Of what it
// asks for (subject, extensions) nothing is kept: the CA chooses.
type CSR struct {
	DER []byte           // as received; kept for life so that later generations can sign it again
	Pub *ecdsa.PublicKey // P-256
	// Asks names the extensions that it asks for, by OID. None is granted: it is there to be said.
	Asks []string
}

// ParseCSR reads a PKCS#10 request, PEM or DER, P-256 only, and verifies its
// proof of possession (ECDSA with SHA-256).
func ParseCSR(data []byte) (*CSR, error) {
	der, err := csrDER(data)
	if err != nil {
		return nil, err
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("parse certificate request: %w", err)
	}
	if r.SignatureAlgorithm != x509.ECDSAWithSHA256 {
		return nil, fmt.Errorf("certificate request is signed with %v, not ECDSA-SHA256", r.SignatureAlgorithm)
	}
	pub, err := p256(r.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, errors.New("certificate request does not prove possession of its key: wrong signature")
	}
	csr := &CSR{DER: der, Pub: pub}
	for _, e := range r.Extensions {
		csr.Asks = append(csr.Asks, e.Id.String())
	}
	return csr, nil
}

// csrDER takes the PEM armour off, if there is one.
func csrDER(data []byte) ([]byte, error) {
	if len(data) > maxPEM {
		return nil, fmt.Errorf("certificate request of %d bytes is larger than %d", len(data), maxPEM)
	}
	if len(data) > 0 && data[0] == 0x30 {
		return data, nil
	}
	b, rest := pem.Decode(data)
	if b == nil || (b.Type != blockCSR && b.Type != "NEW "+blockCSR) {
		return nil, errors.New("not a certificate request (PEM or DER)")
	}
	if len(strings.TrimSpace(string(rest))) > 0 {
		return nil, errors.New("text after the certificate request")
	}
	return b.Bytes, nil
}

// EncodeCSR gives the PEM text of a request's DER.
func EncodeCSR(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: blockCSR, Bytes: der})
}

// p256 accepts the one kind of public key there is here.
func p256(pub any) (*ecdsa.PublicKey, error) {
	k, ok := pub.(*ecdsa.PublicKey)
	if !ok || k.Curve != elliptic.P256() {
		return nil, errors.New("key is not on the curve P-256")
	}
	return k, nil
}

package pki

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"

	"hawser/internal/identity"
)

// ErrIssuer reports a leaf that none of the CAs given signed.
var ErrIssuer = errors.New("certificate is not signed by a CA of this fleet")

// VerifyDeviceLeaf is the check before a certificate can become active: it was
// signed directly by one of cas (device CAs), conforms to the device profile and
// is named by an issuable id. It returns the id and the generation of the CA.
// Its dates are not judged here but at each connect.
func VerifyDeviceLeaf(der []byte, cas []*x509.Certificate) (identity.ID, int, *x509.Certificate, error) {
	leaf, ca, err := verifyLeaf(der, DeviceLeaf, cas)
	if err != nil {
		return 0, 0, nil, err
	}
	id, err := identity.ParseID(leaf.Subject.CommonName)
	if err != nil {
		return 0, 0, nil, err
	}
	gen, err := Generation(ca)
	if err != nil {
		return 0, 0, nil, err
	}
	return id, gen, leaf, nil
}

// VerifyServiceLeaf is the same for a service; it returns the service's name.
func VerifyServiceLeaf(der []byte, cas []*x509.Certificate) (string, *x509.Certificate, error) {
	leaf, _, err := verifyLeaf(der, ServiceLeaf, cas)
	if err != nil {
		return "", nil, err
	}
	return leaf.Subject.CommonName, leaf, nil
}

// VerifyBrokerLeaf is the same for a broker leaf under one of the pinned roots;
// it returns the one domain that the leaf is for.
func VerifyBrokerLeaf(der []byte, roots []*x509.Certificate) (string, *x509.Certificate, error) {
	leaf, _, err := verifyLeaf(der, BrokerLeaf, roots)
	if err != nil {
		return "", nil, err
	}
	return leaf.DNSNames[0], leaf, nil
}

// verifyLeaf finds the CA that signed der and lints both.
func verifyLeaf(der []byte, p Profile, cas []*x509.Certificate) (leaf, ca *x509.Certificate, err error) {
	leaf, err = x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, fmt.Errorf("parse certificate: %w", err)
	}
	if err := lintBody(leaf, p); err != nil {
		return nil, nil, err
	}
	for _, ca := range cas {
		if !signedBy(leaf, ca) {
			continue
		}
		if err := CheckCA(ca, p.issuedBy()); err != nil {
			return nil, nil, err
		}
		return leaf, ca, nil
	}
	return nil, nil, ErrIssuer
}

// signedBy: the names, the key identifiers and the signature must all agree.
func signedBy(leaf, ca *x509.Certificate) bool {
	return bytes.Equal(leaf.RawIssuer, ca.RawSubject) &&
		bytes.Equal(leaf.AuthorityKeyId, ca.SubjectKeyId) &&
		leaf.CheckSignatureFrom(ca) == nil
}

// checkCA: a conforming, self-signed CA of kind p.
func CheckCA(c *x509.Certificate, p Profile) error {
	if err := lintBody(c, p); err != nil {
		return err
	}
	if err := c.CheckSignatureFrom(c); err != nil {
		return fmt.Errorf("%s %q is not signed by itself", p, c.Subject.CommonName)
	}
	return nil
}

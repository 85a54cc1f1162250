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

// ErrStationDates reports a leaf that a station signed outside its certificate's validity.
var ErrStationDates = errors.New("certificate was made outside the validity of the station's certificate")

// VerifyStationCA is the check before a station counts: its certificate was signed
// directly by one of cas (device CAs) and conforms to the profile. It returns the
// station's name and the generation of the device CA above it. No dates are judged.
func VerifyStationCA(der []byte, cas []*x509.Certificate) (name string, generation int, c *x509.Certificate, err error) {
	c, ca, err := verifyLeaf(der, StationCA, cas)
	if err != nil {
		return "", 0, nil, err
	}
	if generation, err = Generation(ca); err != nil {
		return "", 0, nil, err
	}
	return c.Subject.CommonName, generation, c, nil
}

// VerifyStationLeaf is VerifyDeviceLeaf for a leaf that a station signed; station came
// out of VerifyStationCA. A station's certificate counts while it is valid: the leaf's
// notBefore must lie within it (ErrStationDates), whatever the time is now.
func VerifyStationLeaf(der []byte, station *x509.Certificate) (identity.ID, *x509.Certificate, error) {
	leaf, err := parseLeaf(der, DeviceLeaf)
	if err != nil {
		return 0, nil, err
	}
	if err := CheckCA(station, StationCA); err != nil {
		return 0, nil, err
	}
	if !signedBy(leaf, station) {
		return 0, nil, fmt.Errorf("certificate is not signed by the station %q", station.Subject.CommonName)
	}
	if leaf.NotBefore.Before(station.NotBefore) || leaf.NotBefore.After(station.NotAfter) {
		return 0, nil, fmt.Errorf("%w (%s to %s): its notBefore is %s", ErrStationDates,
			rfc3339(station.NotBefore), rfc3339(station.NotAfter), rfc3339(leaf.NotBefore))
	}
	id, err := identity.ParseID(leaf.Subject.CommonName)
	if err != nil {
		return 0, nil, err
	}
	return id, leaf, nil
}

// parseLeaf reads der and holds it against its profile.
func parseLeaf(der []byte, p Profile) (*x509.Certificate, error) {
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse certificate: %w", err)
	}
	if err := lintBody(leaf, p); err != nil {
		return nil, err
	}
	return leaf, nil
}

// verifyLeaf finds the CA that signed der and lints both.
func verifyLeaf(der []byte, p Profile, cas []*x509.Certificate) (leaf, ca *x509.Certificate, err error) {
	leaf, err = parseLeaf(der, p)
	if err != nil {
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

// CheckCA: a conforming CA of kind p, signed by itself. Who signed a station CA is
// VerifyStationCA's to say.
func CheckCA(c *x509.Certificate, p Profile) error {
	if err := lintBody(c, p); err != nil {
		return err
	}
	if p == StationCA {
		return nil
	}
	if err := c.CheckSignatureFrom(c); err != nil {
		return fmt.Errorf("%s %q is not signed by itself", p, c.Subject.CommonName)
	}
	return nil
}

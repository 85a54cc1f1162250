package pki

import (
	"crypto/x509"
	"errors"

	"hawser/internal/identity"
)

// DeviceCAs are device CAs that were checked once, to hold many leaves against: the check
// of a CA costs as much as that of a leaf.
type DeviceCAs struct{ cas []*x509.Certificate }

// CheckDeviceCAs refuses what is no device CA.
func CheckDeviceCAs(cas []*x509.Certificate) (DeviceCAs, error) {
	for _, c := range cas {
		if err := CheckCA(c, DeviceCA); err != nil {
			return DeviceCAs{}, err
		}
	}
	return DeviceCAs{cas}, nil
}

// Verify is VerifyDeviceLeaf.
func (d DeviceCAs) Verify(der []byte) (identity.ID, int, *x509.Certificate, error) {
	leaf, err := parseLeaf(der, DeviceLeaf)
	if err != nil {
		return 0, 0, nil, err
	}
	for _, ca := range d.cas {
		if signedBy(leaf, ca) {
			return deviceLeaf(leaf, ca)
		}
	}
	return 0, 0, nil, ErrIssuer
}

// deviceLeaf reads who a leaf is for, and the generation of the CA that signed it.
func deviceLeaf(leaf, ca *x509.Certificate) (identity.ID, int, *x509.Certificate, error) {
	id, err1 := identity.ParseID(leaf.Subject.CommonName)
	gen, err2 := Generation(ca)
	if err := errors.Join(err1, err2); err != nil {
		return 0, 0, nil, err
	}
	return id, gen, leaf, nil
}

package check

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"

	"hawser/internal/identity"
	"hawser/internal/pki"
)

// Unit is what a bench writes into a test unit, whose shipping image then runs unchanged.
type Unit struct {
	ID          identity.ID
	Key         *ecdsa.PrivateKey
	Certificate []byte // DER
	Anchors     []byte // anchor set 1 over the world's two roots, signed by the standby root
}

// Unit makes what a test unit is born with: it will look for the world's domain at port.
func (w *World) Unit(port uint16) (*Unit, error) {
	set := &pki.AnchorSet{Sequence: 1, Port: port, Domains: []string{w.Domain}}
	rand.Read(set.Fleet[:])
	var err error
	if set.InUse, err = x509.ParseCertificate(w.rootA.der); err != nil {
		return nil, err
	}
	if set.Standby, err = x509.ParseCertificate(w.rootB.der); err != nil {
		return nil, err
	}
	u := &Unit{ID: w.Device, Key: w.deviceKey, Certificate: w.deviceDER}
	u.Anchors, err = pki.SignAnchors(w.rootB.key, set)
	return u, err
}

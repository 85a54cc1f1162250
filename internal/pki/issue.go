package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"strconv"
	"time"

	"hawser/internal/identity"
)

// backdate is how far notBefore lies in the past, so that a server whose clock
// is a little behind the CA's does not refuse a certificate as not yet valid.
const backdate = time.Hour

// Name is what a CA certificate's subject says besides its role.
type Name struct {
	Organisation string // O, 1 to 64 bytes (ub-organization-name)
	Country      string // C, two upper-case letters
}

// Check reports whether n can stand in a subject.
func (n Name) Check() error {
	if len(n.Organisation) == 0 || len(n.Organisation) > 64 {
		return errors.New("organisation has 1 to 64 bytes")
	}
	for _, r := range n.Organisation {
		if r < ' ' || r == 0x7f || r == 0xfffd {
			return errors.New("organisation is printable UTF-8 text")
		}
	}
	if len(n.Country) != 2 || n.Country[0] < 'A' || n.Country[0] > 'Z' || n.Country[1] < 'A' || n.Country[1] > 'Z' {
		return errors.New("country is two upper-case letters")
	}
	return nil
}

// Issuer is a CA certificate with the key that belongs to it.
type Issuer struct {
	Cert   *x509.Certificate
	Signer crypto.Signer
}

// NewIssuer joins a CA certificate and its key; they must belong together and
// the certificate must conform to p.
func NewIssuer(cert *x509.Certificate, signer crypto.Signer, p Profile) (*Issuer, error) {
	if err := CheckCA(cert, p); err != nil {
		return nil, err
	}
	pub, err := p256(signer.Public())
	if err != nil {
		return nil, err
	}
	if !pub.Equal(cert.PublicKey) {
		return nil, fmt.Errorf("key does not belong to the certificate of %q", cert.Subject.CommonName)
	}
	return &Issuer{Cert: cert, Signer: signer}, nil
}

// IssueBrokerRoot makes the self-signed root that devices pin; label is "A", "B", ... "Z".
func IssueBrokerRoot(key crypto.Signer, n Name, label string, now time.Time) (*Issuer, error) {
	return selfSign(key, n, brokerRootMark+label, BrokerRoot, now)
}

// IssueDeviceCA makes the self-signed CA of one generation (1 and up) of device certificates.
func IssueDeviceCA(key crypto.Signer, n Name, generation int, now time.Time) (*Issuer, error) {
	return selfSign(key, n, deviceCAMark+strconv.Itoa(generation), DeviceCA, now)
}

// IssueServiceCA makes the self-signed CA of the certificates of services.
func IssueServiceCA(key crypto.Signer, n Name, now time.Time) (*Issuer, error) {
	return selfSign(key, n, serviceCAName, ServiceCA, now)
}

// IssueStationCA certifies pub as the key of one flashing bench, 1 year; ca is a
// device CA. What the bench signs with it is checked by VerifyStationLeaf, and counts
// for the ids of its own blocks only (the registry's to say).
func IssueStationCA(ca *Issuer, station string, pub *ecdsa.PublicKey, now time.Time) (*x509.Certificate, error) {
	return ca.issue(StationCA, station, nil, pub, now)
}

// IssueBrokerLeaf certifies pub as the broker's key for one domain, 1 year.
func IssueBrokerLeaf(ca *Issuer, domain string, pub *ecdsa.PublicKey, now time.Time) (*x509.Certificate, error) {
	return ca.issue(BrokerLeaf, brokerCN, []string{domain}, pub, now)
}

// IssueDeviceLeaf certifies pub as the key of device id, without an end: the
// device has no clock, the registry decides. ca is a device CA or a station CA.
func IssueDeviceLeaf(ca *Issuer, id identity.ID, pub *ecdsa.PublicKey, now time.Time) (*x509.Certificate, error) {
	return ca.issue(DeviceLeaf, id.String(), nil, pub, now)
}

// IssueServiceLeaf certifies pub as the key of the service called name, 1 year.
func IssueServiceLeaf(ca *Issuer, name string, pub *ecdsa.PublicKey, now time.Time) (*x509.Certificate, error) {
	return ca.issue(ServiceLeaf, name, nil, pub, now)
}

// issuedBy says which CA may sign which certificate. A device leaf may come from a
// station CA as well: that is asked for where it is meant.
func (p Profile) issuedBy() Profile {
	switch p {
	case BrokerLeaf:
		return BrokerRoot
	case DeviceLeaf, StationCA:
		return DeviceCA
	case ServiceLeaf:
		return ServiceCA
	}
	return p
}

func selfSign(key crypto.Signer, n Name, cn string, p Profile, now time.Time) (*Issuer, error) {
	if err := n.Check(); err != nil {
		return nil, err
	}
	pub, err := p256(key.Public())
	if err != nil {
		return nil, err
	}
	t, err := template(p, now.Add(-backdate))
	if err != nil {
		return nil, err
	}
	t.Subject = pkix.Name{CommonName: cn, Organization: []string{n.Organisation}, Country: []string{n.Country}}
	cert, err := sign(t, t, pub, key, p)
	if err != nil {
		return nil, err
	}
	return NewIssuer(cert, key, p)
}

// signerOf is the kind of CA that ca must be to sign p. A station CA is told from a
// device CA by having been signed by another.
func (ca *Issuer) signerOf(p Profile) Profile {
	if p == DeviceLeaf && !bytes.Equal(ca.Cert.RawSubject, ca.Cert.RawIssuer) {
		return StationCA
	}
	return p.issuedBy()
}

// issue makes a certificate of profile p under ca, which must be of the kind that signs such ones.
func (ca *Issuer) issue(p Profile, cn string, dns []string, pub *ecdsa.PublicKey, now time.Time) (*x509.Certificate, error) {
	if err := CheckCA(ca.Cert, ca.signerOf(p)); err != nil {
		return nil, err
	}
	if err := ca.checkTime(now); err != nil {
		return nil, err
	}
	if pub == nil {
		return nil, errors.New("no public key to certify")
	}
	if pub.Equal(ca.Cert.PublicKey) {
		return nil, errors.New("the key to certify is the CA's own")
	}
	notBefore := now.Add(-backdate)
	if notBefore.Before(ca.Cert.NotBefore) {
		notBefore = ca.Cert.NotBefore
	}
	t, err := template(p, notBefore)
	if err != nil {
		return nil, err
	}
	t.Subject = pkix.Name{CommonName: cn}
	t.DNSNames = dns
	return sign(t, ca.Cert, pub, ca.Signer, p)
}

func (ca *Issuer) checkTime(now time.Time) error {
	if now.Before(ca.Cert.NotBefore) {
		return fmt.Errorf("the clock says %s, before the CA was made (%s)", rfc3339(now), rfc3339(ca.Cert.NotBefore))
	}
	if now.After(ca.Cert.NotAfter) {
		return fmt.Errorf("the CA %q expired at %s", ca.Cert.Subject.CommonName, rfc3339(ca.Cert.NotAfter))
	}
	return nil
}

// template fills in all that the profile decides; the caller adds the names.
func template(p Profile, notBefore time.Time) (*x509.Certificate, error) {
	r, err := p.rules()
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	notBefore = notBefore.UTC().Truncate(time.Second)
	t := &x509.Certificate{
		SerialNumber:       serial,
		SignatureAlgorithm: x509.ECDSAWithSHA256,
		NotBefore:          notBefore,
		NotAfter:           r.notAfter(notBefore),
		KeyUsage:           x509.KeyUsageDigitalSignature,
	}
	if r.ca {
		t.BasicConstraintsValid, t.IsCA = true, true
		t.KeyUsage, t.MaxPathLenZero = caUsage, r.station
	} else {
		t.ExtKeyUsage = []x509.ExtKeyUsage{r.eku}
	}
	return t, nil
}

// newSerial draws 128 random bits.
func newSerial() (*big.Int, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return nil, fmt.Errorf("draw a serial number: %w", err)
	}
	return new(big.Int).SetBytes(b[:]), nil
}

// sign lets the key touch nothing but bytes that were linted: see lintingSigner.
// The lint is where names and keys are judged; nobody above does it a second time.
func sign(t, parent *x509.Certificate, pub *ecdsa.PublicKey, key crypto.Signer, p Profile) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, pub, lintingSigner{key, p})
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", p, err)
	}
	return x509.ParseCertificate(der)
}

// lintingSigner stands between crypto/x509 and the CA key. As a
// crypto.MessageSigner it is handed the to-be-signed bytes themselves, not their
// hash, parses them and signs only what conforms to the profile.
type lintingSigner struct {
	key     crypto.Signer
	profile Profile
}

// Public gives the CA's public key.
func (s lintingSigner) Public() crypto.PublicKey { return s.key.Public() }

// Sign refuses: a digest cannot be linted.
func (s lintingSigner) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("will not sign a bare digest")
}

// SignMessage lints tbs, the DER of a TBSCertificate, and signs it.
func (s lintingSigner) SignMessage(random io.Reader, tbs []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 {
		return nil, errors.New("will sign with SHA-256 only")
	}
	c, err := parseTBS(tbs)
	if err != nil {
		return nil, err
	}
	if err := Lint(c, s.profile); err != nil {
		return nil, fmt.Errorf("refused before signing: %w", err)
	}
	return crypto.SignMessage(s.key, random, tbs, opts)
}

// parseTBS reads a certificate that has no signature yet: the parser wants the
// outer shell, whose signature it does not look at.
func parseTBS(tbs []byte) (*x509.Certificate, error) {
	ecdsaSHA256 := asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
	der, err := asn1.Marshal(struct {
		TBS asn1.RawValue
		Alg pkix.AlgorithmIdentifier
		Sig asn1.BitString
	}{asn1.RawValue{FullBytes: tbs}, pkix.AlgorithmIdentifier{Algorithm: ecdsaSHA256}, asn1.BitString{Bytes: []byte{0}, BitLength: 8}})
	if err != nil {
		return nil, fmt.Errorf("wrap to-be-signed certificate: %w", err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse to-be-signed certificate: %w", err)
	}
	return c, nil
}

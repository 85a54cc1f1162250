package pki

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"hawser/internal/identity"
)

// Profile is a row of the certificate table in the design.
type Profile uint8

// The profiles that exist.
const (
	BrokerRoot Profile = iota + 1
	DeviceCA
	ServiceCA
	StationCA
	BrokerLeaf
	DeviceLeaf
	ServiceLeaf
)

func (p Profile) String() string {
	switch p {
	case BrokerRoot:
		return "broker root"
	case DeviceCA:
		return "device CA"
	case ServiceCA:
		return "service CA"
	case StationCA:
		return "station CA"
	case BrokerLeaf:
		return "broker leaf"
	case DeviceLeaf:
		return "device leaf"
	case ServiceLeaf:
		return "service leaf"
	}
	return "unknown profile " + strconv.Itoa(int(p))
}

const (
	caYears   = 30
	leafYears = 1 // and those of a station CA
	caUsage   = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	brokerCN  = "broker"

	// The kinds of CA are told apart by their names, so that a bundle that was mixed up
	// is found: what stands before the label, before the generation number, and alone.
	brokerRootMark = "Hawser broker root "
	deviceCAMark   = "Hawser device CA "
	serviceCAName  = "Hawser service CA"
)

// noExpiry is RFC 5280 4.1.2.5: "no well-defined expiration date".
func noExpiry() time.Time { return time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) }

// rules is what distinguishes the profiles; all else is common to CAs or to leaves.
type rules struct {
	ca      bool
	station bool             // a CA under a device CA: CN alone, path length 0, 1 year
	eku     x509.ExtKeyUsage // leaves only
	dns     bool             // exactly one DNS name in the SAN
	forever bool             // notAfter 99991231235959Z
	checkCN func(string) error
}

func (p Profile) rules() (rules, error) {
	switch p {
	case BrokerRoot:
		return rules{ca: true, checkCN: checkRootName}, nil
	case ServiceCA:
		return rules{ca: true, checkCN: exactly(serviceCAName)}, nil
	case DeviceCA:
		return rules{ca: true, checkCN: checkDeviceCAName}, nil
	case StationCA:
		return rules{ca: true, station: true, checkCN: checkStationName}, nil
	case BrokerLeaf:
		return rules{eku: x509.ExtKeyUsageServerAuth, dns: true, checkCN: exactly(brokerCN)}, nil
	case DeviceLeaf:
		return rules{eku: x509.ExtKeyUsageClientAuth, forever: true, checkCN: checkDeviceName}, nil
	case ServiceLeaf:
		return rules{eku: x509.ExtKeyUsageClientAuth, checkCN: identity.CheckName}, nil
	}
	return rules{}, errors.New(p.String())
}

// root reports whether the profile is that of a CA that signs itself.
func (r rules) root() bool { return r.ca && !r.station }

func (r rules) notAfter(notBefore time.Time) time.Time {
	switch {
	case r.forever:
		return noExpiry()
	case r.root():
		return notBefore.AddDate(caYears, 0, 0)
	}
	return notBefore.AddDate(leafYears, 0, 0)
}

func exactly(want string) func(string) error {
	return func(cn string) error {
		if cn != want {
			return fmt.Errorf("common name %q is not %q", cn, want)
		}
		return nil
	}
}

func checkRootName(cn string) error {
	label, ok := strings.CutPrefix(cn, brokerRootMark)
	if !ok || len(label) != 1 || label[0] < 'A' || label[0] > 'Z' {
		return fmt.Errorf("common name %q is not %q and a letter", cn, brokerRootMark)
	}
	return nil
}

func checkDeviceCAName(cn string) error {
	_, err := parseGeneration(cn)
	return err
}

func checkDeviceName(cn string) error {
	_, err := identity.ParseID(cn)
	return err
}

// checkStationName: a bench is named as a service is, in another name space.
func checkStationName(cn string) error {
	if err := CheckStation(cn); err != nil {
		return fmt.Errorf("common name %q: %w", cn, err)
	}
	return nil
}

func parseGeneration(cn string) (int, error) {
	digits, ok := strings.CutPrefix(cn, deviceCAMark)
	n, err := strconv.Atoi(digits)
	if !ok || err != nil || n < 1 || strconv.Itoa(n) != digits {
		return 0, fmt.Errorf("common name %q is not %q and a generation", cn, deviceCAMark)
	}
	return n, nil
}

// Generation reads the generation number, 1 and up, out of a device CA's subject.
func Generation(c *x509.Certificate) (int, error) { return parseGeneration(c.Subject.CommonName) }

// RootLabel reads "A", "B", ... out of a broker root's subject.
func RootLabel(c *x509.Certificate) string {
	label, _ := strings.CutPrefix(c.Subject.CommonName, brokerRootMark)
	return label
}

// Lint compares a parsed certificate with its profile: every field that the
// profile names must be as it says and no extension may stand beside those.
// It does not look at the signature (see Verify*); nil means conforming.
func Lint(c *x509.Certificate, p Profile) error {
	if err := lintBody(c, p); err != nil {
		return err
	}
	r, err := p.rules()
	if err != nil {
		return err
	}
	if want := r.notAfter(c.NotBefore); !c.NotAfter.Equal(want) {
		return fmt.Errorf("%s: notAfter is %s, not %s", p, rfc3339(c.NotAfter), rfc3339(want))
	}
	return nil
}

// lintBody is Lint without the length of validity: what is imported may have
// been given another one, and the dates are compared at each connect.
func lintBody(c *x509.Certificate, p Profile) error {
	r, err := p.rules()
	if err != nil {
		return err
	}
	checks := []error{
		lintCommon(c), lintSubject(c, r), lintExtensions(c, r), lintRole(c, r), lintSAN(c, r),
	}
	for _, err := range checks {
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	return nil
}

func lintCommon(c *x509.Certificate) error {
	if c.Version != 3 {
		return fmt.Errorf("version %d, not 3", c.Version)
	}
	if c.SignatureAlgorithm != x509.ECDSAWithSHA256 {
		return fmt.Errorf("signed with %v, not ECDSA-SHA256", c.SignatureAlgorithm)
	}
	if _, err := p256(c.PublicKey); err != nil {
		return err
	}
	// 128 random bits are shorter than 65 once in 2^64: then something else drew them.
	if n := c.SerialNumber.BitLen(); c.SerialNumber.Sign() <= 0 || n <= 64 || n > 128 {
		return fmt.Errorf("serial number of %d bits is not 128 random bits", n)
	}
	if !c.NotAfter.After(c.NotBefore) {
		return errors.New("notAfter does not lie after notBefore")
	}
	return nil
}

// lintSubject: CN alone on a leaf and a station CA, CN with O and C on the other CAs, each at most once.
func lintSubject(c *x509.Certificate, r rules) error {
	want := pkix.Name{CommonName: c.Subject.CommonName}
	if r.root() {
		want.Organization, want.Country = c.Subject.Organization, c.Subject.Country
		if len(want.Organization) != 1 || len(want.Country) != 1 {
			return errors.New("subject of a CA needs one O and one C")
		}
	}
	raw, err := asn1.Marshal(want.ToRDNSequence())
	if err != nil {
		return fmt.Errorf("encode subject: %w", err)
	}
	if !bytes.Equal(raw, c.RawSubject) {
		return fmt.Errorf("subject %q has more than the profile allows", c.Subject)
	}
	if self := bytes.Equal(c.RawSubject, c.RawIssuer); self != r.root() {
		return fmt.Errorf("issuer %q does not fit the profile", c.Issuer)
	}
	return r.checkCN(c.Subject.CommonName)
}

// extension is an extension's name and whether it is critical.
type extension struct {
	oid      string
	critical bool
}

const (
	oidSKI = "2.5.29.14"
	oidKU  = "2.5.29.15"
	oidSAN = "2.5.29.17"
	oidBC  = "2.5.29.19"
	oidAKI = "2.5.29.35"
	oidEKU = "2.5.29.37"
)

func (r rules) extensions() []extension {
	switch {
	case r.station:
		return []extension{{oidKU, true}, {oidBC, true}, {oidSKI, false}, {oidAKI, false}}
	case r.ca:
		return []extension{{oidKU, true}, {oidBC, true}, {oidSKI, false}}
	case r.dns:
		return []extension{{oidKU, true}, {oidEKU, false}, {oidAKI, false}, {oidSAN, false}}
	}
	return []extension{{oidKU, true}, {oidEKU, false}, {oidAKI, false}}
}

func lintExtensions(c *x509.Certificate, r rules) error {
	want := r.extensions()
	for _, e := range c.Extensions {
		if !slices.Contains(want, extension{e.Id.String(), e.Critical}) {
			return fmt.Errorf("extension %s (critical: %t) is not in the profile", e.Id, e.Critical)
		}
	}
	// The parser refuses duplicates (RFC 5280 4.2), so equal counts mean equal sets.
	if len(c.Extensions) != len(want) {
		return fmt.Errorf("%d extensions where the profile has %d", len(c.Extensions), len(want))
	}
	return nil
}

func lintRole(c *x509.Certificate, r rules) error {
	if r.ca {
		return lintCA(c, r)
	}
	if c.KeyUsage != x509.KeyUsageDigitalSignature {
		return errors.New("keyUsage is not digitalSignature alone")
	}
	if len(c.ExtKeyUsage) != 1 || len(c.UnknownExtKeyUsage) != 0 || c.ExtKeyUsage[0] != r.eku {
		return errors.New("extKeyUsage is not the one usage of the profile")
	}
	if len(c.AuthorityKeyId) == 0 {
		return errors.New("authorityKeyIdentifier is empty")
	}
	return nil
}

func lintCA(c *x509.Certificate, r rules) error {
	switch {
	case r.station && (!c.IsCA || c.MaxPathLen != 0):
		return errors.New("basicConstraints is not CA with the path length 0")
	case !r.station && (!c.IsCA || c.MaxPathLen != -1):
		return errors.New("basicConstraints is not CA without a path length")
	case r.station && len(c.AuthorityKeyId) == 0:
		return errors.New("authorityKeyIdentifier is empty")
	}
	if c.KeyUsage != caUsage {
		return errors.New("keyUsage is not keyCertSign and cRLSign")
	}
	if len(c.SubjectKeyId) == 0 {
		return errors.New("subjectKeyIdentifier is empty")
	}
	return nil
}

// lintSAN compares the extension's bytes with those of a SAN that holds the one
// DNS name, so that a name of a type the parser passes over is found too.
func lintSAN(c *x509.Certificate, r rules) error {
	if !r.dns {
		return nil
	}
	if len(c.DNSNames) != 1 {
		return fmt.Errorf("%d DNS names where the profile has one", len(c.DNSNames))
	}
	if err := CheckDomain(c.DNSNames[0]); err != nil {
		return err
	}
	want, err := asn1.Marshal([]asn1.RawValue{{Tag: 2, Class: asn1.ClassContextSpecific, Bytes: []byte(c.DNSNames[0])}})
	if err != nil {
		return fmt.Errorf("encode SAN: %w", err)
	}
	i := slices.IndexFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.String() == oidSAN })
	if i < 0 || !bytes.Equal(c.Extensions[i].Value, want) {
		return errors.New("subjectAltName holds more than one DNS name")
	}
	return nil
}

func rfc3339(t time.Time) string { return t.UTC().Format(time.RFC3339) }

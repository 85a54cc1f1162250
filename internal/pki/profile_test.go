package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"hawser/internal/identity"
)

func testNow() time.Time { return time.Date(2026, 7, 1, 12, 0, 0, 123, time.UTC) }

func acme() Name { return Name{Organisation: "Acme Pumps", Country: "DE"} }

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// must ends the test on an error, else gives the value.
func must[T any](t testing.TB, v T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func newRoot(t testing.TB, label string) *Issuer {
	t.Helper()
	i, err := IssueBrokerRoot(newKey(t), acme(), label, testNow())
	return must(t, i, err)
}

func newDeviceCA(t testing.TB, gen int) *Issuer {
	t.Helper()
	i, err := IssueDeviceCA(newKey(t), acme(), gen, testNow())
	return must(t, i, err)
}

func newServiceCA(t testing.TB) *Issuer {
	t.Helper()
	i, err := IssueServiceCA(newKey(t), acme(), testNow())
	return must(t, i, err)
}

func TestIssuedConforms(t *testing.T) {
	key := &newKey(t).PublicKey
	broker, err := IssueBrokerLeaf(newRoot(t, "A"), "mqtt.example.com", key, testNow())
	must(t, broker, err)
	device, err := IssueDeviceLeaf(newDeviceCA(t, 3), 0xABCD1234, key, testNow())
	must(t, device, err)
	service, err := IssueServiceLeaf(newServiceCA(t), "dashboard", key, testNow())
	must(t, service, err)
	for p, c := range map[Profile]*x509.Certificate{
		BrokerRoot: newRoot(t, "B").Cert, DeviceCA: newDeviceCA(t, 2).Cert, ServiceCA: newServiceCA(t).Cert,
		BrokerLeaf: broker, DeviceLeaf: device, ServiceLeaf: service, StationCA: newStation(t, newDeviceCA(t, 4), "line1").Cert,
	} {
		for q := BrokerRoot; q <= ServiceLeaf+1; q++ {
			if err := Lint(c, q); (err == nil) != (p == q) {
				t.Errorf("a %s linted as %s: %v", p, q, err)
			}
		}
	}
	if got := device.NotAfter.Format(time.RFC3339); got != "9999-12-31T23:59:59Z" {
		t.Error(got)
	}
	if device.SerialNumber.Cmp(service.SerialNumber) == 0 {
		t.Error("equal serial numbers")
	}
}

// counting counts how often the key was used.
type counting struct {
	*ecdsa.PrivateKey
	n *int
}

func (c counting) Sign(r io.Reader, d []byte, o crypto.SignerOpts) ([]byte, error) {
	*c.n++
	return c.PrivateKey.Sign(r, d, o)
}

// mutation bends a conforming template; want is a word of the refusal.
type mutation struct {
	name, want string
	profile    Profile
	bend       func(*x509.Certificate)
}

func ext(oid asn1.ObjectIdentifier, critical bool, value ...byte) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oid, Critical: critical, Value: value})
	}
}

func ce(n int) asn1.ObjectIdentifier { return asn1.ObjectIdentifier{2, 5, 29, n} }

func mutations() []mutation {
	return append(leafMutations(), append(sanMutations(), append(caMutations(), stationMutations()...)...)...)
}

func leafMutations() []mutation {
	return []mutation{
		{"other hash", "ECDSA-SHA256", DeviceLeaf, func(c *x509.Certificate) { c.SignatureAlgorithm = x509.ECDSAWithSHA384 }},
		{"serial 1", "serial", DeviceLeaf, func(c *x509.Certificate) { c.SerialNumber = big.NewInt(1) }},
		{"serial of 129 bits", "serial", DeviceLeaf, func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 128) }},
		{"lower-case id", "device id", DeviceLeaf, func(c *x509.Certificate) { c.Subject.CommonName = "abcd1234" }},
		{"wildcard for an id", "device id", DeviceLeaf, func(c *x509.Certificate) { c.Subject.CommonName = "#" }},
		{"erased flash", "device id", DeviceLeaf, func(c *x509.Certificate) { c.Subject.CommonName = "FFFFFFFF" }},
		{"an O in a leaf", "subject", DeviceLeaf, func(c *x509.Certificate) { c.Subject.Organization = []string{"x"} }},
		{"two common names", "subject", DeviceLeaf, func(c *x509.Certificate) {
			c.Subject.ExtraNames = []pkix.AttributeTypeAndValue{{Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: "00000001"}, {Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: "ABCD1234"}}
		}},
		{"serverAuth", "extKeyUsage", DeviceLeaf, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }},
		{"two usages", "extKeyUsage", DeviceLeaf, func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) }},
		{"an unknown usage", "extKeyUsage", DeviceLeaf, func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}} }},
		{"no extKeyUsage", "extensions", DeviceLeaf, func(c *x509.Certificate) { c.ExtKeyUsage = nil }},
		{"keyEncipherment", "keyUsage", DeviceLeaf, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyEncipherment }},
		{"keyCertSign in a leaf", "keyUsage", ServiceLeaf, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCertSign }},
		{"keyUsage not critical", "2.5.29.15", DeviceLeaf, ext(ce(15), false, 3, 2, 7, 0x80)},
		{"SAN in a device leaf", "2.5.29.17", DeviceLeaf, func(c *x509.Certificate) { c.DNSNames = []string{"a.example"} }},
		{"basicConstraints in a leaf", "2.5.29.19", DeviceLeaf, func(c *x509.Certificate) { c.BasicConstraintsValid = true }},
		{"a CA for a leaf", "2.5.29.19", DeviceLeaf, func(c *x509.Certificate) { c.BasicConstraintsValid, c.IsCA = true, true }},
		{"SKI in a leaf", "2.5.29.14", DeviceLeaf, func(c *x509.Certificate) { c.SubjectKeyId = []byte{1, 2, 3, 4} }},
		{"an extension of one's own", "1.3.6.1.4.1.99999", DeviceLeaf, ext(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999}, false, 5, 0)},
		{"empty AKI", "authorityKeyIdentifier", DeviceLeaf, ext(ce(35), false, 0x30, 0)},
		{"device leaf that ends", "notAfter", DeviceLeaf, func(c *x509.Certificate) { c.NotAfter = c.NotBefore.AddDate(1, 0, 0) }},
		{"service leaf without end", "notAfter", ServiceLeaf, func(c *x509.Certificate) { c.NotAfter = noExpiry() }},
		{"ends before it begins", "notAfter", ServiceLeaf, func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(-time.Hour) }},
		{"service with a device's name", "service name", ServiceLeaf, func(c *x509.Certificate) { c.Subject.CommonName = "ABCD1234" }},
		{"issuer's own name", "subject", DeviceLeaf, func(c *x509.Certificate) {
			c.Subject = pkix.Name{CommonName: "Hawser device CA 1", Organization: []string{"Acme Pumps"}, Country: []string{"DE"}}
		}},
	}
}

func sanMutations() []mutation {
	return []mutation{
		{"two domains", "2 DNS names", BrokerLeaf, func(c *x509.Certificate) { c.DNSNames = append(c.DNSNames, "b.example") }},
		{"no domain", "extensions", BrokerLeaf, func(c *x509.Certificate) { c.DNSNames = nil }},
		{"wildcard domain", "domain", BrokerLeaf, func(c *x509.Certificate) { c.DNSNames = []string{"*.example.com"} }},
		{"upper-case domain", "domain", BrokerLeaf, func(c *x509.Certificate) { c.DNSNames = []string{"A.example"} }},
		{"an address beside the domain", "subjectAltName", BrokerLeaf, func(c *x509.Certificate) { c.IPAddresses = []net.IP{{127, 0, 0, 1}} }},
		{"a mail address beside it", "subjectAltName", BrokerLeaf, func(c *x509.Certificate) { c.EmailAddresses = []string{"a@b.example"} }},
		{"a registered id beside it", "subjectAltName", BrokerLeaf, ext(ce(17), false, 0x30, 8, 0x82, 3, 'a', '.', 'b', 0x88, 1, 0x2a)},
		{"critical SAN", "2.5.29.17", BrokerLeaf, ext(ce(17), true, 0x30, 5, 0x82, 3, 'a', '.', 'b')},
		{"another name", "common name", BrokerLeaf, func(c *x509.Certificate) { c.Subject.CommonName = "mqtt.example.com" }},
		{"clientAuth", "extKeyUsage", BrokerLeaf, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }},
	}
}

func caMutations() []mutation {
	return []mutation{
		{"path length", "path length", BrokerRoot, func(c *x509.Certificate) { c.MaxPathLenZero = true }},
		{"no CA", "basicConstraints", BrokerRoot, ext(ce(19), true, 0x30, 0)},
		{"basicConstraints not critical", "2.5.29.19", BrokerRoot, ext(ce(19), false, 0x30, 3, 1, 1, 0xff)},
		{"digitalSignature in a CA", "keyUsage", BrokerRoot, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }},
		{"no O", "one O", BrokerRoot, func(c *x509.Certificate) { c.Subject.Organization = nil }},
		{"an OU", "subject", BrokerRoot, func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{"x"} }},
		{"extKeyUsage in a CA", "2.5.29.37", BrokerRoot, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }},
		{"empty SKI", "subjectKeyIdentifier", BrokerRoot, ext(ce(14), false, 4, 0)},
		{"10 years", "notAfter", BrokerRoot, func(c *x509.Certificate) { c.NotAfter = c.NotBefore.AddDate(10, 0, 0) }},
		{"no generation", "generation", DeviceCA, func(c *x509.Certificate) { c.Subject.CommonName = "Hawser root" }},
		{"generation 0", "generation", DeviceCA, func(c *x509.Certificate) { c.Subject.CommonName = "Hawser device CA 0" }},
		{"generation 01", "generation", DeviceCA, func(c *x509.Certificate) { c.Subject.CommonName = "Hawser device CA 01" }},
		{"a device CA for a root", "common name", BrokerRoot, func(c *x509.Certificate) { c.Subject.CommonName = "Hawser device CA 1" }},
		{"no common name", "common name", BrokerRoot, func(c *x509.Certificate) { c.Subject.CommonName = "" }},
	}
}

// base gives a template that conforms to p, and the name that goes with it.
func base(t *testing.T, p Profile) *x509.Certificate {
	t.Helper()
	c, err := template(p, testNow())
	must(t, c, err)
	c.Subject.CommonName = map[Profile]string{BrokerRoot: "Hawser broker root A", DeviceCA: "Hawser device CA 1",
		BrokerLeaf: "broker", DeviceLeaf: "ABCD1234", ServiceLeaf: "dashboard", StationCA: "line1"}[p]
	if p == BrokerRoot || p == DeviceCA {
		c.Subject.Organization, c.Subject.Country = []string{"Acme Pumps"}, []string{"DE"}
	}
	if p == BrokerLeaf {
		c.DNSNames = []string{"a.b"}
	}
	return c
}

// Every deviation is found before the key is used, and found again in a
// certificate that another hand signed.
func TestLintFindsEachDeviation(t *testing.T) {
	key, leafKey := newKey(t), newKey(t)
	ca, err := IssueDeviceCA(key, acme(), 1, testNow())
	must(t, ca, err)
	for _, p := range []Profile{BrokerRoot, DeviceCA, StationCA, BrokerLeaf, DeviceLeaf, ServiceLeaf} {
		if _, err := signAs(t, base(t, p), p, ca, leafKey, nil); err != nil {
			t.Fatalf("unbent %s: %v", p, err)
		}
	}
	for _, m := range mutations() {
		n := 0
		tmpl := base(t, m.profile)
		m.bend(tmpl)
		if _, err := signAs(t, tmpl, m.profile, ca, leafKey, &n); err == nil || !strings.Contains(err.Error(), m.want) && !strings.Contains(err.Error(), "SHA-256") {
			t.Errorf("%s: signing: %v, want %q", m.name, err, m.want)
		}
		if n != 0 {
			t.Errorf("%s: the key was used %d times", m.name, n)
		}
		parent, by := ca.Cert, key
		if m.profile == BrokerRoot || m.profile == DeviceCA {
			parent, by = tmpl, leafKey
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &leafKey.PublicKey, by)
		if err != nil {
			t.Fatalf("%s: %v", m.name, err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			continue // the parser refuses it already
		}
		if err := Lint(c, m.profile); err == nil || !strings.Contains(err.Error(), m.want) {
			t.Errorf("%s: lint: %v, want %q", m.name, err, m.want)
		}
	}
}

// signAs signs tmpl the way issue and selfSign do; n counts the uses of the key.
func signAs(t *testing.T, tmpl *x509.Certificate, p Profile, ca *Issuer, leafKey *ecdsa.PrivateKey, n *int) (*x509.Certificate, error) {
	t.Helper()
	if n == nil {
		n = new(int)
	}
	if p == BrokerRoot || p == DeviceCA {
		return sign(tmpl, tmpl, &leafKey.PublicKey, counting{leafKey, n}, p)
	}
	return sign(tmpl, ca.Cert, &leafKey.PublicKey, counting{ca.Signer.(*ecdsa.PrivateKey), n}, p)
}

func TestOtherKeysAreRefused(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	must(t, p384, err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, rsaKey, err)
	ca := newDeviceCA(t, 1)
	if _, err := IssueDeviceLeaf(ca, 1, &p384.PublicKey, testNow()); err == nil || !strings.Contains(err.Error(), "P-256") {
		t.Error(err)
	}
	if _, err := IssueDeviceLeaf(ca, 1, nil, testNow()); err == nil {
		t.Error("certified no key")
	}
	if _, err := IssueDeviceLeaf(ca, 1, ca.Cert.PublicKey.(*ecdsa.PublicKey), testNow()); err == nil {
		t.Error("certified the CA's own key")
	}
	if _, err := IssueBrokerRoot(p384, acme(), "A", testNow()); err == nil || !strings.Contains(err.Error(), "P-256") {
		t.Error(err)
	}
	for _, key := range []crypto.Signer{p384, rsaKey} {
		der, err := x509.CreateCertificate(rand.Reader, base(t, DeviceLeaf), ca.Cert, key.Public(), ca.Signer)
		must(t, der, err)
		if _, _, _, err := VerifyDeviceLeaf(der, []*x509.Certificate{ca.Cert}); err == nil || !strings.Contains(err.Error(), "P-256") {
			t.Error(err)
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		must(t, csr, err)
		if _, err := ParseCSR(csr); err == nil {
			t.Error("took a request with another kind of key")
		}
	}
}

func TestIssueRefuses(t *testing.T) {
	key := &newKey(t).PublicKey
	root, dev, svc := newRoot(t, "A"), newDeviceCA(t, 1), newServiceCA(t)
	later := testNow().AddDate(31, 0, 0)
	_, wrongKind := IssueDeviceLeaf(svc, 1, key, testNow())
	_, wrongKind2 := IssueBrokerLeaf(dev, "a.b", key, testNow())
	_, badID := IssueDeviceLeaf(dev, 0, key, testNow())
	_, badName := IssueServiceLeaf(svc, "abcd1234", key, testNow())
	_, badDomain := IssueBrokerLeaf(root, "1.2.3.4", key, testNow())
	_, expired := IssueServiceLeaf(svc, "x", key, later)
	_, clock := IssueServiceLeaf(svc, "x", key, testNow().AddDate(-1, 0, 0))
	_, otherKey := NewIssuer(root.Cert, dev.Signer, BrokerRoot)
	_, label := IssueBrokerRoot(newKey(t), acme(), "a/b", testNow())
	_, org := IssueServiceCA(newKey(t), Name{"", "DE"}, testNow())
	_, country := IssueServiceCA(newKey(t), Name{"x", "de"}, testNow())
	_, steer := IssueServiceCA(newKey(t), Name{"x\x1b[2J", "DE"}, testNow())
	for _, tc := range []struct {
		want string
		err  error
	}{
		{"device CA", wrongKind}, {"broker root", wrongKind2}, {"device id", badID}, {"service name", badName}, {"domain", badDomain},
		{"expired", expired}, {"clock", clock}, {"does not belong", otherKey}, {"and a letter", label},
		{"organisation", org}, {"country", country}, {"printable", steer},
	} {
		if tc.err == nil || !strings.Contains(tc.err.Error(), tc.want) {
			t.Errorf("%s: %v", tc.want, tc.err)
		}
	}
	if _, err := (lintingSigner{dev.Signer, DeviceLeaf}).Sign(rand.Reader, make([]byte, 32), crypto.SHA256); err == nil {
		t.Error("signed a bare digest")
	}
}

func TestNotBeforeStaysWithinTheCA(t *testing.T) {
	ca := newDeviceCA(t, 1)
	key := &newKey(t).PublicKey
	c, err := IssueDeviceLeaf(ca, 1, key, testNow())
	must(t, c, err)
	if !c.NotBefore.Equal(ca.Cert.NotBefore) {
		t.Error(c.NotBefore, ca.Cert.NotBefore)
	}
	c, err = IssueDeviceLeaf(ca, 1, key, testNow().AddDate(1, 0, 0))
	must(t, c, err)
	if want := testNow().AddDate(1, 0, 0).Add(-backdate).Truncate(time.Second); !c.NotBefore.Equal(want) {
		t.Error(c.NotBefore, want)
	}
}

// forge makes a CA certificate that Lint passes, with a chosen name, key and key identifier.
func forge(t *testing.T, cn string, key *ecdsa.PrivateKey, ski []byte) *Issuer {
	t.Helper()
	tmpl := base(t, DeviceCA)
	tmpl.Subject.CommonName, tmpl.SubjectKeyId = cn, ski
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	must(t, der, err)
	c, err := x509.ParseCertificate(der)
	return &Issuer{Cert: must(t, c, err), Signer: key}
}

func TestVerifyDeviceLeaf(t *testing.T) {
	ca, ca2 := newDeviceCA(t, 1), newDeviceCA(t, 2)
	pool := []*x509.Certificate{ca.Cert, ca2.Cert}
	key := newKey(t)
	leaf, err := IssueDeviceLeaf(ca2, 0xABCD1234, &key.PublicKey, testNow())
	must(t, leaf, err)
	id, gen, c, err := VerifyDeviceLeaf(leaf.Raw, pool)
	if err != nil || id != 0xABCD1234 || gen != 2 || !c.Equal(leaf) {
		t.Fatal(id, gen, err)
	}
	caKey := ca.Signer.(*ecdsa.PrivateKey)
	name, ski := ca.Cert.Subject.CommonName, ca.Cert.SubjectKeyId
	for what, impostor := range map[string]*Issuer{
		"another key under the same name":    forge(t, name, newKey(t), ski),
		"another name for the same key":      forge(t, "Hawser device CA 9", caKey, ski),
		"another identifier of the same key": forge(t, name, caKey, []byte{9, 9, 9, 9}),
	} {
		leaf, err := IssueDeviceLeaf(impostor, 1, &key.PublicKey, testNow())
		must(t, leaf, err)
		if _, _, _, err := VerifyDeviceLeaf(leaf.Raw, pool); !errors.Is(err, ErrIssuer) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, _, _, err := VerifyDeviceLeaf(leaf.Raw, nil); !errors.Is(err, ErrIssuer) {
		t.Error("an empty pool accepts", err)
	}
	if _, _, _, err := VerifyDeviceLeaf(append(leaf.Raw[:len(leaf.Raw):len(leaf.Raw)], 0), pool); err == nil {
		t.Error("bytes after the certificate")
	}
}

// Whose key is abused matters: a CA of another kind in the pool signs nothing that counts,
// and no leaf passes for one of another kind.
func TestVerifyKeepsTheKindsApart(t *testing.T) {
	root, dev, svc := newRoot(t, "A"), newDeviceCA(t, 1), newServiceCA(t)
	key := newKey(t)
	pool := []*x509.Certificate{root.Cert, dev.Cert, svc.Cert}
	for _, ca := range []*Issuer{root, svc} {
		der, err := x509.CreateCertificate(rand.Reader, base(t, DeviceLeaf), ca.Cert, &key.PublicKey, ca.Signer)
		must(t, der, err)
		if _, _, _, err := VerifyDeviceLeaf(der, pool); err == nil {
			t.Errorf("%q signed a device", ca.Cert.Subject.CommonName)
		}
	}
	d, err := IssueDeviceLeaf(dev, 1, &key.PublicKey, testNow())
	must(t, d, err)
	s, err := IssueServiceLeaf(svc, "dashboard", &key.PublicKey, testNow())
	must(t, s, err)
	b, err := IssueBrokerLeaf(root, "a.b", &key.PublicKey, testNow())
	must(t, b, err)
	want := []string{`true false "" false ""`, `false true "dashboard" false ""`, `false false "" true "a.b"`}
	for i, der := range [][]byte{d.Raw, s.Raw, b.Raw} {
		_, _, _, err1 := VerifyDeviceLeaf(der, pool)
		name, _, err2 := VerifyServiceLeaf(der, pool)
		domain, _, err3 := VerifyBrokerLeaf(der, pool)
		if got := fmt.Sprintf("%t %t %q %t %q", err1 == nil, err2 == nil, name, err3 == nil, domain); got != want[i] {
			t.Errorf("leaf %d: %s (%v, %v, %v)", i, got, err1, err2, err3)
		}
	}
}

// A certificate under an intermediate is refused: the chain rule is direct.
func TestVerifyRefusesIntermediates(t *testing.T) {
	ca := newDeviceCA(t, 1)
	midKey, key := newKey(t), newKey(t)
	mid := base(t, DeviceCA)
	mid.Subject.CommonName = "Hawser device CA 5"
	der, err := x509.CreateCertificate(rand.Reader, mid, ca.Cert, &midKey.PublicKey, ca.Signer)
	must(t, der, err)
	midCert, err := x509.ParseCertificate(der)
	must(t, midCert, err)
	leaf, err := x509.CreateCertificate(rand.Reader, base(t, DeviceLeaf), midCert, &key.PublicKey, midKey)
	must(t, leaf, err)
	for _, pool := range [][]*x509.Certificate{{ca.Cert}, {ca.Cert, midCert}} {
		if _, _, _, err := VerifyDeviceLeaf(leaf, pool); err == nil {
			t.Error("accepted a leaf under an intermediate")
		}
	}
}

// An imported leaf may have another validity: the registry and the connect judge dates.
func TestVerifyJudgesNoDates(t *testing.T) {
	ca := newDeviceCA(t, 1)
	tmpl := base(t, DeviceLeaf)
	tmpl.NotBefore, tmpl.NotAfter = testNow().AddDate(-5, 0, 0), testNow().AddDate(-4, 0, 0)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.Cert, &newKey(t).PublicKey, ca.Signer)
	must(t, der, err)
	if _, _, _, err := VerifyDeviceLeaf(der, []*x509.Certificate{ca.Cert}); err != nil {
		t.Error(err)
	}
	tmpl.NotBefore = testNow()
	der, err = x509.CreateCertificate(rand.Reader, tmpl, ca.Cert, &newKey(t).PublicKey, ca.Signer)
	must(t, der, err)
	if _, _, _, err := VerifyDeviceLeaf(der, []*x509.Certificate{ca.Cert}); err == nil || !strings.Contains(err.Error(), "notAfter") {
		t.Error("ends before it begins:", err)
	}
}

// A CA certificate that names another issuer is no root, though its own key signed it.
func TestLintWantsRootsToNameThemselves(t *testing.T) {
	key, tmpl := newKey(t), base(t, BrokerRoot)
	parent := *tmpl
	parent.Subject.CommonName = "Hawser broker root Q"
	der, err := x509.CreateCertificate(rand.Reader, tmpl, &parent, &key.PublicKey, key)
	must(t, der, err)
	c, err := x509.ParseCertificate(der)
	must(t, c, err)
	if err := Lint(c, BrokerRoot); err == nil || !strings.Contains(err.Error(), "issuer") {
		t.Error(err)
	}
}

func TestCSRProvesPossession(t *testing.T) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, newKey(t))
	must(t, der, err)
	csr, err := ParseCSR(EncodeCSR(der))
	if err != nil || csr.Pub == nil {
		t.Fatal(err)
	}
	other, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, newKey(t))
	must(t, other, err)
	// The signature of one request on the body of another.
	var a, b struct {
		Body asn1.RawValue
		Alg  pkix.AlgorithmIdentifier
		Sig  asn1.BitString
	}
	for der, to := range map[*[]byte]any{&der: &a, &other: &b} {
		if _, err := asn1.Unmarshal(*der, to); err != nil {
			t.Fatal(err)
		}
	}
	a.Sig = b.Sig
	bad, err := asn1.Marshal(a)
	must(t, bad, err)
	if _, err := ParseCSR(bad); err == nil || !strings.Contains(err.Error(), "possession") {
		t.Error(err)
	}
	for name, data := range map[string][]byte{"trailing DER": append(der[:len(der):len(der)], 0), "trailing text": append(EncodeCSR(der), "x"...),
		"a certificate": EncodeCert(newDeviceCA(t, 1).Cert.Raw), "nothing": nil, "huge": make([]byte, maxPEM+1)} {
		if _, err := ParseCSR(data); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func TestCheckDomain(t *testing.T) {
	for _, ok := range []string{"localhost", "a.b", "mqtt.example.com", "1a.2b", "xn--bcher-kva.example", strings.Repeat("a", 63) + ".b"} {
		if err := CheckDomain(ok); err != nil {
			t.Errorf("%s: %v", ok, err)
		}
	}
	for _, bad := range []string{"", ".", "a.", ".a", "a..b", "*.a", "A.b", "a_b", "-a.b", "a-.b", "127.0.0.1", "a.1", "::1", "a b", "a/b", "bücher",
		strings.Repeat("a", 64), strings.Repeat("a.", 127) + "ab", "a\x00"} {
		if CheckDomain(bad) == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func FuzzParseCSR(f *testing.F) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, newKey(f))
	f.Add(must(f, der, err))
	f.Add(EncodeCSR(der))
	f.Fuzz(func(t *testing.T, data []byte) {
		if csr, err := ParseCSR(data); err == nil && (csr.Pub == nil || len(csr.DER) == 0) {
			t.Error("accepted without a key")
		}
	})
}

// The keys are fixed: each fuzzing process makes its own CA, and a seed must verify in all of them.
func FuzzVerifyDeviceLeaf(f *testing.F) {
	ca, err := IssueDeviceCA(fixedKey(f, 0x11), acme(), 1, testNow())
	must(f, ca, err)
	key := &fixedKey(f, 0x22).PublicKey
	leaf, err := IssueDeviceLeaf(ca, 1, key, testNow())
	f.Add(must(f, leaf, err).Raw)
	f.Add(ca.Cert.Raw)
	f.Fuzz(func(t *testing.T, der []byte) {
		id, gen, c, err := VerifyDeviceLeaf(der, []*x509.Certificate{ca.Cert})
		if err == nil && (id != 1 || gen != 1 || !key.Equal(c.PublicKey)) {
			t.Errorf("accepted a certificate for %s that was never signed", id)
		}
	})
}

func FuzzParseCerts(f *testing.F) {
	f.Add(EncodeCert(newDeviceCA(f, 1).Cert.Raw))
	f.Fuzz(func(t *testing.T, text []byte) {
		if cs, err := ParseCerts(text); err == nil && len(cs) == 0 {
			t.Error("no error and no certificate")
		}
	})
}

func BenchmarkIssueDevice(b *testing.B) {
	ca, key := newDeviceCA(b, 1), &newKey(b).PublicKey
	for b.Loop() {
		if _, err := IssueDeviceLeaf(ca, identity.ID(0xABCD1234), key, testNow()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerifyDevice(b *testing.B) {
	ca := newDeviceCA(b, 1)
	leaf, err := IssueDeviceLeaf(ca, 1, &newKey(b).PublicKey, testNow())
	must(b, leaf, err)
	for b.Loop() {
		if _, _, _, err := VerifyDeviceLeaf(leaf.Raw, []*x509.Certificate{ca.Cert}); err != nil {
			b.Fatal(err)
		}
	}
}

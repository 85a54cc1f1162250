package pki

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/internal/identity"
)

func newStation(t testing.TB, ca *Issuer, name string) *Issuer {
	t.Helper()
	key := newKey(t)
	c, err := IssueStationCA(ca, name, &key.PublicKey, testNow())
	must(t, c, err)
	i, err := NewIssuer(c, key, StationCA)
	return must(t, i, err)
}

func stationMutations() []mutation {
	return []mutation{
		{"no path length", "path length 0", StationCA, func(c *x509.Certificate) { c.MaxPathLenZero = false }},
		{"path length 1", "path length 0", StationCA, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false }},
		{"a station that is no CA", "basicConstraints", StationCA, ext(ce(19), true, 0x30, 0)},
		{"station's basicConstraints not critical", "2.5.29.19", StationCA, ext(ce(19), false, 0x30, 6, 1, 1, 0xff, 2, 1, 0)},
		{"digitalSignature in a station", "keyUsage", StationCA, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }},
		{"station's keyUsage not critical", "2.5.29.15", StationCA, ext(ce(15), false, 3, 2, 1, 6)},
		{"an O in a station", "subject", StationCA, func(c *x509.Certificate) { c.Subject.Organization = []string{"Acme Pumps"} }},
		{"a station named as a device", "station name", StationCA, func(c *x509.Certificate) { c.Subject.CommonName = "ABCD1234" }},
		{"a station in upper case", "station name", StationCA, func(c *x509.Certificate) { c.Subject.CommonName = "Line1" }},
		{"a station without a name", "station name", StationCA, func(c *x509.Certificate) { c.Subject.CommonName = "" }},
		{"a station for 30 years", "notAfter", StationCA, func(c *x509.Certificate) { c.NotAfter = c.NotBefore.AddDate(30, 0, 0) }},
		{"a station for serving", "2.5.29.37", StationCA, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }},
		{"a SAN in a station", "2.5.29.17", StationCA, func(c *x509.Certificate) { c.DNSNames = []string{"a.example"} }},
		{"empty SKI in a station", "subjectKeyIdentifier", StationCA, ext(ce(14), false, 4, 0)},
		{"empty AKI in a station", "authorityKeyIdentifier", StationCA, ext(ce(35), false, 0x30, 0)},
		{"a station's name for a device CA", "subject", StationCA, func(c *x509.Certificate) {
			c.Subject = pkix.Name{CommonName: "Hawser device CA 1", Organization: []string{"Acme Pumps"}, Country: []string{"DE"}}
		}},
	}
}

func TestVerifyStation(t *testing.T) {
	ca, ca2 := newDeviceCA(t, 1), newDeviceCA(t, 2)
	pool := []*x509.Certificate{ca.Cert, ca2.Cert}
	st := newStation(t, ca2, "line1")
	name, gen, c, err := VerifyStationCA(st.Cert.Raw, pool)
	if err != nil || name != "line1" || gen != 2 || !c.Equal(st.Cert) {
		t.Fatal(name, gen, err)
	}
	if got := c.NotAfter; !got.Equal(c.NotBefore.AddDate(1, 0, 0)) {
		t.Error("valid until", got)
	}
	if _, _, _, err := VerifyStationCA(st.Cert.Raw, pool[:1]); !errors.Is(err, ErrIssuer) {
		t.Error("another generation vouches:", err)
	}
	leaf, err := IssueDeviceLeaf(st, 0xABCD1234, &newKey(t).PublicKey, testNow())
	must(t, leaf, err)
	id, got, err := VerifyStationLeaf(leaf.Raw, c)
	if err != nil || id != 0xABCD1234 || !got.Equal(leaf) {
		t.Fatal(id, err)
	}
	// The rule for device leaves is direct still: a station in the pool changes nothing.
	if _, _, _, err := VerifyDeviceLeaf(leaf.Raw, append(pool, st.Cert)); err == nil {
		t.Error("a leaf of a station passes for one of a device CA")
	}
	direct, err := IssueDeviceLeaf(ca2, 1, &newKey(t).PublicKey, testNow())
	must(t, direct, err)
	for what, der := range map[string][]byte{"of the device CA": direct.Raw, "the station's own": st.Cert.Raw, "trailing": append(leaf.Raw[:len(leaf.Raw):len(leaf.Raw)], 0)} {
		if _, _, err := VerifyStationLeaf(der, st.Cert); err == nil {
			t.Error("accepted a certificate", what)
		}
	}
	if _, _, err := VerifyStationLeaf(direct.Raw, ca2.Cert); err == nil {
		t.Error("a device CA passes for a station")
	}
}

// Another station of the same name, a station under a station, a forged key identifier: none vouches.
func TestStationImpostors(t *testing.T) {
	ca := newDeviceCA(t, 1)
	pool := []*x509.Certificate{ca.Cert}
	st, twin := newStation(t, ca, "line1"), newStation(t, ca, "line1")
	leaf, err := IssueDeviceLeaf(twin, 1, &newKey(t).PublicKey, testNow())
	must(t, leaf, err)
	if _, _, err := VerifyStationLeaf(leaf.Raw, st.Cert); err == nil || !strings.Contains(err.Error(), `not signed by the station "line1"`) {
		t.Error(err)
	}
	if _, err := IssueStationCA(st, "line2", &newKey(t).PublicKey, testNow()); err == nil {
		t.Error("a station made a station")
	}
	if _, err := IssueServiceLeaf(st, "dashboard", &newKey(t).PublicKey, testNow()); err == nil {
		t.Error("a station certified a service")
	}
	if _, err := IssueStationCA(newServiceCA(t), "line2", &newKey(t).PublicKey, testNow()); err == nil {
		t.Error("a service CA made a station")
	}
	if _, err := NewIssuer(st.Cert, st.Signer, DeviceCA); err == nil {
		t.Error("a station passes for a device CA")
	}
	tmpl := base(t, StationCA)
	tmpl.Subject.CommonName = "line2"
	under, err := x509.CreateCertificate(rand.Reader, tmpl, st.Cert, &newKey(t).PublicKey, st.Signer)
	must(t, under, err)
	for _, cas := range [][]*x509.Certificate{pool, {ca.Cert, st.Cert}} {
		if _, _, _, err := VerifyStationCA(under, cas); err == nil {
			t.Error("a station under a station counts")
		}
	}
	selfKey := newKey(t)
	self, err := x509.CreateCertificate(rand.Reader, base(t, StationCA), base(t, StationCA), &selfKey.PublicKey, selfKey)
	must(t, self, err)
	if _, _, _, err := VerifyStationCA(self, pool); err == nil {
		t.Error("a station that signed itself counts")
	}
}

// What counts is when the leaf was made, not when it is looked at.
func TestStationDates(t *testing.T) {
	ca := newDeviceCA(t, 1)
	st := newStation(t, ca, "line1")
	key := &newKey(t).PublicKey
	end := st.Cert.NotAfter
	last, err := IssueDeviceLeaf(st, 1, key, end)
	must(t, last, err)
	if _, _, err := VerifyStationLeaf(last.Raw, st.Cert); err != nil {
		t.Error("on the last day:", err)
	}
	if _, err := IssueDeviceLeaf(st, 1, key, end.Add(time.Second)); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Error("signed after its end:", err)
	}
	for notBefore, ok := range map[time.Time]bool{st.Cert.NotBefore: true, end: true, st.Cert.NotBefore.Add(-time.Second): false, end.Add(time.Second): false} {
		tmpl := base(t, DeviceLeaf)
		tmpl.NotBefore = notBefore
		der, err := x509.CreateCertificate(rand.Reader, tmpl, st.Cert, key, st.Signer)
		must(t, der, err)
		_, _, err = VerifyStationLeaf(der, st.Cert)
		if (err == nil) != ok || !ok && !errors.Is(err, ErrStationDates) {
			t.Errorf("%s: %v", notBefore, err)
		}
	}
}

// openssl agrees on the chain: device leaf, station CA, device CA.
func TestOpensslVerifiesStationChain(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed: its view of the chain was not asked")
	}
	key := newKey(t)
	ca, err := IssueDeviceCA(newKey(t), acme(), 1, time.Now())
	must(t, ca, err)
	c, err := IssueStationCA(ca, "line1", &key.PublicKey, time.Now())
	must(t, c, err)
	leaf, err := IssueDeviceLeaf(&Issuer{Cert: c, Signer: key}, 0xABCD1234, &newKey(t).PublicKey, time.Now())
	must(t, leaf, err)
	dir := t.TempDir()
	for name, der := range map[string][]byte{"ca.pem": ca.Cert.Raw, "station.pem": c.Raw, "leaf.pem": leaf.Raw} {
		if err := os.WriteFile(filepath.Join(dir, name), EncodeCert(der), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) (string, error) {
		cmd := exec.Command(openssl, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := run("verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", "ca.pem", "-untrusted", "station.pem", "leaf.pem"); err != nil {
		t.Error(out, err)
	}
	if out, err := run("verify", "-x509_strict", "-CAfile", "ca.pem", "leaf.pem"); err == nil {
		t.Error("verified without the station:", out)
	}
	// A CA that a station made: openssl holds the path length against it.
	subKey := newKey(t)
	tmpl := base(t, StationCA)
	tmpl.Subject.CommonName = "line2"
	sub, err := x509.CreateCertificate(rand.Reader, tmpl, c, &subKey.PublicKey, key)
	must(t, sub, err)
	subCert, err := x509.ParseCertificate(sub)
	must(t, subCert, err)
	deep := deviceUnder(t, subCert, subKey)
	for name, text := range map[string][]byte{"both.pem": append(EncodeCert(c.Raw), EncodeCert(sub)...), "deep.pem": EncodeCert(deep)} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := run("verify", "-CAfile", "ca.pem", "-untrusted", "both.pem", "deep.pem"); err == nil || !strings.Contains(out, "path length") {
		t.Error("a longer path was verified:", out)
	}
}

func deviceUnder(t *testing.T, ca *x509.Certificate, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, base(t, DeviceLeaf), ca, &newKey(t).PublicKey, key)
	return must(t, der, err)
}

// Where nothing is pinned, a set must at least be signed by one of its own roots.
func TestInspectAnchors(t *testing.T) {
	a, b, c := newRoot(t, "A"), newRoot(t, "B"), newRoot(t, "C")
	set := anchorSet(a, b)
	for i, ok := range map[*Issuer]bool{a: true, b: true, c: false} {
		msg, err := SignAnchors(i.Signer, set)
		must(t, msg, err)
		got, err := InspectAnchors(msg)
		if (err == nil) != ok || ok && got.Fleet != set.Fleet {
			t.Errorf("signed by %s: %v", i.Cert.Subject.CommonName, err)
		}
		msg[len(msg)-1] ^= 1
		if _, err := InspectAnchors(msg); err == nil {
			t.Error("accepted another signature")
		}
	}
}

func TestCSRTellsWhatItAsksFor(t *testing.T) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{"a.b"}}, newKey(t))
	must(t, der, err)
	csr, err := ParseCSR(der)
	if must(t, csr, err); len(csr.Asks) != 1 || csr.Asks[0] != oidSAN {
		t.Error(csr.Asks)
	}
}

func stationRequest(t testing.TB) (*Request, []byte) {
	t.Helper()
	r, err := NewRequest([16]byte{1, 2}, KindStation, "line1", newCSR(t))
	must(t, r, err)
	r.Station = &Order{Block: strings.Repeat("0a", 16), Expires: "2027-01-01T00:00:00Z", IDs: "00000001 ABCD1234", Anchors: [][]byte{{1, 2, 3}}}
	file, err := r.Encode()
	return r, must(t, file, err)
}

func TestStationRequest(t *testing.T) {
	r, file := stationRequest(t)
	got, err := ParseRequest(file)
	must(t, got, err)
	ids, err := got.Station.ParseIDs()
	if err != nil || len(ids) != 2 || ids[1] != 0xABCD1234 || got.Station.Block != r.Station.Block {
		t.Errorf("%+v %v", got.Station, err)
	}
	for _, tc := range []struct{ old, new, want string }{
		{`"line1"`, `"Line1"`, "station name"},
		{`"line1"`, `"abcd1234"`, "station name"},
		{`00000001 ABCD1234`, `ABCD1234 00000001`, "ascend"},
		{`00000001 ABCD1234`, `ABCD1234 ABCD1234`, "ascend"},
		{`00000001 ABCD1234`, `00000001  ABCD1234`, "device id"},
		{`00000001 ABCD1234`, `00000001 abcd1234`, "device id"},
		{`00000001 ABCD1234`, ``, "device id"},
		{`2027-01-01T00:00:00Z`, `2027-01-01`, "RFC 3339"},
		{`2027-01-01T00:00:00Z`, `2027-01-01T00:00:00+00:00`, "RFC 3339"},
		{`0a0a0a`, `0A0a0a`, "32 lower-case hex"},
		{`"AQID"`, ``, "anchor sets"},
		{`"kind": "station"`, `"kind": "service"`, "does not belong"},
	} {
		bad := strings.Replace(string(file), tc.old, tc.new, 1)
		if _, err := ParseRequest([]byte(bad)); bad == string(file) || err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.new, err, tc.want)
		}
	}
	r.Station = nil
	if _, err := r.Encode(); err == nil {
		t.Error("a station's request without a block")
	}
	words := make([]string, 5000)
	for i := range words {
		words[i] = identity.ID(i + 1).String()
	}
	r.Station = &Order{Block: strings.Repeat("0a", 16), Expires: "2027-01-01T00:00:00Z", IDs: strings.Join(words, " "), Anchors: make([][]byte, 26)}
	for i := range r.Station.Anchors {
		r.Station.Anchors[i] = make([]byte, maxAnchors)
	}
	big, err := r.Encode()
	must(t, big, err)
	if _, err := ParseRequest(big); err != nil {
		t.Errorf("the largest request (%d bytes): %v", len(big), err)
	}
}

// The result of a station's request is held against it as any other.
func TestStationResult(t *testing.T) {
	r, _ := stationRequest(t)
	ca := newDeviceCA(t, 1)
	trust := Trust{DeviceCAs: []*x509.Certificate{ca.Cert}}
	result := func(name string, pub *ecdsa.PublicKey) []byte {
		c, err := IssueStationCA(ca, name, pub, testNow())
		must(t, c, err)
		file, err := NewStationResult(r, c, []byte{1, 2})
		return must(t, file, err)
	}
	good := result("line1", r.ParsedCSR().Pub)
	if cs, err := OpenResult(good, r, trust); err != nil || len(cs) != 1 {
		t.Error(err)
	}
	if block, err := ResultBlock(good); err != nil || len(block) != 2 {
		t.Error(block, err)
	}
	if _, err := OpenResult(result("line2", r.ParsedCSR().Pub), r, trust); err == nil {
		t.Error("another station's certificate")
	}
	if _, err := OpenResult(result("line1", &newKey(t).PublicKey), r, trust); err == nil {
		t.Error("another key's certificate")
	}
	leaf, err := IssueDeviceLeaf(ca, 1, r.ParsedCSR().Pub, testNow())
	file, err2 := NewResult(r, []*x509.Certificate{must(t, leaf, err)})
	if _, err := OpenResult(must(t, file, err2), r, trust); err == nil {
		t.Error("a device's certificate for a station")
	}
}

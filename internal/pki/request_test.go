package pki

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"strings"
	"testing"

	"hawser/internal/identity"
)

func newCSR(t testing.TB) *CSR {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, newKey(t))
	csr, err := ParseCSR(must(t, der, err))
	return must(t, csr, err)
}

func deviceRequest(t testing.TB) (*Request, []byte) {
	t.Helper()
	r, err := NewRequest([16]byte{1, 2}, KindDevice, "ABCD1234", newCSR(t))
	must(t, r, err)
	r.Class = "pump-2"
	file, err := r.Encode()
	return r, must(t, file, err)
}

func TestRequestRoundTrip(t *testing.T) {
	for _, tc := range []struct{ kind, subject, class, root string }{
		{KindDevice, "ABCD1234", "pump-2", ""}, {KindDevice, "ABCD1234", "", ""}, {KindService, "dashboard", "", ""}, {KindBroker, "a.b", "", "b"},
	} {
		r, err := NewRequest([16]byte{1, 2}, tc.kind, tc.subject, newCSR(t))
		must(t, r, err)
		r.Class, r.Root = tc.class, tc.root
		file, err := r.Encode()
		must(t, file, err)
		got, err := ParseRequest(file)
		must(t, got, err)
		if got.Hash() != r.Hash() || got.Hash() == [32]byte{} || got.Subject != tc.subject || got.Class != tc.class || got.Root != tc.root || !got.ParsedCSR().Pub.Equal(r.ParsedCSR().Pub) {
			t.Errorf("%+v", got)
		}
	}
}

func TestRequestRefuses(t *testing.T) {
	r, file := deviceRequest(t)
	for _, tc := range []struct{ old, new, want string }{
		{`"ABCD1234"`, `"abcd1234"`, "device id"},
		{`"device"`, `"service"`, "class"},
		{`"device"`, `"root"`, "class"},
		{`"pump-2"`, `"\u001b[2J"`, "class"},
		{`"hawser request 1"`, `"hawser request 2"`, "format"},
		{`"subject"`, `"Subject"`, "changed"},
		{`"subject": "ABCD1234"`, `"subject": "00000001", "subject": "ABCD1234"`, "changed"},
		{`  "class"`, `  "colour": 1, "class"`, "unknown field"},
		{`  "class"`, ` "class"`, "changed"},
		{`"class": "pump-2"`, `"root": "a"`, "root"},
		{"}\n", "}\n{}", "after"},
		{"}\n", "", "damaged"},
		{`"fleet": "01`, `"fleet": "0A`, "hex"},
		{"-----BEGIN CERT", "hello -----BEGIN CERT", "certificate request"},
	} {
		bad := strings.Replace(string(file), tc.old, tc.new, 1)
		if bad == string(file) {
			t.Errorf("%s is not in the file", tc.old)
		}
		if _, err := ParseRequest([]byte(bad)); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.new, err, tc.want)
		}
	}
	broker := *r
	broker.Kind, broker.Subject, broker.Class = KindBroker, "a.b", ""
	for _, root := range []string{"", "c", "A"} {
		broker.Root = root
		if _, err := broker.Encode(); err == nil {
			t.Errorf("root %q was accepted", root)
		}
	}
	if _, err := ParseRequest(append(file, make([]byte, maxPEM)...)); err == nil {
		t.Error("a huge file was accepted")
	}
}

func TestResultIsHeldAgainstTheRequest(t *testing.T) {
	r, _ := deviceRequest(t)
	ca, foreign := newDeviceCA(t, 1), newDeviceCA(t, 1)
	trust := Trust{DeviceCAs: []*x509.Certificate{ca.Cert}}
	issue := func(ca *Issuer, id uint32, csr *CSR) *x509.Certificate {
		c, err := IssueDeviceLeaf(ca, identity.ID(id), csr.Pub, testNow())
		return must(t, c, err)
	}
	result := func(r *Request, cs ...*x509.Certificate) []byte {
		b, err := NewResult(r, cs)
		return must(t, b, err)
	}
	good := issue(ca, 0xABCD1234, r.ParsedCSR())
	file := result(r, good)
	if cs, err := OpenResult(file, r, trust); err != nil || len(cs) != 1 || !cs[0].Equal(good) {
		t.Fatal(err)
	}
	if h, err := ResultRequest(file); err != nil || h != r.Hash() {
		t.Fatal(err)
	}
	other, _ := deviceRequest(t)
	many := bytes.Repeat([]byte{0}, maxCerts+1)
	all := make([]*x509.Certificate, len(many))
	for i := range all {
		all[i] = good
	}
	for name, tc := range map[string]struct {
		file []byte
		want string
	}{
		"another request":     {result(other, issue(ca, 0xABCD1234, other.ParsedCSR())), "another request"},
		"another id":          {result(r, issue(ca, 1, r.ParsedCSR())), "not for"},
		"another key":         {result(r, issue(ca, 0xABCD1234, other.ParsedCSR())), "another key"},
		"another fleet's CA":  {result(r, issue(foreign, 0xABCD1234, r.ParsedCSR())), ErrIssuer.Error()},
		"one good, one bad":   {result(r, good, issue(ca, 1, r.ParsedCSR())), "not for"},
		"none":                {result(r), "0 certificates"},
		"too many":            {result(r, all...), "9 certificates"},
		"another format":      {bytes.Replace(file, []byte("result 1"), []byte("result 2"), 1), "format"},
		"an unknown key":      {bytes.Replace(file, []byte(`"format"`), []byte(`"x": 1, "format"`), 1), "unknown"},
		"text after it":       {append(bytes.Clone(file), '{'), "after"},
		"a request, not that": {[]byte("{}"), "format"},
	} {
		if _, err := OpenResult(tc.file, r, trust); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ResultRequest([]byte("{}")); err == nil {
		t.Error("an empty object answers a request")
	}
}

func FuzzParseRequest(f *testing.F) {
	_, file := deviceRequest(f)
	f.Add(file)
	_, file = stationRequest(f)
	f.Add(file)
	f.Fuzz(func(t *testing.T, file []byte) {
		r, err := ParseRequest(file)
		if err != nil {
			return
		}
		if again, err := r.Encode(); err != nil || !bytes.Equal(again, file) {
			t.Errorf("two spellings of one request: %v", err)
		}
	})
}

func FuzzOpenResult(f *testing.F) {
	r, _ := deviceRequest(f)
	ca := newDeviceCA(f, 1)
	c, err := IssueDeviceLeaf(ca, 0xABCD1234, r.ParsedCSR().Pub, testNow())
	file, err2 := NewResult(r, []*x509.Certificate{must(f, c, err)})
	f.Add(must(f, file, err2))
	f.Fuzz(func(t *testing.T, file []byte) {
		cs, err := OpenResult(file, r, Trust{DeviceCAs: []*x509.Certificate{ca.Cert}})
		if err == nil && (len(cs) == 0 || !bytes.Equal(cs[0].RawTBSCertificate, c.RawTBSCertificate)) {
			t.Error("accepted a certificate that was never issued")
		}
	})
}

func TestResultIsReadable(t *testing.T) {
	_, file := deviceRequest(t)
	var m map[string]string
	if err := json.Unmarshal(file, &m); err != nil || m["subject"] != "ABCD1234" || m["kind"] != "device" {
		t.Errorf("%v\n%s", err, file)
	}
}

package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/msglog"
	"hawser/internal/pki"
)

// What is imported will be believed for ever: chain, name and key are looked at
// by the server itself, whoever asks.
func TestImportIsVerified(t *testing.T) {
	r := serve(t, makeFleet(t))
	stranger := serve(t, makeFleet(t))
	id, other := identity.ID(0xABCD1234), identity.ID(0xABCD1235)
	key := func() (*ecdsa.PrivateKey, *pki.CSR) {
		t.Helper()
		k, err := pki.GenerateKey()
		r.ok(err)
		return k, csrOf(t, k)
	}
	_, csr := key()
	_, csr2 := key()
	_, csr3 := key()
	issue := func(r *rig, id identity.ID, csr *pki.CSR) []byte {
		t.Helper()
		return r.ca(func(ca *fleet.CA) (*x509.Certificate, error) { return ca.EnrollDevice(id, csr, "", time.Now()) }).Raw
	}
	service := r.ca(func(ca *fleet.CA) (*x509.Certificate, error) { return ca.IssueService("dash", csr3.Pub, time.Now()) }).Raw
	good := issue(r, id, csr)
	for name, e := range map[string]admin.Enrolment{
		"another fleet's CA":   {CSR: csr.DER, Certificate: issue(stranger, id, csr)},
		"another id":           {CSR: csr2.DER, Certificate: issue(r, other, csr2)},
		"another key":          {CSR: csr2.DER, Certificate: good},
		"a service's":          {CSR: csr3.DER, Certificate: service},
		"no certificate":       {CSR: csr.DER},
		"no request":           {Certificate: good},
		"bytes after it":       {CSR: csr.DER, Certificate: append(append([]byte{}, good...), 0)},
		"a class with a space": {CSR: csr.DER, Certificate: good, Class: "a b"},
		"a tag with a space":   {CSR: csr.DER, Certificate: good, Tags: []string{"a b"}},
	} {
		if _, err := r.api.Enroll(t.Context(), id, e); !admin.IsKind(err, admin.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	page, err := r.api.Devices(t.Context(), admin.DeviceFilter{})
	r.ok(err)
	if len(page.Devices) != 0 {
		t.Errorf("refused enrolments left devices: %v", page.Devices)
	}
	if _, err := r.api.AddService(t.Context(), admin.NewService{Name: "other", Certificate: service}); !admin.IsKind(err, admin.Invalid) {
		t.Errorf("a service with another's certificate: %v", err)
	}
	if _, err := r.api.AddService(t.Context(), admin.NewService{Name: "dash", Certificate: good}); !admin.IsKind(err, admin.Invalid) {
		t.Errorf("a service with a device's certificate: %v", err)
	}
	for _, name := range []string{"ABCD1234", "abcd1234", "Dash", "", "a/b"} {
		if _, err := r.api.AddService(t.Context(), admin.NewService{Name: name}); !admin.IsKind(err, admin.Invalid) {
			t.Errorf("service %q: %v", name, err)
		}
	}
	_, err = r.api.Enroll(t.Context(), id, admin.Enrolment{CSR: csr.DER, Certificate: good})
	r.ok(err)
	if err := r.api.CheckFree(t.Context(), id); !admin.IsKind(err, admin.Conflict) {
		t.Errorf("a taken id is free: %v", err)
	}
}

// All of a list are enrolled, or none.
func TestEnrollMany(t *testing.T) {
	r := serve(t, makeFleet(t))
	var list []admin.NamedEnrolment
	for i := range 20 {
		id := identity.ID(0x10 + i)
		key, err := pki.GenerateKey()
		r.ok(err)
		csr := csrOf(t, key)
		cert := r.ca(func(ca *fleet.CA) (*x509.Certificate, error) { return ca.EnrollDevice(id, csr, "", time.Now()) })
		list = append(list, admin.NamedEnrolment{ID: id, Enrolment: admin.Enrolment{CSR: csr.DER, Certificate: cert.Raw, Tags: []string{"sim"}}})
	}
	list[19].Enrolment = list[18].Enrolment
	if err := r.api.EnrollMany(t.Context(), list); !admin.IsKind(err, admin.Invalid) {
		t.Errorf("the wrong certificate at the end: %v", err)
	}
	r.ok(r.api.EnrollMany(t.Context(), list[:19]))
	var got int
	for f := (admin.DeviceFilter{Limit: 4, Tag: "sim"}); ; {
		page, err := r.api.Devices(t.Context(), f)
		r.ok(err)
		got += len(page.Devices)
		if f.After = page.More; f.After == 0 {
			break
		}
	}
	if got != 19 {
		t.Errorf("%d devices on all pages", got)
	}
}

func TestReservedIDsAreFree(t *testing.T) {
	r := serve(t, makeFleet(t))
	seen := map[identity.ID]bool{}
	for range 50 {
		id, err := r.api.ReserveID(t.Context())
		r.ok(err)
		if !id.Issuable() || seen[id] {
			t.Errorf("id %s", id)
		}
		seen[id] = true
	}
	b := newBackend(r.srv.layout, r.srv.reg, r.srv)
	if !b.keep(1) || b.keep(1) {
		t.Error("an id was given to two")
	}
}

// Who is online is a filter of its own, over pages.
func TestOnlineFilter(t *testing.T) {
	r := serve(t, makeFleet(t))
	for _, name := range []string{"00000001", "00000002", "00000003", "00000004"} {
		_, _, cert := r.device(name)
		if name == "00000002" || name == "00000004" {
			r.connect(cert, name)
		}
	}
	for online, want := range map[bool]string{true: "00000002 00000004", false: "00000001 00000003"} {
		var got []string
		for f := (admin.DeviceFilter{Online: &online, Limit: 1}); ; {
			page, err := r.api.Devices(t.Context(), f)
			r.ok(err)
			for _, d := range page.Devices {
				got = append(got, d.ID.String())
			}
			if f.After = page.More; f.After == 0 {
				break
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("online %v: %v", online, got)
		}
	}
}

// The socket is the administrator's alone, and a dead one is no obstacle.
func TestAdminSocket(t *testing.T) {
	dir := makeFleet(t)
	path := dir + "/server/admin.sock"
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	r := serve(t, dir)
	info, err := os.Stat(path)
	r.ok(err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	h := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}}
	for _, c := range []struct {
		method, path, body string
		status             int
	}{
		{"GET", "/v1/devices?limit=x", "", 400}, {"GET", "/v1/devices?online=maybe", "", 400}, {"GET", "/v1/devices?prefix=ab", "", 400},
		{"GET", "/v1/devices/abcd1234", "", 400}, {"GET", "/v1/devices/00000001", "", 404}, {"GET", "/v1/nothing", "", 404},
		{"DELETE", "/v1/devices", "", 405}, {"POST", "/v1/devices/00000001/revoke", `{"reason":"x"}`, 404},
		{"POST", "/v1/devices/00000001/revoke", `{"reason":"x","more":1}`, 400}, {"POST", "/v1/devices/00000001/revoke", `{}{}`, 400},
		{"POST", "/v1/devices/00000001/tag", `[`, 400}, {"POST", "/v1/devices/00000001/commands", `{"name":""}`, 400},
		{"POST", "/v1/devices/00000001/commands", `{"name":"x","args":{"a":1,"a":2}}`, 400},
		{"GET", "/v1/devices/00000001/commands/x", "", 400}, {"GET", "/v1/audit?since=today", "", 400},
	} {
		req, err := http.NewRequest(c.method, "http://hawser"+c.path, strings.NewReader(c.body))
		r.ok(err)
		resp, err := h.Do(req)
		r.ok(err)
		resp.Body.Close()
		if resp.StatusCode != c.status {
			t.Errorf("%s %s %s: %s", c.method, c.path, c.body, resp.Status)
		}
	}
	r.ok(r.api.GC(t.Context()))
}

// The certificate is chosen by the server name; a name that is not the fleet's
// is refused, none is the first domain.
func TestLeafByServerName(t *testing.T) {
	r := serve(t, makeFleet(t, func(o *fleet.InitOptions) { o.Domains = []string{"localhost", "rescue.example"} }))
	_, _, cert := r.device("ABCD1234")
	for name, want := range map[string]string{"": "localhost", "localhost": "localhost", "RESCUE.example": "rescue.example", "else.example": ""} {
		conn, err := tls.Dial("tcp", r.srv.Addr().String(), &tls.Config{ServerName: name, InsecureSkipVerify: true, // the name is looked at below
			CurvePreferences: []tls.CurveID{tls.CurveP256}, Certificates: []tls.Certificate{cert}})
		if want == "" {
			if err == nil {
				conn.Close()
				t.Errorf("%q was served", name)
			}
			r.logged("connection rejected", "no certificate for the server name", "else.example")
			continue
		}
		r.ok(err)
		if got := conn.ConnectionState().PeerCertificates[0].DNSNames[0]; got != want {
			t.Errorf("%q got the certificate of %s", name, got)
		}
		conn.Close()
	}
}

// The floor is the oldest message that is not settled, whatever the order of settling.
func TestUplinkFloor(t *testing.T) {
	u := &uplink{}
	a, b, c := &said{pos: 10}, &said{pos: 11}, &said{pos: 20}
	u.open = []*said{a, b, c}
	for _, step := range []struct {
		m    *said
		want msglog.Pos
	}{{b, 10}, {a, 20}, {c, 0}} {
		u.settle(step.m)
		if got := u.floor(); got != step.want {
			t.Errorf("floor %d, not %d", got, step.want)
		}
	}
}

func TestShow(t *testing.T) {
	cbor, err := message.ValueFromJSON([]byte(`{"a":[1,"x"]}`))
	if err != nil {
		t.Fatal(err)
	}
	for payload, want := range map[string]string{
		`{"a": 1}`: `json {"a":1}`, "21": "json 21", `"x"`: `json "x"`, "true": "json true", "": `hex ""`, "x": `hex "78"`,
		string(cbor): `cbor {"a":[1,"x"]}`, "\x05": `hex "05"`, "\x80": "cbor []", "\x82\x01": `hex "8201"`, "\xa1\x01\x01\x00": `hex "a1010100"`,
		"\"\xff\"": `hex "22ff22"`, "\x00": `hex "00"`,
	} {
		enc, v := show([]byte(payload))
		if got := enc + " " + string(v); got != want {
			t.Errorf("%q: %s, not %s", payload, got, want)
		}
	}
}

// Whatever a payload is, it is shown as one valid JSON value.
func FuzzShow(f *testing.F) {
	for _, s := range []string{"", "{}", "[1", "\x80", "\xbf\xff", "\xa1\x61a\xf9\x7e\x00", "\"\\ud800\"", " 1 ", "\x9f\x01\xff", "{\"a\":1}\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if enc, v := show(b); !json.Valid(v) || enc == "" {
			t.Errorf("%x: %s %s", b, enc, v)
		}
	})
}

package server

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/pki"
	"hawser/internal/registry"
)

// apiClient calls the services' API with a certificate.
func (r *rig) apiClient(cert *tls.Certificate, edit ...func(*tls.Config)) *http.Client {
	r.t.Helper()
	roots := x509.NewCertPool()
	for _, c := range r.srv.Layout().Trust().BrokerRoots {
		roots.AddCert(c)
	}
	cfg := &tls.Config{RootCAs: roots, ServerName: "localhost"}
	if cert != nil {
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	for _, e := range edit {
		e(cfg)
	}
	t := &http.Transport{TLSClientConfig: cfg}
	r.t.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t, Timeout: patience}
}

// renew calls the API; status 0 means that no answer came.
func (r *rig) renew(c *http.Client, method string, body []byte) (int, admin.Renewal, string) {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), method, "https://"+r.srv.APIAddr().String()+"/v1/renew", bytes.NewReader(body))
	r.ok(err)
	resp, err := c.Do(req)
	if err != nil {
		return 0, admin.Renewal{}, err.Error()
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	r.ok(err)
	var v admin.Renewal
	_ = json.Unmarshal(text, &v) // an error is told by the status
	return resp.StatusCode, v, string(text)
}

func pemCSR(t *testing.T, key *ecdsa.PrivateKey) []byte { return pki.EncodeCSR(csrOf(t, key).DER) }

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Whoever is no service with a pinned certificate, or speaks less than TLS 1.3, gets
// nothing.
func TestRenewalIsForServicesAlone(t *testing.T) {
	r := serve(t, makeFleet(t))
	_, app := r.service("app")
	_, _, dev := r.device("ABCD1234")
	_, gone := r.service("gone")
	r.ok(r.api.RevokeService(t.Context(), "gone", "a test"))
	key := newKey(t)
	own := &tls.Certificate{PrivateKey: key, Certificate: [][]byte{r.ca(func(ca *fleet.CA) (*x509.Certificate, error) {
		return ca.IssueService("app", &key.PublicKey, time.Now()) // signed, and never imported
	}).Raw}}
	csr := pemCSR(t, newKey(t))
	if code, _, text := r.renew(r.apiClient(&app), "GET", nil); code != http.StatusNotFound {
		t.Errorf("%d %s", code, text)
	}
	for name, c := range map[string]*http.Client{
		"no certificate": r.apiClient(nil), "a device": r.apiClient(&dev), "revoked": r.apiClient(&gone), "not imported": r.apiClient(own),
		"TLS 1.2":       r.apiClient(&app, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }),
		"another's key": r.apiClient(&tls.Certificate{Certificate: app.Certificate, PrivateKey: key}),
		"another group": r.apiClient(&app, func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} }),
		"unknown name":  r.apiClient(&app, func(c *tls.Config) { c.ServerName = "elsewhere" }),
	} {
		if code, _, text := r.renew(c, "POST", csr); code != 0 {
			t.Errorf("%s: %d %s", name, code, text)
		}
	}
	c := r.apiClient(&app) // revoked while its connection stands
	r.renew(c, "GET", nil)
	r.ok(r.api.RevokeService(t.Context(), "app", "a test"))
	if code, _, text := r.renew(c, "POST", csr); code == http.StatusOK {
		t.Errorf("a revoked service was renewed: %s", text)
	}
}

// What is signed is a P-256 key whose holder asks; the name is the one of the
// certificate, whatever the request says; the old one ends with the first use.
func TestServiceRenewsItself(t *testing.T) {
	r := serve(t, makeFleet(t))
	_, app := r.service("app", admin.Grant{Mode: "read", Filter: "a/#"})
	c, key := r.apiClient(&app), newKey(t)
	code, v, text := r.renew(c, "POST", pemCSR(t, key)) // its CN is x
	if code != http.StatusOK || v.State != admin.RenewalIssued {
		t.Fatal(code, text)
	}
	cert, err := pki.ParseCert([]byte(v.Certificate))
	r.ok(err)
	if cert.Subject.CommonName != "app" || !key.PublicKey.Equal(cert.PublicKey) {
		t.Error(cert.Subject)
	}
	if code, again, text := r.renew(c, "POST", pemCSR(t, key)); code != http.StatusOK || again.Certificate != v.Certificate {
		t.Errorf("the same key again: %d %s", code, text)
	}
	if code, again, text := r.renew(c, "GET", nil); code != http.StatusOK || again.Certificate != v.Certificate {
		t.Errorf("asked for it: %d %s", code, text)
	}
	fresh := tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
	r.connect(app, "old")
	r.connect(fresh, "new").ping()
	until(t, "the old certificate to end", func() bool { _, err := r.dial(app, "old"); return err != nil })
	if code, _, text := r.renew(r.apiClient(&app), "GET", nil); code != 0 {
		t.Errorf("%d %s", code, text)
	}
	list, err := r.api.Audit(t.Context(), admin.AuditFilter{Subject: "app", Action: "certificate.add"})
	if err != nil || len(list) != 2 || list[0].Actor != "service app" {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestRenewalRefusesBadRequests(t *testing.T) {
	r := serve(t, makeFleet(t))
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	r.ok(err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	r.ok(err)
	made := func(key any) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		r.ok(err)
		return pki.EncodeCSR(der)
	}
	broken := csrOf(t, newKey(t)).DER
	broken[len(broken)-1] ^= 1
	n := 0
	for name, body := range map[string][]byte{
		"nothing": nil, "garbage": []byte("x"), "P-384": made(p384), "RSA": made(rsaKey), "bad signature": pki.EncodeCSR(broken),
		"too large": append(pemCSR(t, newKey(t)), bytes.Repeat([]byte("\n"), apiBody)...),
	} {
		n++
		_, app := r.service(fmt.Sprint("app-", string(rune('a'+n))))
		if code, _, text := r.renew(r.apiClient(&app), "POST", body); code != http.StatusBadRequest {
			t.Errorf("%s: %d %s", name, code, text)
		}
	}
}

// One service's rate is its own.
func TestRenewalRate(t *testing.T) {
	r := serve(t, makeFleet(t))
	_, greedy := r.service("greedy")
	_, other := r.service("other")
	c, csr := r.apiClient(&greedy), pemCSR(t, newKey(t))
	var codes []int
	for range renewBurst + 1 {
		code, _, _ := r.renew(c, "POST", csr)
		codes = append(codes, code)
	}
	if codes[renewBurst-1] != http.StatusOK || codes[renewBurst] != http.StatusTooManyRequests {
		t.Error(codes)
	}
	if code, _, text := r.renew(r.apiClient(&other), "POST", csr); code != http.StatusOK {
		t.Error(code, text)
	}
}

// Connections that say nothing are few, and give their place up.
func TestRenewalConnections(t *testing.T) {
	r := serve(t, makeFleet(t))
	_, app := r.service("app")
	var silent []net.Conn
	for range apiConnections {
		c, err := net.Dial("tcp", r.srv.APIAddr().String())
		r.ok(err)
		defer c.Close()
		silent = append(silent, c)
	}
	if code, _, text := r.renew(r.apiClient(&app), "GET", nil); code != 0 {
		t.Errorf("%d %s", code, text)
	}
	silent[0].Close()
	until(t, "a free place", func() bool {
		code, _, _ := r.renew(r.apiClient(&app), "GET", nil)
		return code == http.StatusNotFound
	})
}

// A certificate that was renewed and never replaced ends after a week.
func TestOverlapEnds(t *testing.T) {
	r := serve(t, makeFleet(t))
	_, app := r.service("app")
	code, _, text := r.renew(r.apiClient(&app), "POST", pemCSR(t, newKey(t)))
	if code != http.StatusOK {
		t.Fatal(text)
	}
	r.srv.renewals.endOverlaps(t.Context(), time.Now().Add(overlapFor-time.Hour))
	r.ok(r.srv.feed.sync(t.Context()))
	r.connect(app, "x").ping()
	r.srv.renewals.endOverlaps(t.Context(), time.Now().Add(overlapFor+time.Hour))
	r.ok(r.srv.feed.sync(t.Context()))
	if _, err := r.dial(app, "x"); err == nil {
		t.Error("still good after a week")
	}
}

// An overlap survives a restart.
func TestOverlapSurvivesARestart(t *testing.T) {
	r := serve(t, makeFleet(t))
	_, app := r.service("app")
	key := newKey(t)
	_, v, text := r.renew(r.apiClient(&app), "POST", pemCSR(t, key))
	cert, err := pki.ParseCert([]byte(v.Certificate))
	if err != nil {
		t.Fatal(text)
	}
	r.stop()
	r.start()
	r.connect(app, "x").ping()
	r.connect(tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}, "x").ping()
	until(t, "the old certificate to end", func() bool { _, err := r.dial(app, "y"); return err != nil })
}

// In status, in the metrics and in the log: what ends in 60, 30 and 7 days.
func TestEndsAreTold(t *testing.T) {
	at := func(days int) time.Time { return time.Now().AddDate(-1, 0, days) }
	r := serve(t, makeFleet(t, func(o *fleet.InitOptions) { o.Now = func() time.Time { return at(5) } }))
	for name, days := range map[string]int{"quarter": 100, "month": 45, "week": 20} {
		key := newKey(t)
		cert := r.ca(func(ca *fleet.CA) (*x509.Certificate, error) { return ca.IssueService(name, &key.PublicKey, at(days)) })
		_, err := r.api.AddService(t.Context(), admin.NewService{Name: name, Certificate: cert.Raw})
		r.ok(err)
	}
	csr := csrOf(t, newKey(t))
	key, err := pki.KeyFingerprint(csr.Pub)
	r.ok(err)
	r.ok(r.srv.reg.Update(t.Context(), func(tx *registry.Tx) error { return tx.RegisterStation("test", "line1", csr.DER, key) }))
	bench := r.ca(func(ca *fleet.CA) (*x509.Certificate, error) { return ca.RenewStation("line1", csr, at(6)) })
	_, err = r.api.RenewStation(t.Context(), "line1", csr.DER, bench.Raw)
	r.ok(err)
	want := map[string]string{"localhost": admin.Warn7Days, "line1": admin.Warn7Days, "month": admin.Warn60Days, "week": admin.Warn30Days}
	s, err := r.api.Status(t.Context())
	r.ok(err)
	for _, e := range s.Certificates {
		if want[e.Owner] != e.Warning || e.Warning == "" {
			t.Errorf("%+v", e)
		}
		delete(want, e.Owner)
	}
	if len(want) > 0 {
		t.Errorf("not told: %v", want)
	}
	_, body := get(t, "http://"+r.srv.MetricsAddr().String()+"/metrics")
	for _, line := range []string{`hawser_certificates_ending{within="60 days"} 1`, `hawser_certificates_ending{within="30 days"} 1`,
		`hawser_certificates_ending{within="7 days"} 2`, `hawser_certificates_ending{within="expired"} 0`,
		`hawser_certificate_expiry_seconds{kind="service",owner="week",renewed="no"} `} {
		if !strings.Contains(body, line) {
			t.Errorf("no %q in\n%s", line, body)
		}
	}
	r.logged("level=ERROR", "certificate ends within days", "localhost") // at the start
	warnExpiries(slog.New(slog.NewTextHandler(r.book, nil)), s.Certificates)
	r.logged("level=WARN", "certificate ends soon", "month")
}

// A renewed certificate that is still in use is told as such.
func TestRenewedIsTold(t *testing.T) {
	at := func(days int) time.Time { return time.Now().AddDate(-1, 0, days) }
	r := serve(t, makeFleet(t, func(o *fleet.InitOptions) { o.Now = func() time.Time { return at(15) } }))
	key := newKey(t)
	for _, days := range []int{20, 300} {
		cert := r.ca(func(ca *fleet.CA) (*x509.Certificate, error) { return ca.IssueService("app", &key.PublicKey, at(days)) })
		if days == 20 {
			_, err := r.api.AddService(t.Context(), admin.NewService{Name: "app", Certificate: cert.Raw})
			r.ok(err)
		} else {
			r.ok(r.api.ServiceCertificate(t.Context(), "app", cert.Raw, false))
		}
	}
	s, err := r.api.Status(t.Context())
	r.ok(err)
	for _, e := range s.Certificates {
		if e.Renewed != (e.Owner == "app") {
			t.Errorf("%+v", e)
		}
	}
}

// The API is off unless it is configured.
func TestAPIIsOff(t *testing.T) {
	dir := makeFleet(t)
	s, err := Start(t.Context(), Config{Dir: dir, Listen: "127.0.0.1:0", Metrics: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close(t.Context())
	if s.APIAddr() != nil {
		t.Error(s.APIAddr())
	}
}

// In production the safe is asked, once for each service.
func TestRenewalInProduction(t *testing.T) {
	n := 0
	dir := makeFleet(t, func(o *fleet.InitOptions) {
		o.Trial = false
		o.Passphrases = func(string) ([]byte, error) {
			n++
			return fmt.Appendf(nil, "passphrase %d", n), nil
		}
	})
	safe := t.TempDir() + "/ca-a"
	if err := os.Rename(dir+"/ca-a", safe); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir + "/ca-b"); err != nil {
		t.Fatal(err)
	}
	r := serve(t, dir)
	ca, err := fleet.OpenCA(safe, func() ([]byte, error) { return []byte("passphrase 1"), nil })
	r.ok(err)
	defer ca.Close()
	old, key := newKey(t), newKey(t)
	cert, err := ca.IssueService("app", &old.PublicKey, time.Now())
	r.ok(err)
	_, err = r.api.AddService(t.Context(), admin.NewService{Name: "app", Certificate: cert.Raw})
	r.ok(err)
	c := r.apiClient(&tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: old})
	for range 2 {
		if code, v, text := r.renew(c, "POST", pemCSR(t, key)); code != http.StatusAccepted || v.State != admin.RenewalPending {
			t.Fatal(code, text)
		}
	}
	if code, _, text := r.renew(c, "POST", pemCSR(t, newKey(t))); code != http.StatusConflict {
		t.Error(code, text)
	}
	list, err := r.srv.reg.Requests(t.Context(), registry.RequestPending, 10)
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	result, err := ca.SignRequest(list[0].Body, func(_, want string) (string, error) { return want, nil }, time.Now())
	r.ok(err)
	_, err = r.api.ImportResult(t.Context(), result)
	r.ok(err)
	code, v, text := r.renew(c, "GET", nil)
	got, err := pki.ParseCert([]byte(v.Certificate))
	if code != http.StatusOK || err != nil || !key.PublicKey.Equal(got.PublicKey) {
		t.Error(code, text)
	}
}

package device

import (
	"context"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net"
	"strings"
	"testing"
	"time"

	"hawser/internal/mqtt"
)

// attempt makes one handshake with a server that presents cert.
func attempt(t *testing.T, root *authority, server *tls.Config, change func(*Config)) (*Device, error) {
	t.Helper()
	s := serverWith(t, root, server)
	cfg := s.config(t)
	if change != nil {
		change(&cfg)
	}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, _, _, err := d.dial(ctx, testServer, d.cfg.Certificate, d.cfg.Roots)
	if err == nil {
		conn.Close()
	}
	return d, err
}

func with(certs ...tls.Certificate) *tls.Config { return &tls.Config{Certificates: certs} }

func TestServerCertificate(t *testing.T) {
	root := newAuthority(t, "root A", nil)
	standby := newAuthority(t, "root B", nil)
	twin := newAuthority(t, "root A", nil) // same name, other key
	middle := newAuthority(t, "middle", root)
	chain := middle.serverLeaf(t, nil)
	chain.Certificate = append(chain.Certificate, middle.cert.Raw)
	day := 24 * time.Hour
	leaf := func(change func(*x509.Certificate)) tls.Certificate { return root.serverLeaf(t, change) }
	pin := func(c *Config) { c.Roots = []*x509.Certificate{root.cert, standby.cert} }
	clock := func(at time.Time) func(*Config) {
		return func(c *Config) { pin(c); c.Clock = func() time.Time { return at } }
	}
	cases := []struct {
		name   string
		cert   tls.Certificate
		change func(*Config)
		want   string // in the error; "": accepted
	}{
		{"as it should be", leaf(nil), pin, ""},
		{"under the standby root", standby.serverLeaf(t, nil), pin, ""},
		{"name in other case", leaf(func(c *x509.Certificate) { c.DNSNames = []string{"x.test", "BROKER.test"} }), pin, ""},
		{"twin CA", twin.serverLeaf(t, nil), pin, "not signed by a pinned root"},
		{"foreign CA", newAuthority(t, "other", nil).serverLeaf(t, nil), pin, "not signed by a pinned root"},
		{"through an intermediate CA", chain, pin, "not signed by a pinned root"},
		{"wrong name", leaf(func(c *x509.Certificate) { c.DNSNames = []string{"other.test"} }), pin, "not for \"broker.test\""},
		{"name in CN only", leaf(func(c *x509.Certificate) { c.DNSNames = nil; c.Subject = pkix.Name{CommonName: testServer} }), pin, "not for \"broker.test\""},
		{"wildcard name", leaf(func(c *x509.Certificate) { c.DNSNames = []string{"*.test"} }), pin, "not for \"broker.test\""},
		{"clientAuth", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), pin, "serverAuth"},
		{"no EKU", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = nil }), pin, "serverAuth"},
		{"any EKU", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }), pin, "serverAuth"},
		{"a CA", leaf(func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), pin, "one of a CA"},
		{"not for signatures", leaf(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), pin, "not for signatures"},
		{"P-384 key", root.serverLeafOn(t, elliptic.P384(), nil), pin, "not P-256"},
		{"SHA-384", leaf(func(c *x509.Certificate) { c.SignatureAlgorithm = x509.ECDSAWithSHA384 }), pin, "not P-256"},
		{"unknown critical extension", leaf(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}), pin, "critical extension"},
		{"expired before the build", leaf(func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(-9*day), time.Now().Add(-2*day) }),
			func(c *Config) { pin(c); c.BuildTime = time.Now().Add(-day) }, "ended at"},
		{"expired after the build, no clock", leaf(func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(-9*day), time.Now().Add(-2*day) }),
			func(c *Config) { pin(c); c.BuildTime = time.Now().Add(-3 * day) }, ""},
		{"expired by the clock", leaf(nil), clock(time.Now().Add(400 * day)), "ended at"},
		{"expired by the stored floor", leaf(nil), func(c *Config) {
			pin(c)
			state{floor: time.Now().Add(400 * day).Unix()}.save(c.Store)
		}, "ended at"},
		{"not yet valid by the clock", leaf(nil), clock(time.Now().Add(-day)), "valid from"},
		{"not yet valid, no clock", leaf(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(day) }), pin, ""},
	}
	for _, c := range cases {
		_, err := attempt(t, root, with(c.cert), c.change)
		if (c.want == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

func TestFloorRisesAfterTheHandshakeOnly(t *testing.T) {
	root, foreign := newAuthority(t, "root A", nil), newAuthority(t, "root A", nil)
	later := func(c *x509.Certificate) { c.NotBefore = time.Now().Add(100 * time.Hour).Truncate(time.Second) }
	d, err := attempt(t, root, with(foreign.serverLeaf(t, later)), nil)
	if err == nil || !d.floor().IsZero() {
		t.Fatalf("a refused leaf moved the floor to %v (%v)", d.floor(), err)
	}
	cert := root.serverLeaf(t, later)
	stolen := tls.Certificate{Certificate: cert.Certificate, PrivateKey: root.serverLeaf(t, nil).PrivateKey}
	if d, err = attempt(t, root, with(stolen), nil); err == nil || !d.floor().IsZero() {
		t.Fatalf("a leaf without its key moved the floor to %v (%v)", d.floor(), err)
	}
	if d, err = attempt(t, root, with(cert), nil); err != nil || !d.floor().Equal(cert.Leaf.NotBefore) {
		t.Fatalf("floor %v (%v)", d.floor(), err)
	}
	kept, err := loadState(d.cfg.Store)
	if err != nil || kept.floor != cert.Leaf.NotBefore.Unix() {
		t.Fatalf("stored %+v, %v", kept, err)
	}
	d.cfg.BuildTime = cert.Leaf.NotBefore.Add(time.Hour)
	if !d.floor().Equal(d.cfg.BuildTime) {
		t.Fatal("a later build does not raise the floor")
	}
}

func TestProtocolLimits(t *testing.T) {
	root := newAuthority(t, "root A", nil)
	cert := root.serverLeaf(t, nil)
	if _, err := attempt(t, root, &tls.Config{Certificates: []tls.Certificate{cert}, MaxVersion: tls.VersionTLS12}, nil); err == nil {
		t.Error("TLS 1.2 was accepted")
	}
	for _, curve := range []tls.CurveID{tls.X25519, tls.CurveP384, tls.X25519MLKEM768} {
		if _, err := attempt(t, root, &tls.Config{Certificates: []tls.Certificate{cert}, CurvePreferences: []tls.CurveID{curve}}, nil); err == nil {
			t.Errorf("%v was accepted", curve)
		}
	}
	good := tls.ConnectionState{Version: tls.VersionTLS13, CurveID: tls.CurveP256, CipherSuite: tls.TLS_AES_128_GCM_SHA256, PeerCertificates: []*x509.Certificate{cert.Leaf}}
	check := serverCheck{roots: []*x509.Certificate{root.cert}, name: testServer}
	chacha := check
	chacha.allowChaCha = true
	cases := []struct {
		name   string
		check  serverCheck
		change func(*tls.ConnectionState)
		ok     bool
	}{
		{"as it should be", check, func(*tls.ConnectionState) {}, true},
		{"TLS 1.2", check, func(c *tls.ConnectionState) { c.Version = tls.VersionTLS12 }, false},
		{"X25519", check, func(c *tls.ConnectionState) { c.CurveID = tls.X25519 }, false},
		{"AES-256", check, func(c *tls.ConnectionState) { c.CipherSuite = tls.TLS_AES_256_GCM_SHA384 }, false},
		{"AES-256 with ChaCha allowed", chacha, func(c *tls.ConnectionState) { c.CipherSuite = tls.TLS_AES_256_GCM_SHA384 }, false},
		{"ChaCha", check, func(c *tls.ConnectionState) { c.CipherSuite = tls.TLS_CHACHA20_POLY1305_SHA256 }, false},
		{"ChaCha allowed", chacha, func(c *tls.ConnectionState) { c.CipherSuite = tls.TLS_CHACHA20_POLY1305_SHA256 }, true},
		{"no certificate", check, func(c *tls.ConnectionState) { c.PeerCertificates = nil }, false},
	}
	for _, c := range cases {
		cs := good
		c.change(&cs)
		if err := c.check.connection(cs); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestRunRefusesAFalseServer: no CONNECT, and so no telemetry, reaches a server that the
// check does not accept, however often Run tries.
func TestRunRefusesAFalseServer(t *testing.T) {
	root, twin := newAuthority(t, "root A", nil), newAuthority(t, "root A", nil)
	impostor, right := serverWith(t, twin, with(twin.serverLeaf(t, nil))), serverWith(t, root, with(root.serverLeaf(t, nil)))
	cfg := right.config(t)
	n := 0
	cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if n++; n <= 5 {
			return impostor.dial(ctx, network, addr)
		}
		return right.dial(ctx, network, addr)
	}
	start(t, cfg)
	right.peer().welcome(&mqtt.Connack{})
	if len(impostor.peers) != 0 {
		t.Fatal("the device said CONNECT to a false server")
	}
}

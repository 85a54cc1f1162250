package tls13

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log/slog"
	"math/big"
	"net"
	"slices"
	"testing"
	"time"

	"hawser/device"
)

// tape is one connection of the device kit, as somebody in the path records it, and what
// our own end knows of it.
type tape struct {
	hello   *Hello
	share   []byte // of the server
	up      []byte // what the device sent
	shake   []byte // transcript up to ServerHello
	suite   Suite
	control []byte // the device's handshake secret, from our end
}

// tapped keeps what is read.
type tapped struct {
	net.Conn
	b []byte
}

func (c *tapped) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.b = append(c.b, p[:n]...)
	return n, err
}

// record plays the broker for one connection.
func record(t *testing.T, l net.Listener, s *Server) *tape {
	t.Helper()
	raw, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(20 * time.Second))
	w := &tapped{Conn: raw}
	c, v, out := &Conn{Raw: w}, *s, new(tape)
	v.Hello = func(h *Hellos) { out.share = bytes.Clone(h.Extensions[1].Body[4:]) }
	v.Say = func(c *Conn, kind byte, message []byte) error {
		err := c.Say(message)
		if kind == ServerHello {
			out.shake = bytes.Clone(c.transcript)
		}
		return err
	}
	p, err := v.Handshake(c)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<14)
	if _, err := c.Read(buf); err != nil { // CONNECT
		t.Fatal(err)
	}
	out.hello, out.up, out.control = p.Hello, w.b, c.keys.clientHandshake
	if out.suite, err = SuiteOf(p.Suite); err != nil {
		t.Fatal(err)
	}
	return out
}

// opens reports whether a secret opens the device's first protected record.
func (r *tape) opens(t *testing.T, secret []byte) bool {
	t.Helper()
	h, err := newHalf(r.suite, secret)
	if err != nil {
		t.Fatal(err)
	}
	for b := r.up; len(b) > 5; {
		n := 5 + int(b[3])<<8 + int(b[4])
		if b[0] == TypeData {
			_, _, err := h.open(bytes.Clone(b[5:n]))
			return err == nil
		}
		b = b[n:]
	}
	t.Fatal("no protected record was recorded")
	return false
}

// guess derives the device's handshake secret from a shared secret.
func (r *tape) guess(t *testing.T, shared []byte) []byte {
	t.Helper()
	var k schedule
	if err := k.afterHello(r.suite, shared, r.shake); err != nil {
		t.Fatal(err)
	}
	return k.clientHandshake
}

// signed makes a certificate under ca, or a root.
func signed(t *testing.T, ca *x509.Certificate, by *ecdsa.PrivateKey, c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if ca == nil {
		ca, by = c, key
	}
	c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(1), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, c, ca, key.Public(), by)
	if err == nil {
		c, err = x509.ParseCertificate(der)
	}
	if err != nil {
		t.Fatal(err)
	}
	return c, key
}

func dh(t *testing.T, private *ecdsa.PrivateKey, point []byte) []byte {
	t.Helper()
	mine, err := private.ECDH()
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := ecdh.P256().NewPublicKey(point)
	if err != nil {
		t.Fatal(err)
	}
	shared, err := mine.ECDH(theirs)
	if err != nil {
		t.Fatal(err)
	}
	return shared
}

// TestForwardSecrecy records two connections of the device kit. The private keys of the
// device and of the broker, had later, open neither; what opens them was made for the
// connection and is gone: both key shares are new each time, and neither a PSK nor RSA has
// a part in it.
func TestForwardSecrecy(t *testing.T) {
	root, rootKey := signed(t, nil, nil, &x509.Certificate{Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	leaf, brokerKey := signed(t, root, rootKey, &x509.Certificate{Subject: pkix.Name{CommonName: "broker"}, DNSNames: []string{"localhost"},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	cert, deviceKey := signed(t, root, rootKey, &x509.Certificate{Subject: pkix.Name{CommonName: "ABCD1234"}, KeyUsage: x509.KeyUsageDigitalSignature})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	store, err := device.OpenFileStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	d, err := device.New(device.Config{Servers: []string{"localhost:" + port}, Roots: []*x509.Certificate{root}, Store: store,
		Certificate: tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: deviceKey},
		BackoffMin:  time.Millisecond, BackoffMax: time.Millisecond, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, l.Addr().String())
		}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- d.Run(ctx) }()
	defer func() { cancel(); <-ran }()
	s := &Server{Chain: [][]byte{leaf.Raw}, Key: brokerKey, Ask: true}
	first, second := record(t, l, s), record(t, l, s)
	for _, r := range []*tape{first, second} {
		if !r.opens(t, r.control) {
			t.Fatal("the right secret does not open the recording: this test shows nothing")
		}
		for name, shared := range map[string][]byte{
			"the device's key and the broker's share": dh(t, deviceKey, r.share),
			"the broker's key and the device's share": dh(t, brokerKey, r.hello.Shares[GroupP256]),
			"nothing": make([]byte, 32),
		} {
			if r.opens(t, r.guess(t, shared)) {
				t.Errorf("%s open the recording", name)
			}
		}
		if r.hello.PSK || r.hello.Early || r.hello.Has(ExtPSKModes) {
			t.Error("the device offers a PSK")
		}
		if !slices.Equal(r.hello.Versions, []uint16{VersionTLS13}) || len(r.hello.Shares) != 1 {
			t.Errorf("the device offers versions %04x and %d shares", r.hello.Versions, len(r.hello.Shares))
		}
		for _, suite := range r.hello.Suites {
			if suite>>8 != 0x13 {
				t.Errorf("the device offers the suite %04x, whose key exchange may be another", suite)
			}
		}
	}
	if bytes.Equal(first.share, second.share) || bytes.Equal(first.hello.Shares[GroupP256], second.hello.Shares[GroupP256]) {
		t.Error("a key share was used twice")
	}
}

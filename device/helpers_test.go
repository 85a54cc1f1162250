package device

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"testing"
	"time"

	"hawser/internal/message"
	"hawser/internal/mqtt"
)

const (
	testID     = "ABCD1234"
	testServer = "broker.test"
	patience   = 20 * time.Second // for what must come
)

// authority is a throwaway CA.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newAuthority(t testing.TB, name string, parent *authority) *authority {
	t.Helper()
	key := newKey(t, elliptic.P256())
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(30 * 365 * 24 * time.Hour)}
	a := &authority{key: key}
	if parent == nil {
		parent = &authority{tmpl, key}
	}
	a.cert = sign(t, tmpl, parent, &key.PublicKey)
	return a
}

func sign(t testing.TB, tmpl *x509.Certificate, by *authority, pub *ecdsa.PublicKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by.cert, pub, by.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// serverLeaf is a leaf as the broker should have it, after change has spoilt it.
func (a *authority) serverLeaf(t testing.TB, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	return a.serverLeafOn(t, elliptic.P256(), change)
}

func (a *authority) serverLeafOn(t testing.TB, curve elliptic.Curve, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "broker"}, DNSNames: []string{testServer},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		NotBefore: time.Now().Add(-time.Hour).Truncate(time.Second), NotAfter: time.Now().Add(365 * 24 * time.Hour).Truncate(time.Second)}
	if change != nil {
		change(tmpl)
	}
	key := newKey(t, curve)
	cert := sign(t, tmpl, a, &key.PublicKey)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

func deviceCertificate(t testing.TB, id string) tls.Certificate {
	t.Helper()
	ca := newAuthority(t, "device CA", nil)
	key := newKey(t, elliptic.P256())
	cert := sign(t, &x509.Certificate{SerialNumber: big.NewInt(3), Subject: pkix.Name{CommonName: id},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}, ca, &key.PublicKey)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

// fakeServer is the other end: real TLS and real packets, and it does what the test says.
type fakeServer struct {
	t     testing.TB
	ln    net.Listener
	root  *authority
	peers chan *peer
}

func newServer(t testing.TB) *fakeServer {
	t.Helper()
	root := newAuthority(t, "root A", nil)
	return serverWith(t, root, &tls.Config{Certificates: []tls.Certificate{root.serverLeaf(t, nil)}})
}

func serverWith(t testing.TB, root *authority, cfg *tls.Config) *fakeServer {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg.ClientAuth = tls.RequireAnyClientCert
	cfg.SessionTicketsDisabled = true
	s := &fakeServer{t: t, ln: tls.NewListener(ln, cfg), root: root, peers: make(chan *peer, 1000)}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := s.ln.Accept()
			if err != nil {
				return
			}
			go s.admit(c)
		}
	}()
	return s
}

// admit hands the connection over once its CONNECT is read; until then it fails unseen. All
// end with the test, before its devices are stopped: they need not wait for an answer.
func (s *fakeServer) admit(c net.Conn) {
	context.AfterFunc(s.t.Context(), func() { c.Close() })
	p := &peer{t: s.t, conn: c}
	h, body, err := p.packet()
	if err != nil || h.Type != mqtt.CONNECT || p.connect.Decode(0, h.Flags, body) != nil {
		c.Close()
		return
	}
	p.v = p.connect.Version
	s.peers <- p
}

// config is that of a device that reaches s.
func (s *fakeServer) config(t testing.TB) Config {
	return Config{Servers: []string{testServer}, Certificate: deviceCertificate(t, testID), Roots: []*x509.Certificate{s.root.cert},
		Store: &MemStore{}, Class: "sensor", Firmware: "1.0", BackoffMin: time.Millisecond, BackoffMax: 10 * time.Millisecond,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Dial: s.dial}
}

func (s *fakeServer) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, network, s.ln.Addr().String())
}

func (s *fakeServer) peer() *peer {
	s.t.Helper()
	select {
	case p := <-s.peers:
		return p
	case <-time.After(patience):
		s.t.Fatal("no device came")
		return nil
	}
}

// peer is the server's end of one connection.
type peer struct {
	t       testing.TB
	conn    net.Conn
	v       mqtt.Version
	connect mqtt.Connect
	in      []byte
}

func (p *peer) packet() (mqtt.Header, []byte, error) {
	p.conn.SetReadDeadline(time.Now().Add(patience))
	for {
		h, n, err := mqtt.ParseHeader(p.in)
		if err != nil {
			return h, nil, err
		}
		if n > 0 && n+h.Remaining <= len(p.in) {
			body := p.in[n : n+h.Remaining]
			p.in = p.in[n+h.Remaining:]
			return h, body, nil
		}
		b := make([]byte, 4096)
		m, err := p.conn.Read(b)
		if p.in = append(p.in, b[:m]...); err != nil {
			return h, nil, err
		}
	}
}

func (p *peer) expect(t mqtt.Type) (mqtt.Header, []byte) {
	p.t.Helper()
	h, body, err := p.packet()
	if err != nil || h.Type != t {
		p.t.Fatalf("got %v, %v; want %v", h.Type, err, t)
	}
	return h, body
}

// publish reads the next PUBLISH.
func (p *peer) publish() *mqtt.Publish {
	p.t.Helper()
	h, body := p.expect(mqtt.PUBLISH)
	m := &mqtt.Publish{}
	if err := m.Decode(p.v, h.Flags, body); err != nil {
		p.t.Fatal(err)
	}
	return m
}

// gone waits for the end of the connection.
func (p *peer) gone() {
	p.t.Helper()
	for {
		h, _, err := p.packet()
		if h.Type == mqtt.DISCONNECT {
			p.conn.Close() // as a server does
			return
		}
		if err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				p.t.Fatal("the device is still connected")
			}
			return
		}
	}
}

func (p *peer) send(x interface {
	Append([]byte, mqtt.Version) []byte
}) {
	p.t.Helper()
	if _, err := p.conn.Write(x.Append(nil, p.v)); err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) ack(m *mqtt.Publish) { p.send(&mqtt.Ack{Type: mqtt.PUBACK, PacketID: m.PacketID}) }

// say publishes under private/<id>/d/.
func (p *peer) say(topic string, id uint16, payload []byte) {
	p.t.Helper()
	m := &mqtt.Publish{Topic: []byte("private/" + testID + "/" + topic), Payload: payload}
	if id != 0 {
		m.QoS, m.PacketID = 1, id
	}
	p.send(m)
}

// welcome goes through CONNACK, hello, the first report of a process and SUBSCRIBE, and gives
// the hello.
func (p *peer) welcome(ack *mqtt.Connack) *mqtt.Publish {
	p.t.Helper()
	hello, _ := p.welcomeReports(ack)
	return hello
}

// welcomeReports gives the reports too.
func (p *peer) welcomeReports(ack *mqtt.Connack) (hello *mqtt.Publish, reports []message.PKIReport) {
	p.t.Helper()
	p.send(ack)
	hello = p.publish()
	if string(hello.Topic) != "private/"+testID+"/u/hello" || hello.QoS != 1 {
		p.t.Fatalf("first message is %s at QoS %d", hello.Topic, hello.QoS)
	}
	p.ack(hello)
	for {
		h, body, err := p.packet()
		if err != nil {
			p.t.Fatal(err)
		}
		if h.Type == mqtt.SUBSCRIBE {
			p.subscribed(h, body)
			return hello, reports
		}
		var m mqtt.Publish
		if h.Type != mqtt.PUBLISH || m.Decode(p.v, h.Flags, body) != nil {
			p.t.Fatalf("got %v before SUBSCRIBE", h.Type)
		}
		p.ack(&m)
		reports = append(reports, p.report(&m))
	}
}

func (p *peer) subscribed(h mqtt.Header, body []byte) {
	p.t.Helper()
	var sub mqtt.Subscribe
	if err := sub.Decode(p.v, h.Flags, body); err != nil || len(sub.Filters) != 1 || sub.Filters[0].Filter != "private/"+testID+"/d/#" {
		p.t.Fatalf("subscribed to %+v, %v", sub.Filters, err)
	}
	p.send(&mqtt.Suback{PacketID: sub.PacketID, Codes: []mqtt.ReasonCode{mqtt.GrantedQoS1}})
}

func (p *peer) report(m *mqtt.Publish) message.PKIReport {
	p.t.Helper()
	r, err := message.DecodePKIReport(m.Payload)
	if err != nil || string(m.Topic) != "private/"+testID+"/u/pki" || m.QoS != 1 || m.Retain {
		p.t.Fatalf("%s at QoS %d: %v", m.Topic, m.QoS, err)
	}
	return r
}

// start runs a device until the test ends.
func start(t testing.TB, cfg Config) *Device {
	t.Helper()
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	run(t, d)
	return d
}

// run gives a function that stops the device and waits for it.
func run(t testing.TB, d *Device) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("Run gave %v", err)
			}
		case <-time.After(patience):
			t.Error("Run did not end")
		}
	}
	t.Cleanup(stop)
	return stop
}

func wait[T any](t testing.TB, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(patience):
		t.Fatal("it did not come")
	}
	return v
}

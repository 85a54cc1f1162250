package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/mqtt"
	"hawser/internal/pki"
)

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// makeFleet makes a trial fleet for localhost.
func makeFleet(t testing.TB, edit ...func(*fleet.InitOptions)) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "fleet")
	o := fleet.InitOptions{Dir: dir, Domains: []string{"localhost"}, Trial: true}
	for _, e := range edit {
		e(&o)
	}
	if _, err := Create(t.Context(), o, "test", slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// logBook keeps what a server logs.
type logBook struct {
	mu  sync.Mutex
	all bytes.Buffer // mu
}

func (l *logBook) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(b)
}

func (l *logBook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

// rig is a running server with a client of its administration.
type rig struct {
	t      *testing.T
	dir    string
	srv    *Server
	book   *logBook
	api    *admin.Client
	close1 func() error

	onClone string // --on-clone
}

func serve(t *testing.T, dir string) *rig {
	t.Helper()
	r := &rig{t: t, dir: dir, book: &logBook{}}
	t.Cleanup(r.stop)
	r.start()
	return r
}

func (r *rig) config() Config {
	return Config{Dir: r.dir, Listen: "127.0.0.1:0", Metrics: "127.0.0.1:0", API: "127.0.0.1:0", Version: "test", OnClone: r.onClone,
		Logger: slog.New(slog.NewTextHandler(r.book, &slog.HandlerOptions{Level: slog.LevelDebug}))}
}

func (r *rig) start() {
	r.t.Helper()
	srv, err := Start(r.t.Context(), r.config())
	if err != nil {
		r.t.Fatalf("%v\n%s", err, r.book)
	}
	r.srv = srv
	c, closeIt, err := Connect(r.t.Context(), r.dir)
	if err != nil {
		r.t.Fatal(err)
	}
	if !c.Running() {
		r.t.Fatal("the client does not see the server")
	}
	r.api, r.close1 = c, closeIt
}

func (r *rig) stop() {
	r.t.Helper()
	if r.srv == nil {
		return
	}
	if r.close1 != nil {
		r.ok(r.close1())
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := r.srv.Close(ctx); err != nil {
		r.t.Errorf("close: %v\n%s", err, r.book)
	}
	r.srv = nil
}

func (r *rig) ok(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) port() string {
	_, port, err := net.SplitHostPort(r.srv.Addr().String())
	r.ok(err)
	return port
}

// until asks again until ok: for states that tell nobody of their change.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); !ok(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("did not come: %s", what)
		}
	}
}

// logged waits for a line of the log with all words.
func (r *rig) logged(words ...string) {
	r.t.Helper()
	until(r.t, "a log line with "+strings.Join(words, ", "), func() bool {
		for line := range strings.Lines(r.book.String()) {
			all := true
			for _, w := range words {
				all = all && strings.Contains(line, w)
			}
			if all {
				return true
			}
		}
		return false
	})
}

func csrOf(t testing.TB, key *ecdsa.PrivateKey) *pki.CSR {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "x"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.ParseCSR(der)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// ca opens the fleet's own CA directory.
func (r *rig) ca(fn func(*fleet.CA) (*x509.Certificate, error)) *x509.Certificate {
	r.t.Helper()
	ca, err := fleet.OpenCA(filepath.Join(r.dir, "ca-a"), nil)
	r.ok(err)
	cert, err := fn(ca)
	r.ok(errors.Join(err, ca.Close()))
	return cert
}

// device enrols a device and writes what a Linux-class one has.
func (r *rig) device(name string) (identity.ID, string, tls.Certificate) {
	r.t.Helper()
	id, err := identity.ParseID(name)
	r.ok(err)
	key, err := pki.GenerateKey()
	r.ok(err)
	csr := csrOf(r.t, key)
	cert := r.ca(func(ca *fleet.CA) (*x509.Certificate, error) { return ca.EnrollDevice(id, csr, "", time.Now()) })
	_, err = r.api.Enroll(r.t.Context(), id, admin.Enrolment{CSR: csr.DER, Certificate: cert.Raw})
	r.ok(err)
	return id, r.files(key, cert), tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

func (r *rig) service(name string, grants ...admin.Grant) (string, tls.Certificate) {
	r.t.Helper()
	key, err := pki.GenerateKey()
	r.ok(err)
	cert := r.ca(func(ca *fleet.CA) (*x509.Certificate, error) {
		return ca.IssueService(name, &key.PublicKey, time.Now())
	})
	_, err = r.api.AddService(r.t.Context(), admin.NewService{Name: name, Grants: grants, Certificate: cert.Raw})
	r.ok(err)
	return r.files(key, cert), tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

func (r *rig) files(key *ecdsa.PrivateKey, cert *x509.Certificate) string {
	r.t.Helper()
	dir := r.t.TempDir()
	r.ok(pki.WriteKey(filepath.Join(dir, "device.key"), key, nil))
	r.ok(os.WriteFile(filepath.Join(dir, "device.crt"), pki.EncodeCert(cert.Raw), 0o644))
	roots, err := os.ReadFile(r.srv.Layout().BrokerRootsPath())
	r.ok(err)
	r.ok(os.WriteFile(filepath.Join(dir, "ca.crt"), roots, 0o644))
	return dir
}

// mosquitto runs one of the mosquitto clients and gives its output.
func (r *rig) mosquitto(program, dir, id string, args ...string) (string, error) {
	r.t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		r.t.Skipf("%s is not installed (apt-get install mosquitto-clients)", program)
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	args = append([]string{"-h", "localhost", "-p", r.port(), "-i", id, "--cafile", filepath.Join(dir, "ca.crt"),
		"--cert", filepath.Join(dir, "device.crt"), "--key", filepath.Join(dir, "device.key")}, args...)
	out, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	return string(out), err
}

// tail gives the messages that t selects.
func (r *rig) tail(sel admin.Tail) []admin.Message {
	r.t.Helper()
	return tailOf(r.t, r.api, sel)
}

func tailOf(t *testing.T, c *admin.Client, sel admin.Tail) (list []admin.Message) {
	t.Helper()
	err := c.Tail(t.Context(), sel, func(m *admin.Message) error {
		list = append(list, *m)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// client is one raw MQTT 5.0 connection.
type client struct {
	t    *testing.T
	conn *tls.Conn
	buf  []byte
	held []published // came before an answer
}

// published is a PUBLISH as it came.
type published struct {
	flags byte
	body  []byte
}

// dial connects up to CONNACK; an error says why none came.
func (r *rig) dial(cert tls.Certificate, id string, edit ...func(*mqtt.Connect)) (*client, error) {
	r.t.Helper()
	roots := x509.NewCertPool()
	for _, c := range r.srv.Layout().Trust().BrokerRoots {
		roots.AddCert(c)
	}
	conn, err := tls.Dial("tcp", r.srv.Addr().String(), &tls.Config{ServerName: "localhost", RootCAs: roots, MinVersion: tls.VersionTLS13,
		CurvePreferences: []tls.CurveID{tls.CurveP256}, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }})
	if err != nil {
		return nil, err
	}
	r.t.Cleanup(func() { conn.Close() })
	c := &client{t: r.t, conn: conn}
	hello := mqtt.Connect{Version: mqtt.V5, CleanStart: true, ClientID: id, KeepAlive: 60}
	for _, e := range edit {
		e(&hello)
	}
	if _, err := conn.Write(hello.Append(nil, mqtt.V5)); err != nil { // a client is refused after its own end of the handshake
		return nil, err
	}
	typ, _, body, err := c.next()
	if err != nil {
		return nil, err
	}
	var ack mqtt.Connack
	if typ != mqtt.CONNACK {
		return nil, errors.New("got " + typ.String())
	}
	if err := ack.Decode(mqtt.V5, 0, body); err != nil {
		return nil, err
	}
	if ack.Code != mqtt.Success {
		return nil, errors.New("connack: " + ack.Code.String())
	}
	return c, nil
}

func (r *rig) connect(cert tls.Certificate, id string, edit ...func(*mqtt.Connect)) *client {
	r.t.Helper()
	c, err := r.dial(cert, id, edit...)
	r.ok(err)
	return c
}

func (c *client) send(packet []byte) {
	c.t.Helper()
	if _, err := c.conn.Write(packet); err != nil {
		c.t.Fatal(err)
	}
}

// next gives the packet held longest, or reads one.
func (c *client) next() (typ mqtt.Type, flags byte, body []byte, err error) {
	if len(c.held) > 0 {
		p := c.held[0]
		c.held = c.held[1:]
		return mqtt.PUBLISH, p.flags, p.body, nil
	}
	return c.read()
}

// read reads one packet.
func (c *client) read() (typ mqtt.Type, flags byte, body []byte, err error) {
	if err := c.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return 0, 0, nil, err
	}
	for {
		h, n, err := mqtt.ParseHeader(c.buf)
		if err != nil {
			return 0, 0, nil, err
		}
		if n > 0 && len(c.buf) >= n+h.Remaining {
			body := bytes.Clone(c.buf[n : n+h.Remaining])
			c.buf = c.buf[n+h.Remaining:]
			return h.Type, h.Flags, body, nil
		}
		chunk := make([]byte, 4096)
		got, err := c.conn.Read(chunk)
		c.buf = append(c.buf, chunk[:got]...)
		if err != nil && got == 0 {
			return 0, 0, nil, err
		}
	}
}

// want reads the next packet, which must be of a type.
func (c *client) want(want mqtt.Type) (flags byte, body []byte) {
	c.t.Helper()
	typ, flags, body, err := c.next()
	if err != nil || typ != want {
		c.t.Fatalf("got %v, %v; want %v", typ, err, want)
	}
	return flags, body
}

// answer reads the packet of a type that answers what was sent. A PUBLISH may come at any
// time, also before it (MQTT 5.0 4.6 orders no such pair): it is held for next.
func (c *client) answer(want mqtt.Type) (body []byte) {
	c.t.Helper()
	for {
		typ, flags, body, err := c.read()
		switch {
		case err == nil && typ == want:
			return body
		case err == nil && typ == mqtt.PUBLISH:
			c.held = append(c.held, published{flags: flags, body: body})
		default:
			c.t.Fatalf("got %v, %v; want %v", typ, err, want)
		}
	}
}

// ping shows that the connection stands.
func (c *client) ping() {
	c.t.Helper()
	c.send([]byte{byte(mqtt.PINGREQ) << 4, 0})
	c.answer(mqtt.PINGRESP)
}

// subscribe gives the answer of the SUBACK.
func (c *client) subscribe(filter string) mqtt.ReasonCode {
	c.t.Helper()
	c.send((&mqtt.Subscribe{PacketID: 1, Filters: []mqtt.Subscription{{Filter: filter, QoS: 1}}}).Append(nil, mqtt.V5))
	body := c.answer(mqtt.SUBACK)
	return mqtt.ReasonCode(body[len(body)-1])
}

// publish sends QoS 1 and gives the answer of the PUBACK.
func (c *client) publish(topic, payload string) mqtt.ReasonCode {
	c.t.Helper()
	c.send((&mqtt.Publish{Topic: []byte(topic), Payload: []byte(payload), QoS: 1, PacketID: 7}).Append(nil, mqtt.V5))
	body := c.answer(mqtt.PUBACK)
	if len(body) < 3 {
		return mqtt.Success
	}
	return mqtt.ReasonCode(body[2])
}

// ended waits for the connection's end and tells how long it took.
func (c *client) ended() time.Duration {
	c.t.Helper()
	start := time.Now()
	for {
		if _, _, _, err := c.next(); err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				c.t.Fatal("the connection did not end")
			}
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "reset") {
				c.t.Fatalf("ended with %v", err)
			}
			return time.Since(start)
		}
	}
}

package broker

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"hawser/internal/identity"
	"hawser/internal/mqtt"
	"hawser/internal/msglog"
	"hawser/internal/pki"
	"hawser/internal/registry"
)

const fleetHex = "00112233445566778899aabbccddeeff"

// world is the certificates of a fleet; one serves all tests of a run.
type world struct {
	root, deviceCA, serviceCA *pki.Issuer
	leaf                      tls.Certificate
}

var theWorld = sync.OnceValue(func() *world {
	must := func(i *pki.Issuer, err error) *pki.Issuer {
		if err != nil {
			panic(err)
		}
		return i
	}
	n := pki.Name{Organisation: "Test", Country: "DE"}
	w := &world{
		root:      must(pki.IssueBrokerRoot(key(), n, "A", time.Now())),
		deviceCA:  must(pki.IssueDeviceCA(key(), n, 1, time.Now())),
		serviceCA: must(pki.IssueServiceCA(key(), n, time.Now())),
	}
	k := key()
	c, err := pki.IssueBrokerLeaf(w.root, "localhost", &k.PublicKey, time.Now())
	if err != nil {
		panic(err)
	}
	w.leaf = tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: k, Leaf: c}
	return w
})

func key() *ecdsa.PrivateKey {
	k, err := pki.GenerateKey()
	if err != nil {
		panic(err)
	}
	return k
}

// logBuffer is a log that tests can search.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// rig is one broker on real parts: registry, log, TLS listener.
type rig struct {
	t      testing.TB
	dir    string
	w      *world
	limits Limits
	suites []uint16
	edit   func(*Config)
	logs   *logBuffer
	certs  []Certificate
	grants map[identity.Principal][]Grant

	store *registry.Registry
	log   *msglog.Log
	b     *Broker
	l     net.Listener
	ended chan error
}

func newRig(t testing.TB, edit ...func(*rig)) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), w: theWorld(), limits: DefaultLimits(), logs: &logBuffer{},
		suites: []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_CHACHA20_POLY1305_SHA256}, grants: map[identity.Principal][]Grant{}}
	for _, e := range edit {
		e(r)
	}
	ctx := context.Background()
	var fleet [16]byte
	copy(fleet[:], "\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff")
	r.ok(registry.Create(ctx, r.path("registry.db"), registry.Meta{FleetID: fleet, Created: time.Now()}))
	r.ok(msglog.Create(ctx, r.logConfig()))
	reg, err := registry.Open(ctx, r.path("registry.db"), registry.Options{})
	r.ok(err)
	r.ok(reg.Update(ctx, func(tx *registry.Tx) error {
		return errors.Join(tx.AddStream("test", StreamLog), tx.AddStream("test", StreamQueue),
			tx.AddStream("test", StreamRetained), tx.AddStream("test", StreamHistory))
	}))
	r.ok(reg.Close())
	r.start()
	t.Cleanup(func() {
		r.stop()
		if t.Failed() {
			t.Logf("broker log:\n%s", clip(r.logs.String(), 20_000))
		}
	})
	return r
}

func (r *rig) path(name string) string { return filepath.Join(r.dir, name) }

func (r *rig) ok(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) logConfig() msglog.Config {
	return msglog.Config{Fleet: fleetHex, Dir: r.path("log"), Logger: slog.New(slog.NewTextHandler(r.logs, nil))}
}

// start opens what create or stop left.
func (r *rig) start() {
	r.t.Helper()
	ctx := context.Background()
	var err error
	r.store, err = registry.Open(ctx, r.path("registry.db"), registry.Options{})
	r.ok(err)
	state, err := r.store.LogState(ctx)
	r.ok(err)
	r.log, err = msglog.Open(ctx, r.logConfig(), KnownState(state))
	r.ok(err)
	cfg := Config{Log: r.log, Store: r.store, Limits: r.limits, Suites: r.suites,
		Logger: slog.New(slog.NewTextHandler(r.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Leaf: func(name string) (*tls.Certificate, error) {
			if name != "" && name != "localhost" {
				return nil, fmt.Errorf("no certificate for %q", name)
			}
			return &r.w.leaf, nil
		}}
	if r.edit != nil {
		r.edit(&cfg)
	}
	r.b, err = New(ctx, cfg)
	r.ok(err)
	for _, c := range r.certs {
		r.b.AddCertificate(c)
	}
	for who, g := range r.grants {
		r.b.SetGrants(who, g)
	}
	r.ok(r.b.Start(ctx))
	r.l, err = net.Listen("tcp", "127.0.0.1:0")
	r.ok(err)
	r.ended = make(chan error, 1)
	go func() { r.ended <- r.b.Serve(r.l) }()
}

// stop ends everything in order; safe to call twice.
func (r *rig) stop() {
	if r.l == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	r.l.Close()
	if err := <-r.ended; err != nil {
		r.t.Errorf("serve: %v", err)
	}
	if err := r.b.Close(ctx); err != nil {
		r.t.Errorf("close broker: %v", err)
	}
	if err := errors.Join(r.log.Close(ctx), r.store.Close()); err != nil {
		r.t.Errorf("close: %v", err)
	}
	r.l = nil
}

// crash ends everything without the goodbyes: no checkpoint, no session saved.
func (r *rig) crash() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	r.l.Close()
	<-r.ended
	r.b.cancel() // no further checkpoint
	r.b.tasks.Wait()
	r.log.Close(ctx)
	r.store.Close()
	r.b.mu.Lock()
	r.b.closed = true
	for _, s := range r.b.sessions {
		if s.c != nil {
			s.c.tls.NetConn().Close()
		}
	}
	r.b.mu.Unlock()
	r.l = nil
}

func (r *rig) restart() { r.t.Helper(); r.stop(); r.start() }

// device enrols a device and gives its TLS certificate.
func (r *rig) device(id string) tls.Certificate {
	r.t.Helper()
	did, err := identity.ParseID(id)
	r.ok(err)
	k := key()
	c, err := pki.IssueDeviceLeaf(r.w.deviceCA, did, &k.PublicKey, time.Now())
	r.ok(err)
	r.admit(c, identity.DevicePrincipal(did))
	return tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: k}
}

// service makes a service with grants written as "r filter" and "w filter".
func (r *rig) service(name string, grants ...string) tls.Certificate {
	r.t.Helper()
	k := key()
	c, err := pki.IssueServiceLeaf(r.w.serviceCA, name, &k.PublicKey, time.Now())
	r.ok(err)
	who := service(r.t, name)
	r.admit(c, who)
	r.grants[who] = grantsOf(grants)
	r.b.SetGrants(who, r.grants[who])
	return tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: k}
}

func grantsOf(text []string) (out []Grant) {
	for _, g := range text {
		out = append(out, Grant{Write: g[0] == 'w', Filter: g[2:]})
	}
	return out
}

func (r *rig) admit(c *x509.Certificate, who identity.Principal) {
	pin := Certificate{Fingerprint: Fingerprint(c.Raw), Principal: who, NotBefore: c.NotBefore, NotAfter: c.NotAfter}
	r.certs = append(r.certs, pin)
	r.b.AddCertificate(pin)
}

// tlsConfig is an honest client's.
func (r *rig) tlsConfig(cert *tls.Certificate) *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(r.w.root.Cert)
	cfg := &tls.Config{RootCAs: pool, ServerName: "localhost", MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.CurveP256}}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	return cfg
}

// client is a plain MQTT client: it sends what it is told and shows what comes.
type client struct {
	r   *rig
	t   testing.TB
	v   mqtt.Version
	c   net.Conn
	buf []byte
	pid uint16

	held []got // read, and not asked for yet
}

// got is one packet that came.
type got struct {
	typ     mqtt.Type
	connack mqtt.Connack
	publish mqtt.Publish
	ack     mqtt.Ack
	codes   []mqtt.ReasonCode
	pid     uint16
	disc    mqtt.Disconnect
}

func (r *rig) dial(cert tls.Certificate, v mqtt.Version) *client {
	r.t.Helper()
	c, err := tls.Dial("tcp", r.l.Addr().String(), r.tlsConfig(&cert))
	r.ok(err)
	r.t.Cleanup(func() { c.Close() })
	return &client{r: r, t: r.t, v: v, c: c}
}

// connect dials and says CONNECT; edit may change it. The CONNACK must be a
// success unless the test looks at it itself through dial.
func (r *rig) connect(cert tls.Certificate, v mqtt.Version, id string, edit ...func(*mqtt.Connect)) *client {
	r.t.Helper()
	c := r.dial(cert, v)
	ack := c.hello(id, edit...)
	if ack.Code != mqtt.Success {
		r.t.Fatalf("CONNACK %v", ack.Code)
	}
	return c
}

func (c *client) hello(id string, edit ...func(*mqtt.Connect)) mqtt.Connack {
	c.t.Helper()
	p := mqtt.Connect{Version: c.v, CleanStart: true, ClientID: id, KeepAlive: 60}
	for _, e := range edit {
		e(&p)
	}
	c.send(&p)
	g := c.next()
	if g.typ != mqtt.CONNACK {
		c.t.Fatalf("%v instead of CONNACK", g.typ)
	}
	return g.connack
}

func (c *client) send(p packet) {
	c.t.Helper()
	if err := c.trySend(p); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) trySend(p packet) error {
	c.c.SetWriteDeadline(time.Now().Add(10 * time.Second))
	_, err := c.c.Write(p.Append(nil, c.v))
	return err
}

// next gives the next packet; none within ten seconds fails the test.
func (c *client) next() got {
	c.t.Helper()
	if len(c.held) > 0 {
		g := c.held[0]
		c.held = c.held[1:]
		return g
	}
	g, err := c.read(10 * time.Second)
	if err != nil {
		c.t.Fatalf("read: %v", err)
	}
	return g
}

func (c *client) read(within time.Duration) (got, error) {
	c.c.SetReadDeadline(time.Now().Add(within))
	for {
		h, n, err := mqtt.ParseHeader(c.buf)
		if err != nil {
			return got{}, err
		}
		if n > 0 && len(c.buf) >= n+h.Remaining {
			g, err := c.decode(h, bytes.Clone(c.buf[n:n+h.Remaining]))
			c.buf = c.buf[n+h.Remaining:]
			return g, err
		}
		tmp := make([]byte, 4096)
		m, err := c.c.Read(tmp)
		c.buf = append(c.buf, tmp[:m]...)
		if err != nil && m == 0 {
			return got{}, err
		}
	}
}

func (c *client) decode(h mqtt.Header, body []byte) (g got, err error) {
	g.typ = h.Type
	switch h.Type {
	case mqtt.CONNACK:
		err = g.connack.Decode(c.v, h.Flags, body)
	case mqtt.PUBLISH:
		err = g.publish.DecodeAtClient(c.v, h.Flags, body)
		g.pid = g.publish.PacketID
	case mqtt.PUBACK, mqtt.PUBREC, mqtt.PUBREL, mqtt.PUBCOMP:
		g.ack.Type = h.Type
		err = g.ack.Decode(c.v, h.Flags, body)
		g.pid = g.ack.PacketID
	case mqtt.SUBACK:
		var a mqtt.Suback
		err = a.Decode(c.v, h.Flags, body)
		g.codes, g.pid = a.Codes, a.PacketID
	case mqtt.UNSUBACK:
		var a mqtt.Unsuback
		err = a.Decode(c.v, h.Flags, body)
		g.codes, g.pid = a.Codes, a.PacketID
	case mqtt.DISCONNECT:
		err = g.disc.DecodeAtClient(c.v, h.Flags, body)
	}
	return g, err
}

// expectPast reads until a packet of type typ; what comes before it is held for
// next.
func (c *client) expectPast(typ mqtt.Type) got {
	c.t.Helper()
	for {
		g, err := c.read(10 * time.Second)
		if err != nil {
			c.t.Fatalf("read: %v", err)
		}
		if g.typ == typ {
			return g
		}
		c.held = append(c.held, g)
	}
}

// expect reads the next packet, which must be of type typ.
func (c *client) expect(typ mqtt.Type) got {
	c.t.Helper()
	g := c.next()
	if g.typ != typ {
		c.t.Fatalf("%v (%+v) instead of %v", g.typ, g, typ)
	}
	return g
}

// subscribe gives the SUBACK's codes.
func (c *client) subscribe(qos byte, filters ...string) []mqtt.ReasonCode {
	c.t.Helper()
	var subs []mqtt.Subscription
	for _, f := range filters {
		subs = append(subs, mqtt.Subscription{Filter: f, QoS: qos})
	}
	return c.subscribeWith(0, subs...)
}

func (c *client) subscribeWith(id uint32, subs ...mqtt.Subscription) []mqtt.ReasonCode {
	c.t.Helper()
	c.pid++
	c.send(&mqtt.Subscribe{PacketID: c.pid, SubID: id, Filters: subs})
	g := c.expect(mqtt.SUBACK)
	if g.pid != c.pid {
		c.t.Fatalf("SUBACK for %d, not %d", g.pid, c.pid)
	}
	return g.codes
}

// publish sends one message and waits for its acknowledgements; it gives the
// first one's code.
func (c *client) publish(topic, payload string, qos byte, edit ...func(*mqtt.Publish)) mqtt.ReasonCode {
	c.t.Helper()
	c.sendPublish(topic, payload, qos, edit...)
	switch qos {
	case 1:
		g := c.expectPast(mqtt.PUBACK) // who publishes to itself may get the message first
		c.samePID(g)
		return g.ack.Code
	case 2:
		g := c.expectPast(mqtt.PUBREC)
		c.samePID(g)
		if g.ack.Code.Failed() {
			return g.ack.Code
		}
		c.send(&mqtt.Ack{Type: mqtt.PUBREL, PacketID: c.pid})
		c.samePID(c.expectPast(mqtt.PUBCOMP))
		return g.ack.Code
	}
	return mqtt.Success
}

func (c *client) samePID(g got) {
	c.t.Helper()
	if g.pid != c.pid {
		c.t.Fatalf("%v for packet %d, not %d", g.typ, g.pid, c.pid)
	}
}

func (c *client) sendPublish(topic, payload string, qos byte, edit ...func(*mqtt.Publish)) {
	c.t.Helper()
	p := mqtt.Publish{Topic: []byte(topic), Payload: []byte(payload), QoS: qos}
	if qos > 0 {
		c.pid++
		p.PacketID = c.pid
	}
	for _, e := range edit {
		e(&p)
	}
	c.send(&p)
}

// receive reads one PUBLISH, acknowledges it and checks topic and payload.
func (c *client) receive(topic, payload string) mqtt.Publish {
	c.t.Helper()
	p := c.message()
	if string(p.Topic) != topic || string(p.Payload) != payload {
		c.t.Fatalf("got %q on %q, want %q on %q", clip(string(p.Payload), 80), p.Topic, payload, topic)
	}
	return p
}

// message reads one PUBLISH and acknowledges it.
func (c *client) message() mqtt.Publish {
	c.t.Helper()
	p := c.expect(mqtt.PUBLISH).publish
	switch p.QoS {
	case 1:
		c.send(&mqtt.Ack{Type: mqtt.PUBACK, PacketID: p.PacketID})
	case 2:
		c.send(&mqtt.Ack{Type: mqtt.PUBREC, PacketID: p.PacketID})
		if g := c.expectPast(mqtt.PUBREL); g.pid != p.PacketID {
			c.t.Fatalf("PUBREL for %d, not %d", g.pid, p.PacketID)
		}
		c.send(&mqtt.Ack{Type: mqtt.PUBCOMP, PacketID: p.PacketID})
	}
	return p
}

// silent checks that nothing comes before the answer to a ping: all that was
// routed before it would have.
func (c *client) silent() {
	c.t.Helper()
	c.send(&mqtt.Ping{Type: mqtt.PINGREQ})
	if g := c.next(); g.typ != mqtt.PINGRESP {
		c.t.Fatalf("%v (%s on %s) where nothing was expected", g.typ, clip(string(g.publish.Payload), 80), g.publish.Topic)
	}
}

// closed waits for the end of the connection and gives the DISCONNECT's code if
// one came before it.
func (c *client) closed() mqtt.ReasonCode {
	c.t.Helper()
	code := mqtt.Success
	for {
		g, err := c.read(10 * time.Second)
		var timeout net.Error
		switch {
		case errors.As(err, &timeout) && timeout.Timeout():
			c.t.Fatal("the connection was not closed")
		case err != nil:
			return code
		case g.typ == mqtt.DISCONNECT:
			code = g.disc.Code
		default:
			c.t.Fatalf("%v instead of the end", g.typ)
		}
	}
}

func (c *client) disconnect() {
	c.t.Helper()
	c.send(&mqtt.Disconnect{})
	c.c.SetReadDeadline(time.Now().Add(10 * time.Second))
	io.Copy(io.Discard, c.c)
}

// drop cuts the connection without a goodbye and waits until the broker saw it.
func (c *client) drop() {
	c.t.Helper()
	before := c.r.b.Stats().Connections.Load()
	c.c.(*tls.Conn).NetConn().Close()
	c.r.until("the broker to see a lost connection", func() bool { return c.r.b.Stats().Connections.Load() < before })
}

// until polls for what has no event to wait for.
func (r *rig) until(what string, ok func() bool) {
	r.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			r.t.Fatalf("waited in vain for %s", what)
		}
		<-tick.C
	}
}

// logged waits until the broker's log holds all words in one line.
func (r *rig) logged(words ...string) {
	r.t.Helper()
	r.until("the log to say "+strings.Join(words, ", "), func() bool {
		for line := range strings.SplitSeq(r.logs.String(), "\n") {
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

// persist asks for a session that outlives its connection.
func persist(p *mqtt.Connect) {
	p.CleanStart = false
	if p.Version == mqtt.V5 {
		p.Props.SessionExpiry = 3600
	}
}

func retain(p *mqtt.Publish) { p.Retain = true }

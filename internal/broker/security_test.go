package broker

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"hawser/internal/mqtt"
	"hawser/internal/msglog"
	"hawser/internal/pki"
)

// noConnack tries to come in with cfg and says CONNECT; whatever happens, no
// CONNACK may come back. It gives the error that the client saw.
func (r *rig) noConnack(cfg *tls.Config, id string) error {
	r.t.Helper()
	c, err := tls.Dial("tcp", r.l.Addr().String(), cfg)
	if err != nil {
		return err
	}
	defer c.Close()
	p := mqtt.Connect{Version: mqtt.V311, CleanStart: true, ClientID: id}
	c.Write(p.Append(nil, mqtt.V311))
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	got, err := io.ReadAll(c)
	if len(got) > 0 {
		r.t.Fatalf("the broker answered % x", got)
	}
	return err
}

// TestAdmissionByPin: what was not issued here, is no longer active or not valid
// now gets no CONNACK, and the log names the reason.
func TestAdmissionByPin(t *testing.T) {
	r := newRig(t)
	good := r.device("ABCD1234")
	r.connect(good, mqtt.V311, "ABCD1234").disconnect()

	t.Run("no certificate", func(t *testing.T) {
		r.noConnack(r.tlsConfig(nil), "ABCD1234")
		r.logged("rejected", "client didn't provide a certificate")
	})
	t.Run("another CA, same name", func(t *testing.T) {
		ca, err := pki.IssueDeviceCA(key(), pki.Name{Organisation: "Test", Country: "DE"}, 1, time.Now())
		r.ok(err)
		k := key()
		c, err := pki.IssueDeviceLeaf(ca, 0xABCD1234, &k.PublicKey, time.Now())
		r.ok(err)
		r.noConnack(r.tlsConfig(&tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: k}), "ABCD1234")
		r.logged("rejected", "not an active one", fmt.Sprintf("%x", Fingerprint(c.Raw)))
	})
	t.Run("right CA, never registered", func(t *testing.T) {
		k := key()
		c, err := pki.IssueDeviceLeaf(r.w.deviceCA, 0xABCD1234, &k.PublicKey, time.Now())
		r.ok(err)
		r.noConnack(r.tlsConfig(&tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: k}), "ABCD1234")
		r.logged("rejected", "not an active one", fmt.Sprintf("%x", Fingerprint(c.Raw)))
	})
	t.Run("the broker's own certificate", func(t *testing.T) {
		r.noConnack(r.tlsConfig(&r.w.leaf), "ABCD1234")
		r.logged("rejected", "not an active one", fmt.Sprintf("%x", Fingerprint(r.w.leaf.Certificate[0])))
	})
	t.Run("a registered certificate without its key", func(t *testing.T) {
		victim := r.connect(good, mqtt.V311, "ABCD1234")
		r.noConnack(r.tlsConfig(&tls.Certificate{Certificate: good.Certificate, PrivateKey: key()}), "ABCD1234")
		r.logged("rejected", "invalid signature by the client certificate")
		victim.silent() // and its owner was not kicked
		victim.disconnect()
	})
	for name, dates := range map[string][2]time.Duration{"expired": {-48 * time.Hour, -24 * time.Hour}, "not yet valid": {24 * time.Hour, 48 * time.Hour}} {
		t.Run(name, func(t *testing.T) {
			old := r.device("0000BEEF")
			r.b.AddCertificate(Certificate{Fingerprint: Fingerprint(old.Certificate[0]), Principal: device(t, "0000BEEF"),
				NotBefore: time.Now().Add(dates[0]), NotAfter: time.Now().Add(dates[1])})
			r.noConnack(r.tlsConfig(&old), "0000BEEF")
			r.logged("rejected", map[string]string{"expired": "has expired", "not yet valid": "is not valid before"}[name])
		})
	}
	t.Run("removed", func(t *testing.T) {
		c := r.connect(good, mqtt.V5, "ABCD1234")
		r.b.RemoveCertificate(Fingerprint(good.Certificate[0]))
		c.closed()
		r.noConnack(r.tlsConfig(&good), "ABCD1234")
	})
}

// TestTLSIsNarrow: version, suites, group, ALPN and server name.
func TestTLSIsNarrow(t *testing.T) {
	r := newRig(t)
	dev := r.device("ABCD1234")
	t.Run("TLS 1.2", func(t *testing.T) {
		cfg := r.tlsConfig(&dev)
		cfg.MinVersion, cfg.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
		if r.noConnack(cfg, "ABCD1234") == nil {
			t.Fatal("TLS 1.2 was accepted")
		}
		r.logged("rejected", "offered only unsupported versions")
	})
	t.Run("a group other than P-256", func(t *testing.T) {
		cfg := r.tlsConfig(&dev)
		cfg.CurvePreferences = []tls.CurveID{tls.X25519}
		if r.noConnack(cfg, "ABCD1234") == nil {
			t.Fatal("X25519 was accepted")
		}
	})
	t.Run("unknown server name", func(t *testing.T) {
		cfg := r.tlsConfig(&dev)
		cfg.ServerName = "example.com"
		if r.noConnack(cfg, "ABCD1234") == nil {
			t.Fatal("an unknown name was served")
		}
		r.logged("rejected", "no certificate for", "example.com")
	})
	t.Run("ALPN of another protocol", func(t *testing.T) {
		cfg := r.tlsConfig(&dev)
		cfg.NextProtos = []string{"h2"}
		if r.noConnack(cfg, "ABCD1234") == nil {
			t.Fatal("h2 was accepted")
		}
	})
	t.Run("ALPN mqtt", func(t *testing.T) {
		cfg := r.tlsConfig(&dev)
		cfg.NextProtos = []string{"mqtt"}
		c, err := tls.Dial("tcp", r.l.Addr().String(), cfg)
		r.ok(err)
		defer c.Close()
		if p := c.ConnectionState().NegotiatedProtocol; p != "mqtt" {
			t.Fatalf("negotiated %q", p)
		}
	})
	t.Run("no session ticket", func(t *testing.T) {
		cfg := r.tlsConfig(&dev)
		cfg.ClientSessionCache = noTickets{t}
		c, err := tls.Dial("tcp", r.l.Addr().String(), cfg)
		r.ok(err)
		defer c.Close()
		p := mqtt.Connect{Version: mqtt.V311, CleanStart: true, ClientID: "ABCD1234"}
		c.Write(p.Append(nil, 0))
		if _, err := c.Read(make([]byte, 16)); err != nil {
			t.Fatal(err)
		}
	})
}

type noTickets struct{ t *testing.T }

func (n noTickets) Get(string) (*tls.ClientSessionState, bool) { return nil, false }
func (n noTickets) Put(string, *tls.ClientSessionState) {
	n.t.Error("the broker sent a session ticket")
}

// TestSuiteIsCheckedAfterTheHandshake: the allow-list holds by itself, without
// the early look at the ClientHello.
func TestSuiteIsCheckedAfterTheHandshake(t *testing.T) {
	r := newRig(t, func(r *rig) { r.suites = []uint16{tls.TLS_CHACHA20_POLY1305_SHA256} })
	dev := r.device("ABCD1234")
	// Go's client offers all three; the server's choice is AES on this machine.
	r.noConnack(r.tlsConfig(&dev), "ABCD1234")
	r.logged("rejected", "allow-list", "was chosen")
}

// TestDeviceIsItsCertificate: CN, client id and topics are one.
func TestDeviceIsItsCertificate(t *testing.T) {
	r := newRig(t)
	dev := r.device("ABCD1234")
	r.device("0000BEEF")
	for _, v := range bothVersions {
		for _, id := range []string{"0000BEEF", "abcd1234", "", "ABCD1234 ", "dash"} {
			c := r.dial(dev, v)
			if ack := c.hello(id); ack.Code != mqtt.ClientIdentifierNotValid {
				t.Fatalf("%v: connected as %q: %v", v, id, ack.Code)
			}
			c.closed()
			r.logged("rejected", "client id differs")
		}
	}
}

// TestDeviceCannotReachBeyondItsID: nothing comes of the wide filters of the
// issue, nor of publishing elsewhere.
func TestDeviceCannotReachBeyondItsID(t *testing.T) {
	filters := []string{"#", "private/+/u/#", "private/0000BEEF/#", "$SYS/#", "$share/g/#", "+/ABCD1234/#", "private/#", "$share/g/private/ABCD1234/#"}
	for _, v := range bothVersions {
		t.Run(v.String(), func(t *testing.T) {
			r := newRig(t)
			dev, other, app := r.device("ABCD1234"), r.device("0000BEEF"), r.service("app", "r #", "w #")
			d := r.connect(dev, v, "ABCD1234")
			for _, code := range d.subscribe(1, filters...) {
				want := mqtt.NotAuthorized
				if v == mqtt.V311 {
					want = mqtt.UnspecifiedError // 0x80
				}
				if code != want {
					t.Fatalf("SUBACK %v", code)
				}
			}
			o, a := r.connect(other, v, "0000BEEF"), r.connect(app, v, "app")
			o.publish("private/0000BEEF/u/x", "secret", 1)
			a.publish("public/x", "secret", 1)
			a.publish("private/0000BEEF/d/app/x", "secret", 1, retain)
			d.silent()
			a.subscribe(1, "#")
			a.message() // the retained one
			for _, topic := range []string{"private/0000BEEF/u/x", "public/x", "private/ABCD1234/d/cmd", "private/ABCD1234/d", "$SYS/x", "private/abcd1234/u"} {
				for qos := byte(0); qos <= 2; qos++ {
					r.refusedPublish(dev, v, "ABCD1234", topic, qos)
				}
			}
			a.silent()
		})
	}
}

// refusedPublish publishes what is forbidden and checks how it is refused.
func (r *rig) refusedPublish(cert tls.Certificate, v mqtt.Version, id, topic string, qos byte) {
	r.t.Helper()
	c := r.connect(cert, v, id)
	if v == mqtt.V5 && qos > 0 {
		if code := c.publish(topic, "x", qos); code != mqtt.NotAuthorized {
			r.t.Fatalf("publish to %s at QoS %d: %v", topic, qos, code)
		}
		c.disconnect()
		return
	}
	c.sendPublish(topic, "x", qos)
	if code := c.closed(); v == mqtt.V5 && code != mqtt.NotAuthorized {
		r.t.Fatalf("publish to %s: DISCONNECT %v", topic, code)
	}
	r.logged("publish refused", topic)
}

// TestWillIsAuthorized at CONNECT, and again when it fires.
func TestWillIsAuthorized(t *testing.T) {
	r := newRig(t)
	dev, app := r.device("ABCD1234"), r.service("app", "r #", "w status/#")
	will := func(topic string) func(*mqtt.Connect) {
		return func(p *mqtt.Connect) { p.Will = &mqtt.Will{Topic: topic, Payload: []byte("gone"), QoS: 1} }
	}
	for _, v := range bothVersions {
		for _, topic := range []string{"private/0000BEEF/u/x", "private/ABCD1234/d/cmd", "public", "$SYS/x"} {
			c := r.dial(dev, v)
			if ack := c.hello("ABCD1234", will(topic)); ack.Code != mqtt.NotAuthorized {
				t.Fatalf("will on %s: %v", topic, ack.Code)
			}
			c.closed()
		}
	}
	r.logged("rejected", "will on a topic that is not allowed", "private/0000BEEF/u/x")
	watch := r.connect(app, mqtt.V5, "watch")
	watch.subscribe(1, "status/#", "private/#")
	r.connect(app, mqtt.V5, "allowed", will("status/a")).drop()
	watch.receive("status/a", "gone")
	late := r.connect(app, mqtt.V5, "late", will("status/b"))
	r.b.SetGrants(service(t, "app"), grantsOf([]string{"r #"}))
	late.drop()
	r.logged("will not published", "status/b")
	watch.silent()
}

// TestWhatWaitsIsJudgedAgain: queued and retained messages are delivered only
// while their publisher may still publish and their reader may still read.
func TestWhatWaitsIsJudgedAgain(t *testing.T) {
	r := newRig(t)
	dev, app, dash := r.device("ABCD1234"), r.service("app", "w private/+/d/app/#", "w news/#"), r.service("dash", "r news/#", "r other")
	d := r.connect(dev, mqtt.V5, "ABCD1234", persist)
	d.subscribe(1, "private/ABCD1234/#")
	d.disconnect()
	s := r.connect(dash, mqtt.V5, "dash-1", persist)
	s.subscribe(1, "news/#", "other")
	s.disconnect()
	pub := r.connect(app, mqtt.V5, "app")
	pub.publish("private/ABCD1234/d/app/x", "queued", 1)
	pub.publish("news/x", "kept", 1, retain)
	pub.disconnect()

	r.b.SetGrants(service(t, "app"), grantsOf([]string{"w private/+/d/app/#"}))
	s = r.connect(dash, mqtt.V5, "dash-2")
	s.subscribe(1, "news/#")
	s.silent() // retained by who may no longer publish there
	r.b.SetGrants(service(t, "dash"), grantsOf([]string{"r other"}))
	s.closed()
	s = r.connect(dash, mqtt.V5, "dash-1", persist)
	s.silent() // the subscription went with the grant
	r.b.Bar(service(t, "app"))
	d = r.connect(dev, mqtt.V5, "ABCD1234", persist)
	d.publish("private/ABCD1234/mark", "mark", 1) // comes after all that was queued
	d.receive("private/ABCD1234/mark", "mark")    // queued by who was revoked: nothing
}

// TestReceiveIsAskedAtEachDelivery: with the subscription still in place, as in
// the moment before SetGrants has removed it, nothing is delivered any more:
// live, queued, retained or for a group.
func TestReceiveIsAskedAtEachDelivery(t *testing.T) {
	r := newRig(t)
	app, dash := r.service("app", "w #"), r.service("dash", "r #")
	pub, s := r.connect(app, mqtt.V5, "app"), r.connect(dash, mqtt.V5, "s", persist)
	s.subscribe(1, "live", "retained")
	s.subscribe(0, "live0")
	s.subscribe(1, "$share/g/shared")
	s.send(&mqtt.Disconnect{})
	r.until("the end of the session's connection", func() bool { return !r.b.Online(service(t, "dash")) })
	pub.publish("live", "queued", 1)
	r.b.dir.setGrants(service(t, "dash"), grantsOf([]string{"r else"}))
	s = r.connect(dash, mqtt.V5, "s", persist)
	for _, topic := range []string{"live", "live0", "shared"} {
		pub.publish(topic, "x", 1)
	}
	pub.publish("retained", "x", 1, retain)
	s.silent()
}

// TestSuiteIsRefusedEarly: a client that offers nothing of the allow-list is
// turned away at its ClientHello.
func TestSuiteIsRefusedEarly(t *testing.T) {
	r := newRig(t, func(r *rig) { r.suites = []uint16{0x1305} })
	dev := r.device("ABCD1234")
	r.noConnack(r.tlsConfig(&dev), "ABCD1234")
	r.logged("rejected", "allow-list was offered: [TLS_AES_128_GCM_SHA256")
}

// TestRevocationEndsEverything: connections, Will, retained and queued messages,
// and the way back in.
func TestRevocationEndsEverything(t *testing.T) {
	r := newRig(t)
	dev, dash := r.device("ABCD1234"), r.service("dash", "r #")
	watch := r.connect(dash, mqtt.V5, "watch")
	watch.subscribe(1, "#")
	d := r.connect(dev, mqtt.V5, "ABCD1234", persist, func(p *mqtt.Connect) {
		p.Will = &mqtt.Will{Topic: "private/ABCD1234/u/gone", Payload: []byte("gone"), QoS: 1}
	})
	d.publish("private/ABCD1234/u/state", "on", 1, retain)
	watch.receive("private/ABCD1234/u/state", "on")
	start := time.Now()
	r.b.Bar(device(t, "ABCD1234"))
	if code := d.closed(); code != mqtt.NotAuthorized {
		t.Errorf("DISCONNECT %v", code)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("the session was closed after %v", took)
	}
	r.noConnack(r.tlsConfig(&dev), "ABCD1234")
	watch.silent() // no Will
	late := r.connect(dash, mqtt.V5, "late")
	late.subscribe(1, "#")
	late.silent() // no retained message
}

// TestGrantTakenAwayActsOnLiveSessions within a second.
func TestGrantTakenAwayActsOnLiveSessions(t *testing.T) {
	r := newRig(t)
	app := r.service("app", "r a/#", "r b/#", "w a/#", "w b/#")
	s, pub := r.connect(app, mqtt.V5, "s", persist), r.connect(app, mqtt.V5, "pub")
	s.subscribe(1, "a/#", "b/#")
	start := time.Now()
	r.b.SetGrants(service(t, "app"), grantsOf([]string{"r a/#", "w a/#"}))
	if code := s.closed(); code != mqtt.NotAuthorized || time.Since(start) > time.Second {
		t.Fatalf("DISCONNECT %v after %v", code, time.Since(start))
	}
	if code := pub.publish("b/x", "x", 1); code != mqtt.NotAuthorized {
		t.Fatalf("PUBACK %v", code)
	}
	s = r.dial(app, mqtt.V5)
	if !s.hello("s", persist).SessionPresent {
		t.Fatal("the rest of the session is gone")
	}
	pub.publish("a/x", "still", 1)
	s.receive("a/x", "still")
}

// TestServerNameSpaceIsTheServers: no grant forges what looks like Hawser's word
// or a device's.
func TestServerNameSpaceIsTheServers(t *testing.T) {
	r := newRig(t)
	dev, root := r.device("ABCD1234"), r.service("root", "r #", "w #")
	d := r.connect(dev, mqtt.V5, "ABCD1234")
	d.subscribe(1, "private/ABCD1234/#")
	for _, topic := range []string{"private/ABCD1234/d/cmd", "private/ABCD1234/d/time", "private/ABCD1234/u/state", "private/ABCD1234/u"} {
		for qos := byte(0); qos <= 2; qos++ {
			r.refusedPublish(root, mqtt.V5, "root", topic, qos)
			r.refusedPublish(root, mqtt.V311, "root", topic, qos)
		}
		c := r.dial(root, mqtt.V5)
		ack := c.hello("root", func(p *mqtt.Connect) { p.Will = &mqtt.Will{Topic: topic, Payload: []byte("x")} })
		if ack.Code != mqtt.NotAuthorized {
			t.Fatalf("will on %s: %v", topic, ack.Code)
		}
	}
	d.silent()
}

// TestNobodyTakesOverAnothersSession: client ids of services are a name space of
// their own.
func TestNobodyTakesOverAnothersSession(t *testing.T) {
	r := newRig(t)
	dev, a, b := r.device("ABCD1234"), r.service("a", "r #", "w #"), r.service("b", "r #", "w #")
	ca := r.connect(a, mqtt.V5, "same", persist)
	ca.subscribe(1, "x")
	d := r.connect(dev, mqtt.V5, "ABCD1234")
	cb := r.dial(b, mqtt.V5)
	if cb.hello("same", persist).SessionPresent {
		t.Fatal("b got a's session")
	}
	r.connect(b, mqtt.V5, "ABCD1234")
	ca.silent()
	d.silent()
	a2 := r.dial(a, mqtt.V5)
	if !a2.hello("same", persist).SessionPresent {
		t.Fatal("a lost its session")
	}
	if code := ca.closed(); code != mqtt.SessionTakenOver {
		t.Fatalf("DISCONNECT %v", code)
	}
}

// TestOwnUplinkIsNotSentBack, whatever the device subscribes to.
func TestOwnUplinkIsNotSentBack(t *testing.T) {
	r := newRig(t)
	d := r.connect(r.device("ABCD1234"), mqtt.V311, "ABCD1234", persist)
	d.subscribe(1, "private/ABCD1234/#", "private/ABCD1234/u/x")
	d.publish("private/ABCD1234/u/x", "up", 1, retain)
	d.publish("private/ABCD1234/own", "mine", 1)
	d.receive("private/ABCD1234/own", "mine")
	d.subscribe(1, "private/ABCD1234/u/x")
	d.silent()
}

// TestRecordsToDevicesAreSmall: a device with a 4 KiB input buffer lives.
func TestRecordsToDevicesAreSmall(t *testing.T) {
	r := newRig(t)
	dev, app := r.device("ABCD1234"), r.service("app", "w private/+/d/app/#")
	raw, err := net.Dial("tcp", r.l.Addr().String())
	r.ok(err)
	rec := &recordSizes{Conn: raw}
	c := tls.Client(rec, r.tlsConfig(&dev))
	r.ok(c.Handshake())
	d := &client{r: r, t: t, v: mqtt.V311, c: c}
	t.Cleanup(func() { c.Close() })
	d.hello("ABCD1234")
	d.subscribe(0, "private/ABCD1234/#")
	rec.largest = 0
	payload := strings.Repeat("x", 100_000)
	r.connect(app, mqtt.V311, "app").publish("private/ABCD1234/d/app/x", payload, 0)
	d.receive("private/ABCD1234/d/app/x", payload)
	const overhead = 1 + 16 // content type and tag (RFC 9846 5.2)
	if rec.largest > 2048+overhead {
		t.Fatalf("a record of %d bytes", rec.largest)
	}
}

// recordSizes notes the largest TLS record that comes in.
type recordSizes struct {
	net.Conn
	buf     bytes.Buffer
	largest int
}

func (r *recordSizes) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.buf.Write(p[:n])
	for b := r.buf.Bytes(); len(b) >= 5; b = r.buf.Bytes() {
		size := int(b[3])<<8 | int(b[4])
		if len(b) < 5+size {
			break
		}
		r.largest = max(r.largest, size)
		r.buf.Next(5 + size)
	}
	return n, err
}

// TestBeforeAdmission: time, bytes and connections are bounded, and those who
// are in notice nothing.
func TestBeforeAdmission(t *testing.T) {
	r := newRig(t, func(r *rig) {
		r.limits.PreAdmission = 300 * time.Millisecond
		r.limits.Handshakes = 2
		r.limits.Unadmitted = 300
	})
	dev := r.device("ABCD1234")
	d := r.connect(dev, mqtt.V311, "ABCD1234")
	var idle []net.Conn
	for range 300 {
		c, err := net.Dial("tcp", r.l.Addr().String())
		r.ok(err)
		defer c.Close()
		idle = append(idle, c)
	}
	r.until("300 connections to wait", func() bool { return r.b.waiting.Load() == 300 })
	d.publish("private/ABCD1234/u/x", "x", 1)
	over, err := net.Dial("tcp", r.l.Addr().String())
	r.ok(err)
	gone(t, over)
	r.logged("rejected", "waiting for admission")
	for _, c := range idle {
		gone(t, c)
	}
	r.until("the waiting room to empty", func() bool { return r.b.waiting.Load() == 0 })
	for _, bytes := range map[string]string{
		"not TLS":        "GET / HTTP/1.1\r\n\r\n",
		"half a record":  "\x16\x03\x01\x02\x00\x01",
		"a large record": "\x16\x03\x01\xff\xff" + strings.Repeat("\x01", 20_000),
	} {
		c, err := net.Dial("tcp", r.l.Addr().String())
		r.ok(err)
		c.Write([]byte(bytes))
		gone(t, c)
	}
	r.logged("rejected", "not a TLS handshake")
	r.logged("rejected", "too many bytes before admission")
	d.silent()
	// A client that is let in but says nothing goes too.
	c, err := tls.Dial("tcp", r.l.Addr().String(), r.tlsConfig(&dev))
	r.ok(err)
	gone(t, c)
	d.silent()
}

func gone(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	_, err := io.Copy(io.Discard, c)
	if e, ok := err.(net.Error); ok && e.Timeout() {
		t.Fatal("the connection was not closed")
	}
	c.Close()
}

// TestAddressRate bounds one address, and exempts loopback.
func TestAddressRate(t *testing.T) {
	s := addresses{rate: 1, burst: 3, seen: map[netip.Addr]bucket{}}
	now := time.Now()
	count := func(addr string, tries int, at time.Time) (n int) {
		for range tries {
			if s.allow(netip.MustParseAddr(addr), at) {
				n++
			}
		}
		return n
	}
	for addr, want := range map[string]int{"192.0.2.1": 3, "127.0.0.1": 10, "::1": 10, "2001:db8::1": 3} {
		if n := count(addr, 10, now); n != want {
			t.Errorf("%s: %d of 10 let in, want %d", addr, n, want)
		}
	}
	if n := count("2001:db8::2", 5, now); n != 0 {
		t.Errorf("another address of the same /64: %d let in", n)
	}
	if n := count("192.0.2.1", 10, now.Add(2*time.Second)); n != 2 {
		t.Errorf("two seconds later: %d let in", n)
	}
	count("192.0.2.9", 1, now.Add(2*time.Minute))
	if len(s.seen) != 1 {
		t.Errorf("%d addresses are remembered", len(s.seen))
	}
}

// TestOverTheRateIsReadSlowly: nothing is dropped, and others are not delayed.
func TestOverTheRateIsReadSlowly(t *testing.T) {
	r := newRig(t, func(r *rig) { r.limits.Device.Messages, r.limits.Device.MessageBurst = 100, 10 })
	fast, other := r.connect(r.device("ABCD1234"), mqtt.V311, "ABCD1234"), r.connect(r.device("0000BEEF"), mqtt.V311, "0000BEEF")
	start := time.Now()
	for range 60 {
		fast.sendPublish("private/ABCD1234/u/x", "x", 1)
	}
	began := time.Now()
	other.publish("private/0000BEEF/u/x", "x", 1)
	if d := time.Since(began); d > 250*time.Millisecond {
		t.Errorf("another device waited %v", d)
	}
	for range 60 {
		fast.expect(mqtt.PUBACK)
	}
	if took := time.Since(start); took < 400*time.Millisecond {
		t.Fatalf("60 messages at 100/s with a burst of 10 took %v", took)
	}
}

// TestQueueLimit: at the limit the newest is logged but not queued, and said so.
func TestQueueLimit(t *testing.T) {
	for _, v := range bothVersions {
		r := newRig(t, func(r *rig) { r.limits.Device.Queue = 3 })
		dev, app := r.device("ABCD1234"), r.service("app", "w private/+/d/app/#")
		d := r.connect(dev, v, "ABCD1234", persist)
		d.subscribe(1, "private/ABCD1234/#")
		d.disconnect()
		pub := r.connect(app, v, "app")
		for i := range 5 {
			code := pub.publish("private/ABCD1234/d/app/x", fmt.Sprint(i), 1)
			want := mqtt.Success
			if v == mqtt.V5 && i >= 3 {
				want = mqtt.QuotaExceeded
			}
			if code != want {
				t.Fatalf("message %d: %v", i, code)
			}
		}
		if n, dropped := r.b.Queue(0xABCD1234); n != 3 || dropped != 2 {
			t.Fatalf("%d queued, %d not", n, dropped)
		}
		logged := 0
		r.ok(r.log.Read(t.Context(), 0, func(rec *msglog.Record) error { logged++; return nil }))
		if logged != 5 {
			t.Fatalf("%d messages in the log", logged)
		}
		d = r.connect(dev, v, "ABCD1234", persist)
		for i := range 3 {
			d.receive("private/ABCD1234/d/app/x", fmt.Sprint(i))
		}
		d.silent()
		pub.publish("private/ABCD1234/d/app/x", "room again", 1)
		d.receive("private/ABCD1234/d/app/x", "room again")
	}
}

// TestRetainedLimits bound topics and bytes per principal.
func TestRetainedLimits(t *testing.T) {
	r := newRig(t, func(r *rig) { r.limits.Device.Retained, r.limits.Device.RetainedBytes = 2, 100 })
	cert := r.device("ABCD1234")
	d := r.connect(cert, mqtt.V5, "ABCD1234")
	long := strings.Repeat("x", 60)
	for _, step := range []struct {
		topic, payload string
		want           mqtt.ReasonCode
	}{
		{"a", "1", mqtt.Success}, {"b", "1", mqtt.Success}, {"c", "1", mqtt.QuotaExceeded}, {"a", long, mqtt.Success},
		{"b", long, mqtt.QuotaExceeded}, {"a", "", mqtt.Success}, {"c", "1", mqtt.Success},
	} {
		if code := d.publish("private/ABCD1234/u/"+step.topic, step.payload, 1, retain); code != step.want {
			t.Fatalf("%v: %v", step, code)
		}
	}
	d.disconnect()
	c := r.dial(cert, mqtt.V5)
	ack := c.hello("ABCD1234", func(p *mqtt.Connect) {
		p.Will = &mqtt.Will{Topic: "private/ABCD1234/u/z", Payload: []byte("1"), Retain: true}
	})
	if ack.Code != mqtt.QuotaExceeded {
		t.Fatalf("a retained Will beyond the limit: %v", ack.Code)
	}
}

// TestOddTopics: what MQTT allows in a topic is carried unchanged, also where
// NATS gives it a meaning; the rest is refused.
func TestOddTopics(t *testing.T) {
	r := newRig(t)
	app := r.service("app", "r #", "w #")
	s, pub := r.connect(app, mqtt.V5, "s"), r.connect(app, mqtt.V5, "p")
	s.subscribe(1, "#")
	for _, topic := range []string{"a.b", "*", "a/*/b", ">", "a/>", "a b", " ", "/", "//", "a//b", "ü/€", strings.Repeat("l/", 500), "private/+x/u"[0:8] + "x"} {
		if code := pub.publish(topic, topic, 1); code != mqtt.Success {
			t.Fatalf("%q: %v", topic, code)
		}
		s.receive(topic, topic)
	}
	if code := pub.publish(strings.Repeat("x", 1025), "x", 1); code != mqtt.TopicNameInvalid {
		t.Fatalf("1025 bytes: %v", code)
	}
	for _, topic := range []string{"a\x00b", "\xff\xfe", "a/+", "a/#", "\xed\xa0\x80"} {
		c := r.connect(app, mqtt.V5, "bad")
		c.sendPublish(topic, "x", 1)
		if code := c.closed(); !code.Failed() {
			t.Fatalf("%q: %v", topic, code)
		}
	}
	s.silent()
	for _, filter := range []string{"a\x00b", "\xff", strings.Repeat("x", 1025)} {
		c := r.connect(app, mqtt.V311, "bad")
		c.send(&mqtt.Subscribe{PacketID: 1, Filters: []mqtt.Subscription{{Filter: filter}}})
		g, err := c.read(10 * time.Second)
		if err == nil && (g.typ != mqtt.SUBACK || !g.codes[0].Failed()) {
			t.Fatalf("%.10q: %+v", filter, g)
		}
	}
}

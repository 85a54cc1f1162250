package broker

import (
	"crypto/tls"
	"errors"
	"strings"
	"testing"
	"time"

	"hawser/internal/mqtt"
)

// refuses reads what answers a bad CONNECT: a CONNACK with want, or with Success
// none at all; then the end.
func (c *client) refuses(want mqtt.ReasonCode) {
	c.t.Helper()
	g, err := c.read(10 * time.Second)
	switch {
	case err == nil && g.typ == mqtt.CONNACK:
		if g.connack.Code != want || want == mqtt.Success {
			c.t.Fatalf("CONNACK %v, want %v", g.connack.Code, want)
		}
		if g.connack.SessionPresent { // [MQTT-3.2.2-6]
			c.t.Fatal("session present in a refusal")
		}
		c.closed() // [MQTT-3.2.2-7]
	case err == nil:
		c.t.Fatalf("%v instead of CONNACK", g.typ)
	case want != mqtt.Success:
		c.t.Fatalf("%v instead of CONNACK %v", err, want)
	}
}

// [MQTT-3.1.0-1]: the first packet is CONNECT. No CONNACK answers another.
func TestConformanceFirstPacketIsConnect(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	for _, p := range [][]byte{
		{0x20, 2, 0, 0}, {0x30, 3, 0, 1, 'a'}, {0x40, 2, 0, 1}, {0x62, 2, 0, 1}, {0x82, 6, 0, 1, 0, 1, 'a', 0},
		{0xa2, 5, 0, 1, 0, 1, 'a'}, {0xc0, 0}, {0xe0, 0}, {0xf0, 0}, {0x00, 0}, {0x16, 3, 1, 0, 0}, []byte("GET / HTTP/1.1\r\n\r\n"),
	} {
		c := r.dial(all, mqtt.V5)
		c.raw(p...)
		c.refuses(mqtt.Success)
	}
}

// [MQTT-3.1.0-2] and what only a server sends: protocol errors.
func TestConformanceUnexpectedPackets(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	for _, v := range bothVersions {
		c := r.connect(all, v, "c")
		c.send(&mqtt.Connect{Version: v, ClientID: "c", CleanStart: true})
		c.ends(mqtt.ProtocolError)
		for _, p := range [][]byte{{0x20, 2, 0, 0}, {0x90, 3, 0, 1, 0}, {0xb0, 2, 0, 1}, {0xd0, 0}, {0xf0, 0}} {
			c := r.connect(all, v, "c")
			c.raw(p...)
			c.ends(mqtt.ProtocolError)
		}
		for _, p := range [][]byte{{0x00, 0}, {0xc1, 0}, {0xc0, 1, 0}, {0xe1, 0}, {0xc0, 0x80, 0x80, 0x80, 0x80, 1}, {0xc0, 0x80, 0}} {
			c := r.connect(all, v, "c")
			c.raw(p...)
			c.ends(mqtt.MalformedPacket)
		}
	}
}

// connectPacket is a CONNECT made by hand.
func connectPacket(name string, level, flags byte, rest ...byte) []byte {
	body := append([]byte{0, byte(len(name))}, name...)
	body = append(body, level, flags)
	body = append(body, rest...)
	return append([]byte{0x10, byte(len(body))}, body...)
}

// [MQTT-3.1.2-1] to [MQTT-3.1.2-14], [MQTT-3.1.3-*], [MQTT-3.1.4-1] and
// [MQTT-3.1.4-2]. A bad CONNECT of 3.1.1 is closed without CONNACK
// (311:[MQTT-3.1.4-1]) but for the two cases that have a return code.
func TestConformanceBadConnect(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	none := mqtt.Success
	for what, c := range map[string]struct {
		v    mqtt.Version
		p    []byte
		want mqtt.ReasonCode
	}{
		"protocol name":                 {mqtt.V311, connectPacket("MQTX", 4, 2, 0, 9, 0, 1, 'c'), none},
		"3.1":                           {mqtt.V311, connectPacket("MQIsdp", 3, 2, 0, 9, 0, 1, 'c'), mqtt.UnsupportedProtocolVersion},
		"level 6":                       {mqtt.V311, connectPacket("MQTT", 6, 2, 0, 9, 0, 1, 'c'), mqtt.UnsupportedProtocolVersion},
		"reserved flag 311":             {mqtt.V311, connectPacket("MQTT", 4, 3, 0, 9, 0, 1, 'c'), none},
		"reserved flag":                 {mqtt.V5, connectPacket("MQTT", 5, 3, 0, 9, 0, 0, 1, 'c'), mqtt.MalformedPacket},
		"will QoS without will 311":     {mqtt.V311, connectPacket("MQTT", 4, 0x0a, 0, 9, 0, 1, 'c'), none},
		"will QoS without will":         {mqtt.V5, connectPacket("MQTT", 5, 0x0a, 0, 9, 0, 0, 1, 'c'), mqtt.MalformedPacket},
		"will retain without will":      {mqtt.V5, connectPacket("MQTT", 5, 0x22, 0, 9, 0, 0, 1, 'c'), mqtt.MalformedPacket},
		"will QoS 3":                    {mqtt.V5, connectPacket("MQTT", 5, 0x1e, 0, 9, 0, 0, 1, 'c', 0, 0, 1, 't', 0, 0), mqtt.MalformedPacket},
		"will topic missing":            {mqtt.V5, connectPacket("MQTT", 5, 0x06, 0, 9, 0, 0, 1, 'c'), mqtt.MalformedPacket},
		"password alone 311":            {mqtt.V311, connectPacket("MQTT", 4, 0x42, 0, 9, 0, 1, 'c', 0, 1, 'p'), none},
		"password missing":              {mqtt.V311, connectPacket("MQTT", 4, 0xc2, 0, 9, 0, 1, 'c', 0, 1, 'u'), none},
		"client id missing":             {mqtt.V5, connectPacket("MQTT", 5, 2, 0, 9, 0), mqtt.MalformedPacket},
		"client id U+0000 311":          {mqtt.V311, connectPacket("MQTT", 4, 2, 0, 9, 0, 1, 0), none},
		"client id U+0000":              {mqtt.V5, connectPacket("MQTT", 5, 2, 0, 9, 0, 0, 1, 0), mqtt.MalformedPacket},
		"client id not UTF-8":           {mqtt.V5, connectPacket("MQTT", 5, 2, 0, 9, 0, 0, 3, 0xed, 0xa0, 0x80), mqtt.MalformedPacket},
		"empty client id, not clean":    {mqtt.V311, connectPacket("MQTT", 4, 0, 0, 9, 0, 0), mqtt.ClientIdentifierNotValid},
		"bytes after the end":           {mqtt.V5, connectPacket("MQTT", 5, 2, 0, 9, 0, 0, 1, 'c', 0), mqtt.MalformedPacket},
		"bytes after the end 311":       {mqtt.V311, connectPacket("MQTT", 4, 2, 0, 9, 0, 1, 'c', 0), none},
		"property twice":                {mqtt.V5, connectPacket("MQTT", 5, 2, 0, 9, 6, 0x21, 0, 9, 0x21, 0, 9, 0, 1, 'c'), mqtt.ProtocolError},
		"receive maximum 0":             {mqtt.V5, connectPacket("MQTT", 5, 2, 0, 9, 3, 0x21, 0, 0, 0, 1, 'c'), mqtt.ProtocolError},
		"maximum packet size 0":         {mqtt.V5, connectPacket("MQTT", 5, 2, 0, 9, 5, 0x27, 0, 0, 0, 0, 0, 1, 'c'), mqtt.ProtocolError},
		"request problem information 2": {mqtt.V5, connectPacket("MQTT", 5, 2, 0, 9, 2, 0x17, 2, 0, 1, 'c'), mqtt.ProtocolError},
		"property of another packet":    {mqtt.V5, connectPacket("MQTT", 5, 2, 0, 9, 3, 0x23, 0, 1, 0, 1, 'c'), mqtt.ProtocolError},
		"unknown property":              {mqtt.V5, connectPacket("MQTT", 5, 2, 0, 9, 2, 0x7f, 0, 0, 1, 'c'), mqtt.MalformedPacket},
		"properties beyond the end":     {mqtt.V5, connectPacket("MQTT", 5, 2, 0, 9, 50, 0, 1, 'c'), mqtt.MalformedPacket},
		"authentication data alone":     {mqtt.V5, connectPacket("MQTT", 5, 2, 0, 9, 4, 0x16, 0, 1, 'x', 0, 1, 'c'), mqtt.ProtocolError},
		"authentication method":         {mqtt.V5, connectPacket("MQTT", 5, 2, 0, 9, 4, 0x15, 0, 1, 'x', 0, 1, 'c'), mqtt.BadAuthenticationMethod},
		"will properties of a PUBLISH":  {mqtt.V5, connectPacket("MQTT", 5, 6, 0, 9, 0, 0, 1, 'c', 3, 0x23, 0, 1, 0, 1, 't', 0, 0), mqtt.ProtocolError},
		"fixed header flags":            {mqtt.V311, append([]byte{0x11}, connectPacket("MQTT", 4, 2, 0, 9, 0, 1, 'c')[1:]...), none},
	} {
		t.Log(what)
		cl := r.dial(all, c.v)
		cl.raw(c.p...)
		cl.refuses(c.want)
	}
}

// Names and passwords may be there ([MQTT-3.1.2-16] to [MQTT-3.1.2-19]) and mean
// nothing here; 5.0 allows a password alone.
func TestConformanceCredentialsMeanNothing(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	for _, v := range bothVersions {
		r.connect(all, v, "c", func(p *mqtt.Connect) {
			p.HasUsername, p.Username, p.HasPassword, p.Password = true, "u", true, []byte("p")
		}).silent()
		r.connect(all, v, "c", func(p *mqtt.Connect) { p.HasUsername = true }).silent()
	}
	r.connect(all, mqtt.V5, "c", func(p *mqtt.Connect) { p.HasPassword, p.Password = true, []byte("p") }).silent()
}

// [MQTT-3.1.3-5] to [MQTT-3.1.3-8], [MQTT-3.2.2-16]: any client id, and a name
// for who has none.
func TestConformanceClientIDs(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	for _, v := range bothVersions {
		for _, id := range []string{"0", "0123456789abcdefghijklmnopqrstuvwxyzABCDE", "a/b c#+$", "ABCD1234", "Zürich", strings.Repeat("x", 1000)} {
			c := r.connect(all, v, id).sub(0, "x")
			c.silent()
			c.disconnect()
		}
	}
	r.connect(all, mqtt.V311, "").silent()
	seen := map[string]bool{}
	for _, clean := range []bool{true, false} {
		c := r.dial(all, mqtt.V5)
		a := c.hello("", func(p *mqtt.Connect) { p.CleanStart, p.Props.SessionExpiry = clean, 60 })
		if id := a.Props.AssignedClientID; a.Code != mqtt.Success || id == "" || seen[id] {
			t.Fatalf("%+v", a)
		}
		seen[a.Props.AssignedClientID] = true
		c.drop()
	}
	for id := range seen {
		c := r.dial(all, mqtt.V5)
		if a := c.hello(id, persist); !a.SessionPresent || a.Props.AssignedClientID != "" {
			t.Fatalf("the assigned id has no session: %+v", a)
		}
	}
}

// 3.2.2.3: what the server allows stands in CONNACK, and nothing that is as
// asked for.
func TestConformanceConnackProperties(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	a := r.dial(all, mqtt.V5).hello("c", persist)
	p, l := a.Props, r.limits
	if p.ReceiveMaximum != l.Service.ReceiveMax || int(p.MaxPacketSize) != l.MaxPacket || p.TopicAliasMax != l.TopicAliases ||
		p.HasSessionExpiry || p.HasKeepAlive || p.NoRetain || p.NoShared || p.NoSubIDs || p.NoWildcard || p.QoS0Only || p.QoS1Only {
		t.Fatalf("%+v", p)
	}
	a = r.dial(all, mqtt.V5).hello("c", func(p *mqtt.Connect) { p.Props.SessionExpiry = 0xffffffff })
	if !a.Props.HasSessionExpiry || a.Props.SessionExpiry != l.MaxExpiry {
		t.Fatalf("session expiry is cut without a word: %+v", a.Props)
	}
}

// [MQTT-3.1.2-4] to [MQTT-3.1.2-6], [MQTT-3.2.2-2] to [MQTT-3.2.2-5].
func TestConformanceSessionPresent(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	keep := func(clean bool, expiry uint32) func(*mqtt.Connect) {
		return func(p *mqtt.Connect) { p.CleanStart, p.Props.SessionExpiry = clean, expiry }
	}
	for i, step := range []struct {
		v       mqtt.Version
		clean   bool
		expiry  uint32
		drop    bool
		present bool
	}{
		{mqtt.V5, false, 0, false, false},
		{mqtt.V5, false, 60, false, false}, // the one before ended with its connection
		{mqtt.V5, false, 60, true, true},
		{mqtt.V5, true, 60, true, false},
		{mqtt.V5, false, 0, true, true}, // resumed, and ends this time
		{mqtt.V5, false, 0, true, false},
		{mqtt.V311, false, 0, true, false},
		{mqtt.V311, false, 0, false, true},
		{mqtt.V5, false, 60, false, true},
		{mqtt.V311, true, 0, false, false},
		{mqtt.V311, false, 0, false, false}, // 311: a clean session is never resumed
		{mqtt.V311, false, 0, false, true},
	} {
		c := r.dial(all, step.v)
		if a := c.hello("c", keep(step.clean, step.expiry)); a.SessionPresent != step.present {
			t.Fatalf("step %d: session present %v", i, a.SessionPresent)
		}
		if step.drop {
			c.drop()
		} else {
			c.disconnect()
		}
	}
}

// [MQTT-3.1.4-3]: the same client id again takes the session over.
func TestConformanceTakeover(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		pub := r.connect(all, v, "pub")
		old := r.connect(all, v, "c", persist).sub(1, "t")
		pub.publish("t", "1", 1)
		lost := old.expect(mqtt.PUBLISH)
		c := r.dial(all, v)
		if !c.hello("c", persist).SessionPresent {
			t.Fatal("session is gone")
		}
		old.ends(mqtt.SessionTakenOver)
		if p := c.message(); p.PacketID != lost.pid || !p.Dup {
			t.Fatalf("not sent again as it was: %+v", p)
		}
		pub.publish("t", "2", 1)
		c.receive("t", "2")
	})
}

// [MQTT-3.1.2-22]: 1.5 times the keep alive, then the end with 0x8D; 0 is never.
func TestConformanceKeepAlive(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		never := r.connect(all, v, "never", func(p *mqtt.Connect) { p.KeepAlive = 0 })
		began := time.Now()
		c := r.connect(all, v, "c", func(p *mqtt.Connect) { p.KeepAlive = 1 })
		c.ends(mqtt.KeepAliveTimeout)
		if d := time.Since(began); d < 1200*time.Millisecond || d > 3*time.Second {
			t.Fatalf("closed after %v", d)
		}
		never.silent()
	})
}

// 3.1.4: a client need not wait for CONNACK, which comes first ([MQTT-3.2.0-1]).
func TestConformancePacketsRightAfterConnect(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		c := r.dial(all, v)
		b := (&mqtt.Connect{Version: v, CleanStart: true, ClientID: "c"}).Append(nil, v)
		b = (&mqtt.Subscribe{PacketID: 1, Filters: []mqtt.Subscription{{Filter: "t"}}}).Append(b, v)
		b = (&mqtt.Publish{Topic: []byte("t"), Payload: []byte("x")}).Append(b, v)
		c.raw((&mqtt.Ping{Type: mqtt.PINGREQ}).Append(b, v)...)
		c.expect(mqtt.CONNACK)
		c.expect(mqtt.SUBACK)
		for ping, came := false, false; !ping || !came; {
			g := c.next()
			ping, came = ping || g.typ == mqtt.PINGRESP, came || g.typ == mqtt.PUBLISH
		}
		one := r.dial(all, v) // byte by byte
		for _, x := range (&mqtt.Connect{Version: v, CleanStart: true, ClientID: "one"}).Append(nil, v) {
			one.raw(x)
		}
		one.expect(mqtt.CONNACK)
	})
}

// [MQTT-3.14.2-2] and 3.14.2.2.2: DISCONNECT may change the session expiry, but
// not raise it from 0.
func TestConformanceDisconnectExpiry(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	c := r.connect(all, mqtt.V5, "c", persist)
	c.send(&mqtt.Disconnect{HasSessionExpiry: true})
	c.closed()
	if c = r.dial(all, mqtt.V5); c.hello("c", persist).SessionPresent {
		t.Fatal("session outlived its end")
	}
	c.disconnect()
	c = r.connect(all, mqtt.V5, "c")
	c.send(&mqtt.Disconnect{HasSessionExpiry: true, SessionExpiry: 60})
	c.ends(mqtt.ProtocolError)
}

// [MQTT-3.1.2-23]: a session ends when its expiry has passed.
func TestConformanceSessionExpiry(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	c := r.connect(all, mqtt.V5, "c", persist).sub(1, "t")
	c.drop()
	r.b.mu.Lock()
	for _, s := range r.b.sessions {
		s.mu.Lock()
		s.offline = s.offline.Add(-3601 * time.Second)
		s.mu.Unlock()
	}
	r.b.mu.Unlock()
	r.connect(all, mqtt.V5, "pub").publish("t", "x", 1)
	c = r.dial(all, mqtt.V5)
	if c.hello("c", persist).SessionPresent {
		t.Fatal("session is still there")
	}
	c.silent()
}

// [MQTT-3.14.4-1], 5.0 4.13 and 311:[MQTT-4.8.0-1]: after DISCONNECT nothing counts.
func TestConformanceNothingAfterDisconnect(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		sub := r.connect(all, v, "sub").sub(0, "t")
		c := r.connect(all, v, "c")
		b := (&mqtt.Disconnect{}).Append(nil, v)
		c.raw((&mqtt.Publish{Topic: []byte("t")}).Append(b, v)...)
		if _, err := c.read(10 * time.Second); err == nil || errors.Is(err, errors.ErrUnsupported) {
			t.Fatal("something came after DISCONNECT")
		}
		r.connect(all, v, "d").publish("x", "", 1) // a frame later
		sub.silent()
	})
}

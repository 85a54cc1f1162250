package broker

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"strings"
	"testing"

	"hawser/internal/mqtt"
)

// publishProps is every property that is passed on, user properties in an order
// and one of them twice.
func publishProps() []byte {
	b := []byte{0x01, 1, 0x03, 0, 4, 't', 'e', 'x', 't', 0x08, 0, 5, 'r', 'e', 'p', 'l', 'y', 0x09, 0, 3, 0, 1, 2}
	for _, kv := range []string{"b", "a", "b", "c", "a"} {
		b = mqtt.AppendUserProperty(b, kv, kv+"!")
	}
	return b
}

// [MQTT-3.3.2-4], [MQTT-3.3.2-15] to [MQTT-3.3.2-20]: properties are passed on
// unaltered and in order, live and retained; to 3.1.1 without them.
func TestConformancePropertiesAreForwarded(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	sub, old, pub := r.connect(all, mqtt.V5, "sub").sub(2, "t"), r.connect(all, mqtt.V311, "old").sub(2, "t"), r.connect(all, mqtt.V5, "pub")
	want := publishProps()
	for qos := byte(0); qos <= 2; qos++ {
		pub.publish("t", "x", qos, retain, func(p *mqtt.Publish) { p.Forward = want })
		old.receive("t", "x")
		for _, c := range []*client{sub, r.connect(all, mqtt.V5, "late").sub(2, "t")} {
			if p := c.receive("t", "x"); !bytes.Equal(p.Forward, want) || p.HasExpiry {
				t.Fatalf("%q", p.Forward)
			}
		}
	}
}

// 3.3.4.1 and [MQTT-3.3.2-13], [MQTT-3.3.2-14]: request and response.
func TestConformanceRequestResponse(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	server, asker := r.connect(all, mqtt.V5, "server").sub(1, "ask"), r.connect(all, mqtt.V5, "asker").sub(1, "reply")
	asker.publish("ask", "?", 1, func(p *mqtt.Publish) { p.Forward = publishProps() })
	server.message()
	server.publish("reply", "!", 1, func(p *mqtt.Publish) { p.Forward = []byte{0x09, 0, 3, 0, 1, 2} })
	if p := asker.receive("reply", "!"); !bytes.Equal(p.Forward, []byte{0x09, 0, 3, 0, 1, 2}) {
		t.Fatalf("%q", p.Forward)
	}
}

// [MQTT-3.3.1-2], [MQTT-3.3.1-4], [MQTT-3.3.2-1], [MQTT-3.3.2-2], [MQTT-3.3.2-7]
// to [MQTT-3.3.2-9], [MQTT-3.3.2-14], [MQTT-3.3.4-6], [MQTT-2.2.1-3], [MQTT-1.5.4-*].
func TestConformanceBadPublish(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	pub := func(first byte, body ...byte) []byte { return append([]byte{0x30 | first, byte(len(body))}, body...) }
	both := map[string][]byte{
		"QoS 3":              pub(0x06, 0, 1, 't', 0, 1, 0),
		"DUP at QoS 0":       pub(0x08, 0, 1, 't', 0),
		"wildcard +":         pub(0, 0, 1, '+', 0),
		"wildcard #":         pub(0, 0, 3, 'a', '/', '#', 0),
		"U+0000":             pub(0, 0, 1, 0, 0),
		"not UTF-8":          pub(0, 0, 2, 0xc3, 0x28, 0),
		"topic beyond end":   pub(0, 0, 9, 't', 0),
		"no topic":           pub(0, 0, 0, 0),
		"packet id 0":        pub(0x02, 0, 1, 't', 0, 0, 0),
		"packet id cut":      pub(0x02, 0, 1, 't', 0),
		"nothing in it":      pub(0),
		"length without end": {0x30, 0xff, 0xff, 0xff, 0xff, 0x01},
	}
	for what, p := range both {
		for _, v := range bothVersions {
			t.Log(what, v)
			c := r.connect(all, v, "c")
			c.raw(p...)
			if code := c.closed(); v == mqtt.V5 && code != mqtt.MalformedPacket && code != mqtt.ProtocolError {
				t.Fatalf("DISCONNECT %v", code)
			}
		}
	}
	for what, x := range map[string]struct {
		p    []byte
		want mqtt.ReasonCode
	}{
		"alias 0":                 {pub(0, 0, 1, 't', 3, 0x23, 0, 0), mqtt.TopicAliasInvalid},
		"alias above the maximum": {pub(0, 0, 1, 't', 3, 0x23, 0, 17), mqtt.TopicAliasInvalid},
		"alias never set":         {pub(0, 0, 0, 3, 0x23, 0, 3), mqtt.ProtocolError},
		"alias twice":             {pub(0, 0, 1, 't', 6, 0x23, 0, 1, 0x23, 0, 1), mqtt.ProtocolError},
		"no topic and no alias":   {pub(0, 0, 0, 0), mqtt.ProtocolError},
		"subscription identifier": {pub(0, 0, 1, 't', 2, 0x0b, 1), mqtt.ProtocolError},
		"payload format 2":        {pub(0, 0, 1, 't', 2, 0x01, 2), mqtt.ProtocolError},
		"payload format twice":    {pub(0, 0, 1, 't', 4, 0x01, 1, 0x01, 1), mqtt.ProtocolError},
		"response topic wildcard": {pub(0, 0, 1, 't', 4, 0x08, 0, 1, '#'), mqtt.MalformedPacket},
		"property of CONNECT":     {pub(0, 0, 1, 't', 5, 0x11, 0, 0, 0, 1), mqtt.ProtocolError},
		"unknown property":        {pub(0, 0, 1, 't', 2, 0x05, 0), mqtt.MalformedPacket},
		"properties beyond end":   {pub(0, 0, 1, 't', 9, 0x01, 1), mqtt.MalformedPacket},
		"user property cut":       {pub(0, 0, 1, 't', 4, 0x26, 0, 1, 'k'), mqtt.MalformedPacket},
		"length too long":         {pub(0, 0, 1, 't', 0x80, 0), mqtt.MalformedPacket},
	} {
		t.Log(what)
		c := r.connect(all, mqtt.V5, "c")
		c.raw(x.p...)
		c.ends(x.want)
	}
}

// 3.1.2.11.4 and [MQTT-3.2.2-15]: a packet above the server's maximum is refused
// by its length alone.
func TestConformanceServerMaximumPacketSize(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	for _, v := range bothVersions {
		sub, pub := r.connect(all, v, "sub").sub(1, "t"), r.connect(all, v, "pub")
		fits := strings.Repeat("x", r.limits.MaxPacket-100)
		pub.publish("t", fits, 1)
		sub.receive("t", fits)
		pub.raw(mqtt.AppendHeader(nil, mqtt.PUBLISH, 0, r.limits.MaxPacket)...)
		pub.ends(mqtt.PacketTooLarge)
		sub.disconnect()
	}
}

// [MQTT-3.3.2-8] to [MQTT-3.3.2-12]: an alias belongs to one connection, can be
// changed, and is not seen by anybody else.
func TestConformanceTopicAlias(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	sub, pub := r.connect(all, mqtt.V5, "sub").sub(2, "#"), r.connect(all, mqtt.V5, "pub", persist)
	alias := func(n uint16) func(*mqtt.Publish) { return func(p *mqtt.Publish) { p.Alias = n } }
	for i, step := range []struct {
		topic, want string
		alias       uint16
	}{{"a", "a", 1}, {"", "a", 1}, {"b", "b", 16}, {"", "b", 16}, {"c", "c", 1}, {"", "c", 1}, {"", "b", 16}, {"a", "a", 0}} {
		for qos := byte(0); qos <= 2; qos++ {
			pub.publish(step.topic, fmt.Sprint(i), qos, alias(step.alias))
			if p := sub.receive(step.want, fmt.Sprint(i)); p.Alias != 0 { // the subscriber allowed none
				t.Fatalf("alias %d", p.Alias)
			}
		}
	}
	pub.drop()
	pub = r.connect(all, mqtt.V5, "pub", persist)
	pub.sendPublish("", "x", 0, alias(1))
	pub.ends(mqtt.ProtocolError)
}

// [MQTT-4.3.3-8] to [MQTT-4.3.3-13]: method B at the receiver. A packet id is
// one message until PUBREL, and another one after it.
func TestConformanceQoS2FromClient(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		sub, pub := r.connect(all, v, "sub").sub(2, "t"), r.connect(all, v, "pub", persist)
		send := func(payload string, dup bool) {
			t.Helper()
			pub.sendPublish("t", payload, 2, func(p *mqtt.Publish) { p.PacketID, p.Dup = 7, dup })
			if g := pub.expect(mqtt.PUBREC); g.pid != 7 || g.ack.Code != mqtt.Success {
				t.Fatalf("%+v", g.ack)
			}
		}
		again := func() {
			pub.drop()
			pub = r.connect(all, v, "pub", persist)
		}
		send("1", false)
		sub.receive("t", "1")
		send("1", true)
		again()
		send("1", true)
		send("1", false) // [MQTT-3.3.1-3]: DUP is not looked at
		for range 2 {    // PUBREL again because PUBCOMP was lost: the id is unknown then
			pub.ack(mqtt.PUBREL, 7)
			if g := pub.expect(mqtt.PUBCOMP); g.pid != 7 {
				t.Fatalf("%+v", g.ack)
			}
			again()
		}
		send("2", false)
		sub.receive("t", "2")
		again()
		pub.ack(mqtt.PUBREL, 7)
		pub.expect(mqtt.PUBCOMP)
		send("3", true) // new, whatever its DUP says
		sub.receive("t", "3")
		sub.silent()
	})
}

// [MQTT-3.5.2-1], [MQTT-3.6.2-1], [MQTT-3.7.2-1] and 4.3.3: acknowledgements of
// what is not known are answered, or passed over; malformed ones are not.
func TestConformanceUnknownAndBadAcks(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		notFound := mqtt.Success
		if v == mqtt.V5 {
			notFound = mqtt.PacketIDNotFound
		}
		c := r.connect(all, v, "c")
		c.ack(mqtt.PUBACK, 99)
		c.ack(mqtt.PUBCOMP, 99)
		c.silent()
		c.ack(mqtt.PUBREL, 99)
		if g := c.expect(mqtt.PUBCOMP); g.pid != 99 || g.ack.Code != notFound {
			t.Fatalf("%+v", g.ack)
		}
		c.ack(mqtt.PUBREC, 99)
		if g := c.expect(mqtt.PUBREL); g.pid != 99 || g.ack.Code != notFound {
			t.Fatalf("%+v", g.ack)
		}
		for _, p := range [][]byte{{0x40, 1, 0}, {0x41, 2, 0, 1}, {0x60, 2, 0, 1}, {0x72, 2, 0, 1}, {0x50, 0}} {
			c := r.connect(all, v, "c")
			c.raw(p...)
			c.ends(mqtt.MalformedPacket)
		}
		for _, p := range [][]byte{{0x40, 2, 0, 0}, {0x62, 2, 0, 0}} {
			c := r.connect(all, v, "c")
			c.raw(p...)
			c.ends(mqtt.ProtocolError)
		}
		if v == mqtt.V5 {
			for _, p := range [][]byte{{0x40, 3, 0, 1, 0x02}, {0x62, 3, 0, 1, 0x10}, {0x40, 6, 0, 1, 0, 2, 0x01, 1}} {
				c := r.connect(all, v, "c")
				c.raw(p...)
				c.ends(mqtt.ProtocolError)
			}
		}
	})
}

// [MQTT-4.6.0-2] to [MQTT-4.6.0-4]: acknowledgements in the order of arrival, at
// any mixture; 5.0 4.9: as many at a time as the receive maximum says, and QoS 0
// and what is acknowledged do not count.
func TestConformanceAckOrder(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		c := r.connect(all, v, "c")
		n := int(r.limits.Service.ReceiveMax)
		for _, qos := range []byte{1, 2} {
			var b []byte
			for range 3 * n {
				b = (&mqtt.Publish{Topic: []byte("t")}).Append(b, v)
			}
			for i := range n {
				p := mqtt.Publish{Topic: []byte("t"), Payload: []byte("x"), QoS: qos, PacketID: uint16(1000 + i)}
				b = p.Append(b, v)
			}
			c.raw(b...)
			for i := range n {
				if g := c.expect(mqtt.PUBACK + mqtt.Type(qos-1)); int(g.pid) != 1000+i {
					t.Fatalf("%v of %d, want %d", g.typ, g.pid, 1000+i)
				}
			}
		}
		var b []byte
		for i := range n {
			b = (&mqtt.Ack{Type: mqtt.PUBREL, PacketID: uint16(1000 + i)}).Append(b, v)
		}
		c.raw(b...)
		for i := range n {
			if g := c.expect(mqtt.PUBCOMP); int(g.pid) != 1000+i {
				t.Fatalf("PUBCOMP of %d, want %d", g.pid, 1000+i)
			}
		}
		c.publish("t", "", 1)
	})
}

// 3.2.2.3.3: more unacknowledged messages than the receive maximum end the
// connection. A new connection counts anew (4.9).
func TestConformanceReceiveMaximumOfServer(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	n := int(r.limits.Service.ReceiveMax)
	c := r.connect(all, mqtt.V5, "c", persist)
	for range n {
		c.sendPublish("t", "x", 2)
		c.expect(mqtt.PUBREC)
	}
	c.drop()
	c.hello2(all, n)
	c.sendPublish("t", "x", 1)
	c.ends(mqtt.ReceiveMaximumExceeded)
}

// hello2 comes back and sends n further messages of QoS 2.
func (c *client) hello2(cert tls.Certificate, n int) {
	c.t.Helper()
	next := c.r.connect(cert, c.v, "c", persist)
	next.pid = c.pid
	*c = *next
	for range n {
		c.sendPublish("t", "x", 2)
		c.expect(mqtt.PUBREC)
	}
}

package broker

import (
	"crypto/tls"
	"fmt"
	"slices"
	"testing"

	"hawser/internal/mqtt"
)

// [MQTT-3.8.4-1] to [MQTT-3.8.4-6], [MQTT-3.9.3-1], 311:[MQTT-3.9.3-2]: one
// SUBACK, one code for each filter, in their order.
func TestConformanceSuback(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, _ tls.Certificate, v mqtt.Version) {
		c := r.connect(r.service("some", "r ok/#"), v, "c")
		refused := mqtt.UnspecifiedError
		if v == mqtt.V5 {
			refused = mqtt.NotAuthorized
		}
		got := c.subscribeWith(0, mqtt.Subscription{Filter: "ok/1", QoS: 1}, mqtt.Subscription{Filter: "no/1", QoS: 1},
			mqtt.Subscription{Filter: "ok/2", QoS: 2}, mqtt.Subscription{Filter: "#"}, mqtt.Subscription{Filter: "ok/#"})
		if want := []mqtt.ReasonCode{1, refused, 2, refused, 0}; !slices.Equal(got, want) {
			t.Fatalf("SUBACK %v, want %v", got, want)
		}
		var many []mqtt.Subscription
		for i := range 1000 {
			many = append(many, mqtt.Subscription{Filter: fmt.Sprintf("ok/many/%d", i), QoS: byte(i % 3)})
		}
		for i, code := range c.subscribeWith(0, many...) {
			if int(code) != i%3 {
				t.Fatalf("filter %d: %v", i, code)
			}
		}
	})
}

// [MQTT-3.8.1-1], [MQTT-3.8.3-1] to [MQTT-3.8.3-5], [MQTT-3.10.1-1],
// [MQTT-3.10.3-1], [MQTT-3.10.3-2], [MQTT-4.7.1-1], [MQTT-4.7.1-2], [MQTT-4.8.2-1],
// [MQTT-4.8.2-2].
func TestConformanceBadSubscribe(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	list := func(first byte, v mqtt.Version, rest ...byte) []byte {
		body := []byte{0, 1}
		if v == mqtt.V5 {
			body = append(body, 0)
		}
		body = append(body, rest...)
		return append([]byte{first, byte(len(body))}, body...)
	}
	for _, v := range bothVersions {
		for what, p := range map[string][]byte{
			"flags":                     list(0x80, v, 0, 1, 'a', 0),
			"no filter":                 list(0x82, v),
			"no options":                list(0x82, v, 0, 1, 'a'),
			"QoS 3":                     list(0x82, v, 0, 1, 'a', 3),
			"reserved bits":             list(0x82, v, 0, 1, 'a', 0xc0),
			"empty filter":              list(0x82, v, 0, 0, 0),
			"# not last":                list(0x82, v, 0, 3, '#', '/', 'a', 0),
			"# not a level":             list(0x82, v, 0, 2, 'a', '#', 0),
			"+ not a level":             list(0x82, v, 0, 2, '+', 'a', 0),
			"U+0000":                    list(0x82, v, 0, 1, 0, 0),
			"unsubscribe flags":         list(0xa0, v, 0, 1, 'a'),
			"unsubscribe without any":   list(0xa2, v),
			"unsubscribe bad filter":    list(0xa2, v, 0, 2, 'a', '#'),
			"unsubscribe bytes cut":     list(0xa2, v, 0, 9, 'a'),
			"packet id 0":               {0x82, 7, 0, 0, 0, 0, 1, 'a', 0},
			"unsubscribe packet id 0":   {0xa2, 6, 0, 0, 0, 0, 1, 'a'},
			"second filter is cut away": list(0x82, v, 0, 1, 'a', 0, 0, 4, 'b'),
		} {
			t.Log(what, v)
			c := r.connect(all, v, "c")
			c.raw(p...)
			if code := c.closed(); v == mqtt.V5 && code != mqtt.MalformedPacket && code != mqtt.ProtocolError {
				t.Fatalf("DISCONNECT %v", code)
			}
		}
	}
	share := func(s string, o byte) []byte {
		return list(0x82, mqtt.V5, append(append([]byte{0, byte(len(s))}, s...), o)...)
	}
	for what, p := range map[string][]byte{
		"retain handling 3":         list(0x82, mqtt.V5, 0, 1, 'a', 0x30),
		"subscription identifier 0": {0x82, 9, 0, 1, 2, 0x0b, 0, 0, 1, 'a', 0},
		"two identifiers":           {0x82, 11, 0, 1, 4, 0x0b, 1, 0x0b, 2, 0, 1, 'a', 0},
		"share without a group":     share("$share//a", 0),
		"share without a filter":    share("$share/g", 0),
		"share with an empty one":   share("$share/g/", 0),
		"share with a wildcard":     share("$share/g+/a", 0),
		"shared and No Local":       share("$share/g/a", 4),
	} {
		t.Log(what)
		c := r.connect(all, mqtt.V5, "c")
		c.raw(p...)
		if code := c.closed(); code != mqtt.MalformedPacket && code != mqtt.ProtocolError {
			t.Fatalf("DISCONNECT %v", code)
		}
	}
}

// [MQTT-3.8.4-8] and 3.8.4: the QoS of a delivery is the lower one.
func TestConformanceQoSIsTheLowerOne(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		pub := r.connect(all, v, "pub")
		for granted := byte(0); granted <= 2; granted++ {
			c := r.connect(all, v, "c", persist).sub(granted, "t")
			for qos := byte(0); qos <= 2; qos++ {
				pub.publish("t", "x", qos)
				if p := c.receive("t", "x"); p.QoS != min(qos, granted) {
					t.Fatalf("published %d, granted %d, came %d", qos, granted, p.QoS)
				}
			}
			c.silent()
			c.disconnect()
		}
	})
}

// [MQTT-3.3.4-2] to [MQTT-3.3.4-5], 311:[MQTT-3.3.5-1]: overlapping filters give
// one copy with the highest QoS and every identifier.
func TestConformanceOverlap(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		pub, c := r.connect(all, v, "pub"), r.connect(all, v, "c", persist)
		c.subscribeWith(1, mqtt.Subscription{Filter: "a/#", QoS: 0})
		c.subscribeWith(268435455, mqtt.Subscription{Filter: "a/+", QoS: 2})
		c.subscribeWith(0, mqtt.Subscription{Filter: "#", QoS: 1})
		check := func(p mqtt.Publish) {
			t.Helper()
			slices.Sort(p.SubIDs)
			if p.QoS != 2 || v == mqtt.V5 && !slices.Equal(p.SubIDs, []uint32{1, 268435455}) {
				t.Fatalf("%+v", p)
			}
		}
		pub.publish("a/b", "live", 2)
		check(c.receive("a/b", "live"))
		c.silent()
		c.drop()
		pub.publish("a/b", "kept", 2)
		c = r.connect(all, v, "c", persist)
		check(c.receive("a/b", "kept"))
		c.silent()
	})
}

// [MQTT-3.8.4-3], [MQTT-3.8.4-4]: the same filter again replaces the options and
// identifier of a subscription, and no message is lost by it.
func TestConformanceSubscribeAgain(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	pub, c := r.connect(all, mqtt.V5, "pub"), r.connect(all, mqtt.V5, "c")
	c.subscribeWith(1, mqtt.Subscription{Filter: "t", QoS: 2})
	c.subscribeWith(9, mqtt.Subscription{Filter: "t", QoS: 1})
	pub.publish("t", "x", 2)
	if p := c.receive("t", "x"); p.QoS != 1 || !slices.Equal(p.SubIDs, []uint32{9}) {
		t.Fatalf("%+v", p)
	}
	c.subscribeWith(0, mqtt.Subscription{Filter: "t", QoS: 1})
	pub.publish("t", "y", 2)
	if p := c.receive("t", "y"); len(p.SubIDs) > 0 {
		t.Fatalf("%+v", p)
	}
	c.silent()
}

// [MQTT-3.8.3-3]: No Local keeps back what this client id has published, live,
// retained and queued, and nothing else.
func TestConformanceNoLocal(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	c, other := r.connect(all, mqtt.V5, "c", persist), r.connect(all, mqtt.V5, "other")
	c.publish("own", "kept", 1, retain)
	other.publish("others", "kept", 1, retain)
	c.subscribeWith(0, mqtt.Subscription{Filter: "#", QoS: 2, NoLocal: true})
	c.receive("others", "kept")
	for qos := byte(0); qos <= 2; qos++ {
		c.publish("t", "own", qos)
		other.publish("t", "other", qos)
		c.receive("t", "other")
	}
	c.silent()
	c.subscribeWith(0, mqtt.Subscription{Filter: "loud", QoS: 1})
	c.sendPublish("loud", "own", 1)
	for range 2 { // PUBACK and PUBLISH in either order
		if g := c.next(); g.typ == mqtt.PUBLISH {
			c.ack(mqtt.PUBACK, g.pid)
		}
	}
	c.disconnect()
	c = r.connect(all, mqtt.V5, "c", persist)
	c.silent()

	cert := r.device("ABCD1234")
	dev := r.connect(cert, mqtt.V5, "ABCD1234", persist)
	dev.subscribeWith(0, mqtt.Subscription{Filter: "private/ABCD1234/#", QoS: 1, NoLocal: true})
	dev.publish("private/ABCD1234/own", "x", 1, retain)
	dev.publish("private/ABCD1234/own", "x", 0)
	dev.silent()
	other.publish("private/ABCD1234/d/app/x", "y", 1)
	dev.receive("private/ABCD1234/d/app/x", "y")
	dev.drop()
	dev = r.connect(cert, mqtt.V5, "ABCD1234", persist)
	dev.silent()
}

// [MQTT-3.11.3-1], [MQTT-3.11.3-2], [MQTT-3.10.4-1] to [MQTT-3.10.4-6].
func TestConformanceUnsubscribe(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		pub, c := r.connect(all, v, "pub"), r.connect(all, v, "c", persist)
		c.sub(2, "a", "b", "c/+", "c/#")
		got := c.unsubscribe("a", "nothing", "c/x", "c/+", "a")
		gone, none := mqtt.Success, mqtt.NoSubscriptionExisted
		if want := []mqtt.ReasonCode{gone, none, none, gone, none}; v == mqtt.V5 && !slices.Equal(got, want) {
			t.Fatalf("UNSUBACK %v, want %v", got, want)
		}
		pub.publish("a", "", 1)
		pub.publish("b", "1", 2)
		flying := c.expect(mqtt.PUBLISH)
		c.unsubscribe("b")
		pub.publish("b", "2", 2)
		c.ack(mqtt.PUBREC, flying.pid) // what has begun is completed
		c.expect(mqtt.PUBREL)
		c.ack(mqtt.PUBCOMP, flying.pid)
		pub.publish("c/x", "3", 1)
		c.receive("c/x", "3")
		c.silent()
		c.drop()
		pub.publish("a", "", 1)
		pub.publish("b", "", 1)
		c = r.connect(all, v, "c", persist)
		c.silent()
	})
}

// [MQTT-3.10.4-3] across connections: what was sent before UNSUBSCRIBE is sent
// again after it.
func TestConformanceUnsubscribeWithMessageInFlight(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		pub, c := r.connect(all, v, "pub"), r.connect(all, v, "c", persist).sub(2, "t")
		pub.publish("t", "1", 1)
		pub.publish("t", "2", 2)
		one, two := c.expect(mqtt.PUBLISH), c.expect(mqtt.PUBLISH)
		c.unsubscribe("t")
		c.drop()
		c = r.connect(all, v, "c", persist)
		for _, want := range []got{one, two} {
			if p := c.message(); p.PacketID != want.pid || !p.Dup {
				t.Fatalf("%+v", p)
			}
		}
		c.silent()
	})
}

package broker

import (
	"crypto/tls"
	"fmt"
	"slices"
	"testing"

	"hawser/internal/mqtt"
)

// [MQTT-3.3.1-5] to [MQTT-3.3.1-9], [MQTT-3.3.1-12], [MQTT-3.8.4-4]: the last one
// is kept at any QoS, an empty one clears and is not kept, the flag is set for a
// new subscription only.
func TestConformanceRetained(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		pub, live := r.connect(all, v, "pub"), r.connect(all, v, "live").sub(2, "#")
		for qos := byte(0); qos <= 2; qos++ {
			topic := fmt.Sprintf("t/%d", qos)
			pub.publish(topic, "old", 2-qos, retain)
			pub.publish(topic, "new", qos, retain)
			pub.publish(topic, "not kept", 1)
			for _, want := range []string{"old", "new", "not kept"} {
				if p := live.receive(topic, want); p.Retain {
					t.Fatal("RETAIN on a live message")
				}
			}
		}
		for granted := byte(0); granted <= 2; granted++ {
			c := r.connect(all, v, "c").sub(granted, "t/+")
			seen := map[string]bool{}
			for range 3 {
				p := c.message()
				if want := min(granted, p.Topic[2]-'0'); !p.Retain || string(p.Payload) != "new" || p.QoS != want {
					t.Fatalf("%+v", p)
				}
				seen[string(p.Topic)] = true
			}
			c.silent()
			c.sub(granted, "t/0") // again, in a filter of its own, and once more
			c.receive("t/0", "new")
			c.sub(granted, "t/0")
			c.receive("t/0", "new")
			c.silent()
			if len(seen) != 3 {
				t.Fatal(seen)
			}
			c.disconnect()
		}
		for qos := byte(0); qos <= 2; qos++ {
			topic := fmt.Sprintf("t/%d", qos)
			pub.publish(topic, "", qos, retain)
			live.receive(topic, "")
		}
		r.connect(all, v, "c").sub(1, "t/#").silent()
		live.silent()
	})
}

// [MQTT-3.3.1-10], [MQTT-3.3.1-11] and 3.8.3.1: the three ways of retain handling.
func TestConformanceRetainHandling(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	r.connect(all, mqtt.V5, "pub").publish("t", "x", 1, retain)
	c := r.connect(all, mqtt.V5, "c", persist)
	sub := func(rh byte, comes bool) {
		t.Helper()
		c.subscribeWith(0, mqtt.Subscription{Filter: "t", QoS: 1, RetainHandling: rh})
		if comes {
			c.receive("t", "x")
		}
		c.silent()
	}
	sub(2, false)
	sub(1, false) // it exists already
	sub(0, true)
	sub(0, true)
	c.unsubscribe("t")
	sub(1, true)
	sub(1, false)
	c.drop()
	c = r.connect(all, mqtt.V5, "c", persist)
	c.silent() // a resumed session is no new subscription
	sub(1, false)
	sub(2, false)
}

// [MQTT-3.3.1-12], [MQTT-3.3.1-13] and 3.8.3.1: Retain As Published.
func TestConformanceRetainAsPublished(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	pub, c := r.connect(all, mqtt.V5, "pub"), r.connect(all, mqtt.V5, "c", persist)
	c.subscribeWith(0, mqtt.Subscription{Filter: "as/#", QoS: 2, RetainAsPublished: true})
	c.subscribeWith(0, mqtt.Subscription{Filter: "not/#", QoS: 2})
	check := func(qos byte) {
		t.Helper()
		for _, want := range []bool{true, false} {
			if p := c.message(); p.Retain != want || p.QoS != qos || string(p.Topic) == "not/x" && p.Retain {
				t.Fatalf("%+v", p)
			}
		}
		if p := c.message(); p.Retain || string(p.Topic) != "not/x" {
			t.Fatalf("%+v", p)
		}
	}
	send := func(qos byte) {
		pub.publish("as/x", "1", qos, retain)
		pub.publish("as/x", "2", qos)
		pub.publish("not/x", "3", qos, retain)
	}
	for qos := byte(0); qos <= 2; qos++ {
		send(qos)
		check(qos)
	}
	c.drop()
	send(1)
	c = r.connect(all, mqtt.V5, "c", persist)
	check(1)
}

// Thousands of retained messages on one subscription pass through the client's
// window, each once, and a live message is not lost among them.
func TestConformanceManyRetained(t *testing.T) {
	t.Parallel()
	const n = 1200
	for qos := byte(0); qos <= 2; qos++ {
		t.Run(fmt.Sprint(qos), func(t *testing.T) {
			t.Parallel()
			r, all := everything(t)
			pub := r.connect(all, mqtt.V5, "pub")
			for i, p := range numbered(n) {
				pub.sendPublish("r/"+p, p, 1, retain)
				if i%50 == 49 {
					for range 50 {
						pub.expect(mqtt.PUBACK)
					}
				}
			}
			c := r.connect(all, mqtt.V5, "c", window(10)).sub(qos, "r/#")
			pub.publish("r/live", "live", 1)
			got := c.payloads(n + 1)
			slices.Sort(got)
			same(t, "retained", got, append(numbered(n), "live"))
			c.silent()
		})
	}
}

// A retained message in flight is sent again like any other ([MQTT-4.4.0-1]), and
// those that had no room yet follow.
func TestConformanceRetainedRedelivery(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		pub := r.connect(all, v, "pub")
		for i, p := range numbered(6) {
			pub.publish("r/"+p, p, byte(1+i%2), retain)
		}
		c := r.connect(all, v, "c", window(4)).sub(2, "r/#")
		var sent []got
		for range 4 {
			sent = append(sent, c.expect(mqtt.PUBLISH))
		}
		c.drop()
		pub.publish("r/live", "live", 1)
		c = r.connect(all, v, "c", window(6))
		var all6 []string
		for _, want := range sent {
			p := c.message()
			if p.PacketID != want.pid || string(p.Payload) != string(want.publish.Payload) || !p.Dup || !p.Retain {
				t.Fatalf("want %+v, got %+v", want.publish, p)
			}
			all6 = append(all6, string(p.Payload))
		}
		for range 2 {
			all6 = append(all6, string(c.message().Payload))
		}
		slices.Sort(all6)
		same(t, "retained", all6, numbered(6))
		c.receive("r/live", "live")
		c.silent()
	})
}

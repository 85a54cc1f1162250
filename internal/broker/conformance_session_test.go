package broker

import (
	"crypto/tls"
	"fmt"
	"slices"
	"testing"
	"time"

	"hawser/internal/mqtt"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// window asks for a session that is kept and takes n messages at a time.
func window(n uint16) func(*mqtt.Connect) {
	return func(p *mqtt.Connect) {
		persist(p)
		p.Props.ReceiveMaximum = n
	}
}

// [MQTT-4.4.0-1], [MQTT-4.6.0-1], [MQTT-3.3.1-1]: what was not acknowledged is
// sent again on the next connection, with its packet id, DUP and in its order,
// and then what has come since; nothing is sent again on a live one.
func TestConformanceRedelivery(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		pub, c := r.connect(all, v, "pub"), r.connect(all, v, "c", persist).sub(2, "t")
		var sent []got
		for i := range 6 {
			pub.publish("t", fmt.Sprint(i), byte(i%2+1))
			sent = append(sent, c.expect(mqtt.PUBLISH))
			if sent[i].publish.Dup {
				t.Fatal("DUP on the first one")
			}
		}
		c.silent()
		c.ack(mqtt.PUBACK, sent[2].pid) // out of order
		c.ack(mqtt.PUBREC, sent[3].pid)
		c.expect(mqtt.PUBREL)
		c.ack(mqtt.PUBCOMP, sent[3].pid)
		c.silent()
		for range 2 {
			c.drop()
			pub.publish("t", "6", 1)
			c = r.connect(all, v, "c", persist)
			for _, i := range []int{0, 1, 4, 5} {
				p := c.expect(mqtt.PUBLISH).publish
				if string(p.Payload) != fmt.Sprint(i) || p.PacketID != sent[i].pid || !p.Dup || p.QoS != byte(i%2+1) {
					t.Fatalf("want %d of packet %d, got %s: %+v", i, sent[i].pid, p.Payload, p)
				}
			}
			if p := c.receive("t", "6"); p.Dup {
				t.Fatal("DUP on the first one")
			}
		}
		c.silent()
	})
}

// 4.3.3: a message to the client at QoS 2 is one message, wherever the
// connection is cut.
func TestConformanceQoS2ToClient(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		pub, c := r.connect(all, v, "pub"), r.connect(all, v, "c", persist).sub(2, "t")
		again := func() {
			t.Helper()
			c.drop()
			c = r.connect(all, v, "c", persist)
		}
		pub.publish("t", "1", 2)
		first := c.expect(mqtt.PUBLISH)
		again()
		if p := c.expect(mqtt.PUBLISH).publish; !p.Dup || p.PacketID != first.pid {
			t.Fatalf("%+v", p)
		}
		c.ack(mqtt.PUBREC, first.pid)
		c.expect(mqtt.PUBREL)
		c.ack(mqtt.PUBREC, first.pid) // again: PUBREL again
		c.expect(mqtt.PUBREL)
		for range 2 {
			again()
			if g := c.expect(mqtt.PUBREL); g.pid != first.pid || g.ack.Code != mqtt.Success {
				t.Fatalf("%+v", g)
			}
			c.silent()
		}
		c.ack(mqtt.PUBREC, first.pid)
		c.expect(mqtt.PUBREL)
		c.ack(mqtt.PUBCOMP, first.pid)
		c.silent()
		again()
		c.silent()
		pub.publish("t", "2", 2) // several PUBRELs, in the order of the PUBRECs
		pub.publish("t", "3", 2)
		two, three := c.expect(mqtt.PUBLISH), c.expect(mqtt.PUBLISH)
		c.ack(mqtt.PUBREC, two.pid)
		c.ack(mqtt.PUBREC, three.pid)
		again()
		for _, want := range []got{two, three} {
			if g := c.expect(mqtt.PUBREL); g.pid != want.pid {
				t.Fatalf("PUBREL of %d, want %d", g.pid, want.pid)
			}
			c.ack(mqtt.PUBCOMP, want.pid)
		}
		c.silent()
	})
}

// [MQTT-4.3.3-4] with a refusal: PUBREC of 0x80 and above ends the delivery, and
// makes room in the window (4.9).
func TestConformanceClientRefuses(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	pub, c := r.connect(all, mqtt.V5, "pub"), r.connect(all, mqtt.V5, "c", window(1)).sub(2, "t")
	for i := range 3 {
		pub.publish("t", fmt.Sprint(i), byte(2-i%2))
	}
	for i := range 3 {
		g := c.expect(mqtt.PUBLISH)
		c.silent()
		typ := mqtt.PUBREC
		if i%2 == 1 {
			typ = mqtt.PUBACK
		}
		c.send(&mqtt.Ack{Type: typ, PacketID: g.pid, Code: mqtt.QuotaExceeded})
	}
	c.silent()
	c.drop()
	r.connect(all, mqtt.V5, "c", persist).silent()
}

// [MQTT-3.3.4-9], 4.9: never more than the client's receive maximum in flight, in
// this connection and when one with a smaller window follows.
func TestConformanceReceiveMaximumOfClient(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	const n = 40
	pub, c := r.connect(all, mqtt.V5, "pub"), r.connect(all, mqtt.V5, "c", window(20)).sub(2, "t")
	for i, p := range numbered(n) {
		pub.publish("t", p, byte(1+i/3%2))
	}
	for range 20 {
		c.expect(mqtt.PUBLISH)
	}
	c.silent()
	for _, w := range []uint16{3, 7} {
		c.drop()
		c = r.connect(all, mqtt.V5, "c", window(w))
		for range w {
			c.expect(mqtt.PUBLISH)
		}
		c.silent()
	}
	pub.sendPublish("t", "at QoS 0", 0) // does not count
	if g := c.expect(mqtt.PUBLISH); g.publish.QoS != 0 {
		t.Fatalf("%+v", g)
	}
	c.drop()
	c = r.connect(all, mqtt.V5, "c", window(1))
	same(t, "messages", c.payloads(n), numbered(n))
	c.silent()
}

// 4.5 and 4.6: a backlog of any length comes whole and in order, through a
// window of one and of many, to a session that is away, slow, or just resumed.
func TestConformanceBacklogOfService(t *testing.T) {
	t.Parallel()
	const n = 700
	for _, w := range []uint16{1, 33, 1000} {
		t.Run(fmt.Sprint(w), func(t *testing.T) {
			t.Parallel()
			r, all := everything(t)
			pub := r.connect(all, mqtt.V5, "pub")
			r.connect(all, mqtt.V5, "c", persist).sub(1, "t/#").drop()
			want := numbered(n)
			for _, p := range want[:n/2] { // away
				pub.publish("t/x", p, 1)
			}
			c := r.connect(all, mqtt.V5, "c", window(w))
			for _, p := range want[n/2:] { // connected, and takes nothing yet
				pub.publish("t/x", p, 1)
			}
			got := c.payloads(n / 3)
			c.drop()
			c = r.connect(all, mqtt.V5, "c", window(w))
			for len(got) < n { // what was in flight may come twice, and nothing is missing
				p := c.message()
				if s := string(p.Payload); p.Dup && slices.Contains(got, s) {
					continue
				}
				got = append(got, string(p.Payload))
			}
			same(t, "messages", got, want)
			c.silent()
		})
	}
}

// The same for a device, whose messages wait in a queue of its own.
func TestConformanceBacklogOfDevice(t *testing.T) {
	t.Parallel()
	const n, id, topic = 400, "ABCD1234", "private/ABCD1234/d/app/x"
	for _, v := range bothVersions {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprint(v, restart), func(t *testing.T) {
				t.Parallel()
				r, all := everything(t)
				dev := r.device(id)
				pub := r.connect(all, v, "pub")
				r.connect(dev, v, id, persist).sub(2, "private/"+id+"/#").drop()
				want := numbered(n)
				for i, p := range want[:n/2] {
					pub.publish(topic, p, byte(1+i%2))
				}
				if restart {
					r.restart()
					pub = r.connect(all, v, "pub")
				}
				c := r.connect(dev, v, id, persist)
				for i, p := range want[n/2:] {
					pub.publish(topic, p, byte(1+i%2))
				}
				same(t, "messages", c.payloads(n), want)
				c.silent()
				c.drop()
				r.connect(dev, v, id, persist).silent()
			})
		}
	}
}

// A device that resumes its session for the last time (session expiry 0) still
// gets what waited, and what is live after it.
func TestConformanceLastVisitOfDevice(t *testing.T) {
	t.Parallel()
	const n, id, topic = 200, "ABCD1234", "private/ABCD1234/d/app/x"
	r, all := everything(t)
	dev, pub := r.device(id), r.connect(all, mqtt.V5, "pub")
	r.connect(dev, mqtt.V5, id, persist).sub(1, "private/"+id+"/#").drop()
	want := numbered(n)
	for _, p := range want[:n/2] {
		pub.publish(topic, p, 1)
	}
	c := r.connect(dev, mqtt.V5, id, func(p *mqtt.Connect) { p.CleanStart = false })
	for _, p := range want[n/2:] {
		pub.publish(topic, p, 1)
	}
	same(t, "messages", c.payloads(n), want)
	c.silent()
}

// A subscriber that reads nothing holds up nobody, and gets all of it in the end.
func TestConformanceSlowSubscriber(t *testing.T) {
	t.Parallel()
	const n = 1500
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		slow, quick := r.connect(all, v, "slow").sub(1, "t"), r.connect(all, v, "quick").sub(1, "t")
		pub := r.connect(all, v, "pub")
		want := numbered(n)
		sent := make(chan error, 1)
		go func() {
			for i, p := range want {
				m := mqtt.Publish{Topic: []byte("t"), Payload: []byte(p), QoS: 1, PacketID: uint16(i + 1)}
				if err := pub.trySend(&m); err != nil {
					sent <- err
					return
				}
				if i%50 == 49 { // within the receive maximum
					for range 50 {
						if _, err := pub.read(10 * time.Second); err != nil {
							sent <- err
							return
						}
					}
				}
			}
			sent <- nil
		}()
		same(t, "quick", quick.payloads(n), want)
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		same(t, "slow", slow.payloads(n), want)
		slow.silent()
	})
}

// [MQTT-3.1.2-24], [MQTT-3.1.2-25]: what is above the client's maximum packet
// size is not sent, counts as delivered, and holds up nothing.
func TestConformanceMaximumPacketSizeOfClient(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	small := func(p *mqtt.Connect) { persist(p); p.Props.MaxPacketSize = 60 }
	pub, c := r.connect(all, mqtt.V5, "pub"), r.connect(all, mqtt.V5, "c", small).sub(2, "t/#")
	big := string(make([]byte, 100))
	pub.publish("t/retained", big, 1, retain)
	for qos := byte(0); qos <= 2; qos++ {
		pub.publish("t", big, qos)
		pub.publish("t", "fits", qos)
		c.receive("t", "fits")
	}
	c.sub(2, "t/#")
	c.silent()
	c.drop()
	pub.publish("t", big, 2)
	pub.publish("t", "fits", 2)
	c = r.connect(all, mqtt.V5, "c", small)
	c.receive("t", "fits")
	c.silent()
	c.drop()
	r.connect(all, mqtt.V5, "c", persist).silent() // acted as if it had been sent
}

// [MQTT-3.14.2-3]: the reason of a DISCONNECT is left out where it does not fit.
func TestConformanceReasonThatDoesNotFit(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	c := r.connect(all, mqtt.V5, "c", func(p *mqtt.Connect) { p.Props.MaxPacketSize = 40 })
	c.raw(0x20, 2, 0, 0)
	if g := c.expect(mqtt.DISCONNECT); g.disc.Code != mqtt.ProtocolError || g.disc.Reason != "" {
		t.Fatalf("%+v", g.disc)
	}
	c = r.connect(all, mqtt.V5, "c", func(p *mqtt.Connect) { p.Props.NoProblemInfo = true }) // [MQTT-3.1.2-29]
	c.raw(0x20, 2, 0, 0)
	if g := c.expect(mqtt.DISCONNECT); g.disc.Code != mqtt.ProtocolError {
		t.Fatalf("%+v", g.disc)
	}
}

// [MQTT-3.3.2-5], [MQTT-3.3.2-6]: a message that waited is sent with what is left
// of its interval, and not at all after it.
func TestConformanceMessageExpiry(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		expires := func(s uint32) func(*mqtt.Publish) {
			return func(p *mqtt.Publish) { p.HasExpiry, p.Expiry = true, s }
		}
		pub := r.connect(all, mqtt.V5, "pub")
		r.connect(all, v, "c", persist).sub(2, "t/#").drop()
		pub.publish("t", "0 s", 1, expires(0))
		pub.publish("t", "1 s", 2, expires(1))
		pub.publish("t/retained", "1 s", 1, expires(1), retain)
		pub.publish("t", "1 h", 1, expires(3600))
		pub.publish("t", "for ever", 2)
		// When a session that shares nothing with them ends, the second is over.
		r.connect(all, mqtt.V5, "clock", func(p *mqtt.Connect) { p.KeepAlive = 1 }).ends(mqtt.KeepAliveTimeout)
		c := r.connect(all, v, "c", persist)
		p := c.receive("t", "1 h")
		if v == mqtt.V5 && (!p.HasExpiry || p.Expiry < 3590 || p.Expiry > 3599) {
			t.Fatalf("%+v", p)
		}
		if p = c.receive("t", "for ever"); p.HasExpiry {
			t.Fatalf("%+v", p)
		}
		c.sub(2, "t/retained")
		c.silent()
	})
}

// An answer that may not be sent and cannot be left out ends the connection.
func TestConformanceAnswerThatDoesNotFit(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	c := r.connect(all, mqtt.V5, "c", func(p *mqtt.Connect) { p.Props.MaxPacketSize = 40 })
	c.sub(0, "a", "b", "c")
	var many []mqtt.Subscription
	for i := range 50 {
		many = append(many, mqtt.Subscription{Filter: fmt.Sprint(i)})
	}
	c.send(&mqtt.Subscribe{PacketID: 99, Filters: many})
	c.ends(mqtt.PacketTooLarge)
	c = r.dial(all, mqtt.V5)
	c.send(&mqtt.Connect{Version: mqtt.V5, ClientID: "c", Props: mqtt.ConnectProps{MaxPacketSize: 4}})
	c.ends(mqtt.PacketTooLarge)
}

// [MQTT-3.1.2-4]: a packet id of QoS 2 belongs to one session. It is not taken for
// known in the one that follows by a clean start, also when a crash replays both.
func TestConformanceCleanStartForgetsPacketIDs(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		send := func(c *client, payload string) {
			c.sendPublish("t", payload, 2, func(p *mqtt.Publish) { p.PacketID = 7 })
			c.expect(mqtt.PUBREC)
		}
		sub := r.connect(all, v, "sub").sub(2, "t")
		send(r.connect(all, v, "c", persist), "1")
		sub.receive("t", "1")
		r.connect(all, v, "c").disconnect()
		r.connect(all, v, "c", persist).drop()
		r.crash()
		r.start()
		sub = r.connect(all, v, "sub").sub(2, "t")
		send(r.connect(all, v, "c", persist), "2")
		sub.receive("t", "2")
	})
}

// The same for a PUBLISH that reaches the disk only after the clean start.
func TestConformanceCleanStartOvertakesTheLog(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	r.connect(all, mqtt.V5, "c", persist)
	key := registry.SessionKey{Principal: service(t, "all"), ClientID: "c"}
	owner := func() *conn {
		r.b.mu.Lock()
		defer r.b.mu.Unlock()
		return r.b.sessions[key].c
	}
	old := owner()
	r.connect(all, mqtt.V5, "c")
	late := msglog.Record{Kind: msglog.KindPublish, Time: time.Now().UnixMilli(), From: key.Principal, ClientID: "c", QoS: 2, PacketID: 7, Owner: old}
	r.b.mu.Lock()
	r.b.noteInbound(&late)
	r.b.mu.Unlock()
	if owner().s.isReceived(7) {
		t.Fatal("the packet id of another session")
	}
}

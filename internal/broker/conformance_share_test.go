package broker

import (
	"crypto/tls"
	"fmt"
	"slices"
	"testing"

	"hawser/internal/mqtt"
)

// drain takes what is there for c without waiting for more.
func (c *client) drain() (out []string) {
	c.t.Helper()
	c.send(&mqtt.Ping{Type: mqtt.PINGREQ})
	for halves, pong := 0, false; !pong || halves > 0; {
		switch g := c.next(); g.typ {
		case mqtt.PUBLISH:
			out = append(out, string(g.publish.Payload))
			if g.publish.QoS > 0 {
				c.ack(mqtt.PUBACK+mqtt.Type(g.publish.QoS-1), g.pid)
				halves += int(g.publish.QoS - 1)
			}
		case mqtt.PUBREL:
			halves--
			c.ack(mqtt.PUBCOMP, g.pid)
		case mqtt.PINGRESP:
			pong = true
		case mqtt.UNSUBACK:
		default:
			c.t.Fatalf("%v", g.typ)
		}
	}
	return out
}

// gather drains the clients until n messages have come.
func gather(n int, clients ...*client) (out []string) {
	c := clients[0]
	c.t.Helper()
	c.r.until(fmt.Sprintf("%d messages", n), func() bool {
		for _, c := range clients {
			out = append(out, c.drain()...)
		}
		return len(out) >= n
	})
	slices.Sort(out)
	return out
}

// 4.8.2, [MQTT-4.8.2-3]: each message goes to one member, to all of them in
// turn, at its QoS or below; other subscriptions get theirs besides.
func TestConformanceShared(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		pub, other := r.connect(all, v, "pub"), r.connect(all, v, "other").sub(2, "t", "$share/h/t")
		var members []*client
		for i := range 3 {
			members = append(members, r.connect(all, v, fmt.Sprint("m", i)).sub(2, "$share/g/+"))
		}
		for qos := byte(0); qos <= 2; qos++ {
			want := numbered(30)
			for _, p := range want {
				pub.publish("t", p, qos)
			}
			var got []string
			for _, m := range members {
				mine := m.drain()
				for len(mine) < 10 {
					mine = append(mine, m.drain()...)
				}
				if len(mine) != 10 {
					t.Fatalf("%d of 30 to one of three", len(mine))
				}
				got = append(got, mine...)
			}
			slices.Sort(got)
			same(t, "members", got, want)
			twice := gather(60, other)
			same(t, "other", slices.Compact(twice), want)
			if len(twice) != 60 {
				t.Fatalf("%d copies to two subscriptions, one of them shared", len(twice))
			}
		}
		members[0].unsubscribe("$share/g/+")
		members[1].disconnect()
		for i := range 5 {
			pub.publish("t", fmt.Sprint(i), 1)
			members[2].receive("t", fmt.Sprint(i))
		}
		members[0].silent()
	})
}

// 4.8.2: nothing retained comes with a shared subscription ([MQTT-3.8.4-4] note),
// and identifiers are those of the member.
func TestConformanceSharedOptions(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	pub, c := r.connect(all, mqtt.V5, "pub"), r.connect(all, mqtt.V5, "c")
	pub.publish("t", "kept", 1, retain)
	c.subscribeWith(7, mqtt.Subscription{Filter: "$share/g/t", QoS: 1, RetainAsPublished: true})
	c.silent()
	pub.publish("t", "x", 2, retain)
	if p := c.receive("t", "x"); p.QoS != 1 || !p.Retain || !slices.Equal(p.SubIDs, []uint32{7}) {
		t.Fatalf("%+v", p)
	}
}

// 4.8.2: what a member had not acknowledged at QoS 1 when its connection ended
// goes to another one; a message refused by PUBREC or PUBACK goes to nobody else
// ([MQTT-4.8.2-6]).
func TestConformanceSharedMemberGoes(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		pub := r.connect(all, v, "pub")
		a := r.connect(all, v, "a").sub(1, "$share/g/t")
		want := numbered(5)
		for _, p := range want {
			pub.publish("t", p, 1)
			a.expect(mqtt.PUBLISH)
		}
		b := r.connect(all, v, "b").sub(1, "$share/g/t")
		b.silent()
		a.drop()
		same(t, "messages", b.payloads(5), want)
		b.silent()
		if v == mqtt.V5 {
			pub.publish("t", "refused", 1)
			g := b.expect(mqtt.PUBLISH)
			b.send(&mqtt.Ack{Type: mqtt.PUBACK, PacketID: g.pid, Code: mqtt.QuotaExceeded})
			b.silent()
		}
	})
}

// [MQTT-4.8.2-4], [MQTT-4.8.2-5]: a message on its way at QoS 2 is completed with
// the member that has it, on its next connection, and is never another's.
func TestConformanceSharedQoS2(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		pub := r.connect(all, v, "pub")
		a := r.connect(all, v, "a", persist).sub(2, "$share/g/t")
		pub.publish("t", "1", 2)
		pub.publish("t", "2", 2)
		one, two := a.expect(mqtt.PUBLISH), a.expect(mqtt.PUBLISH)
		b := r.connect(all, v, "b", persist).sub(2, "$share/g/t")
		a.ack(mqtt.PUBREC, two.pid)
		a.expect(mqtt.PUBREL)
		a.drop()
		b.silent()
		a = r.connect(all, v, "a", persist)
		for left := 2; left > 0; left-- {
			switch g := a.next(); {
			case g.typ == mqtt.PUBLISH && g.pid == one.pid && g.publish.Dup:
				a.ack(mqtt.PUBREC, g.pid)
				a.expect(mqtt.PUBREL)
				a.ack(mqtt.PUBCOMP, g.pid)
			case g.typ == mqtt.PUBREL && g.pid == two.pid:
				a.ack(mqtt.PUBCOMP, g.pid)
			default:
				t.Fatalf("%+v", g)
			}
		}
		a.silent()
		pub.publish("t", "3", 2)
		pub.publish("t", "4", 2)
		same(t, "members", gather(2, a, b), []string{"3", "4"})

		pub.publish("t", "5", 2)
		pub.publish("t", "6", 2)
		lost := a.expect(mqtt.PUBLISH)
		a.drop()
		a = r.connect(all, v, "a") // its session ends, and the message with it
		a.silent()
		if got := gather(1, b); len(got) != 1 || got[0] == string(lost.publish.Payload) {
			t.Fatalf("%q, and %q was another's", got, lost.publish.Payload)
		}
		b.silent()
		b.drop()
		b = r.connect(all, v, "b", persist)
		pub.publish("t", "7", 2)
		same(t, "after all", gather(1, b), []string{"7"})
		b.silent()
		r.restart() // no packet id is left behind
		b = r.connect(all, v, "b", persist)
		b.silent()
	})
}

// Members with small windows share a backlog that is larger than all of them and
// than what is held in memory, while members come and go; also when the server
// was started anew in between, and nobody was there.
func TestConformanceSharedBacklog(t *testing.T) {
	t.Parallel()
	const n = 900
	r, all := everything(t)
	pub := r.connect(all, mqtt.V5, "pub")
	join := func(id string) *client { return r.connect(all, mqtt.V5, id, window(3)) }
	a := join("a").sub(1, "$share/g/t")
	b := join("b").sub(1, "$share/g/t")
	a.drop()
	b.drop()
	want := numbered(n)
	for _, p := range want[:n/2] {
		pub.publish("t", p, 1)
	}
	r.restart()
	pub = r.connect(all, mqtt.V5, "pub")
	for _, p := range want[n/2:] {
		pub.publish("t", p, 1)
	}
	a = join("a")
	got := gather(n/10, a)
	b = join("b")
	late := join("late").sub(1, "$share/g/t")
	got = append(got, gather(n/2, a, b, late)...)
	late.disconnect()
	a.send(&mqtt.Unsubscribe{PacketID: 9, Filters: []string{"$share/g/t"}})
	got = append(got, a.drain()...)
	for !func() bool {
		sorted := slices.Clone(got)
		slices.Sort(sorted)
		return len(slices.Compact(sorted)) == n
	}() {
		got = append(got, gather(1, b)...)
	}
	slices.Sort(got)
	same(t, "messages", slices.Compact(got), want)
	if extra := len(got) - n; extra > 3 {
		t.Fatalf("%d came twice, with three in flight when a member left", extra)
	}
}

// A member that takes nothing does not hold up the others.
func TestConformanceSharedSlowMember(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	pub := r.connect(all, mqtt.V5, "pub")
	slow := r.connect(all, mqtt.V5, "slow", window(2)).sub(1, "$share/g/t")
	quick := r.connect(all, mqtt.V5, "quick", window(2)).sub(1, "$share/g/t")
	const n = 100
	for _, p := range numbered(n) {
		pub.publish("t", p, 1)
	}
	got := gather(n-2, quick)
	quick.silent()
	got = append(got, gather(2, slow)...)
	slices.Sort(got)
	same(t, "messages", got, numbered(n))
}

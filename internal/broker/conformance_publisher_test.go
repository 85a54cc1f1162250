package broker

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"hawser/internal/mqtt"
)

// flight is one message that a sender has begun and not ended.
type flight struct {
	p        mqtt.Publish
	released bool // PUBREC came: PUBREL is what is sent again
}

// TestConformanceErraticPublisher: a sender that keeps the rules of 4.3 and 4.4
// gets each QoS 2 message into the log once and each QoS 1 message at least
// once, in order, whatever becomes of its connection and of the server.
func TestConformanceErraticPublisher(t *testing.T) {
	t.Parallel()
	const n, most = 60, 8
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			r, all := everything(t)
			rnd, v := rand.New(rand.NewPCG(seed, 2)), bothVersions[seed%2]
			r.connect(all, v, "sub", persist).sub(2, "t").drop()
			c := r.connect(all, v, "pub", persist)
			var open []*flight
			next, pid := 0, uint16(0)
			back := func() {
				c = r.connect(all, v, "pub", persist)
				for _, f := range open {
					if f.released {
						c.ack(mqtt.PUBREL, f.p.PacketID)
					} else {
						f.p.Dup = true
						c.send(&f.p)
					}
				}
			}
			read := func() {
				g, err := c.read(10 * time.Second)
				if err != nil {
					t.Fatal(err)
				}
				i := slices.IndexFunc(open, func(f *flight) bool { return f.p.PacketID == g.pid })
				switch {
				case i < 0:
					t.Fatalf("%v of %d, which is not in flight", g.typ, g.pid)
				case g.typ == mqtt.PUBREC:
					open[i].released = true
					c.ack(mqtt.PUBREL, g.pid)
				default:
					open = slices.Delete(open, i, i+1)
				}
			}
			for next < n || len(open) > 0 {
				switch k := rnd.IntN(60); {
				case k < 4:
					c.drop()
					back()
				case k == 4:
					r.crash()
					r.start()
					back()
				case k == 5:
					r.restart()
					back()
				case k < 35 && next < n && len(open) < most:
					pid = pid%uint16(most*2) + 1 // ids come round soon
					for slices.ContainsFunc(open, func(f *flight) bool { return f.p.PacketID == pid }) {
						pid = pid%uint16(most*2) + 1
					}
					f := &flight{p: mqtt.Publish{Topic: []byte("t"), Payload: fmt.Appendf(nil, "%05d", next), QoS: byte(1 + next%2), PacketID: pid}}
					open, next = append(open, f), next+1
					c.send(&f.p)
				case len(open) > 0:
					read()
				}
			}
			sub := r.connect(all, v, "sub", persist)
			var got [3][]string
			for len(got[2]) < n/2 || !slices.Contains(got[1], fmt.Sprintf("%05d", n-2)) {
				p := sub.message()
				if p.QoS == 2 || !slices.Contains(got[1], string(p.Payload)) {
					got[p.QoS] = append(got[p.QoS], string(p.Payload))
				}
			}
			var want [3][]string
			for i, p := range numbered(n) {
				want[1+i%2] = append(want[1+i%2], p)
			}
			same(t, "QoS 1", got[1], want[1])
			same(t, "QoS 2", got[2], want[2])
			for _, p := range sub.drain() {
				if slices.Contains(want[2], p) {
					t.Fatalf("%s once more", p)
				}
			}
		})
	}
}

// 3.8.3: one filter twice in a packet is as if it were in two packets.
func TestConformanceSameFilterTwice(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	for _, v := range bothVersions {
		pub := r.connect(all, v, "pub")
		pub.publish("t", "kept", 1, retain)
		c := r.connect(all, v, "c", persist)
		got := c.subscribeWith(0, mqtt.Subscription{Filter: "t", QoS: 2}, mqtt.Subscription{Filter: "t", QoS: 1})
		if !slices.Equal(got, []mqtt.ReasonCode{2, 1}) {
			t.Fatal(got)
		}
		for range 2 {
			c.receive("t", "kept")
		}
		pub.publish("t", "x", 2)
		if p := c.receive("t", "x"); p.QoS != 1 {
			t.Fatalf("%+v", p)
		}
		c.unsubscribe("t")
		c.silent()
		c.disconnect()
	}
}

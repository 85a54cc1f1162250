package broker

import (
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"hawser/internal/mqtt"
)

// erratic is a subscriber that acknowledges when it likes, loses its connection,
// comes back with another window and finds the server started anew. It keeps
// what 4.3 wants a receiver to keep: the packet ids of QoS 2 until PUBREL.
type erratic struct {
	t     *testing.T
	r     *rig
	rnd   *rand.Rand
	cert  tls.Certificate
	id    string
	v     mqtt.Version
	c     *client
	known map[uint16]bool // QoS 2, not released
	owed  []got           // not acknowledged yet
	count map[string]int
	first [3][]string // by QoS, in the order of their first coming
}

func (e *erratic) connect() {
	e.t.Helper()
	e.owed = nil
	e.c = e.r.connect(e.cert, e.v, e.id, window(uint16(1+e.rnd.IntN(12))))
}

func (e *erratic) take(g got) {
	if g.typ == mqtt.PUBLISH {
		p := g.publish
		if p.QoS == 1 || !e.known[g.pid] {
			if e.count[string(p.Payload)]++; e.count[string(p.Payload)] == 1 {
				e.first[p.QoS] = append(e.first[p.QoS], string(p.Payload))
			}
		}
		if p.QoS == 2 {
			e.known[g.pid] = true
		}
	}
	e.owed = append(e.owed, g)
}

// pay acknowledges the i-th of what is owed.
func (e *erratic) pay(i int) {
	g := e.owed[i]
	e.owed = slices.Delete(e.owed, i, i+1)
	switch {
	case g.typ == mqtt.PUBREL:
		delete(e.known, g.pid)
		e.c.ack(mqtt.PUBCOMP, g.pid)
	case g.publish.QoS == 1:
		e.c.ack(mqtt.PUBACK, g.pid)
	default:
		e.c.ack(mqtt.PUBREC, g.pid)
	}
}

// sync reads all that comes before the answer to a ping.
func (e *erratic) sync() {
	e.t.Helper()
	e.c.send(&mqtt.Ping{Type: mqtt.PINGREQ})
	for {
		g, err := e.c.read(10 * time.Second)
		if err != nil {
			e.t.Fatal(err)
		}
		if g.typ == mqtt.PINGRESP {
			return
		}
		e.take(g)
	}
}

func (e *erratic) step(allowRestart bool) (restarted bool) {
	e.t.Helper()
	switch n := e.rnd.IntN(40); {
	case n < 3:
		e.c.drop()
		e.connect()
	case n == 3 && allowRestart:
		if e.rnd.IntN(2) == 0 {
			e.r.crash()
			e.r.start()
		} else {
			e.r.restart()
		}
		e.connect()
		return true
	case n < 30 && len(e.owed) > 0:
		e.pay(e.rnd.IntN(len(e.owed)))
	default:
		e.sync()
	}
	return false
}

// TestConformanceErraticSubscriber: whatever happens in between, QoS 2 comes
// once, QoS 1 at least once, and each of them in its order (4.3, 4.6).
func TestConformanceErraticSubscriber(t *testing.T) {
	t.Parallel()
	const n = 150
	for _, seed := range []uint64{0, 1, 38, 55} {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			r, all := everything(t)
			e := &erratic{t: t, r: r, rnd: rand.New(rand.NewPCG(seed, 1)), cert: all, id: "c", v: bothVersions[seed/2%2],
				known: map[uint16]bool{}, count: map[string]int{}}
			topic, filter := "t/x", "t/#"
			if seed%2 == 1 {
				e.id, topic, filter = "ABCD1234", "private/ABCD1234/d/app/x", "private/ABCD1234/#"
				e.cert = r.device(e.id)
			}
			e.connect()
			e.c.sub(2, filter)
			pub := r.connect(all, mqtt.V5, "pub")
			var want [3][]string
			for i, p := range numbered(n) {
				qos := byte(1 + e.rnd.IntN(2))
				pub.publish(topic, p, qos)
				want[qos] = append(want[qos], p)
				if i%3 == 0 && e.step(true) {
					pub = r.connect(all, mqtt.V5, "pub")
				}
			}
			r.until("the rest", func() bool {
				e.sync()
				for len(e.owed) > 0 {
					e.pay(0)
				}
				return len(e.first[1])+len(e.first[2]) == n && len(e.known) == 0
			})
			e.sync()
			same(t, "QoS 1", e.first[1], want[1])
			same(t, "QoS 2", e.first[2], want[2])
			for _, p := range want[2] {
				if e.count[p] != 1 {
					t.Fatalf("%s came %d times", p, e.count[p])
				}
			}
		})
	}
}

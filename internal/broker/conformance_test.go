package broker

import (
	"crypto/tls"
	"fmt"
	"slices"
	"strings"
	"testing"

	"hawser/internal/mqtt"
)

// The files conformance_*_test.go walk through the normative statements of MQTT
// 5.0 and 3.1.1 with a service that may use every topic. Statements are cited
// with their numbers in 5.0, those of 3.1.1 with "311:" in front.

// everything makes a rig with a service that may read and write #.
func everything(t *testing.T) (*rig, tls.Certificate) {
	t.Helper()
	r := newRig(t)
	return r, r.service("all", "r #", "w #")
}

// raw sends bytes as they are.
func (c *client) raw(b ...byte) {
	c.t.Helper()
	if _, err := c.c.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) ack(typ mqtt.Type, pid uint16) {
	c.t.Helper()
	c.send(&mqtt.Ack{Type: typ, PacketID: pid})
}

// sub makes one subscription that must be granted with the QoS asked for.
func (c *client) sub(qos byte, filters ...string) *client {
	c.t.Helper()
	for _, code := range c.subscribe(qos, filters...) {
		if code != mqtt.ReasonCode(qos) {
			c.t.Fatalf("SUBACK %v for %q", code, filters)
		}
	}
	return c
}

func (c *client) unsubscribe(filters ...string) []mqtt.ReasonCode {
	c.t.Helper()
	c.pid++
	c.send(&mqtt.Unsubscribe{PacketID: c.pid, Filters: filters})
	g := c.expect(mqtt.UNSUBACK)
	c.samePID(g)
	return g.codes
}

// ends checks that a 5.0 client is told want, and that a 3.1.1 client is closed.
func (c *client) ends(want mqtt.ReasonCode) {
	c.t.Helper()
	if got := c.closed(); c.v == mqtt.V5 && got != want {
		c.t.Fatalf("DISCONNECT %v, want %v", got, want)
	}
}

func (c *client) payloads(n int) (out []string) {
	c.t.Helper()
	for range n {
		out = append(out, string(c.message().Payload))
	}
	return out
}

// numbered gives n payloads in their order.
func numbered(n int) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprintf("%05d", i))
	}
	return out
}

func same(t *testing.T, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("%s:\n got %s\nwant %s", what, clip(fmt.Sprint(got), 1000), clip(fmt.Sprint(want), 1000))
	}
}

// eachVersion runs fn on a rig of its own for 3.1.1 and 5.0.
func eachVersion(t *testing.T, fn func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version)) {
	t.Helper()
	for _, v := range bothVersions {
		t.Run(v.String(), func(t *testing.T) {
			t.Parallel()
			r, all := everything(t)
			fn(t, r, all, v)
		})
	}
}

// [MQTT-4.7.3-1] to [MQTT-4.7.3-4]: at least one character, case and spaces
// count, empty levels are levels; and nothing that is special in NATS is here.
func TestConformanceOddTopics(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	for _, v := range bothVersions {
		exact, levels := r.connect(all, v, "exact"), r.connect(all, v, "levels")
		pub := r.connect(all, v, "pub")
		for i, topic := range []string{"/", "//", "a//b", "/a", "a/", " ", "a b/ c", "a.b.c", "*", ">", "a/*/b", "a/>", ".", "..",
			"ACCOUNTS", "accounts", "Zürich/溫度/🌡", "\ufeff", "a\tb", "a\nb", "a$b/$c", "private", "private/abc", strings.Repeat("x/", 511) + "x"} {
			pattern := strings.Repeat("+/", strings.Count(topic, "/")) + "+"
			exact.sub(1, topic)
			levels.sub(1, pattern)
			pub.publish(topic, fmt.Sprint(i), 1)
			exact.receive(topic, fmt.Sprint(i))
			levels.receive(topic, fmt.Sprint(i))
			exact.unsubscribe(topic)
			levels.unsubscribe(pattern)
		}
		pub.publish("Accounts", "", 1)
		exact.sub(1, "accounts")
		pub.publish("ACCOUNTS", "", 1)
		exact.silent()
		exact.disconnect()
		levels.disconnect()
	}
}

// [MQTT-4.7.1-1], [MQTT-4.7.1-2], [MQTT-4.7.1-3] and the examples of 4.7.1.
func TestConformanceWildcards(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	pub := r.connect(all, mqtt.V5, "pub")
	topics := []string{"sport", "sport/", "sport/tennis", "sport/tennis/player1", "sport/tennis/player1/ranking",
		"sport/tennis/player1/score/wimbledon", "sport/tennis/player2", "/finance", "finance", "/", "sports"}
	for filter, want := range map[string]string{
		"sport/tennis/player1/#": "3 4 5",
		"sport/#":                "0 1 2 3 4 5 6",
		"#":                      "0 1 2 3 4 5 6 7 8 9 10",
		"sport/tennis/+":         "3 6",
		"sport/+":                "1 2",
		"+":                      "0 8 10",
		"+/+":                    "1 2 7 9",
		"/+":                     "7 9",
		"+/tennis/#":             "2 3 4 5 6",
		"+/+/+/+":                "4",
		"sport/+/player1":        "3",
		"+/":                     "1 9",
		"/#":                     "7 9",
	} {
		sub := r.connect(all, mqtt.V311, "sub").sub(2, filter)
		var got []string
		for i, topic := range topics {
			pub.publish(topic, fmt.Sprint(i), 2)
		}
		pub.publish(strings.NewReplacer("+", "x", "#", "end").Replace(filter), "end", 2)
		for p := sub.message(); string(p.Payload) != "end"; p = sub.message() {
			got = append(got, string(p.Payload))
		}
		same(t, filter, got, strings.Fields(want))
		sub.disconnect()
	}
}

// [MQTT-4.7.2-1]: a wildcard at the start does not match $ topics. Here nobody
// may use them at all, which 4.7.2 leaves to the server.
func TestConformanceDollarTopics(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	for _, v := range bothVersions {
		c := r.connect(all, v, "c")
		for _, code := range c.subscribe(0, "$SYS/#", "$SYS/+/x", "$x") {
			if !code.Failed() {
				t.Fatalf("$ topic granted: %v", code)
			}
		}
		c.sub(0, "#", "+/#")
		c.sendPublish("$SYS/x", "", 0)
		c.ends(mqtt.NotAuthorized)
	}
}

// [MQTT-2.2.1-2] to [MQTT-2.2.1-5]: each packet id is acknowledged with itself,
// the two directions do not know of each other's, and the highest is valid.
func TestConformancePacketIDs(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		c := r.connect(all, v, "c").sub(2, "t")
		for _, pid := range []uint16{1, 2, 255, 256, 0x7fff, 0xffff, 1} {
			for qos := byte(1); qos <= 2; qos++ {
				c.pid = pid - 1
				c.sendPublish("t", "x", qos)
				for acked, came := false, false; !acked || !came; {
					switch g := c.next(); g.typ {
					case mqtt.PUBLISH:
						came = qos == 1
						c.ack(mqtt.PUBACK+mqtt.Type(qos-1), g.pid)
					case mqtt.PUBREL:
						came = true
						c.ack(mqtt.PUBCOMP, g.pid)
					case mqtt.PUBREC:
						c.samePID(g)
						c.ack(mqtt.PUBREL, pid)
					case mqtt.PUBACK, mqtt.PUBCOMP:
						c.samePID(g)
						acked = true
					default:
						t.Fatalf("%v", g.typ)
					}
				}
			}
		}
	})
}

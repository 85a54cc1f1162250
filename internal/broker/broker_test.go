package broker

import (
	"strings"
	"testing"
	"time"

	"hawser/internal/mqtt"
)

var bothVersions = []mqtt.Version{mqtt.V311, mqtt.V5}

func TestPublishReachesSubscriberAtEachQoS(t *testing.T) {
	r := newRig(t)
	dev, dash := r.device("ABCD1234"), r.service("dash", "r private/+/u/#")
	for _, v := range bothVersions {
		sub := r.connect(dash, v, "dash-1")
		if codes := sub.subscribe(2, "private/+/u/#"); codes[0] != mqtt.GrantedQoS2 {
			t.Fatalf("SUBACK %v", codes)
		}
		pub := r.connect(dev, v, "ABCD1234")
		for qos := byte(0); qos <= 2; qos++ {
			pub.publish("private/ABCD1234/u/temp", "21.5", qos)
			if p := sub.receive("private/ABCD1234/u/temp", "21.5"); p.QoS != qos {
				t.Fatalf("sent at QoS %d, came at %d", qos, p.QoS)
			}
		}
		pub.disconnect()
		sub.disconnect()
	}
}

// TestClientThatTakesNothing is closed after the write timeout. One that reads stays, also
// when it was written to for longer than that, or not at all.
func TestClientThatTakesNothing(t *testing.T) {
	const limit = 300 * time.Millisecond
	r := newRig(t, func(r *rig) { r.limits.WriteTimeout = limit })
	deaf := r.connect(r.device("ABCD1234"), mqtt.V5, "ABCD1234")
	deaf.subscribe(0, "private/ABCD1234/d/#")
	quiet := r.connect(r.device("ABCD0002"), mqtt.V5, "ABCD0002")
	backend := r.connect(r.service("backend", "w private/+/d/app/#"), mqtt.V5, "backend")
	payload := strings.Repeat("x", 100<<10)
	start := time.Now()
	for !strings.Contains(r.logs.String(), "i/o timeout") || time.Since(start) < 3*limit {
		if code := backend.publish("private/ABCD1234/d/app/x", payload, 1); code.Failed() {
			t.Fatalf("PUBACK %v", code)
		}
		if time.Since(start) > time.Minute {
			t.Fatal("a client that takes nothing is kept")
		}
	}
	r.logged("device ABCD1234", "write", "i/o timeout")
	quiet.send(&mqtt.Ping{Type: mqtt.PINGREQ})
	quiet.expect(mqtt.PINGRESP)
}

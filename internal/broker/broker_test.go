package broker

import (
	"testing"

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

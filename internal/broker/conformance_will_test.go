package broker

import (
	"crypto/tls"
	"testing"

	"hawser/internal/mqtt"
)

func will(qos byte, retain bool, edit ...func(*mqtt.Will)) func(*mqtt.Connect) {
	return func(p *mqtt.Connect) {
		p.Will = &mqtt.Will{Topic: "will", Payload: []byte("gone"), QoS: qos, Retain: retain}
		for _, e := range edit {
			e(p.Will)
		}
	}
}

// [MQTT-3.1.2-7] to [MQTT-3.1.2-15]: whatever ends a connection but a normal
// DISCONNECT publishes the Will, with its QoS and RETAIN.
func TestConformanceWill(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, r *rig, all tls.Certificate, v mqtt.Version) {
		sub := r.connect(all, v, "sub").sub(2, "will")
		ends := map[string]func(*client){
			"cut":            func(c *client) { c.drop() },
			"protocol error": func(c *client) { c.raw(0x20, 2, 0, 0) },
			"malformed":      func(c *client) { c.raw(0x00, 0) },
			"takeover":       func(*client) { r.connect(all, v, "c").disconnect() },
		}
		if v == mqtt.V5 {
			for _, code := range []mqtt.ReasonCode{mqtt.DisconnectWithWill, mqtt.UnspecifiedError, mqtt.AdministrativeAction} {
				ends[code.String()] = func(c *client) { c.send(&mqtt.Disconnect{Code: code}) }
			}
		}
		for what, end := range ends {
			for qos := byte(0); qos <= 2; qos++ {
				t.Log(what, qos)
				end(r.connect(all, v, "c", will(qos, qos == 2)))
				if p := sub.receive("will", "gone"); p.QoS != qos || p.Retain {
					t.Fatalf("%+v", p)
				}
			}
		}
		late := r.connect(all, v, "late").sub(2, "will")
		if p := late.receive("will", "gone"); p.QoS != 2 || !p.Retain {
			t.Fatalf("%+v", p)
		}
		r.connect(all, v, "c", will(1, false)).disconnect()
		c := r.connect(all, v, "c") // the Will was that of one connection
		c.drop()
		sub.silent()
	})
}

// [MQTT-3.1.2-8] in the case of a keep alive that passes.
func TestConformanceWillAtKeepAlive(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	sub := r.connect(all, mqtt.V5, "sub").sub(1, "will")
	r.connect(all, mqtt.V5, "c", will(1, false), func(p *mqtt.Connect) { p.KeepAlive = 1 })
	sub.receive("will", "gone")
}

// [MQTT-3.1.3-9], [MQTT-3.1.2-10] and 3.1.3.2.2: a delayed Will is published
// when the delay passes or the session ends, and not if the client is back.
func TestConformanceWillDelay(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	sub := r.connect(all, mqtt.V5, "sub").sub(1, "will")
	delay := func(s uint32) func(*mqtt.Will) { return func(w *mqtt.Will) { w.DelayInterval = s } }

	r.connect(all, mqtt.V5, "c", persist, will(1, false, delay(1))).drop()
	sub.silent()
	sub.receive("will", "gone")

	r.connect(all, mqtt.V5, "c", will(1, false, delay(3600))).drop() // the session ends with it
	sub.receive("will", "gone")

	r.connect(all, mqtt.V5, "c", persist, will(1, false, delay(3600))).drop()
	c := r.connect(all, mqtt.V5, "c", persist) // back in time
	sub.silent()
	c.disconnect()
	sub.silent()

	r.connect(all, mqtt.V5, "c", persist, will(1, false, delay(3600))).drop()
	r.connect(all, mqtt.V5, "c") // a clean start ends the session
	sub.receive("will", "gone")

	r.connect(all, mqtt.V5, "d", persist, will(1, false, delay(3600)))
	r.connect(all, mqtt.V5, "d", persist) // taken over: no delay has passed
	sub.silent()
	r.connect(all, mqtt.V5, "d", persist, will(1, false))
	r.connect(all, mqtt.V5, "d", persist) // taken over, and there was no delay
	sub.receive("will", "gone")
	sub.silent()
}

// 3.1.3.2.3 to 3.1.3.2.8: the properties of a Will are those of its message.
func TestConformanceWillProperties(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	props := publishProps()
	sub := r.connect(all, mqtt.V5, "sub").sub(1, "will")
	r.connect(all, mqtt.V5, "c", will(1, false, func(w *mqtt.Will) {
		w.Forward, w.HasExpiry, w.Expiry = props, true, 100
	})).drop()
	p := sub.receive("will", "gone")
	if string(p.Forward) != string(props) || !p.HasExpiry || p.Expiry == 0 || p.Expiry > 100 {
		t.Fatalf("%+v", p)
	}
}

package check

import (
	"errors"
	"os"

	"hawser/internal/mqtt"
)

// servingCases: what an honest device is owed. A broker that refuses everything would
// pass all that comes after.
func servingCases() []BrokerCase {
	return []BrokerCase{
		honestBroker(),
		{Case: Case{ID: "B0.v5", Does: "a device uses the broker in MQTT 5.0", Expect: "serves it", Clause: "MQTT 5.0 3.1"}, try: func(p *intruder) error {
			return p.roundTrip(hello{id: p.o.Device.Name, version: mqtt.V5}, p.filter(p.o.Device))
		}},
		{Case: Case{ID: "B0.narrower", Does: "a device subscribes to a part of its own topics", Expect: "grants it, and delivers", Clause: "MQTT 4.7.1"}, try: func(p *intruder) error {
			return p.roundTrip(hello{id: p.o.Device.Name}, p.topic(p.o.Device, "check/+"))
		}},
		{Case: Case{ID: "B0.session", Does: "a message of QoS 1 that was not acknowledged, and a second connection", Expect: "keeps it: the message comes again",
			Clause: "MQTT 4.4.0-1, 3.1.2-5"}, try: keptSession},
		{Case: Case{ID: "B0.will", Does: "a Will on the device's own topic", Expect: "keeps it as a retained message for whoever may read it", Clause: "MQTT 3.1.2-8, 3.1.2-17"}, try: ownWill},
	}
}

func honestBroker() BrokerCase {
	return BrokerCase{Case: Case{ID: "B0.honest", Does: "two devices use the broker as they may", Expect: "serves them", Clause: "MQTT 3.1"},
		try: func(p *intruder) error {
			a, err := p.join(p.o.Device, hello{id: p.o.Device.Name})
			if err != nil {
				return p.settle(Fail, "the first device is not let in: %v", err)
			}
			b, err := p.join(p.o.Other, hello{id: p.o.Other.Name})
			if err != nil {
				return p.settle(Fail, "the second device is not let in: %v", err)
			}
			for who, g := range map[*Credentials]*guest{p.o.Device: a, p.o.Other: b} {
				if ok, err := g.subscribe(p.filter(who)); err != nil || !ok[0] {
					return p.settle(Fail, "%s may not subscribe to its own topics: %v", who.Name, err)
				}
				if ok, err := g.publish(mqtt.Publish{Topic: []byte(p.topic(who, "check/honest")), QoS: 1, Payload: []byte("x")}); err != nil || !ok {
					return p.settle(Fail, "%s may not publish to its own topics: %v", who.Name, err)
				}
			}
			return p.settle(Pass, "both connect, publish and subscribe under their own topics")
		}}
}

// roundTrip subscribes the first device to filter and wants its own message back.
func (p *intruder) roundTrip(h hello, filter string) error {
	g, err := p.join(p.o.Device, h)
	if err != nil {
		return p.settle(Fail, "it is not let in: %v", err)
	}
	if ok, err := g.subscribe(filter); err != nil || !ok[0] {
		return p.settle(Fail, "%s was not granted: %v", filter, err)
	}
	topic := p.topic(p.o.Device, "check/round")
	if ok, err := g.publish(mqtt.Publish{Topic: []byte(topic), QoS: 1, Payload: []byte("round")}); err != nil || !ok {
		return p.settle(Fail, "its message was not taken: %v", err)
	}
	if err := g.hears(topic); err != nil {
		return p.settle(Fail, "its message did not come: %v", err)
	}
	return p.settle(Pass, "granted and delivered")
}

// keptSession has a message in flight, goes away, and looks whether it comes again.
func keptSession(p *intruder) error {
	h := hello{id: p.o.Device.Name, version: mqtt.V5, keep: true}
	defer p.forget(p.o.Device)
	g, err := p.join(p.o.Device, h)
	if err != nil {
		return err
	}
	topic := p.topic(p.o.Device, "check/kept")
	if ok, err := g.subscribe(topic); err != nil || !ok[0] {
		return p.settle(Fail, "%s was not granted: %v", topic, err)
	}
	g.mute = true
	if ok, err := g.publish(mqtt.Publish{Topic: []byte(topic), QoS: 1, Payload: []byte("kept")}); err != nil || !ok {
		return p.settle(Fail, "its message was not taken: %v", err)
	}
	if err := g.hears(topic); err != nil {
		return p.settle(Fail, "its message did not come: %v", err)
	}
	g.Raw.Close()
	again, err := p.join(p.o.Device, h)
	if err != nil {
		return err
	}
	if err := again.hears(topic); err != nil {
		return p.settle(Fail, "the message did not come again: %v", err)
	}
	return p.settle(Pass, "it came again on the second connection")
}

// forget ends whatever session the broker keeps for who.
func (p *intruder) forget(who *Credentials) {
	if g, err := p.join(who, hello{id: who.Name}); err == nil {
		_, _ = g.ping() // what is left of the session is another case's trouble at worst
	}
}

func ownWill(p *intruder) error {
	topic := p.topic(p.o.Device, "check/will")
	g, err := p.join(p.o.Device, hello{id: p.o.Device.Name, will: &mqtt.Will{Topic: topic, Payload: []byte("will"), QoS: 1, Retain: true}})
	if err != nil {
		return p.settle(Fail, "it is not let in with a Will: %v", err)
	}
	g.Raw.Close()
	again, err := p.join(p.o.Device, hello{id: p.o.Device.Name})
	if err != nil {
		return err
	}
	if ok, err := again.subscribe(topic); err != nil || !ok[0] {
		return p.settle(Fail, "%s was not granted: %v", topic, err)
	}
	err = again.hears(topic)
	if _, wipe := again.publish(mqtt.Publish{Topic: []byte(topic), QoS: 1, Retain: true}); wipe != nil && err == nil {
		return wipe
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return p.settle(Fail, "the Will was not published")
	}
	if err != nil {
		return err
	}
	return p.settle(Pass, "it was published, and kept")
}

package check

import "hawser/internal/mqtt"

// serviceCases: a service that may read the devices, and nothing else.
func serviceCases() []BrokerCase {
	c := func(id, does, expect string, try func(p *intruder) error) BrokerCase {
		return BrokerCase{Case: Case{ID: "B11." + id, Does: does, Expect: expect, Clause: isolation}, needs: func(o *BrokerOptions) string { return given(o.Service, "--service") }, try: try}
	}
	const kept = "refuses it: the device does not get it"
	return []BrokerCase{
		c("command", "a service that may only read sends a device a message", kept, func(p *intruder) error {
			return p.injectAs(p.o.Service, mqtt.V311, mqtt.Publish{QoS: 1})
		}),
		c("command-v5", "the same in MQTT 5.0, QoS 2", kept, func(p *intruder) error {
			return p.injectAs(p.o.Service, mqtt.V5, mqtt.Publish{QoS: 2})
		}),
		c("will", "a Will of such a service on a device's topic", kept, func(p *intruder) error {
			return p.lastWill(p.o.Service, mqtt.V5, false)
		}),
		c("device-id", "a service under the client id of a connected device", "the device stays connected", func(p *intruder) error {
			err := p.takeover(p.o.Service)
			if p.verdict == Warn { // the ids of services and devices may be apart
				p.verdict, p.why = Pass, "it was let in beside the device, which stayed"
			}
			return err
		}),
	}
}

// clientOf is the client id that one logs in with: a device's is its name.
func (p *intruder) clientOf(who *Credentials) string {
	if who == p.o.Service {
		return "check"
	}
	return who.Name
}

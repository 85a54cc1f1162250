package check

import (
	"bytes"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"hawser/internal/mqtt"
)

// revokeCases take the first device's rights away in mid-test, and come last. A device
// can be revoked once, so the first of these cases sets everything up, revokes it and
// gathers what is seen; each case judges its part.
func revokeCases() []BrokerCase {
	c := func(id, does, expect string, service bool, judge func(p *intruder, a *aftermath) error) BrokerCase {
		return BrokerCase{Case: Case{ID: "B10." + id, Does: does, Expect: expect, Clause: isolation + "; CVE-2018-12546, CVE-2021-34434 class"},
			needs: func(o *BrokerOptions) string {
				if o.Revoke == "" {
					return "not given: --revoke-exec"
				}
				if service {
					return given(o.Service, "--service")
				}
				return ""
			},
			try: func(p *intruder) error {
				a, err := p.revoked()
				if err != nil {
					return err
				}
				return judge(p, a)
			}}
	}
	left := func(id, does string, found func(a *aftermath) []string) BrokerCase {
		return c(id, does, "nothing of it is delivered", true, func(p *intruder, a *aftermath) error {
			if m := found(a); len(m) > 0 {
				return p.settle(Fail, "delivered after the device was revoked: %s", strings.Join(m, ", "))
			}
			return p.settle(Pass, "nothing of it was delivered")
		})
	}
	return []BrokerCase{
		c("connected", "a device that is revoked while it is connected", "ends its connection", false, func(p *intruder, a *aftermath) error {
			if !a.ended {
				return p.settle(Fail, "its connection stands %v after it was revoked", a.took.Round(time.Millisecond))
			}
			return p.settle(Pass, "its connection was ended after %v", a.took.Round(time.Millisecond))
		}),
		c("again", "a device that was revoked connects again, to its session", "lets it in no more", false, func(p *intruder, a *aftermath) error {
			return p.judgeEntry(a.second, a.again)
		}),
		left("will", "the Will of a device that was revoked", func(a *aftermath) []string { return a.wills }),
		left("retained", "the retained message of a device that was revoked", func(a *aftermath) []string { return a.kept }),
		left("queued", "messages of the revoked device that wait in a service's session", func(a *aftermath) []string { return a.queued }),
		left("in-flight", "messages of the revoked device that a service has not acknowledged", func(a *aftermath) []string { return a.flight }),
	}
}

// aftermath is what was seen before and after the first device was revoked.
type aftermath struct {
	err    error
	ended  bool          // its connection, by the broker
	took   time.Duration // until then
	second *guest        // its next connection, if it was let in
	again  error         // or why not

	// What the service got afterwards: Wills in whatever session, and the rest by session.
	wills, kept, queued, flight []string
}

func (p *intruder) revoked() (*aftermath, error) {
	if p.siege.after == nil {
		p.siege.after = &aftermath{}
		p.siege.after.err = p.siege.after.gather(p)
	}
	return p.siege.after, p.siege.after.err
}

func (p *intruder) revoke() error {
	text := strings.ReplaceAll(p.o.Revoke, "{id}", p.o.Device.Name)
	cmd := exec.CommandContext(p.ctx, "/bin/sh", "-c", text)
	cmd.WaitDelay = time.Second // a child of the shell may hold the pipe
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("--revoke-exec: %w: %s", err, bytes.TrimSpace(out))
	}
	p.extend()
	return nil
}

// gather leaves a retained message, a Will, a queued message and one in flight behind,
// revokes the device, and collects what comes.
func (a *aftermath) gather(p *intruder) error {
	var flight *guest
	var err error
	if p.o.Service != nil {
		if flight, err = p.readers(); err != nil {
			return err
		}
	}
	g, err := p.leave()
	if err != nil {
		return err
	}
	if flight != nil {
		if err := flight.hears(p.topic(p.o.Device, "u/flight")); err != nil {
			return err
		}
		flight.Raw.Close()
	}
	p.extend()
	if err := p.revoke(); err != nil {
		return err
	}
	began := time.Now()
	a.ended = g.closed(p.o.Step)
	a.took = time.Since(began)
	g.Raw.Close() // a broker that has not noticed publishes the Will at the latest now
	a.second, a.again = p.join(p.o.Device, p.stayer(nil))
	if p.o.Service == nil {
		return nil
	}
	return a.collect(p)
}

// The sessions of the service: for what was sent while it was away, for what it did not
// acknowledge, and a new one for what is retained.
const (
	queueReader  = "check-queue"
	flightReader = "check-flight"
	newReader    = "check-new"
)

func (p *intruder) stayer(w *mqtt.Will) hello {
	return hello{id: p.o.Device.Name, version: mqtt.V5, keep: true, will: w}
}

func (p *intruder) reader(id string, keep bool) (*guest, error) {
	s, err := p.join(p.o.Service, hello{id: id, version: mqtt.V5, keep: keep})
	if err != nil {
		return nil, fmt.Errorf("the service: %w", err)
	}
	return s, nil
}

// reads subscribes a session of the service to the device, and to the other's fence.
func (p *intruder) reads(s *guest) error {
	ok, err := s.subscribe(p.topic(p.o.Device, "u/#"), p.topic(p.o.Other, "u/fence"))
	if err == nil && (!ok[0] || !ok[1]) {
		err = skipf("the service may not read the devices' u/ topics")
	}
	return err
}

func (p *intruder) readers() (flight *guest, err error) {
	for _, id := range []string{queueReader, flightReader} {
		if flight, err = p.reader(id, true); err != nil {
			return nil, err
		}
		if err := p.reads(flight); err != nil {
			return nil, err
		}
		if id == queueReader {
			flight.Raw.Close()
		}
	}
	flight.mute = true
	return flight, nil
}

// leave connects the device and has it leave things behind.
func (p *intruder) leave() (*guest, error) {
	g, err := p.join(p.o.Device, p.stayer(&mqtt.Will{Topic: p.topic(p.o.Device, "u/will"), Payload: []byte("will"), QoS: 1, Retain: true}))
	if err != nil {
		return nil, err
	}
	for _, leaf := range []string{"kept", "flight"} {
		m := mqtt.Publish{Topic: []byte(p.topic(p.o.Device, "u/"+leaf)), QoS: 1, Retain: leaf == "kept", Payload: []byte(leaf)}
		if ok, err := g.publish(m); err != nil || !ok {
			return nil, fmt.Errorf("the device's message on u/%s was not taken: %w", leaf, err)
		}
	}
	return g, nil
}

// collect goes to each session of the service. The other device's fence, which must come
// in each of them, comes after what waits there.
func (a *aftermath) collect(p *intruder) error {
	other, err := p.join(p.o.Other, hello{id: p.o.Other.Name})
	if err != nil {
		return err
	}
	for id, to := range map[string]*[]string{queueReader: &a.queued, flightReader: &a.flight, newReader: &a.kept} {
		p.extend()
		s, err := p.reader(id, id != newReader)
		if err != nil {
			return err
		}
		if id == newReader {
			if err := p.reads(s); err != nil {
				return err
			}
		}
		other.limit = p.limit
		if err := p.fence(other, s); err != nil {
			return fmt.Errorf("the session %s does not get what another device sends: %w", id, err)
		}
		a.sort(p, s.got, to)
	}
	return nil
}

func (p *intruder) fence(other, s *guest) error {
	topic := p.topic(p.o.Other, "u/fence")
	other.within(p.o.Step)
	if ok, err := other.publish(mqtt.Publish{Topic: []byte(topic), QoS: 1, Payload: []byte("fence")}); err != nil || !ok {
		return fmt.Errorf("the fence was not taken: %w", err)
	}
	return s.hears(topic)
}

func (a *aftermath) sort(p *intruder, got []string, to *[]string) {
	for _, m := range got {
		topic, _, _ := strings.Cut(m, " ")
		switch topic {
		case p.topic(p.o.Other, "u/fence"):
		case p.topic(p.o.Device, "u/will"):
			a.wills = append(a.wills, topic)
		default:
			*to = append(*to, topic)
		}
	}
}

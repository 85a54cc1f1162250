package check

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"hawser/internal/check/tls13"
	"hawser/internal/mqtt"
)

const bounded = "bounds it; a healthy device beside it notices nothing"

// abuseCases: one client that costs as much as it can, with a healthy device beside it.
func abuseCases() []BrokerCase {
	c := func(id, does, clause string, abuse func(p *intruder) error) BrokerCase {
		return BrokerCase{Case: Case{ID: "B9." + id, Does: does, Expect: bounded, Clause: clause}, try: func(p *intruder) error { return p.beside(abuse) }}
	}
	return []BrokerCase{
		c("partial-connect", "half a CONNECT, and silence", "MQTT 3.1-1, 4.8", func(p *intruder) error { return p.strange([]byte{0x10, 40, 0, 4, 'M', 'Q'}) }),
		c("slow-connect", "a CONNECT, one byte at a time", "MQTT 3.1-1", slowConnect),
		c("huge-length", "a CONNECT that announces 268,435,455 bytes", "MQTT 2.1.4", func(p *intruder) error {
			return p.strange(append([]byte{0x10, 0xff, 0xff, 0xff, 0x7f}, make([]byte, 1000)...))
		}),
		c("length5", "a remaining length of five bytes", "MQTT 2.1.4", func(p *intruder) error { return p.odd([]byte{0x30, 0xff, 0xff, 0xff, 0xff, 0x7f}) }),
		c("publish-first", "a PUBLISH before CONNECT", "MQTT 3.1-1", func(p *intruder) error { return p.strange([]byte{0x30, 4, 0, 1, 't', 'x'}) }),
		c("second-connect", "a second CONNECT", "MQTT 3.1-2", func(p *intruder) error {
			return p.odd((&mqtt.Connect{Version: mqtt.V311, CleanStart: true, ClientID: p.o.Device.Name}).Append(nil, mqtt.V311))
		}),
		c("protocol-name", "a CONNECT of another protocol", "MQTT 3.1.2.1", func(p *intruder) error {
			return p.strange([]byte{0x10, 14, 0, 4, 'X', 'Q', 'T', 'T', 4, 2, 0, 60, 0, 2, 'a', 'b'})
		}),
		c("reserved-flag", "a CONNECT with the reserved flag", "MQTT 3.1.2-3", func(p *intruder) error {
			return p.strange([]byte{0x10, 14, 0, 4, 'M', 'Q', 'T', 'T', 4, 3, 0, 60, 0, 2, 'a', 'b'})
		}),
		c("type-0", "a packet of the reserved type 0", "MQTT 2.1.2", func(p *intruder) error { return p.odd([]byte{0, 0}) }),
		c("qos3", "a PUBLISH of QoS 3", "MQTT 3.3.1-4", func(p *intruder) error { return p.odd(append([]byte{0x36, 7, 0, 1, 't', 0, 1}, "xx"...)) }),
		c("subscribe-flags", "a SUBSCRIBE with reserved flags", "MQTT 3.8.1-1", func(p *intruder) error { return p.odd([]byte{0x80, 6, 0, 1, 0, 1, 't', 0}) }),
		c("topic-longer", "a topic longer than its packet", "MQTT 4.8", func(p *intruder) error { return p.odd(append([]byte{0x30, 6, 0xff, 0xff}, "abcd"...)) }),
		c("not-utf8", "a topic that is not UTF-8", "MQTT 1.5.4-1", func(p *intruder) error { return p.odd([]byte{0x32, 6, 0, 2, 0xff, 0xfe, 0, 1}) }),
		c("nul", "a topic with a NUL", "MQTT 1.5.4-2", func(p *intruder) error { return p.odd([]byte{0x32, 7, 0, 3, 'a', 0, 'b', 0, 1}) }),
		c("slashes", "a topic of 65,000 slashes", "MQTT 4.7.3", slashes),
		c("qos2-flood", "5,000 QoS 2 packet ids, never released", "MQTT 4.3.3; CVE-2023-28366 class", qos2Flood),
		c("subscribe-flood", "2,000 subscriptions", "MQTT 3.8", subscribeFlood),
		c("slow-loris", "200 connections that say nothing", "RFC 9846 C.1", idle(200)),
		c("handshake-flood", "200 ClientHellos, and nothing after them", "RFC 9846 C.1; CVE-2011-1473 class", helloFlood(200)),
		c("key-update-flood", "2,000 KeyUpdates", "RFC 9846 4.7.3", keyUpdateFlood),
		c("empty-records", "5,000 empty records", "RFC 9846 5.1; CVE-2021-3449 class", emptyRecords),
		c("garbage", "noise in place of a ClientHello", "RFC 9846 5", garbage),
	}
}

// pulse is a healthy device that publishes and measures how long its PUBACKs take.
type pulse struct {
	g    *guest
	stop chan struct{}
	done sync.WaitGroup

	mu    sync.Mutex
	took  []time.Duration // guarded by mu
	ended error           // guarded by mu
	first chan struct{}   // closed after the first PUBACK
}

const pulseEvery = 10 * time.Millisecond

func (p *intruder) startPulse() (*pulse, error) {
	g, err := p.join(p.o.Other, hello{id: p.o.Other.Name})
	if err != nil {
		return nil, err
	}
	u := &pulse{g: g, stop: make(chan struct{}), first: make(chan struct{})}
	topic := []byte(p.topic(p.o.Other, "u/check"))
	u.done.Go(func() {
		tick := time.NewTicker(pulseEvery)
		defer tick.Stop()
		for n := 0; u.beat(topic, p.o.Step); n++ {
			if n == 0 {
				close(u.first)
			}
			select {
			case <-u.stop:
				return
			case <-tick.C:
			}
		}
	})
	select {
	case <-u.first:
		return u, nil
	case <-time.After(p.o.Step):
		return nil, errors.New("the healthy device gets no PUBACK")
	}
}

func (u *pulse) beat(topic []byte, limit time.Duration) bool {
	u.g.within(limit)
	began := time.Now()
	ok, err := u.g.publish(mqtt.Publish{Topic: topic, QoS: 1, Payload: []byte("beat")})
	u.mu.Lock()
	defer u.mu.Unlock()
	if err == nil && !ok {
		err = errors.New("its message was refused")
	}
	u.took, u.ended = append(u.took, time.Since(began)), err
	return err == nil
}

func (u *pulse) end() (n int, p99 time.Duration, err error) {
	close(u.stop)
	u.done.Wait()
	slices.Sort(u.took)
	return len(u.took), u.took[len(u.took)*99/100], u.ended
}

// slowest is what a healthy device may wait for a PUBACK beside an abuser.
const slowest = 2 * time.Second

// beside runs abuse with a healthy device beside it, and judges by both.
func (p *intruder) beside(abuse func(p *intruder) error) error {
	u, err := p.startPulse()
	if err != nil {
		return err
	}
	err = abuse(p)
	n, p99, broken := u.end()
	p.note = strings.TrimSpace(fmt.Sprintf("%s the healthy device: %d messages, p99 %v", p.note, n, p99.Round(10*time.Microsecond)))
	switch {
	case broken != nil:
		return p.settle(Fail, "the healthy device was cut off: %v", broken)
	case p99 > slowest:
		return p.settle(Fail, "the healthy device waited %v for a PUBACK", p99.Round(time.Millisecond))
	}
	return err
}

// strange sends bytes in place of CONNECT, and wants the connection ended.
func (p *intruder) strange(b []byte) error {
	c, err := p.dial(p.client(p.o.Device))
	if err != nil {
		return err
	}
	g := &guest{Conn: c, version: mqtt.V311}
	if _, err := g.Write(b); err != nil {
		return p.judgeEnd(g, err)
	}
	return p.wantEnd(g)
}

// odd sends bytes after CONNACK, and wants the connection ended.
func (p *intruder) odd(b []byte) error {
	g, err := p.join(p.o.Device, hello{id: p.o.Device.Name})
	if err != nil {
		return err
	}
	if _, err := g.Write(b); err != nil {
		return p.judgeEnd(g, err)
	}
	return p.wantEnd(g)
}

func (p *intruder) wantEnd(g *guest) error {
	began := time.Now()
	if g.closed(p.o.Patience) {
		return p.settle(Pass, "the connection was ended after %v: %s", time.Since(began).Round(time.Millisecond), g.Seen.EndText())
	}
	return p.settle(Warn, "the connection stood for %v", p.o.Patience)
}

func slowConnect(p *intruder) error {
	c, err := p.dial(p.client(p.o.Device))
	if err != nil {
		return err
	}
	g := &guest{Conn: c, version: mqtt.V311}
	ended := make(chan bool, 1)
	go func() { ended <- g.closed(p.o.Patience) }()
	b := (&mqtt.Connect{Version: mqtt.V311, CleanStart: true, ClientID: p.o.Device.Name + strings.Repeat("0", 100)}).Append(nil, mqtt.V311)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	began := time.Now()
	for i := range b {
		if _, err := g.Write(b[i : i+1]); err != nil {
			break
		}
		select {
		case ok := <-ended:
			return p.judgeSlow(ok, began)
		case <-tick.C:
		}
		if time.Since(began) > p.o.Patience {
			break
		}
	}
	return p.judgeSlow(<-ended, began)
}

func (p *intruder) judgeSlow(ended bool, began time.Time) error {
	if ended {
		return p.settle(Pass, "the connection was ended after %v", time.Since(began).Round(time.Millisecond))
	}
	return p.settle(Warn, "the broker listens to one byte a second for %v", p.o.Patience)
}

func slashes(p *intruder) error {
	g, err := p.join(p.o.Device, hello{id: p.o.Device.Name})
	if err != nil {
		return err
	}
	topic := p.topic(p.o.Device, strings.Repeat("/", 65_000-len(p.o.Topics)-8))
	ok, err := g.publish(mqtt.Publish{Topic: []byte(topic), QoS: 1, Payload: []byte("x")})
	if err != nil {
		return p.judgeEnd(g, err)
	}
	return p.settle(Pass, "taken: %v", ok)
}

func qos2Flood(p *intruder) error {
	g, err := p.join(p.o.Device, hello{id: p.o.Device.Name})
	if err != nil {
		return err
	}
	g.within(2 * p.o.Step)
	topic := []byte(p.topic(p.o.Device, "u/check"))
	failed := make(chan error, 1)
	go func() {
		for {
			if _, _, err := g.packet(); err != nil {
				failed <- err
				return
			}
		}
	}()
	n := 0
	for ; n < 5000; n++ {
		m := mqtt.Publish{Topic: topic, QoS: 2, PacketID: uint16(n + 1), Payload: []byte("x")}
		if _, err := g.Write(mqtt.AppendPublish(nil, mqtt.V311, &m)); err != nil {
			break
		}
	}
	g.Raw.Close()
	<-failed
	return p.settle(Pass, "%d were sent", n)
}

func subscribeFlood(p *intruder) error {
	g, err := p.join(p.o.Device, hello{id: p.o.Device.Name})
	if err != nil {
		return err
	}
	g.within(2 * p.o.Step)
	for n := range 2000 {
		if _, err := g.subscribe(p.topic(p.o.Device, fmt.Sprintf("check/%d/#", n))); err != nil {
			return p.settle(Pass, "the connection was ended after %d", n)
		}
	}
	return p.settle(Pass, "all were answered")
}

func idle(n int) func(*intruder) error {
	return func(p *intruder) error {
		var conns []net.Conn
		for range n {
			c, err := p.tcp()
			if err != nil {
				break
			}
			conns = append(conns, c)
		}
		if _, err := p.join(p.o.Device, hello{id: p.o.Device.Name}); err != nil {
			return p.settle(Fail, "with %d silent connections another device is not let in: %v", len(conns), err)
		}
		return p.settle(Pass, "with %d silent connections another device was let in", len(conns))
	}
}

func helloFlood(n int) func(*intruder) error {
	return func(p *intruder) error {
		sent := 0
		for range n {
			raw, err := p.tcp()
			if err != nil {
				break
			}
			k := p.client(nil)
			k.Say = func(c *tls13.Conn, kind byte, m []byte) error {
				if kind != tls13.ClientHello {
					return errPartly
				}
				if err := c.Say(m); err != nil {
					return err
				}
				return errPartly
			}
			if _, err := k.Handshake(&tls13.Conn{Raw: raw}); errors.Is(err, errPartly) {
				sent++
			}
		}
		if _, err := p.join(p.o.Device, hello{id: p.o.Device.Name}); err != nil {
			return p.settle(Fail, "after %d half handshakes another device is not let in: %v", sent, err)
		}
		return p.settle(Pass, "after %d half handshakes another device was let in", sent)
	}
}

func keyUpdateFlood(p *intruder) error {
	g, err := p.join(p.o.Device, hello{id: p.o.Device.Name})
	if err != nil {
		return err
	}
	g.within(2 * p.o.Step)
	for n := range 2000 {
		if err := g.UpdateKey(false); err != nil {
			return p.settle(Pass, "the connection was ended after %d", n)
		}
	}
	if ok, _ := g.ping(); ok {
		return p.settle(Pass, "it goes on")
	}
	return p.settle(Pass, "the connection was ended: %s", g.Seen.EndText())
}

func emptyRecords(p *intruder) error {
	g, err := p.join(p.o.Device, hello{id: p.o.Device.Name})
	if err != nil {
		return err
	}
	for n := range 5000 {
		if err := g.WriteRecord(tls13.TypeData, nil); err != nil {
			return p.settle(Pass, "the connection was ended after %d", n)
		}
	}
	if ok, _ := g.ping(); ok {
		return p.settle(Pass, "it goes on")
	}
	return p.settle(Pass, "the connection was ended: %s", g.Seen.EndText())
}

func garbage(p *intruder) error {
	raw, err := p.tcp()
	if err != nil {
		return err
	}
	c := &tls13.Conn{Raw: raw}
	p.last = c
	if _, err := raw.Write(bytes.Repeat([]byte{0xa5, 0x5a}, 500)); err != nil {
		return p.settle(Pass, "the connection was ended: %v", err)
	}
	c.Drain(p.o.Patience)
	if c.Seen.EndText() == "silence" {
		return p.settle(Warn, "the connection stood for %v", p.o.Patience)
	}
	return p.settle(Pass, "the connection was ended: %s", c.Seen.EndText())
}

// revokeCases take the first device's rights away in mid-test, and come last.
func revokeCases() []BrokerCase {
	need := func(o *BrokerOptions) string {
		if o.Revoke == "" {
			return "not given: --revoke-exec"
		}
		return ""
	}
	return []BrokerCase{
		{Case: Case{ID: "B10.connected", Does: "a device that is revoked while it is connected", Expect: "ends its connection, and lets it in no more", Clause: isolation}, needs: need, try: revokedLive},
		{Case: Case{ID: "B10.will", Does: "the Will and the retained message of a device that was revoked", Expect: "neither is delivered", Clause: isolation}, needs: func(o *BrokerOptions) string {
			if m := need(o); m != "" {
				return m
			}
			return given(o.Service, "--service")
		}, try: revokedLeavings},
	}
}

func (p *intruder) revoke() error {
	text := strings.ReplaceAll(p.o.Revoke, "{id}", p.o.Device.Name)
	if out, err := exec.CommandContext(p.ctx, "/bin/sh", "-c", text).CombinedOutput(); err != nil {
		return fmt.Errorf("--revoke-exec: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// revokedLive leaves a retained message and a Will behind for the case after it.
func revokedLive(p *intruder) error {
	g, err := p.join(p.o.Device, hello{id: p.o.Device.Name, will: &mqtt.Will{Topic: p.topic(p.o.Device, "u/will"), Payload: []byte("will"), QoS: 1, Retain: true}})
	if err != nil {
		return err
	}
	if _, err := g.publish(mqtt.Publish{Topic: []byte(p.topic(p.o.Device, "u/kept")), QoS: 1, Retain: true, Payload: []byte("kept")}); err != nil {
		return err
	}
	if err := p.revoke(); err != nil {
		return err
	}
	began := time.Now()
	if !g.closed(5 * time.Second) {
		return p.settle(Fail, "its connection stands 5 s after it was revoked")
	}
	took := time.Since(began)
	if _, err := p.join(p.o.Device, hello{id: p.o.Device.Name}); !errors.Is(err, errRefused) {
		return p.settle(Fail, "it was let in again: %v", err)
	}
	return p.settle(Pass, "its connection was ended after %v, and it was not let in again", took.Round(time.Millisecond))
}

func revokedLeavings(p *intruder) error {
	s, err := p.join(p.o.Service, hello{id: "check"})
	if err != nil {
		return err
	}
	if ok, err := s.subscribe(p.topic(p.o.Device, "u/#")); err != nil || !ok[0] {
		return skipf("the service may not read the device's topics")
	}
	if _, err := s.ping(); err != nil {
		return err
	}
	if s.heard(p.topic(p.o.Device, "u/kept")) || s.heard(p.topic(p.o.Device, "u/will")) {
		return p.settle(Fail, "what the revoked device left behind is still delivered")
	}
	return p.settle(Pass, "nothing of it is delivered")
}

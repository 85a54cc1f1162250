package check

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"hawser/internal/mqtt"
)

const bounded = "bounds it; a healthy device beside it notices nothing"

// costly is a case with a healthy device beside it.
func costly(id, does, clause string, abuse func(p *intruder) error) BrokerCase {
	return BrokerCase{Case: Case{ID: "B9." + id, Does: does, Expect: bounded, Clause: clause}, try: func(p *intruder) error { return p.beside(abuse) }}
}

// abuseCases: one client that costs as much as it can, with a healthy device beside it.
func abuseCases() []BrokerCase {
	c := costly
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
		c("will-qos3", "a CONNECT with a Will of QoS 3", "MQTT 3.1.2-14", func(p *intruder) error { return p.strange(p.connect(0x1e)) }),
		c("will-flags", "a CONNECT with Will QoS and Will retain, and no Will", "MQTT 3.1.2-13, 3.1.2-15", func(p *intruder) error {
			return p.strange(p.connect(0x2a))
		}),
		c("password-alone", "a CONNECT with a password and no user name", "MQTT 3.1.1 3.1.2-22", func(p *intruder) error { return p.strange(p.connect(0x42)) }),
		c("type-0", "a packet of the reserved type 0", "MQTT 2.1.2", func(p *intruder) error { return p.odd([]byte{0, 0}) }),
		c("qos3", "a PUBLISH of QoS 3", "MQTT 3.3.1-4", func(p *intruder) error { return p.odd(append([]byte{0x36, 7, 0, 1, 't', 0, 1}, "xx"...)) }),
		c("subscribe-flags", "a SUBSCRIBE with reserved flags", "MQTT 3.8.1-1", func(p *intruder) error { return p.odd([]byte{0x80, 6, 0, 1, 0, 1, 't', 0}) }),
		c("topic-longer", "a topic longer than its packet", "MQTT 4.8", func(p *intruder) error { return p.odd(append([]byte{0x30, 6, 0xff, 0xff}, "abcd"...)) }),
		c("not-utf8", "a topic that is not UTF-8", "MQTT 1.5.4-1", func(p *intruder) error { return p.odd([]byte{0x32, 6, 0, 2, 0xff, 0xfe, 0, 1}) }),
		c("nul", "a topic with a NUL", "MQTT 1.5.4-2", func(p *intruder) error { return p.odd([]byte{0x32, 7, 0, 3, 'a', 0, 'b', 0, 1}) }),
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
	g.limit = time.Time{} // it is judged by its own waits, whatever the abuse costs
	u := &pulse{g: g, stop: make(chan struct{}), first: make(chan struct{})}
	topic := []byte(p.topic(p.o.Other, "u/check"))
	u.done.Go(func() {
		tick := time.NewTicker(pulseEvery)
		defer tick.Stop()
		for last, n := false, 0; u.beat(topic, p.o.Step) && !last; n++ {
			if n == 0 {
				close(u.first)
			}
			select {
			case <-u.stop:
				last = true // one more, which tells whether the abuse was survived
			case <-tick.C:
			}
		}
	})
	select {
	case <-u.first:
		return u, nil
	case <-p.ctx.Done():
	case <-time.After(p.left(p.o.Step)):
	}
	return nil, errors.New("the healthy device gets no PUBACK")
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
	g := p.guest(c, mqtt.V311)
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

// connect is a CONNECT of 3.1.1 with those flags, and in its payload whatever a reader
// that looks for it finds: client id, Will topic and Will, user name or password.
func (p *intruder) connect(flags byte) []byte {
	b := []byte{0, 4, 'M', 'Q', 'T', 'T', 4, flags, 0, 60}
	fields := []string{p.o.Device.Name}
	if flags&4 != 0 {
		fields = append(fields, p.topic(p.o.Device, "u/will"), "will")
	}
	if flags&0x40 != 0 {
		fields = append(fields, "password")
	}
	for _, f := range fields {
		b = append(append(b, byte(len(f)>>8), byte(len(f))), f...)
	}
	return append(mqtt.AppendHeader(nil, mqtt.CONNECT, 0, len(b)), b...)
}

func (p *intruder) wantEnd(g *guest) error {
	began := time.Now()
	if g.closed(p.o.Patience) {
		return p.settle(Pass, "the connection was ended after %v: %s", time.Since(began).Round(time.Millisecond), g.Seen.EndText())
	}
	if g.answer != 0 {
		return p.settle(Fail, "it was taken: %v came", g.answer)
	}
	return p.settle(Warn, "the connection stood for %v", p.o.Patience)
}

func slowConnect(p *intruder) error {
	c, err := p.dial(p.client(p.o.Device))
	if err != nil {
		return err
	}
	g := p.guest(c, mqtt.V311)
	ended := make(chan bool, 1)
	go func() { ended <- g.closed(p.o.Patience) }()
	b := (&mqtt.Connect{Version: mqtt.V311, CleanStart: true, ClientID: p.o.Device.Name + strings.Repeat("0", 100)}).Append(nil, mqtt.V311)
	tick := time.NewTicker(max(min(time.Second, p.o.Patience/8), time.Millisecond))
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
	return p.settle(Warn, "the broker listens to one byte at a time for %v", p.o.Patience)
}

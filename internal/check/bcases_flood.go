package check

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"hawser/internal/check/tls13"
	"hawser/internal/mqtt"
)

// floodCases: more of something than anybody needs, with a healthy device beside it.
func floodCases() []BrokerCase {
	c := costly
	return []BrokerCase{
		c("slashes", "a topic of 65,000 slashes", "MQTT 4.7.3", slashes),
		c("qos2-flood", "5,000 QoS 2 packet ids, never released", "MQTT 4.3.3; CVE-2023-28366 class", qos2Flood),
		c("subscribe-flood", "2,000 subscriptions", "MQTT 3.8", subscribeFlood),
		c("slow-loris", "200 connections that say nothing", "RFC 9846 C.1", idle(200)),
		c("handshake-flood", "200 ClientHellos, and nothing after them", "RFC 9846 C.1; CVE-2011-1473 class", helloFlood(200)),
		c("handshake-bytes", "a Certificate message of 16 MB in the handshake", "RFC 9846 5.1, 4.5.1", endlessCertificate),
		c("key-update-flood", "2,000 KeyUpdates", "RFC 9846 4.7.3", keyUpdateFlood),
		c("empty-records", "5,000 empty records", "RFC 9846 5.1, 5.4", emptyRecords),
		c("ccs-flood", "5,000 change_cipher_spec records in the handshake", "RFC 9846 5, D.4; CVE-2020-25648", ccsFlood),
		c("small-records", "2,000 PINGREQs, each byte in its own record", "RFC 9846 5.1", smallRecords),
		c("garbage", "noise in place of a ClientHello", "RFC 9846 5", garbage),
	}
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
	topic := []byte(p.topic(p.o.Device, "u/check"))
	over := make(chan error, 1)
	go func() {
		_, _, err := g.await(mqtt.PINGRESP)
		over <- err
	}()
	n := 0
	for ; n < 5000; n++ {
		m := mqtt.Publish{Topic: topic, QoS: 2, PacketID: uint16(n + 1), Payload: []byte("x")}
		if _, err := g.Write(mqtt.AppendPublish(nil, mqtt.V311, &m)); err != nil {
			break
		}
	}
	// The write can fail: then reading has ended as well, or ends with its deadline.
	_, _ = g.Write((&mqtt.Ping{Type: mqtt.PINGREQ}).Append(nil, mqtt.V311))
	err = <-over
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return p.settle(Pass, "after %d the broker reads no more", n)
	}
	if err != nil {
		return p.settle(Pass, "the connection was ended after %d: %s", n, g.Seen.EndText())
	}
	return p.settle(Pass, "all were taken")
}

func subscribeFlood(p *intruder) error {
	g, err := p.join(p.o.Device, hello{id: p.o.Device.Name})
	if err != nil {
		return err
	}
	g.within(p.o.Step + p.o.Patience)
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
	g.within(p.o.Step + p.o.Patience)
	for n := range 2000 {
		if err := g.UpdateKey(false); err != nil {
			return p.settle(Pass, "the connection was ended after %d", n)
		}
	}
	return p.goesOn(g)
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
	return p.goesOn(g)
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
	c.Drain(p.left(p.o.Patience))
	if c.Seen.EndText() == "silence" {
		return p.settle(Warn, "the connection stood for %v", p.o.Patience)
	}
	return p.settle(Pass, "the connection was ended: %s", c.Seen.EndText())
}

// endlessCertificate sends handshake bytes that belong to one message, before anybody
// knows who it is. What a broker takes of it, anybody can make it keep.
func endlessCertificate(p *intruder) error {
	const declared, sent = 0xffffff, 2 << 20
	k := p.client(p.o.Device)
	took := 0
	k.Say = func(c *tls13.Conn, kind byte, m []byte) error {
		if kind != tls13.Certificate {
			return c.Say(m)
		}
		part := append([]byte{kind, declared >> 16, declared >> 8 & 0xff, declared & 0xff}, make([]byte, 1<<14-4)...)
		for took < sent {
			if err := c.WriteRecord(tls13.TypeHandshake, part); err != nil {
				return err
			}
			took += len(part)
			part = make([]byte, 1<<14)
		}
		return errPartly
	}
	c, err := p.dial(k)
	if c == nil {
		return err
	}
	c.Drain(p.left(p.o.Patience))
	if end := c.Seen.EndText(); end != "silence" {
		return p.settle(Pass, "the connection was ended after at most %d bytes: %s", took, end)
	}
	return p.settle(Warn, "it took %d bytes of one handshake message, and waits for more", took)
}

// ccsFlood sends records that a server passes over, in the middle of the handshake.
func ccsFlood(p *intruder) error {
	k := p.client(p.o.Device)
	n := 0
	k.Say = func(c *tls13.Conn, kind byte, m []byte) error {
		if kind != tls13.Certificate {
			return c.Say(m)
		}
		for ; n < 5000; n++ {
			if err := c.WriteRaw([]byte{tls13.TypeCCS, 3, 3, 0, 1, 1}); err != nil {
				return err
			}
		}
		return c.Say(m)
	}
	c, err := p.dial(k)
	if err == nil {
		_, err = p.login(c, hello{id: p.o.Device.Name})
	}
	if err == nil {
		return p.settle(Pass, "it goes on after %d", n)
	}
	return p.settle(Pass, "the connection was ended after %d: %s", n, c.Seen.EndText())
}

func smallRecords(p *intruder) error {
	g, err := p.join(p.o.Device, hello{id: p.o.Device.Name})
	if err != nil {
		return err
	}
	answered := make(chan error, 1)
	go func() {
		for range 2000 {
			if _, _, err := g.await(mqtt.PINGRESP); err != nil {
				answered <- err
				return
			}
		}
		answered <- nil
	}()
	ping := (&mqtt.Ping{Type: mqtt.PINGREQ}).Append(nil, g.version)
	g.within(p.o.Step + p.o.Patience)
	for n := range 2 * 2000 {
		if _, err := g.Write(ping[n%2 : n%2+1]); err != nil {
			break
		}
	}
	if err := <-answered; err != nil {
		return p.settle(Pass, "the connection was ended: %s", g.Seen.EndText())
	}
	return p.settle(Pass, "all were answered")
}

// goesOn says whether the broker serves the abuser still; both are right.
func (p *intruder) goesOn(g *guest) error {
	ok, err := g.ping()
	switch {
	case ok:
		return p.settle(Pass, "it goes on")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return p.settle(Warn, "the connection stands, and nothing is answered on it")
	}
	return p.settle(Pass, "the connection was ended: %s", g.Seen.EndText())
}

package check

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"hawser/internal/check/tls13"
	"hawser/internal/mqtt"
)

// guest is one MQTT client of the intruder, or of the devices beside it.
type guest struct {
	*tls13.Conn
	version mqtt.Version
	step    time.Duration
	data    []byte
	ids     uint16
	got     []string  // topics and payloads of the messages that came
	limit   time.Time // as in intruder; zero is none
	mute    bool      // it acknowledges no message
	answer  mqtt.Type // what closed saw in answer to what should have ended the connection
}

// hello is how a guest introduces itself.
type hello struct {
	id      string
	version mqtt.Version // 0: 3.1.1
	will    *mqtt.Will
	keep    bool // the session
}

// errRefused is what a broker's refusal of a connection shows as.
var errRefused = errors.New("refused")

// join makes a TLS connection and logs in. A refusal, in TLS or in CONNACK, is errRefused.
func (p *intruder) join(who *Credentials, h hello) (*guest, error) {
	c, err := p.dial(p.client(who))
	if err == nil {
		return p.login(c, h)
	}
	if c == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, err
	}
	c.Drain(p.left(p.o.Step)) // a broker that closes while we write has said why before
	return nil, fmt.Errorf("%w in the handshake: %s", errRefused, c.Seen.EndText())
}

func (p *intruder) guest(c *tls13.Conn, v mqtt.Version) *guest {
	return &guest{Conn: c, version: v, step: p.o.Step, limit: p.limit}
}

func (p *intruder) login(c *tls13.Conn, h hello) (*guest, error) {
	if h.version == 0 {
		h.version = mqtt.V311
	}
	g := p.guest(c, h.version)
	connect := &mqtt.Connect{Version: h.version, CleanStart: !h.keep, KeepAlive: 60, ClientID: h.id, Will: h.will}
	if h.keep && h.version == mqtt.V5 {
		connect.Props.SessionExpiry = 3600
	}
	if _, err := g.Write(connect.Append(nil, h.version)); err != nil {
		c.Drain(p.left(p.o.Step))
		return nil, fmt.Errorf("%w: no CONNACK, %s", errRefused, c.Seen.EndText())
	}
	return g, g.welcomed()
}

// welcomed reads CONNACK.
func (g *guest) welcomed() error {
	head, body, err := g.packet()
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		return fmt.Errorf("%w: no CONNACK, %s", errRefused, g.Seen.EndText())
	}
	if head.Type != mqtt.CONNACK {
		return fmt.Errorf("%v in place of CONNACK", head.Type)
	}
	var a mqtt.Connack
	if err := a.Decode(g.version, head.Flags, body); err != nil {
		return err
	}
	if a.Code.Failed() {
		return fmt.Errorf("%w: CONNACK %v", errRefused, a.Code)
	}
	return nil
}

func (g *guest) packet() (mqtt.Header, []byte, error) {
	for {
		h, n, err := mqtt.ParseHeader(g.data)
		if err != nil {
			return h, nil, err
		}
		if n > 0 && n+h.Remaining <= len(g.data) {
			body := g.data[n : n+h.Remaining]
			g.data = g.data[n+h.Remaining:]
			return h, body, nil
		}
		buf := make([]byte, 1<<14)
		n, err = g.Read(buf)
		g.data = append(g.data, buf[:n]...)
		if err != nil {
			return h, nil, err
		}
		if len(g.data) > maxRead {
			return h, nil, errors.New("the broker sends without end")
		}
	}
}

func (g *guest) nextID() uint16 { g.ids++; return g.ids }

// await reads packets until one is of that type; messages on the way are noted.
func (g *guest) await(t mqtt.Type) (mqtt.Header, []byte, error) {
	for {
		h, body, err := g.packet()
		if err != nil {
			return h, nil, err
		}
		if h.Type == mqtt.PUBLISH {
			if err := g.message(h, body); err != nil {
				return h, nil, err
			}
		}
		if h.Type == t {
			return h, body, nil
		}
		if h.Type == mqtt.DISCONNECT {
			return h, nil, io.EOF
		}
	}
}

func (g *guest) message(h mqtt.Header, body []byte) error {
	var p mqtt.Publish
	if err := p.DecodeAtClient(g.version, h.Flags, body); err != nil {
		return err
	}
	g.got = append(g.got, string(p.Topic)+" "+string(p.Payload))
	if p.QoS == 1 && !g.mute {
		_, err := g.Write((&mqtt.Ack{Type: mqtt.PUBACK, PacketID: p.PacketID}).Append(nil, g.version))
		return err
	}
	return nil
}

func (g *guest) within(d time.Duration) {
	until := time.Now().Add(d)
	if !g.limit.IsZero() && g.limit.Before(until) {
		until = g.limit
	}
	g.Raw.SetDeadline(until)
}

// subscribe asks for filters at QoS 1. granted tells which were given; an error is the
// end of the connection.
func (g *guest) subscribe(filters ...string) (granted []bool, err error) {
	s := &mqtt.Subscribe{PacketID: g.nextID()}
	for _, f := range filters {
		s.Filters = append(s.Filters, mqtt.Subscription{Filter: f, QoS: 1})
	}
	if _, err := g.Write(s.Append(nil, g.version)); err != nil {
		return nil, err
	}
	h, body, err := g.await(mqtt.SUBACK)
	if err != nil {
		return nil, err
	}
	var a mqtt.Suback
	if err := a.Decode(g.version, h.Flags, body); err != nil {
		return nil, err
	}
	for _, c := range a.Codes {
		granted = append(granted, !c.Failed())
	}
	return granted, nil
}

// publish sends one message and waits for what the broker says to it: acknowledged or
// refused (5.0), or an error when it ended the connection.
func (g *guest) publish(p mqtt.Publish) (taken bool, err error) {
	if p.QoS > 0 {
		p.PacketID = g.nextID()
	}
	if _, err := g.Write(mqtt.AppendPublish(nil, g.version, &p)); err != nil {
		return false, err
	}
	if p.QoS == 0 {
		return g.ping()
	}
	a := mqtt.Ack{Type: mqtt.PUBACK}
	if p.QoS == 2 {
		a.Type = mqtt.PUBREC
	}
	h, body, err := g.await(a.Type)
	if err != nil {
		return false, err
	}
	if err := a.Decode(g.version, h.Flags, body); err != nil {
		return false, err
	}
	if a.Code.Failed() || p.QoS == 1 {
		return !a.Code.Failed(), nil
	}
	if _, err := g.Write((&mqtt.Ack{Type: mqtt.PUBREL, PacketID: p.PacketID}).Append(nil, g.version)); err != nil {
		return false, err
	}
	_, _, err = g.await(mqtt.PUBCOMP)
	return err == nil, err
}

// ping is a fence: what was sent before has been read when the answer comes.
func (g *guest) ping() (alive bool, err error) {
	if _, err := g.Write((&mqtt.Ping{Type: mqtt.PINGREQ}).Append(nil, g.version)); err != nil {
		return false, err
	}
	_, _, err = g.await(mqtt.PINGRESP)
	return err == nil, err
}

// closed waits for the broker to end the connection. An answer in place of that, as if
// nothing had been wrong, is noted.
func (g *guest) closed(limit time.Duration) bool {
	g.within(limit)
	for {
		h, body, err := g.packet()
		if err != nil {
			return !errors.Is(err, os.ErrDeadlineExceeded)
		}
		switch h.Type {
		case mqtt.DISCONNECT:
			return true
		case mqtt.CONNACK:
			if len(body) > 1 && body[1] == 0 {
				g.answer = h.Type
				return false
			}
		case mqtt.PUBACK, mqtt.PUBREC, mqtt.SUBACK:
			g.answer = h.Type
			return false
		}
	}
}

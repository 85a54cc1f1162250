package check

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"hawser/internal/check/tls13"
	"hawser/internal/mqtt"
)

// maxRead bounds the application data that is kept of one connection, in bytes.
const maxRead = 1 << 20

// stage is one connection of the client under test, with the false broker's props.
type stage struct {
	*tls13.Conn
	w     *World
	p     *tls13.Peer   // after the handshake
	limit time.Duration // how long the client may take for one step

	patience time.Duration // how long silence lasts where silence is the provocation

	data  []byte // application data read and not used
	first []byte // the first of it

	version  mqtt.Version
	connect  *mqtt.Connect
	did      did
	verdict  Verdict // set by cases that judge themselves
	why      string
	note     string
	waits    []float64                                 // measured pauses before reconnects, seconds
	again    func(ctx context.Context) (*stage, error) // the client's next connection
	ctx      context.Context
	features []string
	noClock  bool
	profile  Profile
	keepBack bool // the certificate is kept back
	took     bool // it waited for the certificate that was kept back
	relayed  bool // the real broker has answered it
}

// did is what an honest connection saw the client do.
type did struct {
	published, qos1, subscribed, pinged, bye bool
	filters                                  []string
	topics                                   []string
	suback                                   uint16
}

// settle gives the case's own verdict.
func (s *stage) settle(v Verdict, format string, args ...any) error {
	s.verdict, s.why = v, fmt.Sprintf(format, args...)
	return nil
}

// server is the honest broker's side of the handshake.
func (s *stage) server() *tls13.Server {
	return &tls13.Server{Chain: s.w.broker, Key: s.w.brokerKey, Ask: true}
}

// shake plays a handshake and keeps what it learnt.
func (s *stage) shake(v *tls13.Server) error {
	p, err := s.held(v).Handshake(s.Conn)
	s.p = p
	return err
}

// until sets the deadline of everything that follows.
func (s *stage) until(d time.Duration) {
	s.Raw.SetDeadline(time.Now().Add(d)) // fails on a closed connection only, and so will the next read
}

// fill reads more application data.
func (s *stage) fill() error {
	buf := make([]byte, 1<<14)
	n, err := s.Read(buf)
	if len(s.data)+n > maxRead {
		return errors.New("the client sends without end")
	}
	s.data = append(s.data, buf[:n]...)
	if len(s.first) < 64 {
		s.first = append(s.first, buf[:min(n, 64)]...)
	}
	return err
}

// packet reads the next MQTT packet of the client.
func (s *stage) packet() (mqtt.Header, []byte, error) {
	for {
		h, n, err := mqtt.ParseHeader(s.data)
		if err != nil {
			return h, nil, err
		}
		if n > 0 && n+h.Remaining <= len(s.data) {
			body := s.data[n : n+h.Remaining]
			s.data = s.data[n+h.Remaining:]
			return h, body, nil
		}
		if err := s.fill(); err != nil {
			return h, nil, err
		}
	}
}

// hear waits for CONNECT.
func (s *stage) hear() error {
	h, body, err := s.packet()
	if err != nil {
		return err
	}
	if h.Type != mqtt.CONNECT {
		return fmt.Errorf("the client began with %v", h.Type)
	}
	c := new(mqtt.Connect)
	if err := c.Decode(0, h.Flags, body); err != nil {
		return fmt.Errorf("CONNECT does not parse: %w", err)
	}
	s.connect, s.version = c, c.Version
	return nil
}

func (s *stage) send(p interface {
	Append([]byte, mqtt.Version) []byte
}) error {
	_, err := s.Write(p.Append(nil, s.version))
	return err
}

// welcome is an honest connection up to CONNACK.
func (s *stage) welcome() error {
	if err := s.shake(s.server()); err != nil {
		return err
	}
	if err := s.hear(); err != nil {
		return err
	}
	return s.send(&mqtt.Connack{})
}

// attend is an honest broker for d, or until stop says so after a packet.
func (s *stage) attend(d time.Duration, stop func(h mqtt.Header) bool) error {
	s.until(d)
	for {
		h, body, err := s.packet()
		if err != nil {
			return err
		}
		if err := s.answer(h, body); err != nil {
			s.Drain(d) // it may have gone: what it said last is still to be read
			return err
		}
		if s.did.bye || stop != nil && stop(h) {
			return nil
		}
	}
}

// answer is what an honest broker says to one packet.
func (s *stage) answer(h mqtt.Header, body []byte) error {
	switch h.Type {
	case mqtt.PUBLISH:
		return s.published(h, body)
	case mqtt.PUBREL:
		a := mqtt.Ack{Type: mqtt.PUBREL}
		if err := a.Decode(s.version, h.Flags, body); err != nil {
			return err
		}
		return s.send(&mqtt.Ack{Type: mqtt.PUBCOMP, PacketID: a.PacketID})
	case mqtt.SUBSCRIBE:
		return s.subscribed(h, body)
	case mqtt.UNSUBSCRIBE:
		u := new(mqtt.Unsubscribe)
		if err := u.Decode(s.version, h.Flags, body); err != nil {
			return err
		}
		return s.send(&mqtt.Unsuback{PacketID: u.PacketID, Codes: make([]mqtt.ReasonCode, len(u.Filters))})
	case mqtt.PINGREQ:
		s.did.pinged = true
		return s.send(&mqtt.Ping{Type: mqtt.PINGRESP})
	case mqtt.DISCONNECT:
		s.did.bye = true
	}
	return nil
}

func (s *stage) published(h mqtt.Header, body []byte) error {
	p := new(mqtt.Publish)
	if err := p.Decode(s.version, h.Flags, body); err != nil {
		return err
	}
	s.did.published = true
	s.did.topics = append(s.did.topics, string(p.Topic))
	switch p.QoS {
	case 1:
		s.did.qos1 = true
		return s.send(&mqtt.Ack{Type: mqtt.PUBACK, PacketID: p.PacketID})
	case 2:
		s.did.qos1 = true
		return s.send(&mqtt.Ack{Type: mqtt.PUBREC, PacketID: p.PacketID})
	}
	return nil
}

func (s *stage) readSubscribe(h mqtt.Header, body []byte) (*mqtt.Subscribe, error) {
	p := new(mqtt.Subscribe)
	if err := p.Decode(s.version, h.Flags, body); err != nil {
		return nil, err
	}
	s.did.subscribed, s.did.suback = true, p.PacketID
	for _, f := range p.Filters {
		s.did.filters = append(s.did.filters, f.Filter)
	}
	return p, nil
}

func (s *stage) subscribed(h mqtt.Header, body []byte) error {
	p, err := s.readSubscribe(h, body)
	if err != nil {
		return err
	}
	a := &mqtt.Suback{PacketID: p.PacketID}
	for _, f := range p.Filters {
		a.Codes = append(a.Codes, mqtt.ReasonCode(f.QoS))
	}
	return s.send(a)
}

// evidence is what there is to show of this connection.
func (s *stage) evidence() Evidence {
	return Evidence{Connected: true, Farthest: s.Seen.Farthest(), Ended: s.Seen.EndText(), Sent: s.Seen.AppBytes,
		First: firstBytes(s.first), Note: s.note, Waits: s.waits}
}

// gave reports whether the client has ended the connection, by itself.
func (s *stage) gave() bool {
	return s.Seen.End != nil && !errors.Is(s.Seen.End, os.ErrDeadlineExceeded) && !errors.Is(s.Seen.End, net.ErrClosed)
}

// leaked names what a false broker must not get, "" when nothing of it was sent.
func (s *stage) leaked() string {
	switch {
	case s.Seen.AppBytes > 0:
		return fmt.Sprintf("%d bytes of application data", s.Seen.AppBytes)
	case s.Seen.Foreign > 0:
		return fmt.Sprintf("%d bytes under keys of its own", s.Seen.Foreign)
	case s.Seen.Finished:
		return "its Finished"
	case s.Seen.Certificate:
		return "its certificate"
	}
	return ""
}

package broker

import (
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"time"

	"hawser/internal/identity"
	"hawser/internal/mqtt"
	"hawser/internal/registry"
)

// Why CONNECT was refused.
var (
	errClientID = errors.New("client id differs from the certificate's name")
	errSessions = errors.New("too many sessions of this principal")
	errShutdown = errors.New("server is shutting down")
	errWill     = errors.New("will on a topic that is not allowed")
	errAuth     = errors.New("authentication method: there is none but the certificate")
)

// readConnect reads the first packet of an admitted client.
func (b *Broker) readConnect(t *tls.Conn) (mqtt.Connect, error) {
	var p mqtt.Connect
	buf := make([]byte, 0, 512)
	for {
		h, n, err := mqtt.ParseHeader(buf)
		switch {
		case err != nil:
			return p, err
		case len(buf) > 0 && h.Type != 0 && h.Type != mqtt.CONNECT:
			return p, &mqtt.Error{Code: mqtt.ProtocolError, Text: h.Type.String() + " before CONNECT"}
		case n > 0 && n+h.Remaining > b.cfg.Limits.MaxPacket:
			return p, &mqtt.Error{Code: mqtt.PacketTooLarge, Text: "CONNECT of more than the maximum size"}
		case n > 0 && len(buf) == n+h.Remaining:
			return p, p.Decode(0, h.Flags, buf[n:])
		}
		want := 2 // never beyond CONNECT: what follows belongs to the read loop
		if n > 0 {
			want = n + h.Remaining
		} else if len(buf) > 0 {
			want = len(buf) + 1
		}
		if cap(buf) < want {
			buf = append(make([]byte, 0, min(want, 2*cap(buf))), buf...)
		}
		m, err := t.Read(buf[len(buf):min(want, cap(buf))])
		buf = buf[:len(buf)+m]
		if err != nil {
			if errors.Is(err, io.EOF) && len(buf) == 0 {
				err = io.ErrUnexpectedEOF
			}
			return p, err
		}
	}
}

// admit turns a TLS connection into a conn with a session, or refuses it with a
// reason. It runs on the handshake's goroutine.
func (b *Broker) admit(t *tls.Conn, m *member) error {
	p, err := b.readConnect(t)
	if err != nil {
		var bad *mqtt.Error
		if errors.As(err, &bad) {
			b.sayNo(t, p.Version, bad.Code)
		}
		return fmt.Errorf("%v: CONNECT: %w", m.who, err)
	}
	clientID, assigned := p.ClientID, ""
	if clientID == "" && m.who.Kind == identity.Service {
		assigned = "auto-" + rand.Text()
		clientID = assigned
	}
	will, code, err := b.judgeConnect(m, &p, clientID)
	if err != nil {
		b.stats.Refused.Add(1)
		b.sayNo(t, p.Version, code)
		return fmt.Errorf("%v: CONNECT as %q: %w", m.who, clip(clientID, 64), err)
	}
	c := b.newConn(t, m, &p)
	a, err := b.attach(c, &p, clientID, will)
	if err != nil {
		code := mqtt.QuotaExceeded
		switch {
		case errors.Is(err, errShutdown):
			code = mqtt.ServerShuttingDown
		case errors.Is(err, errRevoked):
			code = mqtt.NotAuthorized
		}
		b.sayNo(t, p.Version, code)
		return fmt.Errorf("%v: CONNECT: %w", m.who, err)
	}
	b.welcome(c, &p, a, assigned)
	return nil
}

// judgeConnect decides whether this CONNECT may have a session.
func (b *Broker) judgeConnect(m *member, p *mqtt.Connect, clientID string) (*registry.Will, mqtt.ReasonCode, error) {
	switch {
	case m.who.Kind == identity.Device && clientID != m.who.Name:
		return nil, mqtt.ClientIdentifierNotValid, errClientID
	case p.Props.AuthMethod != "":
		return nil, mqtt.BadAuthenticationMethod, errAuth
	case p.Will == nil:
		return nil, mqtt.Success, nil
	case identity.CheckTopic(p.Will.Topic) != nil:
		return nil, mqtt.TopicNameInvalid, errWill
	case !m.may(Publish, p.Will.Topic):
		return nil, mqtt.NotAuthorized, fmt.Errorf("%w: %s", errWill, clip(p.Will.Topic, 200))
	case p.Will.Retain && len(p.Will.Payload) > 0 && !b.mayRetain(m, p.Will.Topic, len(p.Will.Payload)):
		return nil, mqtt.QuotaExceeded, errWill
	}
	w := p.Will
	return &registry.Will{Topic: w.Topic, Payload: append([]byte(nil), w.Payload...), QoS: w.QoS, Retain: w.Retain,
		Delay: w.DelayInterval, HasExpiry: w.HasExpiry, Expiry: w.Expiry, Props: append([]byte(nil), w.Forward...)}, mqtt.Success, nil
}

// sayNo sends the refusing CONNACK. What is no CONNECT at all, and a malformed one
// of 3.1.1, is closed without (MQTT 3.1.1 3.1.4-1).
func (b *Broker) sayNo(t *tls.Conn, v mqtt.Version, code mqtt.ReasonCode) {
	broken := code == mqtt.MalformedPacket || code == mqtt.ProtocolError || code == mqtt.PacketTooLarge
	if v == 0 || v != mqtt.V5 && broken {
		return
	}
	if v != mqtt.V5 {
		v = mqtt.V311
	}
	ack := mqtt.Connack{Code: code}
	if _, err := t.Write(ack.Append(nil, v)); err == nil {
		t.CloseWrite()
	}
}

func (b *Broker) newConn(t *tls.Conn, m *member, p *mqtt.Connect) *conn {
	q := b.cfg.Limits.of(m.who.Kind)
	c := &conn{b: b, tls: t, m: m, q: q, version: p.Version, window: q.Inflight,
		keepAlive: time.Duration(p.KeepAlive) * time.Second * 3 / 2,
		room:      make(chan struct{}, 1), gone: make(chan struct{})}
	if p.Version == mqtt.V5 {
		c.window = min(c.window, int(p.Props.ReceiveMaximum))
		c.maxPacket = int(min(p.Props.MaxPacketSize, mqtt.MaxRemaining))
		c.problems = !p.Props.NoProblemInfo
	}
	return c
}

// welcome finishes what attach began: the old connection goes, a Will that is
// due fires, the session is on disk; then CONNACK, what waits, and the read loop.
func (b *Broker) welcome(c *conn, p *mqtt.Connect, a attached, assigned string) {
	if a.old != nil {
		b.log.Info("session taken over", "principal", c.m.who.String(), "by", c.tls.RemoteAddr().String())
		a.old.end(fate{code: mqtt.SessionTakenOver, err: errTaken})
		b.stats.Takeovers.Add(1)
	}
	if err := b.settleAttach(c, a); err != nil {
		b.log.Error("session not stored", "principal", c.m.who.String(), "error", err)
		b.sayNo(c.tls, c.version, mqtt.ServerUnavailable)
		c.end(fate{err: err})
		b.stats.Connections.Add(1)
		b.detach(c)
		return
	}
	c.tls.SetDeadline(time.Time{})
	ack := mqtt.Connack{SessionPresent: a.present}
	if c.version == mqtt.V5 {
		b.describe(&ack.Props, c, p, assigned)
	}
	b.stats.Connections.Add(1)
	b.stats.Connects.Add(1)
	b.cfg.admitted(c.m.who, c.tls)
	c.send(&ack)
	b.cfg.presence(c.m.who, true)
	b.resume(c, a.present)
	go c.serve()
}

var errTaken = errors.New("the same client connected again")

// settleAttach waits for everything that CONNACK promises.
func (b *Broker) settleAttach(c *conn, a attached) error {
	if a.fire != nil {
		done := make(chan error, 1)
		if b.publishWill(a.s, a.fire, func(err error) { done <- err }) {
			if err := <-done; err != nil {
				return err
			}
		}
	}
	if a.drop != nil {
		done := make(chan error, 1)
		a.drop.eraseThen(func(err error) { done <- err })
		if err := <-done; err != nil {
			return err
		}
	}
	s := c.s
	s.mu.Lock()
	keep := s.persistent() || s.will != nil || s.stored
	s.mu.Unlock()
	if keep {
		return s.saveWait()
	}
	return nil
}

// describe fills in what a 5.0 client is told about this server.
func (b *Broker) describe(out *mqtt.ConnackProps, c *conn, p *mqtt.Connect, assigned string) {
	out.ReceiveMaximum = c.q.ReceiveMax
	out.MaxPacketSize = uint32(b.cfg.Limits.MaxPacket)
	out.TopicAliasMax = b.cfg.Limits.TopicAliases
	out.AssignedClientID = assigned
	out.NoShared = c.m.who.Kind == identity.Device
	if granted := b.sessionExpiry(p); granted != p.Props.SessionExpiry {
		out.HasSessionExpiry, out.SessionExpiry = true, granted
	}
}

// resume brings a session that was there before up to date.
func (b *Broker) resume(c *conn, present bool) {
	s := c.s
	if !present {
		s.mu.Lock()
		s.resume(c)
		s.mu.Unlock()
		return
	}
	b.mu.Lock()
	s.mu.Lock()
	s.regreet()
	s.resume(c)
	filters := make([]string, 0, len(s.subs))
	for _, sub := range s.subs {
		filters = append(filters, sub.filter)
		if sub.group != nil {
			defer sub.group.lockedFeed()
		}
	}
	s.mu.Unlock()
	b.mu.Unlock()
	for _, f := range filters {
		b.tellSubscribed(c, f)
	}
}

// left notes that a connection has ended.
func (b *Broker) left(c *conn, f *fate) {
	b.stats.Connections.Add(-1)
	if f.err == nil || errors.Is(f.err, errEnded) || errors.Is(f.err, io.EOF) {
		b.log.Debug("disconnected", "principal", c.m.who.String())
		return
	}
	b.log.Info("disconnected", "principal", c.m.who.String(), "reason", f.err.Error())
}

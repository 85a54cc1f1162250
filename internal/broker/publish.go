package broker

import (
	"errors"
	"strings"
	"time"
	"unsafe"

	"hawser/internal/identity"
	"hawser/internal/mqtt"
	"hawser/internal/msglog"
)

// view is b as a string without a copy. It must not outlive the buffer that b
// is a view of.
func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// onPublish takes one PUBLISH: topic, authorizer, limits, log.
func (c *conn) onPublish(flags byte, body []byte) error {
	var p mqtt.Publish
	if err := p.Decode(c.version, flags, body); err != nil {
		return err
	}
	topic, err := c.topicOf(&p)
	if err != nil {
		return err
	}
	if err := c.throttle(len(body)); err != nil {
		return err
	}
	if p.QoS > 0 {
		if done, err := c.acceptID(&p); done || err != nil {
			return err
		}
	}
	code := c.judge(&p, topic)
	if code == mqtt.Success {
		err = c.store(&p, topic)
	}
	if p.QoS == 2 && (code != mqtt.Success || err != nil) {
		c.s.unreceive(p.PacketID)
	}
	if code != mqtt.Success {
		return c.refuse(&p, topic, code)
	}
	return err
}

// topicOf resolves a topic alias (MQTT 5.0 3.3.2.3.4).
func (c *conn) topicOf(p *mqtt.Publish) (string, error) {
	if p.Alias == 0 {
		return view(p.Topic), nil
	}
	if p.Alias > c.b.cfg.Limits.TopicAliases {
		return "", &mqtt.Error{Code: mqtt.TopicAliasInvalid, Text: "topic alias above the maximum"}
	}
	if c.aliases == nil {
		c.aliases = make([]string, c.b.cfg.Limits.TopicAliases)
	}
	known := &c.aliases[p.Alias-1]
	if len(p.Topic) > 0 {
		if len(p.Topic) > identity.MaxTopic {
			return "", &mqtt.Error{Code: mqtt.TopicNameInvalid, Text: "topic of more than 1024 bytes"}
		}
		*known = string(p.Topic)
	}
	if *known == "" {
		return "", &mqtt.Error{Code: mqtt.ProtocolError, Text: "topic alias that was never set"}
	}
	return *known, nil
}

// throttle does not read on while the principal is over its rate. Nothing is
// dropped: TCP holds the rest.
func (c *conn) throttle(size int) error {
	wait := c.m.rate.take(1, size, time.Now())
	if wait <= 0 {
		return nil
	}
	c.b.stats.Throttled.Add(1)
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-c.gone:
		return errEnded
	}
}

// judge asks what a publish may meet before it is taken.
func (c *conn) judge(p *mqtt.Publish, topic string) mqtt.ReasonCode {
	switch {
	case len(topic) > identity.MaxTopic:
		return mqtt.TopicNameInvalid
	case !c.m.may(Publish, topic):
		return mqtt.NotAuthorized
	case p.Retain && len(p.Payload) > 0 && !c.b.mayRetain(c.m, topic, len(p.Payload)):
		return mqtt.QuotaExceeded
	}
	return mqtt.Success
}

// refuse tells the client that its publish was not taken. 3.1.1 has no words for
// that, so the connection is closed (design section 4).
func (c *conn) refuse(p *mqtt.Publish, topic string, code mqtt.ReasonCode) error {
	c.m.refused.Add(1)
	c.b.stats.Refused.Add(1)
	c.b.log.Info("publish refused", "principal", c.m.who.String(), "topic", clip(topic, 200), "reason", code.String())
	if c.version != mqtt.V5 || p.QoS == 0 {
		return &mqtt.Error{Code: code, Text: "publish to a topic that is not allowed"}
	}
	if err := c.settle(); err != nil {
		return err
	}
	t := mqtt.PUBACK
	if p.QoS == 2 {
		t = mqtt.PUBREC
	}
	c.send(&mqtt.Ack{Type: t, PacketID: p.PacketID, Code: code})
	return nil
}

// settle waits until the log has taken all that came before, so that
// acknowledgements leave in the order of arrival (MQTT 5.0 4.6).
func (c *conn) settle() error { return c.waitPending(1) }

// waitPending waits until fewer than n publishes wait for the log.
func (c *conn) waitPending(n int32) error {
	for c.pending.Load() >= n {
		select {
		case <-c.room:
		case <-c.gone:
			return errEnded
		}
	}
	return nil
}

// acceptID looks at the packet id. done: the message is known already. What
// counts towards the receive maximum is what this connection has brought and has
// no PUBACK or PUBCOMP for yet (MQTT 5.0 4.9).
func (c *conn) acceptID(p *mqtt.Publish) (done bool, err error) {
	before := int(c.unacked.Load())
	if p.QoS == 2 {
		known, logged, unreleased := c.s.receive(c, p.PacketID)
		if known {
			if !logged {
				return true, nil // see noteInbound
			}
			if err := c.settle(); err != nil {
				return true, err
			}
			c.send(&mqtt.Ack{Type: mqtt.PUBREC, PacketID: p.PacketID})
			return true, nil
		}
		before += unreleased
	} else if c.version == mqtt.V5 {
		before += c.s.unreleased(c)
	}
	if c.version == mqtt.V5 && before >= int(c.q.ReceiveMax) {
		if p.QoS == 2 {
			c.s.unreceive(p.PacketID)
		}
		return true, errReceiveMax
	}
	return false, nil
}

var errReceiveMax = &mqtt.Error{Code: mqtt.ReceiveMaximumExceeded, Text: "more unacknowledged messages than the receive maximum"}

// store hands the message to the log. Its acknowledgement is sent by
// Broker.committed.
func (c *conn) store(p *mqtt.Publish, topic string) error {
	if err := c.waitPending(int32(c.b.cfg.Limits.ConnIntake)); err != nil {
		return err
	}
	r := msglog.Record{Kind: msglog.KindPublish, From: c.m.who, Topic: topic, Payload: p.Payload, QoS: p.QoS,
		Retain: p.Retain, PacketID: p.PacketID, HasExpiry: p.HasExpiry, Expiry: p.Expiry, Props: p.Forward, Owner: c}
	if c.m.who.Kind != identity.Device {
		r.ClientID = c.s.key.ClientID
	}
	c.b.stats.Received.Add(1)
	if p.QoS == 1 {
		c.unacked.Add(1)
	}
	return c.append(&r)
}

// append counts r as pending and hands it to the log.
func (c *conn) append(r *msglog.Record) error {
	c.pending.Add(1)
	if err := c.b.cfg.Log.Append(r); err != nil {
		c.pending.Add(-1)
		c.b.stats.Unavailable.Add(1)
		return errUnavailable(err)
	}
	return nil
}

// errUnavailable ends a connection whose message the log did not take. The
// client keeps the message, because it sees no acknowledgement.
func errUnavailable(err error) error {
	if errors.Is(err, msglog.ErrTooLarge) {
		return &mqtt.Error{Code: mqtt.PacketTooLarge, Text: err.Error()}
	}
	return &mqtt.Error{Code: mqtt.ServerBusy, Text: err.Error()}
}

// Stored implements msglog.Owner. What was stored is acknowledged by
// Broker.committed; what was not is not acknowledged at all, and the client must
// send it again on a new connection.
func (c *conn) Stored(r *msglog.Record, err error) {
	if err == nil {
		return
	}
	if r.QoS == 2 && r.Kind == msglog.KindPublish {
		c.s.unreceive(r.PacketID)
	}
	c.b.stats.Unavailable.Add(1)
	c.end(fate{code: mqtt.ServerBusy, err: err, will: true})
	c.settled()
}

// settled counts one publish less that waits for the log.
func (c *conn) settled() {
	c.pending.Add(-1)
	select {
	case c.room <- struct{}{}:
	default:
	}
}

// acknowledge answers a record of this connection that is on disk. It tells
// whether anything is to be sent.
func (c *conn) acknowledge(r *msglog.Record) bool {
	defer c.settled()
	code := mqtt.Success
	if r.QueueFull {
		code = mqtt.QuotaExceeded
	}
	switch {
	case r.Kind == msglog.KindRelease:
		c.sendAck(mqtt.PUBCOMP, r.PacketID, mqtt.Success)
	case r.QoS == 1:
		c.unacked.Add(-1)
		c.sendAck(mqtt.PUBACK, r.PacketID, code)
	case r.QoS == 2:
		c.sendAck(mqtt.PUBREC, r.PacketID, mqtt.Success)
	default:
		return false
	}
	c.b.stats.Acknowledged.Add(1)
	return true
}

// onAck takes PUBACK, PUBREC, PUBREL and PUBCOMP.
func (c *conn) onAck(h mqtt.Header, body []byte) error {
	a := mqtt.Ack{Type: h.Type}
	if err := a.Decode(c.version, h.Flags, body); err != nil {
		return err
	}
	switch h.Type {
	case mqtt.PUBACK:
		c.s.onPuback(a.PacketID)
	case mqtt.PUBREC:
		c.s.onPubrec(c, &a)
	case mqtt.PUBCOMP:
		c.s.onPubcomp(a.PacketID)
	case mqtt.PUBREL:
		return c.onPubrel(&a)
	}
	return nil
}

// onPubrel records the release of a packet id; PUBCOMP follows when that is on
// disk.
func (c *conn) onPubrel(a *mqtt.Ack) error {
	if !c.s.isReceived(a.PacketID) {
		if err := c.settle(); err != nil {
			return err
		}
		code := mqtt.Success
		if c.version == mqtt.V5 {
			code = mqtt.PacketIDNotFound
		}
		c.send(&mqtt.Ack{Type: mqtt.PUBCOMP, PacketID: a.PacketID, Code: code})
		return nil
	}
	r := msglog.Record{Kind: msglog.KindRelease, From: c.m.who, PacketID: a.PacketID, Owner: c}
	if c.m.who.Kind != identity.Device {
		r.ClientID = c.s.key.ClientID
	}
	return c.append(&r)
}

// receive notes a QoS 2 packet id. known: it was noted before, and logged says
// whether its message is on disk. unreleased are the others that came on this
// connection.
func (s *session) receive(c *conn, pid uint16) (known, logged bool, unreleased int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.received {
		in := &s.received[i]
		if in.pid == pid {
			if in.gen = c.gen; !in.logged {
				in.again = c
			}
			return true, in.logged, 0
		}
		if in.gen == c.gen {
			unreleased++
		}
	}
	s.received = append(s.received, inbound{pid: pid, gen: c.gen})
	return false, false, unreleased
}

// unreleased counts the QoS 2 messages of one connection without a PUBCOMP.
func (s *session) unreleased(c *conn) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.received {
		if s.received[i].gen == c.gen {
			n++
		}
	}
	return n
}

func (s *session) isReceived(pid uint16) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, in := range s.received {
		if in.pid == pid {
			return true
		}
	}
	return false
}

// unreceive undoes receive for a message that was not taken. A connection that
// has sent it once more in the meantime ends, so that its client tries again.
func (s *session) unreceive(pid uint16) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.received {
		in := &s.received[i]
		if in.pid != pid || in.logged {
			continue
		}
		if in.again != nil {
			in.again.end(fate{code: mqtt.ServerBusy, err: errNotTaken, will: true})
		}
		s.forgetInbound(pid)
		return
	}
}

var errNotTaken = errors.New("a message that was sent twice was not taken the first time")

// noteInbound applies a committed record to the QoS 2 packet ids: live and when
// the log is replayed at start.
func (s *session) noteInbound(r *msglog.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inDirty = true
	if r.Kind == msglog.KindRelease {
		s.forgetInbound(r.PacketID)
		return
	}
	for i := range s.received {
		if in := &s.received[i]; in.pid == r.PacketID {
			in.logged = true
			if in.again != nil && msglog.Owner(in.again) != r.Owner {
				in.again.send(&mqtt.Ack{Type: mqtt.PUBREC, PacketID: in.pid})
			}
			in.again = nil
			return
		}
	}
	s.received = append(s.received, inbound{pid: r.PacketID, logged: true})
}

// forgetInbound removes a packet id. The caller holds mu.
func (s *session) forgetInbound(pid uint16) {
	for i := range s.received {
		if s.received[i].pid == pid {
			s.received = append(s.received[:i], s.received[i+1:]...)
			return
		}
	}
}

// PublishServer publishes in the server's own name. done, which may be nil, is
// called from the log's committer and must not block.
func (b *Broker) PublishServer(topic string, payload []byte, qos byte, retain bool, done func(error)) {
	if done == nil {
		done = func(error) {}
	}
	r := msglog.Record{Kind: msglog.KindPublish, From: identity.TheServer(), Topic: topic, Payload: payload,
		QoS: qos, Retain: retain, Owner: storedFunc(done)}
	if err := b.cfg.Log.Append(&r); err != nil {
		done(err)
	}
}

// SendDirect sends one QoS 1 message to a device that is connected and has a
// subscription for it: no queue, no second try. done hears once whether the
// device acknowledged it.
func (b *Broker) SendDirect(id identity.ID, rest string, payload []byte, done func(delivered bool)) {
	d := &direct{id: id, done: done}
	topic := id.Topic(rest)
	if !b.listens(id, topic) {
		d.finish(false)
		return
	}
	r := msglog.Record{Kind: msglog.KindPublish, From: identity.TheServer(), Topic: topic, Payload: payload,
		QoS: 1, Direct: true, Owner: d}
	if err := b.cfg.Log.Append(&r); err != nil {
		d.finish(false)
	}
}

// SendVolatile sends a QoS 0 message to a connected device without logging it:
// the time of day is worth nothing a second later.
func (b *Broker) SendVolatile(id identity.ID, rest string, payload []byte) bool {
	topic := id.Topic(rest)
	if !b.listens(id, topic) {
		return false
	}
	b.mu.Lock()
	s := b.devices[id]
	b.mu.Unlock()
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.live()
	if c == nil {
		return false
	}
	d := delivery{msg: &message{topic: topic, payload: payload, from: identity.TheServer()}}
	return c.sendPublish(&d, 0) == queued
}

// listens reports whether the device is connected with a subscription for topic.
func (b *Broker) listens(id identity.ID, topic string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.devices[id]
	if s == nil || s.c == nil {
		return false
	}
	for _, sub := range s.subs {
		if identity.Match(sub.filter, topic) {
			return true
		}
	}
	return false
}

// mayRetain reports whether m may keep one more retained message on topic.
func (b *Broker) mayRetain(m *member, topic string, size int) bool {
	q := b.cfg.Limits.of(m.who.Kind)
	b.mu.Lock()
	defer b.mu.Unlock()
	topics, bytes := m.retained, m.retainedBytes
	if old := b.retained.all[topic]; old != nil && old.from == m.who {
		topics, bytes = topics-1, bytes-len(old.payload)
	}
	return topics < q.Retained && bytes+size <= q.RetainedBytes
}

// keep applies a committed record to the retained messages (MQTT 5.0 3.3.1.3).
// The caller holds Broker.mu.
func (b *Broker) keep(r *msglog.Record) {
	b.dropRetained(r.Topic)
	if len(r.Payload) == 0 {
		b.retained.dirty[strings.Clone(r.Topic)] = true
		return
	}
	m := newMessage(r)
	b.retained.put(m)
	owner := b.dir.member(m.from)
	owner.retained++
	owner.retainedBytes += len(m.payload)
}

// dropRetained removes the retained message of a topic, if there is one. The
// caller holds Broker.mu.
func (b *Broker) dropRetained(topic string) {
	if old := b.retained.remove(topic); old != nil {
		m := b.dir.member(old.from)
		m.retained--
		m.retainedBytes -= len(old.payload)
	}
}

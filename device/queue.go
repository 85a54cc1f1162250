package device

import (
	"context"
	"errors"
	"fmt"
	"net"

	"hawser/internal/identity"
	"hawser/internal/mqtt"
)

// outgoing is one message on its way to the server.
type outgoing struct {
	mqtt.Publish
	sent    bool        // at least once, with this packet identifier
	own     bool        // Hawser's: not counted against the limit
	passing bool        // belongs to one connection only
	done    func(error) // called once, without a lock, if not nil; never for a passing one that is lost
}

// maxWindow is how many messages may be unacknowledged at the server; more wait here.
const maxWindow = 32

// Publish sends payload to private/<id>/<topic>, where topic is for example
// "u/telemetry", and waits: at QoS 1 until the server has it on disk, at QoS 0 until it is
// written to the connection. Offline, it waits for the connection. ctx ends the waiting
// only: a message that was accepted stays queued, and is sent. QoS 2 is not offered:
// acknowledged means stored already at QoS 1, where a message can arrive twice after a
// lost connection.
//
// Errors: ErrQueueFull at once; ErrTooLarge, ErrRefused (with the reason), ErrStopped; at
// QoS 0 ErrNotSent.
func (d *Device) Publish(ctx context.Context, topic string, payload []byte, qos byte) error {
	result := make(chan error, 1)
	if err := d.PublishAsync(topic, payload, qos, func(err error) { result <- err }); err != nil {
		return err
	}
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return fmt.Errorf("not acknowledged yet, still queued: %w", ctx.Err())
	}
}

// PublishAsync is Publish without the waiting: an error means that the message was not
// accepted; otherwise done is called once, with what Publish would return, by whichever
// goroutine learns it (perhaps before PublishAsync has returned). It must not block. The
// payload is copied.
func (d *Device) PublishAsync(topic string, payload []byte, qos byte, done func(error)) error {
	full := d.id.Topic(topic)
	switch {
	case qos > 1:
		return errors.New("QoS is 0 or 1")
	case len(payload) > MaxPayload:
		return fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(payload), MaxPayload)
	case identity.Covers(d.id.Topic("d/#"), full):
		return errors.New("what is under d/ is the server's to say")
	}
	if err := identity.CheckTopic(full); err != nil {
		return err
	}
	m := &outgoing{done: done}
	m.Topic, m.Payload, m.QoS = []byte(full), append([]byte(nil), payload...), qos
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.stopped:
		return ErrStopped
	case d.held >= d.cfg.QueueLimit:
		return ErrQueueFull
	}
	d.held++
	d.queue = append(d.queue, m)
	d.pump()
	return nil
}

// Pending is how many messages of Publish are not acknowledged yet.
func (d *Device) Pending() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.held
}

// post queues one of Hawser's own messages at QoS 1. It does not count against the limit:
// their number is bounded by what the server sends.
func (d *Device) post(topic string, payload []byte, retain bool) {
	m := d.ownMessage(topic, payload)
	m.Retain = retain
	d.enqueue(m)
}

func (d *Device) ownMessage(topic string, payload []byte) *outgoing {
	m := &outgoing{own: true}
	m.Topic, m.Payload, m.QoS = []byte(d.id.Topic(topic)), payload, 1
	return m
}

func (d *Device) enqueue(m *outgoing) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.queue = append(d.queue, m)
	d.pump()
}

// pump sends what may be sent. d.mu is held, and let go of while it writes.
func (d *Device) pump() {
	if d.conn != nil {
		d.flush(d.conn)
	}
}

// load moves messages from the queue to the bytes to be written, as far as the window and a
// bounded buffer allow. d.mu is held.
func (d *Device) load(s *session) {
	if d.conn != s || !s.closeBy.IsZero() {
		return
	}
	for len(d.queue) > 0 && len(s.out) < flushAt && (d.queue[0].QoS == 0 || len(d.inflight) < s.window) {
		m := d.queue[0]
		d.queue[0] = nil
		d.queue = d.queue[1:]
		if m.QoS > 0 && !m.sent {
			m.PacketID = d.nextID()
		}
		if mqtt.PublishSize(d.version, &m.Publish) > s.maxPacket {
			d.settle(s, m, ErrTooLarge)
			continue
		}
		m.Dup = m.QoS > 0 && m.sent && s.resumed
		m.sent = true
		s.out = mqtt.AppendPublish(s.out, d.version, &m.Publish)
		if m.QoS > 0 {
			d.inflight = append(d.inflight, m)
		} else {
			d.settle(s, m, nil)
		}
	}
}

// settle notes what became of m, to be told after the next write. d.mu is held.
func (d *Device) settle(s *session, m *outgoing, err error) {
	if !m.own {
		d.held--
	}
	if m.done == nil {
		return
	}
	s.settled = append(s.settled, outcome{m, err})
}

// nextID gives a packet identifier that is not in use. d.mu is held.
func (d *Device) nextID() uint16 {
	for {
		if d.lastID++; d.lastID != 0 && !d.idInUse(d.lastID) {
			return d.lastID
		}
	}
}

func (d *Device) idInUse(id uint16) bool {
	for _, m := range d.inflight {
		if m.PacketID == id {
			return true
		}
	}
	for _, m := range d.queue { // those of an earlier connection stand first, after this one's reports
		if !m.sent && !m.passing {
			break
		}
		if m.sent && m.PacketID == id {
			return true
		}
	}
	return false
}

// acked ends the message that the server has acknowledged.
func (d *Device) acked(a *mqtt.Ack) error {
	d.mu.Lock()
	m := d.takeInflight(a.PacketID)
	if m == nil {
		d.mu.Unlock()
		return &mqtt.Error{Code: mqtt.ProtocolError, Text: "PUBACK for what was not sent"}
	}
	if !m.own {
		d.held--
	}
	d.pump()
	d.mu.Unlock()
	var err error
	if a.Code.Failed() {
		err = fmt.Errorf("%w: %s %s: %v %s", ErrRefused, d.id, m.Topic, a.Code, a.Reason)
		d.log.Warn("message refused", "device", d.id, "topic", string(m.Topic), "reason", a.Code.String())
	}
	if m.done != nil {
		m.done(err)
	}
	return nil
}

func (d *Device) takeInflight(id uint16) *outgoing {
	for i, m := range d.inflight {
		if m.PacketID == id {
			d.inflight = append(d.inflight[:i], d.inflight[i+1:]...)
			return m
		}
	}
	return nil
}

// adopt makes s the connection: first its hello and what it has proved, then what an
// earlier one has not got acknowledged, in order, then the rest. The server learns what
// is in use before SUBSCRIBE, at which it decides what to offer.
func (d *Device) adopt(s *session) {
	hello := d.ownMessage("u/hello", d.hello())
	hello.passing = true
	first := append([]*outgoing{hello}, d.reportMessages()...)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conn = s
	for len(first) > 0 && len(d.inflight) < s.window {
		m := first[0]
		m.PacketID, m.sent = d.nextID(), true
		s.out = mqtt.AppendPublish(s.out, d.version, &m.Publish)
		d.inflight, first = append(d.inflight, m), first[1:]
	}
	d.queue = append(first, d.queue...)
	s.subscribe(d.nextID())
	d.pump()
}

// orphan takes back what the lost connection s had in flight.
func (d *Device) orphan(s *session) {
	d.mu.Lock()
	d.conn = nil
	if s.failed == nil {
		s.failed = net.ErrClosed // nobody writes to it any more
	}
	back := make([]*outgoing, 0, len(d.inflight)+len(d.queue))
	for _, m := range d.inflight {
		if !m.passing {
			back = append(back, m)
		}
	}
	for _, m := range d.queue {
		if !m.passing {
			back = append(back, m)
		}
	}
	d.queue = back
	d.inflight = nil
	settled := s.settled
	s.settled = nil
	d.mu.Unlock()
	tell(settled, ErrNotSent)
}

// fail ends every message that is still held, when Run ends.
func (d *Device) fail(err error) {
	d.mu.Lock()
	d.stopped = true
	left := append(d.inflight, d.queue...)
	d.inflight, d.queue, d.held = nil, nil, 0
	d.mu.Unlock()
	for _, m := range left {
		if m.done != nil {
			m.done(err)
		}
	}
}

// outcome is a message that is dealt with once the bytes before it are written.
type outcome struct {
	m   *outgoing
	err error
}

// tell reports outcomes; lost, if not nil, is what became of those that were to be written.
func tell(all []outcome, lost error) {
	for _, o := range all {
		if o.err == nil {
			o.err = lost
		}
		o.m.done(o.err)
	}
}

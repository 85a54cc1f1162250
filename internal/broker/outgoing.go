package broker

import (
	"slices"
	"time"

	"hawser/internal/identity"
	"hawser/internal/mqtt"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// outgoing is the QoS 1 and 2 messages of one session on their way to the
// client, in one order: retained ones of a new subscription, then what was read
// back from disk, then what is live. Only so much is held in memory; the rest
// waits on disk and behind is set. Guarded by session.mu.
type outgoing struct {
	window   []delivery // sent and not acknowledged, in the order of sending
	waiting  []delivery // to be sent, oldest first
	bytes    int        // of the messages in waiting
	retained []delivery // of new subscriptions, to be sent before waiting
	lastPID  uint16
	storing  int // commits of packet ids under way

	next        msglog.Pos // everything below it was taken into memory
	behind      bool       // more lies on disk, from next on
	reading     bool       // a goroutine reads it
	taken       uint64     // devices: last queue message taken into memory
	newest      uint64     // devices: last queue message known to be on disk
	queued      int        // devices: records in the queue, as far as known
	queuedBytes int        // devices: their topics and payloads

	// done is what is acknowledged although something before it is not, with the
	// packet id of QoS 2 and 0 of QoS 1. stale are packet ids of ended QoS 2
	// deliveries whose rows go with the next checkpoint; they are not used again
	// before.
	done  map[msglog.Pos]uint16
	stale []uint16
}

// Bounds of what is held in memory for one session.
const (
	holdMessages = 64
	holdBytes    = 256 << 10
	maxDone      = 4096 // acknowledgements that may overtake the oldest message
)

// park drops what is in memory when the connection has gone: a persistent
// session finds it on disk again, and any other is about to end. What belongs to
// a group goes back to it; what a command waits for is its sender's to repeat.
func (o *outgoing) park(s *session) {
	kept := o.window[:0]
	for _, d := range o.window {
		switch {
		case d.direct != nil:
			d.direct.finish(false)
		case d.group != nil && d.qos < 2:
			d.group.giveBack(d)
		default:
			if d.ordered() {
				d.msg = nil
			}
			kept = append(kept, d)
		}
	}
	clear(o.window[len(kept):])
	o.window = kept
	for _, d := range o.waiting {
		if d.direct != nil {
			d.direct.finish(false)
		}
	}
	o.next, o.taken = o.floor(s), o.acked()
	o.waiting, o.bytes = nil, 0
	o.behind = true
}

// floor is the position up to which everything is acknowledged. The caller
// holds Broker.mu.
func (o *outgoing) floor(s *session) msglog.Pos {
	low := o.next
	if !o.behind && !s.isDevice() {
		low = s.b.next
	}
	for i := range o.window {
		if o.window[i].ordered() {
			low = min(low, o.window[i].pos)
		}
	}
	for i := range o.waiting {
		if o.waiting[i].ordered() {
			return min(low, o.waiting[i].pos)
		}
	}
	return low
}

// ordered reports whether a delivery belongs to the session's own order in the
// log: not a command, a group's message, or a retained one.
func (d *delivery) ordered() bool { return d.direct == nil && d.group == nil && !d.kept }

// acked is the queue message up to which everything is acknowledged.
func (o *outgoing) acked() uint64 {
	low := o.taken
	for i := range o.window {
		if q := o.window[i].seq; q != 0 && q <= low {
			low = q - 1
		}
	}
	for i := range o.waiting {
		if q := o.waiting[i].seq; q != 0 && q <= low {
			low = q - 1
		}
	}
	return low
}

// push adds a live delivery. What does not fit is found on disk later, or, where
// there is none, dropped. The caller holds mu.
func (s *session) push(d delivery) {
	o := &s.out
	switch {
	case d.direct != nil:
	case o.behind && (d.seq > 0 || !s.isDevice()):
		return
	case d.pos < o.next: // the reader from disk was faster
		return
	case !s.hasRoom(&d):
		if !s.onDisk() || s.isDevice() && d.seq == 0 {
			s.drop()
			return
		}
		o.behind, o.next = true, d.pos
		if d.seq > 0 {
			o.taken = d.seq - 1
		}
		return
	default:
		o.next = d.pos.Next()
		o.taken = max(o.taken, d.seq)
	}
	o.waiting = append(o.waiting, d)
	o.bytes += d.msg.size()
}

func (s *session) hasRoom(d *delivery) bool {
	o := &s.out
	if len(o.waiting) == 0 {
		return true
	}
	if s.onDisk() {
		return len(o.waiting) < holdMessages && o.bytes+d.msg.size() <= holdBytes
	}
	q := s.b.cfg.Limits.of(s.key.Principal.Kind)
	return len(o.waiting) < q.Queue && o.bytes+d.msg.size() <= q.QueueBytes
}

// onDisk reports whether what does not fit into memory can be read back.
func (s *session) onDisk() bool { return !s.isDevice() || s.persistent() }

func (s *session) drop() {
	s.dropped++
	s.m.dropped.Add(1)
	s.b.stats.Dropped.Add(1)
}

// pump sends what the client's window has room for. The caller holds mu.
func (s *session) pump() {
	c, o := s.live(), &s.out
	if c == nil {
		return
	}
	now := time.Now()
	var storing []registry.Inflight
	hold := s.sendDue(c)
	for len(o.window) < c.window && len(o.done) < maxDone && !o.holds(hold) {
		d, ok := o.pop(c)
		if !ok {
			break
		}
		if d.qos == 0 {
			s.sendNow(c, &d, now)
			continue
		}
		d.pid = o.freePID()
		d.state = stateSent
		if d.qos == 2 && s.stored && s.persistent() && !d.kept {
			storing = append(storing, registry.Inflight{PacketID: d.pid, Ref: uint64(d.pos), State: stateSent})
		}
		if o.storing+len(storing) > 0 { // what comes after one that waits waits too
			d.state, d.due = stateStoring, true
		}
		o.window = append(o.window, d)
		if d.state == stateSent {
			s.transmit(c, &o.window[len(o.window)-1], now)
		}
	}
	if len(storing) > 0 {
		s.storeThenSend(storing)
	}
	s.refill()
}

// pop takes the next delivery off.
func (o *outgoing) pop(c *conn) (d delivery, ok bool) {
	if len(o.retained) > 0 {
		if o.retained[0].qos == 0 && c.full() {
			return d, false
		}
		d, o.retained[0] = o.retained[0], delivery{}
		if o.retained = o.retained[1:]; len(o.retained) == 0 {
			o.retained = nil
		}
		return d, true
	}
	if len(o.waiting) == 0 {
		return d, false
	}
	d, o.waiting[0] = o.waiting[0], delivery{}
	o.bytes -= d.msg.size()
	if o.waiting = o.waiting[1:]; len(o.waiting) == 0 {
		o.waiting = nil
	}
	return d, true
}

// sendNow handles what needs no place in the window.
func (s *session) sendNow(c *conn, d *delivery, now time.Time) {
	if left, dead := d.msg.left(now); !dead {
		c.sendPublish(d, left)
	}
	s.finish(d)
}

// transmit sends a delivery that has its place in the window, or takes it out of
// there when it can never be sent; it tells whether it is still in there.
func (s *session) transmit(c *conn, d *delivery, now time.Time) bool {
	left, dead := d.msg.left(now)
	if dead && !d.dup || c.sendPublish(d, left) == never {
		s.conclude(d)
		return false
	}
	return true
}

// conclude takes a delivery out of the window for good.
func (s *session) conclude(d *delivery) {
	gone := *d
	s.removePID(gone.pid)
	s.finish(&gone)
}

// storeThenSend writes the packet ids of QoS 2 deliveries to the registry and
// sends them after the commit: after a crash the same id must be used again, else
// the client takes the message for another one.
func (s *session) storeThenSend(list []registry.Inflight) {
	no, c := s.no, s.c
	s.out.storing++
	s.b.submit("store packet ids", func(tx *registry.Tx) error { return tx.PutInflight(no, list...) }, func(err error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.out.storing--
		if err != nil && s.c == c {
			c.end(fate{code: mqtt.UnspecifiedError, err: err, will: true})
			return
		}
		if s.out.storing == 0 {
			s.pump()
		}
	})
}

// freePID gives a packet id that is not in use.
func (o *outgoing) freePID() uint16 {
	for {
		o.lastPID++
		if o.lastPID == 0 {
			o.lastPID = 1
		}
		if !o.inUse(o.lastPID) {
			return o.lastPID
		}
	}
}

func (o *outgoing) inUse(pid uint16) bool {
	for i := range o.window {
		if o.window[i].pid == pid {
			return true
		}
	}
	for _, p := range o.done {
		if p == pid {
			return true
		}
	}
	return slices.Contains(o.stale, pid)
}

// find gives the delivery with this packet id and QoS. The caller holds mu.
func (s *session) find(pid uint16, qos byte) *delivery {
	for i := range s.out.window {
		if d := &s.out.window[i]; d.pid == pid && d.qos == qos {
			return d
		}
	}
	return nil
}

func (s *session) removePID(pid uint16) {
	w := s.out.window
	for i := range w {
		if w[i].pid == pid {
			copy(w[i:], w[i+1:])
			w[len(w)-1] = delivery{}
			s.out.window = w[:len(w)-1]
			if len(s.out.window) == 0 {
				s.out.window = nil
			}
			return
		}
	}
}

// finish accounts for a delivery that needs nothing more. The caller holds mu
// and has taken it out of the window.
func (s *session) finish(d *delivery) {
	switch {
	case d.direct != nil:
		d.direct.finish(true)
	case d.group != nil:
		d.group.finished(d.pos)
	case d.greets != nil:
		d.greets.greeting--
		s.greeted(d.greets)
	case d.kept || !s.persistent():
	default:
		s.finishOrdered(d)
	}
}

func (s *session) finishOrdered(d *delivery) {
	o := &s.out
	if d.seq > 0 {
		o.queued = max(0, o.queued-1)
		if d.msg != nil {
			o.queuedBytes = max(0, o.queuedBytes-d.msg.size())
		}
	}
	var row uint16
	if d.qos == 2 && d.state != stateWaiting && s.stored {
		row = d.pid
		s.endRow(d)
	}
	low := o.oldest()
	if low < d.pos {
		if o.done == nil {
			o.done = make(map[msglog.Pos]uint16)
		}
		o.done[d.pos] = row
		return
	}
	if row != 0 {
		o.stale = append(o.stale, row)
	}
	for pos, pid := range o.done {
		if pos < low {
			delete(o.done, pos)
			if pid != 0 {
				o.stale = append(o.stale, pid)
			}
		}
	}
}

// oldest is the position of the oldest message that may still be to be
// acknowledged. After a restart the packet ids of QoS 2 bring messages into the
// window that lie behind others which are not read back yet.
func (o *outgoing) oldest() msglog.Pos {
	low := everywhere
	if o.behind {
		low = o.next
	}
	for i := range o.window {
		if o.window[i].ordered() {
			low = min(low, o.window[i].pos)
		}
	}
	for i := range o.waiting {
		if o.waiting[i].ordered() {
			return min(low, o.waiting[i].pos)
		}
	}
	return low
}

// endRow notes that a QoS 2 delivery has ended. Its row goes with the checkpoint
// that moves the cursor past it; until then it keeps the message from being sent
// again.
func (s *session) endRow(d *delivery) {
	no, row := s.no, registry.Inflight{PacketID: d.pid, Ref: uint64(d.pos), State: stateDone}
	s.b.submit("end packet id", func(tx *registry.Tx) error { return tx.PutInflight(no, row) }, nil)
}

// onPuback ends a QoS 1 delivery.
func (s *session) onPuback(pid uint16) {
	s.mu.Lock()
	d := s.find(pid, 1)
	if d == nil {
		s.mu.Unlock()
		return
	}
	s.conclude(d)
	s.pump()
	s.mu.Unlock()
	s.feedGroups()
}

// onPubrec takes the first half of a QoS 2 acknowledgement. PUBREL goes out once
// it is on disk that PUBREC came.
func (s *session) onPubrec(c *conn, a *mqtt.Ack) {
	s.mu.Lock()
	d := s.find(a.PacketID, 2)
	if d != nil && a.Code.Failed() {
		s.conclude(d)
		s.pump()
		s.mu.Unlock()
		s.feedGroups()
		return
	}
	defer s.mu.Unlock()
	switch {
	case d == nil:
		code := mqtt.Success
		if c.version == mqtt.V5 {
			code = mqtt.PacketIDNotFound
		}
		c.send(&mqtt.Ack{Type: mqtt.PUBREL, PacketID: a.PacketID, Code: code})
	case d.state == stateReleased:
		c.send(&mqtt.Ack{Type: mqtt.PUBREL, PacketID: a.PacketID})
	case d.state == stateSent:
		s.release(c, d)
	}
}

// release sends PUBREL, after a commit where the session is stored: on the
// connection there is then.
func (s *session) release(c *conn, d *delivery) {
	pid := d.pid
	if !s.stored || !s.persistent() || !d.ordered() {
		d.state = stateReleased
		c.send(&mqtt.Ack{Type: mqtt.PUBREL, PacketID: pid})
		return
	}
	d.state = stateReceived
	no, row := s.no, registry.Inflight{PacketID: pid, Ref: uint64(d.pos), State: stateReleased}
	s.b.submit("store PUBREC", func(tx *registry.Tx) error { return tx.PutInflight(no, row) }, func(err error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		d, c := s.find(pid, 2), s.live()
		if d == nil || d.state != stateReceived {
			return
		}
		if d.state = stateReleased; err != nil { // PUBREC is not on disk: as if it had not come
			d.state = stateSent
		}
		switch {
		case c == nil:
		case err != nil:
			c.end(fate{code: mqtt.UnspecifiedError, err: err, will: true})
		default:
			c.send(&mqtt.Ack{Type: mqtt.PUBREL, PacketID: pid})
		}
	})
}

// onPubcomp ends a QoS 2 delivery.
func (s *session) onPubcomp(pid uint16) {
	s.mu.Lock()
	d := s.find(pid, 2)
	if d == nil || d.state != stateReleased {
		s.mu.Unlock()
		return
	}
	s.conclude(d)
	s.pump()
	s.mu.Unlock()
	s.feedGroups()
}

// drained is called when the socket took what was queued for it.
func (s *session) drained(c *conn) {
	s.mu.Lock()
	if s.c == c {
		s.pump()
	}
	s.mu.Unlock()
}

// direct is one message of the server to one live device: a command.
type direct struct {
	id   identity.ID
	done func(delivered bool)
}

func (d *direct) finish(delivered bool) {
	if d.done != nil {
		d.done(delivered)
		d.done = nil
	}
}

// Stored implements msglog.Owner: what the log did not take is not delivered.
func (d *direct) Stored(_ *msglog.Record, err error) {
	if err != nil {
		d.finish(false)
	}
}

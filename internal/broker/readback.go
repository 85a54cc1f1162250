package broker

import (
	"errors"

	"hawser/internal/mqtt"
	"hawser/internal/msglog"
)

// refill starts reading from disk when there is something there and room for
// it. The caller holds mu.
func (s *session) refill() {
	o := &s.out
	if !o.behind || o.reading || s.live() == nil || len(o.waiting) > holdMessages/4 {
		return
	}
	o.reading = true
	go s.readBack(s.c)
}

// readBack moves messages from disk into memory until that is full, the disk
// has no more, or the connection has gone.
func (s *session) readBack(c *conn) {
	more := true
	for more {
		var err error
		if s.isDevice() {
			more, err = s.readQueue(c)
		} else {
			more, err = s.readFrames(c)
		}
		if err != nil {
			s.mu.Lock()
			s.out.reading = false
			s.mu.Unlock()
			s.b.log.Error("session cannot be read from the log", "session", s.String(), "error", err)
			c.end(fate{code: mqtt.UnspecifiedError, err: err, will: true})
			return
		}
	}
}

// readQueue reads one batch from the device's queue. more is false when this
// reader has ended.
func (s *session) readQueue(c *conn) (more bool, err error) {
	s.mu.Lock()
	after := s.out.taken
	s.mu.Unlock()
	batch, err := s.b.cfg.Log.QueueRead(s.key.Principal.Name, after, holdMessages/2)
	if err != nil {
		return false, err
	}
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	o := &s.out
	if s.c != c {
		return s.readEnds()
	}
	for _, q := range batch {
		for i := range q.Recs {
			s.restore(&q.Recs[i], q.Seq)
		}
		o.taken = q.Seq
	}
	if len(batch) == 0 && o.newest <= o.taken {
		o.behind = false
		s.dropLost()
		s.recount()
	}
	s.pump()
	if o.behind && len(o.waiting) <= holdMessages/2 {
		return true, nil
	}
	return s.readEnds()
}

// recount corrects what is known of the queue when all of it is in memory. The
// caller holds mu.
func (s *session) recount() {
	o := &s.out
	o.queued, o.queuedBytes = 0, 0
	for _, list := range [][]delivery{o.window, o.waiting} {
		for i := range list {
			if d := &list[i]; d.seq > 0 && d.msg != nil {
				o.queued++
				o.queuedBytes += d.msg.size()
			}
		}
	}
}

// readEnds gives the reader's place up; who finds the session behind later
// starts another. The caller holds mu.
func (s *session) readEnds() (bool, error) {
	s.out.reading = false
	if s.c != nil {
		s.refill()
	}
	return false, nil
}

var errEnough = errors.New("enough for now")

// readFrames reads on in the log from the session's cursor, up to what has been
// routed: what comes after that is live.
func (s *session) readFrames(c *conn) (more bool, err error) {
	s.b.mu.Lock()
	limit := s.b.next
	s.b.mu.Unlock()
	s.mu.Lock()
	from := s.out.next
	s.mu.Unlock()
	full := false
	err = s.b.cfg.Log.Read(s.b.ctx, from, func(r *msglog.Record) error {
		if r.Pos >= limit {
			return errEnough
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if full = s.c != c || len(s.out.waiting) >= holdMessages || s.out.bytes > holdBytes; full {
			return errEnough
		}
		if r.Kind == msglog.KindPublish {
			s.restore(r, 0)
		}
		s.out.next = r.Pos.Next()
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		return false, err
	}
	return s.readTo(c, limit, full)
}

// readTo ends one round of readFrames, which has looked at all below limit
// unless it was full before.
func (s *session) readTo(c *conn, limit msglog.Pos, full bool) (more bool, err error) {
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	o := &s.out
	if s.c != c {
		return s.readEnds()
	}
	if !full {
		if o.next = max(o.next, limit); o.next >= s.b.next {
			o.behind = false
			s.dropLost()
		}
	}
	s.pump()
	if o.behind && len(o.waiting) <= holdMessages/2 {
		return true, nil
	}
	return s.readEnds()
}

// restore takes one record read back: it fills a place of the window that was
// taken before, passes over what is acknowledged, and queues the rest.
func (s *session) restore(r *msglog.Record, seq uint64) {
	o := &s.out
	for i := range o.window {
		d := &o.window[i]
		if d.pos != r.Pos || !d.ordered() {
			continue
		}
		if d.seq = seq; d.due && d.msg == nil {
			d.msg = newMessage(r)
		}
		o.next = max(o.next, r.Pos.Next())
		return
	}
	if _, acknowledged := o.done[r.Pos]; acknowledged || r.Pos < o.next {
		return
	}
	m := s.matchRecord(r)
	if !m.hit || m.qos == 0 {
		return
	}
	d := delivery{msg: newMessage(r), pos: r.Pos, seq: seq, ids: m.ids, qos: m.qos, retain: m.retain}
	o.waiting = append(o.waiting, d)
	o.bytes += d.msg.size()
	o.next = r.Pos.Next()
}

// dropLost gives up places of the window whose message is no longer on disk.
// The caller holds mu.
func (s *session) dropLost() {
	for i := 0; i < len(s.out.window); {
		if d := &s.out.window[i]; d.msg == nil && d.due {
			s.drop()
			s.conclude(d)
			continue
		}
		i++
	}
}

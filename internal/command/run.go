package command

import (
	"context"
	"errors"
	"time"

	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/registry"
)

// Run sends commands and ends expired ones until ctx ends. One goroutine does it
// all: each device's commands leave in the order of their ids.
func (s *Service) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-timer.C:
		}
		s.expire(ctx)
		s.sendAll(ctx)
		timer.Reset(s.untilNext())
	}
}

// untilNext is how long Run may sleep if nobody wakes it.
func (s *Service) untilNext() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.look: // the registry could not be read or written
		return retryAfter
	case s.next.IsZero():
		return time.Hour
	}
	return max(0, time.Until(s.next))
}

// expire ends what is due and finds out when that is the next time.
func (s *Service) expire(ctx context.Context) {
	now := time.Now()
	s.mu.Lock()
	due := s.look || !s.next.IsZero() && !s.next.After(now)
	if due {
		s.look, s.next = true, time.Time{}
	}
	s.mu.Unlock()
	if !due {
		return
	}
	var refs []registry.CommandRef
	err := s.store.Update(ctx, func(tx *registry.Tx) (err error) {
		refs, err = tx.ExpireCommands(now)
		return err
	})
	if err == nil {
		for _, ref := range refs {
			s.finished(ref)
		}
		err = s.lookAhead(ctx)
	}
	if err != nil && ctx.Err() == nil {
		s.log.Error("expired commands not ended yet", "error", err)
	}
}

// lookAhead reads when the next command expires. One that is queued meanwhile
// has set next itself.
func (s *Service) lookAhead(ctx context.Context) error {
	next, err := s.store.NextExpiry(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.look = false
	if !next.IsZero() && (s.next.IsZero() || next.Before(s.next)) {
		s.next = next
	}
	return nil
}

// sendAll works through the list of devices.
func (s *Service) sendAll(ctx context.Context) {
	s.mu.Lock()
	work := s.work
	s.work = nil
	s.mu.Unlock()
	for _, id := range work {
		if err := s.sendNext(ctx, id); err != nil {
			s.sendLater(ctx, id, err)
		}
	}
}

// sendLater looks at a device again after a while: the registry could not be
// read.
func (s *Service) sendLater(ctx context.Context, id identity.ID, err error) {
	if ctx.Err() != nil || errors.Is(err, registry.ErrClosed) {
		return
	}
	s.log.Error("pending commands not sent yet", "device", id, "error", err)
	time.AfterFunc(retryAfter, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.enqueue(id)
	})
}

// sendNext sends the next pending command of a device, if none is on its way.
func (s *Service) sendNext(ctx context.Context, id identity.ID) error {
	s.mu.Lock()
	d := s.devices[id]
	d.queued = false
	round, after, idle := d.round, d.sent, d.ready && !d.flying
	s.mu.Unlock()
	if !idle {
		return nil
	}
	c, ok, err := s.nextPending(ctx, id, after)
	if err != nil {
		return err
	}
	s.mu.Lock()
	if d.round != round { // Ready came in between, and has put it on the list
		s.mu.Unlock()
		return nil
	}
	if !ok {
		if after == 0 && !d.queued { // queued: a command came after the reading
			delete(s.pending, id)
		}
		s.mu.Unlock()
		return nil
	}
	d.sent, d.flying = c.CID, true
	encoding := d.encoding
	s.mu.Unlock()
	s.sender.SendCommand(id, payload(c, encoding), func(delivered bool) { s.sentTo(id, round, c.CID, delivered) })
	return nil
}

// nextPending reads the first pending command above after that has not expired.
func (s *Service) nextPending(ctx context.Context, id identity.ID, after uint64) (registry.Command, bool, error) {
	for {
		list, err := s.store.PendingCommands(ctx, id, after, 1)
		if err != nil || len(list) == 0 {
			return registry.Command{}, false, err
		}
		c := list[0]
		if c.Expires.IsZero() || c.Expires.After(time.Now()) {
			return c, true, nil
		}
		after = c.CID
	}
}

// payload is the message of c. The expiry on the wire is in whole seconds,
// rounded up: the device never gives up before the server does.
func payload(c registry.Command, encoding message.Encoding) []byte {
	m := message.Command{CID: c.CID, Name: c.Name, Args: c.Args}
	if !c.Expires.IsZero() {
		m.Expiry = uint64(c.Expires.Add(time.Second - 1).Unix())
	}
	return m.Encode(encoding)
}

// sentTo is told once what became of a command that was sent. What an earlier
// round hears changes nothing in the present one.
func (s *Service) sentTo(id identity.ID, round, cid uint64, delivered bool) {
	if delivered {
		s.delivered(registry.CommandRef{Device: id, CID: cid})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.devices[id]
	if d.round != round {
		return
	}
	d.flying = false
	d.ready = delivered
	s.enqueue(id)
}

// delivered writes down that the device has the message. If that fails, or the
// answer was faster, nothing is lost: the state is for people to see.
func (s *Service) delivered(ref registry.CommandRef) {
	at := time.Now()
	s.store.Submit(func(tx *registry.Tx) error { return tx.CommandDelivered(ref, at) }, func(err error) {
		if err != nil && !errors.Is(err, registry.ErrState) && !errors.Is(err, registry.ErrClosed) {
			s.log.Error("delivery of a command not recorded", "device", ref.Device, "cid", ref.CID, "error", err)
		}
	})
}

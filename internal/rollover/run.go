package rollover

import (
	"context"
	"errors"
	"slices"
	"time"

	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/registry"
)

// Run sends offers until ctx ends.
func (s *Service) Run(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-tick.C:
		}
		s.land(time.Now())
		for {
			id, ok := s.next(time.Now())
			if !ok {
				break
			}
			s.offer(ctx, id)
		}
	}
}

// land gives the places of devices away that have said nothing for long.
func (s *Service) land(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, end := range s.flying {
		if now.After(end) {
			delete(s.flying, id)
		}
	}
}

// next takes the first device off the list that there is a place for. One that has a
// place goes before those that wait for one.
func (s *Service) next(now time.Time) (identity.ID, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	full := len(s.flying) >= InFlight
	for i := 0; i < len(s.queue); i++ {
		id := s.queue[i]
		if _, has := s.flying[id]; full && !has {
			continue
		}
		s.queue = slices.Delete(s.queue, i, i+1)
		delete(s.queued, id)
		if s.saving[id] > 0 {
			s.held[id] = struct{}{}
			i--
			continue
		}
		s.flying[id] = now.Add(flightTime)
		return id, true
	}
	return 0, false
}

// offer sends a device what it lacks. If that is nothing, its place is free.
func (s *Service) offer(ctx context.Context, id identity.ID) {
	s.mu.Lock()
	v := s.now
	s.mu.Unlock()
	due, err := s.cfg.Store.Due(ctx, v, id)
	if err != nil {
		s.leave(id)
		if ctx.Err() == nil && !errors.Is(err, registry.ErrClosed) {
			s.cfg.Log.Error("what a device is to be offered was not read", "device", id, "error", err)
			time.AfterFunc(retryAfter, func() { s.Ready(id) })
		}
		return
	}
	if due.Certificate == nil && due.Anchors == nil {
		s.settled(id, v)
		return
	}
	m := message.PKI{No: offerNumber(v, due), Certificate: due.Certificate, Anchors: due.Anchors}
	if v.State == registry.RolloverMoving {
		s.cfg.Store.Submit(func(tx *registry.Tx) error { return tx.RolloverProgress(id, registry.ProgressOffered, "") }, func(err error) {
			if err != nil && !errors.Is(err, registry.ErrClosed) {
				s.cfg.Log.Warn("offer not recorded", "device", id, "error", err)
			}
		})
	}
	s.cfg.Sender.SendPKI(id, m.Encode(s.cfg.Encoding(id)), func(delivered bool) {
		if !delivered {
			s.leave(id)
		}
	})
}

// settled notes that a device lacks nothing while v stands.
func (s *Service) settled(id identity.ID, v registry.Rollover) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.flying, id)
	if v.No == s.now.No && v.State == s.now.State && s.saving[id] == 0 {
		s.done[id] = struct{}{}
	}
	s.poke()
}

// leave frees a device's place.
func (s *Service) leave(id identity.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.flying, id)
	s.poke()
}

// offerNumber names what is offered: the same offer has the same number after a restart.
// It is never 0, since one of the lower two numbers is not.
func offerNumber(v registry.Rollover, d registry.Due) uint64 {
	return uint64(v.No)<<32 | uint64(d.Generation&0xffff)<<16 | d.Sequence&0xffff
}

// Package rollover brings devices their new certificates and anchor sets: the rules of
// d/pki and u/pki.
//
// It promises:
//   - A device is offered what it lacks whenever it makes or resumes a subscription that
//     covers d/pki, until it has it. Anchor sets come one after the other: each is signed
//     by a root of the one before.
//   - A certificate counts as proven only when the broker has admitted a connection with
//     it; an anchor set only when the device says that it uses it, on a connection whose
//     leaf the set's root in use has signed. What a device merely says moves nothing on.
//   - Nothing is kept here that the registry does not hold: a restart goes on where the
//     fleet stands.
//   - At most InFlight devices are on their way at one time, so that they do not all
//     reconnect at once.
//
// When a rollover starts and ends is decided in the registry; Changed tells of it.
package rollover

import (
	"context"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/registry"
)

const (
	// InFlight is how many devices may have an offer that they have neither proven nor refused.
	InFlight = 100
	// flightTime is after how long a device that says nothing gives its place away.
	flightTime = 30 * time.Second
	retryAfter = time.Second // for what the registry could not read or write
)

// Store is the registry as far as it is needed here.
type Store interface {
	Submit(apply func(*registry.Tx) error, done func(error))
	LastRollover(ctx context.Context) (registry.Rollover, error)
	AnchorSets(ctx context.Context) ([]registry.AnchorSet, error)
	Fingerprints(ctx context.Context, fn func(identity.ID, [32]byte)) error
	Due(ctx context.Context, v registry.Rollover, id identity.ID) (registry.Due, error)
}

// Sender logs a payload and delivers it, QoS 1, on private/<id>/d/pki to the device's
// live connection if a subscription of it covers that topic. done is called once, on any
// goroutine: true when the device has acknowledged it.
type Sender interface {
	SendPKI(id identity.ID, payload []byte, done func(delivered bool))
}

// Config is what a Service is made of.
type Config struct {
	Store  Store
	Sender Sender
	Log    *slog.Logger

	Encoding func(identity.ID) message.Encoding      // how a device wants to be spoken to
	InUse    func(sequence uint64) *x509.Certificate // the root in use of an anchor set; nil: there is no such set
}

// Service is the offers of one fleet. All methods may be called by many goroutines.
type Service struct {
	cfg  Config
	wake chan struct{} // one slot: Run has something to look at

	mu     sync.Mutex
	now    registry.Rollover         // mu; the last one, open or not
	newest uint64                    // mu; highest sequence that may be offered
	last   map[identity.ID]seen      // mu; what each device was last admitted with
	done   map[identity.ID]struct{}  // mu; devices that lack nothing at present
	saving map[identity.ID]int       // mu; changes of a device that are not committed yet
	held   map[identity.ID]struct{}  // mu; devices that Run was to look at meanwhile
	queue  []identity.ID             // mu; devices to look at, each once
	queued map[identity.ID]struct{}  // mu
	flying map[identity.ID]time.Time // mu; when each gives its place away
}

// seen is a device's last connection.
type seen struct {
	print uint64            // first 8 bytes of the fingerprint of its certificate
	leaf  *x509.Certificate // that the broker showed; nil: not since the start
}

// New makes the service of what is in the store. Nothing is sent before Run.
func New(ctx context.Context, cfg Config) (*Service, error) {
	s := &Service{cfg: cfg, wake: make(chan struct{}, 1), last: map[identity.ID]seen{}, done: map[identity.ID]struct{}{},
		saving: map[identity.ID]int{}, held: map[identity.ID]struct{}{}, queued: map[identity.ID]struct{}{}, flying: map[identity.ID]time.Time{}}
	err := cfg.Store.Fingerprints(ctx, func(id identity.ID, f [32]byte) { s.last[id] = seen{print: short(f)} })
	if err == nil {
		err = s.load(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("read the state of the rollover: %w", err)
	}
	return s, nil
}

func short(f [32]byte) uint64 { return binary.BigEndian.Uint64(f[:]) }

func (s *Service) load(ctx context.Context) error {
	now, err := s.cfg.Store.LastRollover(ctx)
	if err != nil {
		return err
	}
	sets, err := s.cfg.Store.AnchorSets(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now, s.newest = now, 0
	for _, a := range sets {
		if a.Offered {
			s.newest = a.Sequence
		}
	}
	clear(s.done)
	return nil
}

// Changed takes up a new state of the rollover and looks at the devices that are
// connected.
func (s *Service) Changed(ctx context.Context, online []identity.ID) error {
	if err := s.load(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range online {
		s.enqueue(id)
	}
	return nil
}

// anything reports whether any device can lack something. Needs mu.
func (s *Service) anything() bool {
	moves := s.now.ToGeneration != 0 && (s.now.State == registry.RolloverMoving || s.now.State == registry.RolloverAborted)
	return moves || s.newest > 1
}

// enqueue puts a device on Run's list. Needs mu.
func (s *Service) enqueue(id identity.ID) {
	_, waits := s.queued[id]
	_, done := s.done[id]
	if waits || done || !s.anything() {
		return
	}
	s.queued[id] = struct{}{}
	s.queue = append(s.queue, id)
	s.poke()
}

func (s *Service) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Ready tells that a device has made or resumed a subscription that covers d/pki.
func (s *Service) Ready(id identity.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.enqueue(id)
}

// Recheck tells that there is something new for a device.
func (s *Service) Recheck(id identity.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.done, id)
	s.enqueue(id)
}

// Admitted tells that a device got in with a certificate, and which leaf it was shown.
func (s *Service) Admitted(id identity.ID, fingerprint [32]byte, leaf *x509.Certificate) {
	s.mu.Lock()
	same := s.last[id].print == short(fingerprint)
	s.last[id] = seen{short(fingerprint), leaf}
	s.mu.Unlock()
	if !same {
		s.save(id, func(tx *registry.Tx) error { return tx.SaveFingerprint(id, fingerprint) }) // its subscription comes next
	}
}

// save writes a change of a device. Until that is done Run leaves the device alone: it
// would judge by what is no longer true.
func (s *Service) save(id identity.ID, apply func(*registry.Tx) error) {
	s.mu.Lock()
	s.saving[id]++
	s.mu.Unlock()
	s.submit(id, apply)
}

func (s *Service) submit(id identity.ID, apply func(*registry.Tx) error) {
	s.cfg.Store.Submit(apply, func(err error) {
		switch {
		case err == nil, errors.Is(err, registry.ErrClosed):
		case errors.Is(err, registry.ErrNotFound), errors.Is(err, registry.ErrInvalid):
			s.cfg.Log.Warn("state of a device's certificates not recorded", "device", id, "error", err)
		default:
			s.cfg.Log.Error("state of a device's certificates not recorded yet", "device", id, "error", err)
			time.AfterFunc(retryAfter, func() { s.submit(id, apply) })
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.saving[id]--; s.saving[id] <= 0 {
			delete(s.saving, id)
		}
		delete(s.done, id)
		if _, waits := s.held[id]; waits {
			delete(s.held, id)
			s.enqueue(id)
		}
	})
}

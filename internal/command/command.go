// Package command brings commands to devices and their outcomes back: the rules
// of d/cmd and u/cmd.
//
// It promises that a command runs at most once on a device that keeps the
// highest command id it has acted on, and that every command ends with an
// outcome: answered, failed, expired, cancelled, or unknown where the device has
// seen it and its answer was lost. A crash between the row and the message loses
// none: pending rows are sent again, in the order of their ids, whenever the
// device's subscription is made or resumed. Ids are never used again: when the
// log has seen a later start of the server than the registry,
// registry.Tx.RecordStart raises the epoch, which is the upper half of every id.
//
// A device gets one command at a time: the next one is sent when the one before
// is acknowledged (PUBACK), not answered. A copy that is still on its way when
// the device comes back can therefore never overtake a lower id, which the
// device would then have to refuse.
package command

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
	"unicode/utf8"

	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/registry"
)

// retryAfter is how long a change that the registry could not write waits.
const retryAfter = time.Second

// ErrInvalid reports a command that cannot be sent.
var ErrInvalid = errors.New("not a valid command")

// Store is the registry as far as it is needed here.
type Store interface {
	Update(ctx context.Context, apply func(*registry.Tx) error) error
	Submit(apply func(*registry.Tx) error, done func(error))
	Command(ctx context.Context, ref registry.CommandRef) (registry.Command, error)
	PendingCommands(ctx context.Context, id identity.ID, after uint64, limit int) ([]registry.Command, error)
	PendingDevices(ctx context.Context, fn func(identity.ID)) error
	NextExpiry(ctx context.Context) (time.Time, error)
}

// Sender logs a payload and delivers it, QoS 1, on private/<id>/d/cmd to the
// device's live connection if a subscription of it covers that topic. done is
// called once, on any goroutine: true when the device has acknowledged it, false
// when it is certain that this connection will not, or that the log did not take
// it. SendCommand must not wait for done.
type Sender interface {
	SendCommand(id identity.ID, payload []byte, done func(delivered bool))
}

// Service is the commands of one fleet. All methods may be called by many
// goroutines.
type Service struct {
	store  Store
	sender Sender
	log    *slog.Logger
	wake   chan struct{} // one slot: Run has something to look at

	mu      sync.Mutex
	devices map[identity.ID]*device                   // mu; those that were ready since the start
	pending map[identity.ID]struct{}                  // mu; those that may have pending commands
	work    []identity.ID                             // mu; devices to look at, each once
	waiters map[registry.CommandRef][]chan<- struct{} // mu; each with room for one
	next    time.Time                                 // mu; when the next command expires, zero = none known
	look    bool                                      // mu; the registry has to be asked for next
}

// device is one device that has been ready. Its fields belong to Service.mu.
type device struct {
	encoding message.Encoding
	ready    bool   // a subscription covers d/cmd, as far as is known
	queued   bool   // it is in work
	flying   bool   // a command of this round is sent and not acknowledged
	round    uint64 // raised by each Ready
	sent     uint64 // highest cid sent in this round
}

// New makes the service of what is in store. Nothing is sent before Run.
func New(ctx context.Context, store Store, sender Sender, log *slog.Logger) (*Service, error) {
	s := &Service{
		store: store, sender: sender, log: log, wake: make(chan struct{}, 1), look: true,
		devices: map[identity.ID]*device{}, pending: map[identity.ID]struct{}{},
		waiters: map[registry.CommandRef][]chan<- struct{}{},
	}
	err := store.PendingDevices(ctx, func(id identity.ID) { s.pending[id] = struct{}{} })
	if err != nil {
		return nil, fmt.Errorf("read pending commands: %w", err)
	}
	s.poke()
	return s, nil
}

// Queue writes a command down and, if the device is there, sends it. args is nil
// or one CBOR item; expires is zero for never. The device may not be known or
// active: registry.ErrNotFound, registry.ErrState.
func (s *Service) Queue(ctx context.Context, actor string, id identity.ID, name string, args message.Value, expires time.Time) (cid uint64, err error) {
	if err := check(name, args, expires); err != nil {
		return 0, err
	}
	err = s.store.Update(ctx, func(tx *registry.Tx) error {
		cid, err = tx.QueueCommand(registry.Command{Device: id, Name: name, Args: args, CreatedBy: actor, Expires: expires})
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("queue %s: %w", name, err)
	}
	s.mu.Lock()
	s.pending[id] = struct{}{}
	s.enqueue(id)
	if !expires.IsZero() && (s.next.IsZero() || expires.Before(s.next)) {
		s.next = expires
		s.poke()
	}
	s.mu.Unlock()
	return cid, nil
}

func check(name string, args message.Value, expires time.Time) error {
	if name == "" || len(name) > message.MaxText || !utf8.ValidString(name) {
		return fmt.Errorf("%w: a name is 1 to %d bytes of UTF-8", ErrInvalid, message.MaxText)
	}
	if len(args) > message.MaxValue {
		return fmt.Errorf("%w: its arguments are longer than %d bytes", ErrInvalid, message.MaxValue)
	}
	if args != nil {
		if _, err := message.ParseValue(args); err != nil {
			return fmt.Errorf("%w: arguments: %w", ErrInvalid, err)
		}
	}
	if !expires.IsZero() && !expires.After(time.Now()) {
		return fmt.Errorf("%w: it has expired already", ErrInvalid)
	}
	return nil
}

// Ready says that a subscription of the device that covers d/cmd was made or
// resumed, and how the device wants to be spoken to. It does not block.
func (s *Service) Ready(id identity.ID, encoding message.Encoding) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.devices[id]
	if d == nil {
		d = &device{}
		s.devices[id] = d
	}
	d.encoding = encoding
	s.restart(id, d)
}

// restart begins a new round: all that is pending is sent again. Holds mu.
func (s *Service) restart(id identity.ID, d *device) {
	d.ready, d.flying, d.sent = true, false, 0
	d.round++
	s.enqueue(id)
}

// SetEncoding notes how the device wants to be spoken to from now on: the
// encoding of its last hello. It does not block.
func (s *Service) SetEncoding(id identity.ID, encoding message.Encoding) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.devices[id]; d != nil {
		d.encoding = encoding
	}
}

// Resume tries again with all devices that a command could not be delivered to
// since their last Ready. For the owner of the log, when it takes records again:
// their connections may have stood all the time.
func (s *Service) Resume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id := range s.pending {
		if d := s.devices[id]; d != nil && !d.ready {
			s.restart(id, d)
		}
	}
}

// enqueue puts a device on the list of Run if it is ready and may have something
// pending. Holds mu.
func (s *Service) enqueue(id identity.ID) {
	d := s.devices[id]
	if d == nil || !d.ready || d.queued {
		return
	}
	if _, ok := s.pending[id]; !ok {
		return
	}
	d.queued = true
	s.work = append(s.work, id)
	s.poke()
}

func (s *Service) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Cancel ends a command that no device has acknowledged: it is not sent again.
// One that was on its way may still run; then its answer is recorded all the
// same. Other states are registry.ErrState.
func (s *Service) Cancel(ctx context.Context, actor string, id identity.ID, cid uint64) error {
	ref := registry.CommandRef{Device: id, CID: cid}
	err := s.store.Update(ctx, func(tx *registry.Tx) error {
		return tx.FinishCommand(actor, ref, registry.Outcome{State: registry.CommandCancelled, At: time.Now()})
	})
	if err == nil {
		s.finished(ref)
	}
	return err
}

// Answer takes what a device published on u/cmd. It does not block: the outcome
// is submitted to the registry before it returns, so that a checkpoint of the log
// submitted later covers it. A payload that is no answer is an error; one to a
// command that is not known, or whose outcome stands already, changes nothing.
func (s *Service) Answer(id identity.ID, payload []byte) error {
	a, err := message.DecodeAnswer(payload)
	if err != nil {
		return err
	}
	s.record(registry.CommandRef{Device: id, CID: a.CID}, outcome(a))
	return nil
}

// outcome is what an answer says about the state of its command.
func outcome(a message.Answer) registry.Outcome {
	o := registry.Outcome{Status: uint8(a.Status), Result: a.Result, At: time.Now()}
	switch a.Status {
	case message.OK:
		o.State = registry.CommandAnswered
	case message.Duplicate:
		o.State = registry.CommandUnknown
	case message.Expired:
		o.State = registry.CommandExpired
	default:
		o.State = registry.CommandFailed
	}
	return o
}

// record writes an outcome, again and again if the registry cannot.
func (s *Service) record(ref registry.CommandRef, o registry.Outcome) {
	apply := func(tx *registry.Tx) error {
		return tx.FinishCommand("device "+ref.Device.String(), ref, o)
	}
	s.store.Submit(apply, func(err error) {
		switch {
		case err == nil:
			s.finished(ref)
		case errors.Is(err, registry.ErrNotFound):
			s.log.Warn("answer to a command that was never queued", "device", ref.Device, "cid", ref.CID)
		case errors.Is(err, registry.ErrState), errors.Is(err, registry.ErrClosed):
			// An answer sent twice, or a duplicate of what is answered; or the end.
		default:
			s.log.Error("outcome of a command not recorded yet", "device", ref.Device, "cid", ref.CID, "error", err)
			time.AfterFunc(retryAfter, func() { s.record(ref, o) })
		}
	})
}

// finished tells those who wait for a command.
func (s *Service) finished(ref registry.CommandRef) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.waiters[ref] {
		w <- struct{}{}
	}
	delete(s.waiters, ref)
}

// Barred says that a device was revoked, retired or quarantined: nothing is sent
// until its next Ready, and who waits for one of its commands looks again.
func (s *Service) Barred(id identity.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.devices[id]; d != nil {
		d.ready = false
		d.round++
	}
	for ref, list := range s.waiters {
		if ref.Device != id {
			continue
		}
		for _, w := range list {
			w <- struct{}{}
		}
		delete(s.waiters, ref)
	}
}

// Wait gives the command when it is no longer pending, or when its device is
// barred. When ctx ends before, it gives the command as it stands and the cause.
func (s *Service) Wait(ctx context.Context, id identity.ID, cid uint64) (registry.Command, error) {
	ref := registry.CommandRef{Device: id, CID: cid}
	signal := make(chan struct{}, 1)
	s.mu.Lock()
	s.waiters[ref] = append(s.waiters[ref], signal)
	s.mu.Unlock()
	defer s.unwait(ref, signal)
	c, err := s.store.Command(ctx, ref)
	if err != nil || !c.State.Pending() {
		return c, err
	}
	select {
	case <-signal:
		return s.store.Command(ctx, ref)
	case <-ctx.Done():
		c, err := s.store.Command(context.WithoutCancel(ctx), ref)
		if err == nil && c.State.Pending() {
			err = context.Cause(ctx)
		}
		return c, err
	}
}

func (s *Service) unwait(ref registry.CommandRef, signal chan<- struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := s.waiters[ref]
	for i, w := range list {
		if w == signal {
			list = append(list[:i], list[i+1:]...)
			break
		}
	}
	if len(list) == 0 {
		delete(s.waiters, ref)
	} else {
		s.waiters[ref] = list
	}
}

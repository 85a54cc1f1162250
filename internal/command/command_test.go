package command

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/registry"
)

const testID = identity.ID(0xABCD1234)

// newStore makes a registry with the device testID in it, and gives its path.
func newStore(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "registry.db")
	if err := registry.Create(t.Context(), path, registry.Meta{Created: time.Now()}); err != nil {
		t.Fatal(err)
	}
	r := openStore(t, path)
	err := r.Update(t.Context(), func(tx *registry.Tx) error {
		return tx.Enrol("test", registry.Enrolment{ID: testID, KeyHash: [32]byte{1}, CSR: []byte{1}})
	})
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	return path
}

func openStore(t testing.TB, path string) *registry.Registry {
	t.Helper()
	r, err := registry.Open(t.Context(), path, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// sent is one message that left the service.
type sent struct {
	id      identity.ID
	cmd     message.Command
	json    bool
	deliver func(bool)
}

// wire is the way to the devices: what is sent waits in a channel until the test
// takes it.
type wire chan sent

func (w wire) SendCommand(id identity.ID, payload []byte, done func(bool)) {
	cmd, err := message.DecodeCommand(payload)
	if err != nil {
		panic(err)
	}
	w <- sent{id, cmd, payload[0] == '{', done}
}

// take gives the next message; the deadline only ends a test that has failed.
func (w wire) take(t *testing.T) sent {
	t.Helper()
	select {
	case m := <-w:
		return m
	case <-time.After(10 * time.Second):
		t.Fatal("nothing was sent")
		return sent{}
	}
}

func (w wire) none(t *testing.T) {
	t.Helper()
	select {
	case m := <-w:
		t.Fatalf("sent: %+v", m.cmd)
	default:
	}
}

func newService(t *testing.T) (*Service, wire, *registry.Registry) {
	t.Helper()
	r, w := openStore(t, newStore(t)), make(wire, 100)
	return run(t, r, w), w, r
}

// run starts a service that stops with the test.
func run(t testing.TB, r Store, sender Sender) *Service {
	t.Helper()
	s, err := New(t.Context(), r, sender, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { s.Run(ctx); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	return s
}

func queue(t *testing.T, s *Service, name string, expires time.Time) uint64 {
	t.Helper()
	cid, err := s.Queue(t.Context(), "tester", testID, name, nil, expires)
	if err != nil {
		t.Fatal(err)
	}
	return cid
}

func answer(t *testing.T, s *Service, cid uint64, status message.Status, enc message.Encoding) {
	t.Helper()
	if err := s.Answer(testID, message.Answer{CID: cid, Status: status, Result: message.Value{0x07}}.Encode(enc)); err != nil {
		t.Fatal(err)
	}
}

// await gives the command when it is no longer pending.
func await(t *testing.T, s *Service, cid uint64) registry.Command {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := s.Wait(ctx, testID, cid)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// settle waits until the registry has written all that was submitted before.
func settle(t *testing.T, r *registry.Registry) {
	t.Helper()
	if err := r.Update(t.Context(), func(*registry.Tx) error { return nil }); err != nil {
		t.Fatal(err)
	}
}

func state(t *testing.T, r *registry.Registry, cid uint64) registry.CommandState {
	t.Helper()
	settle(t, r)
	c, err := r.Command(t.Context(), registry.CommandRef{Device: testID, CID: cid})
	if err != nil {
		t.Fatal(err)
	}
	return c.State
}

func TestCommandIsAnswered(t *testing.T) {
	for enc, name := range map[message.Encoding]string{message.CBOR: "cbor", message.JSON: "json"} {
		t.Run(name, func(t *testing.T) {
			s, w, r := newService(t)
			s.Ready(testID, enc)
			expires := time.Now().Add(time.Hour)
			cid, err := s.Queue(t.Context(), "tester", testID, "led", message.Value{0xF5}, expires)
			if err != nil {
				t.Fatal(err)
			}
			m := w.take(t)
			if m.cmd.CID != cid || m.cmd.Name != "led" || m.cmd.Args[0] != 0xF5 || m.json != (enc == message.JSON) {
				t.Errorf("sent %+v", m)
			}
			if at := time.Unix(int64(m.cmd.Expiry), 0); at.Before(expires.Truncate(time.Millisecond)) || at.Sub(expires) > time.Second {
				t.Errorf("expires %v, on the wire %v", expires, at)
			}
			if got := state(t, r, cid); got != registry.CommandQueued {
				t.Errorf("before PUBACK: %s", got)
			}
			m.deliver(true)
			if got := state(t, r, cid); got != registry.CommandDelivered {
				t.Errorf("after PUBACK: %s", got)
			}
			answer(t, s, cid, message.OK, enc)
			c := await(t, s, cid)
			if c.State != registry.CommandAnswered || len(c.Result) != 1 || c.Finished.IsZero() || c.Delivered.IsZero() {
				t.Errorf("%+v", c)
			}
		})
	}
}

// TestWhatAnAnswerMeans goes through all states and all answers.
func TestWhatAnAnswerMeans(t *testing.T) {
	type S = registry.CommandState
	const (
		queued, delivered  = registry.CommandQueued, registry.CommandDelivered
		answered, failed   = registry.CommandAnswered, registry.CommandFailed
		expired, cancelled = registry.CommandExpired, registry.CommandCancelled
		unknown            = registry.CommandUnknown
		ok, bad, dup, late = message.OK, message.Failed, message.Duplicate, message.Expired
		nosuch             = message.UnknownCommand
	)
	s, _, r := newService(t)
	for _, c := range []struct {
		from S
		says message.Status
		to   S
	}{
		{queued, ok, answered}, {queued, bad, failed}, {queued, nosuch, failed}, {queued, dup, unknown}, {queued, late, expired},
		{delivered, ok, answered}, {delivered, bad, failed}, {delivered, nosuch, failed}, {delivered, dup, unknown}, {delivered, late, expired},
		{answered, ok, answered}, {answered, bad, answered}, {answered, dup, answered}, {answered, late, answered},
		{failed, ok, failed}, {failed, dup, failed}, {failed, late, failed},
		{expired, ok, answered}, {expired, bad, failed}, {expired, dup, unknown}, {expired, late, expired},
		{cancelled, ok, answered}, {cancelled, dup, unknown}, {cancelled, late, cancelled},
		{unknown, ok, answered}, {unknown, bad, failed}, {unknown, dup, unknown}, {unknown, late, unknown},
	} {
		t.Run(string(c.from)+"-"+c.says.String(), func(t *testing.T) {
			cid := queue(t, s, "x", time.Time{})
			bring(t, r, registry.CommandRef{Device: testID, CID: cid}, c.from)
			answer(t, s, cid, c.says, message.CBOR)
			if got := state(t, r, cid); got != c.to {
				t.Errorf("%s and the answer %s: %s, want %s", c.from, c.says, got, c.to)
			}
		})
	}
}

// bring puts a queued command into another state.
func bring(t *testing.T, r *registry.Registry, ref registry.CommandRef, to registry.CommandState) {
	t.Helper()
	err := r.Update(t.Context(), func(tx *registry.Tx) error {
		switch to {
		case registry.CommandQueued:
			return nil
		case registry.CommandDelivered:
			return tx.CommandDelivered(ref, time.Now())
		}
		return tx.FinishCommand("test", ref, registry.Outcome{State: to, At: time.Now()})
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestStrangeAnswersChangeNothing(t *testing.T) {
	s, _, r := newService(t)
	cid := queue(t, s, "x", time.Time{})
	for _, payload := range [][]byte{nil, {0xA0}, []byte("{}"), []byte("hello"), {0xFF, 0xFF}} {
		if err := s.Answer(testID, payload); !errors.Is(err, message.ErrMessage) {
			t.Errorf("%x: %v", payload, err)
		}
	}
	answer(t, s, cid+1, message.OK, message.CBOR)
	if err := s.Answer(testID+1, message.Answer{CID: cid}.Encode(message.CBOR)); err != nil {
		t.Error(err)
	}
	if got := state(t, r, cid); got != registry.CommandQueued {
		t.Errorf("another's answer made it %s", got)
	}
}

func TestBadCommandsAreRefused(t *testing.T) {
	s, w, _ := newService(t)
	s.Ready(testID, message.CBOR)
	for name, c := range map[string]struct {
		name string
		args message.Value
		exp  time.Time
	}{
		"empty name": {"", nil, time.Time{}}, "long name": {strings.Repeat("x", message.MaxText+1), nil, time.Time{}},
		"not UTF-8": {"\xFF", nil, time.Time{}}, "broken args": {"x", message.Value{0xFF}, time.Time{}},
		"two args": {"x", message.Value{1, 2}, time.Time{}}, "empty args": {"x", message.Value{}, time.Time{}},
		"large args": {"x", make(message.Value, message.MaxValue+1), time.Time{}}, "expired": {"x", nil, time.Now()},
	} {
		if _, err := s.Queue(t.Context(), "tester", testID, c.name, c.args, c.exp); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Queue(t.Context(), "tester", testID+1, "x", nil, time.Time{}); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("unknown device: %v", err)
	}
	w.none(t)
}

func TestOneAtATimeInOrder(t *testing.T) {
	s, w, _ := newService(t)
	first, second := queue(t, s, "a", time.Time{}), queue(t, s, "b", time.Time{})
	s.Ready(testID, message.CBOR)
	m := w.take(t)
	if m.cmd.CID != first {
		t.Fatalf("first %d, sent %d", first, m.cmd.CID)
	}
	third := queue(t, s, "c", time.Time{})
	w.none(t)
	m.deliver(true)
	for _, want := range []uint64{second, third} {
		if m = w.take(t); m.cmd.CID != want {
			t.Fatalf("sent %d, want %d", m.cmd.CID, want)
		}
		m.deliver(true)
	}
	answer(t, s, second, message.OK, message.CBOR)
	await(t, s, second)
	s.Ready(testID, message.JSON) // back again: what is not answered is sent again
	for _, want := range []uint64{first, third} {
		if m = w.take(t); m.cmd.CID != want || !m.json {
			t.Fatalf("sent again %+v, want %d", m, want)
		}
		m.deliver(true)
	}
}

func TestUndeliveredWaitsForReadyOrResume(t *testing.T) {
	s, w, r := newService(t)
	s.Ready(testID, message.CBOR)
	cid := queue(t, s, "a", time.Time{})
	old := w.take(t)
	old.deliver(false)
	queue(t, s, "b", time.Time{})
	w.none(t)
	s.Resume()
	m := w.take(t)
	if m.cmd.CID != cid {
		t.Fatalf("after Resume: %d", m.cmd.CID)
	}
	s.SetEncoding(testID, message.JSON)
	s.Ready(testID, message.JSON)
	again := w.take(t)
	again.deliver(true)
	next := w.take(t)
	if again.cmd.CID != cid || next.cmd.Name != "b" || !next.json {
		t.Fatalf("%+v, %+v", again, next)
	}
	next.deliver(true)
	m.deliver(false) // of a connection that is gone: the new one does not care
	queue(t, s, "c", time.Time{})
	if m := w.take(t); m.cmd.Name != "c" {
		t.Fatalf("%+v", m)
	}
	if got := state(t, r, cid); got != registry.CommandDelivered {
		t.Errorf("%s", got)
	}
}

func TestExpiry(t *testing.T) {
	s, w, r := newService(t)
	late := queue(t, s, "late", time.Now().Add(time.Hour))
	soon := queue(t, s, "soon", time.Now().Add(30*time.Millisecond))
	never := queue(t, s, "never", time.Time{})
	if c := await(t, s, soon); c.State != registry.CommandExpired {
		t.Errorf("%+v", c)
	}
	s.Ready(testID, message.CBOR)
	for _, want := range []uint64{late, never} {
		m := w.take(t)
		if m.cmd.CID != want {
			t.Fatalf("sent %d, want %d", m.cmd.CID, want)
		}
		m.deliver(true)
	}
	if got := state(t, r, late); got != registry.CommandDelivered {
		t.Errorf("late: %s", got)
	}
}

func TestWhatExpiredWhileDownEndsAtTheStart(t *testing.T) {
	path := newStore(t)
	r := openStore(t, path)
	var cid uint64
	err := r.Update(t.Context(), func(tx *registry.Tx) (err error) {
		cid, err = tx.QueueCommand(registry.Command{Device: testID, Name: "x", CreatedBy: "t", Expires: time.Now().Add(-time.Hour)})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	w := make(wire, 1)
	s := run(t, r, w)
	s.Ready(testID, message.CBOR)
	if c := await(t, s, cid); c.State != registry.CommandExpired {
		t.Errorf("%+v", c)
	}
	w.none(t)
}

func TestCancel(t *testing.T) {
	s, w, r := newService(t)
	cid := queue(t, s, "a", time.Time{})
	if err := s.Cancel(t.Context(), "tester", testID, cid); err != nil {
		t.Fatal(err)
	}
	if c := await(t, s, cid); c.State != registry.CommandCancelled {
		t.Errorf("%+v", c)
	}
	kept := queue(t, s, "b", time.Time{})
	s.Ready(testID, message.CBOR)
	m := w.take(t)
	if m.cmd.CID != kept {
		t.Errorf("the cancelled one was sent: %d", m.cmd.CID)
	}
	m.deliver(true)
	settle(t, r)
	if err := s.Cancel(t.Context(), "tester", testID, kept); !errors.Is(err, registry.ErrState) {
		t.Errorf("a delivered one: %v", err)
	}
	if err := s.Cancel(t.Context(), "tester", testID, 999); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("an unknown one: %v", err)
	}
}

func TestRevocationEndsTheWaiting(t *testing.T) {
	s, w, r := newService(t)
	cid := queue(t, s, "a", time.Time{})
	s.Ready(testID, message.CBOR)
	m := w.take(t)
	result := make(chan registry.CommandState)
	go func() {
		c, err := s.Wait(t.Context(), testID, cid)
		if err != nil {
			t.Error(err)
		}
		result <- c.State
	}()
	err := r.Update(t.Context(), func(tx *registry.Tx) error {
		return tx.SetDeviceState("test", testID, registry.DeviceRevoked, "stolen")
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Barred(testID)
	if got := <-result; got != registry.CommandCancelled {
		t.Errorf("%s", got)
	}
	m.deliver(true) // too late to matter
	if got := state(t, r, cid); got != registry.CommandCancelled {
		t.Errorf("%s", got)
	}
	if _, err := s.Queue(t.Context(), "tester", testID, "b", nil, time.Time{}); !errors.Is(err, registry.ErrState) {
		t.Errorf("a revoked device: %v", err)
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	s, _, _ := newService(t)
	cid := queue(t, s, "a", time.Time{})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	c, err := s.Wait(ctx, testID, cid)
	if !errors.Is(err, context.DeadlineExceeded) || c.State != registry.CommandQueued {
		t.Errorf("%+v, %v", c, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.waiters) != 0 {
		t.Errorf("%d waiters are left", len(s.waiters))
	}
}

// slowReader queues a command after the service has read that there is none.
type slowReader struct {
	*registry.Registry
	once  sync.Once
	after func()
}

func (r *slowReader) PendingCommands(ctx context.Context, id identity.ID, after uint64, limit int) ([]registry.Command, error) {
	list, err := r.Registry.PendingCommands(ctx, id, after, limit)
	if len(list) == 0 {
		r.once.Do(r.after)
	}
	return list, err
}

func TestQueuedAfterTheReading(t *testing.T) {
	r, w := &slowReader{Registry: openStore(t, newStore(t))}, make(wire, 10)
	s := run(t, r, w)
	var cid uint64
	r.after = func() { cid = queue(t, s, "b", time.Time{}) }
	first := queue(t, s, "a", time.Time{})
	if err := s.Cancel(t.Context(), "tester", testID, first); err != nil { // so that there is something to look for
		t.Fatal(err)
	}
	s.Ready(testID, message.CBOR)
	if m := w.take(t); m.cmd.CID != cid {
		t.Fatalf("sent %d, want %d", m.cmd.CID, cid)
	}
	s.Ready(testID, message.CBOR)
	if m := w.take(t); m.cmd.CID != cid {
		t.Fatalf("sent again %d, want %d", m.cmd.CID, cid)
	}
}

// deliverAll acknowledges whatever is sent and counts it.
type deliverAll chan struct{}

func (c deliverAll) SendCommand(_ identity.ID, _ []byte, done func(bool)) {
	done(true)
	c <- struct{}{}
}

// BenchmarkReady brings 5,000 devices back at once, with and without a pending
// command each.
func BenchmarkReady(b *testing.B) {
	const devices = 5000
	for name, each := range map[string]bool{"idle": false, "pending": true} {
		b.Run(name, func(b *testing.B) {
			r := openStore(b, newStore(b))
			err := r.Update(b.Context(), func(tx *registry.Tx) error {
				for i := range devices {
					id := identity.ID(0x10000000 + i)
					err := tx.Enrol("test", registry.Enrolment{ID: id, KeyHash: [32]byte{2, byte(i), byte(i >> 8)}, CSR: []byte{1}})
					if err == nil && each {
						_, err = tx.QueueCommand(registry.Command{Device: id, Name: "x", CreatedBy: "test"})
					}
					if err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				b.Fatal(err)
			}
			sent := make(deliverAll, devices)
			s := run(b, r, sent)
			b.ResetTimer()
			for range b.N {
				for i := range devices {
					s.Ready(identity.ID(0x10000000+i), message.CBOR)
				}
				for i := 0; each && i < devices; i++ {
					<-sent
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/1e3/float64(b.N*devices), "µs/device")
		})
	}
}

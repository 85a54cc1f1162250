package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/registry"
)

// world is everything around the service: the log with what devices answered,
// the messages on their way, one device, and the power that may fail on either
// side. The service and the registry in it are the real ones. All steps are
// taken by the test's goroutine; only the pipe is filled by the service's.
type world struct {
	t      *testing.T
	rnd    *rand.Rand
	path   string
	device model
	log    [][]byte // answers on disk, in order
	fed    int      // how many of them this run of the server has handed over
	down   bool     // the server does not run
	r      *registry.Registry
	s      *Service
	stop   func()

	acked map[uint64]bool // commands that Queue has acknowledged

	mu   sync.Mutex
	life int      // mu; number of this run of the server
	pipe []flight // mu; logged and not delivered yet
}

// flight is a message on its way.
type flight struct {
	payload []byte
	done    func(bool)
}

// model is a device that keeps the promises of design section 5.
type model struct {
	frail   bool // it may lose power
	online  bool
	highest uint64         // survives a loss of power
	ran     map[uint64]int // what was done to the world
	outbox  [][]byte       // answers not yet acknowledged by the server
}

// entry is how the service of one run of the server reaches the pipe.
type entry struct {
	w    *world
	life int
}

func (e entry) SendCommand(_ identity.ID, payload []byte, done func(bool)) {
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	if e.life == e.w.life { // else the server has died: nobody hears of it
		e.w.pipe = append(e.w.pipe, flight{payload, done})
	}
}

func newWorld(t *testing.T, seed uint64, frail bool) *world {
	w := &world{t: t, rnd: rand.New(rand.NewPCG(seed, 7)), path: newStore(t), acked: map[uint64]bool{},
		device: model{frail: frail, ran: map[uint64]int{}}}
	w.boot()
	return w
}

// boot starts the server on what is on disk and hands it the answers after the
// checkpoint.
func (w *world) boot() {
	r, err := registry.Open(context.Background(), w.path, registry.Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	s, err := New(context.Background(), r, entry{w, w.life}, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { s.Run(ctx); close(ended) }()
	w.stop = func() { cancel(); <-ended; r.Close() }
	w.r, w.s, w.down = r, s, false
	m, err := r.Meta(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	w.fed = int(m.Checkpoint)
	w.feed()
}

// feed hands logged answers to the service.
func (w *world) feed() {
	for ; w.fed < len(w.log); w.fed++ {
		if err := w.s.Answer(testID, w.log[w.fed]); err != nil {
			w.t.Fatal(err)
		}
	}
}

// crash ends the server at once: what is committed at this moment is all that is
// left, whoever has heard of it.
func (w *world) crash() {
	w.mu.Lock()
	w.life++
	w.pipe = nil
	w.mu.Unlock()
	w.device.online = false
	next := filepath.Join(w.t.TempDir(), "registry.db")
	err := w.r.Update(context.Background(), func(*registry.Tx) error { // the writer writes nothing meanwhile
		for _, suffix := range []string{"", "-wal"} {
			if err := copyFile(next+suffix, w.path+suffix); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.stop()
	w.path, w.down = next, true
}

func copyFile(to, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o600)
}

// step does one thing at random.
func (w *world) step() {
	if w.down {
		w.boot()
		return
	}
	switch n := w.rnd.IntN(100); {
	case n < 20:
		w.queue()
	case n < 60:
		w.arrive()
	case n < 75:
		w.publish()
	case n < 85:
		w.connect()
	case n < 90:
		w.hangUp()
	case n < 95:
		w.checkpoint()
	default:
		w.crash()
	}
}

// queue has Queue cut off by a crash now and then, so that its caller never
// hears of the row.
func (w *world) queue() {
	cid, err := w.s.Queue(context.Background(), "tester", testID, "x", nil, time.Time{})
	if err != nil {
		w.t.Fatal(err)
	}
	if w.acked[cid] {
		w.t.Fatalf("cid %d given out twice", cid)
	}
	w.acked[cid] = true
	if w.rnd.IntN(8) == 0 {
		w.crash() // between the row and the message
	}
}

// arrive delivers the next message to whatever connection there is now.
func (w *world) arrive() {
	w.mu.Lock()
	if len(w.pipe) == 0 {
		w.mu.Unlock()
		return
	}
	f := w.pipe[0]
	w.pipe = w.pipe[1:]
	w.mu.Unlock()
	if !w.device.online {
		f.done(false)
		return
	}
	acknowledged := w.device.receive(w.t, w.rnd, f.payload)
	if w.rnd.IntN(6) == 0 {
		w.device.online = false // the PUBACK is lost
		acknowledged = false
	}
	f.done(acknowledged)
}

// receive is the device's rule: store the id, act, answer. It gives whether it
// has sent its PUBACK.
func (d *model) receive(t *testing.T, rnd *rand.Rand, payload []byte) bool {
	cmd, err := message.DecodeCommand(payload)
	if err != nil {
		t.Fatal(err)
	}
	powerCut := func() bool {
		if d.frail && rnd.IntN(10) == 0 {
			d.online, d.outbox = false, nil // answers were in RAM
			return true
		}
		return false
	}
	if powerCut() {
		return false
	}
	a := message.Answer{CID: cmd.CID, Status: message.Duplicate}
	if cmd.CID > d.highest {
		d.highest = cmd.CID
		if powerCut() {
			return true
		}
		d.ran[cmd.CID]++
		a.Status = message.OK
		if powerCut() {
			return true
		}
	}
	d.outbox = append(d.outbox, a.Encode(message.CBOR))
	return true
}

// publish gets one answer to the log, and, with luck, the PUBACK back.
func (w *world) publish() {
	d := &w.device
	if !d.online || len(d.outbox) == 0 {
		return
	}
	w.log = append(w.log, d.outbox[0])
	if w.rnd.IntN(5) == 0 {
		w.crash() // on disk, not in the registry, and the device does not know
		return
	}
	w.feed()
	if w.rnd.IntN(5) != 0 {
		d.outbox = d.outbox[1:]
	}
}

func (w *world) connect() {
	w.device.online = true
	w.s.Ready(testID, message.CBOR)
}

func (w *world) hangUp() { w.device.online = false }

// checkpoint is what the broker does once a second.
func (w *world) checkpoint() {
	fed := uint64(w.fed)
	w.r.Submit(func(tx *registry.Tx) error { return tx.SaveLogState(registry.LogState{Checkpoint: fed}) }, func(err error) {
		if err != nil && !errors.Is(err, registry.ErrClosed) {
			w.t.Error(err)
		}
	})
}

// calm lets everything come to its end, without failures.
func (w *world) calm() {
	if w.down {
		w.boot()
	}
	w.device.frail = false
	deadline := time.Now().Add(20 * time.Second)
	for w.pending() > 0 {
		if time.Now().After(deadline) {
			w.t.Fatalf("%d commands have no outcome", w.pending())
		}
		if !w.device.online || w.rnd.IntN(20) == 0 {
			w.connect()
		}
		w.arrive()
		w.publish0()
	}
}

// publish0 is publish on a good day.
func (w *world) publish0() {
	w.log = append(w.log, w.device.outbox...)
	w.device.outbox = nil
	w.feed()
}

func (w *world) pending() int {
	settle(w.t, w.r)
	list, err := w.r.PendingCommands(context.Background(), testID, 0, 10_000)
	if err != nil {
		w.t.Fatal(err)
	}
	return len(list)
}

// check holds the promises against what the device did.
func (w *world) check() (states map[registry.CommandState]int) {
	list, err := w.r.Commands(context.Background(), registry.CommandFilter{Device: testID, Limit: 10_000})
	if err != nil {
		w.t.Fatal(err)
	}
	states = map[registry.CommandState]int{}
	for _, c := range list {
		states[c.State]++
		delete(w.acked, c.CID)
		ran := w.device.ran[c.CID]
		delete(w.device.ran, c.CID)
		switch {
		case ran > 1:
			w.t.Errorf("command %d ran %d times", c.CID, ran)
		case c.State == registry.CommandAnswered && ran != 1:
			w.t.Errorf("command %d is answered and never ran", c.CID)
		case c.State == registry.CommandUnknown && c.CID > w.device.highest:
			w.t.Errorf("command %d is unknown and the device never saw it", c.CID)
		case c.State != registry.CommandAnswered && c.State != registry.CommandUnknown:
			w.t.Errorf("command %d is %s", c.CID, c.State)
		}
	}
	if len(w.acked) != 0 || len(w.device.ran) != 0 {
		w.t.Errorf("acknowledged and lost: %v; ran and not known: %v", w.acked, w.device.ran)
	}
	return states
}

// TestCrashes runs the whole with crashes everywhere. A device that never loses
// power runs every command exactly once and every one is answered. One that does
// runs each at most once, and each has an outcome.
func TestCrashes(t *testing.T) {
	for _, frail := range []bool{false, true} {
		total := map[registry.CommandState]int{}
		for seed := range uint64(4) {
			t.Run(fmt.Sprintf("frail=%v/%d", frail, seed), func(t *testing.T) {
				w := newWorld(t, seed, frail)
				for range 200 {
					w.step()
				}
				w.calm()
				states := w.check()
				w.stop()
				if !frail && states[registry.CommandUnknown] > 0 {
					t.Errorf("%d of a device that never lost power are unknown", states[registry.CommandUnknown])
				}
				for s, n := range states {
					total[s] += n
				}
			})
		}
		t.Logf("frail=%v: %v", frail, total)
	}
}

package sim

import (
	"context"
	"log/slog"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"hawser/device"
	"hawser/internal/identity"
)

// Unit is one simulated device. It is also the slog.Handler of its device: what the kit
// complains about is counted there.
type Unit struct {
	fleet  *Fleet
	member *Member
	fault  Fault
	store  device.Store
	leave  func()                        // gives the place among the connecting up; set before live
	device atomic.Pointer[device.Device] // nil for a liar, which is none of the kit

	powerMu sync.Mutex
	off     chan struct{}      // guarded by powerMu: not nil while there is no power; closed when it is back
	stop    context.CancelFunc // guarded by powerMu: ends the device that runs
	raw     net.Conn           // guarded by powerMu: its connection

	met     sync.Once
	on      atomic.Bool
	acked   atomic.Uint64
	value   atomic.Uint64 // bits of the last one acknowledged
	latency atomic.Int64  // nanoseconds of the last message
	command atomic.Pointer[string]
	trouble atomic.Pointer[string]
}

func newUnit(f *Fleet, m *Member, fault Fault) (*Unit, error) {
	u := &Unit{fleet: f, member: m, fault: fault, leave: func() {}}
	u.store = new(device.MemStore)
	if fault != Sound {
		u.store = &faultStore{Store: u.store, unit: u}
	}
	return u, u.boot()
}

// boot makes the device of what its store holds.
func (u *Unit) boot() error {
	if u.fault == Liar {
		return nil
	}
	cfg := u.fleet.deviceConfig(u.member)
	cfg.Connected, cfg.Disconnected, cfg.Command = u.connected, u.disconnected, u.run
	cfg.Store, cfg.Dial, cfg.Log = u.store, u.dial, slog.New(ear{u})
	if err := u.misprovision(&cfg); err != nil {
		return err
	}
	d, err := device.New(cfg)
	if err == nil {
		u.device.Store(d)
	}
	return err
}

// live runs the device until ctx ends, also over losses of power.
func (u *Unit) live(ctx context.Context) {
	for first := true; u.awaitPower(ctx); first = false {
		if !first {
			if err := u.boot(); err != nil {
				u.complain(err.Error())
				return
			}
		}
		run, stop := context.WithCancel(ctx)
		u.powerMu.Lock()
		u.stop = stop
		off := u.off != nil
		u.powerMu.Unlock()
		if !off {
			u.operate(run)
		}
		stop()
	}
}

func (u *Unit) operate(ctx context.Context) {
	if d := u.device.Load(); d != nil {
		_ = d.Run(ctx) // ends with ctx, and only so
		return
	}
	(&liar{unit: u}).run(ctx)
}

// awaitPower reports whether to go on.
func (u *Unit) awaitPower(ctx context.Context) bool {
	u.powerMu.Lock()
	off := u.off
	u.powerMu.Unlock()
	if off != nil {
		select {
		case <-off:
		case <-ctx.Done():
		}
	}
	return ctx.Err() == nil
}

// PowerOff takes the power away, without a goodbye. What is open has failed.
func (u *Unit) PowerOff() {
	u.powerMu.Lock()
	defer u.powerMu.Unlock()
	if u.off == nil {
		u.off = make(chan struct{})
	}
	u.cut()
}

// cut ends what runs, without a goodbye. powerMu is held.
func (u *Unit) cut() {
	if u.raw != nil {
		_ = u.raw.Close()
	}
	if u.stop != nil {
		u.stop()
	}
}

// PowerOn starts the device again, from its store.
func (u *Unit) PowerOn() {
	u.powerMu.Lock()
	defer u.powerMu.Unlock()
	if u.off != nil {
		close(u.off)
		u.off = nil
	}
}

func (u *Unit) powered() bool {
	u.powerMu.Lock()
	defer u.powerMu.Unlock()
	return u.off == nil
}

func (u *Unit) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	c, err := u.fleet.dial(ctx, network, addr)
	u.powerMu.Lock()
	defer u.powerMu.Unlock()
	u.raw = c
	return c, err
}

// ID is the device's.
func (u *Unit) ID() identity.ID { return u.member.ID }

// Fault is what is wrong with the device.
func (u *Unit) Fault() Fault { return u.fault }

func (u *Unit) connected(string) {
	u.leave()
	u.on.Store(true)
	u.fleet.online.Add(1)
	u.met.Do(func() {
		if u.fleet.settled.Add(1) == int64(len(u.fleet.units)) {
			close(u.fleet.all)
		}
	})
}

func (u *Unit) disconnected(error) {
	u.on.Store(false)
	u.fleet.online.Add(-1)
}

// run takes every command and answers with what it was told.
func (u *Unit) run(_ context.Context, cmd device.Command) (device.Value, error) {
	args := "null"
	if cmd.Args != nil {
		args = string(cmd.Args.JSON())
	}
	u.command.Store(&cmd.Name)
	u.fleet.commands.Add(1)
	return device.ValueOf(map[string]string{"did": cmd.Name, "with": args})
}

// publish sends the n-th message and does not wait. Without power there is none.
func (u *Unit) publish(n uint64) {
	d := u.device.Load()
	if d == nil || !u.powered() {
		return
	}
	f, value, start := u.fleet, celsius(uint32(u.member.ID), n), time.Now()
	f.sent.Add(1)
	err := d.PublishAsync(f.cfg.Topic, payload(n, value, f.cfg.Size), 1, func(err error) {
		if err != nil {
			f.failed.Add(1)
			return
		}
		took := time.Since(start)
		f.latency.note(took)
		u.latency.Store(int64(took))
		u.value.Store(math.Float64bits(value))
		u.acked.Add(1)
		f.acked.Add(1)
	})
	if err != nil {
		f.failed.Add(1)
		u.complain(err.Error())
	}
}

// View is one device as it is shown.
type View struct {
	ID      string
	Online  bool
	Acked   uint64
	Value   float64 // the last one acknowledged
	Command string  // name of the last one, "" if none came
	Latency time.Duration
	Trouble string // the last one, "" if there was none
}

// View is what the device has done so far.
func (u *Unit) View() View {
	v := View{ID: u.member.ID.String(), Online: u.on.Load(), Acked: u.acked.Load(),
		Value: math.Float64frombits(u.value.Load()), Latency: time.Duration(u.latency.Load())}
	if name := u.command.Load(); name != nil {
		v.Command = *name
	}
	if text := u.trouble.Load(); text != nil {
		v.Trouble = *text
	}
	return v
}

func (u *Unit) complain(text string) {
	u.trouble.Store(&text)
	u.fleet.note(u.member.ID.String() + ": " + text)
}

// ear listens to what the kit logs for one device.
type ear struct{ u *Unit }

// Enabled implements slog.Handler.
func (e ear) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }

// Handle implements slog.Handler. It is no place to wait: the kit calls it.
func (e ear) Handle(_ context.Context, r slog.Record) error {
	e.u.leave()
	text := r.Message
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "error" || a.Key == "reason" {
			text += ": " + a.Value.String()
		}
		return true
	})
	e.u.complain(text)
	return nil
}

// WithAttrs implements slog.Handler.
func (e ear) WithAttrs([]slog.Attr) slog.Handler { return e }

// WithGroup implements slog.Handler.
func (e ear) WithGroup(string) slog.Handler { return e }

package sim

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"hawser/device"
)

// Unit is one simulated device. It is also the slog.Handler of its device: what the kit
// complains about is counted there.
type Unit struct {
	fleet  *Fleet
	device *device.Device
	who    uint32
	leave  func() // gives the place among the connecting up; set before Run

	met     sync.Once
	on      atomic.Bool
	acked   atomic.Uint64
	value   atomic.Uint64 // bits of the last one acknowledged
	latency atomic.Int64  // nanoseconds of the last message
	command atomic.Pointer[string]
}

func newUnit(f *Fleet, m *Member) (*Unit, error) {
	u := &Unit{fleet: f, who: uint32(m.ID), leave: func() {}}
	cfg := f.deviceConfig(m)
	cfg.Connected, cfg.Disconnected, cfg.Command = u.connected, u.disconnected, u.run
	cfg.Log = slog.New(ear{u})
	var err error
	u.device, err = device.New(cfg)
	return u, err
}

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

// publish sends the n-th message and does not wait.
func (u *Unit) publish(n uint64) {
	f, value, start := u.fleet, celsius(u.who, n), time.Now()
	f.sent.Add(1)
	err := u.device.PublishAsync(f.cfg.Topic, payload(n, value, f.cfg.Size), 1, func(err error) {
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
		f.note(fmt.Sprintf("%s: %v", u.device.ID(), err))
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
}

// View is what the device has done so far.
func (u *Unit) View() View {
	v := View{ID: u.device.ID(), Online: u.on.Load(), Acked: u.acked.Load(),
		Value: math.Float64frombits(u.value.Load()), Latency: time.Duration(u.latency.Load())}
	if name := u.command.Load(); name != nil {
		v.Command = *name
	}
	return v
}

// ear listens to what the kit logs for one device.
type ear struct{ u *Unit }

// Enabled implements slog.Handler.
func (e ear) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }

// Handle implements slog.Handler. It is no place to wait: the kit calls it.
func (e ear) Handle(_ context.Context, r slog.Record) error {
	e.u.leave()
	text := e.u.device.ID() + ": " + r.Message
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "error" || a.Key == "reason" {
			text += ": " + a.Value.String()
		}
		return true
	})
	e.u.fleet.note(text)
	return nil
}

// WithAttrs implements slog.Handler.
func (e ear) WithAttrs([]slog.Attr) slog.Handler { return e }

// WithGroup implements slog.Handler.
func (e ear) WithGroup(string) slog.Handler { return e }

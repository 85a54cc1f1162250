package sim

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"hawser/device"
	"hawser/internal/fleet"
	"hawser/internal/pki"
)

const (
	connecting  = 64 // devices that try to connect for the first time at a time
	publishers  = 16 // goroutines that publish for all devices
	queueLimit  = 64 // messages of one device that may be open
	drainPoll   = 10 * time.Millisecond
	backoffMost = 30 * time.Second
)

// Config says what the devices do. Members and Layout are required.
type Config struct {
	Members  []*Member
	Layout   *fleet.Layout // the devices are born with its newest anchor set
	Address  string        // where the server is, "host:port", whatever its names; "" looks them up
	Faults   []Fault       // of the last members, in this order
	Topic    string        // what is published to, beginning with "u/"
	Rate     float64       // messages per second and device; 0: they only listen
	Count    uint64        // messages of each device; 0: no end
	Size     int           // bytes of a payload; 0: as long as it takes
	Class    string
	Firmware string
	JSON     bool // speak JSON in Hawser's own messages too
}

// Fleet is simulated devices at work.
type Fleet struct {
	cfg     Config
	anchors []byte
	set     *pki.AnchorSet
	roots   []*x509.Certificate // of set; shared by all devices
	units   []*Unit
	devices sync.WaitGroup
	senders sync.WaitGroup
	began   time.Time
	stop    context.CancelFunc // the devices
	silence context.CancelFunc // the publishing

	online   atomic.Int64
	settled  atomic.Int64  // devices that have connected once
	all      chan struct{} // closed when settled is all of them
	sent     atomic.Uint64 // accepted by the kit
	acked    atomic.Uint64
	failed   atomic.Uint64 // accepted and not acknowledged, or not accepted
	commands atomic.Uint64 // answered
	latency  meter         // from publish to PUBACK

	mu       sync.Mutex
	troubles uint64 // guarded by mu
	trouble  string // guarded by mu: the last one
}

// Start starts the devices. Those that connect begin to publish with Begin. Close must
// follow.
func Start(ctx context.Context, cfg Config) (*Fleet, error) {
	f := &Fleet{cfg: cfg, all: make(chan struct{})}
	var err error
	if f.anchors, f.set, err = cfg.Layout.Anchors(); err != nil {
		return nil, err
	}
	f.roots = []*x509.Certificate{f.set.InUse, f.set.Standby}
	ctx, f.stop = context.WithCancel(context.WithoutCancel(ctx))
	for i, m := range cfg.Members {
		u, err := newUnit(f, m, cfg.fault(i))
		if err != nil {
			f.stop()
			return nil, err
		}
		f.units = append(f.units, u)
	}
	f.devices.Add(1)
	go f.launch(ctx)
	return f, nil
}

// launch lets the devices in a few at a time: a crowd would only wait for the CPU, and
// the last of it beyond the server's patience.
func (f *Fleet) launch(ctx context.Context) {
	defer f.devices.Done()
	slots := make(chan struct{}, connecting)
	for _, u := range f.units {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		u.leave = sync.OnceFunc(func() { <-slots })
		f.devices.Add(1)
		go func() {
			defer f.devices.Done()
			u.live(ctx)
		}()
	}
}

// Connected is closed when every device has been connected once.
func (f *Fleet) Connected() <-chan struct{} { return f.all }

// Begin begins to publish, until Drain.
func (f *Fleet) Begin(ctx context.Context) {
	ctx, f.silence = context.WithCancel(context.WithoutCancel(ctx))
	f.began = time.Now()
	if f.cfg.Rate <= 0 {
		return
	}
	n := min(publishers, len(f.units))
	for w := range n {
		f.senders.Go(func() { f.send(ctx, w, n) })
	}
}

// send publishes for every n-th device, each at its own moment of the period.
func (f *Fleet) send(ctx context.Context, first, n int) {
	period := time.Duration(float64(time.Second) / f.cfg.Rate)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for k := uint64(0); f.cfg.Count == 0 || k < f.cfg.Count; k++ {
		for i := first; i < len(f.units); i += n {
			phase := period / time.Duration(len(f.units)) * time.Duration(i)
			due := f.began.Add(time.Duration(k)*period + phase)
			timer.Reset(time.Until(due))
			select {
			case <-timer.C:
			case <-ctx.Done():
				return
			}
			f.units[i].publish(k + 1)
		}
	}
}

// Drain ends the publishing and waits until nothing is open any more, or ctx ends.
func (f *Fleet) Drain(ctx context.Context) error {
	if f.silence != nil {
		f.silence()
	}
	f.senders.Wait()
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for f.Totals().Open > 0 {
		select {
		case <-ctx.Done():
			return errors.New("messages are still not acknowledged")
		case <-tick.C:
		}
	}
	return nil
}

// Close has the devices say goodbye and waits for them. Messages that are still open have
// failed then.
func (f *Fleet) Close() {
	if f.silence != nil {
		f.silence()
	}
	f.senders.Wait()
	f.stop()
	f.devices.Wait()
}

// Totals is the whole fleet at one moment.
type Totals struct {
	Devices   int
	Online    int
	Connected int    // at least once
	Published uint64 // messages begun
	Acked     uint64
	Failed    uint64 // messages that were not accepted or not acknowledged
	Open      uint64
	Commands  uint64 // answered
	Troubles  uint64 // connections lost or refused, and messages refused
	Trouble   string // the last one
	Median    time.Duration
	P99       time.Duration
	Longest   time.Duration
}

// Totals counts. Open is what Published leaves of Acked and Failed.
func (f *Fleet) Totals() Totals {
	t := Totals{Devices: len(f.units), Online: int(f.online.Load()), Connected: int(f.settled.Load()),
		Acked: f.acked.Load(), Failed: f.failed.Load(), Commands: f.commands.Load(),
		Median: f.latency.quantile(0.5), P99: f.latency.quantile(0.99), Longest: time.Duration(f.latency.longest.Load())}
	t.Published = f.sent.Load() // read last: never less than what became of it
	t.Open = t.Published - t.Acked - t.Failed
	f.mu.Lock()
	defer f.mu.Unlock()
	t.Troubles, t.Trouble = f.troubles, f.trouble
	return t
}

// Units are the devices, in the order of Config.Members.
func (f *Fleet) Units() []*Unit { return f.units }

func (f *Fleet) note(text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.troubles++
	f.trouble = text
}

// dial goes to the server, which has all names that devices know.
func (f *Fleet) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if f.cfg.Address != "" {
		addr = f.cfg.Address
	}
	return new(net.Dialer).DialContext(ctx, network, addr)
}

func (f *Fleet) deviceConfig(m *Member) device.Config {
	return device.Config{
		Certificate: m.Cert, Anchors: f.anchors, Roots: f.roots,
		Class: f.cfg.Class, Firmware: f.cfg.Firmware, Boot: "simulated", JSON: f.cfg.JSON,
		QueueLimit: queueLimit, BackoffMax: backoffMost, AllowChaCha: true, Clock: time.Now,
	}
}

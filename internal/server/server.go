// Package server is the whole of a running fleet server: it puts registry, log,
// broker and commands together, and offers administration, metrics and the
// answers of a fleet whose server does not run.
//
// It promises:
//   - One process works on a fleet directory at a time.
//   - Nothing is made that should be there: a missing or damaged file is named
//     and refused.
//   - What the registry says is what the broker does: a revocation or a grant
//     taken away acts on live connections within a second.
//   - A server that was told to stop says goodbye to its clients, writes down
//     what it holds, and loses nothing that was acknowledged.
package server

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"hawser/internal/broker"
	"hawser/internal/command"
	"hawser/internal/config"
	"hawser/internal/durable"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/msglog"
	"hawser/internal/registry"
	"hawser/internal/rollover"
)

// drainFor bounds how long Run waits for clients and the log when it stops.
const drainFor = 15 * time.Second

// Config says what to run. All but Dir may be zero.
type Config struct {
	Dir     string // state directory of the fleet
	Listen  string // in place of serve.listen
	Metrics string // in place of serve.metrics
	API     string // in place of serve.api
	OnClone string // in place of devices.on_clone
	Version string // for status and metrics
	Logger  *slog.Logger

	Ready    func(*Server) // called when connections are accepted; may be nil
	Stopping func()        // called when the end begins; may be nil
}

// Server is a running server.
type Server struct {
	cfg      Config
	log      *slog.Logger
	layout   *fleet.Layout
	lock     *durable.FileLock
	reg      *registry.Registry
	mlog     *msglog.Log
	br       *broker.Broker
	cmds     *command.Service
	roll     *rollover.Service
	leaves   *leaves
	feed     *worker // follows the registry
	work     *worker // follows the devices
	up       *uplink
	down     *downlink
	seen     *presence
	renewals *renewals
	rates    rates
	dropped  tally
	ahead    changes
	start    registry.ServerStart
	started  time.Time

	caKeys   int  // that lie beside the server
	serving  bool // the broker has started
	listener net.Listener
	metrics  net.Listener // nil: off
	api      net.Listener // nil: off
	servers  []*http.Server

	ending chan struct{}      // closed when Close begins
	stop   context.CancelFunc // ends what runs beside the connections
	tasks  sync.WaitGroup
	failed chan error // one slot: why it cannot go on
	once   sync.Once
	closed error
}

// Run serves until ctx ends, then drains.
func Run(ctx context.Context, cfg Config) error {
	s, err := Start(ctx, cfg)
	if err != nil {
		return err
	}
	if cfg.Ready != nil {
		cfg.Ready(s)
	}
	select {
	case <-ctx.Done():
	case err = <-s.failed:
	}
	s.log.Info("stopping")
	if cfg.Stopping != nil {
		cfg.Stopping()
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainFor)
	defer cancel()
	return errors.Join(err, s.Close(end))
}

// Start starts everything and returns when connections are accepted. Close must
// follow.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	if err := checkOnClone(cfg.OnClone); err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, log: cfg.Logger, failed: make(chan error, 1), ending: make(chan struct{}), started: time.Now()}
	if err := s.open(ctx); err != nil {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainFor)
		defer cancel()
		return nil, errors.Join(err, s.Close(end))
	}
	return s, nil
}

// Addr is where the broker listens.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// MetricsAddr is where the metrics are; nil when they are off.
func (s *Server) MetricsAddr() net.Addr {
	if s.metrics == nil {
		return nil
	}
	return s.metrics.Addr()
}

// APIAddr is where services renew their certificates; nil when that is off.
func (s *Server) APIAddr() net.Addr {
	if s.api == nil {
		return nil
	}
	return s.api.Addr()
}

// Layout is the fleet's state directory.
func (s *Server) Layout() *fleet.Layout { return s.layout }

func (s *Server) open(ctx context.Context) error {
	var background context.Context
	background, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	s.feed, s.work = newWorker(), newWorker()
	for _, step := range []func(context.Context) error{
		s.openFiles, s.listen, s.openStores, s.openBroker, s.startBroker,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	s.goBackground(background)
	if err := s.serveAdmin(); err != nil {
		return err
	}
	if s.caKeys > 0 {
		s.log.Warn("TRIAL: the CA keys lie unencrypted beside the server", "keys", s.caKeys)
	}
	s.log.Info("serving", "fleet", s.layout.Config.Fleet.ID.String(), "listen", s.Addr().String(), "version", s.cfg.Version,
		"start", s.start.Number, "took", time.Since(s.started).Round(time.Millisecond).String())
	return nil
}

// openFiles takes the lock and checks everything in the directory that is read.
func (s *Server) openFiles(ctx context.Context) error {
	var err error
	if s.layout, err = fleet.OpenLayout(s.cfg.Dir); err != nil {
		return err
	}
	if s.lock, err = lockForServe(ctx, s.layout); err != nil {
		return err
	}
	if err := s.checkCAKeys(); err != nil {
		return err
	}
	s.leaves, err = loadLeaves(s.layout, s.log)
	return err
}

// checkCAKeys: with a CA key beside it, a stolen server would be a stolen CA.
func (s *Server) checkCAKeys() error {
	for _, named := range s.layout.TokensNamed() {
		s.log.Warn("a file beside the server names a token with a CA key: a thief of both needs only its PIN",
			"file", filepath.Join(s.layout.Dir, named))
	}
	keys := s.layout.CAKeysPresent()
	if len(keys) == 0 {
		return nil
	}
	if !s.layout.Config.Fleet.Trial {
		return fmt.Errorf("a CA key lies in the fleet directory: %s\nhint: move ca-a and ca-b to their safes; the server needs only hawser.toml and server/",
			filepath.Join(s.layout.Dir, keys[0]))
	}
	s.caKeys = len(keys)
	return nil
}

// listen comes before the stores are opened: a port in use is found out first.
func (s *Server) listen(context.Context) error {
	addr := s.cfg.Listen
	if addr == "" {
		addr = s.layout.Config.Serve.Listen
	}
	var err error
	if s.listener, err = listenOn(addr, "--listen HOST:PORT"); err != nil {
		return err
	}
	if s.metrics, err = listenIf(s.cfg.Metrics, s.layout.Config.Serve.Metrics, "--metrics HOST:PORT, or serve.metrics in hawser.toml"); err != nil {
		return err
	}
	s.api, err = listenIf(s.cfg.API, s.layout.Config.Serve.API, "--api HOST:PORT, or serve.api in hawser.toml")
	return err
}

// listenIf listens on addr, else on what the configuration says, which may be nothing.
func listenIf(addr, configured, how string) (net.Listener, error) {
	if addr == "" {
		addr = configured
	}
	if addr == "" {
		return nil, nil
	}
	return listenOn(addr, how)
}

func listenOn(addr, how string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%s is in use by another program\nhint: choose another with %s", addr, how)
	case errors.Is(err, syscall.EACCES):
		return nil, fmt.Errorf("listening on %s is not permitted\nhint: choose a port above 1023 with %s", addr, how)
	case err != nil:
		return nil, fmt.Errorf("listen on %s: %w\nhint: %s", addr, err, how)
	}
	return l, nil
}

// openStores opens registry and log and gives this start its number.
func (s *Server) openStores(ctx context.Context) error {
	var err error
	if s.reg, err = openRegistry(ctx, s.layout, registry.Options{Changed: s.changed}); err != nil {
		return err
	}
	if s.mlog, err = openLog(ctx, s.layout, s.reg, s.log); err != nil {
		return err
	}
	return s.recordStart(ctx)
}

const restore = "hint: restore it from a backup; hawser makes no state anew"

func openRegistry(ctx context.Context, l *fleet.Layout, o registry.Options) (*registry.Registry, error) {
	r, err := registry.Open(ctx, l.RegistryPath(), o)
	switch {
	case errors.Is(err, registry.ErrNotFound), errors.Is(err, registry.ErrDamaged):
		return nil, fmt.Errorf("%w\n%s", err, restore)
	case err != nil:
		return nil, err
	}
	m, err := r.Meta(ctx)
	if err == nil && m.FleetID != l.FleetID() {
		err = fmt.Errorf("%s belongs to another fleet than hawser.toml\n%s", l.RegistryPath(), restore)
	}
	if err == nil {
		err = matchTrust(ctx, l, r)
	}
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func openLog(ctx context.Context, l *fleet.Layout, r *registry.Registry, log *slog.Logger) (*msglog.Log, error) {
	known, err := r.LogState(ctx)
	if err != nil {
		return nil, err
	}
	cfg := logConfig(l.Config, l.LogDir(), l.NATSCredentials())
	cfg.Logger = log
	meta, err := r.Meta(ctx)
	if err != nil {
		return nil, err
	}
	cfg.Requeue = meta.Requeue
	m, err := msglog.Open(ctx, cfg, broker.KnownState(known))
	switch {
	case errors.Is(err, msglog.ErrDamaged), errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w\n%s", err, restore)
	case errors.Is(err, msglog.ErrLeased):
		return nil, leased(err)
	case err != nil:
		return nil, fmt.Errorf("open the log: %w%s", err, clusterHint(l.Config))
	}
	return m, nil
}

// leased adds what helps against msglog.ErrLeased, which the log says when it is opened or,
// when the other server's lease has just run out, at our first frame.
func leased(err error) error {
	if !errors.Is(err, msglog.ErrLeased) {
		return err
	}
	return fmt.Errorf("%w\nhint: stop that server first; its lease ends by itself soon after it has died", err)
}

// clusterHint is what helps when an outside log is not reached.
func clusterHint(c *config.Config) string {
	if c.Log.NATSURL == "" {
		return ""
	}
	return "\nhint: is the NATS cluster up, with JetStream, and the URL (log.nats_url) right?"
}

// logConfig is what the log needs to know of hawser.toml.
func logConfig(c *config.Config, dir, credentials string) msglog.Config {
	m := msglog.Config{
		Fleet: c.Fleet.ID.String(), Dir: dir,
		MaxAge: c.Log.MaxAge.Std(), MaxBytes: int64(c.Log.MaxBytes),
		HistoryMaxAge: c.Log.MaxAge.Std(), HistoryMaxBytes: int64(c.Log.HistoryMaxBytes),
	}
	if c.Log.NATSURL != "" {
		m.Dir, m.NATSURL, m.NATSCreds, m.NATSSystemURL = "", c.Log.NATSURL, credentials, c.Log.NATSSystemURL
	}
	return m
}

// openBroker makes what the start of the broker calls back into.
func (s *Server) openBroker(ctx context.Context) error {
	s.seen = newPresence(s.reg)
	s.renewals = &renewals{reg: s.reg, log: s.log, work: s.work, newer: map[[32]byte]string{}}
	s.up = &uplink{reg: s.reg, log: s.log, work: s.work, onClone: s.onClone()}
	var err error
	if s.down, err = newDownlink(ctx, s); err != nil {
		return err
	}
	s.br, err = broker.New(ctx, broker.Config{
		Log: s.mlog, Store: s.reg, Limits: brokerLimits(s.layout.Config), Suites: s.layout.Config.TLS.SuiteIDs(),
		Logger: s.log, Leaf: s.leaves.pick, Explain: s.explain,
		Admitted: s.admitted, Uplink: s.up.take, UplinkFloor: s.up.floor, Presence: s.seen.told, QueueDropped: s.queueDropped,
		Vouched: s.vouched(), Proven: s.proven,
		Subscribed: func(id identity.ID, filter string) { s.work.do(func() { s.down.subscribed(id, filter) }) },
	})
	if err != nil {
		return err
	}
	s.cmds, err = command.New(ctx, s.reg, direct{s.br}, s.log)
	if err != nil {
		return err
	}
	s.roll, err = rollover.New(ctx, rollover.Config{Store: s.reg, Sender: direct{s.br}, Log: s.log,
		Encoding: s.down.encoding, InUse: s.rootInUse})
	s.up.cmds, s.up.down, s.up.roll = s.cmds, s.down, s.roll
	return err
}

// admitted is broker.Config.Admitted.
func (s *Server) admitted(who identity.Principal, fingerprint [32]byte, _ string, leaf *x509.Certificate) {
	if id, ok := who.ID(); ok {
		s.roll.Admitted(id, fingerprint, leaf)
		return
	}
	s.renewals.admitted(who, fingerprint)
}

// rootInUse is rollover.Config.InUse.
func (s *Server) rootInUse(sequence uint64) *x509.Certificate {
	_, set, ok := s.layout.AnchorSet(sequence)
	if !ok {
		return nil
	}
	return set.InUse
}

// direct is command.Sender and rollover.Sender.
type direct struct{ br *broker.Broker }

// SendPKI implements rollover.Sender.
func (d direct) SendPKI(id identity.ID, payload []byte, done func(delivered bool)) {
	d.br.SendDirect(id, "d/pki", payload, done)
}

// SendCommand implements command.Sender.
func (d direct) SendCommand(id identity.ID, payload []byte, done func(delivered bool)) {
	d.br.SendDirect(id, "d/cmd", payload, done)
}

func (s *Server) startBroker(ctx context.Context) error {
	if err := errors.Join(s.admitAll(ctx), s.renewals.load(ctx)); err != nil {
		return err
	}
	if err := s.br.Start(ctx); errors.Is(err, msglog.ErrDamaged) {
		return fmt.Errorf("start the broker: %w\n%s", err, restore)
	} else if err != nil {
		return fmt.Errorf("start the broker: %w", err)
	}
	s.serving = true
	if err := s.requeued(ctx); err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, drainFor)
	defer cancel()
	return s.announceStart(wait)
}

// goBackground starts what runs until Close.
func (s *Server) goBackground(ctx context.Context) {
	s.goTask(func() { s.cmds.Run(ctx) })
	s.goTask(func() { s.roll.Run(ctx) })
	s.goTask(func() { s.leaves.watch(ctx) })
	s.goTask(func() { s.housekeeping(ctx) })
	s.goTask(func() { s.watchExpiries(ctx) })
	s.goTask(func() {
		if err := s.br.Serve(s.listener); err != nil {
			s.fail(fmt.Errorf("accept connections: %w", err))
		}
	})
	s.work.do(func() {
		if err := s.reg.Configured(ctx, s.down.publishConfig); err != nil && ctx.Err() == nil {
			s.log.Error("desired configurations not read", "error", err)
		}
	})
}

func (s *Server) goTask(f func()) {
	s.tasks.Add(1)
	go func() {
		defer s.tasks.Done()
		f()
	}()
}

// fail makes Run stop.
func (s *Server) fail(err error) {
	select {
	case s.failed <- err:
	default:
	}
}

// restartWord is how often the start record is written again, so that retention
// never leaves a log without one.
const restartWord = 24 * time.Hour

// housekeeping does what is due now and then.
func (s *Server) housekeeping(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	word := min(restartWord, s.layout.Config.Log.MaxAge.Std()/4)
	announced, sick := time.Now(), false
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s.rates.note(time.Now(), s.br.Stats().Received.Load())
		if n%3 == 0 {
			s.seen.flush()
		}
		was := sick
		sick = s.mlog.Healthy() != nil
		if sick {
			if err := s.mlog.Ended(); err != nil { // only a new start can help
				s.fail(fmt.Errorf("the log cannot go on: %w", err))
			}
			continue
		}
		s.work.do(s.down.catchUp)
		if was {
			s.cmds.Resume()
		}
		if word > 0 && time.Since(announced) > word {
			announced = time.Now()
			if err := s.announceStart(ctx); err != nil {
				s.log.Warn("start not repeated in the log", "error", err)
			}
		}
	}
}

// Close stops in the order that loses nothing: no new connections, goodbye to
// those that stand, the log, what came out of it, the registry.
func (s *Server) Close(ctx context.Context) error {
	s.once.Do(func() { s.closed = s.close(ctx) })
	return s.closed
}

func (s *Server) close(ctx context.Context) error {
	close(s.ending)
	var errs []error
	for _, l := range []net.Listener{s.listener, s.metrics, s.api} {
		if l != nil {
			l.Close()
		}
	}
	for _, h := range s.servers {
		h.Close()
	}
	if s.serving {
		errs = append(errs, s.br.Close(ctx))
	}
	s.stop()
	s.tasks.Wait()
	if s.mlog != nil {
		errs = append(errs, s.mlog.Close(ctx))
	}
	s.work.close()
	if s.seen != nil {
		s.seen.flush()
	}
	if s.reg != nil {
		errs = append(errs, s.reg.Close())
	}
	s.feed.close()
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}

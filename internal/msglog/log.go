package msglog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"hawser/internal/identity"
)

// Log is an open log. Its methods may be called from any goroutine.
type Log struct {
	cfg   Config
	names names
	store *store
	hooks Hooks // set by Start

	in      intake
	ring    ring
	queues  queues
	chunks  *chunker
	keep    keeper
	stats   counters
	resting sync.Mutex // held by Backup: retention removes nothing
	lease   *lease     // nil when embedded
	started atomic.Bool
	stop    context.CancelFunc // ends the background work
	ctx     context.Context    // of the background work
	wg      sync.WaitGroup     // the background work
	done    chan struct{}      // closed when the committer has ended

	mu      sync.Mutex
	end     uint64        // guarded by mu; number of the next frame
	lastSum uint32        // guarded by mu; checksum of frame end-1
	first   uint64        // guarded by mu; number of the first frame
	changed chan struct{} // guarded by mu; closed at the next commit, nil while nobody waits
	sick    error         // guarded by mu; why nothing can be written
	dead    error         // guarded by mu; why nothing will be written until a new Open
	rLast   uint64        // guarded by mu; last sequence of R
	rCount  uint64        // guarded by mu; R holds at least so many messages
	rPurge  bool          // guarded by mu; a saved State does not count rCleared
	hLast   uint64        // guarded by mu; last sequence of H

	rCleared []stored // guarded by mu; messages of R that clear a topic, to be removed
}

// names of the streams and subjects of one fleet.
type names struct {
	log, queue, retained, history, lease string // streams
	frame, q, mark, r, h, s, holder      string // subjects; q, r, h, s end in a dot
}

func namesOf(fleet string) names {
	st, sub := "HW_"+fleet+"_", "hw."+fleet+"."
	return names{
		log: st + "LOG", queue: st + "Q", retained: st + "R", history: st + "H", lease: st + "LEASE",
		frame: sub + "f", q: sub + "q.", mark: sub + "qmark", r: sub + "r.", h: sub + "h.", s: sub + "s.", holder: sub + "lease",
	}
}

func (n names) streams() []string { return []string{n.log, n.queue, n.retained, n.history} }

// dedupeWindow is how long the server remembers message ids. It is longer than
// a frame is tried again; a longer one costs memory for every frame in it.
const dedupeWindow = 30 * time.Second

func (n names) configs(replicas int) []jetstream.StreamConfig {
	base := jetstream.StreamConfig{
		Storage: jetstream.FileStorage, Replicas: replicas, AllowDirect: true, DenyDelete: true,
		Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardOld, MaxMsgSize: 1 << 20,
	}
	logCfg, q, r, h := base, base, base, base
	logCfg.Name, logCfg.Subjects, logCfg.Duplicates = n.log, []string{n.frame}, dedupeWindow
	q.Name, q.Subjects, q.AllowAtomicPublish = n.queue, []string{n.q + "*", n.mark}, true
	r.Name, r.Subjects, r.AllowAtomicPublish, r.MaxMsgsPerSubject = n.retained, []string{n.r + "*"}, true, 1
	h.Name, h.Subjects, h.AllowAtomicPublish = n.history, []string{n.h + "*", n.s + "*"}, true
	h.MaxMsgsPerSubject = 1 << 40 // never reached: it makes blocks of 4 MiB, of which one is read for each chunk
	return []jetstream.StreamConfig{logCfg, q, r, h}
}

func (c *Config) setDefaults() error {
	if len(c.Fleet) != 32 {
		return fmt.Errorf("fleet id %q is not 32 hex digits", c.Fleet)
	}
	for _, d := range c.Fleet {
		if (d < '0' || d > '9') && (d < 'a' || d > 'f') {
			return fmt.Errorf("fleet id %q is not 32 lower-case hex digits", c.Fleet)
		}
	}
	if (c.Dir == "") == (c.NATSURL == "") {
		return errors.New("the log needs either a directory or the URL of a cluster")
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Holder == "" {
		host, err := os.Hostname()
		if err != nil {
			host = "unknown host"
		}
		c.Holder = fmt.Sprintf("%s, pid %d", host, os.Getpid())
	}
	setDefault(&c.LeaseFor, 15*time.Second)
	setDefault(&c.RetryFor, 10*time.Second)
	setDefault(&c.ChunkAge, 15*time.Minute)
	setDefault(&c.RetainEvery, time.Minute)
	setDefault(&c.MinFree, 16<<20)
	setDefault(&c.IntakeBytes, 2<<20)
	setDefault(&c.RingBytes, 4<<20)
	setDefault(&c.ChunkBytes, 16<<10)
	setDefault(&c.ChunkMemory, 32<<20)
	setDefault(&c.PurgesPerSec, 500)
	return nil
}

func setDefault[T int | int64 | float64 | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// where names the log in messages: the directory, or the cluster without its
// passwords.
func (c *Config) where() string {
	if c.NATSURL == "" {
		return c.Dir
	}
	urls := strings.Split(c.NATSURL, ",")
	for i, u := range urls {
		if p, err := url.Parse(strings.TrimSpace(u)); err == nil {
			urls[i] = p.Redacted()
		} else if at := strings.LastIndex(u, "@"); at >= 0 {
			urls[i] = u[at+1:]
		}
	}
	return strings.Join(urls, ",")
}

// Create makes the streams of a fleet. It refuses with ErrExists where there is
// one already. Only init calls it: a log that is missing is never made anew.
func Create(ctx context.Context, cfg Config) error {
	if err := cfg.setDefaults(); err != nil {
		return err
	}
	n := namesOf(cfg.Fleet)
	if cfg.Dir != "" {
		if err := makeDir(cfg.Dir); err != nil {
			return err
		}
	}
	s := &store{cfg: &cfg, logger: &natsLogger{log: cfg.Logger}}
	if err := s.connect(); err != nil {
		return err
	}
	defer s.close()
	for _, name := range n.streams() {
		if _, err := s.info(ctx, name); err == nil {
			return fmt.Errorf("%w in %s: stream %s", ErrExists, cfg.where(), name)
		} else if !hasCode(err, codeStreamNotFound) {
			return err
		}
	}
	return s.createStreams(ctx, n)
}

func makeDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err == nil && len(entries) > 0 {
		return fmt.Errorf("%w: %s is not empty", ErrExists, dir)
	}
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	return os.MkdirAll(dir, 0o700)
}

func (s *store) createStreams(ctx context.Context, n names) error {
	nc, err := s.conn()
	if err != nil {
		return err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	replicas := 1
	if s.cfg.NATSURL != "" {
		replicas = outsideReplicas(nc)
	}
	for _, c := range n.configs(replicas) {
		if _, err := js.CreateStream(ctx, c); err != nil {
			return fmt.Errorf("make stream %s: %w", c.Name, err)
		}
	}
	if s.cfg.NATSURL != "" {
		c := leaseStream(n, replicas, s.cfg.LeaseFor)
		if _, err := js.CreateStream(ctx, c); err != nil {
			return fmt.Errorf("make stream %s: %w", c.Name, err)
		}
		return nil
	}
	return syncTree(s.cfg.Dir)
}

// syncTree makes the new directories durable: the server fsyncs files only.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		return errors.Join(f.Sync(), f.Close())
	})
}

// Open opens the log that Create made and compares it with known, what the
// registry saved last (see State and Saved). What is missing, shorter, changed
// or damaged is refused with ErrDamaged and the name of the directory; with an
// outside cluster a second server is refused with ErrLeased. Nothing is written
// before Start, so that the caller can replay with Read first.
func Open(ctx context.Context, cfg Config, known State) (*Log, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	l := &Log{cfg: cfg, names: namesOf(cfg.Fleet), done: make(chan struct{})}
	l.store = &store{cfg: &l.cfg, logger: &natsLogger{log: cfg.Logger}}
	if cfg.Dir != "" {
		l.store.logger.onWriteError = l.store.onWriteError
	}
	l.in.init(cfg.IntakeBytes)
	l.ring.limit = cfg.RingBytes
	l.ctx, l.stop = context.WithCancel(context.Background())
	if err := l.open(ctx, known); err != nil {
		l.stop()
		l.wg.Wait()
		l.store.close()
		return nil, err
	}
	return l, nil
}

func (l *Log) open(ctx context.Context, known State) error {
	if l.cfg.Dir != "" {
		if err := checkMark(l.cfg.Dir); err != nil {
			return err
		}
		if err := checkDirs(l.cfg.Dir, l.names.streams()); err != nil {
			return err
		}
		if err := checkBlocks(l.cfg.Dir, l.names.streams()); err != nil {
			return err
		}
	}
	if err := l.store.connect(); err != nil {
		return err
	}
	if l.cfg.NATSURL != "" {
		if err := l.settled(ctx, l.takeLease); err != nil {
			return err
		}
		l.checkSync(ctx)
	}
	if err := l.settled(ctx, func(ctx context.Context) error { return l.verify(ctx, known) }); err != nil {
		return err
	}
	if err := l.settled(ctx, l.loadQueues); err != nil {
		return err
	}
	return l.settled(ctx, l.loadChunks)
}

// Start begins to take records. If the server died between a frame and its
// queue messages, Start writes what is missing: it calls Plan, not Committed,
// for that one frame. So call QueueStates after Start.
func (l *Log) Start(h Hooks) error {
	if l.started.Swap(true) {
		return errors.New("the log was started before")
	}
	l.hooks = h
	c := newCommitter(l)
	if err := c.finishLast(l.ctx); err != nil {
		close(l.done)
		return err
	}
	go func() {
		defer close(l.done)
		c.run()
	}()
	l.background(l.queues.purgeLoop)
	l.background(l.chunks.run)
	l.background(l.keep.run)
	l.in.open()
	return nil
}

// background runs f until the log is closed.
func (l *Log) background(f func(context.Context, *Log)) {
	l.wg.Add(1)
	go func() {
		defer l.wg.Done()
		f(l.ctx, l)
	}()
}

// Close refuses further records, commits those it took (as long as ctx allows),
// and stops. It is safe to call twice.
func (l *Log) Close(ctx context.Context) error {
	l.in.close(ErrClosed)
	var err error
	if l.started.Load() {
		select {
		case <-l.done:
		case <-ctx.Done():
			err = fmt.Errorf("close the log: %w", ctx.Err())
		}
	}
	l.stop()
	if l.started.Load() {
		<-l.done
	}
	l.wg.Wait()
	l.dropLease()
	l.store.close()
	return err
}

// End is the position that the next record committed will have at the lowest.
func (l *Log) End() Pos {
	l.mu.Lock()
	defer l.mu.Unlock()
	return MakePos(l.end, 0)
}

// First is the position of the oldest record kept.
func (l *Log) First() Pos {
	l.mu.Lock()
	defer l.mu.Unlock()
	return MakePos(l.first, 0)
}

// Changed gives a channel that is closed at the next commit. Take it, then
// Read, then wait on it: nothing is missed.
func (l *Log) Changed() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return l.changed
}

// Healthy is nil while the log takes records, else why it does not.
func (l *Log) Healthy() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead != nil {
		return l.dead
	}
	return l.sick
}

// Ended is why nothing will be written until a new Open, nil while the log may
// recover by itself.
func (l *Log) Ended() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dead
}

// State is what the registry is to save, once a second and when the server
// stops. After it is on disk, tell the log with Saved.
func (l *Log) State() State {
	q := l.queues.lastSeq()
	l.mu.Lock()
	defer l.mu.Unlock()
	return State{
		Log:      StreamState{First: l.keep.wantLog.Load(), Last: l.end - 1},
		Queue:    StreamState{Last: q},
		Retained: StreamState{First: l.retainedAtLeast(), Last: l.rLast},
		History:  StreamState{First: l.keep.wantHistory.Load(), Last: l.hLast},
		Frame:    l.end - 1, Checksum: l.lastSum,
	}
}

// Saved tells the log that s is on disk in the registry. Retention removes
// nothing that s still expects; a server that never calls it keeps everything.
func (l *Log) Saved(s State) {
	l.keep.savedLog.Store(s.Log.First)
	l.keep.savedHistory.Store(s.History.First)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rPurge = len(l.rCleared) > 0 && s.Retained.First <= l.retainedAtLeast()
}

// retainedAtLeast is called with mu held.
func (l *Log) retainedAtLeast() uint64 { return l.rCount - min(l.rCount, uint64(len(l.rCleared))) }

// advance makes a committed frame visible.
func (l *Log) advance(number uint64, sum uint32, frame []byte) {
	l.ring.add(number, frame)
	l.mu.Lock()
	l.end, l.lastSum = number+1, sum
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
	l.mu.Unlock()
}

func (l *Log) setSick(err error) {
	l.mu.Lock()
	l.sick = err
	l.mu.Unlock()
}

// refuse takes no more records, because of err, and returns the batches that
// waited. What Healthy says and what Append does change together.
func (l *Log) refuse(err error) []*batch {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sick = err
	return l.in.pause(fmt.Errorf("%w: %w", ErrUnavailable, err))
}

// admit takes records again.
func (l *Log) admit() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sick = nil
	l.in.open()
}

func (l *Log) setDead(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead == nil {
		l.dead = err
	}
	l.in.close(fmt.Errorf("%w: %w", ErrUnavailable, err))
}

// belongsTo calls fn with the history subject suffix of each principal to whose
// history r belongs: at most two, "h.<id>" or "s.<name>" without the dot's prefix.
func belongsTo(r *Record, fn func(kind identity.Kind, name string)) {
	if r.Kind != KindPublish {
		return
	}
	if r.From.Kind == identity.Device || r.From.Kind == identity.Service {
		fn(r.From.Kind, r.From.Name)
	}
	if r.From.Kind == identity.Device {
		return
	}
	if len(r.Topic) >= len(identity.PrivatePrefix)+8 {
		if _, _, ok := identity.DeviceTopic(r.Topic); ok {
			at := len(identity.PrivatePrefix)
			fn(identity.Device, r.Topic[at:at+8])
		}
	}
}

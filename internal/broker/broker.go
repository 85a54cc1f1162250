// Package broker is the security boundary of Hawser: it terminates TLS 1.3 with
// client certificates, speaks MQTT 3.1.1 and 5.0, and decides who may publish
// and receive what.
//
// It promises:
//   - Nobody gets a CONNACK whose certificate is not among the active ones. The
//     name in the certificate is the only identity there is.
//   - One function, Allowed, decides over every message and every subscription,
//     live, queued, retained and in a Will. What it does not allow, nothing else
//     does.
//   - PUBACK and PUBREC mean that the message is on disk: they leave after the
//     log has committed the frame it is in, and in the order of arrival.
//   - What was acknowledged is delivered to every session that was subscribed,
//     also after a restart, as far as the documented limits of its queue reach.
//   - One client costs the others nothing: memory, time and reading are bounded
//     per connection and per principal, before and after admission.
//
// Who calls what: connections append to the log; the log's one committer calls
// planned and committed, which route in log order under Broker.mu.
package broker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"hawser/internal/identity"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// Config is what a broker is made of. All fields without "may be nil" must be set.
type Config struct {
	Log    *msglog.Log
	Store  *registry.Registry
	Limits Limits
	Suites []uint16 // accepted TLS 1.3 cipher suites
	Logger *slog.Logger

	// Leaf gives the certificate for a server name, "" without SNI. An error
	// refuses the handshake.
	Leaf func(serverName string) (*tls.Certificate, error)

	// Explain says why a certificate that is not active was not let in; for the
	// log only. May be nil.
	Explain func(fingerprint [32]byte) string

	// Vouched says of a certificate that is not active whether a CA of this fleet
	// gave it to a device that is known by the same key, or not known at all. The
	// handshake of such a one goes on, so that its holder proves the key; then Proven
	// is told, and the connection ends without a CONNACK like any that is refused.
	// Vouched is called before that proof: it only looks. Proven must not block. Both
	// may be nil.
	Vouched func(der []byte) bool
	Proven  func(der []byte)

	// Uplink is told each committed message that a device published on one of the
	// topics that are Hawser's own (u/hello, u/cmd, u/cfg, u/pki), in log order, also
	// when the log is replayed at start. It must not block, and may keep nothing
	// but copies. UplinkFloor is the position of the oldest of them that is not
	// settled yet, 0 when all are. Both may be nil.
	Uplink      func(id identity.ID, rest string, r *msglog.Record)
	UplinkFloor func() msglog.Pos

	// Subscribed is told that a device has made or resumed a subscription. It
	// must not block. May be nil.
	Subscribed func(id identity.ID, filter string)

	// QueueDropped is told how many messages were thrown away that waited for a
	// device: it was barred, or its session was not there at the start. It must not
	// block. May be nil.
	QueueDropped func(id identity.ID, messages int)

	// Admitted is told of each connection once its CONNACK is decided and before it
	// is sent: who it is, the SHA-256 of the client's certificate, the address it
	// comes from, and the certificate that the broker showed it. It must not block.
	// May be nil.
	Admitted func(who identity.Principal, fingerprint [32]byte, remote string, leaf *x509.Certificate)

	// Presence is told who has come and gone. It must not block. May be nil.
	Presence func(who identity.Principal, online bool)
}

func (c *Config) presence(who identity.Principal, online bool) {
	if c.Presence != nil {
		c.Presence(who, online)
	}
}

// admitted tells of a connection that is about to get its CONNACK.
func (c *Config) admitted(who identity.Principal, t *tls.Conn) {
	if c.Admitted == nil {
		return
	}
	var leaf *x509.Certificate
	if g, ok := t.NetConn().(*gate); ok {
		leaf = g.leaf
	}
	c.Admitted(who, Fingerprint(t.ConnectionState().PeerCertificates[0].Raw), t.RemoteAddr().String(), leaf)
}

// Broker is a running broker.
type Broker struct {
	cfg     Config
	log     *slog.Logger
	tls     *tls.Config
	dir     *directory
	slots   chan struct{}
	now     func() time.Time
	born    time.Time // from here connections count their deadlines, in 8 bytes instead of 24
	addrs   addresses
	buffers sync.Pool
	stats   Stats
	waiting atomic.Int64 // connections that are not admitted yet

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	mu        sync.Mutex
	closed    bool                             // guarded by mu
	next      msglog.Pos                       // everything below was routed; guarded by mu
	sessions  map[registry.SessionKey]*session // guarded by mu
	devices   map[identity.ID]*session         // guarded by mu
	perMember map[*member]int                  // sessions of each; guarded by mu
	groups    map[groupKey]*group              // guarded by mu
	tree      tree                             // guarded by mu
	retained  retainedStore                    // guarded by mu
	raw       map[net.Conn]bool                // not admitted yet; guarded by mu

	saving sync.Mutex // held while a checkpoint is written, and while none may be

	// Owned by the log's committer.
	hits  []hit
	seqs  map[string]uint64
	dirty []*conn

	saved saver
}

// Stats are the broker's counters since its start. Connections is a present amount.
type Stats struct {
	Connections, Connects, Takeovers     atomic.Int64
	Received, Acknowledged, Delivered    atomic.Uint64
	Refused, Rejected, Dropped, TooLarge atomic.Uint64
	Throttled, Unavailable, StoreErrors  atomic.Uint64
	Wills, Lost                          atomic.Uint64
}

// Stats gives the live counters.
func (b *Broker) Stats() *Stats { return &b.stats }

// New makes a broker, brings back the sessions, retained messages and queues
// from the registry and the log, and starts the log. Certificates and grants
// are to be added before Serve.
func New(ctx context.Context, cfg Config) (*Broker, error) {
	if cfg.Limits.MaxPacket == 0 || cfg.Limits.Handshakes == 0 || cfg.Limits.Device.Messages == 0 || cfg.Limits.Service.Messages == 0 {
		return nil, errors.New("broker limits are not set")
	}
	b := &Broker{
		cfg: cfg, log: cfg.Logger, dir: newDirectory(cfg.Limits),
		slots: make(chan struct{}, cfg.Limits.Handshakes), now: time.Now, born: time.Now(),
		addrs:    addresses{rate: cfg.Limits.AddressRate, burst: float64(cfg.Limits.AddressBurst), seen: make(map[netip.Addr]bucket)},
		sessions: make(map[registry.SessionKey]*session), devices: make(map[identity.ID]*session),
		perMember: make(map[*member]int), groups: make(map[groupKey]*group), retained: newRetained(),
		raw: make(map[net.Conn]bool), seqs: make(map[string]uint64),
	}
	b.buffers.New = func() any { return &buffer{make([]byte, 0, 1024)} }
	b.ctx, b.cancel = context.WithCancel(context.WithoutCancel(ctx))
	b.tls = b.tlsConfig()
	return b, nil
}

// Start replays what the registry does not know yet and begins to take records.
// Certificates and grants must have been added before: they decide what of the
// stored messages is still delivered.
func (b *Broker) Start(ctx context.Context) error {
	if err := b.recover(ctx); err != nil {
		return err
	}
	if err := b.cfg.Log.Start(msglog.Hooks{Plan: b.planned, Committed: b.committed}); err != nil {
		return err
	}
	b.afterRecovery()
	b.tasks.Add(1)
	go b.housekeeping()
	return nil
}

// Serve accepts connections until the listener is closed.
func (b *Broker) Serve(l net.Listener) error {
	for {
		raw, err := l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			var temporary net.Error
			if errors.As(err, &temporary) && !b.isClosed() { // out of descriptors: the next may work
				b.log.Error("accept", "error", err)
				select {
				case <-time.After(50 * time.Millisecond):
					continue
				case <-b.ctx.Done():
				}
			}
			return err
		}
		b.accept(raw)
	}
}

func (b *Broker) isClosed() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.closed
}

// accept starts the admission of one connection.
func (b *Broker) accept(raw net.Conn) {
	err := b.mayAccept(raw)
	b.mu.Lock()
	if b.closed {
		err = errShutdown
	}
	if err == nil {
		b.raw[raw] = true
		b.waiting.Add(1)
		b.tasks.Add(1)
	}
	b.mu.Unlock()
	if err != nil {
		raw.Close()
		b.reject(raw, err)
		return
	}
	go b.introduce(raw)
}

func (b *Broker) mayAccept(raw net.Conn) error {
	if b.waiting.Load() >= int64(b.cfg.Limits.Unadmitted) {
		return errBusy
	}
	a, ok := raw.RemoteAddr().(*net.TCPAddr)
	if ok && !b.addrs.allow(a.AddrPort().Addr().Unmap(), time.Now()) {
		return errRate
	}
	if t, ok := raw.(*net.TCPConn); ok {
		// Finds half-open connections of clients without a keep alive.
		return t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 2 * time.Minute, Interval: 30 * time.Second, Count: 4})
	}
	return nil
}

// introduce takes one connection from its first byte to CONNACK. It runs on a
// goroutine that ends there, with the stack that a handshake needs.
func (b *Broker) introduce(raw net.Conn) {
	defer b.tasks.Done()
	t, m, err := b.handshake(raw)
	if err == nil {
		err = b.admit(t, m)
	}
	b.waiting.Add(-1)
	b.mu.Lock()
	delete(b.raw, raw)
	b.mu.Unlock()
	if err != nil {
		raw.Close()
		b.reject(raw, err)
	}
}

// reject logs why somebody was not let in.
func (b *Broker) reject(raw net.Conn, err error) {
	b.stats.Rejected.Add(1)
	if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		b.log.Debug("connection rejected", "from", raw.RemoteAddr().String(), "reason", "closed before a handshake")
		return
	}
	reason := err.Error()
	var unknown *notPinned
	if b.cfg.Explain != nil && errors.As(err, &unknown) {
		reason += ": " + b.cfg.Explain(unknown.fingerprint)
	}
	b.log.Info("connection rejected", "from", raw.RemoteAddr().String(), "reason", reason)
}

// AddCertificate lets the holder of one more certificate in. The caller has
// verified it (chain, name, use, curve) when it was imported.
func (b *Broker) AddCertificate(c Certificate) { b.dir.add(c) }

// Holder tells who may come in with a certificate at a moment, or why nobody may.
// That somebody showed it is no proof that he has its key.
func (b *Broker) Holder(fingerprint [32]byte, now time.Time) (identity.Principal, error) {
	return b.dir.lookup(fingerprint, now)
}

// RemoveCertificate shuts one certificate out. Its owner's connections end when
// it was the last one.
func (b *Broker) RemoveCertificate(fp [32]byte) {
	if who, last := b.dir.remove(fp); last {
		b.close(who, fate{err: errRevoked, will: false})
	}
}

var errRevoked = errors.New("certificate was revoked")

// SetGrants replaces what a service may do. What is no longer covered ends at
// once: subscriptions are removed, and their connections are closed so that the
// client learns of it.
func (b *Broker) SetGrants(who identity.Principal, grants []Grant) {
	b.dir.setGrants(who, grants)
	m := b.dir.member(who)
	var hit []*session
	b.mu.Lock()
	for _, s := range b.sessions {
		if s.m != m {
			continue
		}
		for _, sub := range s.subs {
			if !m.may(Subscribe, sub.full) {
				hit = append(hit, s)
				break
			}
		}
	}
	b.mu.Unlock()
	for _, s := range hit {
		b.cutBack(s)
	}
}

// cutBack removes the subscriptions of a session that are no longer allowed and
// closes its connection.
func (b *Broker) cutBack(s *session) {
	b.mu.Lock()
	var lost []string
	for _, sub := range s.subs {
		if !s.m.may(Subscribe, sub.full) {
			lost = append(lost, sub.full)
		}
	}
	c := s.c
	b.mu.Unlock()
	for _, f := range lost {
		b.unsubscribe(s, f)
	}
	if err := s.forgetSubscriptions(lost); err != nil && !errors.Is(err, registry.ErrFenced) {
		b.log.Error("subscriptions not deleted", "session", s.String(), "error", err)
	}
	if c != nil {
		c.end(fate{code: notAuthorized, err: errGrant, will: true})
	}
}

var errGrant = errors.New("a grant was taken away")

// close ends the live connections of a principal.
func (b *Broker) close(who identity.Principal, f fate) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.sessions {
		if s.key.Principal == who && s.c != nil {
			s.c.end(f)
		}
	}
}

// Disconnect ends the live connections of a principal, which may come back at once if it
// still may.
func (b *Broker) Disconnect(who identity.Principal) {
	b.close(who, fate{code: notAuthorized, err: errRevoked, will: true})
}

// Online reports whether a principal has a connection.
func (b *Broker) Online(who identity.Principal) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if id, ok := who.ID(); ok {
		s := b.devices[id]
		return s != nil && s.c != nil
	}
	for _, s := range b.sessions {
		if s.key.Principal == who && s.c != nil {
			return true
		}
	}
	return false
}

// OnlineDevices gives the ids of all devices that are connected.
func (b *Broker) OnlineDevices() (ids []identity.ID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for id, s := range b.devices {
		if s.c != nil {
			ids = append(ids, id)
		}
	}
	return ids
}

// Queue tells how many messages wait for a device, and how many were not queued
// because it was full.
func (b *Broker) Queue(id identity.ID) (waiting int, dropped uint64) {
	b.mu.Lock()
	s := b.devices[id]
	b.mu.Unlock()
	if s == nil {
		return 0, 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.queued, s.dropped
}

// Close says goodbye to every client and waits for their connections to end. The
// listener is the caller's to close before, the log and the registry after.
func (b *Broker) Close(ctx context.Context) error {
	b.mu.Lock()
	b.closed = true
	for raw := range b.raw {
		raw.Close()
	}
	var live []*conn
	for _, s := range b.sessions {
		if s.c != nil {
			live = append(live, s.c)
		}
	}
	b.mu.Unlock()
	for _, c := range live {
		c.end(fate{code: shuttingDown, err: errShutdown, will: true})
	}
	defer b.cancel()
	if err := b.drain(ctx); err != nil {
		return err
	}
	b.cancel()
	b.tasks.Wait()
	b.saving.Lock()
	defer b.saving.Unlock()
	return b.checkpoint()
}

// background is the context of what must be finished once it has begun.
func (b *Broker) background() context.Context { return context.WithoutCancel(b.ctx) }

// drain waits for the connections to end.
func (b *Broker) drain(ctx context.Context) error {
	t := time.NewTicker(5 * time.Millisecond)
	defer t.Stop()
	for b.stats.Connections.Load() > 0 {
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("%d connections did not end: %w", b.stats.Connections.Load(), ctx.Err())
		}
	}
	return nil
}

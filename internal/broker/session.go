package broker

import (
	"fmt"
	"sync"
	"time"

	"hawser/internal/identity"
	"hawser/internal/mqtt"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// session is the state that MQTT keeps for one client id of one principal. It
// is in Broker.sessions as long as it exists, connected or not.
//
// Locks are taken in the order Broker.mu, group.mu, session.mu, conn.wmu.
type session struct {
	b   *Broker
	key registry.SessionKey
	m   *member
	no  int64 // number in the registry

	mu       sync.Mutex
	c        *conn           // the connection, nil when there is none; guarded by mu
	gen      uint64          // raised at each connect; guarded by mu
	version  mqtt.Version    // guarded by mu
	expiry   uint32          // seconds it outlives its connection; guarded by mu
	created  time.Time       // guarded by mu
	offline  time.Time       // since when there is no connection; zero: there is one; guarded by mu
	stored   bool            // there is a row in the registry; guarded by mu
	ended    bool            // taken out of Broker.sessions; guarded by mu
	will     *registry.Will  // guarded by mu
	firing   bool            // the Will is on its way into the log; guarded by mu
	willDue  *time.Timer     // guarded by mu
	subs     []*subscription // guarded by Broker.mu and mu: either is enough to read
	out      outgoing        // guarded by mu
	received []inbound       // QoS 2 packet ids from the client; guarded by mu
	inDirty  bool            // received has changed since the last checkpoint; guarded by mu
	saved    registry.Cursor // as last written; guarded by mu
	dropped  uint64          // messages logged but not queued; guarded by mu
}

// inbound is one QoS 2 packet id that the client has used and not yet released.
type inbound struct {
	pid    uint16
	gen    uint64 // of the connection that has sent it last
	logged bool   // the PUBLISH is on disk: PUBREC was or may be sent
	again  *conn  // sent it once more while it was on its way to disk
}

// isDevice reports whether the session's undelivered messages lie in a device
// queue. A service reads the frames themselves.
func (s *session) isDevice() bool { return s.key.Principal.Kind == identity.Device }

// persistent reports whether the session outlives its connection. The caller
// holds mu.
func (s *session) persistent() bool { return s.expiry > 0 }

// row is the session as the registry keeps it. The caller holds mu.
func (s *session) row() *registry.Session {
	r := &registry.Session{No: s.no, Key: s.key, Generation: s.gen, Version: uint8(s.version), Expiry: s.expiry,
		Created: s.created, Disconnected: s.offline, Dropped: s.dropped}
	r.Cursor, r.QueueAcked = uint64(s.saved.Cursor), s.saved.QueueAcked
	if s.will != nil {
		w := *s.will
		r.Will = &w
	}
	return r
}

// save writes the session's row; done, which may be nil, hears the outcome
// after the commit. The caller holds mu.
func (s *session) save(done func(error)) {
	row := s.row()
	s.stored = true
	s.b.submit("save session", func(tx *registry.Tx) error { return tx.SaveSession(row) }, done)
}

// saveWait saves and waits; it takes mu for the moment of building the row.
func (s *session) saveWait() error {
	done := make(chan error, 1)
	s.mu.Lock()
	s.save(func(err error) { done <- err })
	s.mu.Unlock()
	return <-done
}

// setExpiry changes the expiry at DISCONNECT (MQTT 5.0 3.14.2.2.2).
func (s *session) setExpiry(c *conn, seconds uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.c != c {
		return errEnded
	}
	if s.expiry == 0 && seconds > 0 {
		return &mqtt.Error{Code: mqtt.ProtocolError, Text: "session expiry raised from 0 at DISCONNECT"}
	}
	s.expiry = min(seconds, s.b.cfg.Limits.MaxExpiry)
	return nil
}

// attached is what CONNECT gave: the session, and whether it was there before.
type attached struct {
	s       *session
	present bool
	old     *conn          // the connection that was taken over
	fire    *registry.Will // a Will that is due by the takeover
	drop    *session       // a session that a clean start ends
}

// attach binds a fresh connection to its session (MQTT 5.0 3.1.2.4, 3.1.4). The
// effects that need no lock are left to finishAttach.
func (b *Broker) attach(c *conn, p *mqtt.Connect, clientID string, will *registry.Will) (attached, error) {
	key := registry.SessionKey{Principal: c.m.who, ClientID: clientID}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return attached{}, errShutdown
	}
	// Asked under the lock with which Bar looks for sessions: who was barred after
	// the handshake is either refused here or found there.
	if !b.dir.admits(c.m.who) {
		return attached{}, errRevoked
	}
	var a attached
	if a.s = b.sessions[key]; a.s == nil {
		if b.perMember[c.m] >= c.q.Sessions {
			return a, errSessions
		}
	} else {
		ends := a.takeOver(p.CleanStart)
		if a.s.feedOthers(); ends {
			a.drop = a.s
			b.forget(a.s)
			a.s = nil
		}
	}
	a.present = a.s != nil
	if a.s == nil {
		a.s = b.newSession(key, c.m)
	}
	a.s.bind(c, p, will)
	return a, nil
}

// takeOver cuts the session's present connection off and tells whether the
// session ends here: by a clean start, or because it does not outlive its
// connection. A waiting Will fires when the session ends, and one without a
// delay when a connection does (MQTT 5.0 3.1.3.2.2).
func (a *attached) takeOver(clean bool) (ends bool) {
	s := a.s
	s.mu.Lock()
	defer s.mu.Unlock()
	ends = clean || !s.persistent() || s.c == nil && s.lapsed(time.Now())
	a.old = s.c
	if s.willDue != nil {
		s.willDue.Stop()
		s.willDue = nil
	}
	if w := s.will; w != nil && !s.firing && (ends || s.c != nil && w.Delay == 0) {
		a.fire = w
	}
	s.will, s.firing = nil, false
	if s.c != nil {
		s.unbind()
	}
	return ends
}

// lapsed reports whether a session without a connection has outlived its expiry.
// The caller holds mu.
func (s *session) lapsed(now time.Time) bool {
	return now.Sub(s.offline) >= time.Duration(s.expiry)*time.Second
}

// newSession makes one and enters it. The caller holds Broker.mu.
func (b *Broker) newSession(key registry.SessionKey, m *member) *session {
	s := &session{b: b, key: key, m: m, no: b.cfg.Store.NextSession(), created: time.Now()}
	s.out.next = b.next
	b.sessions[key] = s
	b.perMember[m]++
	if id, ok := key.Principal.ID(); ok {
		b.devices[id] = s
	}
	return s
}

// bind makes c the session's connection. The caller holds Broker.mu.
func (s *session) bind(c *conn, p *mqtt.Connect, will *registry.Will) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.s = s
	s.c, s.version, s.offline, s.will = c, c.version, time.Time{}, will
	s.gen++
	c.gen = s.gen
	s.expiry = s.b.sessionExpiry(p)
	s.out.rewind()
}

// sessionExpiry is how long the session of this CONNECT is to be kept: in 3.1.1
// for as long as we keep any, unless it is a clean one.
func (b *Broker) sessionExpiry(p *mqtt.Connect) uint32 {
	switch {
	case p.Version == mqtt.V5:
		return min(p.Props.SessionExpiry, b.cfg.Limits.MaxExpiry)
	case p.CleanStart:
		return 0
	}
	return b.cfg.Limits.MaxExpiry
}

// unbind takes the connection off: what had been read for it goes, and is read
// again when a client comes back. The caller holds Broker.mu and mu.
func (s *session) unbind() {
	s.c = nil
	s.offline = time.Now()
	s.out.park(s)
}

// detach is the end of a connection, whatever ended it. A session that does not
// outlive it goes with it; a Will fires, or waits for its delay.
func (b *Broker) detach(c *conn) {
	f := c.fate.Load()
	s := c.s
	b.mu.Lock()
	s.mu.Lock()
	mine := s.c == c
	fire := false
	if mine {
		s.unbind()
		fire = s.settleWill(f.will)
		if !s.ended && (s.persistent() || s.will != nil) {
			s.save(nil)
		}
	}
	gen := s.gen
	gone := mine && !s.persistent() && s.will == nil
	s.mu.Unlock()
	if mine {
		s.feedOthers()
	}
	if gone {
		b.forget(s)
	}
	b.mu.Unlock()
	if gone {
		s.erase()
	}
	if fire {
		b.fireWill(s, gen)
	}
	if mine {
		b.cfg.presence(s.key.Principal, false)
	}
	b.left(c, f)
}

// settleWill decides what becomes of the Will when the connection has ended:
// now, later, or never. The caller holds mu.
func (s *session) settleWill(wanted bool) (now bool) {
	if s.will == nil || !wanted {
		s.will = nil
		return false
	}
	delay := min(s.will.Delay, s.expiry) // at the latest when the session ends (MQTT 5.0 3.1.2.5)
	due := *s.will
	due.Due = time.Now().Add(time.Duration(delay) * time.Second)
	s.will = &due
	if delay > 0 {
		s.armWill(time.Until(due.Due))
	}
	return delay == 0
}

// armWill starts the timer of a Will that waits. The caller holds mu.
func (s *session) armWill(d time.Duration) {
	gen := s.gen
	s.willDue = time.AfterFunc(d, func() { s.b.fireWill(s, gen) })
}

// fireWill publishes a Will whose delay has passed, unless a client has come
// back in the meantime. It stays in the registry until it is in the log.
func (b *Broker) fireWill(s *session, gen uint64) {
	s.mu.Lock()
	w := s.will
	if s.gen != gen || s.c != nil || w == nil || s.firing || s.ended {
		s.mu.Unlock()
		return
	}
	s.firing = true
	s.mu.Unlock()
	if !b.publishWill(s, w, func(err error) { b.willStored(s, gen, err) }) {
		b.willStored(s, gen, nil)
	}
}

// willRetry is how long a Will waits that the log did not take.
const willRetry = 5 * time.Second

// willStored ends a Will, or tries again later. It must not block: the log's
// committer calls it.
func (b *Broker) willStored(s *session, gen uint64, err error) {
	s.mu.Lock()
	if s.gen != gen || !s.firing {
		s.mu.Unlock()
		return
	}
	s.firing = false
	if err != nil {
		s.armWill(willRetry)
		s.mu.Unlock()
		return
	}
	s.will = nil
	gone := !s.persistent()
	if !gone {
		s.save(nil)
	}
	s.mu.Unlock()
	if gone {
		go b.dropSession(s)
	}
}

func (b *Broker) dropSession(s *session) {
	b.mu.Lock()
	b.forget(s)
	b.mu.Unlock()
	s.erase()
}

// publishWill appends a Will to the log; stored hears of it if it was taken.
// It is authorized again: what was allowed at CONNECT may have been taken away.
func (b *Broker) publishWill(s *session, w *registry.Will, stored func(error)) bool {
	if !b.dir.stillMayPublish(s.key.Principal, w.Topic) {
		b.stats.Refused.Add(1)
		b.log.Info("will not published: no longer allowed", "principal", s.key.Principal.String(), "topic", w.Topic)
		return false
	}
	r := msglog.Record{Kind: msglog.KindPublish, From: s.key.Principal, Topic: w.Topic, Payload: w.Payload,
		QoS: w.QoS, Retain: w.Retain, HasExpiry: w.HasExpiry, Expiry: w.Expiry, Props: w.Props, Owner: storedFunc(stored)}
	if !s.isDevice() {
		r.ClientID = s.key.ClientID
	}
	b.stats.Wills.Add(1)
	if err := b.cfg.Log.Append(&r); err != nil {
		stored(err)
	}
	return true
}

// storedFunc is an owner that only wants to know.
type storedFunc func(error)

// Stored implements msglog.Owner.
func (f storedFunc) Stored(_ *msglog.Record, err error) { f(err) }

// forget takes a session out of every table. The caller holds Broker.mu.
func (b *Broker) forget(s *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return
	}
	s.ended = true
	for _, sub := range s.subs {
		b.unlink(sub)
	}
	s.subs = nil
	for i := range s.out.window {
		if d := &s.out.window[i]; d.group != nil {
			d.group.finished(d.pos)
		}
	}
	if s.willDue != nil {
		s.willDue.Stop()
	}
	if b.sessions[s.key] == s {
		delete(b.sessions, s.key)
	}
	if b.perMember[s.m]--; b.perMember[s.m] <= 0 {
		delete(b.perMember, s.m)
	}
	if id, ok := s.key.Principal.ID(); ok && b.devices[id] == s {
		delete(b.devices, id)
	}
}

// eraseThen deletes what is stored of a session that was forgotten, and tells how
// many messages waited in it; done may be nil.
func (s *session) eraseThen(done func(error)) (messages int) {
	s.mu.Lock()
	stored, acked := s.stored, s.out.acked()
	s.stored = false
	s.mu.Unlock()
	if !stored {
		if done != nil {
			done(nil)
		}
		return 0
	}
	if s.isDevice() {
		s.b.cfg.Log.QueueAck(s.key.Principal.Name, acked) // since the last checkpoint: it did not wait
		messages = s.b.dropQueue(s.key.Principal.Name)
	}
	no := s.no
	s.b.submit("drop session", func(tx *registry.Tx) error { return tx.DropSession(no) }, done)
	return messages
}

func (s *session) erase() (messages int) { return s.eraseThen(nil) }

// submit hands a change to the registry and logs its failure.
func (b *Broker) submit(what string, apply func(*registry.Tx) error, done func(error)) {
	b.cfg.Store.Submit(apply, func(err error) {
		if err != nil {
			b.stats.StoreErrors.Add(1)
			b.log.Error("registry: "+what, "error", err)
		}
		if done != nil {
			done(err)
		}
	})
}

// expire ends the sessions and retained messages whose time has run out.
func (b *Broker) expire(now time.Time) {
	var gone []*session
	b.mu.Lock()
	for _, s := range b.sessions {
		s.mu.Lock()
		over := s.c == nil && s.will == nil && s.lapsed(now)
		s.mu.Unlock()
		if over {
			gone = append(gone, s)
		}
	}
	for _, s := range gone {
		b.forget(s)
	}
	for topic, m := range b.retained.all { // MQTT 5.0 3.3.2.3.3
		if _, dead := m.left(now); dead {
			b.dropRetained(topic)
		}
	}
	b.mu.Unlock()
	for _, s := range gone {
		s.erase()
	}
}

func (s *session) String() string { return fmt.Sprintf("%v %q", s.key.Principal, s.key.ClientID) }

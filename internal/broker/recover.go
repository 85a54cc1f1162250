package broker

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"hawser/internal/identity"
	"hawser/internal/mqtt"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// recover brings back what the broker knew: sessions from the registry, retained
// messages from their checkpoint, and what the log holds after the checkpoint.
func (b *Broker) recover(ctx context.Context) error {
	b.mu.Lock()
	b.next = b.cfg.Log.End()
	b.mu.Unlock()
	if err := b.loadSessions(ctx); err != nil {
		return fmt.Errorf("load sessions: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	err := b.cfg.Log.LoadRetained(ctx, func(r *msglog.Record) error {
		b.keep(r)
		return nil
	})
	if err != nil {
		return fmt.Errorf("load retained messages: %w", err)
	}
	clear(b.retained.dirty)
	known, err := b.cfg.Store.LogState(ctx)
	if err != nil {
		return err
	}
	err = b.cfg.Log.Read(ctx, msglog.Pos(known.Checkpoint), func(r *msglog.Record) error {
		b.replay(r)
		return nil
	})
	if err != nil {
		return fmt.Errorf("replay the log: %w", err)
	}
	return nil
}

// replay applies one record that came after the checkpoint, without delivering
// it: sessions find it by their cursor or in their queue. The caller holds mu.
func (b *Broker) replay(r *msglog.Record) {
	switch {
	case r.Kind == msglog.KindRelease:
		b.noteInbound(r)
		return
	case r.Kind != msglog.KindPublish:
		return
	}
	if r.QoS == 2 {
		b.noteInbound(r)
	}
	if r.Retain && !r.Direct {
		b.keep(r)
	}
	if id, rest, ok := identity.DeviceTopic(r.Topic); ok && b.cfg.Uplink != nil && r.From.Kind == identity.Device && hawsersOwn(rest) {
		b.cfg.Uplink(id, rest, r)
	}
}

func (b *Broker) loadSessions(ctx context.Context) error {
	groups := make(map[registry.SessionKey]registry.Session)
	var all []*registry.StoredSession
	err := b.cfg.Store.LoadSessions(ctx, func(s *registry.StoredSession) error {
		if strings.HasPrefix(s.Key.ClientID, "\x00") {
			groups[s.Key] = s.Session
		} else {
			all = append(all, s)
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, row := range all {
		b.loadSession(row, groups)
	}
	for _, g := range groups { // of nobody any more
		no := g.No
		b.submit("drop group", func(tx *registry.Tx) error { return tx.DropSession(no) }, nil)
	}
	return nil
}

// loadSession brings one session back. The caller holds mu.
func (b *Broker) loadSession(row *registry.StoredSession, groups map[registry.SessionKey]registry.Session) {
	m := b.dir.member(row.Key.Principal)
	s := &session{b: b, key: row.Key, m: m, no: row.No, gen: row.Generation, version: mqtt.Version(row.Version),
		expiry: row.Expiry, created: row.Created, offline: row.Disconnected, stored: true, will: row.Will, dropped: row.Dropped}
	if s.offline.IsZero() { // connected when the server ended
		s.offline = b.now()
	}
	b.sessions[s.key] = s
	b.perMember[m]++
	if id, ok := s.key.Principal.ID(); ok {
		b.devices[id] = s
	}
	s.saved = registry.Cursor{Session: s.no, Cursor: row.Cursor, QueueAcked: row.QueueAcked, Dropped: row.Dropped}
	s.loadOutgoing(row)
	for _, pid := range row.InboundQoS2 {
		s.received = append(s.received, inbound{pid: pid, logged: true})
	}
	for _, r := range row.Subscriptions {
		sub := &subscription{s: s, full: r.Filter, id: r.SubID, start: msglog.Pos(r.Start)}
		_, sub.filter, _ = identity.SplitShare(r.Filter)
		sub.setOptions(r.Options)
		s.subs = append(s.subs, sub)
		b.link(sub)
		b.loadGroup(sub.group, groups)
	}
}

// loadGroup gives a group its stored cursor. The caller holds mu.
func (b *Broker) loadGroup(g *group, stored map[registry.SessionKey]registry.Session) {
	if g == nil {
		return
	}
	row, ok := stored[g.key.sessionKey()]
	if !ok {
		return
	}
	delete(stored, g.key.sessionKey())
	g.no, g.next, g.behind, g.stored = row.No, msglog.Pos(row.Cursor), true, true
}

// loadOutgoing sets where the session reads on, and the packet ids in use.
func (s *session) loadOutgoing(row *registry.StoredSession) {
	o := &s.out
	o.behind, o.taken, o.lastPID = true, row.QueueAcked, uint16(rand.Uint32())
	if !s.isDevice() {
		o.next = msglog.Pos(row.Cursor)
		if first := s.b.cfg.Log.First(); o.next < first {
			s.b.stats.Lost.Add(1)
			s.b.log.Warn("retention has overtaken a session: messages are lost to it", "session", s.String())
		}
	}
	for _, f := range row.Inflight {
		pos := msglog.Pos(f.Ref)
		if f.State == stateDone {
			if o.done == nil {
				o.done = make(map[msglog.Pos]uint16)
			}
			o.done[pos] = f.PacketID
			continue
		}
		o.window = append(o.window, delivery{pos: pos, pid: f.PacketID, qos: 2, state: f.State, dup: true})
	}
}

// afterRecovery does what needs a log that takes records: the queues are
// complete now, and Wills can fire.
func (b *Broker) afterRecovery() {
	b.ackAgain()
	var orphans []string
	err := b.cfg.Log.QueueStates(b.ctx, func(q msglog.QueueState) error {
		b.mu.Lock()
		defer b.mu.Unlock()
		id, err := identity.ParseID(q.Name)
		s := b.devices[id]
		if err != nil || s == nil {
			orphans = append(orphans, q.Name)
			return nil
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.out.newest, s.out.queued = q.Last, int(q.Count)
		return nil
	})
	if err != nil {
		b.log.Error("queues", "error", err)
	}
	for _, name := range orphans {
		b.toldDropped(name, b.dropQueue(name))
	}
	b.armWills()
}

// ackAgain tells the log what was acknowledged before the restart: it need not
// have been removed yet.
func (b *Broker) ackAgain() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.devices {
		if acked := s.saved.QueueAcked; acked > 0 {
			b.cfg.Log.QueueAck(s.key.Principal.Name, acked)
		}
	}
}

// armWills starts the clocks of Wills whose clients did not say goodbye before
// the server ended.
func (b *Broker) armWills() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.sessions {
		s.mu.Lock()
		if w := s.will; w != nil {
			if w.Due.IsZero() {
				w.Due = s.offline.Add(time.Duration(min(w.Delay, s.expiry)) * time.Second)
			}
			s.armWill(max(0, time.Until(w.Due)))
		}
		s.mu.Unlock()
	}
}

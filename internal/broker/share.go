package broker

import (
	"sync"
	"time"

	"hawser/internal/identity"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// group is the members of one $share subscription: each message goes to one of
// them (MQTT 5.0 4.8.2). Groups belong to one service, as sessions do, so that
// no other service can join one and take messages out of it.
//
// Its messages wait here, and a member gets one when its window has room: a slow
// member does not hold up the others. What a member does not acknowledge before
// it goes comes back. While no member is there, messages wait in the log.
type group struct {
	b   *Broker
	key groupKey
	no  int64 // number in the registry, where its cursor is kept

	members []*subscription // guarded by Broker.mu
	turn    int             // guarded by Broker.mu
	saved   msglog.Pos      // the cursor as last written; guarded by Broker.mu
	stored  bool            // there is a row in the registry; guarded by Broker.mu

	mu      sync.Mutex          // taken last, nothing is called with it held
	waiting []delivery          // guarded by mu
	out     map[msglog.Pos]bool // with a member, not acknowledged; guarded by mu
	next    msglog.Pos          // everything below was looked at; guarded by mu
	behind  bool                // guarded by mu
	reading bool                // guarded by mu
}

type groupKey struct {
	who    identity.Principal
	name   string
	filter string
}

// sessionKey is under which the registry keeps the group's cursor. No client id
// can be equal to it: they hold no U+0000 (MQTT 5.0 1.5.4).
func (k groupKey) sessionKey() registry.SessionKey {
	return registry.SessionKey{Principal: k.who, ClientID: "\x00$share/" + k.name + "/" + k.filter}
}

// groupHold bounds the messages of one group in memory.
const groupHold = 256

// offer adds a live message to the group. The caller holds Broker.mu.
func (g *group) offer(m *message) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.behind || m.pos < g.next:
	case len(g.waiting) >= groupHold:
		g.behind, g.next = true, m.pos
	default:
		g.next = m.pos.Next()
		g.waiting = append(g.waiting, delivery{msg: m, pos: m.pos, qos: m.qos, group: g})
	}
}

// giveBack takes back what a member has not acknowledged, to the front.
func (g *group) giveBack(d delivery) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.out, d.pos)
	back := delivery{msg: d.msg, pos: d.pos, qos: d.msg.qos, group: g}
	i := 0
	for i < len(g.waiting) && g.waiting[i].pos < d.pos {
		i++
	}
	g.waiting = append(g.waiting[:i], append([]delivery{back}, g.waiting[i:]...)...)
}

// finished notes that a member is through with the message at pos.
func (g *group) finished(pos msglog.Pos) {
	g.mu.Lock()
	delete(g.out, pos)
	g.mu.Unlock()
}

// floor is the position up to which everything was acknowledged. The caller
// holds Broker.mu.
func (g *group) floor() msglog.Pos {
	g.mu.Lock()
	defer g.mu.Unlock()
	low := g.b.next
	if g.behind {
		low = g.next
	}
	if len(g.waiting) > 0 {
		low = min(low, g.waiting[0].pos)
	}
	for pos := range g.out {
		low = min(low, pos)
	}
	return low
}

// take removes the oldest waiting message.
func (g *group) take() (d delivery, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.waiting) == 0 {
		return d, false
	}
	d = g.waiting[0]
	g.waiting[0] = delivery{}
	if g.waiting = g.waiting[1:]; len(g.waiting) == 0 {
		g.waiting = nil
	}
	g.out[d.pos] = true
	return d, true
}

// feed hands waiting messages to members, oldest first, while one has room. The
// caller holds Broker.mu.
func (g *group) feed() {
	for {
		d, ok := g.take()
		if !ok {
			break
		}
		if !g.place(d) {
			g.giveBack(d)
			break
		}
	}
	g.refill()
}

// place finds a member for d, taking turns.
func (g *group) place(d delivery) bool {
	for range g.members {
		g.turn = (g.turn + 1) % len(g.members)
		if g.members[g.turn].s.takeShared(g.members[g.turn], d) {
			return true
		}
	}
	return false
}

// takeShared puts a group's message into the session's window. ok is false when
// there is no connection or no room.
func (s *session) takeShared(sub *subscription, d delivery) (ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.live()
	if c == nil || len(s.out.window) >= c.window {
		return false
	}
	d.qos, d.retain = min(sub.qos, d.qos), sub.asIs && d.msg.retain
	if sub.id != 0 {
		d.ids = []uint32{sub.id}
	}
	if d.qos == 0 {
		s.sendNow(c, &d, time.Now())
		return true
	}
	d.pid, d.state = s.out.freePID(), stateSent
	s.out.window = append(s.out.window, d)
	s.transmit(c, &s.out.window[len(s.out.window)-1], time.Now())
	return true
}

// deliverOne sends a QoS 0 message to one member. The caller holds Broker.mu.
func (g *group) deliverOne(m *message) {
	g.mu.Lock()
	g.out[m.pos] = true
	g.mu.Unlock()
	d := delivery{msg: m, pos: m.pos, group: g}
	if !g.place(d) {
		g.finished(m.pos)
	}
}

// feedOthers hands on what a session that has lost its connection gave back to
// its groups (MQTT 5.0 4.8.2). The caller holds Broker.mu.
func (s *session) feedOthers() {
	for _, sub := range s.subs {
		if sub.group != nil {
			sub.group.feed()
		}
	}
}

// feedGroups is called when a member's window has got room.
func (s *session) feedGroups() {
	s.mu.Lock()
	shares := false
	for _, sub := range s.subs {
		shares = shares || sub.group != nil
	}
	s.mu.Unlock()
	if !shares {
		return
	}
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	for _, sub := range s.subs {
		if sub.group != nil {
			sub.group.feed()
		}
	}
}

// refill starts reading from the log when the group is behind and a member
// could take something. The caller holds Broker.mu.
func (g *group) refill() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.behind || g.reading || len(g.waiting) > groupHold/4 || !g.listening() {
		return
	}
	g.reading = true
	go g.readBack()
}

// listening reports whether a member is connected. The caller holds Broker.mu;
// a connection that comes or goes holds it too.
func (g *group) listening() bool {
	for _, m := range g.members {
		if m.s.c != nil {
			return true
		}
	}
	return false
}

// readBack moves messages from the log into waiting.
func (g *group) readBack() {
	for g.readSome() {
	}
}

func (g *group) readSome() (more bool) {
	g.b.mu.Lock()
	limit := g.b.next
	g.b.mu.Unlock()
	g.mu.Lock()
	from := g.next
	g.mu.Unlock()
	full := false
	err := g.b.cfg.Log.Read(g.b.ctx, from, func(r *msglog.Record) error {
		g.mu.Lock()
		defer g.mu.Unlock()
		if full = len(g.waiting) >= groupHold; full || r.Pos >= limit {
			return errEnough
		}
		g.restore(r)
		g.next = r.Pos.Next()
		return nil
	})
	g.b.mu.Lock()
	defer g.b.mu.Unlock()
	g.mu.Lock()
	if err != nil && err != errEnough {
		g.b.log.Error("shared subscription cannot be read from the log", "group", g.key.name, "filter", g.key.filter, "error", err)
		g.reading = false
		g.mu.Unlock()
		return false
	}
	if !full {
		if g.next = max(g.next, limit); g.next >= g.b.next {
			g.behind = false
		}
	}
	more = g.behind && len(g.waiting) <= groupHold/2
	g.reading = more
	g.mu.Unlock()
	g.feed()
	return more
}

// restore queues one record read back. The caller holds mu.
func (g *group) restore(r *msglog.Record) {
	if r.Kind == msglog.KindPublish && r.QoS > 0 && r.Pos >= g.next && identity.Match(g.key.filter, r.Topic) {
		g.waiting = append(g.waiting, delivery{msg: newMessage(r), pos: r.Pos, qos: r.QoS, group: g})
	}
}

// lockedFeed is feed for who does not hold Broker.mu.
func (g *group) lockedFeed() {
	g.b.mu.Lock()
	defer g.b.mu.Unlock()
	g.feed()
}

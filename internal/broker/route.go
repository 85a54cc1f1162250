package broker

import (
	"hawser/internal/identity"
	"hawser/internal/mqtt"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// Reason codes that more than one file uses.
const (
	notAuthorized = mqtt.NotAuthorized
	shuttingDown  = mqtt.ServerShuttingDown
)

// hit is one service session that a record is for.
type hit struct {
	s *session
	m match
}

// planned tells the log which device queues the records of a frame belong to,
// before the frame is written: what PUBACK promises must be in the queue then.
func (b *Broker) planned(recs []msglog.Record, q *msglog.QueuePlan) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range recs {
		r := &recs[i]
		if r.Kind != msglog.KindPublish || r.QoS == 0 || r.Direct {
			continue
		}
		id, rest, ok := identity.DeviceTopic(r.Topic)
		if !ok || under(rest, "u") {
			continue
		}
		if s := b.devices[id]; s != nil {
			b.plan(s, r, i, q)
		}
	}
}

// plan adds one record to the queue of a persistent session, or counts that it
// did not fit. The caller holds mu.
func (b *Broker) plan(s *session, r *msglog.Record, i int, q *msglog.QueuePlan) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.persistent() && !s.out.behind { // on its last visit a session still has its order on disk
		return
	}
	if m := s.matchRecord(r); !m.hit || m.qos == 0 {
		return
	}
	limit := &b.cfg.Limits.Device
	if s.out.queued >= limit.Queue || s.out.queuedBytes >= limit.QueueBytes {
		r.QueueFull = true
		s.drop()
		return
	}
	s.out.queued++
	s.out.queuedBytes += len(r.Topic) + len(r.Payload) + len(r.Props)
	q.Add(s.key.Principal.Name, i)
}

// committed routes the records of a frame that is on disk, in their order, and
// then sends the acknowledgements, those of one connection together.
func (b *Broker) committed(recs []msglog.Record, queued []msglog.QueuedAt) {
	clear(b.seqs)
	for _, q := range queued {
		b.seqs[q.Name] = q.Seq
	}
	b.mu.Lock()
	for i := range recs {
		b.route(&recs[i])
	}
	if n := len(recs); n > 0 {
		b.next = msglog.MakePos(recs[n-1].Pos.Frame()+1, 0)
	}
	for _, q := range queued {
		b.noteQueued(q)
	}
	b.mu.Unlock()
	for i := range recs {
		if c, ok := recs[i].Owner.(*conn); ok && c.acknowledge(&recs[i]) {
			b.dirty = append(b.dirty, c)
		}
	}
	for i, c := range b.dirty {
		c.start()
		b.dirty[i] = nil
	}
	b.dirty = b.dirty[:0]
}

// noteQueued tells a session what is in its queue now. The caller holds mu.
func (b *Broker) noteQueued(q msglog.QueuedAt) {
	id, err := identity.ParseID(q.Name)
	if err != nil {
		return
	}
	if s := b.devices[id]; s != nil {
		s.mu.Lock()
		s.out.newest = max(s.out.newest, q.Seq)
		if s.out.behind {
			s.refill()
		}
		s.mu.Unlock()
	}
}

// route applies one record. The caller holds mu.
func (b *Broker) route(r *msglog.Record) {
	switch r.Kind {
	case msglog.KindRelease:
		b.noteInbound(r)
		return
	case msglog.KindPublish:
	default:
		return
	}
	if r.QoS == 2 {
		b.noteInbound(r)
	}
	if r.Retain && !r.Direct {
		b.keep(r)
	}
	id, rest, mine := identity.DeviceTopic(r.Topic)
	if mine && b.cfg.Uplink != nil && r.From.Kind == identity.Device && hawsersOwn(rest) {
		b.cfg.Uplink(id, rest, r)
	}
	var m *message
	if mine && !under(rest, "u") {
		if s := b.devices[id]; s != nil && s.c != nil {
			m = b.toDevice(s, r)
		}
	}
	if own, ok := r.Owner.(*direct); ok && m == nil {
		own.finish(false)
	}
	if !r.Direct {
		b.toServices(r, m)
	}
}

// hawsersOwn reports the uplink topics that the server itself reads.
func hawsersOwn(rest string) bool {
	return rest == "u/hello" || rest == "u/cmd" || rest == "u/cfg" || rest == "u/pki"
}

// noteInbound brings the record's session its QoS 2 packet id: not the one that a
// clean start has put in its place since. The caller holds mu.
func (b *Broker) noteInbound(r *msglog.Record) {
	if c, ok := r.Owner.(*conn); ok {
		c.s.noteInbound(r)
	} else if s := b.sessionOf(r); s != nil && r.Time >= s.created.UnixMilli() {
		s.noteInbound(r)
	}
}

// sessionOf is the session that a record came from, nil when it has ended.
func (b *Broker) sessionOf(r *msglog.Record) *session {
	if id, ok := r.From.ID(); ok {
		return b.devices[id]
	}
	return b.sessions[keyOf(r)]
}

// toDevice delivers to the one session that a device has.
func (b *Broker) toDevice(s *session, r *msglog.Record) *message {
	s.mu.Lock()
	defer s.mu.Unlock()
	mt := s.matchRecord(r)
	if !mt.hit {
		return nil
	}
	m := newMessage(r)
	d := delivery{msg: m, pos: r.Pos, ids: mt.ids, qos: mt.qos, retain: mt.retain}
	switch own, _ := r.Owner.(*direct); {
	case r.Direct && own == nil: // replayed: its sender sends it again
		return m
	case own != nil:
		if d.qos == 0 { // nothing will tell that it came; its answer will
			defer own.finish(false)
		} else {
			d.direct = own
		}
	case d.qos > 0 && (s.persistent() || s.out.behind):
		if r.QueueFull {
			return m
		}
		d.seq = b.seqs[s.key.Principal.Name]
	}
	s.deliver(d)
	return m
}

// deliver hands one live message to a session: at QoS 0 to the socket or
// nowhere, else into its order. The caller holds mu.
func (s *session) deliver(d delivery) {
	s.b.stats.Delivered.Add(1)
	if d.qos == 0 {
		if c := s.live(); c != nil {
			if left, dead := d.msg.left(s.b.now()); !dead {
				c.sendPublish(&d, left)
			}
		}
		return
	}
	s.push(d)
	s.pump()
}

// live is the connection, once its CONNACK is out. The caller holds mu.
func (s *session) live() *conn {
	if s.c != nil && s.c.ready {
		return s.c
	}
	return nil
}

// toServices delivers to the subscriptions in the tree, one copy per session.
// m is the message if it exists already.
func (b *Broker) toServices(r *msglog.Record, m *message) {
	b.hits = b.hits[:0]
	b.tree.find(r.Topic, func(sub *subscription) {
		if g := sub.group; g != nil {
			if sub.start <= r.Pos {
				m = b.offer(g, r, m)
			}
			return
		}
		b.collect(sub, r)
	})
	for i := range b.hits {
		h := &b.hits[i]
		if m == nil {
			m = newMessage(r)
		}
		b.toService(h, m)
		*h = hit{}
	}
}

// collect notes one matching subscription.
func (b *Broker) collect(sub *subscription, r *msglog.Record) {
	if sub.start > r.Pos || sub.loops(r.From, r.ClientID) {
		return
	}
	for i := range b.hits {
		if b.hits[i].s == sub.s {
			b.hits[i].m.add(sub, r.QoS, r.Retain)
			return
		}
	}
	var m match
	m.add(sub, r.QoS, r.Retain)
	b.hits = append(b.hits, hit{sub.s, m})
}

func (b *Broker) toService(h *hit, m *message) {
	s := h.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.c == nil { // the cursor finds it
		return
	}
	s.deliver(delivery{msg: m, pos: m.pos, ids: h.m.ids, qos: h.m.qos, retain: h.m.retain})
}

// offer gives a record to a share group.
func (b *Broker) offer(g *group, r *msglog.Record, m *message) *message {
	if m == nil {
		m = newMessage(r)
	}
	if r.QoS == 0 {
		g.deliverOne(m)
		return m
	}
	g.offer(m)
	g.feed()
	return m
}

// keyOf is the key of the session that a service's record came from.
func keyOf(r *msglog.Record) registry.SessionKey {
	return registry.SessionKey{Principal: r.From, ClientID: r.ClientID}
}

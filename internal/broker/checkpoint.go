package broker

import (
	"fmt"
	"time"

	"hawser/internal/identity"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// The streams of the log as the registry names them.
const (
	StreamLog      = "log"
	StreamQueue    = "queue"
	StreamRetained = "retained"
	StreamHistory  = "history"
)

// LogState puts what the log says of itself into the registry's words.
func LogState(s msglog.State, checkpoint msglog.Pos) registry.LogState {
	row := func(name string, st msglog.StreamState) registry.StreamState {
		return registry.StreamState{Name: name, First: st.First, Last: st.Last}
	}
	l := registry.LogState{Checkpoint: uint64(checkpoint), Streams: []registry.StreamState{
		row(StreamHistory, s.History), row(StreamLog, s.Log), row(StreamQueue, s.Queue), row(StreamRetained, s.Retained)}}
	l.Streams[1].Frame, l.Streams[1].Checksum = s.Frame, s.Checksum
	return l
}

// KnownState is the reverse of LogState.
func KnownState(l registry.LogState) (s msglog.State) {
	for _, row := range l.Streams {
		st := msglog.StreamState{First: row.First, Last: row.Last}
		switch row.Name {
		case StreamLog:
			s.Log, s.Frame, s.Checksum = st, row.Frame, row.Checksum
		case StreamQueue:
			s.Queue = st
		case StreamRetained:
			s.Retained = st
		case StreamHistory:
			s.History = st
		}
	}
	return s
}

// saver is what the last checkpoint wrote; owned by the housekeeping goroutine,
// and by Close after that has ended.
type saver struct {
	state msglog.State
	pos   msglog.Pos
}

// snapshot is everything that is derived from the log up to pos.
type snapshot struct {
	pos      msglog.Pos // all below is in here
	floor    msglog.Pos // the lowest persistent cursor
	retained []*msglog.Record
	cursors  []registry.Cursor
	inbound  map[int64][]uint16
	stale    map[int64][]uint16
	acked    map[string]uint64
}

// housekeeping writes a checkpoint each second and ends sessions that expire.
func (b *Broker) housekeeping() {
	defer b.tasks.Done()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-b.ctx.Done():
			return
		case <-tick.C:
		}
		if b.saving.TryLock() {
			if err := b.checkpoint(); err != nil {
				b.stats.StoreErrors.Add(1)
				b.log.Error("checkpoint", "error", err)
			}
			b.saving.Unlock()
		}
		if n%10 == 0 {
			b.expire(b.now())
		}
	}
}

// HoldCheckpoints keeps what the registry knows of the log as it is until release
// is called. Messages go on being acknowledged; a start after a crash has more to
// read. Close waits for the release.
func (b *Broker) HoldCheckpoints() (release func()) {
	b.saving.Lock()
	return b.saving.Unlock
}

// checkpoint writes what is derived from the log, so that a restart need read
// only what came after. Messages are not touched by it: they are in the log. The
// caller holds saving.
func (b *Broker) checkpoint() error {
	snap := b.snapshot()
	if err := b.cfg.Log.PutRetained(b.background(), snap.retained); err != nil {
		b.remember(snap.retained)
		return err
	}
	for name, seq := range snap.acked {
		b.cfg.Log.QueueAck(name, seq)
	}
	state := b.cfg.Log.State()
	if len(snap.cursors)+len(snap.inbound)+len(snap.stale) > 0 || state != b.saved.state || snap.pos != b.saved.pos {
		if err := b.write(snap, state); err != nil {
			b.remember(snap.retained)
			return err
		}
		b.saved = saver{state, snap.pos}
		b.cfg.Log.Saved(state)
	}
	b.cfg.Log.SetFloor(snap.pos, min(snap.pos, snap.floor))
	return nil
}

func (b *Broker) write(snap *snapshot, state msglog.State) error {
	err := b.cfg.Store.Update(b.background(), func(tx *registry.Tx) error {
		if err := tx.SaveCursors(snap.cursors); err != nil {
			return err
		}
		for no, pids := range snap.stale {
			if err := tx.DeleteInflight(no, pids...); err != nil {
				return err
			}
		}
		if err := tx.ReplaceInboundQoS2(snap.inbound); err != nil {
			return err
		}
		return tx.SaveLogState(LogState(state, snap.pos))
	})
	if err != nil {
		return fmt.Errorf("save checkpoint: %w", err)
	}
	return nil
}

// remember marks retained messages as unsaved again.
func (b *Broker) remember(recs []*msglog.Record) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range recs {
		b.retained.dirty[r.Topic] = true
	}
}

// snapshot is taken in one moment between two frames.
func (b *Broker) snapshot() *snapshot {
	b.mu.Lock()
	defer b.mu.Unlock()
	snap := &snapshot{pos: b.next, floor: b.next, inbound: make(map[int64][]uint16),
		stale: make(map[int64][]uint16), acked: make(map[string]uint64)}
	if b.cfg.UplinkFloor != nil {
		if f := b.cfg.UplinkFloor(); f > 0 {
			snap.pos = min(snap.pos, f)
		}
	}
	for topic := range b.retained.dirty {
		snap.retained = append(snap.retained, b.retainedRecord(topic))
	}
	clear(b.retained.dirty)
	for _, s := range b.sessions {
		s.snapshot(snap)
	}
	for _, g := range b.groups {
		if f := g.floor(); g.stored {
			snap.floor = min(snap.floor, f)
			if f != g.saved {
				g.saved = f
				snap.cursors = append(snap.cursors, registry.Cursor{Session: g.no, Cursor: uint64(f)})
			}
		}
	}
	return snap
}

// retainedRecord is the retained message of a topic as it is stored, or the mark
// that there is none. The caller holds mu.
func (b *Broker) retainedRecord(topic string) *msglog.Record {
	m := b.retained.all[topic]
	if m == nil {
		return &msglog.Record{Pos: b.next, Kind: msglog.KindPublish, Time: b.now().UnixMilli(),
			From: identity.TheServer(), Topic: topic, Retain: true}
	}
	r := &msglog.Record{Pos: m.pos, Kind: msglog.KindPublish, Time: m.at, From: m.from, ClientID: m.client,
		Topic: m.topic, Payload: m.payload, Props: m.props, QoS: m.qos, Retain: true}
	if m.expires != 0 {
		r.HasExpiry, r.Expiry = true, uint32((m.expires-m.at)/1000)
	}
	return r
}

// snapshot adds what has changed of one session. The caller holds Broker.mu.
func (s *session) snapshot(snap *snapshot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.stored || !s.persistent() {
		return
	}
	c := registry.Cursor{Session: s.no, Dropped: s.dropped}
	if s.isDevice() {
		c.QueueAcked = s.out.acked()
		if c.QueueAcked > s.saved.QueueAcked {
			snap.acked[s.key.Principal.Name] = c.QueueAcked
		}
	} else {
		c.Cursor = uint64(s.out.floor(s))
		snap.floor = min(snap.floor, msglog.Pos(c.Cursor))
	}
	if c != s.saved {
		s.saved = c
		snap.cursors = append(snap.cursors, c)
	}
	if len(s.out.stale) > 0 {
		snap.stale[s.no] = s.out.stale
		s.out.stale = nil
	}
	if s.inDirty {
		s.inDirty = false
		pids := []uint16{}
		for _, in := range s.received {
			if in.logged {
				pids = append(pids, in.pid)
			}
		}
		snap.inbound[s.no] = pids
	}
}

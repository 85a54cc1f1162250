package msglog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"hawser/internal/identity"
)

// chunker follows the frames and gathers the records of each principal into
// chunks on a subject of its own, so that the history of one principal is read
// without reading that of the others.
//
// Each chunk carries a floor: the position before which every record is in a
// chunk. The floor of the last message of H is where the chunker goes on after
// a restart; records that it then writes a second time are recognised by their
// positions when history is read.
type chunker struct {
	l *Log

	mu    sync.Mutex
	open  map[string]*chunk // guarded by mu; by subject
	bytes int               // guarded by mu; of the open chunks
	pos   Pos               // guarded by mu; every record before it is in a chunk, open or written

	// Of the chunker's goroutine alone.
	prev    map[string]uint64 // subject -> sequence of its last chunk, 0 when it has none
	ready   []*chunk          // full, taken out of open; still visible through writing
	writing []*chunk          // guarded by mu: those not yet on disk, for History
}

// chunk is a chunk under construction.
type chunk struct {
	subject string
	buf     []byte
	enc     encoder
	base    int64
	count   int
	first   Pos
	born    time.Time
}

// Sizes of one write to H, and how long a closed chunk waits for company: a write
// of several messages costs JetStream a store of its own and six flushes, however
// few they are.
const (
	writeChunks = 512
	writeBytes  = 2 << 20
	writeWithin = time.Second
	// perChunk is what an open chunk takes beside its records.
	perChunk = 256
)

// loadChunks finds where the chunker goes on.
func (l *Log) loadChunks(ctx context.Context) error {
	c := &chunker{l: l, open: make(map[string]*chunk), prev: make(map[string]uint64), pos: MakePos(l.first, 0)}
	l.chunks = c
	if l.hLast > 0 && l.hLast >= l.keep.wantHistory.Load() {
		m, ok, err := l.store.get(ctx, l.names.history, l.hLast, "")
		if err != nil {
			return fmt.Errorf("last chunk of stream %s in %s: %w", l.names.history, l.cfg.where(), err)
		}
		if !ok {
			return l.damaged(l.names.history, l.hLast, fmt.Errorf("the last chunk is missing"))
		}
		h, _, _, err := decodeBlock(m.data, magicChunk, nil)
		if err != nil {
			return l.damaged(l.names.history, l.hLast, err)
		}
		c.pos = max(c.pos, Pos(h.number))
	}
	return nil
}

// run follows the frames until ctx ends.
func (c *chunker) run(ctx context.Context, l *Log) {
	tick := time.NewTicker(min(c.l.cfg.ChunkAge/4+time.Millisecond, time.Minute))
	defer tick.Stop()
	due := time.NewTimer(0)
	defer due.Stop()
	overdue := false
	for ctx.Err() == nil {
		changed := l.Changed()
		c.mu.Lock()
		pos := c.pos
		c.mu.Unlock()
		err := l.read(ctx, pos, func(r *Record) error { return c.add(ctx, r) })
		if err == nil && overdue {
			err, overdue = c.writeReady(ctx), false
			due.Reset(writeWithin)
		}
		if err != nil && ctx.Err() == nil {
			l.cfg.Logger.Error("history falls behind", "log", l.cfg.where(), "error", err)
			l.pause(recoverEvery)
			continue
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-tick.C:
			c.ripen()
		case <-due.C:
			overdue = true
		}
	}
}

// add puts a record into the chunks of the principals it belongs to.
func (c *chunker) add(ctx context.Context, r *Record) error {
	c.mu.Lock()
	belongsTo(r, func(kind identity.Kind, name string) {
		subject := c.l.names.h + name
		if kind == identity.Service {
			subject = c.l.names.s + name
		}
		c.addTo(subject, r)
	})
	c.pos = r.Pos.Next()
	c.shrink()
	flush := len(c.ready) >= writeChunks
	c.mu.Unlock()
	if flush {
		return c.writeReady(ctx)
	}
	return nil
}

// addTo is called with mu held.
func (c *chunker) addTo(subject string, r *Record) {
	k := c.open[subject]
	if k == nil {
		k = &chunk{
			subject: subject, buf: make([]byte, headerSize, 512), base: r.Time, first: r.Pos, born: time.Now(),
			enc: encoder{positions: true, lastTime: r.Time},
		}
		c.open[subject] = k
		c.bytes += perChunk
	}
	before := len(k.buf)
	k.buf = k.enc.append(k.buf, r)
	k.count++
	c.bytes += len(k.buf) - before
	if len(k.buf) >= c.l.cfg.ChunkBytes || k.count == MaxFrameRecords {
		c.close(k)
	}
}

// close takes a chunk out of open, to be written. It is called with mu held.
func (c *chunker) close(k *chunk) {
	delete(c.open, k.subject)
	c.bytes -= len(k.buf) + perChunk
	c.ready = append(c.ready, k)
	c.writing = append(c.writing, k)
}

// shrink closes the largest chunks when all together are over the limit. It is
// called with mu held.
func (c *chunker) shrink() {
	if c.bytes <= c.l.cfg.ChunkMemory {
		return
	}
	all := c.openChunks()
	slices.SortFunc(all, func(a, b *chunk) int { return cmp.Compare(len(b.buf), len(a.buf)) })
	for _, k := range all {
		if c.bytes <= c.l.cfg.ChunkMemory/2 {
			return
		}
		c.close(k)
	}
}

func (c *chunker) openChunks() []*chunk {
	all := make([]*chunk, 0, len(c.open))
	for _, k := range c.open {
		all = append(all, k)
	}
	return all
}

// ripen closes the chunks that are old enough.
func (c *chunker) ripen() {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := time.Now().Add(-c.l.cfg.ChunkAge)
	for _, k := range c.openChunks() {
		if k.born.Before(old) {
			c.close(k)
		}
	}
}

// writeReady writes the closed chunks. Those that cannot be written stay.
func (c *chunker) writeReady(ctx context.Context) error {
	for len(c.ready) > 0 {
		n, err := c.writeSome(ctx)
		if err != nil {
			c.l.storeFailed(err)
			return err
		}
		c.mu.Lock()
		c.ready = append(c.ready[:0], c.ready[n:]...)
		c.writing = append(c.writing[:0], c.writing[n:]...)
		c.mu.Unlock()
	}
	return nil
}

// writeSome writes the first chunks of ready at once. They follow the last
// message of H, so each can tell the sequence of its subject's chunk before, also
// when that is in the same write.
func (c *chunker) writeSome(ctx context.Context) (int, error) {
	n, size := 0, 0
	for ; n < len(c.ready) && n < writeChunks && size < writeBytes; n++ {
		size += len(c.ready[n].buf)
	}
	floor := c.floorWithout(n)
	c.l.mu.Lock()
	base := c.l.hLast
	c.l.mu.Unlock()
	msgs := make([]outMsg, n)
	for i, k := range c.ready[:n] {
		link, err := c.previous(ctx, k.subject)
		if err != nil {
			clear(c.prev) // it tells of chunks of this write already
			return 0, err
		}
		c.prev[k.subject] = base + uint64(i) + 1
		h := header{magic: magicChunk, count: k.count, number: uint64(floor), link: link, base: k.base}
		data, _ := seal(append(make([]byte, 0, len(k.buf)+trailerSize), k.buf...), h) // History reads k.buf
		msgs[i] = outMsg{k.subject, data}
	}
	last, err := c.l.store.put(ctx, &base, msgs...)
	if err != nil {
		return 0, errors.Join(err, c.lookAgain(ctx))
	}
	c.setLast(last)
	return n, nil
}

// lookAgain follows a write that failed: it may be there all the same. A store that met
// a write error counts what it could not write, and leaves it out after its restart: it
// is asked then, when the next write meets another sequence than it expects.
func (c *chunker) lookAgain(ctx context.Context) error {
	clear(c.prev)
	if c.l.store.sick.Load() {
		return nil
	}
	in, err := c.l.store.info(ctx, c.l.names.history)
	if err == nil {
		c.setLast(in.State.LastSeq)
	}
	return err
}

func (c *chunker) setLast(seq uint64) {
	c.l.mu.Lock()
	c.l.hLast = seq
	c.l.mu.Unlock()
}

// floorWithout is the floor once the first n chunks of ready are on disk.
func (c *chunker) floorWithout(n int) Pos {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lowest(c.ready[n:])
}

// previous gives the sequence of the last chunk of a subject, 0 when there is none.
func (c *chunker) previous(ctx context.Context, subject string) (uint64, error) {
	if seq, ok := c.prev[subject]; ok {
		return seq, nil
	}
	m, ok, err := c.l.store.get(ctx, c.l.names.history, 0, subject)
	if err != nil {
		return 0, err
	}
	if !ok {
		m.seq = 0
	}
	c.prev[subject] = m.seq
	return m.seq, nil
}

// diskFloor is the position before which every record is in a chunk on disk. It
// may be ahead of the floor that the last chunk carries: a restart then reads
// again what is left of the frames between the two.
func (c *chunker) diskFloor() Pos {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lowest(c.writing)
}

// lowest is the first position that is in no chunk but the open ones and those
// of rest. It is called with mu held.
func (c *chunker) lowest(rest []*chunk) Pos {
	floor := c.pos
	for _, k := range rest {
		floor = min(floor, k.first)
	}
	for _, k := range c.open {
		floor = min(floor, k.first)
	}
	return floor
}

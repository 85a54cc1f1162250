package msglog

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// queues is what is known about stream Q. A queue message holds the records of
// one frame that are for one device, and the sequence of the one before it in
// the same queue, so that a hole is noticed.
type queues struct {
	write sync.Mutex // held while something is written to Q: sequences are predicted

	mu     sync.Mutex
	byName map[string]*queue // guarded by mu; queues that hold something
	last   uint64            // guarded by mu; last sequence of Q
	done   uint64            // guarded by mu; frames up to here have all their queue messages, says Q
	gone   map[string]waste  // guarded by mu; acknowledged and still in Q
	wasted int               // guarded by mu; messages in gone
	wake   chan struct{}     // capacity 1
}

// queue is one device's queue. The sequences take 8 bytes for each message; to
// look them up by subject would cost JetStream a walk over those of all devices.
type queue struct {
	seqs    []uint64 // of its messages, rising
	recs    []uint32 // records in each of them
	lastPos Pos      // of the last record
}

// waste is what is acknowledged of a queue and not purged yet.
type waste struct {
	upTo     uint64 // sequence
	messages int
}

// last is 0 for a queue that is not there.
func (u *queue) last() uint64 {
	if u == nil || len(u.seqs) == 0 {
		return 0
	}
	return u.seqs[len(u.seqs)-1]
}

func (q *queues) lastSeq() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.last
}

func (q *queues) setLast(seq uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.last = max(q.last, seq)
}

// loadQueues reads the whole of Q, verifying it.
func (l *Log) loadQueues(ctx context.Context) error {
	q := &l.queues
	q.byName, q.gone, q.wake = make(map[string]*queue), make(map[string]waste), make(chan struct{}, 1)
	var recs []Record
	return l.scanAll(ctx, l.names.queue, func(m stored) error {
		h, got, _, err := decodeBlock(m.data, magicQueue, recs[:0])
		if err != nil {
			return l.damaged(l.names.queue, m.seq, err)
		}
		recs = got
		q.last = m.seq
		if h.flags&flagFinal != 0 {
			q.done = h.number
		} else {
			q.done = h.number - 1
		}
		if m.subject == l.names.mark || len(recs) == 0 {
			return nil
		}
		name := m.subject[len(l.names.q):]
		if last := q.byName[name].last(); last != 0 && h.link > last {
			return l.damaged(l.names.queue, h.link, fmt.Errorf("queue of %s: the message is missing", name))
		}
		q.note(name, m.seq, len(recs), recs[len(recs)-1].Pos)
		return nil
	})
}

// scanAll reads a whole stream that nobody writes to at the time. JetStream
// passes over what it cannot read, so the messages are counted.
func (l *Log) scanAll(ctx context.Context, stream string, fn func(stored) error) error {
	in, err := l.store.info(ctx, stream)
	if err != nil {
		return fmt.Errorf("stream %s in %s: %w", stream, l.cfg.where(), err)
	}
	var n, last uint64
	err = l.store.scan(ctx, scanQuery{stream: stream}, func(m stored) error {
		n, last = n+1, m.seq
		return fn(m)
	})
	if err == nil && n != in.State.Messages {
		return l.damaged(stream, last, fmt.Errorf("%d of %d messages can be read", n, in.State.Messages))
	}
	return err
}

// note is called with mu held, or before anybody else knows q.
func (q *queues) note(name string, seq uint64, records int, pos Pos) {
	u := q.byName[name]
	if u == nil {
		u = &queue{}
		q.byName[name] = u
	}
	u.seqs, u.recs, u.lastPos = append(u.seqs, seq), append(u.recs, uint32(records)), pos
}

func (l *Log) damaged(stream string, seq uint64, err error) error {
	return fmt.Errorf("%w: message %d of stream %s in %s: %w", ErrDamaged, seq, stream, l.cfg.where(), err)
}

// writeQueues stores the queue messages of frame f as c.plan says and fills c.queued.
func (c *committer) writeQueues(f *frame) error {
	c.queued = c.queued[:0]
	plan := c.plan.entries()
	if len(plan) == 0 {
		return nil
	}
	q := &c.l.queues
	q.write.Lock()
	defer q.write.Unlock()
	for len(plan) > 0 {
		n := min(len(plan), maxBatch)
		if err := c.writeQueueBatch(f, plan[:n], n == len(plan)); err != nil {
			c.l.stats.failures.Add(1)
			return err
		}
		plan = plan[n:]
	}
	return nil
}

func (c *committer) writeQueueBatch(f *frame, plan []planned, final bool) error {
	l, q := c.l, &c.l.queues
	q.mu.Lock()
	expect := q.last
	msgs := make([]outMsg, len(plan))
	for i, p := range plan {
		h := header{magic: magicQueue, number: f.number, link: q.byName[p.name].last()}
		if final && i == len(plan)-1 {
			h.flags = flagFinal
		}
		msgs[i] = outMsg{l.names.q + p.name, c.queueMessage(h, p.recs)}
	}
	q.mu.Unlock()
	if err := c.putQueue(expect, msgs); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, p := range plan {
		seq := expect + uint64(i) + 1
		q.note(p.name, seq, len(p.recs), c.recs[p.recs[len(p.recs)-1]].Pos)
		c.queued = append(c.queued, QueuedAt{p.name, seq, len(p.recs)})
	}
	q.last = expect + uint64(len(msgs))
	if final {
		q.done = f.number
	}
	return nil
}

func (c *committer) queueMessage(h header, recs []int) []byte {
	size := headerSize + trailerSize
	for _, i := range recs {
		size += sizeBound(&c.recs[i])
	}
	h.count, h.base = len(recs), c.recs[recs[0]].Time
	b := make([]byte, headerSize, size)
	enc := encoder{positions: true, lastTime: h.base}
	for _, i := range recs {
		b = enc.append(b, &c.recs[i])
	}
	b, _ = seal(b, h)
	return b
}

// putQueue stores msgs after sequence expect of Q. When an attempt fails, what
// Q ends with tells whether it was stored: nobody else writes there.
func (c *committer) putQueue(expect uint64, msgs []outMsg) error {
	l := c.l
	for try := 0; ; try++ {
		_, err := l.store.put(l.ctx, &expect, msgs...)
		if err == nil {
			return nil
		}
		info, ierr := l.store.info(l.ctx, l.names.queue)
		if ierr == nil && info.State.LastSeq == expect+uint64(len(msgs)) {
			return nil
		}
		if ierr == nil && info.State.LastSeq != expect {
			return l.damaged(l.names.queue, info.State.LastSeq, errForeign)
		}
		if try == 3 || !c.sleep(recoverEvery) {
			return err
		}
		c.repair(err)
	}
}

// finishLast writes queue messages that the last frame lacks because the
// server died in between. Earlier frames lack none: they come one at a time.
func (c *committer) finishLast(ctx context.Context) error {
	l := c.l
	last := l.End().Frame() - 1
	if last == 0 || last <= l.queues.done {
		return nil
	}
	data := l.ring.get(last)
	if data == nil || l.hooks.Plan == nil {
		return nil
	}
	if err := c.decode(data); err != nil {
		return l.damaged(l.names.log, last, err)
	}
	c.planQueues()
	c.plan.drop(func(name string) bool { return l.queues.holds(name, last) })
	if err := c.writeQueues(&frame{number: last, data: data}); err != nil {
		return fmt.Errorf("queue messages of frame %d: %w", last, err)
	}
	return nil
}

func (q *queues) holds(name string, frame uint64) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	u := q.byName[name]
	return u != nil && u.lastPos.Frame() >= frame
}

// QueueStates calls fn for every device queue that holds something, in no
// particular order.
func (l *Log) QueueStates(ctx context.Context, fn func(QueueState) error) error {
	l.queues.mu.Lock()
	all := make([]QueueState, 0, len(l.queues.byName))
	for name, u := range l.queues.byName {
		all = append(all, QueueState{Name: name, First: u.seqs[0], Last: u.last(), Count: uint64(len(u.seqs)), LastPos: u.lastPos})
	}
	l.queues.mu.Unlock()
	for _, s := range all {
		if err := fn(s); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// QueueRead gives at most max messages of a device's queue with a sequence
// above afterSeq (0: from the beginning), oldest first, together about 1 MiB at the
// most; none when there are no more. A message that is missing is ErrDamaged.
func (l *Log) QueueRead(name string, afterSeq uint64, max int) ([]Queued, error) {
	var out []Queued
	size := 0
	for _, seq := range l.queues.after(name, afterSeq, max) {
		data, err := l.queueMessage(name, seq)
		if err != nil {
			return nil, err
		}
		if data == nil {
			continue // dropped meanwhile
		}
		h, recs, _, err := decodeBlock(data, magicQueue, nil)
		if err != nil {
			return nil, l.damaged(l.names.queue, seq, err)
		}
		if afterSeq != 0 && h.link > afterSeq {
			return nil, l.damaged(l.names.queue, h.link, fmt.Errorf("queue of %s: the message is missing", name))
		}
		out = append(out, Queued{Seq: seq, Recs: recs})
		afterSeq = seq
		if size += len(data); size > readBytes {
			break
		}
	}
	return out, nil
}

// readBytes is what QueueRead reads before it stops.
const readBytes = 1 << 20

// after gives the first max sequences of a queue above afterSeq.
func (q *queues) after(name string, afterSeq uint64, max int) []uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	u := q.byName[name]
	if u == nil || max <= 0 {
		return nil
	}
	i, _ := slices.BinarySearch(u.seqs, afterSeq+1)
	return slices.Clone(u.seqs[i:min(i+max, len(u.seqs))])
}

// queueMessage reads one message; nil when it was removed meanwhile.
func (l *Log) queueMessage(name string, seq uint64) ([]byte, error) {
	for try := 0; ; try++ {
		m, ok, err := l.store.getDirect(l.ctx, l.names.queue, seq)
		if err != nil {
			return nil, err
		}
		if ok && m.subject == l.names.q+name {
			return m.data, nil
		}
		if len(l.queues.after(name, seq-1, 1)) == 0 || l.queues.after(name, seq-1, 1)[0] != seq {
			return nil, nil
		}
		if try == readRetries || l.cfg.Dir != "" {
			return nil, l.damaged(l.names.queue, seq, fmt.Errorf("queue of %s: the message is missing", name))
		}
		if !l.pause(readPause) { // a replica that lags behind
			return nil, ErrClosed
		}
	}
}

// QueueAck says that the device acknowledged its queue up to upToSeq. The
// messages are not read again; they are removed in the background.
func (l *Log) QueueAck(name string, upToSeq uint64) {
	q := &l.queues
	q.mu.Lock()
	defer q.mu.Unlock()
	n := q.cut(name, upToSeq)
	if n == 0 {
		return
	}
	w := q.gone[name]
	q.gone[name] = waste{max(w.upTo, upToSeq), w.messages + n}
	q.wasted += n
	signal(q.wake)
}

// cut forgets the messages of a queue up to a sequence and tells how many they
// were. It is called with mu held.
func (q *queues) cut(name string, upTo uint64) int {
	u := q.byName[name]
	if u == nil {
		return 0
	}
	i, _ := slices.BinarySearch(u.seqs, upTo+1)
	u.recs = slices.Delete(u.recs, 0, i)
	if u.seqs = slices.Delete(u.seqs, 0, i); len(u.seqs) == 0 {
		delete(q.byName, name)
	}
	return i
}

// QueueDrop empties a device's queue, for good when it returns nil, and tells how
// many records went that were not acknowledged.
func (l *Log) QueueDrop(name string) (records int, err error) {
	q := &l.queues
	q.mu.Lock()
	last := max(q.byName[name].last(), q.gone[name].upTo)
	if u := q.byName[name]; u != nil {
		for _, n := range u.recs {
			records += int(n)
		}
	}
	q.mu.Unlock()
	if last == 0 {
		return 0, nil
	}
	if err := l.queuePurge(l.ctx, name, last); err != nil {
		return 0, err
	}
	return records, nil
}

// queuePurge removes the messages of a queue up to a sequence.
func (l *Log) queuePurge(ctx context.Context, name string, upTo uint64) error {
	q := &l.queues
	if upTo >= q.lastSeq() {
		if err := l.writeMark(ctx); err != nil {
			return err
		}
	}
	if err := l.store.purge(ctx, l.names.queue, l.names.q+name, upTo+1); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.cut(name, upTo)
	q.purged(name, upTo)
	return nil
}

// purged notes that nothing of a queue is in Q up to a sequence. It is called
// with mu held.
func (q *queues) purged(name string, upTo uint64) {
	if w := q.gone[name]; w.messages > 0 && w.upTo <= upTo {
		q.wasted -= w.messages
		delete(q.gone, name)
	}
}

// writeMark appends a message without records to Q that says which frames have
// their queue messages. It is written before the last message of Q is removed:
// otherwise a restart could not tell whether the last frame's was ever there,
// and would deliver again what was acknowledged.
func (l *Log) writeMark(ctx context.Context) error {
	q := &l.queues
	q.write.Lock()
	defer q.write.Unlock()
	q.mu.Lock()
	number, expect := q.done, q.last
	q.mu.Unlock()
	data, _ := seal(make([]byte, headerSize), header{magic: magicQueue, flags: flagFinal, number: number})
	seq, err := l.store.put(ctx, &expect, outMsg{l.names.mark, data})
	if err != nil {
		if info, ierr := l.store.info(ctx, l.names.queue); ierr == nil && info.State.LastSeq == expect+1 {
			q.setLast(expect + 1)
		}
		return err
	}
	q.setLast(seq)
	return l.store.purge(ctx, l.names.queue, l.names.mark, seq)
}

// How what was acknowledged is removed. One purge of everything before the oldest
// message that still waits costs JetStream as much as that of one queue, so it is
// done for all, once a second at most. What lies behind a device that has been
// away for long is removed queue by queue when it has become too much.
const (
	purgeEvery  = time.Second
	maxWaste    = 20_000   // messages
	maxQueueLog = 64 << 20 // bytes of Q, below which waste is looked at by number only
)

// purgeLoop removes what QueueAck was told.
func (q *queues) purgeLoop(ctx context.Context, l *Log) {
	limit := rate.NewLimiter(rate.Limit(l.cfg.PurgesPerSec), 10)
	for {
		select {
		case <-ctx.Done():
			return
		case <-q.wake:
		}
		if !l.pause(purgeEvery) {
			return
		}
		err := l.purgeFront(ctx)
		if err == nil {
			err = l.purgeWaste(ctx, limit)
		}
		if err != nil && ctx.Err() == nil {
			l.storeFailed(err)
			signal(q.wake)
			l.pause(recoverEvery)
		}
	}
}

// purgeFront removes what lies before everything that still waits. Where nothing
// does, a mark takes the place of Q's last message.
func (l *Log) purgeFront(ctx context.Context) error {
	q := &l.queues
	if q.wasteLeft() == 0 {
		return nil
	}
	floor, bare := q.front()
	if bare {
		if err := l.writeMark(ctx); err != nil {
			return err
		}
		floor, _ = q.front() // what came before the mark stays
	}
	if err := l.store.purge(ctx, l.names.queue, "", floor); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for name, w := range q.gone {
		if w.upTo < floor {
			q.purged(name, w.upTo)
		}
	}
	return nil
}

// front gives the lowest sequence that must stay. bare: it is that of Q's last
// message, which is acknowledged.
func (q *queues) front() (floor uint64, bare bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	floor = q.last
	for _, u := range q.byName {
		floor = min(floor, u.seqs[0])
	}
	for _, w := range q.gone {
		bare = bare || w.upTo == floor
	}
	return floor, bare
}

// wasteLeft is the number of messages that are acknowledged and still in Q.
func (q *queues) wasteLeft() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.wasted
}

// purgeWaste removes queue by queue what purgeFront had to leave, if that is too
// much: more messages, or more bytes, than wait.
func (l *Log) purgeWaste(ctx context.Context, limit *rate.Limiter) error {
	q := &l.queues
	n := q.wasteLeft()
	if n == 0 {
		return nil
	}
	in, err := l.store.info(ctx, l.names.queue)
	if err != nil {
		return err
	}
	if n <= maxWaste && (in.State.Bytes <= maxQueueLog || n <= int(in.State.Messages/2)) {
		return nil
	}
	q.mu.Lock()
	list := maps.Clone(q.gone)
	q.mu.Unlock()
	for name, w := range list {
		if limit.Wait(ctx) != nil {
			return nil
		}
		if err := l.queuePurge(ctx, name, w.upTo); err != nil {
			return err
		}
	}
	return nil
}

package msglog

import (
	"context"
	"fmt"
	"slices"
	"sync"

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
	acks   map[string]uint64 // guarded by mu; to be purged
	wake   chan struct{}     // capacity 1
}

// queue is one device's queue. The sequences take 8 bytes for each message; to
// look them up by subject would cost JetStream a walk over those of all devices.
type queue struct {
	seqs    []uint64 // of its messages, rising
	lastPos Pos      // of the last record
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
	q.byName, q.acks, q.wake = make(map[string]*queue), make(map[string]uint64), make(chan struct{}, 1)
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
		q.note(name, m.seq, recs[len(recs)-1].Pos)
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
func (q *queues) note(name string, seq uint64, pos Pos) {
	u := q.byName[name]
	if u == nil {
		u = &queue{}
		q.byName[name] = u
	}
	u.seqs, u.lastPos = append(u.seqs, seq), pos
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
		q.note(p.name, seq, c.recs[p.recs[len(p.recs)-1]].Pos)
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

func (l *Log) queueLast(name string) uint64 {
	l.queues.mu.Lock()
	defer l.queues.mu.Unlock()
	return l.queues.byName[name].last()
}

// QueueAck says that the device acknowledged its queue up to upToSeq. The
// messages are removed in the background, at a bounded rate.
func (l *Log) QueueAck(name string, upToSeq uint64) {
	q := &l.queues
	q.mu.Lock()
	defer q.mu.Unlock()
	if upToSeq > q.acks[name] {
		q.acks[name] = upToSeq
	}
	signal(q.wake)
}

// QueueDrop empties a device's queue, for good when it returns nil.
func (l *Log) QueueDrop(name string) error {
	last := l.queueLast(name)
	if last == 0 {
		return nil
	}
	return l.queuePurge(l.ctx, name, last)
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
	if u := q.byName[name]; u != nil {
		i, _ := slices.BinarySearch(u.seqs, upTo+1)
		if u.seqs = slices.Delete(u.seqs, 0, i); len(u.seqs) == 0 {
			delete(q.byName, name)
		}
	}
	return nil
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

// purgeLoop removes what QueueAck was told.
func (q *queues) purgeLoop(ctx context.Context, l *Log) {
	limit := rate.NewLimiter(rate.Limit(l.cfg.PurgesPerSec), 10)
	for {
		select {
		case <-ctx.Done():
			return
		case <-q.wake:
		}
		for name, seq := range q.takeAcks() {
			if limit.Wait(ctx) != nil {
				return
			}
			if err := l.queuePurge(ctx, name, seq); err != nil && ctx.Err() == nil {
				l.storeFailed(err)
				l.QueueAck(name, seq)
				if !l.pause(recoverEvery) {
					return
				}
			}
		}
	}
}

func (q *queues) takeAcks() map[string]uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	out := q.acks
	q.acks = make(map[string]uint64)
	return out
}

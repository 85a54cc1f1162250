package msglog

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"hawser/internal/identity"
)

// errEnough ends a walk whose limit is reached.
var errEnough = errors.New("enough")

// History calls fn for the records that q selects, oldest first or newest first.
// With a name it reads that principal's chunks and what is not yet in a chunk;
// memory does not grow with the history. Without a name it reads the frames, so
// it goes back as far as they are kept. Only publishes are history.
func (l *Log) History(ctx context.Context, q Query, fn func(*Record) error) error {
	if q.Filter != "" {
		if err := identity.CheckFilter(q.Filter); err != nil {
			return fmt.Errorf("history: %w", err)
		}
	}
	sel := newSelector(q, fn)
	var err error
	switch subject := l.historySubject(q.Name); {
	case subject == "" && q.Reverse:
		err = l.framesBackward(ctx, sel)
	case subject == "":
		err = l.framesForward(ctx, sel)
	case q.Reverse:
		err = l.chunksBackward(ctx, subject, sel)
	default:
		err = l.chunksForward(ctx, subject, sel)
	}
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

// historySubject is "" for no name. A name that can be no principal's has the
// subject of a service that never was.
func (l *Log) historySubject(name string) string {
	if name == "" {
		return ""
	}
	if _, err := identity.ParseID(name); err == nil {
		return l.names.h + name
	}
	if identity.CheckName(name) != nil {
		return l.names.s + "-"
	}
	return l.names.s + name
}

// selector applies a query to records that come in one direction, some of them
// perhaps twice.
type selector struct {
	q            Query
	since, until int64 // unix milliseconds, since <= t < until
	fn           func(*Record) error
	last         Pos // handed out or passed over last
	any          bool
	left         int
}

func newSelector(q Query, fn func(*Record) error) *selector {
	s := &selector{q: q, since: math.MinInt64, until: math.MaxInt64, fn: fn, left: q.Limit}
	if q.Limit <= 0 {
		s.left = math.MaxInt
	}
	if !q.Since.IsZero() {
		s.since = ceilMilli(q.Since)
	}
	if !q.Until.IsZero() {
		s.until = ceilMilli(q.Until)
	}
	return s
}

func ceilMilli(t time.Time) int64 { return t.Add(time.Millisecond - 1).UnixMilli() }

// offer hands r to fn if it is selected and new.
func (s *selector) offer(r *Record) error {
	if s.any && (s.q.Reverse && r.Pos >= s.last || !s.q.Reverse && r.Pos <= s.last) {
		return nil
	}
	s.last, s.any = r.Pos, true
	if r.Kind != KindPublish || r.Time < s.since || r.Time >= s.until {
		return nil
	}
	if s.q.Filter != "" && !identity.Match(s.q.Filter, r.Topic) {
		return nil
	}
	if err := s.fn(r); err != nil {
		return err
	}
	if s.left--; s.left == 0 {
		return errEnough
	}
	return nil
}

// slack is how far the times of records may be out of order: they are taken by
// many goroutines, and clocks are set.
const slack = int64(time.Minute / time.Millisecond)

func (s *selector) past(t int64) bool   { return s.until != math.MaxInt64 && t-slack >= s.until }
func (s *selector) before(t int64) bool { return s.since != math.MinInt64 && t+slack < s.since }

// tail is what is in no chunk on disk: the principal's closed and open chunks,
// and the position from which the frames have not been looked at.
func (c *chunker) tail(subject string) (blocks [][]byte, from Pos) {
	c.mu.Lock()
	defer c.mu.Unlock()
	add := func(k *chunk) {
		b := slices.Clone(k.buf)
		b, _ = seal(b, header{magic: magicChunk, count: k.count, base: k.base})
		blocks = append(blocks, b)
	}
	for _, k := range c.writing {
		if k.subject == subject {
			add(k)
		}
	}
	if k := c.open[subject]; k != nil {
		add(k)
	}
	return blocks, c.pos
}

func (l *Log) chunksForward(ctx context.Context, subject string, sel *selector) error {
	blocks, from := l.chunks.tail(subject)
	q := scanQuery{stream: l.names.history, subject: subject, from: 1}
	if !sel.q.Since.IsZero() { // a chunk is stored after its records were taken
		q.since = sel.q.Since.Add(-time.Minute)
	}
	var recs []Record
	var last uint64
	err := l.store.scan(ctx, q, func(m stored) error {
		h, got, _, err := decodeBlock(m.data, magicChunk, recs[:0])
		if err != nil {
			return l.damaged(l.names.history, m.seq, err)
		}
		if err := l.checkLink(ctx, h.link, last); err != nil {
			return err
		}
		recs, last = got, m.seq
		if sel.past(h.base) {
			return errEnough
		}
		return sel.offerAll(got)
	})
	if err != nil {
		return err
	}
	if err := l.checkLastChunk(ctx, subject, last); err != nil {
		return err
	}
	for _, b := range blocks {
		_, got, _, err := decodeBlock(b, magicChunk, recs[:0])
		if err != nil {
			return err
		}
		recs = got
		if err := sel.offerAll(got); err != nil {
			return err
		}
	}
	return l.read(ctx, from, func(r *Record) error {
		if !l.inHistory(r, subject) {
			return nil
		}
		return sel.offer(r)
	})
}

func (s *selector) offerAll(recs []Record) error {
	if s.q.Reverse {
		for i := range slices.Backward(recs) {
			if err := s.offer(&recs[i]); err != nil {
				return err
			}
		}
		return nil
	}
	for i := range recs {
		if err := s.offer(&recs[i]); err != nil {
			return err
		}
	}
	return nil
}

func (l *Log) inHistory(r *Record, subject string) bool {
	found := false
	belongsTo(r, func(kind identity.Kind, name string) {
		prefix := l.names.h
		if kind == identity.Service {
			prefix = l.names.s
		}
		found = found || len(subject) == len(prefix)+len(name) && subject[len(prefix):] == name && subject[:len(prefix)] == prefix
	})
	return found
}

// chunksBackward walks from the newest record to the oldest: each chunk tells
// the sequence of the one before.
func (l *Log) chunksBackward(ctx context.Context, subject string, sel *selector) error {
	blocks, from := l.chunks.tail(subject)
	var recs []Record
	err := l.read(ctx, from, func(r *Record) error {
		if l.inHistory(r, subject) {
			recs = append(recs, *r)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := sel.offerAll(recs); err != nil {
		return err
	}
	for _, b := range slices.Backward(blocks) {
		_, got, _, err := decodeBlock(b, magicChunk, nil)
		if err != nil {
			return err
		}
		if err := sel.offerAll(got); err != nil {
			return err
		}
	}
	return l.walkBack(ctx, subject, sel)
}

// walkBack follows the links of the chunks of a subject from the last one.
func (l *Log) walkBack(ctx context.Context, subject string, sel *selector) error {
	var recs []Record
	m, ok, err := l.lastChunk(ctx, subject)
	if err != nil || !ok {
		return err
	}
	for {
		h, got, _, err := decodeBlock(m.data, magicChunk, recs[:0])
		if err != nil {
			return l.damaged(l.names.history, m.seq, err)
		}
		recs = got
		if err := sel.offerAll(got); err != nil {
			return err
		}
		if h.link == 0 || len(got) > 0 && sel.before(got[len(got)-1].Time) {
			return nil
		}
		if m, ok, err = l.store.bySeq(ctx, l.names.history, h.link); err != nil {
			return err
		}
		if !ok {
			return l.checkRemoved(h.link)
		}
	}
}

// lastChunk reads the newest chunk of a subject. The store passes over a message
// that it cannot read, but goes on counting it.
func (l *Log) lastChunk(ctx context.Context, subject string) (m stored, ok bool, err error) {
	m, ok, err = l.store.get(ctx, l.names.history, 0, subject)
	if err != nil || ok {
		return m, ok, err
	}
	n, err := l.store.count(ctx, l.names.history, subject)
	if err == nil && n > 0 {
		err = fmt.Errorf("%w: stream %s in %s: the newest chunk of %s is missing", ErrDamaged, l.names.history, l.cfg.where(), subject)
	}
	return m, false, err
}

// checkLastChunk checks that a scan that ended with the chunk last (0: it found
// none) did not end too early: what is newer must be linked to it.
func (l *Log) checkLastChunk(ctx context.Context, subject string, last uint64) error {
	m, ok, err := l.lastChunk(ctx, subject)
	for err == nil && ok && m.seq > last {
		h, _, _, bad := decodeBlock(m.data, magicChunk, nil)
		if bad != nil {
			return l.damaged(l.names.history, m.seq, bad)
		}
		if h.link <= last {
			return nil
		}
		if m, ok, err = l.store.bySeq(ctx, l.names.history, h.link); err == nil && !ok {
			return l.checkRemoved(h.link)
		}
	}
	return err
}

// checkLink checks that nothing is missing before a chunk: link is what it says
// of the one before, last the sequence that was read before, 0 for none.
func (l *Log) checkLink(ctx context.Context, link, last uint64) error {
	if link <= last {
		return nil
	}
	if last == 0 { // removed, or older than what was asked for
		if _, ok, err := l.store.bySeq(ctx, l.names.history, link); err != nil || ok {
			return err
		}
	}
	return l.checkRemoved(link)
}

// checkRemoved is nil when retention removed the chunk with sequence seq: it
// removes only what a saved State allows. What the stream says of its beginning
// proves nothing: it leaves out what it cannot read.
func (l *Log) checkRemoved(seq uint64) error {
	if seq >= l.keep.savedHistory.Load() {
		return l.damaged(l.names.history, seq, errors.New("the chunk is missing"))
	}
	return nil
}

func (l *Log) framesForward(ctx context.Context, sel *selector) error {
	from := Pos(0)
	if !sel.q.Since.IsZero() {
		seq, ok, err := l.store.seqAt(ctx, l.names.log, sel.q.Since.Add(-time.Minute))
		if err != nil {
			return err
		}
		if !ok {
			return nil
		}
		from = MakePos(seq, 0)
	}
	return l.read(ctx, from, func(r *Record) error {
		if sel.past(r.Time) {
			return errEnough
		}
		return sel.offer(r)
	})
}

// framesBackward reads frame after frame towards the oldest.
func (l *Log) framesBackward(ctx context.Context, sel *selector) error {
	var recs []Record
	var link uint64
	end := l.End().Frame()
	for n := end - 1; n >= max(l.First().Frame(), 1); n-- {
		data := l.ring.get(n)
		if data == nil {
			m, ok, err := l.store.bySeq(ctx, l.names.log, n)
			if err != nil {
				return err
			}
			if !ok && n < l.First().Frame() {
				return nil
			}
			if !ok {
				return l.damaged(l.names.log, n, fmt.Errorf("frame %d is missing", n))
			}
			data = m.data
		}
		h, got, sum, err := decodeBlock(data, magicFrame, recs[:0])
		if err != nil || h.number != n || n+1 < end && uint64(sum) != link {
			return l.damaged(l.names.log, n, fmt.Errorf("frame %d: %w", n, errors.Join(errChecksum, err)))
		}
		recs, link = got, h.link
		if err := sel.offerAll(got); err != nil {
			return err
		}
		if len(got) > 0 && sel.before(got[len(got)-1].Time) {
			return nil
		}
	}
	return nil
}

package msglog

import (
	"sync"
	"time"
)

// batch is a frame under construction.
type batch struct {
	buf    []byte // header space, then the records
	enc    encoder
	base   int64
	count  int
	owners []Owner
}

// intake takes records from any goroutine and packs them in the order in which
// they come. The committer takes batch after batch.
type intake struct {
	limit int
	ready chan struct{} // capacity 1: there is something to take, or closed
	full  chan struct{} // capacity 1: a batch is full, do not gather longer

	mu      sync.Mutex
	room    *sync.Cond // on mu
	fill    *batch     // guarded by mu; nil while nothing waits
	queue   []*batch   // guarded by mu; full, oldest first
	spare   []*batch   // guarded by mu; for reuse
	bytes   int        // guarded by mu; in fill and queue
	refuse  error      // guarded by mu; why Append refuses, nil when it does not
	ended   bool       // guarded by mu; closed for good
	refused uint64     // guarded by mu; with ErrUnavailable
}

func (in *intake) init(limit int) {
	in.limit = limit
	in.ready, in.full = make(chan struct{}, 1), make(chan struct{}, 1)
	in.room = sync.NewCond(&in.mu)
	in.refuse = ErrUnavailable // until Start
}

func (in *intake) open() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if !in.ended {
		in.refuse = nil
	}
}

// pause refuses records with err and hands out what waits, to be failed.
func (in *intake) pause(err error) []*batch {
	in.mu.Lock()
	defer in.mu.Unlock()
	if !in.ended {
		in.refuse = err
	}
	out := in.queue
	if in.fill != nil {
		out = append(out, in.fill)
	}
	in.queue, in.fill, in.bytes = nil, nil, 0
	in.room.Broadcast()
	return out
}

func (in *intake) close(err error) {
	in.mu.Lock()
	if !in.ended {
		in.refuse, in.ended = err, true
	}
	in.room.Broadcast()
	in.mu.Unlock()
	signal(in.ready)
	signal(in.full)
}

func (in *intake) closed() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.ended
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Append copies r into the next frame and returns; r.Owner, if any, hears later
// whether it is on disk. Records of one goroutine are committed in the order of
// its calls. It blocks only while more than Config.IntakeBytes wait. Errors:
// ErrTooLarge, ErrUnavailable, ErrClosed; then nothing was taken.
func (l *Log) Append(r *Record) error {
	if err := r.check(); err != nil {
		return err
	}
	return l.in.append(r, time.Now().UnixMilli())
}

func (in *intake) append(r *Record, now int64) error {
	need := sizeBound(r)
	in.mu.Lock()
	for in.refuse == nil && in.bytes >= in.limit {
		in.room.Wait()
	}
	if in.refuse != nil {
		err := in.refuse
		if err != ErrClosed {
			in.refused++
		}
		in.mu.Unlock()
		return err
	}
	b := in.fill
	if b != nil && (len(b.buf)+need > MaxFrame-trailerSize || b.count == MaxFrameRecords) {
		in.queue = append(in.queue, b)
		b = nil
		signal(in.full)
	}
	if b == nil {
		b = in.newBatch(now)
		in.fill = b
	}
	before := len(b.buf)
	r.Time = now
	b.buf = b.enc.append(b.buf, r)
	b.owners = append(b.owners, r.Owner)
	b.count++
	in.bytes += len(b.buf) - before
	first := b.count == 1
	in.mu.Unlock()
	if first {
		signal(in.ready)
	}
	return nil
}

// newBatch is called with mu held.
func (in *intake) newBatch(now int64) *batch {
	var b *batch
	if n := len(in.spare); n > 0 {
		b, in.spare = in.spare[n-1], in.spare[:n-1]
	} else {
		b = &batch{buf: make([]byte, headerSize, 4096)}
	}
	b.base = now
	b.enc = encoder{lastTime: now}
	return b
}

// take gives the oldest batch, or nil.
func (in *intake) take() *batch {
	in.mu.Lock()
	defer in.mu.Unlock()
	var b *batch
	if len(in.queue) > 0 {
		b = in.queue[0]
		in.queue = append(in.queue[:0], in.queue[1:]...)
	} else if in.fill != nil {
		b, in.fill = in.fill, nil
	}
	if b != nil {
		in.bytes -= len(b.buf) - headerSize
		in.room.Broadcast()
	}
	return b
}

// waiting reports whether a full batch waits.
func (in *intake) waiting() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return len(in.queue) > 0
}

// maxSpare buffers are kept for reuse: one being filled, one being written, and
// what the intake limit may queue between them is left to the collector.
const maxSpare = 3

func (in *intake) recycle(b *batch) {
	clear(b.owners)
	b.buf, b.owners, b.count = b.buf[:headerSize], b.owners[:0], 0
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.spare) < maxSpare {
		in.spare = append(in.spare, b)
	}
}

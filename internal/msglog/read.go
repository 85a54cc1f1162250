package msglog

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// A replica may lag behind its leader: what was acknowledged and is not there
// yet is asked for again for this long before it counts as missing.
const (
	readRetries = 20
	readPause   = 100 * time.Millisecond
)

// ring keeps the newest frames in memory, for followers.
type ring struct {
	limit int

	mu     sync.RWMutex
	frames [][]byte // guarded by mu; consecutive
	first  uint64   // guarded by mu; number of frames[0]
	bytes  int      // guarded by mu
}

func (r *ring) add(number uint64, data []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.frames) == 0 {
		r.first = number
	}
	r.frames = append(r.frames, data)
	r.bytes += len(data)
	for r.bytes > r.limit && len(r.frames) > 1 {
		r.bytes -= len(r.frames[0])
		r.frames[0] = nil
		r.frames = r.frames[1:]
		r.first++
	}
}

func (r *ring) get(number uint64) []byte {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if number < r.first || number >= r.first+uint64(len(r.frames)) {
		return nil
	}
	return r.frames[number-r.first]
}

// reader walks over frames and verifies the chain.
type reader struct {
	l    *Log
	fn   func(*Record) error
	from Pos
	next uint64 // number of the frame to come
	sum  uint32 // checksum of the one before
	know bool   // sum is known
	recs []Record
}

// read is Read.
func (l *Log) read(ctx context.Context, from Pos, fn func(*Record) error) error {
	l.mu.Lock()
	end, first := l.end, l.first
	l.mu.Unlock()
	rd := &reader{l: l, fn: fn, from: from, next: max(from.Frame(), first)}
	for try := 0; rd.next < end; {
		before := rd.next
		if data := l.ring.get(rd.next); data != nil {
			if err := rd.frame(rd.next, data); err != nil {
				return err
			}
			continue
		}
		err := rd.stored(ctx, end)
		if err != nil && !errors.Is(err, errTail) {
			return err
		}
		if rd.next != before {
			try = 0
		} else if try++; try > readRetries || l.cfg.NATSURL == "" {
			if rd.skipRemoved() {
				continue
			}
			return l.damaged(l.names.log, rd.next, fmt.Errorf("frame %d is missing", rd.next))
		} else if !l.pause(readPause) {
			return ErrClosed
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// errTail ends a scan where the ring takes over.
var errTail = errors.New("the rest is in memory")

// stored reads frames from JetStream until the ring holds the next one.
func (rd *reader) stored(ctx context.Context, end uint64) error {
	l := rd.l
	q := scanQuery{stream: l.names.log, from: rd.next}
	return l.store.scan(ctx, q, func(m stored) error {
		if rd.next >= end {
			return errTail
		}
		if m.seq != rd.next && !rd.skipRemoved() {
			return l.damaged(l.names.log, rd.next, fmt.Errorf("frame %d is missing", rd.next))
		}
		if m.seq < rd.next {
			return nil
		}
		return rd.frame(m.seq, m.data)
	})
}

// skipRemoved goes on behind what retention removed while we were reading.
func (rd *reader) skipRemoved() bool {
	rd.l.mu.Lock()
	defer rd.l.mu.Unlock()
	if rd.next >= rd.l.first {
		return false
	}
	rd.next, rd.know = rd.l.first, false
	return true
}

// frame verifies one frame and hands out its records from rd.from on.
func (rd *reader) frame(number uint64, data []byte) error {
	l := rd.l
	clear(rd.recs)
	h, recs, sum, err := decodeBlock(data, magicFrame, rd.recs[:0])
	switch {
	case err != nil:
		return l.damaged(l.names.log, number, fmt.Errorf("frame %d: %w", number, err))
	case h.number != number:
		return l.damaged(l.names.log, number, fmt.Errorf("frame %d is numbered %d", number, h.number))
	case rd.know && h.link != uint64(rd.sum):
		return l.damaged(l.names.log, number, fmt.Errorf("frame %d does not follow the one before", number))
	}
	rd.recs, rd.sum, rd.know, rd.next = recs, sum, true, number+1
	if !l.isLast(number, sum) {
		return l.damaged(l.names.log, number, fmt.Errorf("frame %d is not the one that was written", number))
	}
	for i := range recs {
		if recs[i].Pos < rd.from {
			continue
		}
		if err := rd.fn(&recs[i]); err != nil {
			return err
		}
	}
	return nil
}

// isLast reports whether sum is right for frame number as far as is known.
func (l *Log) isLast(number uint64, sum uint32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return number != l.end-1 || sum == l.lastSum
}

// pause waits and reports whether the log is still open.
func (l *Log) pause(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-l.ctx.Done():
		return false
	}
}

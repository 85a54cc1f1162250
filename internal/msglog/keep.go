package msglog

import (
	"context"
	"sync/atomic"
	"time"
)

// keeper is retention. It works in two steps, so that a start can tell what it
// removed from what was lost: first the State says what may go (want), and only
// what a saved State allows is removed (saved).
type keeper struct {
	wantLog, savedLog         atomic.Uint64 // frame numbers: those below may go, are expected to go
	wantHistory, savedHistory atomic.Uint64 // sequences of H
	checkpoint, cursor        atomic.Uint64 // Pos; see SetFloor
}

func (k *keeper) init(known State, firstLog, firstHistory uint64) {
	k.wantLog.Store(max(known.Log.First, firstLog))
	k.savedLog.Store(known.Log.First)
	k.wantHistory.Store(max(known.History.First, firstHistory))
	k.savedHistory.Store(known.History.First)
}

// SetFloor says what retention must keep. checkpoint: up to which retained
// messages and QoS 2 state are persisted elsewhere; frames at or after it never
// go, so nothing goes before the first call. cursor: the lowest persistent
// cursor, or checkpoint when there is none; the age limit waits for it, the
// size limit overtakes it, which is counted and logged.
func (l *Log) SetFloor(checkpoint, cursor Pos) {
	l.keep.checkpoint.Store(uint64(checkpoint))
	l.keep.cursor.Store(uint64(cursor))
}

func (k *keeper) run(ctx context.Context, l *Log) {
	tick := time.NewTicker(l.cfg.RetainEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := l.retain(ctx); err != nil && ctx.Err() == nil {
			l.storeFailed(err)
			l.cfg.Logger.Warn("retention", "log", l.cfg.where(), "error", err)
		}
	}
}

// retain removes what a saved State allows, then looks what may go next.
func (l *Log) retain(ctx context.Context) error {
	if !l.resting.TryLock() {
		return nil
	}
	defer l.resting.Unlock()
	k := &l.keep
	lg, err := l.removeBelow(ctx, l.names.log, min(k.wantLog.Load(), k.savedLog.Load()))
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.first = max(l.first, lg.State.FirstSeq)
	l.mu.Unlock()
	h, err := l.removeBelow(ctx, l.names.history, min(k.wantHistory.Load(), k.savedHistory.Load()))
	if err != nil {
		return err
	}
	if err := l.purgeCleared(ctx); err != nil {
		return err
	}
	if err := l.wantFrames(ctx, lg); err != nil {
		return err
	}
	byAge, bySize, err := l.limits(ctx, l.names.history, h, l.cfg.HistoryMaxAge, l.cfg.HistoryMaxBytes)
	if err != nil {
		return err
	}
	raise(&k.wantHistory, min(max(byAge, bySize), h.State.LastSeq))
	return nil
}

func raise(v *atomic.Uint64, to uint64) {
	if to > v.Load() {
		v.Store(to)
	}
}

func (l *Log) removeBelow(ctx context.Context, stream string, seq uint64) (streamInfo, error) {
	in, err := l.store.info(ctx, stream)
	if err != nil || seq <= in.State.FirstSeq || seq > in.State.LastSeq {
		return in, err
	}
	if stream == l.names.log { // readers must know before it is gone
		l.mu.Lock()
		l.first = max(l.first, seq)
		l.mu.Unlock()
	}
	if err := l.store.purge(ctx, stream, "", seq); err != nil {
		return in, err
	}
	return l.store.info(ctx, stream)
}

// wantFrames decides which frames may go next.
func (l *Log) wantFrames(ctx context.Context, in streamInfo) error {
	k := &l.keep
	byAge, bySize, err := l.limits(ctx, l.names.log, in, l.cfg.MaxAge, l.cfg.MaxBytes)
	if err != nil {
		return err
	}
	hard := min(Pos(k.checkpoint.Load()).Frame(), l.chunks.diskFloor().Frame(), in.State.LastSeq)
	cursor := Pos(k.cursor.Load()).Frame()
	byAge, bySize = min(byAge, hard, cursor), min(bySize, hard)
	if bySize > cursor && bySize > k.wantLog.Load() {
		l.stats.overtaken.Add(1)
		l.cfg.Logger.Warn("the size limit of the log overtakes a cursor: a service that was away misses messages",
			"log", l.cfg.where(), "cursor", cursor, "first", bySize)
	}
	raise(&k.wantLog, max(byAge, bySize))
	return nil
}

// limits gives the sequences that a stream would begin with by its age and by
// its size; 0 where nothing has to go. The size is estimated from the mean size
// of a message, and gets there in a few rounds.
func (l *Log) limits(ctx context.Context, stream string, in streamInfo, age time.Duration, size int64) (byAge, bySize uint64, err error) {
	s := &in.State
	if s.Messages == 0 {
		return 0, 0, nil
	}
	if age > 0 && time.Since(s.FirstTime) > age {
		seq, ok, err := l.store.seqAt(ctx, stream, time.Now().Add(-age))
		if err != nil {
			return 0, 0, err
		}
		if byAge = seq; !ok {
			byAge = s.LastSeq
		}
	}
	if size > 0 && s.Bytes > uint64(size) {
		mean := max(s.Bytes/s.Messages, 1)
		bySize = s.FirstSeq + (s.Bytes-uint64(size))/mean + 1
	}
	return byAge, bySize, nil
}

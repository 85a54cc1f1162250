package msglog

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// retainedSubject is the subject of a topic in R: SHA-256 cut to 128 bits, so
// that no topic can be a wildcard or too long.
func (l *Log) retainedSubject(topic string) string {
	sum := sha256.Sum256([]byte(topic))
	return l.names.r + hex.EncodeToString(sum[:16])
}

// PutRetained stores the newest retained message of each topic, all of a call
// of up to 1,000 at once. A record with an empty payload clears its topic, as a
// retained publish does. Every record has its Pos: that of the publish, or for a
// clearing without one, a position reached. It is on disk when PutRetained returns nil; then the
// checkpoint may move past the records. Topics of one call are distinct.
func (l *Log) PutRetained(ctx context.Context, recs []*Record) error {
	for len(recs) > 0 {
		n := min(len(recs), maxBatch)
		msgs := make([]outMsg, n)
		for i, r := range recs[:n] {
			err := r.check()
			if err == nil && r.Pos == 0 { // it could not be read back
				err = errFormat
			}
			if err != nil {
				return fmt.Errorf("retained message of %q: %w", r.Topic, err)
			}
			msgs[i] = outMsg{l.retainedSubject(r.Topic), oneRecord(r)}
		}
		seq, err := l.store.put(ctx, nil, msgs...)
		if err != nil {
			l.storeFailed(err)
			return fmt.Errorf("store %d retained messages: %w", n, err)
		}
		l.mu.Lock()
		l.rLast = max(l.rLast, seq)
		l.mu.Unlock()
		recs = recs[n:]
	}
	l.countRetained(ctx)
	return nil
}

// countRetained notes how many messages R holds: its sequences have holes, so
// the number is what a start compares. When it cannot be had, the old one, which
// is not higher, goes on being true.
func (l *Log) countRetained(ctx context.Context) {
	in, err := l.store.info(ctx, l.names.retained)
	if err != nil {
		return
	}
	l.mu.Lock()
	l.rCount = in.State.Messages
	l.mu.Unlock()
}

func oneRecord(r *Record) []byte {
	b := make([]byte, headerSize, headerSize+sizeBound(r)+trailerSize)
	enc := encoder{positions: true, lastTime: r.Time}
	b = enc.append(b, r)
	b, _ = seal(b, header{magic: magicRetained, count: 1, number: r.Pos.Frame(), base: r.Time})
	return b
}

// LoadRetained calls fn for every retained message of the checkpoint, verified,
// in no particular order; what was cleared is left out. Frames after the
// checkpoint are newer: apply them after it. PutRetained must not be called
// before it returns.
func (l *Log) LoadRetained(ctx context.Context, fn func(*Record) error) error {
	var cleared []stored
	var recs []Record
	err := l.scanAll(ctx, l.names.retained, func(m stored) error {
		_, got, _, err := decodeBlock(m.data, magicRetained, recs[:0])
		if err == nil && (len(got) != 1 || l.retainedSubject(got[0].Topic) != m.subject) {
			err = errFormat
		}
		if err != nil {
			return l.damaged(l.names.retained, m.seq, err)
		}
		recs = got
		if len(got[0].Payload) == 0 {
			cleared = append(cleared, stored{subject: m.subject, seq: m.seq})
			return nil
		}
		return fn(&got[0])
	})
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.rCleared, l.rPurge = cleared, false
	l.mu.Unlock()
	return nil
}

// purgeCleared removes the messages of cleared topics that LoadRetained met, once
// a saved State no longer counts them. A newer one on the subject survives.
func (l *Log) purgeCleared(ctx context.Context) error {
	l.mu.Lock()
	cleared, may := l.rCleared, l.rPurge
	l.mu.Unlock()
	if !may || len(cleared) == 0 {
		return nil
	}
	for _, m := range cleared {
		if err := l.store.purge(ctx, l.names.retained, m.subject, m.seq+1); err != nil {
			return fmt.Errorf("remove cleared retained messages: %w", err)
		}
	}
	in, err := l.store.info(ctx, l.names.retained)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rCount, l.rCleared = in.State.Messages, nil
	return nil
}

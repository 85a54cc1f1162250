package registry

import (
	"context"
	"fmt"
	"time"
)

// AddStream notes that a stream of the log was made, once, by init.
func (tx *Tx) AddStream(actor, name string) error {
	n, err := tx.execN(`INSERT INTO streams (name, first, last, frame, checksum) VALUES (?, 0, 0, 0, 0) ON CONFLICT (name) DO NOTHING`, name)
	if err != nil {
		return err
	}
	if n == 0 {
		return fmt.Errorf("stream %s: %w", name, ErrExists)
	}
	return tx.audit(actor, "stream.add", name, nil)
}

// SaveLogState keeps what is known of the log: the state of the streams in s, and
// the checkpoint, which never goes back. A stream that was never added is
// ErrNotFound.
func (tx *Tx) SaveLogState(s LogState) error {
	for _, st := range s.Streams {
		n, err := tx.execN(`UPDATE streams SET first = ?, last = ?, frame = ?, checksum = ? WHERE name = ?`,
			int64(st.First), int64(st.Last), int64(st.Frame), int64(st.Checksum), st.Name)
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("stream %s: %w", st.Name, ErrNotFound)
		}
	}
	return tx.exec(`UPDATE meta SET checkpoint = MAX(checkpoint, ?)`, int64(s.Checkpoint))
}

// LogState reads what SaveLogState kept.
func (r *Registry) LogState(ctx context.Context) (LogState, error) {
	m, err := r.Meta(ctx)
	if err != nil {
		return LogState{}, err
	}
	rows, err := r.read.QueryContext(ctx, `SELECT name, first, last, frame, checksum FROM streams ORDER BY name`)
	if err != nil {
		return LogState{}, err
	}
	defer rows.Close()
	s := LogState{Checkpoint: m.Checkpoint}
	for rows.Next() {
		var st StreamState
		var first, last, frame int64
		if err := rows.Scan(&st.Name, &first, &last, &frame, &st.Checksum); err != nil {
			return LogState{}, err
		}
		st.First, st.Last, st.Frame = uint64(first), uint64(last), uint64(frame)
		s.Streams = append(s.Streams, st)
	}
	return s, rows.Err()
}

// ServerStart is one start of the server. It stands in the registry and, as a
// record, in the log.
type ServerStart struct {
	Number uint64
	Epoch  uint32
	Raised bool // this registry is an old one: restored from a backup, or the log had seen a later start
}

// RecordStart gives the next start of the server. number and epoch are those of
// the last start that the log has seen, 0 and 0 for none. Where the log has seen
// a later one than the registry, the epoch rises above both; after MarkRestored
// it rises above any that the fleet may have had meanwhile. Save the result in
// the log after this, never before: a crash in between then raises nothing.
func (tx *Tx) RecordStart(number uint64, epoch uint32, at time.Time) (ServerStart, error) {
	var haveStart int64
	var s ServerStart
	var restored bool
	if err := tx.row(`SELECT start, epoch, restore_due FROM meta`, nil, &haveStart, &s.Epoch, &restored); err != nil {
		return s, err
	}
	s.Number = max(uint64(haveStart), number) + 1
	s.Raised = restored || number > uint64(haveStart)
	switch {
	case restored:
		s.Epoch = epochOf(max(s.Epoch, epoch), at)
	case s.Raised:
		s.Epoch = max(s.Epoch, epoch) + 1
	}
	if s.Epoch > maxEpoch {
		return s, fmt.Errorf("command epoch %d: %w", s.Epoch, ErrInvalid)
	}
	err := tx.exec(`UPDATE meta SET start = ?, started = ?, epoch = ?, restore_due = 0`, int64(s.Number), ms(at), s.Epoch)
	if err != nil {
		return s, err
	}
	return s, tx.audit("hawser", "server.start", "server", detail{
		"number": fmt.Sprint(s.Number), "epoch": fmt.Sprint(s.Epoch), "raised": fmt.Sprint(s.Raised)})
}

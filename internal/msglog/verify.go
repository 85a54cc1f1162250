package msglog

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"hawser/internal/durable"
)

// verify compares the streams with what the registry knows and finds the end.
func (l *Log) verify(ctx context.Context, known State) error {
	infos, err := l.checkStreams(ctx, known)
	if err != nil {
		return err
	}
	if err := l.store.logger.takeDamage(); err != nil {
		err = fmt.Errorf("%w: the store in %s: %w", ErrDamaged, l.cfg.where(), err)
		return errors.Join(err, l.markDamaged(err))
	}
	lg := infos[0].State
	l.end, l.first = lg.LastSeq+1, max(lg.FirstSeq, 1)
	l.rLast, l.rCount, l.hLast = infos[2].State.LastSeq, infos[2].State.Messages, infos[3].State.LastSeq
	l.keep.init(known, l.first, max(infos[3].State.FirstSeq, 1))
	if err := l.checkFrame(ctx, known.Frame, &known.Checksum); err != nil {
		return err
	}
	if err := l.checkFrame(ctx, l.first, nil); err != nil {
		return err
	}
	return l.checkFrame(ctx, lg.LastSeq, nil)
}

// damagedFile keeps what the store said about damage. It says so once and mends
// its files by leaving out what is damaged: the next start would see nothing.
const damagedFile = "damaged"

func (l *Log) markDamaged(cause error) error {
	if l.cfg.Dir == "" {
		return nil
	}
	text := fmt.Sprintf("%s %s\n\nThis log is not opened while this file is here. Restore server/log as a whole.\n"+
		"Removing only this file accepts that what is damaged is lost.\n", time.Now().UTC().Format(time.RFC3339), oneLine(cause))
	if err := durable.WriteFile(filepath.Join(l.cfg.Dir, damagedFile), []byte(text), 0o600); err != nil {
		return fmt.Errorf("write down the damage: %w", err)
	}
	return nil
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// checkMark refuses a log in which damage was found before.
func checkMark(dir string) error {
	path := filepath.Join(dir, damagedFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	found, _, _ := strings.Cut(string(text), "\n")
	return fmt.Errorf("%w: %s tells what was found: %s", ErrDamaged, path, found)
}

// checkStreams compares first and last sequences and looks for gaps. The answer
// is in the order of names.streams.
func (l *Log) checkStreams(ctx context.Context, known State) ([4]streamInfo, error) {
	var infos [4]streamInfo
	states := [4]StreamState{known.Log, known.Queue, known.Retained, known.History}
	gapless := [4]bool{true, false, false, true}
	for i, name := range l.names.streams() {
		in, err := l.store.info(ctx, name)
		if hasCode(err, codeStreamNotFound) {
			return infos, fmt.Errorf("%w: stream %s is missing from the log in %s", ErrDamaged, name, l.cfg.where())
		}
		if err != nil {
			return infos, fmt.Errorf("stream %s in %s: %w", name, l.cfg.where(), err)
		}
		if err := checkState(&in, states[i], gapless[i]); err != nil {
			return infos, fmt.Errorf("%w: stream %s in %s: %w", ErrDamaged, name, l.cfg.where(), err)
		}
		if have := in.State.Messages; name == l.names.retained && have < known.Retained.First {
			return infos, fmt.Errorf("%w: stream %s in %s: it holds %d messages, %d were there", ErrDamaged, name, l.cfg.where(), have, known.Retained.First)
		}
		infos[i] = in
	}
	return infos, nil
}

func checkState(in *streamInfo, known StreamState, gapless bool) error {
	s := &in.State
	switch {
	case s.LastSeq < known.Last:
		return fmt.Errorf("it ends at %d, %d was acknowledged", s.LastSeq, known.Last)
	case s.Lost != nil && len(s.Lost.Msgs) > 0:
		return fmt.Errorf("%d messages are lost, the first is %d", len(s.Lost.Msgs), s.Lost.Msgs[0])
	case !gapless || s.LastSeq == 0:
		return nil
	case s.Messages == 0 && s.FirstSeq == s.LastSeq+1 && known.Last < max(known.First, 1):
		return nil // what a full disk cut off was the only message, and was never acknowledged
	case s.FirstSeq > max(known.First, 1):
		return fmt.Errorf("it begins at %d, %d must still be there", s.FirstSeq, max(known.First, 1))
	case s.NumDeleted != 0 || s.Messages != s.LastSeq-s.FirstSeq+1:
		return fmt.Errorf("it holds %d messages from %d to %d, so some are missing", s.Messages, s.FirstSeq, s.LastSeq)
	}
	return nil
}

// checkFrame reads one frame and checks its number and checksum; want, if not
// nil, is what the checksum must be. Frame 0 is none. The last frame sets lastSum.
func (l *Log) checkFrame(ctx context.Context, number uint64, want *uint32) error {
	if number == 0 || number < l.first || number >= l.end {
		return nil
	}
	m, ok, err := l.store.get(ctx, l.names.log, number, "")
	if err != nil {
		return fmt.Errorf("frame %d of stream %s in %s: %w", number, l.names.log, l.cfg.where(), err)
	}
	if !ok {
		return l.damaged(l.names.log, number, fmt.Errorf("frame %d is missing", number))
	}
	h, _, sum, err := decodeBlock(m.data, magicFrame, nil)
	switch {
	case err != nil:
		return l.damaged(l.names.log, number, fmt.Errorf("frame %d: %w", number, err))
	case h.number != number, want != nil && sum != *want:
		return l.damaged(l.names.log, number, fmt.Errorf("frame %d is not the one that was acknowledged", number))
	}
	if number == l.end-1 {
		l.lastSum = binary.BigEndian.Uint32(m.data[len(m.data)-trailerSize:])
		if l.ring.get(number) == nil {
			l.ring.add(number, m.data)
		}
	}
	return nil
}

// counters are what Stats reports.
type counters struct {
	frames, records, bytes, failures atomic.Uint64
	restarts, overtaken              atomic.Uint64
	commitSum, commitMax             atomic.Int64
	repairWanted                     atomic.Bool // a writer other than the committer met a write error
}

func (s *counters) frame(records, bytes int, took time.Duration) {
	s.frames.Add(1)
	s.records.Add(uint64(records))
	s.bytes.Add(uint64(bytes))
	s.commitSum.Add(int64(took))
	if int64(took) > s.commitMax.Load() { // one writer
		s.commitMax.Store(int64(took))
	}
}

// Stats takes a snapshot. It asks the store for the amounts; when that does not
// answer they are zero.
func (l *Log) Stats(ctx context.Context) Stats {
	l.in.mu.Lock()
	refused := l.in.refused
	l.in.mu.Unlock()
	s := &l.stats
	out := Stats{
		Frames: s.frames.Load(), Records: s.records.Load(), Bytes: s.bytes.Load(),
		Failures: s.failures.Load(), Refused: refused, Restarts: s.restarts.Load(),
		Overtaken: s.overtaken.Load(), StoreWarnings: l.store.logger.warningCount(),
		CommitTime: time.Duration(s.commitSum.Load()), CommitMax: time.Duration(s.commitMax.Load()),
	}
	if in, err := l.store.info(ctx, l.names.log); err == nil {
		out.LogBytes = in.State.Bytes
		if in.State.Messages > 0 {
			out.Oldest = in.State.FirstTime
		}
	}
	if in, err := l.store.info(ctx, l.names.history); err == nil {
		out.HistoryBytes = in.State.Bytes
	}
	if in, err := l.store.info(ctx, l.names.retained); err == nil {
		out.Retained = in.State.Messages
	}
	if in, err := l.store.info(ctx, l.names.queue); err == nil {
		out.Queued = in.State.Messages
	}
	return out
}

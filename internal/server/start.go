package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fxamacker/cbor/v2"

	"hawser/internal/identity"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// startWord is the payload of a KindStart record.
type startWord struct {
	Number uint64 `cbor:"1,keyasint"`
	Epoch  uint32 `cbor:"2,keyasint"`
}

// lastStart finds the latest start that the log has seen after the checkpoint.
func lastStart(ctx context.Context, l *msglog.Log, checkpoint msglog.Pos) (last startWord, err error) {
	err = l.Read(ctx, checkpoint, func(r *msglog.Record) error {
		if r.Kind != msglog.KindStart {
			return nil
		}
		var w startWord
		if err := cbor.Unmarshal(r.Payload, &w); err != nil {
			return fmt.Errorf("start record %d of the log: %w", r.Pos, err)
		}
		if w.Number > last.Number {
			last = w
		}
		return nil
	})
	return last, err
}

// recordStart gives this start its number. An older registry that was restored
// beside a newer log begins a new epoch of command ids.
func (s *Server) recordStart(ctx context.Context) error {
	m, err := s.reg.Meta(ctx)
	if err != nil {
		return err
	}
	state, err := s.reg.LogState(ctx)
	if err != nil {
		return err
	}
	last, err := lastStart(ctx, s.mlog, msglog.Pos(state.Checkpoint))
	if err != nil {
		return err
	}
	err = s.reg.Update(ctx, func(tx *registry.Tx) (err error) {
		s.start, err = tx.RecordStart(last.Number, last.Epoch, time.Now())
		return err
	})
	if err == nil && m.RestoreDue {
		s.log.Warn("this fleet was restored from a backup; command ids begin a new epoch",
			"backup", m.BackupOf.Format(time.RFC3339), "epoch", s.start.Epoch)
	} else if err == nil && s.start.Raised {
		s.log.Warn("the registry is older than the log: it was restored; command ids begin a new epoch", "epoch", s.start.Epoch)
	}
	return err
}

// requeued forgets the mark of a restore: the start of the log has written the
// queue messages that were missing, and no client was let in yet.
func (s *Server) requeued(ctx context.Context) error {
	m, err := s.reg.Meta(ctx)
	if err != nil || m.Requeue == 0 {
		return err
	}
	return s.reg.Update(ctx, func(tx *registry.Tx) error { return tx.Requeued() })
}

// storedFunc waits for one record.
type storedFunc func(error)

func (f storedFunc) Stored(_ *msglog.Record, err error) { f(err) }

// announceStart writes the number of this start into the log and waits for it.
func (s *Server) announceStart(ctx context.Context) error {
	payload, err := cbor.Marshal(startWord{s.start.Number, s.start.Epoch})
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	r := msglog.Record{Kind: msglog.KindStart, From: identity.TheServer(), Payload: payload,
		Owner: storedFunc(func(err error) { done <- err })}
	if err := s.mlog.Append(&r); err != nil {
		return leased(fmt.Errorf("write the start into the log: %w", err))
	}
	select {
	case err = <-done:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return leased(fmt.Errorf("write the start into the log: %w", err))
	}
	return nil
}

// staleEpoch refuses to give ids out of a registry that is older than the log:
// only a start of the server may begin the new epoch.
func staleEpoch(ctx context.Context, reg *registry.Registry, l *msglog.Log) error {
	m, err := reg.Meta(ctx)
	if err != nil {
		return err
	}
	if m.RestoreDue {
		return errors.New("the registry was restored from a backup\nhint: hawser serve once, which begins a new epoch of ids")
	}
	last, err := lastStart(ctx, l, msglog.Pos(m.Checkpoint))
	if err == nil && last.Number > m.Start {
		err = errors.New("the registry is older than the log\nhint: hawser serve once, which begins a new epoch of ids")
	}
	return err
}

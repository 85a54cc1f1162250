package registry

import (
	"context"
	"fmt"
	"time"
)

// AuditFilter selects audit rows.
type AuditFilter struct {
	Actor   string // empty = any
	Action  string // empty = any
	Subject string // empty = any
	Since   time.Time
	Until   time.Time // zero = no end
	Before  int64     // rows with a lower number; 0 = from the newest
	Limit   int       // 0 = 100
}

// Audit lists audit rows, the newest first.
func (r *Registry) Audit(ctx context.Context, f AuditFilter) ([]AuditEntry, error) {
	q, args := `SELECT no, at, actor, action, subject, detail FROM audit WHERE 1 = 1`, []any{}
	where := func(use bool, cond string, arg any) {
		if use {
			q, args = q+" AND "+cond, append(args, arg)
		}
	}
	where(f.Actor != "", "actor = ?", f.Actor)
	where(f.Action != "", "action = ?", f.Action)
	where(f.Subject != "", "subject = ?", f.Subject)
	where(!f.Since.IsZero(), "at >= ?", ms(f.Since))
	where(!f.Until.IsZero(), "at < ?", ms(f.Until))
	where(f.Before != 0, "no < ?", f.Before)
	rows, err := r.read.QueryContext(ctx, q+` ORDER BY no DESC LIMIT ?`, append(args, limitOr(f.Limit))...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []AuditEntry
	for rows.Next() {
		var e AuditEntry
		var at int64
		if err := rows.Scan(&e.No, &at, &e.Actor, &e.Action, &e.Subject, &e.Detail); err != nil {
			return nil, err
		}
		e.At = fromMS(at)
		list = append(list, e)
	}
	return list, rows.Err()
}

// AddRequest keeps a request for a signature until its result is imported.
func (tx *Tx) AddRequest(actor string, q Request) error {
	n, err := tx.execN(`INSERT INTO requests (id, kind, subject, body, at, state) VALUES (?, ?, ?, ?, ?, 'pending')
		ON CONFLICT (id) DO NOTHING`, q.ID, q.Kind, q.Subject, q.Body, ms(tx.now))
	if err != nil {
		return err
	}
	if n == 0 {
		return fmt.Errorf("request %s: %w", q.ID, ErrExists)
	}
	return tx.audit(actor, "request.add", q.Subject, detail{"id": q.ID, "kind": q.Kind})
}

// EndRequest notes the outcome of a pending request.
func (tx *Tx) EndRequest(actor, id string, to RequestState) error {
	var subject string
	if err := tx.row(`SELECT subject FROM requests WHERE id = ? AND state = 'pending'`, []any{id}, &subject); err != nil {
		return fmt.Errorf("pending request %s: %w", id, err)
	}
	if err := tx.exec(`UPDATE requests SET state = ? WHERE id = ?`, string(to), id); err != nil {
		return err
	}
	return tx.audit(actor, "request."+string(to), subject, detail{"id": id})
}

// Request reads one request.
func (r *Registry) Request(ctx context.Context, id string) (Request, error) {
	var q Request
	var at int64
	err := r.read.QueryRowContext(ctx, `SELECT id, kind, subject, body, at, state FROM requests WHERE id = ?`, id).
		Scan(&q.ID, &q.Kind, &q.Subject, &q.Body, &at, &q.State)
	q.At = fromMS(at)
	return q, orNotFound(err, "request "+id)
}

// Requests lists requests in a state, the oldest first.
func (r *Registry) Requests(ctx context.Context, state RequestState, limit int) ([]Request, error) {
	rows, err := r.read.QueryContext(ctx, `SELECT id, kind, subject, body, at, state FROM requests
		WHERE state = ? ORDER BY at, id LIMIT ?`, string(state), limitOr(limit))
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []Request
	for rows.Next() {
		var q Request
		var at int64
		if err := rows.Scan(&q.ID, &q.Kind, &q.Subject, &q.Body, &at, &q.State); err != nil {
			return nil, err
		}
		q.At = fromMS(at)
		list = append(list, q)
	}
	return list, rows.Err()
}

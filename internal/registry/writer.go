package registry

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"
)

// maxGroup is how many changes share one commit at most.
const maxGroup = 1024

// Tx is one change while it is applied. It is valid during the call it was
// handed to, on that goroutine only.
type Tx struct {
	w       *writer
	now     time.Time
	changes []Change // of this change, dropped when it fails
}

// job is one change and who waits for it.
type job struct {
	ctx   context.Context // nil = never given up
	apply func(*Tx) error
	done  func(error)
}

// writer owns the one connection that changes the database.
type writer struct {
	db      *sql.DB
	conn    *sql.Conn            // run only
	stmts   map[string]*sql.Stmt // run only; prepared on conn
	changed func(Change)

	mu     sync.Mutex
	queue  []job // mu
	closed bool  // mu
	wake   chan struct{}
	ended  chan struct{}
}

func startWriter(ctx context.Context, db *sql.DB, changed func(Change)) (*writer, error) {
	conn, err := db.Conn(ctx)
	if err != nil {
		return nil, err
	}
	if changed == nil {
		changed = func(Change) {}
	}
	w := &writer{
		db: db, conn: conn, changed: changed, stmts: map[string]*sql.Stmt{},
		wake: make(chan struct{}, 1), ended: make(chan struct{}),
	}
	go w.run()
	return w, nil
}

// Update applies one change and waits until it is committed. apply may call
// methods of Tx only; if it returns an error nothing of the change stays. When
// ctx ends before the change has begun, it is not applied; after that Update
// waits for the outcome, so it is never in doubt, except that an error of the
// disk itself can leave a change that reappears after a crash.
func (r *Registry) Update(ctx context.Context, apply func(*Tx) error) error {
	done := make(chan error, 1)
	r.w.submit(job{ctx, apply, func(err error) { done <- err }})
	return <-done
}

// Submit is Update without waiting: done is called once, after the commit, in
// the order of submission, on the writer's goroutine, and must not block. After
// Close it is called at once with ErrClosed.
func (r *Registry) Submit(apply func(*Tx) error, done func(error)) {
	r.w.submit(job{nil, apply, done})
}

func (w *writer) submit(j job) {
	w.mu.Lock()
	closed := w.closed
	if !closed {
		w.queue = append(w.queue, j)
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
	w.mu.Unlock()
	if closed {
		j.done(ErrClosed)
	}
}

// drain refuses new changes and lets the queue run empty; true for the first who
// calls it.
func (w *writer) drain() bool {
	w.mu.Lock()
	first := !w.closed
	if first {
		w.closed = true
		close(w.wake)
	}
	w.mu.Unlock()
	<-w.ended
	return first
}

// close closes the database, after drain.
func (w *writer) close() error {
	for _, s := range w.stmts {
		s.Close()
	}
	return errors.Join(w.conn.Close(), w.db.Close())
}

func (w *writer) run() {
	defer close(w.ended)
	for range w.wake {
		for w.commitGroup() {
		}
	}
	for w.commitGroup() {
	}
}

// take removes the next group from the queue.
func (w *writer) take() []job {
	w.mu.Lock()
	defer w.mu.Unlock()
	group := w.queue
	if len(group) > maxGroup {
		w.queue = group[maxGroup:]
		return group[:maxGroup:maxGroup]
	}
	w.queue = nil
	return group
}

// commitGroup applies what waits in one transaction; false = nothing waited.
func (w *writer) commitGroup() bool {
	group := w.take()
	if len(group) == 0 {
		return false
	}
	errs := make([]error, len(group))
	var changes []Change
	err := w.transact(func() error {
		var err error
		changes, err = w.applyAll(group, errs)
		return err
	})
	if err == nil {
		for _, c := range changes {
			w.changed(c)
		}
	}
	for i, j := range group {
		if err != nil && errs[i] == nil {
			errs[i] = err
		}
		j.done(errs[i])
	}
	return true
}

// transact runs body in one transaction and commits it.
func (w *writer) transact(body func() error) error {
	if err := w.exec(`BEGIN IMMEDIATE`); err != nil {
		_ = w.exec(`ROLLBACK`) // in case the last one could not: the next group begins anew
		return fmt.Errorf("begin: %w", err)
	}
	err := body()
	if err == nil {
		err = w.exec(`COMMIT`)
	}
	if err != nil {
		_ = w.exec(`ROLLBACK`) // fails where SQLite has rolled back already
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

// applyAll applies each job in a savepoint. An error of the savepoints
// themselves ends the whole transaction.
func (w *writer) applyAll(group []job, errs []error) ([]Change, error) {
	var changes []Change
	tx := Tx{w: w, now: time.Now()}
	for i, j := range group {
		if j.ctx != nil && j.ctx.Err() != nil {
			errs[i] = context.Cause(j.ctx)
			continue
		}
		if err := w.exec(`SAVEPOINT change`); err != nil {
			return nil, err
		}
		tx.changes = tx.changes[:0]
		if errs[i] = j.apply(&tx); errs[i] != nil {
			if err := w.exec(`ROLLBACK TO change`); err != nil {
				return nil, err
			}
		} else {
			changes = append(changes, tx.changes...)
		}
		if err := w.exec(`RELEASE change`); err != nil {
			return nil, err
		}
	}
	return changes, nil
}

// stmt gives the prepared form of query; the texts are constants of this
// package, so there is a bounded number of them.
func (w *writer) stmt(query string) (*sql.Stmt, error) {
	if s := w.stmts[query]; s != nil {
		return s, nil
	}
	s, err := w.conn.PrepareContext(context.Background(), query)
	if err != nil {
		return nil, err
	}
	w.stmts[query] = s
	return s, nil
}

func (w *writer) exec(query string, args ...any) error {
	_, err := w.execN(query, args...)
	return err
}

// execN gives the number of rows that were changed.
func (w *writer) execN(query string, args ...any) (int64, error) {
	s, err := w.stmt(query)
	if err != nil {
		return 0, err
	}
	res, err := s.Exec(args...)
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

func (tx *Tx) exec(query string, args ...any) error { return tx.w.exec(query, args...) }

func (tx *Tx) execN(query string, args ...any) (int64, error) { return tx.w.execN(query, args...) }

// row reads one row into dest; none is ErrNotFound.
func (tx *Tx) row(query string, args []any, dest ...any) error {
	s, err := tx.w.stmt(query)
	if err != nil {
		return err
	}
	err = s.QueryRow(args...).Scan(dest...)
	if errors.Is(err, sql.ErrNoRows) {
		return ErrNotFound
	}
	return err
}

// tell adds to what is told after the commit.
func (tx *Tx) tell(c Change) { tx.changes = append(tx.changes, c) }

// detail is what an audit row says beside who, what and when.
type detail map[string]string

// audit writes the audit row of the change that is being made.
func (tx *Tx) audit(actor, action, subject string, d detail) error {
	if actor == "" {
		return fmt.Errorf("%w: a change of state without an actor", ErrInvalid)
	}
	text := "{}"
	if len(d) > 0 {
		b, err := json.Marshal(d)
		if err != nil {
			return err
		}
		text = string(b)
	}
	return tx.exec(`INSERT INTO audit (at, actor, action, subject, detail) VALUES (?, ?, ?, ?, ?)`,
		ms(tx.now), actor, action, subject, text)
}

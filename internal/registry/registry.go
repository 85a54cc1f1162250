// Package registry holds what is: devices, certificates, services, grants,
// commands, configurations, MQTT sessions and the last known state of the log,
// in one SQLite database.
//
// It promises:
//   - A change is on disk (WAL, synchronous FULL) before its caller is told so.
//   - Changes are applied one after the other by one writer; many callers'
//     changes share one commit. A change that fails leaves no trace and does
//     not harm those it shares the commit with.
//   - Every change of state carries an audit row in the same transaction. The
//     bookkeeping of sessions, cursors, checkpoints, last-seen times and hellos
//     is no change of state in this sense: the log tells it.
//   - A database that is missing, damaged, of another kind or of a newer schema
//     is refused by name; nothing is ever made anew silently.
//
// All SQL of Hawser stands in this package, in the standard dialect wherever
// that costs nothing.
package registry

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"hawser/internal/durable"

	_ "modernc.org/sqlite" // the driver called "sqlite"
)

// The kinds of error of this package; test with errors.Is.
var (
	ErrNotFound = errors.New("not found")
	ErrExists   = errors.New("already exists")
	ErrKey      = errors.New("id and key belong together for life")
	ErrState    = errors.New("not possible in this state")
	ErrFenced   = errors.New("the session was taken over")
	ErrInvalid  = errors.New("invalid")
	ErrClosed   = errors.New("the registry is closed")
	ErrDamaged  = errors.New("the registry is damaged")
	ErrNewer    = errors.New("the registry was written by a newer hawser")
)

// applicationID is the SQLite application id of a registry: "HWSR".
const applicationID = 0x48575352

// Options of Open.
type Options struct {
	// Changed is called after the commit and before the caller of the change
	// is told, in order, on the writer's goroutine. It may read from the
	// registry; it must neither block nor wait for a change. Nil = nobody.
	Changed func(Change)
	// Readers is the number of connections for reading; 0 = 4.
	Readers int
}

// Registry is an open database. All methods may be called by many goroutines.
type Registry struct {
	path    string
	read    *sql.DB
	w       *writer
	session atomic.Int64 // last number given by NextSession
}

// Create makes the registry of a new fleet at path and closes it. A file that
// is there already is ErrExists; on any other error nothing is left behind.
func Create(ctx context.Context, path string, m Meta) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("create registry %s: %w", path, ErrExists)
	}
	if err != nil {
		return fmt.Errorf("create registry: %w", err)
	}
	f.Close()
	if err = fill(ctx, path, m); err == nil {
		err = durable.SyncDir(filepath.Dir(path))
	}
	if err != nil {
		removeAll(path)
		return fmt.Errorf("create registry %s: %w", path, err)
	}
	return nil
}

func removeAll(path string) {
	for _, suffix := range []string{"", "-wal", "-shm", "-journal"} {
		os.Remove(path + suffix)
	}
}

// fill turns the empty file at path into a registry.
func fill(ctx context.Context, path string, m Meta) error {
	db, err := openDB(path, "rw")
	if err != nil {
		return err
	}
	defer db.Close()
	if _, err := db.ExecContext(ctx, fmt.Sprintf("PRAGMA application_id = %d", applicationID)); err != nil {
		return err
	}
	if err := migrate(ctx, db); err != nil {
		return err
	}
	_, err = db.ExecContext(ctx, `INSERT INTO meta (one, fleet, created, epoch, start, started, checkpoint)
		VALUES (1, ?, ?, ?, ?, ?, ?)`, m.FleetID[:], ms(m.Created), m.Epoch, int64(m.Start), ms(m.Started), int64(m.Checkpoint))
	if err != nil {
		return err
	}
	return db.Close() // copies the WAL into the file and removes it
}

// Open opens the registry at path, checks it and brings its schema up to date.
// What is wrong with the file is ErrNotFound, ErrDamaged or ErrNewer, with the
// path in the text.
func Open(ctx context.Context, path string, o Options) (*Registry, error) {
	if err := checkHeader(path); err != nil {
		return nil, err
	}
	db, err := openDB(path, "rw")
	if err != nil {
		return nil, fmt.Errorf("open registry %s: %w", path, err)
	}
	if err := prepare(ctx, db, path); err != nil {
		db.Close()
		return nil, err
	}
	r, err := start(ctx, db, path, o)
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("open registry %s: %w", path, err)
	}
	return r, nil
}

// start brings up the readers and the writer, which owns db from here on.
func start(ctx context.Context, db *sql.DB, path string, o Options) (*Registry, error) {
	if o.Readers == 0 {
		o.Readers = 4
	}
	read, err := openDB(path, "rw", "query_only(1)")
	if err != nil {
		return nil, err
	}
	read.SetMaxOpenConns(o.Readers)
	read.SetMaxIdleConns(o.Readers)
	r := &Registry{path: path, read: read}
	var last int64
	err = read.QueryRowContext(ctx, `SELECT COALESCE(MAX(no), 0) FROM sessions`).Scan(&last)
	if err == nil {
		r.session.Store(last)
		r.w, err = startWriter(ctx, db, o.Changed)
	}
	if err != nil {
		read.Close()
		return nil, err
	}
	return r, nil
}

// openDB opens a pool of connections to path; mode is SQLite's. It does not
// touch the file yet.
func openDB(path, mode string, pragmas ...string) (*sql.DB, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	q := url.Values{"mode": {mode}, "_txlock": {"immediate"}}
	q["_pragma"] = append([]string{
		"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)",
		"foreign_keys(1)", "cell_size_check(1)", "trusted_schema(0)",
	}, pragmas...)
	u := url.URL{Scheme: "file", Path: abs, RawQuery: q.Encode()}
	return sql.Open("sqlite", u.String())
}

// Close waits for the changes that are queued and closes the database. Changes
// that come later are ErrClosed. A second Close does nothing.
func (r *Registry) Close() error {
	if !r.w.drain() {
		return nil
	}
	// The writer's connection goes last: it copies the write-ahead log into the
	// file and removes it.
	return errors.Join(r.read.Close(), r.w.close())
}

// Path is where the registry is.
func (r *Registry) Path() string { return r.path }

// NextSession gives a number for a new session, unused in this registry.
func (r *Registry) NextSession() int64 { return r.session.Add(1) }

// Meta reads what is known about fleet and server.
func (r *Registry) Meta(ctx context.Context) (Meta, error) {
	var m Meta
	var fleet []byte
	var created, started, start, checkpoint, taken, restored, requeue int64
	err := r.read.QueryRowContext(ctx, `SELECT fleet, created, epoch, start, started, checkpoint, backup_of, restored, restore_due, requeue FROM meta`).
		Scan(&fleet, &created, &m.Epoch, &start, &started, &checkpoint, &taken, &restored, &m.RestoreDue, &requeue)
	if err != nil {
		return Meta{}, fmt.Errorf("read registry %s: %w", r.path, err)
	}
	copy(m.FleetID[:], fleet)
	m.Created, m.Started = fromMS(created), fromMS(started)
	m.Start, m.Checkpoint = uint64(start), uint64(checkpoint)
	m.BackupOf, m.Restored, m.Requeue = fromMS(taken), fromMS(restored), uint64(requeue)
	return m, nil
}

// ms is a time as it is stored: unix milliseconds, 0 for the zero time.
func ms(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func fromMS(v int64) time.Time {
	if v == 0 {
		return time.Time{}
	}
	return time.UnixMilli(v).UTC()
}

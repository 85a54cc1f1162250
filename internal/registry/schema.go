package registry

import (
	"bytes"
	"context"
	"database/sql"
	"embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"strconv"
	"strings"
)

//go:embed migrations/*.sql
var migrationFiles embed.FS

// migration is one step of the schema; after step n, user_version is n.
type migration struct {
	number int
	sql    string
}

// migrations lists the embedded steps: 1, 2, 3, ... without a gap.
func migrations() ([]migration, error) {
	entries, err := migrationFiles.ReadDir("migrations")
	if err != nil {
		return nil, err
	}
	var list []migration
	for _, e := range entries {
		number, _, _ := strings.Cut(e.Name(), "_")
		n, err := strconv.Atoi(number)
		if err != nil {
			return nil, fmt.Errorf("migration %s: %w", e.Name(), err)
		}
		text, err := migrationFiles.ReadFile("migrations/" + e.Name())
		if err != nil {
			return nil, err
		}
		list = append(list, migration{n, string(text)})
	}
	sort.Slice(list, func(i, j int) bool { return list[i].number < list[j].number })
	for i, m := range list {
		if m.number != i+1 {
			return nil, fmt.Errorf("migration %d is missing", i+1)
		}
	}
	return list, nil
}

// migrate brings the schema up to date, each step in a transaction of its own.
func migrate(ctx context.Context, db *sql.DB) error {
	steps, err := migrations()
	if err != nil {
		return err
	}
	return applySteps(ctx, db, steps)
}

func applySteps(ctx context.Context, db *sql.DB, steps []migration) error {
	var have int
	if err := db.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&have); err != nil {
		return err
	}
	if have > len(steps) {
		return fmt.Errorf("%w: its schema is %d, this one knows %d", ErrNewer, have, len(steps))
	}
	for _, m := range steps[have:] {
		if err := applyStep(ctx, db, m); err != nil {
			return fmt.Errorf("migration %d: %w", m.number, err)
		}
	}
	return nil
}

func applyStep(ctx context.Context, db *sql.DB, m migration) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := tx.ExecContext(ctx, m.sql); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, fmt.Sprintf(`PRAGMA user_version = %d`, m.number)); err != nil {
		return err
	}
	return tx.Commit()
}

// The fields of the SQLite file header that are checked before SQLite sees the
// file (SQLite file format 1.3).
const (
	headerSize   = 100
	headerMagic  = "SQLite format 3\x00"
	offPageSize  = 16
	offPageCount = 28
	offAppID     = 68
)

// checkHeader refuses what is no registry, before SQLite could recover, convert
// or create anything.
func checkHeader(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("open registry %s: %w", path, ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("open registry: %w", err)
	}
	defer f.Close()
	var h [headerSize]byte
	if _, err := io.ReadFull(f, h[:]); err != nil {
		return damaged(path, "shorter than a header")
	}
	if !bytes.HasPrefix(h[:], []byte(headerMagic)) {
		return damaged(path, "not an SQLite database")
	}
	if id := binary.BigEndian.Uint32(h[offAppID:]); id != applicationID {
		return damaged(path, fmt.Sprintf("application id %08x, not a registry", id))
	}
	return checkSize(f, h[:], path)
}

// checkSize refuses a file that is shorter than its header says: the check
// of SQLite would see that only where a page in use is gone. With a write-ahead log beside
// it the file may rightly be short: a checkpoint was cut off, and the log still
// holds the missing pages.
func checkSize(f *os.File, h []byte, path string) error {
	if wal, err := os.Stat(path + "-wal"); err == nil && wal.Size() > 0 {
		return nil
	}
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("open registry: %w", err)
	}
	page := int64(binary.BigEndian.Uint16(h[offPageSize:]))
	if page == 1 {
		page = 65536
	}
	if want := page * int64(binary.BigEndian.Uint32(h[offPageCount:])); info.Size() < want {
		return damaged(path, fmt.Sprintf("%d bytes, its header says %d", info.Size(), want))
	}
	return nil
}

func damaged(path, what string) error {
	return fmt.Errorf("open registry %s: %w: %s", path, ErrDamaged, what)
}

// prepare checks the database behind an intact header, then migrates it.
func prepare(ctx context.Context, db *sql.DB, path string) error {
	if err := integrityCheck(ctx, db); err != nil {
		return damaged(path, err.Error())
	}
	if err := migrate(ctx, db); errors.Is(err, ErrNewer) {
		return fmt.Errorf("open registry %s: %w", path, err)
	} else if err != nil {
		return damaged(path, err.Error())
	}
	if err := sameSchema(ctx, db); err != nil {
		return damaged(path, err.Error())
	}
	return nil
}

// integrityCheck has SQLite read the whole database. The full check, not the quick
// one: it compares indexes with rows and so sees a flipped bit in an id, a name or
// a state. It costs 1.1 s at 100,000 devices with a session each, the quick one 0.3 s.
func integrityCheck(ctx context.Context, db *sql.DB) error {
	var result string
	if err := db.QueryRowContext(ctx, `PRAGMA integrity_check(1)`).Scan(&result); err != nil {
		return err
	}
	if result != "ok" {
		return errors.New(strings.Join(strings.Fields(result), " ")) // SQLite's report has lines
	}
	return nil
}

// sameSchema compares tables and indexes with those that the migrations make.
func sameSchema(ctx context.Context, db *sql.DB) error {
	memory, err := sql.Open("sqlite", ":memory:")
	if err != nil {
		return err
	}
	defer memory.Close()
	memory.SetMaxOpenConns(1)
	if err := migrate(ctx, memory); err != nil {
		return err
	}
	want, err := schemaOf(ctx, memory)
	if err != nil {
		return err
	}
	have, err := schemaOf(ctx, db)
	if err != nil {
		return err
	}
	for name, text := range want {
		if have[name] != text {
			return fmt.Errorf("%s is missing or altered in its schema", name)
		}
	}
	return nil
}

func schemaOf(ctx context.Context, db *sql.DB) (map[string]string, error) {
	rows, err := db.QueryContext(ctx, `SELECT type || ' ' || name, sql FROM sqlite_master WHERE sql IS NOT NULL`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	schema := map[string]string{}
	for rows.Next() {
		var name, text string
		if err := rows.Scan(&name, &text); err != nil {
			return nil, err
		}
		schema[name] = text
	}
	return schema, rows.Err()
}

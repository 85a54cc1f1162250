package registry

import (
	"database/sql"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"hawser/internal/identity"
)

// goodFile gives the bytes of a registry with something in it.
func goodFile(t *testing.T) []byte {
	t.Helper()
	r := newRegistry(t, Options{})
	must(t, r, func(tx *Tx) error {
		for i := 1; i <= 150; i++ {
			if err := enrol(identity.ID(i))(tx); err != nil {
				return err
			}
		}
		return nil
	})
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(r.Path())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func openBytes(t *testing.T, b []byte) error {
	t.Helper()
	path := filepath.Join(t.TempDir(), "registry.db")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := Open(t.Context(), path, Options{})
	if err == nil {
		return r.Close()
	}
	if !strings.Contains(err.Error(), path) {
		t.Errorf("the error does not name the file: %v", err)
	}
	return err
}

func TestMissingIsNotMadeAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "registry.db")
	if _, err := Open(t.Context(), path, Options{}); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
	if left, _ := filepath.Glob(path + "*"); len(left) != 0 {
		t.Errorf("%v was made", left)
	}
}

func TestDamagedFileIsRefused(t *testing.T) {
	good := goodFile(t)
	if err := openBytes(t, good); err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func([]byte) []byte{
		"empty":               func([]byte) []byte { return nil },
		"header only":         func(b []byte) []byte { return b[:100] },
		"half":                func(b []byte) []byte { return b[:len(b)/2] },
		"last page gone":      func(b []byte) []byte { return b[:len(b)-4096] },
		"last byte gone":      func(b []byte) []byte { return b[:len(b)-1] },
		"not SQLite":          func(b []byte) []byte { b[0] ^= 1; return b },
		"application id":      func(b []byte) []byte { b[offAppID] ^= 1; return b },
		"schema page":         func(b []byte) []byte { b[100] ^= 0xFF; return b },
		"zeroed page":         func(b []byte) []byte { clear(b[8192:12288]); return b },
		"text of the schema":  func(b []byte) []byte { return flipText(t, b, "CREATE TABLE devices (", 8) },
		"dropped constraint":  func(b []byte) []byte { return flipText(t, b, "UNIQUE CHECK (length(key_hash)", 2) },
		"another state":       func(b []byte) []byte { return flipText(t, b, "sensoractive", 6) },
		"another name":        func(b []byte) []byte { return flipText(t, b, "device00000007cert 00000007", 13) },
		"a state of no state": func(b []byte) []byte { return flipText(t, b, "sensoractive", 8) },
	} {
		t.Run(name, func(t *testing.T) {
			if err := openBytes(t, damage(append([]byte{}, good...))); !errors.Is(err, ErrDamaged) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// flipText changes the byte at offset within each place where text stands: some
// are left-overs that are not in use.
func flipText(t *testing.T, b []byte, text string, offset int) []byte {
	t.Helper()
	found := false
	for i := 0; i+len(text) <= len(b); i++ {
		if string(b[i:i+len(text)]) == text {
			b[i+offset] ^= 1
			found = true
		}
	}
	if !found {
		t.Fatalf("%q is not in the file", text)
	}
	return b
}

// TestFlippedBytes flips bytes anywhere. Whatever SQLite's checks can see must be
// refused as damaged; a flip inside a value is beyond them. Nothing may panic,
// and nothing may be called missing or newer than it is.
func TestFlippedBytes(t *testing.T) {
	good := goodFile(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	seen := 0
	for range 60 {
		b := append([]byte{}, good...)
		at := rnd.IntN(len(b))
		b[at] ^= byte(1 + rnd.IntN(255))
		if err := openBytes(t, b); err != nil {
			seen++
			if !errors.Is(err, ErrDamaged) {
				t.Errorf("byte %d: %v", at, err)
			}
		}
	}
	t.Logf("%d of 60 flips were seen", seen)
}

func TestNewerSchemaIsRefused(t *testing.T) {
	r := newRegistry(t, Options{})
	r.Close()
	alter(t, r.Path(), `PRAGMA user_version = 99`)
	_, err := Open(t.Context(), r.Path(), Options{})
	if !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), r.Path()) || !strings.Contains(err.Error(), "99") {
		t.Errorf("got %v", err)
	}
}

func TestMissingIndexIsRefused(t *testing.T) {
	r := newRegistry(t, Options{})
	r.Close()
	alter(t, r.Path(), `DROP INDEX certificates_active`)
	if _, err := Open(t.Context(), r.Path(), Options{}); !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v", err)
	}
}

// alter runs a statement on a closed registry.
func alter(t *testing.T, path, statement string) {
	t.Helper()
	db, err := openDB(path, "rw")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(statement); err != nil {
		t.Fatal(err)
	}
}

func TestMigrationsAreWholeOrNotAtAll(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m.db")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := openDB(path, "rw")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	first := migration{1, `CREATE TABLE a (x INTEGER); INSERT INTO a VALUES (1)`}
	bad := migration{2, `CREATE TABLE b (x INTEGER); INSERT INTO nowhere VALUES (1)`}
	good := migration{2, `CREATE TABLE b (x INTEGER); INSERT INTO b SELECT x FROM a`}
	if err := applySteps(t.Context(), db, []migration{first, bad}); err == nil {
		t.Fatal("the bad step passed")
	}
	if v, tables := schemaState(t, db); v != 1 || tables != 1 {
		t.Fatalf("after the bad step: version %d, %d tables", v, tables)
	}
	for range 2 { // the second time there is nothing to do
		if err := applySteps(t.Context(), db, []migration{first, good}); err != nil {
			t.Fatal(err)
		}
		if v, tables := schemaState(t, db); v != 2 || tables != 2 {
			t.Fatalf("version %d, %d tables", v, tables)
		}
	}
}

func schemaState(t *testing.T, db *sql.DB) (version, tables int) {
	t.Helper()
	err := errors.Join(db.QueryRow(`PRAGMA user_version`).Scan(&version),
		db.QueryRow(`SELECT COUNT(*) FROM sqlite_master`).Scan(&tables))
	if err != nil {
		t.Fatal(err)
	}
	return version, tables
}

func TestCreateThatFailsLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "odd ?#%&name.db") // every character is the file's own
	if err := Create(t.Context(), path, testMeta); err != nil {
		t.Fatal(err)
	}
	names, _ := os.ReadDir(dir)
	if len(names) != 1 || names[0].Name() != filepath.Base(path) {
		t.Fatalf("the directory holds %v", names)
	}
	if info, _ := names[0].Info(); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	reopen(t, path, Options{}).Close()
	gone := filepath.Join(dir, "no", "such", "registry.db")
	if err := Create(t.Context(), gone, testMeta); err == nil {
		t.Error("created in a directory that is not there")
	}
}

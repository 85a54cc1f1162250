package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"hawser/internal/factory"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// TestUnits: each unit gets the next id, and a unit that stays on the probe, or has an
// identity of this bench, is not done twice.
func TestUnits(t *testing.T) {
	r := newRig(t, nil)
	r.load(5, nil)
	b := r.open()
	off := plug(t, r.port)
	_, err := r.run(t.Context(), b, 3, func(*Result) {
		off()
		if len(r.results) < 3 {
			off = plug(t, r.port)
		}
	})
	fatal(t, err)
	for i, u := range r.results {
		if !u.Pass || !u.ReadBack || u.Locked || u.ID != identity.ID(0xABCD0001+i) || u.Count != (Count{i + 1, 5, 4 - i}) {
			t.Errorf("%+v", u)
		}
	}
	if got := r.journal(); !slices.Equal(got, []string{"begin", "block", "unit ABCD0001", "unit ABCD0002", "unit ABCD0003"}) {
		t.Errorf("%q", got)
	}
}

// TestSameUnit: a unit that stays on the probe is left alone, in this run and the next one.
func TestSameUnit(t *testing.T) {
	r := newRig(t, nil)
	r.load(5, nil)
	b := r.open()
	plug(t, r.port)
	ctx, cancel := context.WithCancel(t.Context())
	self, err := os.Executable()
	fatal(t, err)
	run := &Runner{Bench: b, Child: []string{self, "unit-child"}, Unit: func(u *Result) { r.results = append(r.results, u) }}
	run.Wait = func(text string) {
		if strings.Contains(text, "take the unit off") {
			cancel()
		}
	}
	_, err = run.Run(ctx)
	fatal(t, err)
	ctx, cancel = context.WithCancel(t.Context())
	run.Wait = func(text string) {
		if strings.Contains(text, "is ABCD0001 already") {
			cancel()
		}
	}
	_, err = run.Run(ctx)
	fatal(t, err)
	run.Again, run.Count = true, 1
	_, err = run.Run(t.Context())
	fatal(t, err)
	if len(r.results) != 2 || r.results[1].ID != 0xABCD0002 {
		t.Errorf("%+v", r.results)
	}
}

// TestVanishes: a probe that is gone in the middle of a write costs the id, and says so.
func TestVanishes(t *testing.T) {
	r := newRig(t, nil)
	r.load(5, nil)
	port := unusedPort(t)
	plug(t, port)
	var once sync.Once
	var w *wiretap
	w = r.tap(port, func(p []byte) []byte {
		if bytes.Contains(p, []byte("X20010000,80:")) || bytes.Contains(p, []byte("M20010000,80:")) {
			once.Do(func() { p = nil; w.dead.Store(true) })
		}
		return p
	}, nil)
	b := r.open()
	failed, err := r.run(t.Context(), b, 2, func(*Result) { w.dead.Store(false) })
	if err != nil || failed != 1 || len(r.results) != 2 {
		t.Fatalf("%d failed, %v, %+v", failed, err, r.results)
	}
	bad, good := r.results[0], r.results[1]
	wants(t, errors.New(bad.Reason), "gone")
	if bad.Pass || bad.Stage != stageWrite || !good.Pass || good.ID != 0xABCD0002 {
		t.Errorf("%+v, then %+v", bad, good)
	}
	if got := r.journal(); len(got) != 4 || !strings.HasPrefix(got[2], "burnt ABCD0001 writing and reading back: ") || got[3] != "unit ABCD0002" {
		t.Errorf("%q", got)
	}
}

// TestDoesNotReadBack: memory that takes a write and gives something else back.
func TestDoesNotReadBack(t *testing.T) {
	r := newRig(t, nil)
	r.load(5, nil)
	port := unusedPort(t)
	plug(t, port)
	var asked atomic.Bool // for the whole identity block
	r.tap(port, func(p []byte) []byte {
		asked.Store(bytes.Contains(p, []byte("$m20010000,80#")))
		return p
	}, func(p []byte) []byte {
		if i := bytes.IndexByte(p, '$'); asked.Load() && i >= 0 && len(p) > i+259 {
			spoil(p[i:])
		}
		return p
	})
	b := r.open()
	failed, err := r.run(t.Context(), b, 1, nil)
	if err != nil || failed != 1 {
		t.Fatalf("%d failed, %v", failed, err)
	}
	u := r.results[0]
	wants(t, errors.New(u.Reason), "does not read back", "from 0x20010014 on", "hint: ")
	if got := r.journal(); u.Stage != stageWrite || len(got) != 3 || !strings.HasPrefix(got[2], "burnt ABCD0001 ") {
		t.Errorf("%+v\n%q", u, got)
	}
}

// spoil changes byte 20 in a packet of memory, which begins with $, and mends its checksum.
func spoil(p []byte) {
	if p[41] == '0' {
		p[41] = '1'
	} else {
		p[41] = '0'
	}
	sum := byte(0)
	for _, b := range p[1:257] {
		sum += b
	}
	copy(p[258:], fmt.Sprintf("%02x", sum))
}

// TestThreeInARow: the bench asks for a person.
func TestThreeInARow(t *testing.T) {
	r := newRig(t, func(s *Settings) { s.Lock = "echo no such tool >&2; exit 3" })
	r.load(9, nil)
	b := r.open()
	off := plug(t, r.port)
	failed, err := r.run(t.Context(), b, 9, func(*Result) {
		off()
		off = plug(t, r.port)
	})
	wants(t, err, "3 units in a row failed at the same point, locking the unit", "hint: ")
	if failed != 3 || !errors.Is(err, ErrStop) {
		t.Errorf("%d, %v", failed, err)
	}
	for _, u := range r.results {
		wants(t, errors.New(u.Reason), "the lock command failed: exit status 3: no such tool")
	}
	if got := r.journal(); len(got) != 5 || !strings.HasPrefix(got[4], "burnt ABCD0003 ") {
		t.Errorf("%q", got)
	}
}

// TestFailedUnitStays: a unit that failed and stays on the probe costs one id, not three.
func TestFailedUnitStays(t *testing.T) {
	r := newRig(t, func(s *Settings) { s.Lock = "exit 1" })
	r.load(9, nil)
	plug(t, r.port)
	ctx, cancel := context.WithCancel(t.Context())
	self, err := os.Executable()
	fatal(t, err)
	run := &Runner{Bench: r.open(), Child: []string{self, "unit-child"}, Unit: func(u *Result) { r.results = append(r.results, u) }}
	run.Wait = func(text string) {
		if strings.Contains(text, "take the unit off") {
			cancel()
		}
	}
	failed, err := run.Run(ctx)
	if err != nil || failed != 1 || len(r.results) != 1 {
		t.Errorf("%d, %v, %+v", failed, err, r.results)
	}
}

// TestLock: only a refusal to be read shows that a unit is locked.
func TestLock(t *testing.T) {
	for _, c := range []struct {
		name   string
		locked string // what the unit answers to a read after the command, "" for the truth
		pass   bool
		words  string
	}{
		{"open", "", false, "its memory can still be read"},
		{"locked", "$E01#a6", true, ""},
		{"gone", "cut", false, "whether the unit is locked is not known"},
	} {
		t.Run(c.name, func(t *testing.T) {
			flag := filepath.Join(t.TempDir(), "locked")
			r := newRig(t, func(s *Settings) { s.Lock = `test "$HAWSER_UNIT" = ABCD0001 && touch ` + flag })
			r.load(1, nil)
			port := unusedPort(t)
			plug(t, port)
			var asked atomic.Bool
			r.tap(port, func(p []byte) []byte {
				asked.Store(bytes.Contains(p, []byte("$m")))
				return p
			}, func(p []byte) []byte {
				if _, err := os.Stat(flag); err == nil && asked.Load() && c.locked != "" && bytes.IndexByte(p, '$') >= 0 {
					if c.locked == "cut" {
						return nil
					}
					return []byte(c.locked)
				}
				return p
			})
			_, err := r.run(t.Context(), r.open(), 1, nil)
			fatal(t, err)
			u := r.results[0]
			if u.Pass != c.pass || u.Locked != c.pass || !strings.Contains(u.Reason, c.words) {
				t.Errorf("%+v", u)
			}
		})
	}
}

// TestStops: what ends a run before a unit is begun. No id is used.
func TestStops(t *testing.T) {
	expired := func(l *factory.Block) { l.Expires = time.Now().Add(-time.Second).Truncate(time.Second) }
	t.Run("expired block", func(t *testing.T) {
		r := newRig(t, nil)
		r.load(5, expired)
		_, err := r.run(t.Context(), r.open(), 1, nil)
		wants(t, err, "block 01", "expired at", "hint: hawser factory reserve")
		if !errors.Is(err, ErrStop) || len(r.journal()) != 2 {
			t.Errorf("%v, %q", err, r.journal())
		}
	})
	t.Run("expired and fresh block", func(t *testing.T) {
		r := newRig(t, nil)
		r.load(5, expired)
		r.load(5, nil)
		id, _, err := r.open().reserve(time.Now())
		if err != nil || id != 0xABCD0006 {
			t.Errorf("%s, %v", id, err)
		}
	})
	t.Run("used up", func(t *testing.T) {
		r := newRig(t, nil)
		r.load(1, nil)
		b := r.open()
		fatal(t, b.burn(0xABCD0001, "a test", time.Now()))
		_, err := r.run(t.Context(), b, 1, nil)
		wants(t, err, "all ids are used up", "hint: hawser factory reserve")
	})
	t.Run("expired station", func(t *testing.T) {
		r := newRig(t, nil)
		r.load(1, func(l *factory.Block) {
			cert, err := pki.IssueStationCA(r.office.ca, "line1", r.pub, time.Now().AddDate(-2, 0, 0))
			fatal(t, err)
			l.StationCert = cert
		})
		_, err := r.run(t.Context(), r.open(), 1, nil)
		wants(t, err, `certificate of station "line1" expired at`, "hint: hawser factory renew")
	})
}

// TestExec: a command gets the unit in Intel HEX, is not asked what is there, and
// waits for a word between two units.
func TestExec(t *testing.T) {
	out := filepath.Join(t.TempDir(), "hex")
	r := newRig(t, func(s *Settings) { s.Probe = "exec:identity=0x1000,trust=0x2000:cat >>" + out })
	r.load(5, nil)
	self, err := os.Executable()
	fatal(t, err)
	next := make(chan struct{})
	run := &Runner{Bench: r.open(), Child: []string{self, "unit-child"}, Next: next, Unit: func(u *Result) { r.results = append(r.results, u) }}
	words := 0
	run.Wait = func(text string) {
		wants(t, errors.New(text), "press enter")
		if words++; words == 2 {
			close(next)
			return
		}
		go func() { next <- struct{}{} }()
	}
	failed, err := run.Run(t.Context())
	if err != nil || failed != 0 || len(r.results) != 2 || r.results[1].ReadBack || !r.results[1].Pass {
		t.Errorf("%d, %v, %+v", failed, err, r.results)
	}
	text, err := os.ReadFile(out)
	fatal(t, err)
	if n := bytes.Count(text, []byte(":00000001FF")); n != 2 {
		t.Errorf("%d files of Intel HEX", n)
	}
}

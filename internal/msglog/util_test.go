package msglog

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"hawser/internal/identity"
)

const testFleet = "00112233445566778899aabbccddeeff"

// testConfig is a log in a directory of the test.
func testConfig(t testing.TB) Config {
	t.Helper()
	return Config{Fleet: testFleet, Dir: filepath.Join(t.TempDir(), "log"), Logger: testLogger(t)}
}

// testLogger prints warnings with -v only; the log outlives no test.
func testLogger(t testing.TB) *slog.Logger {
	if !testing.Verbose() {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelInfo}))
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(string(b))
	return len(b), nil
}

func create(t testing.TB, cfg Config) {
	t.Helper()
	if err := Create(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
}

// open opens and starts the log; the test's end closes it.
func open(t testing.TB, cfg Config, known State, h Hooks) *Log {
	t.Helper()
	l, err := Open(t.Context(), cfg, known)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { shut(t, l) })
	if err := l.Start(h); err != nil {
		t.Fatal(err)
	}
	return l
}

func shut(t testing.TB, l *Log) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := l.Close(ctx); err != nil {
		t.Error(err)
	}
}

// fates is an Owner that notes what became of its records.
type fates struct {
	mu    sync.Mutex
	cond  *sync.Cond
	good  []Record // guarded by mu; copies
	bad   []error  // guarded by mu
	total int      // guarded by mu
}

func newFates() *fates {
	f := &fates{}
	f.cond = sync.NewCond(&f.mu)
	return f
}

func (f *fates) Stored(r *Record, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.total++
	if err != nil {
		f.bad = append(f.bad, err)
	} else {
		f.good = append(f.good, *r)
	}
	f.cond.Broadcast()
}

// wait returns when n records were settled.
func (f *fates) wait(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.total < n {
		f.cond.Wait()
	}
}

func device(i int) identity.Principal { return identity.DevicePrincipal(identity.ID(0xA0000000 + i)) }

func publish(from identity.Principal, topic, payload string, o Owner) *Record {
	return &Record{Kind: KindPublish, From: from, Topic: topic, Payload: []byte(payload), QoS: 1, Owner: o}
}

func readAll(t testing.TB, l *Log, from Pos) []Record {
	t.Helper()
	var out []Record
	if err := l.Read(t.Context(), from, func(r *Record) error { out = append(out, *r); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

// mustAppend appends n numbered records of one device and waits for them.
func mustAppend(t testing.TB, l *Log, from identity.Principal, start, n int) {
	t.Helper()
	f := newFates()
	for i := start; i < start+n; i++ {
		if err := l.Append(publish(from, "private/"+from.Name+"/u/t", fmt.Sprintf("%08d", i), f)); err != nil {
			t.Fatal(err)
		}
	}
	f.wait(n)
	if len(f.bad) > 0 {
		t.Fatal(f.bad[0])
	}
}

// eventually polls: the last resort where there is no event to wait for.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	within(t, time.Minute, what, ok)
}

func within(t testing.TB, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(limit)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("not within %v: %s", limit, what)
		case <-tick.C:
		}
	}
}

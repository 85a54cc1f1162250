package msglog

import (
	"testing"
	"time"
)

// phantom leaves the history as a full disk can: its only chunk was never acknowledged,
// and was cut off at the restart. The stream is empty and goes on at 2.
func phantom(t *testing.T, l *Log) {
	t.Helper()
	if _, err := l.store.put(t.Context(), nil, outMsg{l.names.h + "A0000001", []byte("cut off")}); err != nil {
		t.Fatal(err)
	}
	if err := l.store.purge(t.Context(), l.names.history, "", 2); err != nil {
		t.Fatal(err)
	}
}

// TestPhantomChunk: what was never acknowledged may be missing, and the history goes on,
// after a restart of the store and after two of the log.
func TestPhantomChunk(t *testing.T) {
	cfg := testConfig(t)
	cfg.ChunkAge = time.Millisecond
	create(t, cfg)
	l := open(t, cfg, State{}, Hooks{})
	phantom(t, l)
	if err := l.afterRestart(t.Context()); err != nil {
		t.Fatalf("after the restart of the store: %v", err)
	}
	if err := l.chunks.lookAgain(t.Context()); err != nil { // as the next write would
		t.Fatal(err)
	}
	for round := 1; round <= 3; round++ {
		before := l.State().History.Last
		f := newFates()
		if err := l.Append(publish(device(1), "private/A0000001/u/t", "kept", f)); err != nil {
			t.Fatal(err)
		}
		f.wait(1)
		eventually(t, "a chunk", func() bool { return l.State().History.Last > before })
		n := 0
		if err := l.History(t.Context(), Query{Name: "A0000001"}, func(*Record) error { n++; return nil }); err != nil || n != round {
			t.Fatalf("round %d: %d records, %v", round, n, err)
		}
		known := l.State()
		shut(t, l)
		l = open(t, cfg, known, Hooks{})
	}
	empty := testConfig(t)
	create(t, empty)
	l = open(t, empty, State{}, Hooks{})
	phantom(t, l)
	known := State{Log: l.State().Log, Frame: l.State().Frame, Checksum: l.State().Checksum}
	shut(t, l)
	open(t, empty, known, Hooks{})
}

// TestSickStoreIsNotBelieved: what a store counts that met a write error is not taken for
// acknowledged.
func TestSickStoreIsNotBelieved(t *testing.T) {
	cfg := testConfig(t)
	create(t, cfg)
	l := open(t, cfg, State{}, Hooks{})
	if _, err := l.store.put(t.Context(), nil, outMsg{l.names.h + "A0000001", []byte("may not be there")}); err != nil {
		t.Fatal(err)
	}
	c := &chunker{l: l, prev: map[string]uint64{}}
	for _, sick := range []bool{true, false} {
		l.store.sick.Store(sick)
		if err := c.lookAgain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if last := l.State().History.Last; (last == 1) == sick {
			t.Errorf("store sick %t: the history is taken to end at %d", sick, last)
		}
	}
}

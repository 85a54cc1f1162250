package msglog

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// cutter cuts the connection to the embedded server around a frame.
type cutter struct {
	net.Conn
	mode *atomic.Int32 // what happens to the next frame
	arm  atomic.Bool   // the next thing read is lost
}

const (
	cutNothing = iota
	cutBefore  // failed and not written
	cutAfter   // failed but written
)

var framePublish = []byte("hw." + testFleet + ".f ")

func (c *cutter) Write(b []byte) (int, error) {
	if !bytes.Contains(b, framePublish) {
		return c.Conn.Write(b)
	}
	switch {
	case c.mode.CompareAndSwap(cutBefore, cutNothing):
		c.Close()
		return 0, errors.New("cut before the frame")
	case c.mode.CompareAndSwap(cutAfter, cutNothing):
		c.arm.Store(true)
	}
	return c.Conn.Write(b)
}

func (c *cutter) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.arm.Load() {
		c.Close()
		return 0, errors.New("cut before the acknowledgement")
	}
	return n, err
}

// A frame whose fate is unknown is sent again, and is there once.
func TestRetryBothWays(t *testing.T) {
	cfg := testConfig(t)
	create(t, cfg)
	var mode atomic.Int32
	l, err := Open(t.Context(), cfg, State{})
	if err != nil {
		t.Fatal(err)
	}
	l.store.wrap = func(c net.Conn) net.Conn { return &cutter{Conn: c, mode: &mode} }
	l.store.close()
	if err := l.store.connect(); err != nil {
		t.Fatal(err)
	}
	var commits int
	hooks := Hooks{
		Plan:      func(recs []Record, q *QueuePlan) { q.Add("A0000001", 0) },
		Committed: func(recs []Record, at []QueuedAt) { commits += len(recs) },
	}
	if err := l.Start(hooks); err != nil {
		t.Fatal(err)
	}
	for i, m := range []int32{cutNothing, cutBefore, cutAfter, cutNothing, cutAfter, cutBefore} {
		mode.Store(m)
		mustAppend(t, l, device(1), i, 1)
		if mode.Load() != cutNothing {
			t.Fatal("the connection was not cut")
		}
	}
	if s := l.Stats(t.Context()); s.Restarts != 4 || s.Failures != 4 {
		t.Errorf("%d restarts, %d failures", s.Restarts, s.Failures)
	}
	check := func(l *Log) {
		t.Helper()
		got := readAll(t, l, 0)
		for i, r := range got {
			if string(r.Payload) != fmt.Sprintf("%08d", i) {
				t.Errorf("record %d is %q", i, r.Payload)
			}
		}
		qs, err := l.QueueRead("A0000001", 0, 100)
		if err != nil || len(qs) != 6 || len(got) != 6 || commits != 6 {
			t.Errorf("%d records, %d committed, %d queued, %v", len(got), commits, len(qs), err)
		}
	}
	check(l)
	state := l.State()
	shut(t, l)
	check(open(t, cfg, state, Hooks{}))
}

// What is given up and turns out to be stored is committed without its owner.
func TestGivenUpButStored(t *testing.T) {
	cfg := testConfig(t)
	cfg.RetryFor = time.Nanosecond
	create(t, cfg)
	var mode atomic.Int32
	l, err := Open(t.Context(), cfg, State{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { shut(t, l) })
	l.store.wrap = func(c net.Conn) net.Conn { return &cutter{Conn: c, mode: &mode} }
	l.store.close()
	if err := l.store.connect(); err != nil {
		t.Fatal(err)
	}
	committed := make(chan string, 10)
	if err := l.Start(Hooks{Committed: func(recs []Record, _ []QueuedAt) { committed <- string(recs[0].Payload) }}); err != nil {
		t.Fatal(err)
	}
	f := newFates()
	for i, m := range []int32{cutAfter, cutBefore, cutNothing} {
		mode.Store(m)
		if err := l.Append(publish(device(1), "a", fmt.Sprint(i), f)); err != nil {
			t.Fatal(err)
		}
		f.wait(i + 1)
		eventually(t, "healthy", func() bool { return l.Healthy() == nil })
	}
	if len(f.bad) != 2 || len(f.good) != 1 || !errors.Is(f.bad[0], ErrUnavailable) {
		t.Fatalf("good %v, bad %v", f.good, f.bad)
	}
	if a, b := <-committed, <-committed; a != "0" || b != "2" {
		t.Errorf("committed %q and %q", a, b)
	}
	if got := readAll(t, l, 0); len(got) != 2 || string(got[0].Payload) != "0" || string(got[1].Payload) != "2" {
		t.Errorf("stored: %v", got)
	}
}

// smallDisk mounts a file system of its own.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: cannot mount a small tmpfs, so the full disk is not tested")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("mount of a tmpfs: %v, so the full disk is not tested", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func fillDisk(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for chunk := 1 << 20; chunk > 0; {
		if _, err := f.Write(make([]byte, chunk)); err != nil {
			chunk /= 2
		}
	}
}

// A full disk: nothing is acknowledged, nothing acknowledged is lost, and it
// works again by itself when there is room.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	disk := smallDisk(t, "64m")
	cfg := testConfig(t)
	cfg.Dir, cfg.RetryFor, cfg.MinFree = filepath.Join(disk, "log"), 300*time.Millisecond, 4<<20
	create(t, cfg)
	l := open(t, cfg, State{}, Hooks{Plan: func(recs []Record, q *QueuePlan) { q.Add("A0000001", 0) }})
	var acked []string
	for round := range 4 {
		for i := range 20 {
			acked = append(acked, appendOne(t, l, fmt.Sprintf("%d/%d", round, i))...)
		}
		fillDisk(t, disk)
		for i := 0; l.Healthy() == nil; i++ {
			acked = append(acked, appendOne(t, l, fmt.Sprintf("%d/full %d", round, i))...)
		}
		// A mark can still fit where a record does not, and open the intake for a moment.
		eventually(t, "append is refused on a full disk", func() bool {
			return errors.Is(l.Append(publish(device(1), "a", strings.Repeat("x", 3000), nil)), ErrUnavailable)
		})
		if err := os.Remove(filepath.Join(disk, "ballast")); err != nil {
			t.Fatal(err)
		}
		eventually(t, "healthy again", func() bool { return l.Healthy() == nil })
		acked = append(acked, appendOne(t, l, fmt.Sprintf("%d/after", round))...)
		checkAcked(t, l, acked)
	}
	if l.Stats(t.Context()).Restarts == 0 {
		t.Error("the store was not restarted")
	}
	state := l.State()
	shut(t, l)
	checkAcked(t, open(t, cfg, state, Hooks{}), acked)
}

func appendOne(t *testing.T, l *Log, text string) []string {
	t.Helper()
	f := newFates()
	text += strings.Repeat(" ", 3000)
	if err := l.Append(publish(device(1), "private/A0000001/u/t", text, f)); err != nil {
		return nil
	}
	f.wait(1)
	if len(f.good) == 0 {
		return nil
	}
	return []string{text}
}

// checkAcked looks for every acknowledged payload, once and in order, in the
// frames, in the queue and in the history.
func checkAcked(t *testing.T, l *Log, acked []string) {
	t.Helper()
	places := map[string][]string{}
	for _, r := range readAll(t, l, 0) {
		places["log"] = append(places["log"], string(r.Payload))
	}
	for after := uint64(0); ; {
		qs, err := l.QueueRead("A0000001", after, 50)
		if err != nil {
			t.Fatal(err)
		}
		if len(qs) == 0 {
			break
		}
		for _, q := range qs {
			after = q.Seq
			places["queue"] = append(places["queue"], string(q.Recs[0].Payload))
		}
	}
	err := l.History(t.Context(), Query{Name: "A0000001"}, func(r *Record) error {
		places["history"] = append(places["history"], string(r.Payload))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for place, have := range places {
		i := 0
		for _, s := range have {
			if i < len(acked) && s == acked[i] {
				i++
			}
		}
		if i != len(acked) {
			t.Fatalf("%s: %d of %d acknowledged records found, %q is missing", place, i, len(acked), strings.TrimSpace(acked[i]))
		}
	}
	if len(places) != 3 {
		t.Fatalf("only in %v", places)
	}
}

// damageFixture is a closed log of several block files.
func damageFixture(t *testing.T) (Config, State) {
	cfg := testConfig(t)
	cfg.ChunkAge, cfg.RingBytes = time.Millisecond, 1
	create(t, cfg)
	l := open(t, cfg, State{}, Hooks{Plan: func(recs []Record, q *QueuePlan) { q.Add("A0000001", 0) }})
	f := newFates()
	payload := strings.Repeat("x", 200_000)
	for i := range 120 {
		if err := l.Append(publish(device(1), "private/A0000001/u/t", payload, f)); err != nil {
			t.Fatal(err)
		}
		f.wait(i + 1)
	}
	eventually(t, "chunks", func() bool { return l.State().History.Last > 60 })
	for i := range 120 {
		r := publish(device(1), fmt.Sprint("topic ", i), payload, nil)
		r.Pos = MakePos(1, 0)
		if err := l.PutRetained(t.Context(), []*Record{r}); err != nil {
			t.Fatal(err)
		}
	}
	state := l.State()
	shut(t, l)
	return cfg, state
}

func copyTree(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

// Each way to lose or change stored data is found at Open or when it is read,
// and the message names the directory.
func TestDamage(t *testing.T) {
	t.Parallel()
	good, state := damageFixture(t)
	n := namesOf(testFleet)
	blocks := func(cfg Config, stream string) []string {
		found, err := filepath.Glob(filepath.Join(streamDir(cfg.Dir, stream), "msgs", "*.blk"))
		if err != nil || len(found) < 3 {
			t.Fatalf("%s: %d block files, %v", stream, len(found), err)
		}
		return found
	}
	type damage struct {
		name   string
		do     func(cfg Config) error
		atOpen bool // a start refuses it
	}
	var cases []damage
	for _, s := range n.streams() {
		cases = append(cases, damage{"stream directory " + s[len(s)-3:], func(cfg Config) error { return os.RemoveAll(streamDir(cfg.Dir, s)) }, true},
			damage{"meta.inf " + s[len(s)-3:], func(cfg Config) error { return os.Remove(filepath.Join(streamDir(cfg.Dir, s), "meta.inf")) }, true})
	}
	for _, s := range n.streams() {
		cases = append(cases,
			damage{"first block " + s[len(s)-3:], func(cfg Config) error { return os.Remove(blocks(cfg, s)[0]) }, true},
			damage{"middle block " + s[len(s)-3:], func(cfg Config) error { return os.Remove(blocks(cfg, s)[1]) }, true},
			damage{"last block " + s[len(s)-3:], func(cfg Config) error { b := blocks(cfg, s); return os.Remove(b[len(b)-1]) }, true},
			damage{"flipped bit " + s[len(s)-3:], func(cfg Config) error { return flip(blocks(cfg, s)[1]) }, false},
			damage{"flipped bit after a kill " + s[len(s)-3:], func(cfg Config) error {
				return errors.Join(flip(blocks(cfg, s)[1]), os.Remove(filepath.Join(streamDir(cfg.Dir, s), "msgs", "index.db")))
			}, true})
	}
	cases = append(cases, damage{"whole directory", func(cfg Config) error { return os.RemoveAll(cfg.Dir) }, true})
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			cfg := good
			cfg.Dir = filepath.Join(t.TempDir(), "log")
			copyTree(t, good.Dir, cfg.Dir)
			if err := c.do(cfg); err != nil {
				t.Fatal(err)
			}
			opened, err := readEverything(t, cfg, state)
			if opened && c.atOpen {
				t.Errorf("found, but only when read: %v", err)
			}
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), cfg.Dir) {
				t.Fatalf("not found: %v", err)
			}
			t.Log(err)
		})
	}
	if _, err := readEverything(t, good, state); err != nil {
		t.Errorf("undamaged: %v", err)
	}
}

func flip(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	b[len(b)/2] ^= 0x10
	return os.WriteFile(file, b, 0o600)
}

// readEverything gives the first error, and whether Open found nothing.
func readEverything(t *testing.T, cfg Config, state State) (opened bool, err error) {
	l, err := Open(t.Context(), cfg, state)
	if err != nil {
		return false, err
	}
	defer shut(t, l)
	if _, err := l.QueueRead("A0000001", 0, 1000); err != nil {
		return true, err
	}
	none := func(*Record) error { return nil }
	frames := l.Read(t.Context(), 0, none)
	for n := uint64(1); n < l.End().Frame(); n++ { // whoever begins at a frame gets that one, or an error
		err := l.Read(t.Context(), MakePos(n, 0), func(r *Record) error {
			if r.Pos.Frame() != n {
				t.Errorf("reading from frame %d began with %d", n, r.Pos.Frame())
			}
			return errEnough
		})
		if frames == nil && !errors.Is(err, errEnough) {
			t.Errorf("frame %d: %v", n, err)
		}
	}
	forward := l.History(t.Context(), Query{Name: "A0000001"}, none)
	backward := l.History(t.Context(), Query{Name: "A0000001", Reverse: true}, none)
	if (forward == nil) != (backward == nil) {
		t.Errorf("history forward: %v, backward: %v", forward, backward)
	}
	return true, errors.Join(frames, forward, backward, l.LoadRetained(t.Context(), none))
}

// A log that is older than the registry remembers is refused.
func TestOlderThanRegistry(t *testing.T) {
	cfg := testConfig(t)
	create(t, cfg)
	l := open(t, cfg, State{}, Hooks{})
	mustAppend(t, l, device(1), 0, 10)
	shut(t, l)
	backup := filepath.Join(t.TempDir(), "backup")
	copyTree(t, cfg.Dir, backup)
	l = open(t, cfg, State{}, Hooks{})
	mustAppend(t, l, device(1), 10, 10)
	state := l.State()
	shut(t, l)
	old := cfg
	old.Dir = backup
	if _, err := Open(t.Context(), old, state); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), backup) {
		t.Errorf("an older copy: %v", err)
	}
	l = open(t, old, State{}, Hooks{}) // and one that went on by itself
	for i := range 12 {
		mustAppend(t, l, device(2), i, 1)
	}
	shut(t, l)
	if _, err := Open(t.Context(), old, state); !errors.Is(err, ErrDamaged) {
		t.Errorf("a copy that went on by itself: %v", err)
	}
}

// Appends block while the intake is full, and none is lost.
func TestIntakeIsBounded(t *testing.T) {
	cfg := testConfig(t)
	cfg.IntakeBytes = 64 << 10
	create(t, cfg)
	hold := make(chan struct{})
	var once sync.Once
	l := open(t, cfg, State{}, Hooks{Plan: func([]Record, *QueuePlan) { once.Do(func() { <-hold }) }})
	f := newFates()
	var taken atomic.Int32
	go func() {
		for range 200 {
			if err := l.Append(publish(device(1), "a", strings.Repeat("x", 4000), f)); err != nil {
				t.Error(err)
			}
			taken.Add(1)
		}
	}()
	eventually(t, "the intake is full", func() bool {
		l.in.mu.Lock()
		defer l.in.mu.Unlock()
		return l.in.bytes >= l.in.limit
	})
	if n := taken.Load(); n > 40 {
		t.Errorf("%d records were taken", n)
	}
	close(hold)
	f.wait(200)
	if len(f.bad) > 0 || len(readAll(t, l, 0)) != 200 {
		t.Error(f.bad)
	}
}

package msglog

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"hawser/internal/identity"
)

func TestOrderAndReopen(t *testing.T) {
	cfg := testConfig(t)
	create(t, cfg)
	l := open(t, cfg, State{}, Hooks{})
	const producers, each = 20, 500
	f := newFates()
	var wg sync.WaitGroup
	for p := range producers {
		wg.Go(func() {
			for i := range each {
				if err := l.Append(publish(device(p), "private/x/u/t", fmt.Sprintf("%d/%d", p, i), f)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	f.wait(producers * each)
	if len(f.bad) > 0 {
		t.Fatal(f.bad[0])
	}
	check := func(l *Log) {
		t.Helper()
		got := readAll(t, l, 0)
		if len(got) != producers*each {
			t.Fatalf("read %d of %d", len(got), producers*each)
		}
		next := make(map[string]int)
		for i, r := range got {
			s := f.good[i]
			if r.Pos != s.Pos || string(r.Payload) != string(s.Payload) || r.Time != s.Time || i > 0 && r.Pos <= got[i-1].Pos {
				t.Fatalf("record %d: %+v, acknowledged %+v", i, r, s)
			}
			var p, n int
			if _, err := fmt.Sscanf(string(r.Payload), "%d/%d", &p, &n); err != nil || n != next[r.From.Name] || r.From != device(p) {
				t.Fatalf("record %d is %q, expected number %d", i, r.Payload, next[r.From.Name])
			}
			next[r.From.Name]++
		}
		mid := got[len(got)/2].Pos
		if rest := readAll(t, l, mid); len(rest) != len(got)-len(got)/2 || rest[0].Pos != mid {
			t.Fatalf("reading from %v gave %d", mid, len(rest))
		}
	}
	check(l)
	state := l.State()
	shut(t, l)
	check(open(t, cfg, state, Hooks{}))
}

func TestEveryFieldSurvives(t *testing.T) {
	cfg := testConfig(t)
	cfg.RingBytes = 1 // everything comes from the store
	create(t, cfg)
	l := open(t, cfg, State{}, Hooks{})
	f := newFates()
	svc, err := identity.ServicePrincipal("shop")
	if err != nil {
		t.Fatal(err)
	}
	want := []Record{
		{Kind: KindStart, From: identity.TheServer()},
		{Kind: KindPublish, From: svc, ClientID: "c/1", Topic: "a/b", Payload: []byte{0, 1}, QoS: 2, Retain: true, PacketID: 77,
			HasExpiry: true, Expiry: 4294967295, Props: []byte{3, 0, 1, 'x'}},
		{Kind: KindRelease, From: svc, ClientID: "c/1", PacketID: 77},
		{Kind: KindPublish, From: identity.TheServer(), Topic: "private/ABCD1234/d/cmd", Direct: true, QoS: 1, HasExpiry: true},
		{Kind: KindPublish, From: device(1), Topic: strings.Repeat("t", 1024), Payload: make([]byte, 256<<10)},
	}
	for i := range want {
		r := want[i]
		r.Owner = f
		if err := l.Append(&r); err != nil {
			t.Fatal(err)
		}
		f.wait(i + 1)
	}
	for i, r := range readAll(t, l, 0) {
		w := want[i]
		w.Pos, w.Time = MakePos(uint64(i+1), 0), r.Time
		if r.Time == 0 || fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", w) {
			t.Errorf("record %d: got %+v", i, r)
		}
	}
}

func TestAppendRefuses(t *testing.T) {
	cfg := testConfig(t)
	create(t, cfg)
	if err := Create(t.Context(), cfg); !errors.Is(err, ErrExists) {
		t.Errorf("second Create: %v", err)
	}
	l, err := Open(t.Context(), cfg, State{})
	if err != nil {
		t.Fatal(err)
	}
	r := publish(device(1), "a", "b", nil)
	if err := l.Append(r); !errors.Is(err, ErrUnavailable) {
		t.Errorf("before Start: %v", err)
	}
	if err := l.Start(Hooks{}); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]Record{
		"payload":  {Kind: KindPublish, Topic: "a", Payload: make([]byte, 256<<10+1)},
		"topic":    {Kind: KindPublish, Topic: strings.Repeat("a", 1025)},
		"together": {Kind: KindPublish, Topic: "a", Payload: make([]byte, 256<<10), Props: make([]byte, 256<<10)},
	} {
		if err := l.Append(&bad); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := l.Append(&Record{Topic: "a"}); err == nil {
		t.Error("a record without a kind was taken")
	}
	shut(t, l)
	if err := l.Append(r); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestQueues(t *testing.T) {
	cfg := testConfig(t)
	create(t, cfg)
	var queued []QueuedAt
	f := newFates()
	hooks := Hooks{
		Plan: func(recs []Record, q *QueuePlan) {
			for i := range recs {
				q.Add(recs[i].Topic, i)
			}
		},
		Committed: func(_ []Record, at []QueuedAt) { queued = append(queued, at...) },
	}
	l := open(t, cfg, State{}, hooks)
	for i := range 60 {
		if err := l.Append(publish(device(0), fmt.Sprintf("A000000%d", i%3), fmt.Sprint(i), f)); err != nil {
			t.Fatal(err)
		}
	}
	f.wait(60)
	read := func(name string, after uint64) []string {
		t.Helper()
		return queueAfter(t, l, name, after)
	}
	if got := read("A0000001", 0); len(got) != 20 || got[0] != "1" || got[19] != "58" {
		t.Fatalf("queue: %v", got)
	}
	var mid uint64
	n := 0
	for _, q := range queued {
		if q.Name == "A0000001" && n < 10 {
			n += q.Records
			mid = q.Seq
		}
	}
	if got := read("A0000001", mid); len(got) != 20-n {
		t.Fatalf("after %d: %v", mid, got)
	}
	l.QueueAck("A0000001", mid)
	eventually(t, "purge", func() bool {
		qs, err := l.QueueRead("A0000001", 0, 1)
		return err == nil && (len(qs) == 0 || qs[0].Seq > mid)
	})
	if n, err := l.QueueDrop("A0000002"); err != nil || n == 0 {
		t.Fatal(n, err)
	}
	if got := read("A0000002", 0); len(got) != 0 {
		t.Fatalf("after drop: %v", got)
	}
	state := l.State()
	shut(t, l)
	replanned := 0
	l = open(t, cfg, state, Hooks{Plan: func([]Record, *QueuePlan) { replanned++ }})
	if replanned != 0 {
		t.Error("the last frame had its queue messages and was planned again")
	}
	seen := map[string]QueueState{}
	if err := l.QueueStates(t.Context(), func(s QueueState) error { seen[s.Name] = s; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, there := seen["A0000002"]; there || seen["A0000000"].LastPos == 0 {
		t.Fatalf("states: %v", seen)
	}
	if got := read("A0000000", 0); len(got) != 20 {
		t.Fatalf("after a restart: %v", got)
	}
}

func TestRetained(t *testing.T) {
	cfg := testConfig(t)
	cfg.RetainEvery = 5 * time.Millisecond
	create(t, cfg)
	l := open(t, cfg, State{}, Hooks{})
	var recs []*Record
	for i := range 1500 {
		r := publish(device(i), fmt.Sprintf("t/%d/.*>", i), "x", nil)
		r.Pos, r.Retain, r.Time = MakePos(1, i), true, 5
		recs = append(recs, r)
	}
	if err := l.PutRetained(t.Context(), recs); err != nil {
		t.Fatal(err)
	}
	gone := *recs[7]
	gone.Payload = nil
	newer := *recs[8]
	newer.Payload = []byte("y")
	if err := l.PutRetained(t.Context(), []*Record{&gone, &newer}); err != nil {
		t.Fatal(err)
	}
	state := l.State()
	shut(t, l)
	l = open(t, cfg, state, Hooks{})
	for round := range 3 { // at first what was cleared is in the store, later it is gone
		got := map[string]string{}
		if err := l.LoadRetained(t.Context(), func(r *Record) error { got[r.Topic] = string(r.Payload); return nil }); err != nil {
			t.Fatal(err)
		}
		if _, there := got[gone.Topic]; there || len(got) != 1499 || got[newer.Topic] != "y" {
			t.Fatalf("%d retained messages", len(got))
		}
		if s := l.Stats(t.Context()); round == 0 && s.Retained != 1500 {
			t.Errorf("store holds %d before the registry knows", s.Retained)
		}
		l.Saved(l.State())
		eventually(t, "removal", func() bool { return l.Stats(t.Context()).Retained == 1499 })
	}
	state = l.State()
	shut(t, l)
	shut(t, open(t, cfg, state, Hooks{}))
}

func TestRetention(t *testing.T) {
	cfg := testConfig(t)
	cfg.RetainEvery, cfg.MaxBytes, cfg.ChunkAge, cfg.RingBytes = 5*time.Millisecond, 200<<10, time.Millisecond, 1
	cfg.HistoryMaxBytes, cfg.ChunkBytes = 200<<10, 4<<10 // a chunk for each record
	create(t, cfg)
	l := open(t, cfg, State{}, Hooks{})
	fill := func() {
		for i := range 60 {
			f := newFates()
			if err := l.Append(publish(device(1), "a", strings.Repeat("x", 10_000)+fmt.Sprint(i), f)); err != nil {
				t.Fatal(err)
			}
			f.wait(1)
		}
	}
	fill()
	l.SetFloor(l.End(), MakePos(3, 0))
	eventually(t, "want", func() bool { return l.State().Log.First > 30 && l.State().History.First > 30 })
	if l.First().Frame() != 1 {
		t.Fatal("frames went before the registry knew")
	}
	for range 3 {
		want := l.State()
		l.Saved(want)
		eventually(t, "removal", func() bool { return l.First().Frame() >= want.Log.First })
	}
	if l.Stats(t.Context()).Overtaken == 0 {
		t.Error("the cursor was overtaken and nobody counted")
	}
	got := readAll(t, l, 0)
	if len(got) == 0 || len(got) > 30 || got[0].Pos.Frame() != l.First().Frame() {
		t.Fatalf("%d records left, the first is %v", len(got), got[0].Pos)
	}
	state := l.State()
	shut(t, l)
	l = open(t, cfg, state, Hooks{})
	shut(t, l)
	state.Log.First = 2 // as if retention had not been allowed
	if _, err := Open(t.Context(), cfg, state); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), cfg.Dir) {
		t.Errorf("a log whose beginning is gone: %v", err)
	}
}

func TestMissingDirectory(t *testing.T) {
	cfg := testConfig(t)
	if _, err := Open(t.Context(), cfg, State{}); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), cfg.Dir) {
		t.Errorf("no directory: %v", err)
	}
	if _, err := os.Stat(cfg.Dir); err == nil {
		t.Error("Open made a directory")
	}
}

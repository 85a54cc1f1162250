package msglog

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"testing"
	"time"

	"hawser/internal/identity"
)

// The history of a principal is what a scan of all frames finds, for any mix of
// principals, filters, times, limits, directions, and states of the chunker.
func TestHistoryEqualsScan(t *testing.T) {
	cfg := testConfig(t)
	cfg.ChunkBytes, cfg.ChunkMemory, cfg.RingBytes = 600, 6000, 8<<10
	create(t, cfg)
	rng := rand.New(rand.NewPCG(1, 2))
	l := open(t, cfg, State{}, Hooks{})
	n := 0
	for range 4 {
		for range 5 {
			f := newFates()
			count := 1 + rng.IntN(300)
			for range count {
				if err := l.Append(randomRecord(rng, n, f)); err != nil {
					t.Fatal(err)
				}
				n++
			}
			f.wait(count)
			compareHistory(t, l, rng, 12)
		}
		state := l.State()
		shut(t, l)
		l = open(t, cfg, state, Hooks{}) // chunks that were open are made again
		compareHistory(t, l, rng, 12)
	}
	if l.Stats(t.Context()).HistoryBytes == 0 || l.State().History.Last < 20 {
		t.Error("no chunks were written")
	}
}

func randomRecord(rng *rand.Rand, n int, o Owner) *Record {
	dev := device(rng.IntN(5))
	r := publish(dev, "private/"+dev.Name+"/u/"+[]string{"t", "x", "hello"}[rng.IntN(3)], fmt.Sprint(n), o)
	switch rng.IntN(6) {
	case 0:
		r.From = identity.TheServer()
		r.Topic = "private/" + dev.Name + "/d/cmd"
	case 1:
		r.From = identity.Principal{Kind: identity.Service, Name: "shop"}
		r.Topic = []string{"private/" + dev.Name + "/d/app/x", "other/place", "private/nobody"}[rng.IntN(3)]
	case 2:
		r.Kind, r.Topic, r.Payload, r.PacketID = KindRelease, "", nil, 5
	}
	return r
}

func compareHistory(t *testing.T, l *Log, rng *rand.Rand, rounds int) {
	t.Helper()
	all := readAll(t, l, 0)
	for range rounds {
		q := randomQuery(rng, all)
		want := naive(all, q)
		var got []Record
		if err := l.History(t.Context(), q, func(r *Record) error { got = append(got, *r); return nil }); err != nil {
			t.Fatalf("%+v: %v", q, err)
		}
		same := slices.EqualFunc(got, want, func(a, b Record) bool {
			return a.Pos == b.Pos && string(a.Payload) == string(b.Payload) && a.From == b.From && a.Topic == b.Topic && a.Time == b.Time
		})
		if !same {
			t.Fatalf("%+v: %d records, a scan finds %d", q, len(got), len(want))
		}
	}
}

func randomQuery(rng *rand.Rand, all []Record) Query {
	q := Query{
		Name:    []string{"", "shop", "nobody", device(0).Name, device(1).Name, device(2).Name, "Not A Name"}[rng.IntN(7)],
		Filter:  []string{"", "", "#", "private/+/u/#", "private/+/d/cmd", "other/+"}[rng.IntN(6)],
		Limit:   []int{0, 0, 1, 7, 100}[rng.IntN(5)],
		Reverse: rng.IntN(2) == 0,
	}
	pick := func() time.Time { return time.UnixMilli(all[rng.IntN(len(all))].Time) }
	if rng.IntN(2) == 0 {
		q.Since = pick()
	}
	if rng.IntN(2) == 0 {
		q.Until = pick()
	}
	return q
}

func naive(all []Record, q Query) []Record {
	var out []Record
	for _, r := range all {
		mine := q.Name == "" || q.Name == r.From.Name
		if id, _, ok := identity.DeviceTopic(r.Topic); ok && r.From.Kind != identity.Device && id.String() == q.Name {
			mine = true
		}
		at := time.UnixMilli(r.Time)
		in := (q.Since.IsZero() || !at.Before(q.Since)) && (q.Until.IsZero() || at.Before(q.Until))
		if r.Kind == KindPublish && mine && in && (q.Filter == "" || identity.Match(q.Filter, r.Topic)) {
			out = append(out, r)
		}
	}
	if q.Reverse {
		slices.Reverse(out)
	}
	if q.Limit > 0 && len(out) > q.Limit {
		out = out[:q.Limit]
	}
	return out
}

// BenchmarkHistory reads the last 1,000 records of one device among many. Size
// it with HAWSER_HISTORY_RECORDS and HAWSER_HISTORY_DEVICES.
func BenchmarkHistory(b *testing.B) {
	records, devices := envInt(b, "HAWSER_HISTORY_RECORDS", 200_000), envInt(b, "HAWSER_HISTORY_DEVICES", 100)
	cfg := testConfig(b)
	create(b, cfg)
	l := open(b, cfg, State{}, Hooks{})
	fillHistory(b, l, records, devices)
	name := device(devices / 2).Name
	b.Run("last-1000", func(b *testing.B) {
		benchQuery(b, l, Query{Name: name, Limit: 1000, Reverse: true}, min(1000, records/devices))
	})
	b.Run("all", func(b *testing.B) { benchQuery(b, l, Query{Name: name}, records/devices) })
}

func benchQuery(b *testing.B, l *Log, q Query, want int) {
	debug.FreeOSMemory()
	before := rss(b)
	var slowest time.Duration
	for b.Loop() {
		start := time.Now()
		n := 0
		if err := l.History(context.Background(), q, func(*Record) error { n++; return nil }); err != nil || n != want {
			b.Fatal(n, err)
		}
		slowest = max(slowest, time.Since(start))
	}
	b.ReportMetric(float64(slowest.Microseconds())/1000, "slowest-ms")
	b.ReportMetric(float64(rss(b)-before)/(1<<20), "RSS-growth-MiB")
}

package msglog

import (
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkLone is one producer that waits for each record; it reports the p50
// beside that of an fdatasync of as many bytes on the same disk.
func BenchmarkLone(b *testing.B) {
	cfg := testConfig(b)
	create(b, cfg)
	l := open(b, cfg, State{}, Hooks{})
	done := make(chan error, 1)
	r := publish(device(1), "private/A0000001/u/t", string(make([]byte, 100)), ownerFunc(func(_ *Record, err error) { done <- err }))
	var took []time.Duration
	for b.Loop() {
		start := time.Now()
		if err := l.Append(r); err != nil {
			b.Fatal(err)
		}
		if err := <-done; err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	sync := fdatasyncP50(b)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
	b.ReportMetric(float64(sync.Microseconds()), "fdatasync-p50-µs")
	b.ReportMetric(float64((2*sync + 500*time.Microsecond).Microseconds()), "goal-µs")
}

type ownerFunc func(*Record, error)

func (f ownerFunc) Stored(r *Record, err error) { f(r, err) }

func fdatasyncP50(b *testing.B) time.Duration {
	f, err := os.Create(b.TempDir() + "/probe")
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	took := make([]time.Duration, 300)
	for i := range took {
		if _, err := f.Write(make([]byte, 200)); err != nil {
			b.Fatal(err)
		}
		start := time.Now()
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			b.Fatal(err)
		}
		took[i] = time.Since(start)
	}
	slices.Sort(took)
	return took[len(took)/2]
}

// BenchmarkFlatOut is 100 producers of 100 bytes that do not wait for each
// other: each has up to 10 (window) or any number (open) of records under way.
func BenchmarkFlatOut(b *testing.B) {
	for _, window := range []int{10, 1000} {
		b.Run(fmt.Sprintf("window=%d", window), func(b *testing.B) { flatOut(b, window) })
	}
}

type windowOwner chan struct{}

func (w windowOwner) Stored(_ *Record, err error) {
	if err != nil {
		panic(err)
	}
	<-w
}

func flatOut(b *testing.B, window int) {
	cfg := testConfig(b)
	create(b, cfg)
	l := open(b, cfg, State{}, Hooks{})
	const producers = 100
	payload := make([]byte, 100)
	b.ReportAllocs()
	cpu := cpuTime()
	b.ResetTimer()
	var wg sync.WaitGroup
	for p := range producers {
		wg.Go(func() {
			w := make(windowOwner, window)
			r := &Record{Kind: KindPublish, From: device(p), Topic: "private/A0000001/u/t", Payload: payload, QoS: 1, Owner: w}
			for range b.N / producers {
				w <- struct{}{}
				if err := l.Append(r); err != nil {
					panic(err)
				}
			}
			for range window {
				w <- struct{}{}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	n := float64(b.N)
	b.ReportMetric(n/b.Elapsed().Seconds(), "records/s")
	b.ReportMetric(float64((cpuTime()-cpu).Nanoseconds())/n, "cpu-ns/record")
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRead reads the whole log from the store (not from memory). Size it
// with HAWSER_READ_RECORDS.
func BenchmarkRead(b *testing.B) {
	records := envInt(b, "HAWSER_READ_RECORDS", 300_000)
	cfg := testConfig(b)
	cfg.RingBytes = 1
	create(b, cfg)
	l := open(b, cfg, State{}, Hooks{})
	fillHistory(b, l, records, 100)
	debug.FreeOSMemory()
	before := rss(b)
	var peak int64
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		err := l.Read(b.Context(), 0, func(*Record) error {
			if n++; n%100_000 == 0 {
				peak = max(peak, rss(b))
			}
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "records/s")
	b.ReportMetric(float64(peak-before)/(1<<20), "RSS-growth-MiB")
}

// BenchmarkQueueRead is the return of a device whose queue holds three messages
// among those of 5,000 devices.
func BenchmarkQueueRead(b *testing.B) {
	cfg := testConfig(b)
	create(b, cfg)
	l := open(b, cfg, State{}, Hooks{Plan: func(recs []Record, q *QueuePlan) {
		for i := range recs {
			q.Add(recs[i].From.Name, i)
		}
	}})
	const devices = 5000
	for range 3 {
		fillHistory(b, l, devices, devices)
	}
	cpu := cpuTime()
	n := 0
	for b.Loop() {
		qs, err := l.QueueRead(device(n%devices).Name, 0, 32)
		if err != nil || len(qs) != 3 {
			b.Fatal(len(qs), err)
		}
		n++
	}
	b.ReportMetric(float64((cpuTime()-cpu).Microseconds())/float64(n), "cpu-µs/read")
}

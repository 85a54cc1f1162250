package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"hawser/internal/identity"
	"hawser/internal/msglog"
)

// historyFleet names the streams of the log that the history rows read.
const historyFleet = "00000000000000000000000000000bec"

// historyFigures is what the reading child prints.
type historyFigures struct {
	First  float64 // seconds of the first query after opening
	Worst  float64 // seconds of the slowest
	Peak   float64 // bytes that the peak of memory rose during the queries
	Stayed float64 // bytes that were still in use when the caches had expired
	Opened float64 // seconds that opening took
}

// history reads the newest records of some devices out of a large log, in a
// child, so that its memory is that of a log and nothing else.
func (r *runner) history(ctx context.Context) error {
	dir := filepath.Join(r.Cache, fmt.Sprintf("history-%d-%d", r.History, r.Writers))
	if _, err := os.Stat(dir + ".whole"); err != nil {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
		r.say("history: writing %d records of %d devices (once)", r.History, r.Writers)
		if err := r.child(ctx, nil, "write-history", dir, r.History, r.Writers); err != nil {
			return err
		}
		if err := os.WriteFile(dir+".whole", nil, 0o600); err != nil {
			return err
		}
	}
	var f historyFigures
	if err := r.child(ctx, &f, "read-history", dir, r.Tail, r.Writers); err != nil {
		return err
	}
	name := fmt.Sprintf("history: last %d of one device among %d records", r.Tail, r.History)
	r.report.add(name+", first query", "s", []float64{f.First}, nil)
	r.report.add(name, "s", []float64{f.Worst}, atMost(0.3))
	r.report.add("history: rise of memory during these queries", "MiB", []float64{f.Peak / (1 << 20)}, nil)
	r.report.add("history: rise of memory that stays after them", "MiB", []float64{f.Stayed / (1 << 20)}, atMost(16))
	r.report.add("history: opening that log", "s", []float64{f.Opened}, nil)
	return nil
}

// child runs this binary with a command, a directory and two numbers.
func (r *runner) child(ctx context.Context, out any, command, dir string, a, b int) error {
	cmd := exec.CommandContext(ctx, r.Self, command, dir, strconv.Itoa(a), strconv.Itoa(b))
	cmd.Stderr = r.Log
	text, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(text, out)
}

func historyConfig(dir string) msglog.Config { return msglog.Config{Fleet: historyFleet, Dir: dir} }

// WriteHistory makes a log of n records of 100 bytes, written by devices in turn.
func WriteHistory(ctx context.Context, dir string, n, devices int) error {
	if err := msglog.Create(ctx, historyConfig(dir)); err != nil {
		return err
	}
	l, err := msglog.Open(ctx, historyConfig(dir), msglog.State{})
	if err != nil {
		return err
	}
	if err := l.Start(msglog.Hooks{}); err != nil {
		return err
	}
	const writers = 4 // each has its own devices
	var wg sync.WaitGroup
	errs := make([]error, writers)
	for w := range writers {
		wg.Go(func() { errs[w] = writeRecords(l, n/writers, w, writers, devices) })
	}
	wg.Wait()
	return errors.Join(errors.Join(errs...), l.Close(context.WithoutCancel(ctx)))
}

// writeRecords appends n records of the devices w, w+step, ... one after the other.
func writeRecords(l *msglog.Log, n, w, step, devices int) error {
	payload := make([]byte, 100)
	type writer struct {
		who   identity.Principal
		topic string
	}
	var list []writer
	for d := w; d < devices; d += step {
		id := firstID + identity.ID(d)
		list = append(list, writer{identity.DevicePrincipal(id), id.Topic("u/t")})
	}
	for i := range n {
		d := &list[i%len(list)]
		r := msglog.Record{Kind: msglog.KindPublish, From: d.who, Topic: d.topic, Payload: payload, QoS: 1}
		if err := l.Append(&r); err != nil {
			return err
		}
	}
	return nil
}

// ReadHistory opens that log, reads the newest tail records of twenty devices
// and prints the figures.
func ReadHistory(ctx context.Context, dir string, tail, devices int) error {
	start := time.Now()
	l, err := msglog.Open(ctx, historyConfig(dir), msglog.State{})
	if err != nil {
		return err
	}
	if err := l.Start(msglog.Hooks{}); err != nil {
		return err
	}
	f := historyFigures{Opened: time.Since(start).Seconds()}
	if err := settle(os.Getpid(), 20*time.Second); err != nil {
		return err
	}
	peak, before, err := ownMemory()
	if err != nil {
		return err
	}
	const queries = 20
	for i := range queries {
		took, err := readTail(ctx, l, firstID+identity.ID(i*devices/queries), tail)
		if err != nil {
			return err
		}
		if f.Worst = max(f.Worst, took); i == 0 {
			f.First = took
		}
	}
	if f.Peak, err = memory(os.Getpid(), "VmHWM"); err != nil {
		return err
	}
	f.Peak -= peak
	time.Sleep(15 * time.Second) // JetStream drops the blocks that it read after 10 s
	_, after, err := ownMemory()
	if err != nil {
		return err
	}
	f.Stayed = after - before
	return errors.Join(l.Close(ctx), json.NewEncoder(os.Stdout).Encode(f))
}

// ownMemory is the peak of this process so far, and what it holds after a
// garbage collection.
func ownMemory() (peak, held float64, err error) {
	if peak, err = memory(os.Getpid(), "VmHWM"); err != nil {
		return 0, 0, err
	}
	debug.FreeOSMemory()
	debug.FreeOSMemory() // twice: a sync.Pool survives one
	held, err = memory(os.Getpid(), "VmRSS")
	return peak, held, err
}

func readTail(ctx context.Context, l *msglog.Log, id identity.ID, tail int) (float64, error) {
	start, n := time.Now(), 0
	err := l.History(ctx, msglog.Query{Name: id.String(), Limit: tail, Reverse: true}, func(*msglog.Record) error { n++; return nil })
	if err == nil && n != tail {
		err = fmt.Errorf("device %s: %d records instead of %d", id, n, tail)
	}
	return time.Since(start).Seconds(), err
}

package msglog

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

func envInt(t testing.TB, name string, d int) int {
	s := os.Getenv(name)
	if s == "" {
		return d
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// fillHistory appends records of 100 bytes, evenly over devices, and waits
// until they are in chunks.
func fillHistory(t testing.TB, l *Log, records, devices int) {
	t.Helper()
	w := make(windowOwner, 20_000)
	payload := make([]byte, 100)
	for i := range records {
		p := device(i % devices)
		w <- struct{}{}
		r := &Record{Kind: KindPublish, From: p, Topic: "private/" + p.Name + "/u/t", Payload: payload, QoS: 1, Owner: w}
		if err := l.Append(r); err != nil {
			t.Fatal(err)
		}
	}
	for range cap(w) {
		w <- struct{}{}
	}
	within(t, 10*time.Minute, "chunker caught up", func() bool {
		l.chunks.mu.Lock()
		defer l.chunks.mu.Unlock()
		return l.chunks.pos >= MakePos(l.End().Frame()-1, 0)
	})
}

// rss is what this process has in memory now, in bytes.
func rss(t testing.TB) int64 {
	raw, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(raw))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

package msglog

import (
	"os"
	"strconv"
	"syscall"
	"testing"
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

// maxRSS is the peak of this process in bytes.
func maxRSS(t testing.TB) int64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return u.Maxrss << 10
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
	eventually(t, "chunker caught up", func() bool {
		l.chunks.mu.Lock()
		defer l.chunks.mu.Unlock()
		return l.chunks.pos >= MakePos(l.End().Frame()-1, 0)
	})
}

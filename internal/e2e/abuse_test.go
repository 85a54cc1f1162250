package e2e

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// meter is an admitted device that publishes at QoS 1, one message after the other.
type meter struct {
	t *testing.T
	c *client
	n int
}

// publish sends count messages and gives the 99th percentile of the time to PUBACK.
func (m *meter) publish(count int) (p99 time.Duration) {
	m.t.Helper()
	took := make([]time.Duration, 0, count)
	for range count {
		m.n++
		start := time.Now()
		if err := m.c.publishWait("private/ABCD1234/u/t", fmt.Sprint("n", m.n), uint16(m.n%65535+1)); err != nil {
			m.t.Fatalf("message %d: %v", m.n, err)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	return took[len(took)*99/100]
}

// memory reads a figure of /proc/PID/status, in bytes.
func (s *server) memory(what string) (n int64) {
	s.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.SplitSeq(string(text), "\n") {
		if rest, ok := strings.CutPrefix(line, what+":"); ok {
			if _, err := fmt.Sscanf(rest, "%d kB", &n); err != nil {
				s.t.Fatal(err)
			}
		}
	}
	return n << 10
}

// raw opens a TCP connection without a word.
func raw(ctx context.Context, addr string) (net.Conn, error) {
	return (&net.Dialer{Timeout: patience}).DialContext(ctx, "tcp", addr)
}

// attack is what strangers do for as long as ctx lasts: each of hold connections ends
// with one, and is made again.
type attack struct {
	name string
	hold int // connections at a time
	one  func(ctx context.Context, addr string) error
}

// hello is how a ClientHello begins: a TLS record of 512 bytes.
var hello = append([]byte{0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}, make([]byte, 501)...)

var attacks = []attack{
	{"garbage", 8, func(ctx context.Context, addr string) error {
		select { // hostile, but no flood: that is the rate limit's, which spares loopback
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil
		}
		c, err := raw(ctx, addr)
		if err != nil {
			return err
		}
		defer c.Close()
		junk := make([]byte, 20<<10)
		rand.Read(junk)
		if junk[0]%2 == 0 {
			copy(junk, []byte{0x16, 3, 1, 0x40, 0})
		}
		_, _ = c.Write(junk) // it hangs up in the middle
		_, _ = io.Copy(io.Discard, c)
		return nil
	}},
	{"slow-loris", 500, func(ctx context.Context, addr string) error {
		c, err := raw(ctx, addr)
		if err != nil {
			return err
		}
		defer c.Close()
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for _, b := range hello {
			if _, err := c.Write([]byte{b}); err != nil {
				return nil // hung up on
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return nil
			}
		}
		return nil
	}},
	{"half-open", 1000, func(ctx context.Context, addr string) error {
		c, err := raw(ctx, addr)
		if err != nil {
			return err
		}
		defer c.Close()
		_, _ = c.Write(hello[:100]) // and then neither a byte nor an end, whatever the server does
		<-ctx.Done()
		return nil
	}},
	{"idle", 10_000, func(ctx context.Context, addr string) error {
		c, err := raw(ctx, addr)
		if err != nil {
			return err
		}
		defer c.Close()
		stop := context.AfterFunc(ctx, func() { c.Close() })
		defer stop()
		_, _ = io.Copy(io.Discard, c) // until it is hung up on
		return nil
	}},
}

// start keeps so many connections going until ctx ends; reached is closed when that
// many have been opened.
func (a attack) start(ctx context.Context, t *testing.T, addr string) (reached chan struct{}, wait func()) {
	reached = make(chan struct{})
	var opened atomic.Int64
	var wg sync.WaitGroup
	for range a.hold {
		wg.Go(func() {
			for ctx.Err() == nil {
				if opened.Add(1) == int64(a.hold) {
					close(reached)
				}
				if err := a.one(ctx, addr); err != nil && ctx.Err() == nil && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%s: %v", a.name, err)
					return
				}
				if a.name == "idle" {
					<-ctx.Done() // once is what was asked for
				}
			}
		})
	}
	return reached, wg.Wait
}

// TestStrangers: garbage, slow-loris, half-open connections and ten thousand idle ones
// that never show a certificate. An admitted device publishes at QoS 1 all the while.
func TestStrangers(t *testing.T) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Max < 12_000 {
		t.Skipf("ten thousand connections need more than %d descriptors: %v", limit.Max, err)
	}
	const count, maxRatio = 1000, 20
	f := newFleet(t)
	f.fast()
	dir := f.device("ABCD1234")
	s := f.serve()
	m := &meter{t: t, c: mustDial(t, s, dir, "ABCD1234")}
	m.publish(count)
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			m.t = t
			before := m.publish(count)
			memory := s.memory("VmRSS")
			ctx, cancel := context.WithCancel(context.Background())
			reached, wait := a.start(ctx, t, s.addr)
			opening := m.publish(count) // while they come in
			<-reached
			during := m.publish(count)
			for range 4 { // others use this machine, too: the best of five is ours
				if during <= before*maxRatio {
					break
				}
				during = min(during, m.publish(count))
			}
			peak := s.memory("VmHWM")
			cancel()
			wait()
			t.Logf("PUBACK p99 %v before, %v while they come, %v while they stand; memory %d MiB before, %d MiB at most",
				before, opening, during, memory>>20, peak>>20)
			if during > before*maxRatio {
				t.Errorf("PUBACK p99 was %v and is %v", before, during)
			}
			if peak-memory > memoryRoom {
				t.Errorf("memory was %d MiB and went to %d MiB", memory>>20, peak>>20)
			}
		})
	}
	m.t = t
	m.publish(1)
	seen := map[string]int{}
	for _, msg := range f.tail("ABCD1234", "--topic", "private/+/u/t") {
		seen[string(msg.Payload)]++
	}
	for i := range m.n {
		if want := fmt.Sprintf(`"%x"`, fmt.Sprint("n", i+1)); seen[want] != 1 {
			t.Fatalf("message %d was acknowledged and is in the log %d times", i+1, seen[want])
		}
	}
	t.Logf("%d messages acknowledged, all in the log", m.n)
}

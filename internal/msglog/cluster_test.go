package msglog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// cluster is three servers, each a process of its own.
type cluster struct {
	t     *testing.T
	ports [6]int // three for clients, three for routes
	dir   string
	procs [3]*exec.Cmd
	stdin [3]io.Closer
	lazy  bool // without sync_interval: always
}

func newCluster(t *testing.T, lazy bool) *cluster {
	t.Helper()
	c := &cluster{t: t, dir: t.TempDir(), lazy: lazy}
	var hold []net.Listener
	for i := range c.ports {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		c.ports[i] = ln.Addr().(*net.TCPAddr).Port
		hold = append(hold, ln)
	}
	for _, ln := range hold {
		ln.Close()
	}
	for i := range c.procs {
		c.start(i)
	}
	return c
}

func (c *cluster) start(i int) {
	c.t.Helper()
	var routes []string
	for _, p := range c.ports[3:] {
		routes = append(routes, fmt.Sprintf("nats://127.0.0.1:%d", p))
	}
	env := []string{
		fmt.Sprintf("HAWSER_TEST_NAME=n%d", i), fmt.Sprintf("HAWSER_TEST_PORT=%d", c.ports[i]),
		fmt.Sprintf("HAWSER_TEST_CLUSTER_PORT=%d", c.ports[3+i]), "HAWSER_TEST_ROUTES=" + strings.Join(routes, ","),
		"HAWSER_TEST_DIR=" + filepath.Join(c.dir, fmt.Sprint(i)),
	}
	if c.lazy {
		env = append(env, "HAWSER_TEST_LAZY=1")
	}
	cmd, out, in := childWithInput(c.t, "server", env...)
	if !out.Scan() || out.Text() != "up" {
		c.t.Fatalf("server %d does not start: %q", i, out.Text())
	}
	go func() {
		for out.Scan() {
		}
	}()
	c.procs[i], c.stdin[i] = cmd, in
}

func (c *cluster) kill(i int) {
	c.t.Helper()
	if err := c.procs[i].Process.Kill(); err != nil {
		c.t.Fatal(err)
	}
	_ = c.procs[i].Wait() // it was killed
}

func (c *cluster) url(user string) string {
	var urls []string
	for _, p := range c.ports[:3] {
		urls = append(urls, fmt.Sprintf("nats://%s:%s@127.0.0.1:%d", user, user, p))
	}
	return strings.Join(urls, ",")
}

func (c *cluster) config(t *testing.T) Config {
	return Config{
		Fleet: testFleet, NATSURL: c.url("app"), NATSSystemURL: c.url("sys"), Logger: testLogger(t), Holder: "first",
		LeaseFor: 6 * time.Second, RetryFor: 60 * time.Second, ChunkAge: 50 * time.Millisecond, RingBytes: 1,
	}
}

// createSoon waits until the cluster has elected its meta leader.
func createSoon(t *testing.T, cfg Config) {
	t.Helper()
	var last error
	eventually(t, "streams in the cluster", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		last = Create(ctx, cfg)
		if last != nil && !errors.Is(last, ErrExists) {
			t.Log(last)
		}
		return last == nil || errors.Is(last, ErrExists)
	})
}

// leader gives the index of the server that leads the log stream, -1 for none.
func (c *cluster) leader(l *Log) int {
	var in struct {
		Cluster struct {
			Leader   string `json:"leader"`
			Replicas []struct {
				Current bool `json:"current"`
			} `json:"replicas"`
		} `json:"cluster"`
	}
	if err := l.store.api(context.Background(), "STREAM.INFO."+l.names.log, struct{}{}, &in); err != nil {
		return -1
	}
	current := 0
	for _, r := range in.Cluster.Replicas {
		if r.Current {
			current++
		}
	}
	var i int
	if _, err := fmt.Sscanf(in.Cluster.Leader, "n%d", &i); err != nil || current < 2 {
		return -1
	}
	return i
}

// Twelve times the leader of the log is killed: nothing acknowledged is lost,
// nothing is there twice.
func TestKillLeader(t *testing.T) {
	t.Parallel()
	c := newCluster(t, false)
	cfg := c.config(t)
	createSoon(t, cfg)
	l := open(t, cfg, State{}, Hooks{})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	acked := map[string][]string{} // guarded by mu
	progress := make(chan struct{}, 1)
	for p := range 4 {
		wg.Go(func() {
			done := make(chan error, 1)
			o := ownerFunc(func(r *Record, err error) { done <- err })
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				text := fmt.Sprint(i)
				if err := l.Append(publish(device(p), "private/x/u/t", text, o)); err != nil {
					t.Error(err)
					return
				}
				if err := <-done; err != nil {
					t.Error(err)
					continue
				}
				mu.Lock()
				acked[device(p).Name] = append(acked[device(p).Name], text)
				mu.Unlock()
				signal(progress)
			}
		})
	}
	for range 12 {
		for range 20 {
			<-progress
		}
		var leader int
		eventually(t, "a leader with two replicas", func() bool { leader = c.leader(l); return leader >= 0 })
		c.kill(leader)
		for range 20 {
			<-progress // the other two go on
		}
		c.start(leader)
	}
	close(stop)
	wg.Wait()
	check := func(l *Log) {
		t.Helper()
		have := map[string][]string{}
		for _, r := range readAll(t, l, 0) {
			have[r.From.Name] = append(have[r.From.Name], string(r.Payload))
		}
		n := 0
		for name, want := range acked {
			containsInOrder(t, name, have[name], want)
			n += len(want)
		}
		t.Logf("%d records acknowledged over 12 kills of the leader, the longest commit took %v", n, l.Stats(t.Context()).CommitMax)
	}
	check(l)
	state := l.State()
	shut(t, l)
	check(open(t, cfg, state, Hooks{}))
}

// A start waits for a cluster that has no leader at the moment.
func TestOpenWaitsForALeader(t *testing.T) {
	t.Parallel()
	c := newCluster(t, false)
	cfg := c.config(t)
	createSoon(t, cfg)
	c.kill(0)
	c.kill(1)
	opened := make(chan error, 1)
	go func() {
		l, err := Open(t.Context(), cfg, State{})
		if err == nil {
			err = l.Close(t.Context())
		}
		opened <- err
	}()
	select {
	case err := <-opened:
		t.Fatalf("one server of three answered: %v", err)
	case <-time.After(requestTimeout + time.Second): // a first attempt has failed
	}
	c.start(0)
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
}

// A second server on the same fleet is refused, and a lease that was given back
// or has expired is taken.
func TestLease(t *testing.T) {
	t.Parallel()
	c := newCluster(t, true)
	cfg := c.config(t)
	var said syncBuffer
	cfg.Logger = slog.New(slog.NewTextHandler(&said, nil))
	createSoon(t, cfg)
	if err := Create(t.Context(), cfg); !errors.Is(err, ErrExists) {
		t.Errorf("second Create: %v", err)
	}
	l := open(t, cfg, State{}, Hooks{})
	if !strings.Contains(said.String(), "unverified") || !strings.Contains(said.String(), "does not") {
		t.Errorf("a cluster that does not fsync: %s", said.String())
	}
	mustAppend(t, l, device(1), 0, 5)
	second := cfg
	second.Holder = "second"
	if _, err := Open(t.Context(), second, State{}); !errors.Is(err, ErrLeased) || !strings.Contains(err.Error(), "first") {
		t.Fatalf("a second server: %v", err)
	}
	shut(t, l)
	l2, err := Open(t.Context(), second, State{})
	if err != nil {
		t.Fatal(err)
	}
	// A holder that died without giving it back: its lease runs out.
	l2.lease.seq.Store(0)
	l2.stop()
	shut(t, l2)
	l3 := open(t, cfg, State{}, Hooks{})
	// A server that went on although another writes finds a foreign frame.
	if err := l3.store.purge(t.Context(), l3.names.lease, l3.names.holder, 0); err != nil {
		t.Fatal(err)
	}
	l4 := open(t, second, State{}, Hooks{})
	mustAppend(t, l4, device(2), 0, 1)
	f := newFates()
	if err := l3.Append(publish(device(1), "a", "late", f)); err == nil {
		f.wait(1)
	}
	if len(f.good) != 0 || !errors.Is(l3.Healthy(), ErrLeased) {
		t.Errorf("the fenced server: %v, stored %d", l3.Healthy(), len(f.good))
	}
	if got := readAll(t, l4, 0); len(got) != 6 {
		t.Errorf("%d records", len(got))
	}
}

func TestVerifiedSync(t *testing.T) {
	t.Parallel()
	c := newCluster(t, false)
	cfg := c.config(t)
	var said syncBuffer
	cfg.Logger = slog.New(slog.NewTextHandler(&said, nil))
	createSoon(t, cfg)
	shut(t, open(t, cfg, State{}, Hooks{}))
	if strings.Contains(said.String(), "unverified") {
		t.Errorf("a cluster that fsyncs: %s", said.String())
	}
	cfg.NATSSystemURL = ""
	shut(t, open(t, cfg, State{}, Hooks{}))
	if !strings.Contains(said.String(), "unverified") {
		t.Error("nobody was told that sync_interval is unverified")
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (s *syncBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

package msglog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	natsd "github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// backUp copies a log to dir. meanwhile is called between the queues and the frames.
func backUp(t *testing.T, l *Log, dir string, meanwhile func()) (requeue uint64) {
	t.Helper()
	spool, err := os.Create(filepath.Join(t.TempDir(), "spool"))
	if err != nil {
		t.Fatal(err)
	}
	defer spool.Close()
	var streams []string
	requeue, err = l.Backup(t.Context(), spool, func(name string, r io.Reader) error {
		if meanwhile != nil {
			meanwhile()
			meanwhile = nil
		}
		streams = append(streams, name)
		f, err := os.Create(filepath.Join(filepath.Dir(spool.Name()), name))
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(f, r)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	next := func() (string, io.Reader, error) {
		if len(streams) == 0 {
			return "", nil, io.EOF
		}
		name := streams[0]
		streams = streams[1:]
		f, err := os.Open(filepath.Join(filepath.Dir(spool.Name()), name))
		t.Cleanup(func() { f.Close() })
		return name, f, err
	}
	if err := Restore(t.Context(), Config{Fleet: testFleet, Dir: dir}, next); err != nil {
		t.Fatal(err)
	}
	return requeue
}

// writers append from ten goroutines until the test says stop. The longest time
// without an acknowledgement is measured.
type writers struct {
	mu    sync.Mutex
	acked map[string][]string // guarded by mu
	total int                 // guarded by mu
	last  time.Time           // guarded by mu
	gap   time.Duration       // guarded by mu
	more  *sync.Cond
	stop  context.CancelFunc
	wg    sync.WaitGroup
}

func startWriters(t *testing.T, l *Log, size int) *writers {
	ctx, stop := context.WithCancel(t.Context())
	w := &writers{acked: map[string][]string{}, stop: stop, last: time.Now()}
	w.more = sync.NewCond(&w.mu)
	pad := strings.Repeat("x", size)
	for p := range 10 {
		w.wg.Add(1)
		go func() {
			defer w.wg.Done()
			done := make(chan error, 1)
			for i := 0; ctx.Err() == nil; i++ {
				text := fmt.Sprintf("%d/%s", i, pad)
				o := ownerFunc(func(_ *Record, err error) { done <- err })
				if err := l.Append(publish(device(p), "private/"+device(p).Name+"/u/t", text, o)); err != nil {
					t.Error(err)
					return
				}
				if err := <-done; err != nil {
					t.Error(err)
					return
				}
				w.note(device(p).Name, text)
			}
		}()
	}
	return w
}

func (w *writers) note(name, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.acked[name] = append(w.acked[name], text)
	w.total++
	w.gap = max(w.gap, time.Since(w.last))
	w.last = time.Now()
	w.more.Broadcast()
}

// wait returns when n more records were acknowledged, and what was by then.
func (w *writers) wait(n int) map[string]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	for want := w.total + n; w.total < want; {
		w.more.Wait()
	}
	w.gap = 0
	counts := map[string]int{}
	for name, list := range w.acked {
		counts[name] = len(list)
	}
	return counts
}

func (w *writers) end() {
	w.stop()
	w.wg.Wait()
}

func queueAll() Hooks {
	return Hooks{Plan: func(recs []Record, q *QueuePlan) {
		for i := range recs {
			q.Add(recs[i].From.Name, i)
		}
	}}
}

// A backup under load: everything acknowledged before it began is there after a
// restore, in the frames, the queues and the history, and a later start is like any.
func TestBackupUnderLoad(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t)
	cfg.ChunkAge = 5 * time.Millisecond
	create(t, cfg)
	l := open(t, cfg, State{}, queueAll())
	w := startWriters(t, l, 1000)
	before := w.wait(3000)
	known := l.State()
	l.QueueAck(device(3).Name, known.Queue.Last/2)
	dir := filepath.Join(t.TempDir(), "log")
	requeue := backUp(t, l, dir, func() { w.wait(500) })
	w.mu.Lock()
	gap := w.gap
	w.mu.Unlock()
	w.end()
	end := l.End()
	cfg.Dir, cfg.Requeue = dir, requeue
	again, err := Open(t.Context(), cfg, known)
	if err != nil {
		t.Fatal(err)
	}
	defer shut(t, again)
	if again.queues.done >= again.End().Frame()-1 {
		t.Fatal("no frame came between the queues and the frames: nothing is tested")
	}
	if err := again.Start(queueAll()); err != nil {
		t.Fatal(err)
	}
	log := map[string][]string{}
	for _, r := range readAll(t, again, 0) {
		log[r.From.Name] = append(log[r.From.Name], string(r.Payload))
	}
	for name, n := range before {
		containsInOrder(t, "log of "+name, log[name], w.acked[name][:n])
		got := strings.Join(queueOf(t, again, name), " ")
		if have := strings.Join(log[name], " "); got != have && (name != device(3).Name || !strings.HasSuffix(have, got)) {
			t.Errorf("queue of %s holds %d bytes, the log %d", name, len(got), len(have))
		}
		var hist []string
		err := again.History(t.Context(), Query{Name: name}, func(r *Record) error { hist = append(hist, string(r.Payload)); return nil })
		if err != nil || strings.Join(hist, " ") != strings.Join(log[name], " ") {
			t.Errorf("history of %s holds %d records, the log %d: %v", name, len(hist), len(log[name]), err)
		}
	}
	t.Logf("%d frames, %d of them without queue messages; longest time between two acknowledgements %v",
		end.Frame()-1, again.End().Frame()-requeue, gap)
}

// While Q is copied nothing is removed from it, and a device's queue that is
// dropped meanwhile is gone afterwards.
func TestDropWaitsForTheCopy(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t)
	create(t, cfg)
	l := open(t, cfg, State{}, queueAll())
	f := newFates()
	for i := range 5 {
		if err := l.Append(publish(device(1), "a", fmt.Sprint(i), f)); err != nil {
			t.Fatal(err)
		}
	}
	f.wait(5)
	l.queues.removing.Lock()
	dropped := make(chan error, 1)
	go func() { _, err := l.QueueDrop(device(1).Name); dropped <- err }()
	if l.queues.removing.TryRLock() {
		t.Fatal("the lock is not held")
	}
	if n := len(queueOf(t, l, device(1).Name)); n == 0 {
		t.Error("the queue was dropped during the copy")
	}
	l.queues.removing.Unlock()
	if err := <-dropped; err != nil {
		t.Fatal(err)
	}
	if n := len(queueOf(t, l, device(1).Name)); n != 0 {
		t.Errorf("%d messages are left", n)
	}
}

// An outside cluster: copied while it is written to, and restored where none of the
// streams is; where one is, nothing is done.
func TestBackupOfACluster(t *testing.T) {
	t.Parallel()
	c := newCluster(t, false)
	cfg := c.config(t)
	createSoon(t, cfg)
	l := open(t, cfg, State{}, queueAll())
	w := startWriters(t, l, 200)
	before := w.wait(300)
	known := l.State()
	data := map[string][]byte{}
	spool, err := os.Create(filepath.Join(t.TempDir(), "spool"))
	if err != nil {
		t.Fatal(err)
	}
	defer spool.Close()
	requeue, err := l.Backup(t.Context(), spool, func(name string, r io.Reader) (err error) {
		data[name], err = io.ReadAll(r)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	w.end()
	shut(t, l)
	restore := func() error {
		list := BackupStreams()
		return Restore(t.Context(), cfg, func() (string, io.Reader, error) {
			if len(list) == 0 {
				return "", nil, io.EOF
			}
			name := list[0]
			list = list[1:]
			return name, bytes.NewReader(data[name]), nil
		})
	}
	if err := restore(); !errors.Is(err, ErrExists) {
		t.Fatalf("a restore over streams: %v", err)
	}
	s := &store{cfg: &cfg, logger: &natsLogger{log: cfg.Logger}}
	if err := cfg.setDefaults(); err != nil {
		t.Fatal(err)
	}
	if err := s.connect(); err != nil {
		t.Fatal(err)
	}
	n := namesOf(cfg.Fleet)
	s.removeStreams(t.Context(), append(n.streams(), n.lease))
	s.close()
	good := data[shortLog]
	data[shortLog] = good[:len(good)-10]
	if err := restore(); err == nil || errors.Is(err, ErrExists) {
		t.Fatalf("a stream that was cut off: %v", err)
	}
	data[shortLog] = good
	if err := restore(); err != nil {
		t.Fatalf("after a restore that failed: %v", err)
	}
	cfg.Requeue = requeue
	again := open(t, cfg, known, queueAll())
	log := map[string][]string{}
	for _, r := range readAll(t, again, 0) {
		log[r.From.Name] = append(log[r.From.Name], string(r.Payload))
	}
	for name, n := range before {
		containsInOrder(t, "log of "+name, log[name], w.acked[name][:n])
		if got := strings.Join(queueOf(t, again, name), " "); got != strings.Join(log[name], " ") {
			t.Errorf("queue of %s is not what the log holds", name)
		}
	}
}

// Retention rests while the log is copied: the copy begins where the registry, which
// was copied before, says that it begins.
func TestRetentionRestsDuringABackup(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t)
	cfg.RetainEvery = time.Hour
	create(t, cfg)
	l := open(t, cfg, State{}, Hooks{})
	f := newFates()
	for i := range 30 {
		if err := l.Append(publish(device(1), "a", fmt.Sprint(i), f)); err != nil {
			t.Fatal(err)
		}
		f.wait(i + 1)
	}
	l.keep.wantLog.Store(20)
	l.keep.savedLog.Store(20)
	dir := filepath.Join(t.TempDir(), "log")
	backUp(t, l, dir, func() {
		if err := l.retain(t.Context()); err != nil || l.First().Frame() != 1 {
			t.Errorf("during the copy retention went up to frame %d: %v", l.First().Frame(), err)
		}
	})
	if err := l.retain(t.Context()); err != nil || l.First().Frame() != 20 {
		t.Errorf("after the copy retention went up to frame %d: %v", l.First().Frame(), err)
	}
	cfg.Dir = dir
	again := open(t, cfg, State{}, Hooks{})
	if n := len(readAll(t, again, 0)); n != 30 || again.First().Frame() != 1 {
		t.Errorf("%d records from frame %d are restored", n, again.First().Frame())
	}
}

// TestChunkWaitsForItsListener: a restore's first chunk can come before the interest of the
// server that takes it, which is another one of the cluster.
func TestChunkWaitsForItsListener(t *testing.T) {
	t.Parallel()
	srv, err := natsd.NewServer(&natsd.Options{Host: "127.0.0.1", Port: -1, NoLog: true, NoSigs: true})
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	defer srv.Shutdown()
	eventually(t, "the server", func() bool { return srv.Addr() != nil })
	cfg := Config{NATSURL: srv.ClientURL(), Logger: testLogger(t)}
	s := &store{cfg: &cfg, logger: &natsLogger{log: cfg.Logger}}
	if err := s.connect(); err != nil {
		t.Fatal(err)
	}
	defer s.close()
	sent := make(chan error, 1)
	go func() { sent <- s.sendChunk(t.Context(), "restore", []byte("chunk")) }()
	eventually(t, "a chunk that nobody gets", func() bool { v, err := srv.Varz(nil); return err == nil && v.InMsgs > 0 })
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	got := make(chan string, 1)
	if _, err := nc.Subscribe("restore", func(m *nats.Msg) { got <- string(m.Data); _ = m.Respond(nil) }); err != nil {
		t.Fatal(err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if chunk := <-got; chunk != "chunk" {
		t.Errorf("got %q", chunk)
	}
}

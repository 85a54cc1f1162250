package msglog

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// The test binary is also the processes that are killed: HAWSER_TEST_CHILD
// names the part to play.
func TestMain(m *testing.M) {
	switch os.Getenv("HAWSER_TEST_CHILD") {
	case "":
		os.Exit(m.Run())
	case "ingest":
		exitOn(ingestChild())
	case "strace":
		exitOn(straceChild())
	case "server":
		exitOn(serverChild())
	}
}

func exitOn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// child starts this binary again in the given part.
func child(t *testing.T, part string, wrapper []string, env ...string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	argv := append(wrapper, os.Args[0])
	return startChild(t, exec.Command(argv[0], argv[1:]...), part, env...)
}

// childWithInput is child with a pipe to its standard input.
func childWithInput(t *testing.T, part string, env ...string) (*exec.Cmd, *bufio.Scanner, io.Closer) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	_, out := startChild(t, cmd, part, env...)
	return cmd, out, in
}

func startChild(t *testing.T, cmd *exec.Cmd, part string, env ...string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	cmd.Env = append(append(os.Environ(), "HAWSER_TEST_CHILD="+part), env...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill() // it may have ended by itself
			_ = cmd.Wait()
		}
	})
	return cmd, bufio.NewScanner(out)
}

func childLog() (*Log, error) {
	var known State
	if err := json.Unmarshal([]byte(os.Getenv("HAWSER_TEST_STATE")), &known); err != nil {
		return nil, err
	}
	cfg := Config{Fleet: testFleet, Dir: os.Getenv("HAWSER_TEST_DIR"), ChunkAge: 5 * time.Millisecond}
	return Open(context.Background(), cfg, known)
}

// ingestChild appends numbered records from ten goroutines until it is killed,
// and writes to standard output what was acknowledged and what State said.
func ingestChild() error {
	l, err := childLog()
	if err != nil {
		return err
	}
	var mu sync.Mutex
	say := func(s string) {
		mu.Lock()
		defer mu.Unlock()
		_, _ = io.WriteString(os.Stdout, s+"\n") // the reader may be gone: then so are we
	}
	hooks := Hooks{Plan: func(recs []Record, q *QueuePlan) {
		for i := range recs {
			q.Add(recs[i].From.Name, i)
		}
	}}
	if err := l.Start(hooks); err != nil {
		return err
	}
	run := os.Getenv("HAWSER_TEST_RUN")
	for p := range 10 {
		go func() {
			done := make(chan error, 1)
			o := ownerFunc(func(r *Record, err error) {
				if err == nil {
					say("ack " + r.From.Name + " " + string(r.Payload))
				}
				done <- err
			})
			for i := 0; ; i++ {
				if l.Append(publish(device(p), "private/"+device(p).Name+"/u/t", fmt.Sprintf("%s/%d", run, i), o)) != nil || <-done != nil {
					return
				}
			}
		}()
	}
	for range time.Tick(20 * time.Millisecond) {
		b, err := json.Marshal(l.State())
		if err != nil {
			return err
		}
		say("state " + string(b))
	}
	return nil
}

// Killed twenty times: everything acknowledged is there, once, in order; in the
// frames, in the queues and in the history.
func TestKill(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t)
	create(t, cfg)
	acked := map[string][]string{}
	state := "{}"
	total := 0
	for run := range 20 {
		cmd, out := child(t, "ingest", nil, "HAWSER_TEST_DIR="+cfg.Dir, "HAWSER_TEST_STATE="+state, fmt.Sprintf("HAWSER_TEST_RUN=%d", run))
		n := 0
		for out.Scan() {
			if s, ok := strings.CutPrefix(out.Text(), "state "); ok {
				state = s
				continue
			}
			f := strings.Fields(out.Text())
			acked[f[1]] = append(acked[f[1]], f[2])
			if n++; n == 200+run*37 {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := cmd.Wait(); n < 200+run*37 {
			t.Fatalf("run %d ended by itself after %d records: %v", run, n, err)
		}
		total += n
	}
	var known State
	if err := json.Unmarshal([]byte(state), &known); err != nil {
		t.Fatal(err)
	}
	if known.Frame == 0 || known.History.Last == 0 || known.Queue.Last == 0 {
		t.Errorf("the last state is %s", state)
	}
	l := open(t, cfg, known, Hooks{Plan: func(recs []Record, q *QueuePlan) {
		for i := range recs {
			q.Add(recs[i].From.Name, i)
		}
	}})
	log := map[string][]string{}
	for _, r := range readAll(t, l, 0) {
		log[r.From.Name] = append(log[r.From.Name], string(r.Payload))
	}
	for name, want := range acked {
		containsInOrder(t, "log of "+name, log[name], want)
		if got := queueOf(t, l, name); strings.Join(got, " ") != strings.Join(log[name], " ") {
			t.Errorf("queue of %s holds %d records, the log %d", name, len(got), len(log[name]))
		}
		var hist []string
		err := l.History(t.Context(), Query{Name: name}, func(r *Record) error { hist = append(hist, string(r.Payload)); return nil })
		if err != nil || strings.Join(hist, " ") != strings.Join(log[name], " ") {
			t.Errorf("history of %s holds %d records, the log %d: %v", name, len(hist), len(log[name]), err)
		}
	}
	t.Logf("%d records acknowledged over 20 kills", total)
}

func queueOf(t *testing.T, l *Log, name string) []string {
	t.Helper()
	return queueAfter(t, l, name, 0)
}

// queueAfter gives the payloads in a queue above a sequence.
func queueAfter(t *testing.T, l *Log, name string, after uint64) (out []string) {
	t.Helper()
	for {
		qs, err := l.QueueRead(name, after, 4)
		if err != nil {
			t.Fatal(err)
		}
		if len(qs) == 0 {
			return out
		}
		for _, q := range qs {
			after = q.Seq
			for _, r := range q.Recs {
				out = append(out, string(r.Payload))
			}
		}
	}
}

func containsInOrder(t *testing.T, what string, have, want []string) {
	t.Helper()
	seen := map[string]bool{}
	i := 0
	for _, s := range have {
		if seen[s] {
			t.Errorf("%s: %s is there twice", what, s)
		}
		seen[s] = true
		if i < len(want) && s == want[i] {
			i++
		}
	}
	if i < len(want) {
		t.Errorf("%s: %s was acknowledged and is not there (%d of %d found)", what, want[i], i, len(want))
	}
}

// straceChild appends one record after the other and writes a line to standard
// output in each Stored.
func straceChild() error {
	l, err := childLog()
	if err != nil {
		return err
	}
	if err := l.Start(Hooks{}); err != nil {
		return err
	}
	done := make(chan error, 1)
	o := ownerFunc(func(r *Record, err error) {
		if err == nil {
			_, err = os.Stdout.WriteString("ACK-" + string(r.Payload) + "\n")
		}
		done <- err
	})
	for i := range straceRecords {
		if err := l.Append(publish(device(1), "a", fmt.Sprintf("payload-%03d", i), o)); err != nil {
			return err
		}
		if err := <-done; err != nil {
			return err
		}
	}
	return l.Close(context.Background())
}

const straceRecords = 50

// What the kernel saw: the block file is written, then fsynced, then comes the
// acknowledgement.
func TestFsyncBeforeAcknowledgement(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed, so fsync before the acknowledgement is not shown")
	}
	cfg := testConfig(t)
	create(t, cfg)
	trace := t.TempDir() + "/trace"
	wrapper := []string{strace, "-f", "-qq", "-s", "4096", "-e", "trace=write,pwrite64,fsync,fdatasync", "-o", trace}
	cmd, out := child(t, "strace", wrapper, "HAWSER_TEST_DIR="+cfg.Dir, "HAWSER_TEST_STATE={}")
	n := 0
	for out.Scan() {
		n++
	}
	if err := cmd.Wait(); err != nil || n != straceRecords {
		t.Fatalf("%d acknowledgements: %v", n, err)
	}
	raw, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(raw), "\n")
	for i := range straceRecords {
		if err := syncedBeforeAck(lines, fmt.Sprintf("payload-%03d", i)); err != nil {
			t.Fatal(err)
		}
	}
}

// syncedBeforeAck finds the write of the payload to a file, the end of an fsync
// of the same file after it, and the acknowledgement after that.
func syncedBeforeAck(lines []string, payload string) error {
	fd, written, syncing := "", false, map[string]bool{}
	synced := false
	for _, line := range lines {
		pid, call, _ := strings.Cut(strings.TrimSpace(line), " ")
		call = strings.TrimSpace(call)
		switch {
		case strings.Contains(call, "ACK-"+payload):
			if !synced {
				return fmt.Errorf("%s was acknowledged before its fsync (written: %v)", payload, written)
			}
			return nil
		case strings.Contains(call, "write") && strings.Contains(call, payload):
			written, synced = true, false
			fd = call[strings.Index(call, "(")+1 : strings.Index(call, ",")]
		case strings.HasPrefix(call, "fsync("+fd+")") || strings.HasPrefix(call, "fdatasync("+fd+")"):
			synced = written && strings.HasSuffix(call, "= 0")
		case strings.HasPrefix(call, "fsync("+fd+" <unfinished") || strings.HasPrefix(call, "fdatasync("+fd+" <unfinished"):
			syncing[pid] = written
		case strings.Contains(call, "sync resumed>") && syncing[pid]:
			synced = synced || strings.HasSuffix(call, "= 0")
			delete(syncing, pid)
		}
	}
	return fmt.Errorf("%s was never acknowledged", payload)
}

// serverChild is one server of a cluster. It prints its client URL.
func serverChild() error {
	port, err := strconv.Atoi(os.Getenv("HAWSER_TEST_PORT"))
	if err != nil {
		return err
	}
	cport, err := strconv.Atoi(os.Getenv("HAWSER_TEST_CLUSTER_PORT"))
	if err != nil {
		return err
	}
	opts := &server.Options{
		ServerName: os.Getenv("HAWSER_TEST_NAME"), Host: "127.0.0.1", Port: port, NoSigs: true, NoLog: true,
		JetStream: true, StoreDir: os.Getenv("HAWSER_TEST_DIR"), SyncAlways: os.Getenv("HAWSER_TEST_LAZY") == "", SyncInterval: time.Minute,
		Cluster:   server.ClusterOpts{Name: "test", Host: "127.0.0.1", Port: cport},
		RoutesStr: os.Getenv("HAWSER_TEST_ROUTES"),
	}
	sys, app := server.NewAccount("SYS"), server.NewAccount("APP")
	opts.Accounts, opts.SystemAccount = []*server.Account{sys, app}, "SYS"
	opts.Users = []*server.User{{Username: "sys", Password: "sys", Account: sys}, {Username: "app", Password: "app", Account: app}}
	opts.Routes = server.RoutesFromStr(opts.RoutesStr)
	ns, err := server.NewServer(opts)
	if err != nil {
		return err
	}
	ns.Start()
	if err := ns.EnableJetStream(nil); err != nil && !ns.JetStreamEnabled() {
		return err
	}
	if acc, err := ns.LookupAccount("APP"); err == nil {
		if err := acc.EnableJetStream(nil, nil); err != nil {
			return err
		}
	}
	fmt.Println("up")
	_, err = io.Copy(io.Discard, os.Stdin) // until the test closes it
	ns.Shutdown()
	return err
}

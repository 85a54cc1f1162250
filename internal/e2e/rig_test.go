package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"hawser/internal/admin"
)

// patience bounds every wait for something that must happen.
const patience = 60 * time.Second

// hawser is the path of the program; TestMain sets it before any test runs.
var hawser string

func TestMain(m *testing.M) {
	if os.Getenv("HAWSER_E2E_NATS") != "" {
		exitOn(natsServer())
	}
	if spec := os.Getenv("HAWSER_E2E_KEY_IN_PARENT"); spec != "" {
		exitOn(keyInParent(spec))
	}
	if nth, err := strconv.Atoi(os.Getenv("HAWSER_E2E_POWER_CUT")); err == nil {
		exitOn(powerCut(nth, os.Args[1:]))
	}
	// A program that ends need not linger a second for races of its last moment, as it does by default.
	os.Setenv("GORACE", "halt_on_error=1 exitcode=66 atexit_sleep_ms=0")
	dir, err := os.MkdirTemp("", "hawser-e2e-")
	exitOn2(err)
	hawser = filepath.Join(dir, "hawser")
	args := append([]string{"build"}, raceFlags...)
	build := exec.Command("go", append(args, "-o", hawser, "hawser/cmd/hawser")...)
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	exitOn2(build.Run())
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func exitOn(err error) {
	exitOn2(err)
	os.Exit(0)
}

func exitOn2(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// needTools skips, and says which outside program is missing.
func needTools(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
}

// result is how a program ended.
type result struct {
	code           int
	stdout, stderr string
}

// run runs a program to its end.
func run(t testing.TB, name string, args ...string) result {
	t.Helper()
	return runWith(t, nil, name, args...)
}

func runWith(t testing.TB, stdin io.Reader, name string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var out, err bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &err
	var exit *exec.ExitError
	if e := cmd.Run(); e != nil && !errors.As(e, &exit) {
		t.Fatalf("%s %q: %v", name, args, e)
	}
	if ctx.Err() != nil {
		t.Fatalf("%s %q did not end: %s%s", name, args, out.String(), err.String())
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), err.String()}
}

// fleet is a trial fleet in a directory of its own.
type fleet struct {
	t   testing.TB
	dir string
}

func newFleet(t testing.TB, more ...string) *fleet {
	t.Helper()
	f := &fleet{t, filepath.Join(t.TempDir(), "fleet")}
	f.do(append([]string{"init", "--domain", "localhost", "--trial"}, more...)...)
	return f
}

func (f *fleet) path(elem ...string) string {
	return filepath.Join(append([]string{f.dir}, elem...)...)
}

// hawser runs one command on the fleet.
func (f *fleet) hawser(args ...string) result {
	f.t.Helper()
	return run(f.t, hawser, append(args, "--dir", f.dir)...)
}

// do is hawser for what must succeed.
func (f *fleet) do(args ...string) result {
	f.t.Helper()
	r := f.hawser(args...)
	if r.code != 0 {
		f.t.Fatalf("hawser %q: exit code %d\n%s", args, r.code, r.stderr)
	}
	return r
}

// device adds a device and gives the directory with its files.
func (f *fleet) device(id string) string {
	f.t.Helper()
	out := f.path("..", id)
	f.do("device", "add", "--id", id, "--out", out)
	return out
}

// service adds a service with grants and gives the directory with its files.
func (f *fleet) service(name string, grants ...string) string {
	f.t.Helper()
	out := f.path("..", name)
	args := []string{"service", "add", name, "--out", out}
	for _, g := range grants {
		args = append(args, "--grant", g)
	}
	f.do(args...)
	return out
}

// configure replaces one line of hawser.toml, the way an operator edits it.
func (f *fleet) configure(old, new string) {
	f.t.Helper()
	text, err := os.ReadFile(f.path("hawser.toml"))
	if err != nil {
		f.t.Fatal(err)
	}
	if !bytes.Contains(text, []byte(old)) {
		f.t.Fatalf("hawser.toml has no %q", old)
	}
	text = bytes.Replace(text, []byte(old), []byte(new), 1)
	if err := os.WriteFile(f.path("hawser.toml"), text, 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// fast lifts the rate of devices, where a test is not about it.
func (f *fleet) fast() {
	f.t.Helper()
	f.configure("messages_per_second = 50.0", "messages_per_second = 50000.0")
	f.configure(`bytes_per_second = "64KiB"`, `bytes_per_second = "64MiB"`)
	f.configure("log_share = 5.0", "log_share = 100.0")
}

// lines collects what a program writes; waiters see each addition.
type lines struct {
	mu      sync.Mutex
	text    bytes.Buffer  // guarded by mu
	changed chan struct{} // guarded by mu; closed and replaced by each Write
}

func newLines() *lines { return &lines{changed: make(chan struct{})} }

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.changed)
	l.changed = make(chan struct{})
	return l.text.Write(p)
}

func (l *lines) now() (string, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String(), l.changed
}

func (l *lines) String() string {
	s, _ := l.now()
	return s
}

// find gives the first line after offset from that holds all words, "" for none.
func (l *lines) find(from int, words ...string) string {
	for line := range strings.SplitSeq(l.String()[from:], "\n") {
		if hasAll(line, words) {
			return line
		}
	}
	return ""
}

func hasAll(s string, words []string) bool {
	for _, w := range words {
		if !strings.Contains(s, w) {
			return false
		}
	}
	return true
}

// await waits for a line with all words after offset from.
func (l *lines) await(t testing.TB, from int, words ...string) string {
	t.Helper()
	timeout := time.After(patience)
	for {
		_, changed := l.now()
		if line := l.find(from, words...); line != "" {
			return line
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("waited in vain for a line with %q in:\n%s", words, tailOf(l.String()))
		}
	}
}

func tailOf(s string) string { return s[max(0, len(s)-8000):] }

// server is a running "hawser serve".
type server struct {
	t     testing.TB
	f     *fleet
	cmd   *exec.Cmd
	log   *lines // standard error
	addr  string // of the broker
	admin *admin.Client
	ended chan struct{} // closed when the process is gone
}

// serve starts the server and waits until it accepts connections.
func (f *fleet) serve(wrapper ...string) *server {
	f.t.Helper()
	s := f.launch(wrapper...)
	select {
	case <-s.ended:
		f.t.Fatalf("serve: %v\n%s", s.cmd.ProcessState, tailOf(s.log.String()))
	default:
	}
	return s
}

// launch starts the server and waits until it accepts connections or has ended.
func (f *fleet) launch(wrapper ...string) *server {
	f.t.Helper()
	argv := append(wrapper, hawser, "serve", "--dir", f.dir, "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
	s := &server{t: f.t, f: f, cmd: exec.Command(argv[0], argv[1:]...), log: newLines(), ended: make(chan struct{})}
	s.cmd.Stderr = s.log
	out := newLines()
	s.cmd.Stdout = out
	if err := s.cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	go func() {
		_ = s.cmd.Wait() // its state is looked at by stop
		close(s.ended)
	}()
	s.admin = admin.NewClient(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", f.path("server", "admin.sock"))
	}, true)
	f.t.Cleanup(func() { s.cleanup() })
	timeout := time.After(patience)
	for {
		text, changed := out.now()
		if addr, ok := strings.CutPrefix(text, "ready "); ok && strings.HasSuffix(addr, "\n") {
			s.addr = strings.TrimSpace(addr)
			break
		}
		select {
		case <-changed:
			continue
		case <-s.ended:
		case <-timeout:
			_ = s.cmd.Process.Signal(syscall.SIGQUIT) // for the stacks
			<-s.ended
			f.t.Fatalf("serve is not ready")
		}
		break
	}
	return s
}

// cleanup ends the server as an operator does and sees that it goes in peace.
func (s *server) cleanup() {
	select {
	case <-s.ended:
	default:
		s.stop()
	}
	s.admin.Close()
	if text := s.log.String(); strings.Contains(text, "DATA RACE") || strings.Contains(text, "panic:") {
		s.t.Errorf("serve:\n%s", tailOf(text))
	}
	if s.t.Failed() {
		s.t.Logf("log of serve:\n%s", tailOf(s.log.String()))
	}
}

// stop asks the server to stop; it must end with code 0.
func (s *server) stop() {
	s.t.Helper()
	_ = s.cmd.Process.Signal(syscall.SIGTERM) // a server that is gone is told below
	select {
	case <-s.ended:
	case <-time.After(patience):
		s.t.Errorf("serve does not stop")
		s.kill()
	}
	if code := s.cmd.ProcessState.ExitCode(); code != 0 {
		s.t.Errorf("serve ended with %v:\n%s", s.cmd.ProcessState, tailOf(s.log.String()))
	}
}

// kill is kill -9.
func (s *server) kill() {
	s.t.Helper()
	if err := s.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		s.t.Error(err)
	}
	<-s.ended
}

// logged waits for a line of the log with all words.
func (s *server) logged(words ...string) string {
	s.t.Helper()
	return s.log.await(s.t, 0, words...)
}

func (s *server) port() string {
	_, port, _ := net.SplitHostPort(s.addr)
	return port
}

// get reads one of the pages on the metrics' address.
func (s *server) get(page string) (status int, body string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	st, err := s.admin.Status(ctx)
	if err != nil || st.Server == nil {
		s.t.Fatalf("status: %v", err)
	}
	resp, err := http.Get("http://" + st.Server.Metrics + page)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// metric reads one figure.
func (s *server) metric(name string) (v float64) {
	s.t.Helper()
	_, text := s.get("/metrics")
	for line := range strings.SplitSeq(text, "\n") {
		if rest, ok := strings.CutPrefix(line, name+" "); ok {
			if _, err := fmt.Sscan(rest, &v); err != nil {
				s.t.Fatalf("%s: %v", line, err)
			}
			return v
		}
	}
	s.t.Fatalf("no metric %s", name)
	return 0
}

// until polls for what gives no event.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		<-tick.C
	}
}

// tail is what "hawser tail --json" prints.
func (f *fleet) tail(args ...string) []admin.Message {
	f.t.Helper()
	r := f.do(append([]string{"tail", "--json"}, args...)...)
	return messages(f.t, r.stdout)
}

func messages(t testing.TB, text string) (list []admin.Message) {
	t.Helper()
	for dec := json.NewDecoder(strings.NewReader(text)); ; {
		var m admin.Message
		err := dec.Decode(&m)
		if err == io.EOF {
			return list
		}
		if err != nil {
			t.Fatalf("tail --json: %v", err)
		}
		list = append(list, m)
	}
}

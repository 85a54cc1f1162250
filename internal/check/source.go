package check

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// source is where connections of the client under test come from: a command that is
// started for each attempt, or a device that comes by itself.
type source struct {
	o      *DeviceOptions
	listen *net.TCPListener // nil with Exec: each attempt has its own
}

func newSource(o *DeviceOptions) (*source, error) {
	s := &source{o: o}
	if o.Exec != "" {
		return s, nil
	}
	o.Parallel = 1
	l, err := net.Listen("tcp", o.Listen)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w\nhint: --listen HOST:PORT", o.Listen, err)
	}
	s.listen = l.(*net.TCPListener)
	return s, nil
}

func (s *source) target() string {
	if s.o.Exec != "" {
		return s.o.Exec
	}
	return "whoever connects to " + s.listen.Addr().String()
}

func (s *source) close() {
	if s.listen != nil {
		s.listen.Close()
	}
}

// attempt is one start of the client, or one turn of a device that comes by itself.
type attempt struct {
	o      *DeviceOptions
	listen *net.TCPListener
	own    bool // the listener ends with the attempt
	cmd    *exec.Cmd
	out    tail
	exited chan struct{}
}

func (s *source) begin(ctx context.Context) (*attempt, error) {
	a := &attempt{o: s.o, listen: s.listen}
	if s.o.Exec == "" {
		return a, a.reset(ctx)
	}
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", "0"))
	if err != nil {
		return nil, err
	}
	a.listen, a.own = l.(*net.TCPListener), true
	return a, a.start(ctx)
}

func (a *attempt) reset(ctx context.Context) error {
	if a.o.Reset == "" {
		return nil
	}
	if out, err := exec.CommandContext(ctx, "/bin/sh", "-c", a.o.Reset).CombinedOutput(); err != nil {
		return fmt.Errorf("--reset failed: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// start runs the command with its placeholders filled in, in a process group of its own.
func (a *attempt) start(ctx context.Context) error {
	port := a.listen.Addr().(*net.TCPAddr).Port
	text := strings.NewReplacer("{host}", a.o.Host, "{port}", strconv.Itoa(port),
		"{cafile}", quoted(a.o.Dir, fileRoots), "{cert}", quoted(a.o.Dir, fileCert), "{key}", quoted(a.o.Dir, fileKey)).Replace(a.o.Exec)
	a.cmd = exec.CommandContext(ctx, "/bin/sh", "-c", text)
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	a.cmd.Cancel = func() error { return syscall.Kill(-a.cmd.Process.Pid, syscall.SIGKILL) }
	a.cmd.WaitDelay = time.Second
	a.cmd.Stdout, a.cmd.Stderr = &a.out, &a.out
	if err := a.cmd.Start(); err != nil {
		return fmt.Errorf("--exec: %w", err)
	}
	a.exited = make(chan struct{})
	go func() {
		defer close(a.exited)
		_ = a.cmd.Wait() // its exit code is not judged: what it did on the wire is
	}()
	return nil
}

func quoted(dir, name string) string {
	return "'" + strings.ReplaceAll(filepath.Join(dir, name), "'", `'\''`) + "'"
}

var errExited = errors.New("the command ended")

// accept waits for a connection, as long as the client may still come.
func (a *attempt) accept(ctx context.Context) (net.Conn, error) {
	a.listen.SetDeadline(time.Now().Add(a.o.Wait))
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-stop:
			return
		case <-ctx.Done():
		case <-a.exited: // nil for a device: then it never comes
		}
		a.listen.SetDeadline(time.Unix(1, 0))
	}()
	conn, err := a.listen.Accept()
	if err == nil {
		return conn, nil
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-a.done():
		return nil, fmt.Errorf("%w: %s", errExited, a.out.String())
	default:
		return nil, fmt.Errorf("nobody came within %v", a.o.Wait)
	}
}

func (a *attempt) done() <-chan struct{} {
	if a.exited == nil {
		return nil
	}
	return a.exited
}

// end stops the client and gives the end of what it printed.
func (a *attempt) end() string {
	if a.own {
		a.listen.Close()
	}
	if a.cmd == nil || a.cmd.Process == nil {
		return ""
	}
	select {
	case <-a.exited:
	default:
		_ = syscall.Kill(-a.cmd.Process.Pid, syscall.SIGKILL) // it may have ended by itself just now
		<-a.exited
	}
	return a.out.String()
}

// crashed names the signal that a command died of, "" when it ended otherwise or goes
// on. Its last words on the wire come a moment before its end.
func (a *attempt) crashed() string {
	if a.exited == nil {
		return ""
	}
	select {
	case <-a.exited:
	case <-time.After(lastWords):
		return ""
	}
	w, ok := a.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok {
		return ""
	}
	sig := w.Signal()
	if !w.Signaled() {
		sig = syscall.Signal(w.ExitStatus() - 128) // what a shell says of its child
	}
	switch sig {
	case syscall.SIGSEGV, syscall.SIGABRT, syscall.SIGBUS, syscall.SIGILL, syscall.SIGFPE, syscall.SIGTRAP, syscall.SIGSYS:
		return sig.String()
	}
	return ""
}

// lastWords is how long a command may take to be gone after its connection.
const lastWords = 100 * time.Millisecond

// tail keeps the last of what a command prints.
type tail struct {
	mu sync.Mutex
	b  []byte // guarded by mu
}

const tailSize = 2 << 10

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if n := len(t.b) - tailSize; n > 0 {
		t.b = t.b[n:]
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(strings.ToValidUTF8(string(t.b), "?"))
}

package main

import (
	"bufio"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// pipe gives an end to write to and a channel with the lines that come out.
func pipe(t *testing.T) (*os.File, <-chan string) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 64)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			lines <- s.Text()
		}
		_, _ = io.Copy(io.Discard, r) // whoever writes must not wait
	}()
	t.Cleanup(func() { w.Close(); r.Close() })
	return w, lines
}

// await takes the first line that begins with want.
func await(t *testing.T, lines <-chan string, want string) string {
	t.Helper()
	late := time.After(patience)
	for {
		select {
		case line, ok := <-lines:
			if !ok {
				t.Fatalf("%q did not come", want)
			}
			if strings.HasPrefix(line, want) {
				return line
			}
		case <-late:
			t.Fatalf("%q did not come", want)
		}
	}
}

// serve tells standard output, a descriptor and systemd when it is ready, and
// systemd when it stops.
func TestServeSaysWhenItIsReady(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "fleet")
	out, outLines := pipe(t)
	errs, errLines := pipe(t)
	fd, fdLines := pipe(t)
	a := &app{out: out, err: errs}
	run := func(ctx context.Context, args ...string) error {
		root := a.root()
		root.SetArgs(append(args, "--dir", dir))
		return root.ExecuteContext(ctx)
	}
	if err := run(t.Context(), "init", "--domain", "localhost", "--trial"); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", socket)
	notified := func() string {
		t.Helper()
		if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 256)
		n, err := conn.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	own, err := syscall.Dup(int(fd.Fd())) // serve closes the one it is given
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, "serve", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--ready-fd", strconv.Itoa(own))
	}()
	line := await(t, outLines, "ready 127.0.0.1:")
	if other := await(t, fdLines, "ready "); other != line {
		t.Errorf("%q and %q", line, other)
	}
	if s := notified(); s != "READY=1" {
		t.Errorf("systemd was told %q", s)
	}
	cancel()
	if s := notified(); s != "STOPPING=1" {
		t.Errorf("systemd was told %q", s)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	// Not a terminal: the log is JSON.
	if l := await(t, errLines, "{"); !strings.Contains(l, `"level":"WARN"`) || !strings.Contains(l, "TRIAL") {
		t.Errorf("first line of the log: %s", l)
	}
}

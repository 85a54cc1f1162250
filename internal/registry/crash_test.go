package registry

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"

	"hawser/internal/identity"
)

// childEnv names the part that the test binary plays when it is started again.
const childEnv = "HAWSER_REGISTRY_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(childEnv) {
	case "":
		os.Exit(m.Run())
	case "queue":
		exit(queueForever(os.Args[1]))
	case "once":
		exit(queueOnce(os.Args[1]))
	case "import":
		exit(importOnce(os.Args[1]))
	case "limit":
		exit(runIntoTheLimit(os.Args[1]))
	}
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func child(t *testing.T, part, path string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], path)
	cmd.Env = append(os.Environ(), childEnv+"="+part)
	cmd.Stderr = os.Stderr
	return cmd
}

// queueForever queues commands from several goroutines and prints each cid after
// its commit.
func queueForever(path string) error {
	r, err := Open(context.Background(), path, Options{})
	if err != nil {
		return err
	}
	var mu sync.Mutex
	for range 8 {
		go func() {
			for {
				cid, err := queueOne(r)
				if err != nil {
					exit(err)
				}
				mu.Lock()
				fmt.Println(cid)
				mu.Unlock()
			}
		}()
	}
	select {}
}

func queueOne(r *Registry) (cid uint64, err error) {
	err = r.Update(context.Background(), func(tx *Tx) (err error) {
		cid, err = tx.QueueCommand(Command{Device: 1, Name: "x", Args: make([]byte, 1000), CreatedBy: "test"})
		return err
	})
	return cid, err
}

// TestKillLosesNothing kills a process that queues commands, twenty times: what
// it has acknowledged is there, cids have no gap, and there is one audit row for
// each change.
func TestKillLosesNothing(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, enrol(1))
	base := auditCount(t, r)
	path := r.Path()
	r.Close()
	acknowledged := uint64(0)
	for round := range 20 {
		acknowledged = max(acknowledged, killAfter(t, path, 10+5*round))
		acknowledged = checkQueued(t, path, acknowledged, base)
	}
}

// killAfter lets a child acknowledge n commands, kills it, and gives the highest
// cid it has acknowledged.
func killAfter(t *testing.T, path string, n int) (highest uint64) {
	t.Helper()
	cmd := child(t, "queue", path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	for i := 0; ; i++ {
		line, err := lines.ReadString('\n')
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		var cid uint64
		if _, err := fmt.Sscanln(line, &cid); err != nil {
			t.Fatal(err)
		}
		highest = max(highest, cid)
		if i == n {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	var status *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &status) || status.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the child ended by itself: %v", err)
	}
	return highest
}

// checkQueued gives the number of commands that are there.
func checkQueued(t *testing.T, path string, acknowledged uint64, base int) uint64 {
	t.Helper()
	r, err := Open(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var count, highest, audited uint64
	if err := r.read.QueryRow(`SELECT COUNT(*), COALESCE(MAX(cid), 0), (SELECT COUNT(*) FROM audit) FROM commands`).
		Scan(&count, &highest, &audited); err != nil {
		t.Fatal(err)
	}
	if count < acknowledged || highest != count {
		t.Fatalf("%d commands up to cid %d, %d acknowledged", count, highest, acknowledged)
	}
	if audited-uint64(base) != count {
		t.Fatalf("%d audit rows for %d commands", audited-uint64(base), count)
	}
	return count
}

// queueOnce prints a line when one command is acknowledged.
func queueOnce(path string) error {
	r, err := Open(context.Background(), path, Options{})
	if err != nil {
		return err
	}
	if _, err := queueOne(r); err != nil {
		return err
	}
	fmt.Println("acknowledged")
	os.Exit(0) // without Close: nothing else may reach the disk
	return nil
}

// TestAcknowledgedMeansSynced watches the system calls of a child: between the
// last write to the write-ahead log and the acknowledgement it is synced.
func TestAcknowledgedMeansSynced(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	r := newRegistry(t, Options{})
	must(t, r, enrol(1))
	r.Close()
	trace := r.Path() + ".trace"
	cmd := child(t, "once", r.Path())
	cmd.Args = append([]string{strace, "-f", "-y", "-o", trace, "-e", "trace=write,pwrite64,fsync,fdatasync"}, cmd.Args...)
	cmd.Path = strace
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	written, synced := false, false
	for _, line := range strings.Split(string(b), "\n") {
		switch wal := strings.Contains(line, "-wal>"); {
		case strings.Contains(line, "acknowledged"):
			if !written || !synced {
				t.Errorf("acknowledged with written=%v synced=%v", written, synced)
			}
			return
		case wal && strings.Contains(line, "write"):
			written, synced = true, false
		case wal && strings.Contains(line, "sync(") && !strings.Contains(line, "unfinished"), strings.Contains(line, "sync resumed"):
			synced = true
		}
	}
	t.Fatalf("the child never acknowledged:\n%s", b)
}

// TestNoRoom fills the disk (a limit on the size of files) under the writer.
func TestNoRoom(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, enrol(1))
	base := auditCount(t, r)
	path := r.Path()
	r.Close()
	cmd := child(t, "limit", path)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var before, after uint64
	if _, err := fmt.Sscan(string(out), &before, &after); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	if before == 0 || after != before+1 {
		t.Errorf("%d commands before the disk was full, then cid %d", before, after)
	}
	if n := checkQueued(t, path, after, base); n != after {
		t.Errorf("%d commands, %d acknowledged", n, after)
	}
}

// runIntoTheLimit queues until it fails, twice, makes room, and queues one more.
// It prints the last cid before and the one after.
func runIntoTheLimit(path string) error {
	signal.Ignore(syscall.SIGXFSZ)
	r, err := Open(context.Background(), path, Options{})
	if err != nil {
		return err
	}
	if err := limitFiles(1 << 20); err != nil {
		return err
	}
	last := uint64(0)
	for {
		cid, err := queueOne(r)
		if err != nil {
			break
		}
		last = cid
	}
	if _, err := queueOne(r); err == nil || strings.Contains(err.Error(), "closed") {
		return fmt.Errorf("the second one: %v", err)
	}
	if _, err := r.Device(context.Background(), identity.ID(1)); err != nil {
		return fmt.Errorf("read with a full disk: %w", err)
	}
	if err := limitFiles(1 << 40); err != nil {
		return err
	}
	cid, err := queueOne(r)
	if err != nil {
		return fmt.Errorf("after there was room again: %w", err)
	}
	fmt.Println(last, cid)
	return r.Close()
}

// limitFiles sets the soft limit only, so that it can be raised again.
func limitFiles(n uint64) error {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &l); err != nil {
		return err
	}
	l.Cur = min(n, l.Max)
	return syscall.Setrlimit(syscall.RLIMIT_FSIZE, &l)
}

package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hawser/internal/mqtt"
)

const logDisk = 96 << 20 // bytes

// smallDisk puts the log directory of a fleet on a file system of its own.
func smallDisk(t *testing.T, f *fleet) (dir string) {
	t.Helper()
	dir = f.path("server", "log")
	aside := dir + ".aside"
	if err := os.Rename(dir, aside); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0700", logDisk)); err != nil {
		t.Skipf("a full disk is not tried: mounting a small tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := os.CopyFS(dir, os.DirFS(aside)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir, 0o700), os.RemoveAll(aside)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// fill leaves so many bytes free on the file system of dir, and gives the file that
// takes the rest.
func fill(t *testing.T, dir string, leave int64) (ballast string) {
	t.Helper()
	ballast = dir + "/ballast"
	file, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	until(t, "room for the ballast", func() bool { // the server takes and gives room in the meantime
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			t.Fatal(err)
		}
		err := unix.Fallocate(int(file.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-leave)
		if err != nil && !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		return err == nil
	})
	return ballast
}

// TestDiskFull: while there is no room nothing is acknowledged, readiness is red and the
// metrics count; with room again all recovers by itself, twice, and nothing that was
// acknowledged is lost.
func TestDiskFull(t *testing.T) {
	t.Parallel() // it mostly waits until a frame is given up
	f := newFleet(t)
	f.fast()
	creds := credentials(t, f.device("ABCD1234"))
	disk := smallDisk(t, f)
	s := f.serve()
	var acked []string
	n := 0
	payload := func() string { n++; return fmt.Sprintf("%06d %s", n, strings.Repeat("x", 4000)) }
	connect := func() *client {
		c, _, err := dial(s.addr, creds, &mqtt.Connect{Version: mqtt.V311, CleanStart: true, ClientID: "ABCD1234"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.conn.Close() })
		return c
	}
	publish := func(c *client) error {
		text := payload()
		err := c.publishWait("private/ABCD1234/u/t", text, uint16(n))
		if err == nil {
			acked = append(acked, text[:6])
		}
		return err
	}
	for range 2 {
		c := connect()
		for range 50 {
			if err := publish(c); err != nil {
				t.Fatal(err)
			}
		}
		failures := s.metric("hawser_log_failures_total")
		ballast := fill(t, disk, 512<<10)
		var lost error
		for len(acked) < 5000 && lost == nil {
			lost = publish(c)
		}
		if lost == nil {
			t.Fatal("the disk does not fill")
		}
		if status, body := s.get("/readyz"); status != http.StatusServiceUnavailable || !strings.Contains(body, "log: ") {
			t.Errorf("/readyz says %d, %s", status, body)
		}
		if s.metric("hawser_log_healthy") != 0 || s.metric("hawser_log_failures_total") <= failures || s.metric("hawser_messages_unavailable_total") == 0 {
			t.Errorf("the metrics do not tell: healthy %v, failures %v, unavailable %v", s.metric("hawser_log_healthy"),
				s.metric("hawser_log_failures_total"), s.metric("hawser_messages_unavailable_total"))
		}
		if status, _ := s.get("/healthz"); status != http.StatusOK {
			t.Errorf("/healthz says %d", status)
		}
		if err := publish(connect()); err == nil {
			t.Error("acknowledged on a full disk")
		}
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		until(t, "/readyz to be green", func() bool { status, _ := s.get("/readyz"); return status == http.StatusOK })
		if s.metric("hawser_log_healthy") != 1 {
			t.Error("/readyz is green and hawser_log_healthy is not 1")
		}
	}
	if err := publish(connect()); err != nil {
		t.Fatal(err)
	}
	s.logged("the log cannot write; nothing is acknowledged until it can")
	s.logged("the log writes again")
	if s.metric("hawser_log_restarts_total") < 1 {
		t.Error("no restart of the log store is counted")
	}
	checkAcked(t, f, acked)
	s.stop()
	f.serve() // and what is on disk is whole
	checkAcked(t, f, acked)
}

// checkAcked looks for each payload's first six bytes in the log.
func checkAcked(t *testing.T, f *fleet, acked []string) {
	t.Helper()
	have := map[string]bool{}
	for _, m := range f.tail("ABCD1234", "--topic", "private/+/u/t") {
		if len(m.Payload) > 13 {
			have[string(m.Payload[1:13])] = true
		}
	}
	for _, text := range acked {
		if !have[fmt.Sprintf("%x", text)] {
			t.Errorf("%s was acknowledged and is not in the log", text)
		}
	}
	t.Logf("%d messages acknowledged", len(acked))
}

package server

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/mqtt"
)

// refused starts a server that must not come up, and gives the words of its error.
func refused(t *testing.T, dir string, words ...string) {
	t.Helper()
	s, err := Start(t.Context(), Config{Dir: dir, Listen: "127.0.0.1:0", Metrics: "127.0.0.1:0"})
	if err == nil {
		_ = s.Close(t.Context()) // the test has failed already
		t.Fatal("it started")
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q is not in: %v", w, err)
		}
	}
	if !strings.Contains(err.Error(), "\nhint: ") {
		t.Errorf("no hint: %v", err)
	}
}

func edit(t *testing.T, path, old, new string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), old) {
		t.Fatalf("%q is not in %s", old, path)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(text), old, new, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Each thing that can be wrong before the start is named, with a way out, and
// nothing is made anew.
func TestBadDays(t *testing.T) {
	cases := []struct {
		name  string
		spoil func(t *testing.T, dir string) error
		words []string
	}{
		{"no fleet", func(_ *testing.T, dir string) error { return os.RemoveAll(dir) }, []string{"holds no fleet"}},
		{"unknown key", func(t *testing.T, dir string) error {
			edit(t, filepath.Join(dir, "hawser.toml"), "[serve]", "[serve]\nlisten_on = \":1\"")
			return nil
		}, []string{"hawser.toml", "listen_on"}},
		{"exposed key", func(_ *testing.T, dir string) error {
			return os.Chmod(filepath.Join(dir, "server/broker-localhost.key"), 0o644)
		},
			[]string{"broker-localhost.key", "readable by others", "chmod 600"}},
		{"no key", func(_ *testing.T, dir string) error {
			return os.Remove(filepath.Join(dir, "server/broker-localhost.key"))
		},
			[]string{"broker-localhost.key", "incomplete"}},
		{"no registry", func(_ *testing.T, dir string) error { return os.Remove(filepath.Join(dir, "server/registry.db")) },
			[]string{"registry.db", "not found"}},
		{"empty registry", func(_ *testing.T, dir string) error { return os.Truncate(filepath.Join(dir, "server/registry.db"), 0) },
			[]string{"registry.db", "damaged"}},
		{"damaged registry", func(_ *testing.T, dir string) error {
			f, err := os.OpenFile(filepath.Join(dir, "server/registry.db"), os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt(make([]byte, 4096), 8192)
			return errors.Join(err, f.Close())
		}, []string{"registry.db", "damaged"}},
		{"no log", func(_ *testing.T, dir string) error { return os.RemoveAll(filepath.Join(dir, "server/log")) }, []string{"server/log"}},
		{"a stream is gone", func(t *testing.T, dir string) error {
			found, err := filepath.Glob(filepath.Join(dir, "server/log/*/*/streams/HW_*_LOG"))
			if err != nil || len(found) != 1 {
				t.Fatalf("streams: %v, %v", found, err)
			}
			return os.RemoveAll(found[0])
		}, []string{"server/log", "_LOG"}},
		{"another fleet's registry", func(t *testing.T, dir string) error {
			return os.Rename(filepath.Join(makeFleet(t), "server/registry.db"), filepath.Join(dir, "server/registry.db"))
		}, []string{"registry.db", "another fleet"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := makeFleet(t)
			if err := c.spoil(t, dir); err != nil {
				t.Fatal(err)
			}
			refused(t, dir, c.words...)
			refused(t, dir, c.words...) // the first try has made nothing
		})
	}
}

func TestExpiredLeafIsRefused(t *testing.T) {
	dir := makeFleet(t, func(o *fleet.InitOptions) {
		o.Now = func() time.Time { return time.Now().AddDate(-2, 0, 0) }
	})
	refused(t, dir, "broker certificate for localhost expired", "hawser ca issue-broker")
}

func TestPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := makeFleet(t)
	for _, cfg := range []Config{{Listen: l.Addr().String(), Metrics: "127.0.0.1:0"}, {Listen: "127.0.0.1:0", Metrics: l.Addr().String()}} {
		cfg.Dir = dir
		if _, err := Start(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), l.Addr().String()+" is in use") {
			t.Errorf("%v", err)
		}
	}
}

func TestSecondServerIsRefused(t *testing.T) {
	r := serve(t, makeFleet(t))
	refused(t, r.dir, "another hawser works on")
	if _, err := r.api.Status(t.Context()); err != nil {
		t.Errorf("the first one after that: %v", err)
	}
}

// In production the server does not start beside a CA key, wherever it lies.
func TestCAKeyInProduction(t *testing.T) {
	n := 0
	dir := makeFleet(t, func(o *fleet.InitOptions) {
		o.Trial = false
		o.Passphrases = func(string) ([]byte, error) {
			n++
			return []byte{'p', 'a', 's', 's', 'w', 'o', 'r', 'd', byte('0' + n)}, nil
		}
	})
	refused(t, dir, "a CA key lies in the fleet directory", "ca-a")
	safe := t.TempDir()
	for _, ca := range []string{"ca-a", "ca-b"} {
		if err := os.Rename(filepath.Join(dir, ca), filepath.Join(safe, ca)); err != nil {
			t.Fatal(err)
		}
	}
	serve(t, dir).stop()
	if err := os.Rename(filepath.Join(safe, "ca-a/device-1.key"), filepath.Join(dir, "server/requests/x")); err != nil {
		t.Fatal(err)
	}
	refused(t, dir, "a CA key lies in the fleet directory", "server/requests/x")
}

// smallDisk mounts a file system of its own.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if os.Getuid() != 0 {
		t.Skip("not root: cannot mount a small tmpfs, so the full disk is not tested")
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("mount of a tmpfs: %v, so the full disk is not tested", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// The log's disk fills up: no PUBACK, readiness goes red and says why; with room
// again all of it recovers without a restart.
func TestReadinessFollowsTheLog(t *testing.T) {
	dir := makeFleet(t)
	disk := smallDisk(t, "64m")
	logDir := filepath.Join(dir, "server/log")
	moved := filepath.Join(disk, "log")
	if err := os.CopyFS(moved, os.DirFS(logDir)); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(logDir); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(moved, logDir); err != nil {
		t.Fatal(err)
	}
	r := serve(t, dir)
	_, _, cert := r.device("ABCD1234")
	c := r.connect(cert, "ABCD1234")
	c.publish("private/ABCD1234/u/x", "1")
	fill, err := os.Create(filepath.Join(disk, "fill"))
	r.ok(err)
	block := make([]byte, 1<<16)
	for err == nil {
		_, err = fill.Write(block)
	}
	for err = nil; err == nil; { // to the last byte
		_, err = fill.Write(block[:1])
	}
	r.ok(fill.Close())
	url := "http://" + r.srv.MetricsAddr().String()
	red := false
	for try := 0; try < 64 && !red; try++ { // what lies allocated on the disk is used up first
		c, err := r.dial(cert, "ABCD1234")
		if err != nil {
			continue
		}
		c.send((&mqtt.Publish{Topic: []byte("private/ABCD1234/u/x"), Payload: block[:1<<15], QoS: 1, PacketID: 9}).Append(nil, mqtt.V5))
		_, _, _, err = c.next()
		code, body := get(t, url+"/readyz")
		red = err != nil || code == 503 && strings.Contains(body, "log: ")
	}
	until(t, "red readiness", func() bool {
		code, body := get(t, url+"/readyz")
		return code == 503 && strings.Contains(body, "log: ")
	})
	if _, body := get(t, url+"/metrics"); !strings.Contains(body, "hawser_log_healthy 0") {
		t.Error("the metrics say that the log is well")
	}
	st, err := r.api.Status(t.Context())
	r.ok(err)
	if len(st.Server.NotReady) == 0 {
		t.Error("status says that the server is ready")
	}
	r.ok(os.Remove(fill.Name()))
	until(t, "green readiness", func() bool { code, _ := get(t, url+"/readyz"); return code == 200 })
	if code := r.connect(cert, "ABCD1234").publish("private/ABCD1234/u/y", "2"); code.Failed() {
		t.Errorf("publish after the recovery: %v", code)
	}
	if n := len(r.tail(admin.Tail{Topic: "private/+/u/y"})); n != 1 {
		t.Errorf("%d messages after the recovery", n)
	}
}

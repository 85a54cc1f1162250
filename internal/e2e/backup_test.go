package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"hawser/internal/admin"
	"hawser/internal/mqtt"
)

// ingest is many clients that publish one message after the other until the server
// dies, and what was acknowledged to them.
type ingest struct {
	mu    sync.Mutex
	more  *sync.Cond
	acked map[string][]string // guarded by mu; by topic
	total int                 // guarded by mu
	wg    sync.WaitGroup
}

func newIngest() *ingest {
	i := &ingest{acked: map[string][]string{}}
	i.more = sync.NewCond(&i.mu)
	return i
}

// publish begins one client.
func (i *ingest) publish(c *client, topic string, retain bool) {
	i.wg.Go(func() {
		for n := 0; ; n++ {
			text := fmt.Sprintf("%s#%d", topic, n)
			p := &mqtt.Publish{Topic: []byte(topic), Payload: []byte(text), QoS: 1, PacketID: uint16(n%65535 + 1), Retain: retain}
			if c.write(p.Append(nil, mqtt.V311)) != nil {
				return
			}
			if got, err := c.next(); err != nil || got.Type != mqtt.PUBACK {
				return
			}
			i.mu.Lock()
			i.acked[topic] = append(i.acked[topic], text)
			i.total++
			i.more.Broadcast()
			i.mu.Unlock()
		}
	})
}

// wait returns when n more are acknowledged, with how many were on each topic.
func (i *ingest) wait(n int) map[string]int {
	i.mu.Lock()
	defer i.mu.Unlock()
	for want := i.total + n; i.total < want; {
		i.more.Wait()
	}
	counts := map[string]int{}
	for topic, list := range i.acked {
		counts[topic] = len(list)
	}
	return counts
}

// textOf is a payload that is no JSON.
func textOf(t *testing.T, m admin.Message) string {
	t.Helper()
	var text string
	if m.Encoding != "hex" {
		return string(m.Payload)
	}
	var b admin.Hex
	if err := errors.Join(json.Unmarshal(m.Payload, &text), b.UnmarshalText([]byte(text))); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestBackupDrill: a backup under load, kill -9, a restore elsewhere. Everything that
// was acknowledged before the backup began is there; sessions, queues and retained
// messages are what the restored log says; and the devices come back.
func TestBackupDrill(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	f.fast()
	f.configure("queue_messages = 1000", "queue_messages = 100000")
	f.configure(`queue_bytes = "1MiB"`, `queue_bytes = "64MiB"`)
	const away, down = "A0000009", "private/A0000009/d/app/n"
	files := map[string]string{away: f.device(away)}
	for n := range 4 {
		id := fmt.Sprintf("A000000%d", n)
		files[id] = f.device(id)
	}
	backend := f.service("backend", "write "+down, "write site/n", "read site/n")
	s := f.serve()
	c, _, err := dial(s.addr, credentials(t, files[away]), &mqtt.Connect{Version: mqtt.V311, ClientID: away})
	if err != nil {
		t.Fatal(err)
	}
	subscribe(t, c, down)
	c.conn.Close()
	load := newIngest()
	for id, dir := range files {
		if id != away {
			load.publish(mustDial(t, s, dir, id), "private/"+id+"/u/n", false)
		}
	}
	load.publish(mustDial(t, s, backend, "one"), down, false)
	load.publish(mustDial(t, s, backend, "two"), "site/n", true)
	before := load.wait(1000)
	file := f.path("..", "fleet.backup")
	f.do("backup", "--out", file)
	load.wait(300)
	s.kill()
	load.wg.Wait()

	n := &fleet{t, f.path("..", "new")}
	if r := n.hawser("restore", file); r.code != 0 || !strings.Contains(r.stdout, "devices      5 active") {
		t.Fatalf("restore: %+v", r)
	}
	have := map[string][]string{}
	for _, m := range n.tail() {
		have[m.Topic] = append(have[m.Topic], textOf(t, m))
	}
	for topic, want := range before {
		if len(have[topic]) < want || strings.Join(have[topic][:want], " ") != strings.Join(load.acked[topic][:want], " ") {
			t.Errorf("of %s %d messages were acknowledged before the backup, %d are there", topic, want, len(have[topic]))
		}
		t.Logf("%s: %d acknowledged before the backup, %d restored, %d at the kill", topic, want, len(have[topic]), len(load.acked[topic]))
	}
	s = n.serve()
	s.logged("restored from a backup")
	checkQueue(t, s, files[away], away, have[down])
	b := mustDial(t, s, backend, "three")
	subscribe(t, b, "site/n")
	list := have["site/n"]
	if got, err := b.next(); err != nil || string(got.pub.Payload) != list[len(list)-1] || !got.pub.Retain {
		t.Errorf("retained is %q, the log ends with %q: %v", got.pub.Payload, list[len(list)-1], err)
	}
	for id, dir := range files {
		if id != away {
			if err := mustDial(t, s, dir, id).publishWait("private/"+id+"/u/n", "again", 1); err != nil {
				t.Errorf("%s does not come back: %v", id, err)
			}
		}
	}
	if r := n.do("status"); !strings.Contains(r.stdout, "restored") {
		t.Errorf("status does not tell of the restore:\n%s", r.stdout)
	}
	s.stop()
	s = n.serve() // a later start is like any other
	if text := s.log.String(); strings.Contains(text, "restored from a backup") {
		t.Errorf("the second start begins a new epoch again:\n%s", text)
	}
}

// checkQueue comes back to a session and takes its queue, which must be what the
// log holds, in order.
func checkQueue(t *testing.T, s *server, files, id string, want []string) {
	t.Helper()
	c, ack, err := dial(s.addr, credentials(t, files), &mqtt.Connect{Version: mqtt.V311, ClientID: id})
	if err != nil || !ack.present {
		t.Fatalf("the session is gone: %+v, %v", ack, err)
	}
	defer c.conn.Close()
	for i, want := range want {
		got, err := c.next()
		if err != nil || got.Type != mqtt.PUBLISH || string(got.pub.Payload) != want {
			t.Fatalf("message %d of the queue is %q, not %q: %v", i, got.pub.Payload, want, err)
		}
		if err := c.write((&mqtt.Ack{Type: mqtt.PUBACK, PacketID: got.id}).Append(nil, mqtt.V311)); err != nil {
			t.Fatal(err)
		}
	}
}

func subscribe(t *testing.T, c *client, filter string) {
	t.Helper()
	p := &mqtt.Subscribe{PacketID: 9, Filters: []mqtt.Subscription{{Filter: filter, QoS: 1}}}
	if err := c.write(p.Append(nil, mqtt.V311)); err != nil {
		t.Fatal(err)
	}
	if got, err := c.next(); err != nil || got.Type != mqtt.SUBACK || got.code != 1 {
		t.Fatalf("subscribe: %+v, %v", got, err)
	}
}

// withPassphrase runs hawser with a passphrase on descriptor 3.
func withPassphrase(t *testing.T, pass string, args ...string) result {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := w.WriteString(pass + "\n"); err != nil {
		t.Fatal(err)
	}
	w.Close()
	cmd := exec.Command(hawser, append(args, "--passphrase-fd", "3")...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = &out, &errs, []*os.File{r}
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// entries lists a directory.
func entries(t *testing.T, dir string) (names []string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

// TestBackupBadDays: what is wrong is refused whole, and leaves nothing.
func TestBackupBadDays(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	f.device("A0000001")
	work := t.TempDir()
	file := filepath.Join(work, "good")
	if r := withPassphrase(t, "correct horse", "backup", "--dir", f.dir, "--out", file); r.code != 0 {
		t.Fatalf("backup: %+v", r)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v: %v", info.Mode(), err)
	}
	if r := f.hawser("backup", "--out", file); r.code != 1 || !strings.Contains(r.stderr, "is there already") {
		t.Errorf("a backup over another: %+v", r)
	}
	if r := withPassphrase(t, "short", "backup", "--dir", f.dir, "--out", file+"2"); r.code != 1 || !strings.Contains(r.stderr, "shorter than 8") {
		t.Errorf("a short passphrase: %+v", r)
	}
	refused := func(what string, r result, words ...string) {
		t.Helper()
		for _, w := range words {
			if r.code != 1 || !strings.Contains(r.stderr, w) {
				t.Errorf("%s: %+v", what, r)
			}
		}
		for _, name := range entries(t, work) {
			if name != "good" && name != "bad" {
				t.Errorf("%s leaves %s", what, name)
			}
		}
	}
	bad, dir := filepath.Join(work, "bad"), filepath.Join(work, "new")
	write := func(b []byte) {
		t.Helper()
		if err := os.WriteFile(bad, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	refused("wrong passphrase", withPassphrase(t, "correct house", "restore", file, "--dir", dir), "wrong passphrase", "nothing was restored")
	for _, at := range []int{30, len(data) / 2, len(data) - 1} {
		flipped := bytes.Clone(data)
		flipped[at] ^= 1
		write(flipped)
		refused(fmt.Sprintf("byte %d flipped", at), withPassphrase(t, "correct horse", "restore", bad, "--dir", dir), "nothing was restored")
		write(data[:at])
		refused(fmt.Sprintf("cut to %d", at), withPassphrase(t, "correct horse", "restore", bad, "--dir", dir), "nothing was restored")
	}
	write([]byte("no backup"))
	refused("no backup", run(t, hawser, "restore", bad, "--dir", dir), "is damaged", "nothing was restored")
	if r := withPassphrase(t, "correct horse", "restore", file, "--dir", f.dir); r.code != 1 || !strings.Contains(r.stderr, "holds a fleet already") {
		t.Errorf("a restore over a fleet: %+v", r)
	}
	f.do("status") // which is as it was
	if r := withPassphrase(t, "correct horse", "restore", file, "--dir", dir); r.code != 0 {
		t.Fatalf("restore: %+v", r)
	}
	if r := run(t, hawser, "device", "list", "--dir", dir); !strings.Contains(r.stdout, "A0000001") {
		t.Errorf("restored: %+v", r)
	}
}

// TestBackupFullDisk: no half file stays where the backup or the fleet was to be.
func TestBackupFullDisk(t *testing.T) {
	f := newFleet(t)
	f.device("A0000001")
	file := f.path("..", "good")
	f.do("backup", "--out", file)
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=100k,mode=0700"); err != nil {
		t.Skipf("a full disk is not tried: mounting a small tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
	for _, args := range [][]string{{"backup", "--dir", f.dir, "--out", filepath.Join(disk, "b")}, {"restore", file, "--dir", filepath.Join(disk, "new")}} {
		if r := run(t, hawser, args...); r.code != 1 || !strings.Contains(r.stderr, "no space left") {
			t.Errorf("%s: %+v", args[0], r)
		}
		if left := entries(t, disk); len(left) > 0 {
			t.Errorf("%s leaves %v", args[0], left)
		}
	}
	f.do("status")
}

// TestBackupKilled: kill -9 at each system call that makes, fills or names a file
// leaves no backup under its name and no fleet under its, or whole ones; and the next
// try succeeds.
func TestBackupKilled(t *testing.T) {
	t.Parallel()
	needTools(t, "strace")
	f := newFleet(t)
	f.device("A0000001")
	work := t.TempDir()
	good := filepath.Join(work, "good")
	f.do("backup", "--out", good)
	out, dir := filepath.Join(work, "out"), filepath.Join(work, "new")
	killed := 0
	kill := func(call string, when int, args ...string) {
		t.Helper()
		inject := fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, when)
		cmd := exec.Command("strace", append([]string{"-f", "-qq", "-o", "/dev/null", "-e", "trace=" + call, "-e", inject, hawser}, args...)...)
		if cmd.Run() != nil && cmd.ProcessState.ExitCode() == -1 { // strace ends as its child does
			killed++
		}
	}
	for _, k := range []struct {
		call string
		when int
	}{{"write", 20}, {"write", 60}, {"fsync", 1}, {"fsync", 4}, {"linkat", 1}, {"mkdirat", 3}, {"renameat", 1}} {
		kill(k.call, k.when, "backup", "--dir", f.dir, "--out", out)
		if _, err := os.Stat(out); err == nil {
			if r := run(t, hawser, "restore", out, "--dir", dir); r.code != 0 {
				t.Errorf("killed at %s %d: the backup has its name and is not whole: %+v", k.call, k.when, r)
			}
			_ = errors.Join(os.Remove(out), os.RemoveAll(dir))
		}
		kill(k.call, k.when, "restore", good, "--dir", dir)
		if _, err := os.Stat(dir); err == nil {
			if r := run(t, hawser, "device", "list", "--dir", dir); r.code != 0 || !strings.Contains(r.stdout, "A0000001") {
				t.Errorf("killed at %s %d: the fleet has its name and is not whole: %+v", k.call, k.when, r)
			}
			_ = os.RemoveAll(dir)
		}
	}
	if killed < 6 {
		t.Errorf("only %d of 14 were killed", killed)
	}
	f.do("backup", "--out", out)
	if r := run(t, hawser, "restore", out, "--dir", dir); r.code != 0 {
		t.Fatalf("restore after all: %+v", r)
	}
	for _, name := range entries(t, work) { // of a killed backup a file may stay, which nothing reads
		if strings.Contains(name, "restore") {
			t.Errorf("%s is left", name)
		}
	}
	if left, err := filepath.Glob(f.path("server", ".tmp-*")); err != nil || len(left) > 0 {
		t.Errorf("%v is left: %v", left, err)
	}
}

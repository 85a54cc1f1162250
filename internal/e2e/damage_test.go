package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"hawser/internal/mqtt"
)

const (
	sender   = "ABCD1234" // has a history
	sleeper  = "ABCD9999" // has a queue
	waiting  = 40         // messages in its queue
	retained = 10
)

// storied makes a fleet with something in every stream of its log, at rest.
func storied(t *testing.T) *fleet {
	t.Helper()
	f := newFleet(t)
	f.fast()
	senderDir, sleeperDir := f.device(sender), f.device(sleeper)
	backend := f.service("backend", "read #", "write #")
	s := f.serve()
	sub, _, err := dial(s.addr, credentials(t, sleeperDir), &mqtt.Connect{Version: mqtt.V311, ClientID: sleeper})
	if err != nil {
		t.Fatal(err)
	}
	filter := (&mqtt.Subscribe{PacketID: 1, Filters: []mqtt.Subscription{{Filter: "private/" + sleeper + "/d/app/#", QoS: 1}}}).Append(nil, mqtt.V311)
	if err := sub.write(filter); err != nil {
		t.Fatal(err)
	}
	if p, err := sub.next(); err != nil || p.Type != mqtt.SUBACK || p.code != 1 {
		t.Fatalf("%+v, %v", p, err)
	}
	sub.conn.Close()
	until(t, "the sleeper to be gone", func() bool {
		return strings.Contains(f.do("device", "show", sleeper, "--json").stdout, `"online":false`)
	})
	c, b := mustDial(t, s, senderDir, sender), mustDial(t, s, backend, "b")
	for i := range waiting {
		if err := b.publishWait("private/"+sleeper+"/d/app/x", fmt.Sprintf("queued %d %s", i, strings.Repeat("q", 1000)), uint16(i+1)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 300 {
		if err := c.publishWait("private/"+sender+"/u/t", fmt.Sprintf("%d %s", i, strings.Repeat("u", 200)), uint16(i+1)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range retained {
		p := mqtt.Publish{Topic: fmt.Appendf(nil, "shop/%d", i), Payload: fmt.Appendf(nil, "retained %d", i), QoS: 1, PacketID: uint16(100 + i), Retain: true}
		if err := b.write(p.Append(nil, mqtt.V311)); err != nil {
			t.Fatal(err)
		}
		if ack, err := b.next(); err != nil || ack.Type != mqtt.PUBACK {
			t.Fatalf("%+v, %v", ack, err)
		}
	}
	// The histories are written in the background, and what is there is known a second later.
	until(t, "the histories to be on disk", func() bool { return s.metric("hawser_log_history_bytes") > 120_000 })
	s.stop()
	return f
}

// copyOf gives a fleet of its own with the same files.
func (f *fleet) copyOf(t *testing.T) *fleet {
	t.Helper()
	g := &fleet{t, filepath.Join(t.TempDir(), "fleet")}
	err := filepath.WalkDir(f.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(f.dir, path)
		info, err := d.Info()
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(g.dir, rel), info.Mode().Perm())
		}
		if !d.Type().IsRegular() {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(g.dir, rel), text, info.Mode().Perm())
	})
	for _, name := range []string{sender, sleeper, "backend"} { // credentials, where there are any
		if _, missing := os.Stat(f.path("..", name)); missing == nil {
			err = errors.Join(err, os.CopyFS(g.path("..", name), os.DirFS(f.path("..", name))))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// stream gives a path in the directory of one stream of the log: LOG, Q, R or H.
func (f *fleet) stream(name string, elem ...string) string {
	f.t.Helper()
	all, err := filepath.Glob(f.path("server", "log", "jetstream", "*", "streams", "HW_*_"+name))
	if err != nil || len(all) != 1 {
		f.t.Fatalf("streams %s: %v, %v", name, all, err)
	}
	return filepath.Join(append(all, elem...)...)
}

// files lists the files and directories of the state, without what serve makes for itself.
func (f *fleet) files() (list []string) {
	f.t.Helper()
	err := filepath.WalkDir(f.dir, func(path string, _ fs.DirEntry, err error) error {
		list = append(list, strings.TrimPrefix(path, f.dir))
		return err
	})
	if err != nil {
		f.t.Fatal(err)
	}
	sort.Strings(list)
	return list
}

// refused checks that serve does not start, names what is wrong and makes nothing.
func (f *fleet) refused(words ...string) {
	f.t.Helper()
	before := f.files()
	s := f.launch()
	select {
	case <-s.ended:
	default:
		s.kill()
		f.t.Fatalf("serve has started")
	}
	text := s.log.String()
	if code := s.cmd.ProcessState.ExitCode(); code != 1 {
		f.t.Errorf("exit code %d", code)
	}
	said := plainLines(text)
	if len(said) != 2 || !strings.HasPrefix(said[0], "hawser: ") || !strings.HasPrefix(said[1], "hint: ") || !hasAll(said[0], words) {
		f.t.Errorf("not one line with %q and a hint:\n%s", words, strings.Join(said, "\n"))
	}
	have := map[string]bool{}
	for _, name := range before {
		have[name] = true
	}
	for _, name := range f.files() {
		made := filepath.Base(name) // the store begins a new block at each start; the damage is written down
		if !have[name] && !strings.HasSuffix(made, ".blk") && made != "index.db" && made != "damaged" && made != "lock" {
			f.t.Errorf("%s was made", name)
		}
	}
	s.cmd.ProcessState = nil
}

// plainLines are the lines on standard error that are meant for people: not the log's.
func plainLines(text string) (out []string) {
	for line := range strings.SplitSeq(strings.TrimSpace(text), "\n") {
		if !strings.HasPrefix(line, "{") {
			out = append(out, line)
		}
	}
	return out
}

// TestMissingFilesAreNamed: what is missing is named and not made anew.
func TestMissingFilesAreNamed(t *testing.T) {
	t.Parallel()
	whole := storied(t)
	for _, c := range []struct {
		name  string
		gone  func(f *fleet) string
		words []string
	}{
		{"registry", func(f *fleet) string { return f.path("server", "registry.db") }, []string{"registry.db"}},
		{"log", func(f *fleet) string { return f.path("server", "log") }, []string{"/server/log"}},
		{"jetstream", func(f *fleet) string { return f.path("server", "log", "jetstream") }, []string{"/server/log"}},
		{"stream LOG", func(f *fleet) string { return f.stream("LOG") }, []string{"_LOG", "/server/log"}},
		{"stream Q", func(f *fleet) string { return f.stream("Q") }, []string{"_Q", "/server/log"}},
		{"stream R", func(f *fleet) string { return f.stream("R") }, []string{"_R", "/server/log"}},
		{"stream H", func(f *fleet) string { return f.stream("H") }, []string{"_H", "/server/log"}},
		{"block of LOG", func(f *fleet) string { return f.stream("LOG", "msgs", "1.blk") }, []string{"_LOG", "/server/log"}},
		{"block of Q", func(f *fleet) string { return f.stream("Q", "msgs", "1.blk") }, []string{"_Q", "/server/log"}},
		{"block of R", func(f *fleet) string { return f.stream("R", "msgs", "1.blk") }, []string{"_R", "/server/log"}},
		{"block of H", func(f *fleet) string { return f.stream("H", "msgs", "1.blk") }, []string{"_H", "/server/log"}},
		{"meta of LOG", func(f *fleet) string { return f.stream("LOG", "meta.inf") }, []string{"_LOG", "/server/log"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := whole.copyOf(t)
			path := c.gone(f)
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
			f.refused(c.words...)
			f.refused(c.words...) // a supervisor tries again: it must not get through
			if _, err := os.Stat(path); err == nil {
				t.Errorf("%s was made", path)
			}
			if r := f.hawser("tail"); r.code != 1 || !hasAll(r.stderr, c.words) || !strings.Contains(r.stderr, "hint: ") {
				t.Errorf("tail: exit code %d, %s", r.code, r.stderr)
			}
		})
	}
}

// TestRegistryIsNamed: a registry that is not what was written is refused.
func TestRegistryIsNamed(t *testing.T) {
	t.Parallel()
	whole := storied(t)
	for name, damage := range map[string]func([]byte) []byte{
		"empty":              func([]byte) []byte { return nil },
		"half":               func(b []byte) []byte { return b[:len(b)/2] },
		"last byte gone":     func(b []byte) []byte { return b[:len(b)-1] },
		"one bit of page 1":  func(b []byte) []byte { b[101] ^= 4; return b },
		"one bit of the id":  func(b []byte) []byte { b[3] ^= 1; return b },
		"a page of zeros":    func(b []byte) []byte { clear(b[8192:12288]); return b },
		"another one's page": func(b []byte) []byte { copy(b[4096:8192], b[8192:12288]); return b },
	} {
		t.Run(name, func(t *testing.T) {
			f := whole.copyOf(t)
			path := f.path("server", "registry.db")
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			bad := damage(b)
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			f.refused("registry.db")
			if after, err := os.ReadFile(path); err != nil || string(after) != string(bad) {
				t.Errorf("the damaged file was changed: %v", err)
			}
		})
	}
}

// TestFlippedBit: one bit anywhere in a block of the log is either named, at start or when
// it is read, or it changes nothing that can be seen.
func TestFlippedBit(t *testing.T) {
	t.Parallel()
	whole := storied(t)
	want := whole.copyOf(t).look()
	if want.damage != "" || want.queued != waiting || want.retained != retained || len(want.text) < 100_000 {
		t.Fatalf("the whole fleet: %d queued, %d retained, %d bytes, %s", want.queued, want.retained, len(want.text), want.damage)
	}
	for _, stream := range []string{"LOG", "H", "Q", "R"} {
		t.Run(stream, func(t *testing.T) {
			const flips = 6
			named := 0
			for i := range flips {
				f := whole.copyOf(t)
				at := flip(t, f.stream(stream, "msgs", "1.blk"), i, flips)
				got := f.look()
				if got.damage == "" && got != want {
					t.Errorf("bit flipped at %d: not a word, and %d queued, %d retained, %d bytes where %d were", at, got.queued, got.retained, len(got.text), len(want.text))
				}
				if got.damage != "" {
					named++
					t.Logf("bit flipped at %d: %s", at, got.damage)
				}
			}
			if named == 0 {
				t.Error("none was noticed")
			}
		})
	}
}

// TestFlippedHeader: the store believes what the header of a record says before it looks at
// the checksum. A flipped sequence must not make it count to the end of the world.
func TestFlippedHeader(t *testing.T) {
	t.Parallel()
	whole := storied(t)
	for _, stream := range []string{"LOG", "Q"} {
		t.Run(stream, func(t *testing.T) {
			for at := range 12 { // length and sequence of the second record
				f := whole.copyOf(t)
				path := f.stream(stream, "msgs", "1.blk")
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				second := int(binary.LittleEndian.Uint32(b) &^ (1 << 31)) // the top bit is a mark
				b[second+at] ^= 0x20
				if err := os.WriteFile(path, b, 0o600); err != nil {
					t.Fatal(err)
				}
				if got := f.look(); got.damage == "" {
					t.Errorf("byte %d of the second record: not a word", at)
				}
			}
		})
	}
}

// flip changes one bit of a file, in the middle of part i of n.
func flip(t *testing.T, path string, i, n int) (at int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at = (2*i + 1) * len(b) / (2 * n)
	b[at] ^= 1 << (i % 8)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return at
}

// sight is everything that an outsider gets to see of a fleet's log.
type sight struct {
	damage           string // what was named; nothing else counts then
	text             string // the log and a history
	queued, retained int    // what a device and a service receive
}

// look starts a server and looks.
func (f *fleet) look() (v sight) {
	f.t.Helper()
	s := f.launch()
	select {
	case <-s.ended:
		if code := s.cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(s.log.String(), "\nhint: ") {
			f.t.Errorf("serve ended with %d: %s", code, s.log)
		}
		s.cmd.ProcessState = nil
		return sight{damage: plainLines(s.log.String())[0]}
	default:
	}
	defer s.stop()
	for _, args := range [][]string{{"tail", "--json", "--topic", "+/#"}, {"tail", sender, "--json"}, {"tail", sleeper, "--json"},
		{"tail", "backend", "--json"}, {"tail", "backend", "--json", "--limit", "5"}, {"tail", sleeper, "--json", "--limit", "5"}} {
		r := f.hawser(args...)
		if r.code != 0 {
			return sight{damage: r.stderr}
		}
		v.text += r.stdout
	}
	v.queued = receive(f, s, sleeper, false, "", waiting)
	v.retained = receive(f, s, "backend", true, "shop/#", retained)
	if line := s.log.find(0, "amaged"); line != "" {
		return sight{damage: line}
	}
	return v
}

// receive connects and counts the messages that come, until want have come or nothing has
// come for a while.
func receive(f *fleet, s *server, name string, clean bool, filter string, want int) (n int) {
	f.t.Helper()
	c, _, err := dial(s.addr, credentials(f.t, f.path("..", name)), &mqtt.Connect{Version: mqtt.V311, CleanStart: clean, ClientID: name})
	if err != nil {
		f.t.Fatal(err)
	}
	defer c.conn.Close()
	if filter != "" {
		sub := mqtt.Subscribe{PacketID: 1, Filters: []mqtt.Subscription{{Filter: filter, QoS: 1}}}
		if err := c.write(sub.Append(nil, mqtt.V311)); err != nil {
			f.t.Fatal(err)
		}
	}
	for n < want {
		p, err := c.nextWithin(3 * time.Second)
		if err != nil {
			return n
		}
		if p.Type != mqtt.PUBLISH {
			continue
		}
		n++
		if err := c.write((&mqtt.Ack{Type: mqtt.PUBACK, PacketID: p.id}).Append(nil, mqtt.V311)); err != nil {
			f.t.Fatal(err)
		}
	}
	return n
}

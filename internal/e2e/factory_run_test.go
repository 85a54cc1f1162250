package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hawser/internal/factory"
	"hawser/internal/identity"
	"hawser/internal/registry"
)

// TestFactoryTwenty: twenty emulated units in a row, each on the same probe after the one
// before was taken off. Their journal is imported; then each is a device of the fleet, with
// the certificate request that the journal has.
func TestFactoryTwenty(t *testing.T) {
	needTools(t, "qemu-system-arm")
	s := newStation(t, 25)
	s.arrive(s.provision(20), 25)
}

// TestFactoryOffline: the same without a network but loopback, and without any file of the
// server: its directory is covered by an empty one.
func TestFactoryOffline(t *testing.T) {
	needTools(t, "qemu-system-arm", "ip")
	needRoot(t)
	s := newStation(t, 25)
	var units []made
	t.Run("cut off", func(t *testing.T) {
		runtime.LockOSThread() // for good: the thread is of no use to anybody else
		cutOff(t, filepath.Dir(s.fleet.dir))
		inside := *s
		inside.t = t
		if _, err := os.Stat(s.fleet.dir); err == nil {
			t.Fatal("the server's files are there")
		}
		units = inside.provision(20)
	})
	if !t.Failed() && !t.Skipped() {
		s.arrive(units, 25)
	}
}

// cutOff gives this thread, and the programs that it starts, a network of loopback alone, and
// an empty directory in place of hidden.
func cutOff(t *testing.T, hidden string) {
	t.Helper()
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		t.Skipf("no namespaces here (%v): not shown here", err)
	}
	fatal(t, unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	fatal(t, unix.Mount("none", hidden, "tmpfs", 0, ""))
	if r := run(t, "ip", "link", "set", "lo", "up"); r.code != 0 {
		t.Fatalf("ip: %s", r.stderr)
	}
	links := run(t, "ip", "-o", "link")
	if up := strings.Count(links.stdout, "LOWER_UP"); up != 1 {
		t.Fatalf("%d links are up:\n%s", up, links.stdout)
	}
}

// arrive imports the journal and holds the registry against it and against what the bench
// said of its units.
func (s *station) arrive(units []made, of int) {
	t := s.t
	t.Helper()
	said := map[string]made{}
	for i, u := range units {
		if !u.ReadBack || u.Made != i+1 || u.Of != of || u.Left != of-1-i {
			t.Errorf("unit %d: %+v", i+1, u)
		}
		said[u.ID] = u
	}
	if len(said) != len(units) {
		t.Errorf("%d units have %d ids", len(units), len(said))
	}
	s.fleet.do("factory", "import", filepath.Join(s.dir, "line1.journal"))
	listed := map[string]bool{}
	for dec := json.NewDecoder(strings.NewReader(s.fleet.do("device", "list", "--json").stdout)); dec.More(); {
		var d struct{ ID, State, Class, Station string }
		fatal(t, dec.Decode(&d))
		listed[d.ID] = d.State == "active" && d.Class == "sensor-a" && d.Station == "line1"
	}
	reg, err := registry.Open(t.Context(), s.fleet.path("server", "registry.db"), registry.Options{})
	fatal(t, err)
	defer reg.Close()
	recorded := 0
	for _, l := range s.journal() {
		if l.What != factory.Made {
			continue
		}
		recorded++
		id, err := identity.ParseID(l.ID)
		fatal(t, err)
		csr, err := reg.CSR(t.Context(), id)
		if err != nil || !bytes.Equal(csr, l.CSR) || !listed[l.ID] || said[l.ID].ID == "" {
			t.Errorf("%s: listed %t, made %t, request of %d bytes, %v", l.ID, listed[l.ID], said[l.ID].ID != "", len(csr), err)
		}
	}
	if recorded != len(units) || len(listed) != len(units) {
		t.Errorf("%d units made, %d in the journal, %d devices", len(units), recorded, len(listed))
	}
}

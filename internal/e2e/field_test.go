package e2e

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// kitClient builds the device kit as a program.
func kitClient(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kitclient")
	if out, err := exec.Command("go", "build", "-o", path, "../check/testdata/kitclient").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// outcome is what a line of "check device --json" is read for.
type outcome struct {
	ID, Verdict, Why string
	Recovers         *bool
	Evidence         struct{ Waits []float64 }
	OK               bool
	Upstream         string
}

func outcomes(t *testing.T, lines string) (list []outcome, last outcome) {
	t.Helper()
	for line := range strings.Lines(lines) {
		var o outcome
		if err := json.Unmarshal([]byte(line), &o); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		list = append(list, o)
	}
	if len(list) < 2 {
		t.Fatalf("%d lines", len(list))
	}
	return list[:len(list)-1], list[len(list)-1]
}

// TestCheckInTheField: a device of a real fleet, with its own files, is tried in front of
// its own server, and storms nobody when it is cut off.
func TestCheckInTheField(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	dir := f.device("ABCD1234")
	s := f.serve()
	exec := fmt.Sprintf("exec %s {host} {port} %[2]s/ca.crt %[2]s/device.crt %[2]s/device.key", kitClient(t), dir)
	r := run(t, hawser, "check", "device", "--field", "--upstream", "localhost:"+s.port(), "--cafile", filepath.Join(dir, "ca.crt"),
		"--exec", exec, "--only", "X1,X2,H1.bad,H3,H6,R7.rst-hello,M7.cut", "--step", "6s", "--json")
	list, last := outcomes(t, r.stdout)
	if r.code != 0 || !last.OK || last.Upstream != "localhost:"+s.port() || len(list) < 20 {
		t.Errorf("exit code %d, %d cases, %+v: %s", r.code, len(list), last, r.stderr)
	}
	for _, o := range list {
		if o.Verdict != "pass" {
			t.Errorf("%s: %s: %s", o.ID, o.Verdict, o.Why)
		}
		if o.ID == "M7.cut" && len(o.Evidence.Waits) == 0 {
			t.Errorf("no pause was measured: %s", o.Why)
		}
	}
}

// TestCheckInTheFieldTakesNoKey: what could become a false broker's certificate is refused.
func TestCheckInTheFieldTakesNoKey(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	dir := f.device("ABCD1234")
	r := run(t, hawser, "check", "device", "--field", "--upstream", "localhost:1", "--cafile", filepath.Join(dir, "device.key"), "--exec", "true")
	if r.code != 1 || !strings.Contains(r.stderr, "never a key") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	r = run(t, hawser, "check", "device", "--field", "--upstream", "localhost:1", "--exec", "client {cafile}")
	if r.code != 2 || !strings.Contains(r.stderr, "{cafile}") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
}

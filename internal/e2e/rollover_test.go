package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"hawser/internal/admin"
	hawserfleet "hawser/internal/fleet"
	hawserserver "hawser/internal/server"
	"hawser/internal/sim"
)

// killOften runs hawser and kills it, each time later, until it comes to its end or done
// says that it had. It gives how often it was killed.
func killOften(t *testing.T, done func() bool, args ...string) (kills int) {
	t.Helper()
	for wait := 50 * time.Millisecond; ; wait *= 2 {
		cmd := exec.Command(hawser, args...)
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kill := time.AfterFunc(wait, func() { _ = cmd.Process.Kill() }) // it may have ended
		err := cmd.Wait()
		kill.Stop()
		if err == nil {
			return kills
		}
		if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !status.Signaled() {
			t.Fatalf("%q: %v\n%s", args, err, out.String())
		}
		if kills++; done() {
			return kills
		}
	}
}

func never() bool { return false }

func there(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// enrolled makes devices on the files of a fleet.
func enrolled(t *testing.T, f *fleet, n int) {
	t.Helper()
	c, done, err := hawserserver.Connect(t.Context(), f.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	l, err := hawserfleet.OpenLayout(f.dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := sim.Enrol(t.Context(), sim.Enrolment{Client: c, Layout: l, Devices: n}); err != nil {
		t.Fatal(err)
	}
}

// oneEach checks that all devices have a certificate of generation 2, and only one.
func oneEach(t *testing.T, f *fleet, n int) {
	t.Helper()
	var r admin.Rollover
	if err := json.Unmarshal([]byte(f.do("ca", "rollover", "status", "--json").stdout), &r); err != nil {
		t.Fatal(err)
	}
	if r.State != "moving" || r.Unsigned != 0 || r.Devices != n || r.Counts["failed"] != 0 {
		t.Errorf("state %s, %d devices, %d without a certificate, counts %v", r.State, r.Devices, r.Unsigned, r.Counts)
	}
	var d admin.DeviceDetail
	if err := json.Unmarshal([]byte(f.do("device", "show", r.Unproven[0].ID.String(), "--json").stdout), &d); err != nil {
		t.Fatal(err)
	}
	if len(d.Certificates) != 2 {
		t.Errorf("%s has %d certificates", d.ID, len(d.Certificates))
	}
	ca, err := hawserfleet.OpenCA(f.path("ca-a"), nil)
	if err != nil {
		t.Fatalf("the CA's journal after the kills: %v", err)
	}
	if err := ca.Close(); err != nil {
		t.Error(err)
	}
}

// TestRolloverIsKilled: a rollover that is killed again and again goes on each time where it
// was, at once in a trial fleet, and by files.
func TestRolloverIsKilled(t *testing.T) {
	t.Parallel()
	const devices = 2200
	t.Run("at once", func(t *testing.T) {
		t.Parallel()
		f := newFleet(t)
		enrolled(t, f, devices)
		kills := killOften(t, never, "ca", "rollover", "start", "--generation", "--dir", f.dir)
		t.Logf("killed %d times", kills)
		if kills < 3 {
			t.Errorf("it was killed %d times only, hardly in the middle", kills)
		}
		oneEach(t, f, devices)
	})
	t.Run("by files", func(t *testing.T) {
		t.Parallel()
		f := newFleet(t)
		enrolled(t, f, devices)
		toProduction(t, f)
		f.do("ca", "rollover", "start", "--generation")
		request := f.path("server", "requests", "rollover-1.jsonl")
		result := filepath.Join(t.TempDir(), "result.jsonl")
		kills := killOften(t, func() bool { return there(result) }, "ca", "sign", request, "--ca", f.path("ca-a"), "--out", result)
		kills += killOften(t, func() bool { return !there(request) }, "ca", "import", result, "--dir", f.dir)
		t.Logf("killed %d times", kills)
		if kills < 3 {
			t.Errorf("it was killed %d times only, hardly in the middle", kills)
		}
		oneEach(t, f, devices)
	})
}

// toProduction makes a fleet one whose commands write requests.
func toProduction(t *testing.T, f *fleet) {
	t.Helper()
	f.configure("trial = true", "trial = false")
}

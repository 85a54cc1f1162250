package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// pairOf is CERT,KEY of a device's directory, or a service's.
func pairOf(dir, name string) string {
	return filepath.Join(dir, name+".crt") + "," + filepath.Join(dir, name+".key")
}

// TestCheckBroker plays the intruder against a server of ours: no FAIL, nothing
// inconclusive, and every case that needs more than two devices was given it.
func TestCheckBroker(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	a, b, gone := f.device("ABCD1234"), f.device("0BADCAFE"), f.device("DEAD0001")
	svc := f.service("backend", "read private/+/u/#")
	f.configure(`pre_admission = "10s"`, `pre_admission = "4s"`) // two cases wait for its end
	s := f.serve()
	f.do("device", "revoke", "DEAD0001", "--reason", "for the check")
	r := run(t, hawser, "check", "broker", "localhost:"+s.port(), "--device", pairOf(a, "device"), "--other", pairOf(b, "device"),
		"--revoked", pairOf(gone, "device"), "--service", pairOf(svc, "service"), "--patience", "15s",
		"--revoke-exec", fmt.Sprintf("%s device revoke {id} --reason check --dir %s", hawser, f.dir))
	t.Log(r.stdout)
	if r.code != 0 {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	for _, line := range strings.Split(r.stdout, "\n") {
		if strings.Contains(line, "n/a  ") || strings.Contains(line, "warn  ") {
			t.Errorf("not judged, or not clean: %s", line)
		}
	}
}

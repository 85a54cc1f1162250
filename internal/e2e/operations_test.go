package e2e

import (
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
)

// TestOperationsRehearsal runs the rehearsal of OPERATIONS.md as printed there; only the
// port of the emulated unit differs.
func TestOperationsRehearsal(t *testing.T) {
	t.Parallel() // it mostly waits for the build
	needTools(t, "qemu-system-arm")
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	blocks := shellBlocks(t, filepath.Join(root, "OPERATIONS.md"), "Rehearse it")
	if len(blocks) != 5 {
		t.Fatalf("the section has %d blocks; this test knows 5", len(blocks))
	}
	s := newTour(t, root)
	debug := freePort(t)
	for i := range blocks {
		blocks[i] = strings.ReplaceAll(blocks[i], "127.0.0.1:1234", "127.0.0.1:"+debug)
	}
	s.run(blocks[0])
	s.run(fmt.Sprintf("sed -i 's/127.0.0.1:9883/127.0.0.1:%s/' fleet/hawser.toml", s.metrics))
	firmware, qemu, _ := strings.Cut(strings.TrimSpace(blocks[1]), "\n")
	s.run(firmware)
	s.background(qemu)
	s.until("the debug server", func() bool {
		c, err := net.Dial("tcp", "127.0.0.1:"+debug)
		if err != nil {
			return false
		}
		return c.Close() == nil
	})
	bench := s.run(blocks[2])
	for _, want := range []string{"PASS", "line1", "active"} {
		if !strings.Contains(bench, want) {
			t.Errorf("bench day does not say %q:\n%s", want, bench)
		}
	}
	if out := s.run(blocks[3]); !strings.Contains(out, "rollover 1 is over: 0 devices moved, 1 left behind") {
		t.Errorf("rollover day does not end as it should:\n%s", out)
	}
	stolen := s.run(blocks[4])
	for _, want := range []string{"station line1 revoked", "1 device revoked", "anchor set   1 -> 2", "device.revoke", "station.revoke"} {
		if !strings.Contains(stolen, want) {
			t.Errorf("the day a key is stolen does not say %q:\n%s", want, stolen)
		}
	}
}

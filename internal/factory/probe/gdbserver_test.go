package probe

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestGDBServer works on a host program under gdbserver, which knows X, sends checksummed
// replies with repetitions, and has no reset but a restart.
func TestGDBServer(t *testing.T) {
	server, cc := need(t, "gdbserver"), need(t, "gcc")
	dir := t.TempDir()
	source, program, said := filepath.Join(dir, "unit.c"), filepath.Join(dir, "unit"), filepath.Join(dir, "said")
	const c = `#include <stdio.h>
volatile unsigned char unit[16384] __attribute__((section(".unit"))) = {0x55};
int main(int n, char **arg) { FILE *f = fopen(arg[1], "w"); fprintf(f, "runs %x\n", unit[0]); return fclose(f); }
`
	if err := os.WriteFile(source, []byte(c), 0o600); err != nil {
		t.Fatal(err)
	}
	// Not position independent and low: a unit's addresses have 32 bits.
	if out, err := exec.Command(cc, "-no-pie", "-Wl,--section-start=.unit=0x10000000", "-o", program, source).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v: %s", err, out)
	}
	if err := syscall.Mkfifo(said, 0o600); err != nil {
		t.Fatal(err)
	}
	words := make(chan string, 1)
	go func() {
		text, _ := os.ReadFile(said)
		words <- string(text)
	}()
	port := freePort(t)
	start(t, server, "--once", fmt.Sprintf("127.0.0.1:%d", port), program, said)
	p := open(t, fmt.Sprintf("gdb:127.0.0.1:%d", port), nil)

	long, zeros := pattern(9000), make([]byte, 300) // zeros come back run-length encoded
	if err := p.Write(t.Context(), []Region{{0x10000000, long, true}, {0x10003000, zeros, false}}); err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[uint32][]byte{0x10000000: long, 0x10003000: zeros} {
		got, err := p.Read(t.Context(), addr, len(want))
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%#x does not read back: %v", addr, err)
		}
	}
	if err := p.Write(t.Context(), []Region{{0x70000000, long, true}}); err == nil || strings.Contains(err.Error(), "\n") {
		t.Errorf("where there is no memory: %v", err)
	}
	if err := p.Reset(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-words:
		if got != "runs 55\n" {
			t.Errorf("after the restart the program said %q", got)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the program does not run after the reset")
	}
}

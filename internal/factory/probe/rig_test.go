package probe

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// need skips a test whose tool is not there.
func need(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("%s is not installed: not shown here", program)
	}
	return path
}

// freePort gives a port of 127.0.0.1 that nobody listens on at this moment.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// start runs a program until the end of the test; the channel closes when it has ended.
func start(t *testing.T, name string, args ...string) (*exec.Cmd, <-chan struct{}) {
	t.Helper()
	cmd := exec.Command(name, args...)
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		if text, _ := os.ReadFile(log.Name()); t.Failed() && len(text) > 0 {
			t.Logf("%s said: %s", name, text)
		}
		log.Close()
	})
	return cmd, ended
}

// qemu starts an emulated Cortex-M4, halted, and gives the specification of its gdbstub. Its
// firmware is a vector table and an endless loop.
func qemu(t *testing.T) (*exec.Cmd, string) {
	t.Helper()
	path := need(t, "qemu-system-arm")
	image := binary.LittleEndian.AppendUint32(nil, 0x20000400)
	image = binary.LittleEndian.AppendUint32(image, 9)          // reset vector, thumb
	image = binary.LittleEndian.AppendUint32(image, 0xE7FEE7FE) // b .
	kernel := filepath.Join(t.TempDir(), "kernel.bin")
	if err := os.WriteFile(kernel, image, 0o600); err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	cmd, _ := start(t, path, "-M", "mps2-an386", "-gdb", fmt.Sprintf("tcp:127.0.0.1:%d", port), "-S",
		"-nographic", "-monitor", "none", "-serial", "none", "-kernel", kernel)
	return cmd, fmt.Sprintf("gdb:127.0.0.1:%d,identity=0x20010000,trust=0x20011000", port)
}

// open gives a probe for a specification that has answered.
func open(t *testing.T, text string, change func(*Spec)) Probe {
	t.Helper()
	spec, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(&spec)
	}
	p, err := spec.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := p.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	return p
}

// pattern is n bytes among which are all that must be escaped.
func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*7 + i>>8)
	}
	return p
}

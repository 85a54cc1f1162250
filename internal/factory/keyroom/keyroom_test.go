package keyroom

import (
	"bytes"
	"crypto/elliptic"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"hawser/internal/factory"
	"hawser/internal/pki"
)

// TestMain is the process for the key too: started with one argument it is Main.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "unit-child" {
		if err := Main(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func fatal(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newTestRoom(t *testing.T) *room {
	t.Helper()
	r, err := newRoom()
	fatal(t, err)
	return r
}

func TestRange(t *testing.T) {
	n := elliptic.P256().Params().N
	one := big.NewInt(1)
	for _, c := range []struct {
		d  *big.Int
		ok bool
	}{{new(big.Int), false}, {one, true}, {new(big.Int).Sub(n, one), true}, {n, false}, {new(big.Int).Add(n, one), false}} {
		if got := inRange(c.d.FillBytes(make([]byte, scalarSize))); got != c.ok {
			t.Errorf("%x: %t", c.d, got)
		}
	}
	r := newTestRoom(t)
	seen := map[string]bool{}
	for range 100 {
		fatal(t, r.draw())
		if !inRange(r.scalar()) || seen[string(r.scalar())] {
			t.Fatalf("drew %x", r.scalar())
		}
		seen[string(r.scalar())] = true
	}
}

// TestWipe: bytes that are left anywhere in the room are found.
func TestWipe(t *testing.T) {
	r := newTestRoom(t)
	for _, at := range []int{0, atBlock, atReadBack, roomSize - 1} {
		r.mem[at] = 1
		if err := r.empty(); !errors.Is(err, errLeft) {
			t.Errorf("a byte at %d: %v", at, err)
		}
		if err := r.wipe(); err != nil {
			t.Errorf("a byte at %d: %v", at, err)
		}
	}
}

// TestRequest: the request proves possession of the key in the room.
func TestRequest(t *testing.T) {
	r := newTestRoom(t)
	fatal(t, r.draw())
	der, err := r.request(0xABCD1234)
	fatal(t, err)
	csr, err := pki.ParseCSR(der)
	fatal(t, err)
	pub, err := r.public()
	fatal(t, err)
	if !pub.Equal(csr.Pub) {
		t.Error("the request is for another key")
	}
}

// TestComplaints: a probe's complaint that quotes the key is not passed on.
func TestComplaints(t *testing.T) {
	r := newTestRoom(t)
	fatal(t, r.draw())
	d := r.scalar()
	for _, text := range []string{string(d), hex.EncodeToString(d), strings.ToUpper(hex.EncodeToString(d[20:24])), "bad line :10000000" + hex.EncodeToString(d[3:9])} {
		if got := r.clean("it said: " + text); strings.Contains(got, text) {
			t.Errorf("%q is passed on", text)
		}
	}
	if got := r.clean("no such target"); got != "no such target" {
		t.Error(got)
	}
}

// startChild starts this test program as the process for the key.
func startChild(t *testing.T, wrapper ...string) *Child {
	t.Helper()
	self, err := os.Executable()
	fatal(t, err)
	c, err := Start(t.Context(), append(wrapper, self, "unit-child")...)
	fatal(t, err)
	t.Cleanup(c.Close)
	return c
}

func unusedPort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	fatal(t, err)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// nobody is a wrapper that gives up root and runs a copy of this program from where it can
// be read. rest is what the shell does before.
func nobody(t *testing.T, rest string) []string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("not root: not shown here")
	}
	if _, err := exec.LookPath("setpriv"); err != nil {
		t.Skip("setpriv is not installed")
	}
	dir, err := os.MkdirTemp("", "keyroom-")
	fatal(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	fatal(t, os.Chmod(dir, 0o755))
	text, err := os.ReadFile("/proc/self/exe")
	fatal(t, err)
	copied := filepath.Join(dir, "keyroom")
	fatal(t, os.WriteFile(copied, text, 0o755))
	return []string{"setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "/bin/sh", "-c", rest + ` exec "$0" unit-child`, copied}
}

// TestProcess: what the kernel says of a process that waits for a unit, and of its memory.
func TestProcess(t *testing.T) {
	c := startChild(t, nobody(t, "")...)
	waits := make(chan struct{})
	c.Notice = func(string) { close(waits) }
	go func() { _, _ = c.Wait(fmt.Sprintf("gdb:127.0.0.1:%d,identity=0,trust=0x1000", unusedPort(t)), nil) }()
	<-waits
	proc := fmt.Sprintf("/proc/%d/", c.cmd.Process.Pid)
	limits, err := os.ReadFile(proc + "limits")
	fatal(t, err)
	if !strings.Contains(string(limits), "Max core file size        0                    0") {
		t.Errorf("limits:\n%s", limits)
	}
	info, err := os.Stat(proc + "mem")
	fatal(t, err)
	if uid := info.Sys().(*syscall.Stat_t).Uid; uid != 0 {
		t.Errorf("the memory of the process belongs to user %d, not to root: it can be dumped", uid)
	}
	smaps, err := os.ReadFile(proc + "smaps")
	fatal(t, err)
	if !lockedAway(string(smaps)) {
		t.Errorf("no memory that is locked and excluded from core dumps:\n%s", smaps)
	}
}

// lockedAway finds the room: its size, all of it locked, "lo" and "dd" among its flags.
func lockedAway(smaps string) bool {
	size, locked := 0, 0
	for line := range strings.Lines(smaps) {
		f := strings.Fields(line)
		switch f[0] {
		case "Size:":
			size, _ = strconv.Atoi(f[1]) // the kernel writes numbers
		case "Locked:":
			locked, _ = strconv.Atoi(f[1])
		case "VmFlags:":
			flags := strings.Join(f, " ") + " "
			if size == roomSize>>10 && locked == size && strings.Contains(flags, " lo ") && strings.Contains(flags, " dd ") {
				return true
			}
		}
	}
	return false
}

// TestMemoryThatCannotBeLocked: there is no key then, and a hint.
func TestMemoryThatCannotBeLocked(t *testing.T) {
	c := startChild(t, nobody(t, "ulimit -l 0;")...)
	_, err := c.Wait("gdb:127.0.0.1:1,identity=0,trust=0x1000", nil)
	if err == nil || !strings.Contains(err.Error(), "no key was made\nhint: ") || !strings.Contains(err.Error(), "RLIMIT_MEMLOCK") {
		t.Errorf("%v", err)
	}
}

// TestParentGone: a process whose parent is gone ends by itself, and when it is told to.
func TestParentGone(t *testing.T) {
	for name, leave := range map[string]func(*Child){
		"gone":    func(c *Child) { _ = c.orders.Close() },
		"stopped": func(c *Child) { c.Stop(errors.New("enough")) },
	} {
		c := startChild(t)
		waits, ended := make(chan struct{}), make(chan error, 1)
		c.Notice = func(string) { close(waits) }
		go func() {
			_, err := c.Wait(fmt.Sprintf("gdb:127.0.0.1:%d,identity=0,trust=0x1000", unusedPort(t)), nil)
			ended <- err
		}()
		<-waits
		leave(c)
		if err := <-ended; err == nil || name == "stopped" && err.Error() != "enough" {
			t.Errorf("%s: %v", name, err)
		}
		c.Close()
		if c.cmd.ProcessState.ExitCode() != 0 {
			t.Errorf("%s: %v", name, c.cmd.ProcessState)
		}
	}
}

// TestUnit: the whole of a unit on an emulated one, the room empty at its end.
func TestUnit(t *testing.T) {
	spec := qemu(t)
	c := startChild(t)
	seen, err := c.Wait(spec, nil)
	fatal(t, err)
	if _, has := seen.ID(); has {
		t.Fatalf("a blank unit with an id: %+v", seen)
	}
	der, err := c.Make(0xABCD1234, 0)
	fatal(t, err)
	trust, err := factory.EncodeTrust([]factory.Entry{{Tag: factory.TagCertificate, Value: bytes.Repeat([]byte("c"), 700)}})
	fatal(t, err)
	back, err := c.Write(trust)
	if err != nil || !back {
		t.Fatalf("read back %t, %v", back, err)
	}
	fatal(t, c.Reset())
	c.Close()

	c = startChild(t)
	seen, err = c.Wait(spec, nil)
	fatal(t, err)
	if !seen.same(Written(0xABCD1234, 0)) {
		t.Errorf("%+v", seen)
	}
	v, err := c.Read()
	fatal(t, err)
	csr, err := pki.ParseCSR(der)
	fatal(t, err)
	key, err := pki.KeyFingerprint(csr.Pub)
	fatal(t, err)
	if v.Bad != "" || v.ID != 0xABCD1234 || pki.Fingerprint(v.Public) != key || !bytes.Equal(v.Trust, trust) {
		t.Errorf("%+v", v)
	}
}

// qemu starts a unit and gives how it is reached.
func qemu(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-arm"); err != nil {
		t.Skip("qemu-system-arm is not installed")
	}
	port := unusedPort(t)
	image := []byte{0, 4, 0, 0x20, 9, 0, 0, 0, 0xfe, 0xe7, 0xfe, 0xe7} // stack, reset vector, b .
	kernel := filepath.Join(t.TempDir(), "kernel.bin")
	fatal(t, os.WriteFile(kernel, image, 0o600))
	cmd := exec.Command("qemu-system-arm", "-M", "mps2-an386", "-gdb", fmt.Sprintf("tcp:127.0.0.1:%d", port), "-S",
		"-display", "none", "-monitor", "none", "-serial", "none", "-kernel", kernel)
	fatal(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have gone by itself
		_ = cmd.Wait()
	})
	return fmt.Sprintf("gdb:127.0.0.1:%d,identity=0x20010000,trust=0x20011000", port)
}

// TestOrder: orders that come at the wrong time are refused.
func TestOrder(t *testing.T) {
	for _, o := range []order{{Do: doWrite, Trust: []byte{1}}, {Do: doReset}, {Do: doRead}, {Do: "dance"}, {Do: doWait, Probe: "gdb:10.0.0.1:1,identity=0,trust=0x1000"}} {
		c := startChild(t)
		if _, err := c.ask(o); err == nil {
			t.Errorf("%s was obeyed", o.Do)
		}
		c.Close()
	}
}

// TestDiffers: no value of what was read is told.
func TestDiffers(t *testing.T) {
	err := differs(0x20010000, []byte{1, 2, 3, 0x5a}, []byte{1, 2, 3, 0xa5})
	if err == nil || !strings.Contains(err.Error(), "0x20010003") || strings.Contains(err.Error(), "5a") || strings.Contains(err.Error(), "a5") {
		t.Error(err)
	}
	if differs(0, []byte{1, 2}, []byte{1}) == nil || differs(0, nil, nil) != nil {
		t.Error("lengths")
	}
}

// TestMainAlone: the hidden command, started by hand, does nothing.
func TestMainAlone(t *testing.T) {
	self, err := os.Executable()
	fatal(t, err)
	out, err := exec.Command(self, "unit-child").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "is started by") {
		t.Errorf("%v: %s", err, out)
	}
}

func FuzzMessage(f *testing.F) {
	var b bytes.Buffer
	fatal(f, send(&b, order{Do: doMake, ID: 0xABCD1234}))
	f.Add(b.Bytes())
	f.Add([]byte{0, 0, 0, 2, '{', '}'})
	f.Add([]byte{255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, data []byte) {
		in := bytes.NewReader(data)
		for {
			var o order
			if err := receive(in, &o); err != nil {
				break
			}
			var out bytes.Buffer
			if err := send(&out, o); err != nil {
				t.Fatal(err)
			}
		}
		var a answer
		if err := receive(bytes.NewReader(data), &a); err == nil && len(data) > maxMessage+4+1<<20 {
			t.Fatal("a message that is too large")
		}
	})
}

package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"hawser/internal/factory"
)

// powerCut runs argv and kills it, and every process that it has started, when the nth call
// that writes is about to be made. It ends with 77 if it came so far, else with the
// program's own code. It is a process of its own, since it waits for all its children.
func powerCut(nth int, argv []string) error {
	runtime.LockOSThread() // the tracer is a thread
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	main := cmd.Process.Pid
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(main, &ws, 0, nil); err != nil {
		return err
	}
	const exitKill = 0x100000 // PTRACE_O_EXITKILL
	if err := syscall.PtraceSetOptions(main, syscall.PTRACE_O_TRACESYSGOOD|syscall.PTRACE_O_TRACECLONE|syscall.PTRACE_O_TRACEFORK|syscall.PTRACE_O_TRACEVFORK|exitKill); err != nil {
		return err
	}
	if err := syscall.PtraceSyscall(main, 0); err != nil {
		return err
	}
	for count := 0; ; {
		tid, err := syscall.Wait4(-1, &ws, syscall.WALL, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case err != nil:
			return err
		case ws.Exited() && tid == main:
			os.Exit(ws.ExitStatus())
		case !ws.Stopped():
			continue
		}
		deliver := 0
		switch s := ws.StopSignal(); s {
		case syscall.SIGTRAP | 0x80:
			if writes(tid) {
				count++
			}
		case syscall.SIGTRAP, syscall.SIGSTOP: // a new thread or process
		default:
			deliver = int(s)
		}
		if count == nth {
			os.Exit(77) // takes all that is traced with it
		}
		_ = syscall.PtraceSyscall(tid, deliver) // one that is gone needs no more
	}
}

// writes reports whether a stopped thread is about to make a call that writes.
func writes(tid int) bool {
	var info struct { // struct ptrace_syscall_info
		op   uint8
		_    [3]uint8
		arch uint32
		_    [2]uint64
		nr   uint64
		args [6]uint64
		_    uint64
	}
	const getSyscallInfo, entry = 0x420e, 1
	n, _, errno := syscall.RawSyscall6(syscall.SYS_PTRACE, getSyscallInfo, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 || n == 0 || info.op != entry {
		return false
	}
	if info.nr == unix.SYS_OPENAT {
		return info.args[2]&unix.O_CREAT != 0
	}
	return slices.Contains([]uint64{unix.SYS_WRITE, unix.SYS_PWRITE64, unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_FTRUNCATE, unix.SYS_FCHMOD,
		unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_LINKAT, unix.SYS_UNLINKAT, unix.SYS_SENDTO}, info.nr)
}

// TestFactoryPowerCut: the bench is killed at its first call that writes, at the second,
// and so on, each time starting again from what is left, until a run comes to its end.
func TestFactoryPowerCut(t *testing.T) {
	needTools(t, "qemu-system-arm")
	s := newStation(t, 400)
	s.plug()
	h := &history{s: s, keys: map[string]string{}}
	const most = 300
	for nth := 1; ; nth++ {
		if nth > most {
			t.Fatalf("not at its end after %d calls", most)
		}
		code, out := s.cut(nth)
		h.look(nth, out)
		if code == 0 {
			t.Logf("killed at %d calls", nth-1)
			break
		}
		if code != 77 {
			t.Fatalf("killed at call %d: exit code %d: %s", nth, code, out)
		}
	}
	h.check()
}

// cut is one run of the bench for one unit, killed at the nth call that writes.
func (s *station) cut(nth int) (code int, out string) {
	s.t.Helper()
	self, err := os.Executable()
	fatal(s.t, err)
	cmd := exec.Command(self, append([]string{hawser}, s.args("run", "--json", "--count", "1", "--again")...)...)
	cmd.Env = append(os.Environ(), "HAWSER_E2E_POWER_CUT="+strconv.Itoa(nth))
	var text bytes.Buffer
	cmd.Stdout, cmd.Stderr = &text, &text
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), text.String()
}

// history is what was seen after each cut.
type history struct {
	s     *station
	keys  map[string]string // key in a unit -> the id it had
	taken []string          // ids, as the file "reserved" named them
}

// look looks at the bench and at the unit after a cut.
func (h *history) look(nth int, out string) {
	t := h.s.t
	t.Helper()
	text, err := os.ReadFile(h.s.dir + "/reserved")
	fatal(t, err)
	if i := strings.Index(string(text), `"id":"`); i >= 0 {
		h.taken = append(h.taken, string(text[i+6:i+14]))
	}
	v, err := factory.ParseIdentity(h.s.memory(atIdentity, factory.IdentitySize))
	if err != nil {
		return // it was not written, or not to its end
	}
	id := v.ID.String()
	if other, ok := h.keys[string(v.Scalar)]; ok && other != id {
		t.Errorf("call %d: %s and %s have the same key", nth, other, id)
	}
	h.keys[string(v.Scalar)] = id
	if strings.Contains(out, `"result":"pass"`) && !strings.Contains(out, `"id":"`+id+`"`) {
		t.Errorf("call %d: the unit is %s, but %s", nth, id, out)
	}
}

// check holds the journal against all that was seen. That no id and no key is in it twice
// is checked when it is read.
func (h *history) check() {
	t := h.s.t
	t.Helper()
	end := map[string]string{}
	units := map[string]*ecdsa.PublicKey{}
	n := 0
	for _, l := range h.s.journal() {
		if l.ID != "" {
			end[l.ID] = l.What
			n++
		}
		if l.Unit != nil {
			units[l.ID] = l.Unit.CSR.Pub
		}
	}
	for i := range n { // ids are used in the order of the block
		if id := fmt.Sprintf("%08X", 0xABCD0001+i); end[id] == "" {
			t.Errorf("%s was passed over", id)
		}
	}
	for _, id := range h.taken {
		if end[id] == "" {
			t.Errorf("%s was taken, and is neither a unit nor burnt", id)
		}
	}
	for scalar, id := range h.keys {
		key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), []byte(scalar))
		fatal(t, err)
		if pub := units[id]; pub != nil && !pub.Equal(&key.PublicKey) {
			t.Errorf("%s has another key in the journal than in the unit", id)
		}
	}
	t.Logf("%d ids: %d units, %d keys were seen in the unit", n, len(units), len(h.keys))
	if len(units) == 0 || len(units) == n {
		t.Error("not both units and burnt ids")
	}
}

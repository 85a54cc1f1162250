package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"hawser/internal/factory"
	"hawser/internal/factory/keyroom"
)

// The calls by which a byte can leave a process, and those with names in them.
const leaving = "write,writev,pwrite64,pwritev,pwritev2,sendto,sendmsg,sendmmsg,sendfile,splice,tee,vmsplice,process_vm_writev,io_uring_setup," +
	"execve,execveat,openat,openat2,open,creat,rename,renameat,renameat2,link,linkat,symlink,symlinkat,mkdir,mkdirat,setxattr,fsetxattr,prctl,memfd_create,mmap"

var quoted = regexp.MustCompile(`"((?:\\x[0-9a-f]{2})*)"`)

// said gives the bytes in all strings of a line of strace -xx.
func said(line string) (out []byte) {
	for _, m := range quoted.FindAllStringSubmatch(line, -1) {
		for i := 0; i+4 <= len(m[1]); i += 4 {
			b, _ := strconv.ParseUint(m[1][i+2:i+4], 16, 8) // two hex digits, says the pattern
			out = append(out, byte(b))
		}
		out = append(out, ' ')
	}
	return out
}

// TestFactoryKeysStayInside: of a whole batch, no byte of a unit's key leaves the bench in
// any system call but those of the probe's own connection, and none is in a file.
func TestFactoryKeysStayInside(t *testing.T) {
	needTools(t, "qemu-system-arm", "strace")
	const batch = 5
	s := newStation(t, batch)
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	trace := filepath.Join(t.TempDir(), "trace")
	units := s.provision(batch, "strace", "-f", "--seccomp-bpf", "-qq", "-yy", "-xx", "-s", "65536", "-e", "trace="+leaving, "-e", "signal=none", "-o", trace)
	keys := make([][]byte, len(units))
	for i, u := range units {
		keys[i] = u.scalar
	}
	searchTrace(t, s, trace, keys)
	if n := searchFiles(t, s.dir, keys); n < 6 {
		t.Errorf("%d files of the bench were searched", n)
	}
	searchFiles(t, tmp, keys)
}

// searchTrace looks through the calls. That the keys are found on the probe's connection
// shows that the search can find them.
func searchTrace(t *testing.T, s *station, trace string, keys [][]byte) {
	t.Helper()
	f, err := os.Open(trace)
	fatal(t, err)
	defer f.Close()
	probe := regexp.MustCompile(fmt.Sprintf(`^\d+ +(write|sendto)\(\d+<TCP:\[127\.0\.0\.1:\d+->127\.0\.0\.1:%d\]>,`, s.port))
	onProbe, elsewhere, calls := []byte{}, []byte{}, 0
	in := bufio.NewReader(f)
	for {
		line, err := in.ReadString('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		fatal(t, err)
		calls++
		switch {
		case probe.MatchString(line):
			onProbe = append(onProbe, said(line)...)
		case strings.Contains(line, " mmap(") && strings.Contains(line, "MAP_SHARED") && strings.Contains(line, "PROT_WRITE"):
			t.Errorf("memory that is shared with a file: %.200s", line)
		case strings.Contains(line, "io_uring_setup("):
			t.Errorf("calls that are not seen here: %.200s", line)
		default:
			elsewhere = append(elsewhere, said(line)...)
		}
	}
	t.Logf("%d calls, %d bytes on the probe's connection, %d elsewhere", calls, len(onProbe), len(elsewhere))
	for i, k := range keys {
		if !holds(onProbe, k) {
			t.Errorf("the key of unit %d was not seen on the probe's connection", i+1)
		}
		if holds(elsewhere, k) {
			t.Errorf("the key of unit %d left the bench otherwise than by the probe", i+1)
		}
	}
}

// shadow is the size from which a mapping is the race detector's own.
const shadow = 1 << 31

// core reads what a core file of a running process would hold: all its memory that is
// there. Only root can, since the process forbids it to everybody else.
func core(t *testing.T, pid int) (text []byte) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	fatal(t, err)
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	fatal(t, err)
	defer mem.Close()
	var from, to int64
	for line := range strings.Lines(string(maps)) {
		var perms string
		if n, _ := fmt.Sscanf(line, "%x-%x %s", &from, &to, &perms); n == 3 && perms[0] != 'r' {
			from = to // not readable
		}
		var rss int64
		if n, _ := fmt.Sscanf(line, "Rss: %d kB", &rss); n != 1 || rss == 0 || from == to {
			continue
		}
		if to-from >= shadow && len(raceFlags) > 0 {
			continue
		}
		part := make([]byte, to-from)
		if _, err := mem.ReadAt(part, from); err == nil { // the kernel's own pages give an error
			text = append(text, part...)
		}
	}
	return text
}

// TestFactoryCoreOfTheBench: a core file of the bench, taken by root after a unit, holds
// nothing of the unit's key.
func TestFactoryCoreOfTheBench(t *testing.T) {
	needTools(t, "qemu-system-arm")
	needRoot(t)
	s := newStation(t, 2)
	b := s.start("run", "--json")
	u := s.plug()
	m := b.unit()
	key := s.scalar(m)
	text := core(t, b.cmd.Process.Pid)
	t.Logf("%d bytes of memory", len(text))
	if !strings.Contains(string(text), m.ID) {
		t.Errorf("a core file of %d bytes without the unit's id: not one of the bench", len(text))
	}
	if holdsRaw(text, key) {
		t.Error("the core file of the bench holds the unit's key")
	}
	u.unplug()
	b.interrupt(0)
}

// TestFactoryCoreFinds is the control: with the same work done in the process itself, the
// same search finds the key.
func TestFactoryCoreFinds(t *testing.T) {
	needTools(t, "qemu-system-arm")
	needRoot(t)
	s := newStation(t, 2)
	s.plug()
	self, err := os.Executable()
	fatal(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "HAWSER_E2E_KEY_IN_PARENT="+s.probe())
	cmd.Stderr = os.Stderr
	hold, err := cmd.StdinPipe()
	fatal(t, err)
	out, err := cmd.StdoutPipe()
	fatal(t, err)
	fatal(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	text := core(t, cmd.Process.Pid)
	fatal(t, hold.Close())
	fatal(t, cmd.Wait())
	if !holdsRaw(text, s.scalar(made{ID: "ABCD0001"})) {
		t.Error("the key was made in this process, and the search did not find it")
	}
}

// keyInParent makes a unit as the process for the key does, but in this one.
func keyInParent(spec string) error {
	orders, orderEnd, err := os.Pipe()
	if err != nil {
		return err
	}
	answers, answerEnd, err := os.Pipe()
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- keyroom.Serve(orders, answerEnd) }()
	c := keyroom.Attach(orderEnd, answers)
	if _, err := c.Wait(spec, nil); err != nil {
		return err
	}
	if _, err := c.Make(0xABCD0001, 0); err != nil {
		return err
	}
	trust, err := factory.EncodeTrust([]factory.Entry{{Tag: factory.TagCertificate, Value: []byte("a certificate")}})
	if err != nil {
		return err
	}
	if _, err := c.Write(trust); err != nil {
		return err
	}
	if err := c.Reset(); err != nil {
		return err
	}
	if err := <-served; err != nil {
		return err
	}
	fmt.Println("done")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

package e2e

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"hawser/internal/factory"
	"hawser/internal/factory/probe"
)

// Where an emulated unit keeps what the bench writes.
const (
	atIdentity = 0x20010000
	atTrust    = 0x20011000
)

func fatal(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// station is a bench directory with a block loaded, the fleet that it came from, and a port
// for the units.
type station struct {
	t     testing.TB
	fleet *fleet
	dir   string
	port  int
}

// newStation sets up a trial fleet and a trial bench with n ids of it.
func newStation(t testing.TB, n int, more ...string) *station {
	t.Helper()
	s := &station{t, newFleet(t), filepath.Join(t.TempDir(), "bench"), unusedPort(t)}
	s.do(append([]string{"init", "--station", "line1", "--trial", "--probe", s.probe(), "--class", "sensor-a", "--hardware", "3"}, more...)...)
	block := s.fleet.path("..", "line1.block")
	s.fleet.do("factory", "reserve", "--station", "line1", "--count", fmt.Sprint(n), "--station-csr", filepath.Join(s.dir, "station.csr"), "--out", block)
	s.do("load", block)
	return s
}

func (s *station) probe() string {
	return fmt.Sprintf("gdb:127.0.0.1:%d,identity=%#x,trust=%#x", s.port, atIdentity, atTrust)
}

// args is a factory command on this bench.
func (s *station) args(args ...string) []string {
	return append(append([]string{"factory"}, args...), "--dir", s.dir)
}

func (s *station) do(args ...string) result {
	s.t.Helper()
	r := run(s.t, hawser, s.args(args...)...)
	if r.code != 0 {
		s.t.Fatalf("hawser factory %q: exit code %d\n%s%s", args, r.code, r.stdout, r.stderr)
	}
	return r
}

func (s *station) journal() []factory.Line {
	s.t.Helper()
	f, err := os.Open(filepath.Join(s.dir, "line1.journal"))
	fatal(s.t, err)
	defer f.Close()
	var all []factory.Line
	_, err = factory.ReadJournal(f, factory.Known{}, func(l *factory.Line) error {
		all = append(all, *l)
		return nil
	})
	fatal(s.t, err)
	return all
}

func unusedPort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	fatal(t, err)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// unit is an emulated Cortex-M4 whose firmware is an endless loop.
type unit struct {
	t   testing.TB
	cmd *exec.Cmd
}

// plug starts a blank unit on the station's port and waits until its debug server listens.
func (s *station) plug(wrapper ...string) *unit {
	s.t.Helper()
	image := binary.LittleEndian.AppendUint32(nil, 0x20000400) // stack
	image = binary.LittleEndian.AppendUint32(image, 9)         // reset vector, thumb
	image = binary.LittleEndian.AppendUint32(image, 0xE7FEE7FE)
	kernel := filepath.Join(s.t.TempDir(), "kernel.bin")
	fatal(s.t, os.WriteFile(kernel, image, 0o600))
	argv := append(wrapper, "qemu-system-arm", "-M", "mps2-an386", "-gdb", fmt.Sprintf("tcp:127.0.0.1:%d", s.port), "-S",
		"-display", "none", "-monitor", "none", "-serial", "none", "-kernel", kernel)
	u := &unit{s.t, exec.Command(argv[0], argv[1:]...)}
	u.cmd.Stderr = os.Stderr
	fatal(s.t, u.cmd.Start())
	s.t.Cleanup(u.unplug)
	until(s.t, "the unit's debug server", func() bool {
		table, err := os.ReadFile("/proc/thread-self/net/tcp") // a connection would halt the unit
		fatal(s.t, err)
		return strings.Contains(string(table), fmt.Sprintf(": 0100007F:%04X 00000000:0000 0A ", s.port))
	})
	return u
}

// unplug takes the unit away.
func (u *unit) unplug() {
	if u.cmd.ProcessState == nil {
		_ = u.cmd.Process.Kill() // it may have gone by itself
		_ = u.cmd.Wait()
	}
}

// memory reads a unit as somebody with a debugger would.
func (s *station) memory(addr uint32, n int) []byte {
	s.t.Helper()
	spec, err := probe.Parse(s.probe())
	fatal(s.t, err)
	p, err := spec.Open(s.t.Context())
	fatal(s.t, err)
	defer p.Close()
	b, err := p.Read(s.t.Context(), addr, n)
	fatal(s.t, err)
	return b
}

// made is a unit that the bench called done, with what it holds.
type made struct {
	ID, Result, Certificate, Stage, Reason string
	ReadBack                               bool `json:"read_back"`
	Locked                                 bool
	Made, Of, Left                         int
	scalar                                 []byte
}

// running is a "hawser factory" command that goes on.
type running struct {
	s      *station
	cmd    *exec.Cmd
	out    *bufio.Scanner
	stderr *lines
}

// start starts a factory command under wrapper, if any.
func (s *station) start(args ...string) *running {
	s.t.Helper()
	return s.startUnder(nil, args...)
}

func (s *station) startUnder(wrapper []string, args ...string) *running {
	s.t.Helper()
	argv := append(append(wrapper, hawser), s.args(args...)...)
	r := &running{s: s, cmd: exec.Command(argv[0], argv[1:]...), stderr: newLines()}
	r.cmd.Stderr = r.stderr
	out, err := r.cmd.StdoutPipe()
	fatal(s.t, err)
	r.out = bufio.NewScanner(out)
	fatal(s.t, r.cmd.Start())
	s.t.Cleanup(func() {
		if r.cmd.ProcessState == nil {
			_ = r.cmd.Process.Kill() // it may have gone by itself
			_ = r.cmd.Wait()
		}
		if s.t.Failed() {
			s.t.Logf("hawser factory %q: %s", args, r.stderr)
		}
	})
	return r
}

// unit waits for the next unit's line.
func (r *running) unit() (m made) {
	r.s.t.Helper()
	if !r.out.Scan() {
		r.s.t.Fatalf("the bench ended: %v\n%s", r.cmd.Wait(), r.stderr)
	}
	fatal(r.s.t, json.Unmarshal(r.out.Bytes(), &m))
	return m
}

// end waits for the end of the command.
func (r *running) end(code int) {
	r.s.t.Helper()
	for r.out.Scan() {
	}
	_ = r.cmd.Wait() // its state says how it ended
	if got := r.cmd.ProcessState.ExitCode(); got != code {
		r.s.t.Fatalf("exit code %d, not %d\n%s", got, code, r.stderr)
	}
}

// interrupt ends the command as a person does.
func (r *running) interrupt(code int) {
	r.s.t.Helper()
	fatal(r.s.t, r.cmd.Process.Signal(os.Interrupt))
	r.end(code)
}

// scalar is the key in the unit that is on the probe, which must be m.
func (s *station) scalar(m made) []byte {
	s.t.Helper()
	v, err := factory.ParseIdentity(s.memory(atIdentity, factory.IdentitySize))
	fatal(s.t, err)
	if v.ID.String() != m.ID {
		s.t.Fatalf("the unit is %s, the bench says %s", v.ID, m.ID)
	}
	return v.Scalar
}

// provision runs the bench for n units, plugging a blank one in after the other, and gives
// what each holds in the end. wrapper is what the bench runs under.
func (s *station) provision(n int, wrapper ...string) (all []made) {
	s.t.Helper()
	r := s.startUnder(wrapper, "run", "--json", "--count", fmt.Sprint(n))
	for i := range n {
		u := s.plug()
		m := r.unit()
		if m.Result != "pass" {
			s.t.Fatalf("unit %d: %+v\n%s", i+1, m, r.stderr)
		}
		m.scalar = s.scalar(m)
		all = append(all, m)
		u.unplug()
	}
	r.end(0)
	return all
}

// needRoot skips, and says so, what only root can show.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("not root: not shown here")
	}
}

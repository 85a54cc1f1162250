package bench

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"hawser/internal/factory"
	"hawser/internal/factory/keyroom"
	"hawser/internal/factory/probe"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// TestMain is the process for a key too.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "unit-child" {
		if err := keyroom.Main(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Setenv("GORACE", "halt_on_error=1 atexit_sleep_ms=0") // a process for each key need not wait at its end
	os.Exit(m.Run())
}

func fatal(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wants demands an error with all words, on one line but for a hint.
func wants(t testing.TB, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error where %q was expected", words)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q lacks %q", err, w)
		}
	}
	text, hint, has := strings.Cut(err.Error(), "\n")
	if has && (!strings.HasPrefix(hint, "hint: ") || strings.Contains(hint, "\n")) || len(text) > 400 {
		t.Errorf("not one clear line: %q", err)
	}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := pki.GenerateKey()
	fatal(t, err)
	return k
}

// office is the server's side: a fleet, its device CA, and the ids it reserves.
type office struct {
	t     testing.TB
	fleet [16]byte
	ca    *pki.Issuer
	set   []byte
	next  identity.ID
}

func newOffice(t testing.TB) *office {
	t.Helper()
	o := &office{t: t, fleet: [16]byte{1, 2, 3}, next: 0xABCD0001}
	name := pki.Name{Organisation: "Acme", Country: "ZZ"}
	a, err := pki.IssueBrokerRoot(newKey(t), name, "A", time.Now())
	fatal(t, err)
	b, err := pki.IssueBrokerRoot(newKey(t), name, "B", time.Now())
	fatal(t, err)
	o.ca, err = pki.IssueDeviceCA(newKey(t), name, 1, time.Now().AddDate(-5, 0, 0))
	fatal(t, err)
	o.set, err = pki.SignAnchors(b.Signer, &pki.AnchorSet{Fleet: o.fleet, Sequence: 1, InUse: a.Cert, Standby: b.Cert, Port: 8883, Domains: []string{"localhost"}})
	fatal(t, err)
	return o
}

// block makes a block of n ids for a station; change, if not nil, comes before the signature.
func (o *office) block(pub *ecdsa.PublicKey, n int, change func(*factory.Block)) []byte {
	o.t.Helper()
	cert, err := pki.IssueStationCA(o.ca, "line1", pub, time.Now())
	fatal(o.t, err)
	l := &factory.Block{Fleet: o.fleet, Station: "line1", ID: factory.BlockID{1, byte(o.next >> 8), byte(o.next)},
		Expires: time.Now().Add(time.Hour).Truncate(time.Second), DeviceCA: o.ca.Cert, StationCert: cert, Anchors: o.set}
	for range n {
		l.IDs = append(l.IDs, o.next)
		o.next++
	}
	if change != nil {
		change(l)
	}
	file, err := factory.SignBlock(o.ca, l)
	fatal(o.t, err)
	return file
}

// rig is a trial bench in a directory of its own.
type rig struct {
	t       testing.TB
	dir     string
	office  *office
	pub     *ecdsa.PublicKey
	port    int
	results []*Result
	waits   []string
}

// spec reaches an emulated unit on the rig's port.
func (r *rig) spec() string {
	return fmt.Sprintf("gdb:127.0.0.1:%d,identity=0x20010000,trust=0x20011000", r.port)
}

// newRig sets a bench up; change, if not nil, comes before that.
func newRig(t testing.TB, change func(*Settings)) *rig {
	t.Helper()
	r := &rig{t: t, dir: filepath.Join(t.TempDir(), "bench"), office: newOffice(t), port: unusedPort(t)}
	s := Settings{Station: "line1", Key: KeyFile, Trial: true, Probe: r.spec(), Class: "sensor-a", Hardware: 3}
	if change != nil {
		change(&s)
	}
	csr, err := Init(r.dir, s, nil)
	fatal(t, err)
	text, err := os.ReadFile(csr)
	fatal(t, err)
	c, err := pki.ParseCSR(text)
	fatal(t, err)
	r.pub = c.Pub
	return r
}

func (r *rig) load(n int, change func(*factory.Block)) *Loaded {
	r.t.Helper()
	v, err := Load(r.dir, r.office.block(r.pub, n, change), "")
	fatal(r.t, err)
	return v
}

func (r *rig) open() *Bench {
	r.t.Helper()
	b, err := Open(r.dir, nil, time.Now())
	fatal(r.t, err)
	r.t.Cleanup(func() { _ = b.Close() }) // it may be closed by then
	return b
}

// run does n units on an open bench. done, if not nil, is called after each.
func (r *rig) run(ctx context.Context, b *Bench, n int, done func(*Result)) (int, error) {
	r.t.Helper()
	self, err := os.Executable()
	fatal(r.t, err)
	run := &Runner{Bench: b, Child: []string{self, "unit-child"}, Count: n, Wait: func(text string) { r.waits = append(r.waits, text) }}
	run.Unit = func(u *Result) {
		r.results = append(r.results, u)
		if done != nil {
			done(u)
		}
	}
	return run.Run(ctx)
}

// journal gives the kinds and ids of the journal's lines.
func (r *rig) journal() (all []string) {
	r.t.Helper()
	f, err := os.Open(filepath.Join(r.dir, "line1.journal"))
	fatal(r.t, err)
	defer f.Close()
	_, err = factory.ReadJournal(f, factory.Known{}, func(l *factory.Line) error {
		all = append(all, strings.TrimSpace(l.What+" "+l.ID+" "+l.Reason))
		return nil
	})
	fatal(r.t, err)
	return all
}

func unusedPort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	fatal(t, err)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// plug starts a blank unit whose debug server listens on port, and gives what takes it off.
func plug(t testing.TB, port int) func() {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-arm"); err != nil {
		t.Skip("qemu-system-arm is not installed")
	}
	image := []byte{0, 4, 0, 0x20, 9, 0, 0, 0, 0xfe, 0xe7, 0xfe, 0xe7} // stack, reset vector, b .
	kernel := filepath.Join(t.TempDir(), "kernel.bin")
	fatal(t, os.WriteFile(kernel, image, 0o600))
	cmd := exec.Command("qemu-system-arm", "-M", "mps2-an386", "-gdb", fmt.Sprintf("tcp:127.0.0.1:%d", port), "-S",
		"-display", "none", "-monitor", "none", "-serial", "none", "-kernel", kernel)
	fatal(t, cmd.Start())
	off := sync.OnceFunc(func() {
		_ = cmd.Process.Kill() // it may have gone by itself
		_ = cmd.Wait()
	})
	t.Cleanup(off)
	return off
}

// memory reads or writes a unit as somebody with a debugger would.
func (r *rig) probe() (probe.Probe, probe.Spec) {
	r.t.Helper()
	spec, err := probe.Parse(r.spec())
	fatal(r.t, err)
	p, err := spec.Open(r.t.Context())
	fatal(r.t, err)
	r.t.Cleanup(func() { p.Close() })
	fatal(r.t, p.Wait(r.t.Context()))
	return p, spec
}

// wiretap stands between the bench and a unit, on the rig's port. up sees what the bench
// sends and down what the unit answers; each gives what is passed on, and nil cuts the line.
type wiretap struct {
	up, down func([]byte) []byte
	dead     atomic.Bool // nothing is passed on
}

func (r *rig) tap(to int, up, down func([]byte) []byte) *wiretap {
	r.t.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", r.port))
	fatal(r.t, err)
	w := &wiretap{up: up, down: down}
	r.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			w.serve(c, to)
		}
	}()
	return w
}

// serve passes one connection on until either side ends; a unit has one debugger at a time.
func (w *wiretap) serve(c net.Conn, to int) {
	defer c.Close()
	if w.dead.Load() {
		return
	}
	var u net.Conn
	var err error
	for try := time.NewTicker(20 * time.Millisecond); ; <-try.C { // the unit may be starting
		if u, err = net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", to)); err == nil {
			break
		}
	}
	defer u.Close()
	var both sync.WaitGroup
	pass := func(from, into net.Conn, see func([]byte) []byte) {
		defer from.Close()
		defer into.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			if err != nil {
				return
			}
			p := buf[:n]
			if see != nil {
				p = see(bytes.Clone(p))
			}
			if p == nil {
				return
			}
			if _, err := into.Write(p); err != nil {
				return
			}
		}
	}
	both.Go(func() { pass(c, u, w.up) })
	both.Go(func() { pass(u, c, w.down) })
	both.Wait()
}

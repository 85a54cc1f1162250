package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hawser/internal/factory"
	"hawser/internal/pki"
)

// terminal is a pseudo-terminal: what a person, or a unit's console, is connected to.
func terminal(t *testing.T, columns uint16) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	fatal(t, err)
	t.Cleanup(func() { person.Close() })
	fatal(t, unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	fatal(t, err)
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	fatal(t, err)
	t.Cleanup(func() { program.Close() })
	fatal(t, unix.IoctlSetWinsize(int(program.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 40, Col: columns}))
	return person, program
}

// TestFactoryOnATerminal: PASS in letters of blocks, in color, and then as a line.
func TestFactoryOnATerminal(t *testing.T) {
	needTools(t, "qemu-system-arm")
	s := newStation(t, 2)
	s.plug()
	person, program := terminal(t, 100)
	cmd := exec.Command(hawser, s.args("run", "--count", "1")...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = program, program, program
	fatal(t, cmd.Start())
	program.Close()
	screen, _ := io.ReadAll(person) // the error is that the other side has closed it
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v", err)
	}
	text := strings.ReplaceAll(string(screen), "\r", "")
	if !strings.Contains(text, "\x1b[1;32m████████████") || !regexp.MustCompile(`(?m)^PASS [0-9A-F]{8}  1 of 2, 1 ids left$`).MatchString(text) {
		t.Errorf("%s", text)
	}
	widest := 0
	for line := range strings.SplitSeq(text, "\n") {
		if strings.Contains(line, "█") {
			widest = max(widest, len([]rune(line)))
		}
	}
	if widest < 60 || widest > 110 {
		t.Errorf("the letters are %d columns wide", widest)
	}
}

// TestFactoryPlain: elsewhere a line is all, and a unit that is on the probe still is
// passed over.
func TestFactoryPlain(t *testing.T) {
	needTools(t, "qemu-system-arm")
	s := newStation(t, 2)
	s.plug()
	r := s.do("run", "--count", "1")
	if !regexp.MustCompile(`^PASS [0-9A-F]{8}  1 of 2, 1 ids left\n$`).MatchString(r.stdout) {
		t.Errorf("%q", r.stdout)
	}
	r = s.do("verify")
	if !regexp.MustCompile(`^[0-9A-F]{8} is whole: identity block, certificate and key agree\n`).MatchString(r.stdout) || !strings.Contains(r.stdout, "it is there") {
		t.Errorf("%q", r.stdout)
	}
	b := s.start("run")
	b.stderr.await(t, 0, "already: take it off")
	b.interrupt(0)
	for _, l := range s.journal() {
		if l.What == factory.Burnt {
			t.Errorf("%s was burnt for nothing", l.ID)
		}
	}
}

// TestFactoryInterrupted: an interrupt in the middle of a unit burns its id and says so; the
// process for the key ends as well.
func TestFactoryInterrupted(t *testing.T) {
	needTools(t, "qemu-system-arm")
	s := newStation(t, 2, "--lock", "exec sleep 100")
	s.plug()
	b := s.start("run", "--json")
	until(t, "the lock command", func() bool { return locking(b.cmd.Process.Pid) })
	fatal(t, b.cmd.Process.Signal(os.Interrupt))
	m := b.unit()
	if m.Result != "fail" || !strings.Contains(m.Reason, "stopped from outside") {
		t.Errorf("%+v", m)
	}
	b.end(1)
	last := s.journal()[2]
	if last.What != factory.Burnt || last.ID != m.ID {
		t.Errorf("%+v", last.Record)
	}
}

// children gives the processes that a process has started.
func children(pid int) []string {
	tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid)) // a process that is gone has none
	var all []string
	for _, task := range tasks {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, task.Name()))
		all = append(all, strings.Fields(string(text))...)
	}
	return all
}

func locking(pid int) bool {
	for _, c := range children(pid) {
		if text, _ := os.ReadFile("/proc/" + c + "/cmdline"); bytes.Contains(text, []byte("sleep\x00100")) {
			return true
		}
	}
	return false
}

// TestFactorySerial: a unit with a key of its own, on a serial line.
func TestFactorySerial(t *testing.T) {
	s := newStation(t, 2)
	unit, console := terminal(t, 80)
	raw, err := unix.IoctlGetTermios(int(console.Fd()), unix.TCGETS)
	fatal(t, err)
	raw.Iflag, raw.Oflag, raw.Lflag = 0, 0, 0 // nothing echoes before the bench has opened it
	fatal(t, unix.IoctlSetTermios(int(console.Fd()), unix.TCSETS, raw))
	key := newKey(t)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	fatal(t, err)
	b := s.start("enrol-csr", "--serial", console.Name())
	_, err = fmt.Fprintf(unit, "boot 1.0\r\nmaking a key ...\r\n%s> ", strings.ReplaceAll(string(pki.EncodeCSR(der)), "\n", "\r\n"))
	fatal(t, err)
	var answer []byte
	for buf := make([]byte, 4096); !bytes.Contains(answer, []byte("-----END HAWSER TRUST REGION-----")); {
		n, err := unit.Read(buf)
		fatal(t, err)
		answer = append(answer, buf[:n]...)
	}
	b.end(0)
	crt, rest := pem.Decode(answer)
	trust, _ := pem.Decode(rest)
	cert, err := x509.ParseCertificate(crt.Bytes)
	fatal(t, err)
	entries, _, err := factory.ParseTrust(trust.Bytes)
	fatal(t, err)
	if !key.PublicKey.Equal(cert.PublicKey) || !bytes.Equal(factory.Value(entries, factory.TagCertificate), crt.Bytes) || len(factory.Value(entries, factory.TagAnchors)) == 0 {
		t.Errorf("%s", answer)
	}
	last := s.journal()[2]
	if last.What != factory.Made || last.How != factory.ByCSR || last.ID != cert.Subject.CommonName || !bytes.Equal(last.CSR, der) {
		t.Errorf("%+v", last.Record)
	}
	r := run(t, hawser, s.args("enrol-csr", "--serial", "/dev/null")...)
	if r.code != 1 || !strings.Contains(r.stderr, "not a serial line") {
		t.Errorf("%+v", r)
	}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := pki.GenerateKey()
	fatal(t, err)
	return k
}

package factory

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"hawser/internal/identity"
	"hawser/internal/pki"
)

// childEnv makes the test binary a bench that appends units; its argument is the journal.
const childEnv = "HAWSER_FACTORY_CHILD"

func TestMain(m *testing.M) {
	many := os.Getenv(childEnv)
	if many == "" {
		os.Exit(m.Run())
	}
	if err := appendUnits(os.Args[1], many == "forever"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// appendUnits prints an id when its unit is acknowledged.
func appendUnits(path string, forever bool) error {
	station, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), bytes.Repeat([]byte{0x42}, 32))
	if err != nil {
		return err
	}
	j, err := OpenJournal(path, station)
	if err != nil {
		return err
	}
	ca, err := pki.NewIssuer(j.cert, station, pki.StationCA)
	if err != nil {
		return err
	}
	for id := identity.ID(j.n); ; id++ {
		if err := appendOne(j, ca, id); err != nil {
			return err
		}
		fmt.Println(id)
		if !forever {
			return nil // without Close: nothing else may reach the disk
		}
	}
}

func appendOne(j *Journal, ca *pki.Issuer, id identity.ID) error {
	key, err := pki.GenerateKey()
	if err != nil {
		return err
	}
	now := ca.Cert.NotBefore.Add(time.Hour)
	cert, err := pki.IssueDeviceLeaf(ca, id, &key.PublicKey, now)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	return j.AppendUnit(NewUnit{ID: id, Block: BlockID{1}, How: ByProbe, CSR: csr, Cert: cert}, now)
}

func child(path, many string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], path)
	cmd.Env = append(os.Environ(), childEnv+"="+many)
	cmd.Stderr = os.Stderr
	return cmd
}

// TestKillLosesNoUnit kills a bench that appends, twenty times: each unit that it called
// done is in the journal, and the journal goes on.
func TestKillLosesNoUnit(t *testing.T) {
	r := newRig(t)
	path := r.journal(t, 0)
	for round := range 20 {
		done := killAfter(t, path, round)
		j := r.open(t, path)
		for _, id := range done {
			if v, err := identity.ParseID(id); err != nil || !j.Has(v) {
				t.Fatalf("round %d: %q was called done and is not there (%v)", round, id, err)
			}
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := check(read(t, path)); err != nil || s.Units < 20 {
		t.Error(s, err)
	}
}

// killAfter lets a child call n+1 units done, kills it, and gives all that it called done.
func killAfter(t *testing.T, path string, n int) (done []string) {
	t.Helper()
	cmd := child(path, "forever")
	out, err := cmd.StdoutPipe()
	must(t, out, err)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for in := bufio.NewReader(out); ; {
		line, err := in.ReadString('\n')
		if err == io.EOF {
			break
		}
		must(t, line, err)
		if done = append(done, strings.TrimSpace(line)); len(done) == n+1 {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	var status *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &status) || status.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the child ended by itself: %v", err)
	}
	return done
}

// TestDoneMeansSynced watches the system calls of a child: between the write to the journal
// and the word that the unit is done, the journal is synced.
func TestDoneMeansSynced(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed: that a unit is synced before it is called done was not watched")
	}
	r := newRig(t)
	path := r.journal(t, 0)
	trace := path + ".trace"
	cmd := child(path, "once")
	cmd.Args = append([]string{strace, "-f", "-y", "-o", trace, "-e", "trace=write,fsync,fdatasync"}, cmd.Args...)
	cmd.Path = strace
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	written, synced := false, false
	for _, line := range strings.Split(string(read(t, trace)), "\n") {
		switch ours := strings.Contains(line, "line1.journal>"); {
		case strings.Contains(line, "write(1<"):
			if !written || !synced {
				t.Errorf("called done with written=%v synced=%v", written, synced)
			}
			return
		case ours && strings.Contains(line, "write("):
			written, synced = true, false
		case ours && strings.Contains(line, "sync(") && !strings.Contains(line, "unfinished"), strings.Contains(line, "sync resumed"):
			synced = true
		}
	}
	t.Fatalf("the child never called a unit done:\n%s", read(t, trace))
}

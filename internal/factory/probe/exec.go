package probe

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// Exec is a probe that is a command: /bin/sh -c gets Intel HEX of all regions on its
// standard input, writes and verifies them, and lets the unit run. It must halt the unit
// itself and exit with a status other than 0 when anything went wrong. It should write no
// file: the HEX holds the unit's key.
type Exec struct{ spec Spec }

// Wait implements Probe: a command cannot be asked, so any unit is taken to be there.
func (e *Exec) Wait(ctx context.Context) error { return ctx.Err() }

// Read implements Probe.
func (e *Exec) Read(context.Context, uint32, int) ([]byte, error) { return nil, ErrNoRead }

// ReadInto implements Probe.
func (e *Exec) ReadInto(_ context.Context, _ uint32, p []byte) error {
	clear(p)
	return ErrNoRead
}

// Reset implements Probe: the command that wrote has let the unit run.
func (e *Exec) Reset(ctx context.Context) error { return ctx.Err() }

// Release implements Probe.
func (e *Exec) Release(ctx context.Context) error { return ctx.Err() }

// Close implements Probe.
func (e *Exec) Close() error { return nil }

// Write implements Probe: one run of the command.
func (e *Exec) Write(ctx context.Context, regions []Region) error {
	rs, err := ordered(regions)
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	limited, cancel := context.WithTimeout(ctx, e.spec.FlashTimeout)
	defer cancel()
	defer clear(e.spec.Buffer)
	err = e.run(limited, rs)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("flash command: %w: what it wrote is unknown", ctx.Err())
	case limited.Err() != nil:
		return fmt.Errorf("flash command: %w: it was not done after %v and was killed: what it wrote is unknown", ErrGone, e.spec.FlashTimeout)
	}
	return err
}

func (e *Exec) run(ctx context.Context, rs []Region) error {
	in, inEnd, err := os.Pipe()
	if err != nil {
		return err
	}
	defer inEnd.Close()
	errEnd, errs, err := os.Pipe()
	if err != nil {
		in.Close()
		return err
	}
	defer errEnd.Close()
	cmd := exec.Command("/bin/sh", "-c", e.spec.Command)
	cmd.Stdin, cmd.Stderr = in, errs // files: no copy is made on the way
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Start()
	in.Close()
	errs.Close()
	if err != nil {
		return fmt.Errorf("flash command: %w: %w: nothing was written", ErrGone, err)
	}
	stop := context.AfterFunc(ctx, func() { // the whole group; what has fled from it loses its input and is not waited for
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		inEnd.Close()
		errEnd.Close()
	})
	defer stop()
	half := len(e.spec.Buffer) / 2
	words := tail{buf: e.spec.Buffer[half:]}
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		words.readFrom(errEnd)
	}()
	ended := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		inEnd.SetWriteDeadline(time.Now()) // what it left behind in the background shall not hold us up
		errEnd.SetReadDeadline(time.Now().Add(time.Second))
		ended <- err
	}()
	fed := feed(inEnd, rs, e.spec.Buffer[:half])
	<-heard
	return outcome(<-ended, fed, words.text())
}

// feed writes the HEX to the command's standard input and closes that.
func feed(inEnd *os.File, rs []Region, buf []byte) error {
	h := hexWriter{buf: buf, flush: func(p []byte) error {
		_, err := inEnd.Write(p)
		return err
	}}
	return errors.Join(h.regions(rs), inEnd.Close())
}

// outcome puts together how the command ended. One that succeeds without having read all
// has not written all.
func outcome(ended, fed error, words string) error {
	if words != "" {
		words = ": it said: " + words
	}
	switch {
	case ended != nil:
		return fmt.Errorf("flash command: %w: %w%s: the unit is not whole", ErrTarget, ended, words)
	case fed != nil:
		return fmt.Errorf("flash command: %w: it ended without having read its input%s: the unit is not whole", ErrTarget, words)
	}
	return nil
}

// tail keeps the end of what a command says.
type tail struct {
	buf []byte
	n   int
	cut bool // something before buf has been dropped
}

func (t *tail) readFrom(f *os.File) {
	for {
		if t.n == len(t.buf) {
			t.n, t.cut = copy(t.buf, t.buf[len(t.buf)/2:]), true
		}
		n, err := f.Read(t.buf[t.n:])
		t.n += n
		if err != nil {
			return
		}
	}
}

// maxWords bounds how much of a command's words an error shows.
const maxWords = 1024

// text gives the last lines, fit for a terminal, with each long run of hexadecimal digits
// left out: a tool that quotes its input would quote the key.
func (t *tail) text() string {
	out := make([]byte, 0, t.n)
	for p := t.buf[:t.n]; len(p) > 0; {
		n := hexRun(p)
		switch {
		case n >= 12 || n > 0 && t.cut && len(p) == t.n:
			out = append(out, "[hex]"...)
		case n == 0:
			n = 1
			fallthrough
		default:
			out = append(out, p[:n]...)
		}
		p = p[n:]
	}
	lines := strings.FieldsFunc(string(out[max(0, len(out)-maxWords):]), func(r rune) bool { return r == '\n' || r == '\r' })
	for i, l := range lines {
		lines[i] = printable([]byte(l))
	}
	return strings.Join(lines, " / ")
}

// hexRun says with how many hexadecimal digits p begins.
func hexRun(p []byte) int {
	for i, b := range p {
		if _, ok := unhex(b); !ok {
			return i
		}
	}
	return len(p)
}

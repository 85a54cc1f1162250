package probe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
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
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("flash command: %w: what it wrote is unknown", ctx.Err())
	case limited.Err() != nil:
		return fmt.Errorf("flash command: %w: it was not done after %v and was killed: what it wrote is unknown", ErrGone, e.spec.FlashTimeout)
	}
	return err
}

func (e *Exec) run(ctx context.Context, rs []Region) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	j, err := begin(e.spec.Command)
	if err != nil {
		return fmt.Errorf("flash command: %w: %w: nothing was written", ErrGone, err)
	}
	defer j.close()
	stop := context.AfterFunc(ctx, func() { // what has fled from the group loses its input and is not waited for
		syscall.Kill(-j.cmd.Process.Pid, syscall.SIGKILL)
		j.close()
	})
	defer stop()
	half := len(e.spec.Buffer) / 2
	words := tail{buf: e.spec.Buffer[half:]}
	heard, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		defer close(heard)
		words.readFrom(j.words)
	}()
	go func() { ended <- j.wait() }()
	fed := feed(j.input, rs, e.spec.Buffer[:half])
	<-heard
	return outcome(<-ended, fed, words.text())
}

// job is a command that is running, with our ends of its pipes.
type job struct {
	cmd          *exec.Cmd
	input, words *os.File
}

func begin(command string) (*job, error) {
	in, input, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer in.Close()
	words, errs, err := os.Pipe()
	if err != nil {
		input.Close()
		return nil, err
	}
	defer errs.Close()
	j := &job{exec.Command("/bin/sh", "-c", command), input, words}
	j.cmd.Stdin, j.cmd.Stderr = in, errs // files: no copy is made on the way
	j.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := j.cmd.Start(); err != nil {
		j.close()
		return nil, err
	}
	return j, nil
}

// wait returns how the command ended. What it left behind in the background, with the other
// ends of the pipes, shall not hold us up.
func (j *job) wait() error {
	err := j.cmd.Wait()
	j.input.SetWriteDeadline(time.Now())
	j.words.SetReadDeadline(time.Now().Add(time.Second))
	return err
}

func (j *job) close() {
	j.input.Close()
	j.words.Close()
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

// text gives the last lines, fit for a terminal, without what may be a dump: a tool that
// quotes its input would quote the key.
func (t *tail) text() string {
	p := t.buf[:t.n]
	if t.cut {
		p = bytes.TrimLeft(p, "0123456789abcdefABCDEF") // what is left of a number that was cut
	}
	dump := regexp.MustCompile(`((0[xX])?[0-9a-fA-F]{2,}[ ,:-]{0,2}){6,}|[0-9a-fA-F]{12,}|[^\x20-\x7E\r\n]+`)
	p = dump.ReplaceAll(p, []byte("[...]"))
	p = p[max(0, len(p)-maxWords):]
	lines := bytes.FieldsFunc(p, func(r rune) bool { return r == '\n' || r == '\r' })
	return string(bytes.Join(lines, []byte(" / ")))
}

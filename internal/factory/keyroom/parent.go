package keyroom

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"hawser/internal/identity"
)

// Failure is what the process could not do with the unit.
type Failure struct {
	Text  string
	Sight *Sight // of the unit after that, nil if it does not answer
}

func (f *Failure) Error() string { return f.Text }

// Child is the parent's end of the process. It is used by one goroutine at a time, but
// for Stop.
type Child struct {
	cmd     *exec.Cmd       // nil: not started by Start
	ctx     context.Context // of the process
	cancel  context.CancelCauseFunc
	orders  *os.File
	answers *os.File
	stderr  tail
	Notice  func(text string) // is told what Wait waits for; may be nil
}

// grace is how long a process that was told to end may take to wipe its memory.
const grace = 2 * time.Second

// Start starts the process: argv is the program that calls Main. It ends when ctx does, or
// this process.
func Start(ctx context.Context, argv ...string) (*Child, error) {
	theirOrders, orders, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirOrders.Close()
	answers, theirAnswers, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, orders.Close())
	}
	defer theirAnswers.Close()
	c := Attach(orders, answers)
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	c.cmd = exec.CommandContext(c.ctx, argv[0], argv[1:]...)
	c.cmd.ExtraFiles = []*os.File{theirOrders, theirAnswers}
	c.cmd.Stderr = &c.stderr
	c.cmd.Env = append(os.Environ(), "GOTRACEBACK=none")    // a trace shows what lay in registers
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt from the keyboard is the parent's to judge
	c.cmd.Cancel = orders.Close
	c.cmd.WaitDelay = grace
	if err := c.cmd.Start(); err != nil {
		c.cancel(nil)
		return nil, errors.Join(fmt.Errorf("start the process for the key: %w", err), orders.Close(), answers.Close())
	}
	return c, nil
}

// Attach is a Child whose process is not the caller's to start.
func Attach(orders, answers *os.File) *Child { return &Child{orders: orders, answers: answers} }

// Stop ends the process; what waits for an answer of it gets cause.
func (c *Child) Stop(cause error) { c.cancel(cause) }

// Close ends the process if it has not ended by itself, and waits for its end.
func (c *Child) Close() {
	_ = c.orders.Close() // twice does no harm
	if c.cmd != nil {
		_ = c.cmd.Wait() // how it ends says nothing that its answers have not said
		c.cancel(nil)
	}
	_ = c.answers.Close()
}

// ask gives an order and waits for its answer.
func (c *Child) ask(o order) (answer, error) {
	if err := send(c.orders, o); err != nil {
		return answer{}, c.lost(err)
	}
	for {
		var a answer
		if err := receive(c.answers, &a); err != nil {
			return answer{}, c.lost(err)
		}
		switch {
		case a.Failed != "" && c.ctx != nil && c.ctx.Err() != nil:
			return answer{}, context.Cause(c.ctx)
		case a.Failed != "" && a.Hint != "":
			return a, &Failure{a.Failed + "\nhint: " + a.Hint, a.Sight}
		case a.Failed != "":
			return a, &Failure{a.Failed, a.Sight}
		case a.Notice == "":
			return a, nil
		case c.Notice != nil:
			c.Notice(a.Notice)
		}
	}
}

// lost is the error of a process that ended without an answer.
func (c *Child) lost(err error) error {
	const text = "the process for the key ended in the middle"
	if c.cmd == nil {
		return &Failure{Text: fmt.Sprintf("%s: %v", text, err)}
	}
	if cause := context.Cause(c.ctx); cause != nil {
		return cause
	}
	_ = c.orders.Close()
	_ = c.cmd.Wait() // for its last words
	if said := c.stderr.String(); said != "" {
		return &Failure{Text: text + ": " + said}
	}
	return &Failure{Text: fmt.Sprintf("%s: %v", text, c.cmd.ProcessState)}
}

// Wait waits until a unit is on the probe. last is how the unit before it was left, nil for
// none: as long as the probe answers and shows the same, it is taken to be the same unit.
func (c *Child) Wait(spec string, last *Sight) (*Sight, error) {
	a, err := c.ask(order{Do: doWait, Probe: spec, Last: last})
	if err == nil && a.Sight == nil {
		err = c.lost(errors.New("an answer without a sight"))
	}
	return a.Sight, err
}

// Make makes the key for id and gives its certificate request, DER.
func (c *Child) Make(id identity.ID, flags uint8) ([]byte, error) {
	a, err := c.ask(order{Do: doMake, ID: id, Flags: flags})
	return a.CSR, err
}

// Write puts the identity block and trust into the unit, and wipes the key. readBack is
// false if the probe cannot read.
func (c *Child) Write(trust []byte) (readBack bool, err error) {
	a, err := c.ask(order{Do: doWrite, Trust: trust})
	return a.ReadBack, err
}

// Reset lets the unit run, and ends the process.
func (c *Child) Reset() error {
	_, err := c.ask(order{Do: doReset})
	return err
}

// Read reads what the unit holds, and ends the process.
func (c *Child) Read() (*Reading, error) {
	a, err := c.ask(order{Do: doRead})
	if err == nil && a.Unit == nil {
		err = c.lost(errors.New("an answer without a reading"))
	}
	return a.Unit, err
}

// tail keeps the last bytes of what a process complained of.
type tail struct{ buf bytes.Buffer }

const tailSize = 1 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.buf.Write(p)
	if over := t.buf.Len() - tailSize; over > 0 {
		t.buf.Next(over)
	}
	return len(p), nil
}

func (t *tail) String() string { return strings.Join(strings.Fields(t.buf.String()), " ") }

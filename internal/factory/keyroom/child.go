package keyroom

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"hawser/internal/factory"
	"hawser/internal/factory/probe"
	"hawser/internal/identity"
)

const (
	pollEvery = 250 * time.Millisecond // between two looks at a probe without a new unit
	lookFor   = 2 * time.Second        // one look
	unitFor   = 2 * time.Minute        // writing, or reading back, one unit
)

// The descriptors of the process, as Start hands them over.
const (
	fdOrders  = 3
	fdAnswers = 4
)

// Main is the whole of the process that Start starts: it serves one unit over the
// descriptors 3 and 4. Nothing is ever printed, traces of a crash included: they hold what
// lay in registers and arguments.
func Main() error {
	debug.SetTraceback("none")
	signal.Ignore(syscall.SIGQUIT)
	if err := Harden(); err != nil {
		return err
	}
	if !isPipe(fdOrders) || !isPipe(fdAnswers) {
		return errors.New("this command is started by \"hawser factory run\" and its like only")
	}
	unix.CloseOnExec(fdOrders) // a tool that the probe runs has no business with them
	unix.CloseOnExec(fdAnswers)
	// What cannot be locked but the room is Go's own memory: see the package comment.
	_ = unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
	return Serve(os.NewFile(fdOrders, "orders"), os.NewFile(fdAnswers, "answers"))
}

func isPipe(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO
}

// Serve obeys orders until the unit is done, one of them failed or the parent is gone, and
// leaves its room wiped. It returns what kept it from answering.
func Serve(orders io.Reader, answers io.Writer) error {
	r, err := newRoom()
	if err != nil {
		return errors.Join(receive(orders, &order{}), send(answers, failure(err)))
	}
	ctx, gone := context.WithCancel(context.Background())
	defer gone()
	c := &child{room: r, answers: answers}
	for o := range listen(ctx, gone, orders) {
		a, err := c.obey(ctx, o)
		if err != nil {
			a = c.fail(ctx, err)
		}
		last := err != nil || o.Do == doReset || o.Do == doRead
		if last {
			c.close()
		}
		if err := send(answers, a); err != nil || last {
			return errors.Join(err, r.wipe())
		}
	}
	c.close()
	return r.wipe()
}

// listen reads orders; when there are no more the parent is gone, and so is all reason to
// go on.
func listen(ctx context.Context, gone context.CancelFunc, r io.Reader) <-chan order {
	out := make(chan order)
	go func() {
		defer gone()
		defer close(out)
		for {
			var o order
			if receive(r, &o) != nil {
				return
			}
			select {
			case out <- o:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// child is the state of the process; its one goroutine owns it.
type child struct {
	room    *room
	answers io.Writer
	spec    probe.Spec
	probe   probe.Probe // nil between looks
	id      identity.ID
}

func (c *child) obey(ctx context.Context, o order) (answer, error) {
	switch o.Do {
	case doWait:
		return c.wait(ctx, o)
	case doMake:
		return c.makeKey(o)
	case doWrite:
		return c.write(ctx, o.Trust)
	case doReset:
		return answer{}, c.reset(ctx)
	case doRead:
		return c.read(ctx)
	}
	return answer{}, fmt.Errorf("unknown order %q", o.Do)
}

// fail wipes the room and says why an order was not done, free of the key. What can be
// seen of the unit goes with it.
func (c *child) fail(ctx context.Context, err error) answer {
	text := c.room.clean(err.Error())
	if werr := c.room.wipe(); werr != nil {
		text += "; " + werr.Error()
	}
	a := failure(errors.New(text))
	if c.probe != nil {
		look, cancel := context.WithTimeout(ctx, lookFor)
		defer cancel()
		if seen, err := c.sight(look); err == nil {
			a.Sight = seen
		}
	}
	return a
}

func failure(err error) answer {
	text, hint, _ := strings.Cut(err.Error(), "\nhint: ")
	return answer{Failed: text, Hint: hint}
}

func (c *child) close() {
	if c.probe != nil {
		_ = c.probe.Close() // what was to be done with it is done, or has failed
		c.probe = nil
	}
}

// release lets a unit that is not wanted run on: a finished one should show that it does.
func (c *child) release(ctx context.Context) {
	if c.probe != nil {
		ctx, cancel := context.WithTimeout(ctx, lookFor)
		defer cancel()
		_ = c.probe.Release(ctx) // one that is gone needs no release
	}
	c.close()
}

// wait looks at the probe until a unit is there that is not the last one.
func (c *child) wait(ctx context.Context, o order) (answer, error) {
	spec, err := probe.Parse(o.Probe)
	if err != nil {
		return answer{}, err
	}
	c.spec, c.spec.Buffer = spec, c.room.packets()
	poll := time.NewTicker(pollEvery)
	defer poll.Stop()
	for told := ""; ; {
		c.release(ctx)
		seen, err := c.look(ctx)
		if err == nil && !seen.same(o.Last) {
			return answer{Sight: seen}, nil
		}
		if err != nil {
			o.Last = nil // the last unit is gone: the next one that answers is another
		}
		if text := waitingFor(err); text != told {
			told = text
			if err := send(c.answers, answer{Notice: text}); err != nil {
				return answer{}, err
			}
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			return answer{}, ctx.Err()
		}
	}
}

func waitingFor(err error) string {
	if err == nil {
		return "take the unit off the probe"
	}
	text, _, _ := strings.Cut(err.Error(), "\n")
	return text
}

// look opens the probe and sees what is on it. An error means that no unit is there, or
// none that can be read, which is what a locked one looks like.
func (c *child) look(ctx context.Context) (*Sight, error) {
	ctx, cancel := context.WithTimeout(ctx, lookFor)
	defer cancel()
	p, err := c.spec.Open(ctx)
	if err != nil {
		return nil, err
	}
	c.probe = p
	return c.sight(ctx)
}

// sight reads the head of the identity block, which holds no secret.
func (c *child) sight(ctx context.Context) (*Sight, error) {
	head, err := c.probe.Read(ctx, c.spec.Identity, headSize)
	if errors.Is(err, probe.ErrNoRead) {
		return &Sight{Blind: true}, c.probe.Wait(ctx)
	}
	return &Sight{Head: head}, err
}

func (c *child) makeKey(o order) (answer, error) {
	c.id = o.ID
	if err := c.room.draw(); err != nil {
		return answer{}, err
	}
	csr, err := c.room.request(o.ID)
	if err != nil {
		return answer{}, err
	}
	return answer{CSR: csr}, factory.PutIdentity((*[blockSize]byte)(c.room.block()), o.ID, c.room.scalar(), o.Flags)
}

// write puts both regions into the unit, compares what is read back and wipes the room.
func (c *child) write(ctx context.Context, trust []byte) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, unitFor)
	defer cancel()
	if c.probe == nil || !c.id.Issuable() {
		return answer{}, errors.New("there is no key to write")
	}
	err := c.probe.Write(ctx, []probe.Region{
		{Addr: c.spec.Identity, Data: c.room.block(), Secret: true},
		{Addr: c.spec.Trust, Data: trust},
	})
	if err != nil {
		return answer{}, err
	}
	a := answer{ReadBack: true}
	err = c.compare(ctx, trust)
	if errors.Is(err, probe.ErrNoRead) {
		a.ReadBack, err = false, nil
	}
	if err != nil {
		return answer{}, err
	}
	return a, c.room.wipe()
}

// compare reads both regions back.
func (c *child) compare(ctx context.Context, trust []byte) error {
	if err := c.probe.ReadInto(ctx, c.spec.Identity, c.room.readBack()); err != nil {
		return err
	}
	if err := differs(c.spec.Identity, c.room.block(), c.room.readBack()); err != nil {
		return err
	}
	back, err := c.probe.Read(ctx, c.spec.Trust, len(trust))
	if err != nil {
		return err
	}
	return differs(c.spec.Trust, trust, back)
}

// differs tells the first address at which what was read back is not what was written, and
// no value of it.
func differs(addr uint32, wrote, back []byte) error {
	if bytes.Equal(wrote, back) {
		return nil
	}
	i := 0
	for i < min(len(wrote), len(back)) && wrote[i] == back[i] {
		i++
	}
	return fmt.Errorf("the memory does not read back what was written, from 0x%08x on\n"+
		"hint: is this address memory that the probe can write, and erased?", addr+uint32(i))
}

func (c *child) reset(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, unitFor)
	defer cancel()
	if c.probe == nil {
		return errors.New("there is no unit to reset")
	}
	return c.probe.Reset(ctx)
}

// read reads what a unit has. The key comes into the room with the identity block; only
// the public key leaves.
func (c *child) read(ctx context.Context) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, unitFor)
	defer cancel()
	if c.probe == nil {
		return answer{}, errors.New("there is no unit to read")
	}
	v := &Reading{}
	if err := c.readIdentity(ctx, v); err != nil {
		return answer{}, err
	}
	if err := c.room.wipe(); err != nil {
		return answer{}, err
	}
	trust, err := c.readTrust(ctx)
	if err != nil {
		return answer{}, err
	}
	v.Trust = trust
	return answer{Unit: v}, c.probe.Reset(ctx)
}

// readIdentity fills in what an identity block says; a bad block is a finding, no error.
func (c *child) readIdentity(ctx context.Context, v *Reading) error {
	if err := c.probe.ReadInto(ctx, c.spec.Identity, c.room.block()); err != nil {
		return err
	}
	b, err := factory.ParseIdentity(c.room.block())
	if err != nil {
		v.Bad = err.Error()
		return nil
	}
	v.ID, v.Flags = b.ID, b.Flags
	copy(c.room.scalar(), b.Scalar)
	pub, err := c.room.public()
	if err != nil {
		return err
	}
	v.Public, err = x509.MarshalPKIXPublicKey(pub)
	return err
}

// readTrust reads the trust region as far as its entries reach. What is no region is given
// as far as it was looked at: to judge it is the caller's.
func (c *child) readTrust(ctx context.Context) ([]byte, error) {
	at := uint32(trustHead)
	for at < factory.MaxTrust-trustTail {
		head, err := c.probe.Read(ctx, c.spec.Trust+at, 3) // tag u8, length u16
		if err != nil {
			return nil, err
		}
		if len(head) != 3 || head[0] == 0 || head[0] == 0xff {
			break
		}
		at += 3 + uint32(binary.LittleEndian.Uint16(head[1:]))
	}
	return c.probe.Read(ctx, c.spec.Trust, min(int(at)+trustTail, factory.MaxTrust))
}

const (
	trustHead = 5 // bytes of magic and version
	trustTail = 5 // bytes of the tag 0 and the checksum
)

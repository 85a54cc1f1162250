package probe

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// GDB is a probe behind a debug server that speaks the GDB remote serial protocol.
//
// Memory that the server's memory map says is flash is erased and written block by block
// with the vFlash packets: whatever else lies in those blocks is read before and written
// back, and where that cannot be read nothing is erased. Without a map, and outside of it,
// memory is written as it is.
type GDB struct {
	spec  Spec
	addr  netip.AddrPort
	w     *wire // nil: not connected
	areas []area
	hasX  bool // X is known
	knowX bool // whether X is known has been asked
}

func newGDB(addr netip.AddrPort, s Spec) *GDB {
	return &GDB{spec: s, addr: addr}
}

// retryEvery is how long Wait pauses before it tries a server again.
const retryEvery = 200 * time.Millisecond

// Wait implements Probe. It tries until a debug server answers and has a unit halted.
func (g *GDB) Wait(ctx context.Context) error {
	for {
		err := g.within(ctx, func() error { return g.alive(ctx) })
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no unit answers: %w (%w)", err, context.Cause(ctx))
		case <-time.After(retryEvery):
		}
	}
}

func (g *GDB) alive(ctx context.Context) error {
	there, err := g.stopped(ctx)
	if err == nil && !there {
		err = errNoUnit
	}
	return err
}

var errNoUnit = fmt.Errorf("%w: the debug server has no unit", ErrTarget)

// Write implements Probe.
func (g *GDB) Write(ctx context.Context, regions []Region) error {
	rs, err := ordered(regions)
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return g.within(ctx, func() error { return g.writeAll(ctx, rs) })
}

// Read implements Probe.
func (g *GDB) Read(ctx context.Context, addr uint32, n int) ([]byte, error) {
	if n < 0 || n > maxWrite {
		return nil, fmt.Errorf("read %#x: %d bytes are too many", addr, n)
	}
	p := make([]byte, n)
	if err := g.ReadInto(ctx, addr, p); err != nil {
		return nil, err
	}
	return p, nil
}

// ReadInto implements Probe.
func (g *GDB) ReadInto(ctx context.Context, addr uint32, p []byte) error {
	err := g.within(ctx, func() error { return g.read(ctx, uint64(addr), p) })
	if err != nil {
		clear(p)
	}
	return err
}

// Close implements Probe.
func (g *GDB) Close() error {
	g.drop()
	return nil
}

// within runs f with a connection, leaves no byte in the buffer, and closes the connection
// if it can be trusted no more.
func (g *GDB) within(ctx context.Context, f func() error) error {
	err := g.attach(ctx)
	if err == nil {
		stop := g.w.watch(ctx)
		err = f()
		stop()
	}
	if g.w == nil {
		clear(g.spec.Buffer)
		return err
	}
	g.w.wipe()
	if err != nil && !errors.Is(err, ErrTarget) || ctx.Err() != nil {
		g.drop() // an answer may still be under way
	}
	return err
}

func (g *GDB) drop() {
	if g.w != nil {
		g.w.conn.Close()
		clear(g.spec.Buffer)
		g.w = nil
	}
}

// attach connects if there is no connection, agrees on the protocol and halts the unit.
func (g *GDB) attach(ctx context.Context) (err error) {
	if g.w != nil {
		return nil
	}
	if g.w, err = connect(ctx, g.addr, g.spec.Buffer, g.spec.Timeout); err != nil {
		return fmt.Errorf("debug server %s: %w", g.addr, err)
	}
	stop := g.w.watch(ctx)
	defer stop()
	g.areas, g.knowX = nil, false
	if err = g.agree(ctx); err == nil {
		err = g.halt(ctx)
	}
	if err == nil {
		return nil
	}
	g.drop()
	return fmt.Errorf("debug server %s: %w", g.addr, err)
}

// agree finds out what the server can do.
func (g *GDB) agree(ctx context.Context) error {
	answer, err := g.ask(ctx, "qSupported")
	if err != nil {
		return err
	}
	can := strings.Split(string(answer), ";")
	for _, c := range can {
		if size, ok := strings.CutPrefix(c, "PacketSize="); ok {
			n, err := strconv.ParseUint(size, 16, 32)
			if err != nil || n < leastPacket {
				return fmt.Errorf("%w: a packet size that is of no use", ErrGone)
			}
			g.w.limit = int(n)
		}
	}
	g.w.limit = min(g.w.limit, len(g.w.enc.out)-frameBytes, len(g.w.dec.out))
	if slices.Contains(can, "QStartNoAckMode+") {
		if answer, err = g.ask(ctx, "QStartNoAckMode"); err != nil {
			return err
		}
		g.w.noAck = string(answer) == "OK"
	}
	if slices.Contains(can, "qXfer:memory-map:read+") {
		g.areas, err = g.memoryMap(ctx)
	}
	return err
}

func (g *GDB) ask(ctx context.Context, text string) ([]byte, error) {
	return g.w.command(ctx, g.spec.Timeout, text)
}

// halt makes sure that the unit stands still. Servers halt it when a debugger connects; one
// that does not is interrupted. A Black Magic Probe must be told to look for it first.
func (g *GDB) halt(ctx context.Context) error {
	there, err := g.stopped(ctx)
	if err != nil || there {
		return err
	}
	if _, err := g.monitor(ctx, "swdp_scan"); err != nil && !errors.Is(err, ErrTarget) {
		return err
	}
	answer, err := g.stopReply(ctx, "vAttach;1")
	if err == nil && !isStop(answer) {
		err = errNoUnit
	}
	return err
}

// stopped asks why the unit stands still; false means that there is none. A server that says
// nothing has a running unit.
func (g *GDB) stopped(ctx context.Context) (bool, error) {
	answer, err := g.stopReply(ctx, "?")
	if errors.Is(err, ErrGone) && ctx.Err() == nil {
		if err = g.w.deadline(ctx, g.spec.Timeout); err == nil {
			err = g.w.put(ctx, []byte{3})
		}
		if err == nil {
			answer, err = g.w.answer(ctx, never)
		}
	}
	if err != nil {
		return false, err
	}
	if isStop(answer) {
		return true, nil
	}
	if len(answer) > 0 && (answer[0] == 'W' || answer[0] == 'X') {
		return false, nil
	}
	return false, refusal(answer, false)
}

func (g *GDB) stopReply(ctx context.Context, text string) ([]byte, error) {
	g.w.enc.begin(text)
	if err := g.w.send(ctx, g.spec.Timeout); err != nil {
		return nil, err
	}
	return g.w.answer(ctx, never)
}

// monitor gives a command to the server's console and returns what it said.
func (g *GDB) monitor(ctx context.Context, text string) (string, error) {
	answer, err := g.ask(ctx, "qRcmd,"+hex.EncodeToString([]byte(text)))
	if err != nil {
		return "", err
	}
	said := append([]byte(nil), g.w.console...)
	if err := refusal(answer, false); err != nil {
		return "", fmt.Errorf("%w %s", err, printable(said))
	}
	if string(answer) != "OK" { // the words may also come as the answer itself
		p := make([]byte, len(answer)/2)
		n, _ := decodeHex(p, answer)
		said = append(said, p[:n]...)
	}
	return printable(said), nil
}

// Reset implements Probe. QEMU is told to reset its machine, others to reset the unit; a
// server without a console is asked to restart what it debugs. Then the server is let go
// of, which makes the unit run.
func (g *GDB) Reset(ctx context.Context) error {
	err := g.within(ctx, func() error {
		err := g.reset(ctx)
		if err != nil && !errors.Is(err, ErrTarget) {
			return err
		}
		return errors.Join(err, g.detach(ctx))
	})
	g.drop()
	if err != nil {
		return fmt.Errorf("reset: %w", err)
	}
	return nil
}

// Release implements Probe.
func (g *GDB) Release(ctx context.Context) error {
	err := g.within(ctx, func() error { return g.detach(ctx) })
	g.drop()
	if err != nil {
		return fmt.Errorf("release: %w", err)
	}
	return nil
}

func (g *GDB) reset(ctx context.Context) error {
	answer, err := g.ask(ctx, "qqemu.sstepbits")
	if err != nil {
		return err
	}
	if strings.HasPrefix(string(answer), "ENABLE=") {
		_, err = g.monitor(ctx, "system_reset")
		return err
	}
	said, err := g.monitor(ctx, "reset")
	switch {
	case err == nil && !unknown(said):
		_, err = g.monitor(ctx, "go") // J-Link's reset leaves the unit halted; others do not know the word
		if errors.Is(err, ErrTarget) {
			err = nil
		}
		return err
	case err != nil && !errors.Is(err, ErrTarget):
		return err
	}
	return g.restart(ctx)
}

// unknown tells the words with which a console says that it does not know a command.
func unknown(said string) bool {
	said = strings.ToLower(said)
	for _, words := range []string{"unknown command", "unknown monitor command", "invalid command", "unrecognized command", "command not found"} {
		if strings.Contains(said, words) {
			return true
		}
	}
	return false
}

// restart sends R, which has no answer where it is known. What answers is therefore "?",
// sent after it.
func (g *GDB) restart(ctx context.Context) error {
	if _, err := g.ask(ctx, "!"); err != nil {
		return err
	}
	g.w.enc.begin("R00")
	if err := g.w.send(ctx, g.spec.Timeout); err != nil {
		return err
	}
	answer, err := g.stopReply(ctx, "?")
	if err != nil || isStop(answer) {
		return err
	}
	refused := fmt.Errorf("%w: it knows neither reset nor restart", ErrTarget)
	_, err = g.w.answer(ctx, never) // that of "?"
	return errors.Join(err, refused)
}

// detach lets the unit run. A server that closes the connection at that has done it.
func (g *GDB) detach(ctx context.Context) error {
	answer, err := g.ask(ctx, "D")
	if errors.Is(err, ErrGone) && ctx.Err() == nil {
		return nil
	}
	if err != nil {
		return err
	}
	return done(answer, false)
}

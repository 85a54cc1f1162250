package probe

import (
	"context"
	"fmt"
	"strconv"
)

// headBytes bounds what stands in a packet before the data: "vFlashWrite:ffffffff:" and
// "Xffffffff,ffffffff:" and the like.
const headBytes = 24

// read fills p from addr.
func (g *GDB) read(ctx context.Context, addr uint64, p []byte) error {
	if addr+uint64(len(p)) > 1<<32 {
		return fmt.Errorf("read %d bytes at %#x: past the end of memory", len(p), addr)
	}
	for len(p) > 0 {
		n, err := g.readPiece(ctx, addr, p[:min(len(p), g.w.limit/2)])
		if err != nil {
			return fmt.Errorf("read %#x: %w", addr, err)
		}
		addr, p = addr+uint64(n), p[n:]
	}
	return nil
}

// readPiece gets at least one byte: a server may give fewer than were asked for.
func (g *GDB) readPiece(ctx context.Context, addr uint64, p []byte) (int, error) {
	answer, err := g.ask(ctx, "m"+strconv.FormatUint(addr, 16)+","+strconv.FormatUint(uint64(len(p)), 16))
	if err != nil {
		return 0, err
	}
	if n, ok := decodeHex(p, answer); ok && n > 0 {
		return n, nil
	}
	clear(p)
	if err := refusal(answer, true); err != nil {
		return 0, err
	}
	return 0, fmt.Errorf("%w: an answer that is no memory", ErrGone)
}

// writeRAM puts p at addr with X, or M where the server does not know that.
func (g *GDB) writeRAM(ctx context.Context, addr uint64, p []byte, quiet bool) error {
	if err := g.askX(ctx, addr); err != nil {
		return err
	}
	for len(p) > 0 {
		n := g.packWrite(addr, p)
		answer, err := g.w.ask(ctx, g.spec.Timeout)
		if err == nil {
			err = done(answer, quiet)
		}
		if err != nil {
			return fmt.Errorf("write %d bytes at %#x: %w", n, addr, err)
		}
		addr, p = addr+uint64(n), p[n:]
	}
	return nil
}

// askX finds out, once for a connection, whether the server takes binary writes.
func (g *GDB) askX(ctx context.Context, addr uint64) error {
	if g.knowX {
		return nil
	}
	answer, err := g.ask(ctx, "X"+strconv.FormatUint(addr, 16)+",0:")
	if err != nil {
		return err
	}
	g.knowX, g.hasX = true, string(answer) == "OK"
	return nil
}

// packWrite makes the packet for as much of p as fits and says how much that is.
func (g *GDB) packWrite(addr uint64, p []byte) int {
	room := g.w.limit - headBytes
	n, letter := min(len(p), room/2), "M"
	if g.hasX {
		n, letter = fitting(p, room), "X"
	}
	g.w.enc.begin(letter + strconv.FormatUint(addr, 16) + "," + strconv.FormatUint(uint64(n), 16) + ":")
	if g.hasX {
		g.w.enc.binary(p[:n])
	} else {
		g.w.enc.hex(p[:n])
	}
	return n
}

package probe

import (
	"context"
	"errors"
	"fmt"
	"strconv"
)

// piece is a part of a region that lies in one area of the map, or outside of all.
type piece struct {
	addr   uint64
	data   []byte
	secret bool
	flash  *area // nil: ordinary memory
}

func (p piece) end() uint64 { return p.addr + uint64(len(p.data)) }

// cut divides the regions, ordered, at the borders of the areas.
func cut(rs []Region, areas []area) ([]piece, error) {
	var pieces []piece
	for _, r := range rs {
		at, data := uint64(r.Addr), r.Data
		for len(data) > 0 {
			a, border := find(areas, at)
			if a != nil && a.kind == "rom" {
				return nil, fmt.Errorf("%w: its memory map says that %#x is read-only: nothing was written", ErrTarget, at)
			}
			if a != nil && a.kind != "flash" {
				a = nil
			}
			n := min(uint64(len(data)), border-at)
			pieces = append(pieces, piece{at, data[:n], r.Secret, a})
			at, data = at+n, data[n:]
		}
	}
	return pieces, nil
}

// find gives the area in which an address lies, nil if there is none, and where that ends.
func find(areas []area, addr uint64) (*area, uint64) {
	for i := range areas {
		switch a := &areas[i]; {
		case addr < a.start:
			return nil, a.start
		case addr < a.end:
			return a, a.end
		}
	}
	return nil, 1 << 32
}

// run is flash that is erased and written in one go: whole blocks of one area.
type run struct {
	start, end uint64
	pieces     []piece // by address
	kept       []byte  // all bytes of the run as they were; zero where pieces lie
}

// runs puts flash pieces, by address, together to whole blocks.
func runs(pieces []piece) []*run {
	var all []*run
	for _, p := range pieces {
		a := p.flash
		start := a.start + (p.addr-a.start)/a.block*a.block
		end := min(a.start+(p.end()-a.start+a.block-1)/a.block*a.block, a.end)
		if n := len(all); n > 0 && start < all[n-1].end {
			all[n-1].end = end
			all[n-1].pieces = append(all[n-1].pieces, p)
			continue
		}
		all = append(all, &run{start: start, end: end, pieces: []piece{p}})
	}
	return all
}

// gap is a stretch of a run that stays as it is.
type gap struct{ from, to uint64 }

func (r *run) gaps() []gap {
	var gs []gap
	at := r.start
	for _, p := range r.pieces {
		if at < p.addr {
			gs = append(gs, gap{at, p.addr})
		}
		at = p.end()
	}
	if at < r.end {
		gs = append(gs, gap{at, r.end})
	}
	return gs
}

// maxKept bounds the bytes that are read from a unit to be written back.
const maxKept = 8 << 20

// writeAll writes regions that are in order.
func (g *GDB) writeAll(ctx context.Context, rs []Region) error {
	pieces, err := cut(rs, g.areas)
	if err != nil {
		return err
	}
	var flash []piece
	for _, p := range pieces {
		if p.flash != nil {
			flash = append(flash, p)
		}
	}
	todo := runs(flash)
	defer forget(todo)
	if err := g.keep(ctx, todo); err != nil {
		return fmt.Errorf("%w: nothing was written", err)
	}
	for _, p := range pieces {
		if p.flash != nil {
			continue
		}
		if err := g.writeRAM(ctx, p.addr, p.data, p.secret); err != nil {
			return fmt.Errorf("%w: the unit is not whole, it is to be written again", err)
		}
	}
	if len(todo) == 0 {
		return nil
	}
	if err := g.program(ctx, todo); err != nil {
		return fmt.Errorf("%w: the flash from %#x to %#x may be erased, its firmware with it", err, todo[0].start, todo[len(todo)-1].end)
	}
	return nil
}

// keep reads what lies beside the pieces in the blocks that will be erased.
func (g *GDB) keep(ctx context.Context, todo []*run) error {
	total := uint64(0)
	for _, r := range todo {
		if total += r.end - r.start; total > maxKept {
			return fmt.Errorf("more than %d bytes of flash would have to be erased", maxKept)
		}
		r.kept = make([]byte, r.end-r.start)
		for _, s := range r.gaps() {
			if err := g.read(ctx, s.from, r.kept[s.from-r.start:s.to-r.start]); err != nil {
				return fmt.Errorf("what shares a flash block with the regions, %#x to %#x, cannot be kept: %w", s.from, s.to, err)
			}
		}
	}
	return nil
}

func forget(todo []*run) {
	for _, r := range todo {
		clear(r.kept)
	}
}

// program erases all runs, writes them in rising order and has the server finish: it may
// do all of the work only then.
func (g *GDB) program(ctx context.Context, todo []*run) error {
	for _, r := range todo {
		g.w.enc.begin("vFlashErase:" + strconv.FormatUint(r.start, 16) + "," + strconv.FormatUint(r.end-r.start, 16))
		if err := g.flashDone(ctx, false); err != nil {
			return fmt.Errorf("erase flash %#x to %#x: %w", r.start, r.end, err)
		}
	}
	for _, r := range todo {
		if err := g.fill(ctx, r); err != nil {
			return err
		}
	}
	g.w.enc.begin("vFlashDone")
	if err := g.flashDone(ctx, true); err != nil {
		return fmt.Errorf("finish flash: %w", err)
	}
	return nil
}

// fill writes a run: kept bytes and pieces in turn.
func (g *GDB) fill(ctx context.Context, r *run) error {
	at := r.start
	kept := func(to uint64) error {
		return g.writeFlash(ctx, at, r.kept[at-r.start:to-r.start], true)
	}
	for _, p := range r.pieces {
		if err := errors.Join(kept(p.addr), g.writeFlash(ctx, p.addr, p.data, p.secret)); err != nil {
			return err
		}
		at = p.end()
	}
	return kept(r.end)
}

func (g *GDB) writeFlash(ctx context.Context, addr uint64, p []byte, quiet bool) error {
	for len(p) > 0 {
		n := fitting(p, g.w.limit-headBytes)
		g.w.enc.begin("vFlashWrite:" + strconv.FormatUint(addr, 16) + ":")
		g.w.enc.binary(p[:n])
		if err := g.flashDone(ctx, quiet); err != nil {
			return fmt.Errorf("write %d bytes of flash at %#x: %w", n, addr, err)
		}
		addr, p = addr+uint64(n), p[n:]
	}
	return nil
}

// flashDone sends a flash packet; the answer may take as long as flash takes.
func (g *GDB) flashDone(ctx context.Context, quiet bool) error {
	answer, err := g.w.ask(ctx, g.spec.FlashTimeout)
	if err != nil {
		return err
	}
	if string(answer) == "E.memtype" {
		return fmt.Errorf("%w: it says that this is no flash", ErrTarget)
	}
	return done(answer, quiet)
}

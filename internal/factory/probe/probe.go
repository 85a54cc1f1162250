// Package probe writes a unit's identity through a debug probe and reads it back.
//
// There are two probes. GDB speaks the GDB remote serial protocol to a debug server on this
// machine (OpenOCD, J-Link, pyOCD, a Black Magic Probe's server, QEMU). Exec gives Intel HEX
// to a command on its standard input.
//
// It promises: the bytes of a Region are put into the caller's Spec.Buffer and nowhere else,
// and that buffer is all zero again when Write, Read or ReadInto has returned, with or
// without an error. From there they go to the kernel with one write call for a piece, without
// a buffered writer between, to loopback or to a pipe. No byte of a region and no byte read
// from a unit ever stands in an error. Outside of this promise are the kernel's own socket
// and pipe buffers, the debug server or command, the slice that Read returns, and bytes that
// lay in the same flash block (see GDB): those are held on the heap for the time of one
// Write, and overwritten with zeros.
package probe

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// The kinds of failure. All else is wrong use (a bad region, an expired context).
var (
	// ErrTarget is an answer: the debug server or the command is there and said no. A Read that
	// fails so shows that memory cannot be read, which is what is demanded of a locked unit.
	ErrTarget = errors.New("refused by the target")

	// ErrGone is no answer: connection refused or lost, silence until the time-out, or bytes
	// that are no protocol. It shows nothing about the unit.
	ErrGone = errors.New("probe gone")

	// ErrNoRead is what Read of a probe says that can only write.
	ErrNoRead = errors.New("this probe cannot read back")
)

// Region is a piece of the unit's memory.
type Region struct {
	Addr   uint32
	Data   []byte // stays the caller's, is only read
	Secret bool   // the target's own words are then left out of errors too: they might quote it
}

// Probe is one way to the units on the bench, one after the other. It is used by one
// goroutine at a time. After ErrGone it may be used again: the next call connects anew.
type Probe interface {
	// Wait returns when a unit answers, halted, or when ctx is done.
	Wait(ctx context.Context) error
	// Write puts all regions into the halted unit. After an error the unit holds some of them,
	// in part: it is to be written again or thrown away, and the error says so.
	Write(ctx context.Context, regions []Region) error
	// Read gives n bytes at addr, on the heap: for what is no secret.
	Read(ctx context.Context, addr uint32, n int) ([]byte, error)
	// ReadInto fills p, memory of the caller's choice, from addr. After an error p is zero.
	ReadInto(ctx context.Context, addr uint32, p []byte) error
	// Reset lets the unit start from its reset vector and lets go of it.
	Reset(ctx context.Context) error
	// Release lets the unit run on from where it stands, and lets go of it.
	Release(ctx context.Context) error
	// Close lets go of the probe, not of the unit: it stays as it is.
	Close() error
}

// BufferSize is what Spec.Buffer should have; from MinBuffer up works, slower.
const (
	BufferSize = 16 << 10
	MinBuffer  = 4 << 10
)

// maxWrite bounds one Write: an identity block and a trust region are some KiB.
const maxWrite = 1 << 20

// ordered gives the regions by address, or says what is wrong with them.
func ordered(regions []Region) ([]Region, error) {
	rs := slices.Clone(regions)
	slices.SortFunc(rs, func(a, b Region) int { return int(int64(a.Addr) - int64(b.Addr)) })
	total, end := 0, uint64(0)
	for _, r := range rs {
		total += len(r.Data)
		switch {
		case len(r.Data) == 0:
			return nil, fmt.Errorf("nothing to write at %#x: nothing was written", r.Addr)
		case total > maxWrite:
			return nil, fmt.Errorf("more than %d bytes to write: nothing was written", maxWrite)
		case uint64(r.Addr) < end:
			return nil, fmt.Errorf("what is to be written at %#x overlaps with what comes before it: nothing was written", r.Addr)
		}
		if end = r.end(); end > 1<<32 {
			return nil, fmt.Errorf("%d bytes at %#x go past the end of memory: nothing was written", len(r.Data), r.Addr)
		}
	}
	if len(rs) == 0 {
		return nil, errors.New("nothing to write")
	}
	return rs, nil
}

// end is the first address after the region; it may be 1<<32.
func (r Region) end() uint64 { return uint64(r.Addr) + uint64(len(r.Data)) }

package msglog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A record of the store's block files begins with its length (u32, the top bit
// says that it has headers), its sequence (u64, the two top bits are marks), its
// time (i64) and the length of its subject (u16), all little-endian.
const (
	blockHeader = 22
	blockMin    = blockHeader + 8 // with its checksum
	headersBit  = 1 << 31
	markBits    = 3 << 62

	// maxSpan is more sequences than one block file can hold: they are 8 MiB.
	maxSpan = 1 << 24
)

// checkBlocks refuses a log with a sequence that cannot be, before the store
// reads it: it would fill the gap, one number after the other, and take all the
// memory there is. Every other damage the store can be trusted to survive.
// It looks at headers only and costs a page read for each record.
func checkBlocks(dir string, streams []string) error {
	for _, s := range streams {
		files, err := filepath.Glob(filepath.Join(streamDir(dir, s), "msgs", "*.blk"))
		if err != nil {
			return err
		}
		for _, f := range files {
			if err := checkBlock(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%w: stream %s in %s: %s: %w", ErrDamaged, s, dir, filepath.Base(f), err)
			}
		}
	}
	return nil
}

func checkBlock(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil || info.Size() == 0 {
		return err
	}
	b, err := unix.Mmap(int(file.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	return errors.Join(checkSequences(b), unix.Munmap(b))
}

// checkSequences walks from record to record. A length that leads nowhere ends
// it: a kill may have cut the last record short.
func checkSequences(b []byte) error {
	var first uint64
	for at := 0; len(b)-at >= blockMin; {
		size := int(binary.LittleEndian.Uint32(b[at:]) &^ headersBit)
		word := binary.LittleEndian.Uint64(b[at+4:])
		if size < blockMin || size > len(b)-at {
			return nil
		}
		seq := word &^ markBits
		switch {
		case word>>63 != 0: // a mark for a message that was removed, of any block
		case first == 0:
			first = seq
		case seq > first+maxSpan:
			return fmt.Errorf("sequence %d at byte %d follows %d", seq, at, first)
		}
		at += size
	}
	return nil
}

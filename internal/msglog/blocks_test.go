package msglog

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// block makes the records of a block file with these sequences.
func block(size int, seqs ...uint64) (b []byte) {
	for _, seq := range seqs {
		rec := make([]byte, size)
		binary.LittleEndian.PutUint32(rec, uint32(size))
		binary.LittleEndian.PutUint64(rec[4:], seq)
		b = append(b, rec...)
	}
	return b
}

func TestSequencesOfABlock(t *testing.T) {
	torn := block(100, 7, 8, 9)[:250]
	for name, c := range map[string]struct {
		b   []byte
		bad bool
	}{
		"empty":            {nil, false},
		"in a row":         {block(100, 7, 8, 9), false},
		"with a gap":       {block(100, 7, 8, 1000), false},
		"a mark of before": {block(100, 70, 1<<63|3, 71), false},
		"an erased one":    {block(100, 7, 1<<62|8, 9), false},
		"cut short":        {torn, false},
		"zeros":            {make([]byte, 500), false},
		"headers":          {append(block(100, 7), 100, 0, 0, 0x80), false},
		"far away":         {block(100, 7, 8|1<<30, 9), true},
		"farther":          {block(100, 7, 8|1<<61, 9), true},
	} {
		path := filepath.Join(t.TempDir(), "1.blk")
		if err := os.WriteFile(path, c.b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := checkBlock(path); (err != nil) != c.bad || c.bad && !strings.Contains(err.Error(), "sequence") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func BenchmarkCheckBlock(b *testing.B) {
	var seqs []uint64
	for i := range uint64(20_000) {
		seqs = append(seqs, i+1)
	}
	data := block(400, seqs...) // 8 MB
	path := filepath.Join(b.TempDir(), "1.blk")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if err := checkBlock(path); err != nil {
			b.Fatal(err)
		}
	}
}

// FuzzBlock: any bytes are walked to an end.
func FuzzBlock(f *testing.F) {
	f.Add(block(100, 7, 8, 9))
	f.Add(block(30, 1, 1<<63|2, 1<<40))
	f.Fuzz(func(t *testing.T, b []byte) { _ = checkSequences(b) })
}

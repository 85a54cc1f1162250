package server

import (
	"bufio"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"

	"hawser/internal/registry"
)

// spool keeps what was verified of a journal until all of it was, in a file without a
// name: memory stays flat, nobody can change it, and after a crash there is nothing of it.
type spool struct {
	f   *os.File
	out *bufio.Writer
	enc *gob.Encoder
	dec *gob.Decoder
}

func newSpool(dir string) (*spool, error) {
	f, err := os.CreateTemp(dir, ".tmp-import-*")
	if err != nil {
		return nil, fmt.Errorf("import: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("import: %w", err), f.Close())
	}
	s := &spool{f: f, out: bufio.NewWriterSize(f, 64<<10)}
	s.enc = gob.NewEncoder(s.out)
	return s, nil
}

func (s *spool) add(v registry.JournalItem) error {
	if err := s.enc.Encode(v); err != nil {
		return fmt.Errorf("import: %w", err)
	}
	return nil
}

// rewind ends the writing.
func (s *spool) rewind() error {
	err := s.out.Flush()
	if err == nil {
		_, err = s.f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return fmt.Errorf("import: %w", err)
	}
	s.dec = gob.NewDecoder(bufio.NewReaderSize(s.f, 64<<10))
	return nil
}

// next is registry.JournalPart.Next.
func (s *spool) next() (v registry.JournalItem, err error) {
	err = s.dec.Decode(&v)
	return v, err
}

func (s *spool) close() { _ = s.f.Close() } // nothing of it is needed any more

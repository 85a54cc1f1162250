package fleet

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"hawser/internal/durable"
)

// bulkPart is how many devices are signed and recorded at a time.
const bulkPart = 1000

// SignedBulk tells what became of a rollover request.
type SignedBulk struct {
	Generation uint32     `json:"generation"`
	Signed     int        `json:"signed"`
	Refused    []BulkLine `json:"refused"` // those that this run refused, by name
	Before     int        `json:"before"`  // devices that an earlier run had answered
}

// SignBulk answers a rollover request file. The result grows in out.part and is renamed
// when it is whole: a run that was killed goes on there. keyURI says where the key of the
// device CA is to be if it has to be made, "" means in this directory. told, if not nil, is
// called after each part.
func (c *CA) SignBulk(request, out, keyURI string, now time.Time, told func(done int)) (*SignedBulk, error) {
	in, err := os.Open(request)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	h, _, sum, err := ReadBulk(in, nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: nothing was signed", request, err)
	}
	fleet := c.Fleet()
	if h.Answers() || h.Fleet != hex.EncodeToString(fleet[:]) {
		return nil, fmt.Errorf("%s is not a request of the fleet that this CA belongs to", request)
	}
	ca, err := c.MakeGeneration(h.Generation, keyURI, now)
	if err != nil {
		return nil, err
	}
	flashed, err := c.Flashed()
	if err != nil {
		return nil, err
	}
	sign, err := c.Resigner(h.Generation, flashed, now)
	if err != nil {
		return nil, err
	}
	head := &BulkHeader{Format: formatBulkResult, Fleet: h.Fleet, Generation: h.Generation, Request: hex.EncodeToString(sum[:]), CA: ca.Raw}
	w, err := openPart(out+".part", head)
	if err != nil {
		return nil, err
	}
	s := bulkSigner{w: w, sign: sign, told: told, sum: SignedBulk{Generation: h.Generation, Before: w.count, Refused: []BulkLine{}}, skip: w.count}
	if _, err := in.Seek(0, io.SeekStart); err != nil {
		return nil, errors.Join(err, w.f.Close())
	}
	if err := s.run(in); err != nil {
		return nil, errors.Join(err, w.f.Close())
	}
	return &s.sum, w.finish(out)
}

// bulkSigner reads devices and answers them in parts.
type bulkSigner struct {
	w    *part
	sign func([]Resign) ([]Resigned, error)
	told func(int)
	sum  SignedBulk
	skip int // devices that are answered already
	wait []Resign
}

func (s *bulkSigner) run(in io.Reader) error {
	n := 0
	_, _, _, err := ReadBulk(in, func(_ *BulkHeader, l *BulkLine) error {
		if n++; n <= s.skip {
			return nil
		}
		s.wait = append(s.wait, Resign{ID: l.ID, CSR: l.CSR, Old: l.Certificate})
		if len(s.wait) < bulkPart {
			return nil
		}
		return s.part()
	})
	if err != nil {
		return err
	}
	return s.part()
}

func (s *bulkSigner) part() error {
	if len(s.wait) == 0 {
		return nil
	}
	answers, err := s.sign(s.wait)
	if err != nil {
		return err
	}
	for _, a := range answers {
		line := BulkLine{ID: a.ID}
		if a.Refused != nil {
			line.Refused = a.Refused.Error()
			s.sum.Refused = append(s.sum.Refused, line)
		} else {
			line.Certificate = a.Cert.Raw
			s.sum.Signed++
		}
		if err := s.w.Add(&line); err != nil {
			return err
		}
	}
	s.wait = s.wait[:0]
	if err := errors.Join(s.w.Flush(), s.w.f.Sync()); err != nil {
		return err
	}
	if s.told != nil {
		s.told(s.w.count)
	}
	return nil
}

// part is a result that grows.
type part struct {
	*BulkWriter
	f *os.File
}

// openPart goes on with the part file of the same header, cut after its last whole line,
// or begins one.
func openPart(path string, head *BulkHeader) (*part, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return newPart(path, head)
	}
	if err != nil {
		return nil, err
	}
	w, err := resumePart(f, head)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w\nhint: remove it, or choose another --out, to begin anew", path, err), f.Close())
	}
	return w, nil
}

func newPart(path string, head *BulkHeader) (*part, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	w, err := NewBulkWriter(f, head)
	if err == nil {
		err = errors.Join(w.Flush(), f.Sync(), durable.SyncDir(filepath.Dir(path)))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &part{w, f}, nil
}

func resumePart(f *os.File, head *BulkHeader) (*part, error) {
	s, err := newBulkScan(f)
	if err != nil {
		return nil, err
	}
	have, err := json.Marshal(s.header)
	if err != nil {
		return nil, err
	}
	want, err := json.Marshal(head)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(have, want) {
		return nil, errors.New("it answers another request")
	}
	for {
		l, err := s.next()
		if errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if l == nil { // whole but for the rename: its last line is written again
			return rebegin(f, head, s)
		}
	}
	return rebegin(f, head, s)
}

// rebegin goes on behind the devices that were read.
func rebegin(f *os.File, head *BulkHeader, s *bulkScan) (*part, error) {
	if err := f.Truncate(s.size); err != nil {
		return nil, err
	}
	if _, err := f.Seek(s.size, io.SeekStart); err != nil {
		return nil, err
	}
	w, err := NewBulkWriter(io.Discard, head)
	if err != nil {
		return nil, err
	}
	w.out.Reset(f)
	w.sum, w.count = s.sum, s.count
	return &part{w, f}, nil
}

// finish ends the file and gives it its name.
func (p *part) finish(out string) error {
	err := p.End()
	if err := errors.Join(err, p.f.Sync(), p.f.Close()); err != nil {
		return err
	}
	return rename(p.f.Name(), out)
}

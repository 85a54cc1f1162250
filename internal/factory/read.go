package factory

import (
	"bufio"
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
)

// LineError says which line of a journal is refused.
type LineError struct {
	Line uint64
	Err  error
}

func (e *LineError) Error() string { return fmt.Sprintf("line %d: %v", e.Line, e.Err) }

// Unwrap gives what is wrong with the line.
func (e *LineError) Unwrap() error { return e.Err }

// ErrFork reports a journal that does not continue what was read of it before.
var ErrFork = errors.New("the journal does not continue what was imported last")

// Summary is what a whole journal says.
type Summary struct {
	Fleet   [16]byte
	Station string
	Cert    *x509.Certificate // the station's, in force at the end
	Lines   uint64
	Head    [32]byte // hash of the last line
	Blocks  int
	Units   int
	Burnt   int
	Torn    int // bytes after the last newline, which were passed over: a line that was never finished
}

// Known is how far a journal was read before: that many lines, the last of which had this
// hash. The zero value is nothing.
type Known struct {
	Lines uint64
	Head  [32]byte
}

// ReadJournal checks a journal whole, on all cores: the chain, each signature, and for each
// unit that the request proves possession of the certified key and that the station's
// certificate in force signed the certificate. It changes nothing. each, if not nil, is called
// for the lines after those that are known, in order, each after it was checked. The known
// ones need no signatures checked, since their hash does; where they are not what they were
// the error is ErrFork. All errors about a line are LineErrors; the first bad line is named.
func ReadJournal(r io.Reader, known Known, each func(*Line) error) (*Summary, error) {
	var s state
	scan := scanner{state: &s, whole: true, known: known, each: each}
	if err := scan.run(r); err != nil {
		return nil, err
	}
	return &Summary{Fleet: s.fleet, Station: s.station, Cert: s.cert, Lines: s.n, Head: s.head,
		Blocks: len(s.blocks), Units: s.units, Burnt: s.burnt, Torn: scan.torn}, nil
}

// batch is how many lines are checked at a time: enough for all cores, about 1 MB of memory.
const batch = 512

// scanner reads lines, and checks what can be checked in parallel in batches.
type scanner struct {
	*state
	whole bool // the units as well
	known Known
	each  func(*Line) error
	size  int64 // bytes of whole lines
	torn  int   // bytes after them
}

func (s *scanner) run(r io.Reader) error {
	in := bufio.NewReaderSize(r, maxLine+1)
	for {
		texts, err := s.next(in)
		if err2 := s.takeBatch(texts); err2 != nil {
			return err2
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if s.n == 0 {
		return fmt.Errorf("%w: it has no first line", ErrJournal)
	}
	if s.n < s.known.Lines {
		return fmt.Errorf("%w: it has %d lines, and %d were imported: its end was cut off", ErrFork, s.n, s.known.Lines)
	}
	return nil
}

// next reads up to a batch of lines; io.EOF comes with the last ones.
func (s *scanner) next(in *bufio.Reader) (texts [][]byte, err error) {
	for len(texts) < batch {
		text, err := in.ReadSlice('\n')
		if err == io.EOF {
			s.torn = len(text)
			return texts, err
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			return texts, &LineError{s.n + uint64(len(texts)) + 1, fmt.Errorf("%w: it is longer than %d bytes", ErrJournal, maxLine)}
		}
		if err != nil {
			return texts, fmt.Errorf("read journal: %w", err)
		}
		s.size += int64(len(text))
		texts = append(texts, append([]byte(nil), text[:len(text)-1]...))
	}
	return texts, nil
}

// takeBatch checks a batch of lines: each by itself, then one after the other, then the
// signatures, then the keys. A line is passed on only when all before it are good.
func (s *scanner) takeBatch(texts [][]byte) error {
	first, lines, errs := s.n+1, make([]*Line, len(texts)), make([]error, len(texts))
	parallel(len(texts), func(i int) { lines[i], errs[i] = parseLine(texts[i]) })
	good := s.chain(lines, errs)
	parallel(good, func(i int) {
		if lines[i].Number > s.known.Lines {
			errs[i] = lines[i].verify(s.whole)
		}
	})
	for i := range lines {
		if errs[i] == nil {
			errs[i] = s.pass(lines[i])
		}
		if errs[i] != nil {
			return &LineError{first + uint64(i), errs[i]}
		}
	}
	return nil
}

// chain takes lines in up to the first that is bad, and gives their number.
func (s *scanner) chain(lines []*Line, errs []error) int {
	for i, l := range lines {
		if errs[i] == nil {
			errs[i] = s.check(l)
		}
		if errs[i] == nil && l.Number == s.known.Lines && l.Hash != s.known.Head {
			errs[i] = fmt.Errorf("%w: this is not the line %d that was", ErrFork, l.Number)
		}
		if errs[i] != nil {
			return i
		}
		s.take(l)
	}
	return len(lines)
}

// pass hands a checked line on.
func (s *scanner) pass(l *Line) error {
	if err := s.checkKey(l); err != nil {
		return err
	}
	s.claim(l)
	if s.each == nil || l.Number <= s.known.Lines {
		return nil
	}
	return s.each(l)
}

// parallel calls f for 0 to n-1 on all cores.
func parallel(n int, f func(int)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(n, runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	wg.Wait()
}

// JournalOf tells whose journal r holds, from its first line, and leaves r where it was.
// Nothing of it is checked: that is for ReadJournal.
func JournalOf(r *bufio.Reader) (fleet [16]byte, station string, err error) {
	head, err := r.Peek(maxLine + 1)
	if err != nil && err != io.EOF {
		return fleet, "", fmt.Errorf("read journal: %w", err)
	}
	text, _, whole := bytes.Cut(head, []byte("\n"))
	if !whole {
		return fleet, "", &LineError{1, fmt.Errorf("%w: it has no first line", ErrJournal)}
	}
	l, err := parseLine(text)
	if err == nil && l.What != Begin {
		err = fmt.Errorf("%w: it does not begin with a %q record", ErrJournal, Begin)
	}
	if err != nil {
		return fleet, "", &LineError{1, err}
	}
	raw, err := hex.DecodeString(l.Fleet)
	copy(fleet[:], raw)
	return fleet, l.Station, err
}

// JournalReader makes a reader that JournalOf can look ahead in.
func JournalReader(r io.Reader) *bufio.Reader { return bufio.NewReaderSize(r, maxLine+1) }

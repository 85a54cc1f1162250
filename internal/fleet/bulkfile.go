package fleet

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"

	"hawser/internal/identity"
)

// A rollover's request and result are files of JSON lines, so that neither side ever
// holds more than a part: a header, a line for each device, and an end that counts them
// and holds the SHA-256 of all bytes before it. PROTOCOL.md, "Rollover files".
const (
	formatBulkRequest = "hawser rollover request 1"
	formatBulkResult  = "hawser rollover result 1"
	maxBulkLine       = 16 << 10 // bytes, newline excluded
)

// ErrBulk reports a rollover file that is not whole.
var ErrBulk = errors.New("the rollover file is damaged or was cut off")

// BulkHeader is the first line.
type BulkHeader struct {
	Format     string `json:"format"`
	Fleet      string `json:"fleet"` // 32 lower-case hex digits
	Generation uint32 `json:"generation"`
	Rollover   int64  `json:"rollover,omitempty"` // request: its number
	Nonce      string `json:"nonce,omitempty"`    // request: 32 lower-case hex digits, random
	Request    string `json:"request,omitempty"`  // result: SHA-256 of the request's file, hex
	CA         []byte `json:"ca,omitempty"`       // result: the new device CA, DER in base64
}

// BulkLine is one device.
type BulkLine struct {
	ID          identity.ID `json:"id"`
	CSR         []byte      `json:"csr,omitempty"`         // request: DER in base64
	Certificate []byte      `json:"certificate,omitempty"` // request: of an older generation; result: the new one
	Refused     string      `json:"refused,omitempty"`     // result: why there is none
}

// bulkEnd is the last line.
type bulkEnd struct {
	End   string `json:"end"` // SHA-256 of all bytes before this line, hex
	Count int    `json:"count"`
}

func (h *BulkHeader) check() error {
	if raw, err := hex.DecodeString(h.Fleet); err != nil || len(raw) != 16 {
		return fmt.Errorf("%w: no fleet id", ErrBulk)
	}
	if h.Generation < 2 || h.Generation > 1<<15 {
		return fmt.Errorf("%w: generation %d", ErrBulk, h.Generation)
	}
	request := h.Format == formatBulkRequest && h.Rollover > 0 && len(h.Nonce) == 32 && h.Request == "" && h.CA == nil
	result := h.Format == formatBulkResult && h.Rollover == 0 && h.Nonce == "" && len(h.Request) == 64 && len(h.CA) > 0
	if !request && !result {
		return fmt.Errorf("%w: the first line is not that of a request or a result", ErrBulk)
	}
	return nil
}

// Answers reports whether this is the header of a result.
func (h *BulkHeader) Answers() bool { return h.Format == formatBulkResult }

func (l *BulkLine) check(h *BulkHeader) error {
	request := len(l.CSR) > 0 && l.Refused == ""
	result := l.CSR == nil && (len(l.Certificate) > 0) != (l.Refused != "")
	if h.Answers() && !result || !h.Answers() && !request {
		return fmt.Errorf("%w: the line of %s", ErrBulk, l.ID)
	}
	return nil
}

// BulkWriter writes a rollover file.
type BulkWriter struct {
	out   *bufio.Writer
	sum   hash.Hash
	count int
}

// NewBulkWriter begins a file with its header.
func NewBulkWriter(w io.Writer, h *BulkHeader) (*BulkWriter, error) {
	b := &BulkWriter{out: bufio.NewWriterSize(w, 64<<10), sum: sha256.New()}
	if err := h.check(); err != nil {
		return nil, err
	}
	return b, b.line(h)
}

func (b *BulkWriter) line(v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(text) > maxBulkLine {
		return fmt.Errorf("a line of %d bytes is longer than %d", len(text), maxBulkLine)
	}
	text = append(text, '\n')
	b.sum.Write(text)
	_, err = b.out.Write(text)
	return err
}

// Add writes the line of one device.
func (b *BulkWriter) Add(l *BulkLine) error {
	b.count++
	return b.line(l)
}

// Flush hands what was added to the file.
func (b *BulkWriter) Flush() error { return b.out.Flush() }

// End writes the last line.
func (b *BulkWriter) End() error {
	if err := b.line(bulkEnd{hex.EncodeToString(b.sum.Sum(nil)), b.count}); err != nil {
		return err
	}
	return b.out.Flush()
}

// bulkScan reads a rollover file line by line.
type bulkScan struct {
	in     *bufio.Reader
	header BulkHeader
	sum    hash.Hash // of header and devices
	all    hash.Hash // of these and the last line
	count  int
	size   int64 // bytes of header and devices
}

func newBulkScan(r io.Reader) (*bulkScan, error) {
	s := &bulkScan{in: bufio.NewReaderSize(r, maxBulkLine+1), sum: sha256.New(), all: sha256.New()}
	text, err := s.text()
	if err != nil {
		return nil, err
	}
	if err := strict(text, &s.header); err != nil {
		return nil, fmt.Errorf("%w: first line: %v", ErrBulk, err)
	}
	s.take(text)
	return s, s.header.check()
}

// text reads a line with its newline. io.ErrUnexpectedEOF: the file ends before.
func (s *bulkScan) text() ([]byte, error) {
	text, err := s.in.ReadSlice('\n')
	if errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: it ends after %d devices: %w", ErrBulk, s.count, io.ErrUnexpectedEOF)
	}
	if errors.Is(err, bufio.ErrBufferFull) {
		return nil, fmt.Errorf("%w: a line is longer than %d bytes", ErrBulk, maxBulkLine)
	}
	return text, err
}

func (s *bulkScan) take(text []byte) {
	s.sum.Write(text)
	s.all.Write(text)
	s.size += int64(len(text))
}

// next gives the next device, nil at a good end.
func (s *bulkScan) next() (*BulkLine, error) {
	text, err := s.text()
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(text, []byte(`{"end":`)) {
		return nil, s.end(text)
	}
	l := new(BulkLine)
	if err := strict(text, l); err != nil {
		return nil, fmt.Errorf("%w: line %d: %v", ErrBulk, s.count+2, err)
	}
	if err := l.check(&s.header); err != nil {
		return nil, err
	}
	s.count++
	s.take(text)
	return l, nil
}

func (s *bulkScan) end(text []byte) error {
	var e bulkEnd
	if err := strict(text, &e); err != nil {
		return fmt.Errorf("%w: last line: %v", ErrBulk, err)
	}
	if e.Count != s.count || e.End != hex.EncodeToString(s.sum.Sum(nil)) {
		return fmt.Errorf("%w: its last line does not fit what stands before it", ErrBulk)
	}
	if _, err := s.in.ReadByte(); err != io.EOF {
		return fmt.Errorf("%w: something follows its last line", ErrBulk)
	}
	s.all.Write(text)
	return nil
}

// ReadBulk reads a rollover file to its end and calls each, if it is not nil, for every
// device. It gives the header, and the SHA-256 of the whole file. Only when it returns
// without an error is the file known to be whole: read it twice, first with nil.
func ReadBulk(r io.Reader, each func(*BulkHeader, *BulkLine) error) (h BulkHeader, count int, sum [32]byte, err error) {
	s, err := newBulkScan(r)
	if err != nil {
		return h, 0, sum, err
	}
	for {
		l, err := s.next()
		if err != nil {
			return h, 0, sum, err
		}
		if l == nil {
			return s.header, s.count, [32]byte(s.all.Sum(nil)), nil
		}
		if each != nil {
			if err := each(&s.header, l); err != nil {
				return h, 0, sum, err
			}
		}
	}
}

// strict reads one object: no unknown keys, nothing after it.
func strict(text []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if len(bytes.TrimSpace(text[d.InputOffset():])) > 0 {
		return errors.New("text after the object")
	}
	return nil
}

// NewBulkRequest begins the request of a rollover.
func NewBulkRequest(w io.Writer, fleet [16]byte, rollover int64, generation uint32, nonce [16]byte) (*BulkWriter, error) {
	return NewBulkWriter(w, &BulkHeader{Format: formatBulkRequest, Fleet: hex.EncodeToString(fleet[:]), Generation: generation,
		Rollover: rollover, Nonce: hex.EncodeToString(nonce[:])})
}

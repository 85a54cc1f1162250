// Package backup is the format of a backup file: named members, checksummed, and
// encrypted with a passphrase where that is asked for.
//
// It promises: what a Reader gives was written by a Writer and is whole once Next
// has said io.EOF; before that nothing of it may be relied on. A file that was cut
// off, extended or changed in one bit is ErrDamaged, an encrypted one at the latest
// at the end of the 64 KiB in which it was changed. Reader and Writer hold one
// chunk in memory, however long a member is. It imports golang.org/x/crypto only.
package backup

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"strings"
)

// ErrDamaged: the file is not one that was written whole.
var ErrDamaged = errors.New("the backup is damaged")

// magic begins a backup in clear; see also sealedMagic.
const magic = "HWSRBKP1"

// Limits of the format.
const (
	maxName    = 255
	maxMembers = 1 << 20
	chunkSize  = 256 << 10
	maxChunk   = 1 << 20
)

// The kinds of entry.
const (
	entryEnd    = 0
	entryMember = 1
)

// Writer writes a backup.
type Writer struct {
	w     io.Writer
	whole hash.Hash
	chunk []byte
	n     uint32
	err   error
}

// NewWriter begins a backup on w.
func NewWriter(w io.Writer) *Writer {
	b := &Writer{w: w, whole: sha256.New(), chunk: make([]byte, 4+chunkSize)}
	b.write([]byte(magic))
	return b
}

func (b *Writer) write(p []byte) {
	if b.err == nil {
		b.whole.Write(p)
		_, b.err = b.w.Write(p)
	}
}

// Member writes all that r gives under a name. After an error the backup is void.
func (b *Writer) Member(name string, mode fs.FileMode, r io.Reader) error {
	if err := checkName(name); err != nil {
		return err
	}
	head := binary.BigEndian.AppendUint16([]byte{entryMember}, uint16(mode.Perm()))
	b.write(append(append(head, byte(len(name))), name...))
	sum := sha256.New()
	for b.err == nil {
		n, err := io.ReadFull(r, b.chunk[4:])
		if n > 0 {
			binary.BigEndian.PutUint32(b.chunk, uint32(n))
			sum.Write(b.chunk[4 : 4+n])
			b.write(b.chunk[:4+n])
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil && b.err == nil {
			b.err = err
		}
	}
	b.write(make([]byte, 4))
	b.write(sum.Sum(nil))
	b.n++
	return b.err
}

// Close writes the end, without which no Reader takes the rest.
func (b *Writer) Close() error {
	b.write(binary.BigEndian.AppendUint32([]byte{entryEnd}, b.n))
	if b.err == nil {
		_, b.err = b.w.Write(b.whole.Sum(nil))
	}
	return b.err
}

// checkName: a path below the fleet's directory and nothing else.
func checkName(name string) error {
	if len(name) > maxName || !fs.ValidPath(name) || name == "." || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == '\\' || r == 0x7f }) {
		return fmt.Errorf("%w: %q is no name of a member", ErrDamaged, name)
	}
	return nil
}

// Reader reads a backup.
type Reader struct {
	r     *bufio.Reader
	whole hash.Hash
	seen  map[string]bool
	open  *member // not read to its end
	err   error
}

// Member is the head of one member.
type Member struct {
	Name string
	Mode fs.FileMode
}

// NewReader reads a backup in clear: see Open for one that may be encrypted.
func NewReader(r io.Reader) (*Reader, error) {
	b := &Reader{r: bufio.NewReaderSize(r, 64<<10), whole: sha256.New(), seen: map[string]bool{}}
	head := make([]byte, len(magic))
	if err := b.read(head); err != nil {
		return nil, err
	}
	if string(head) != magic {
		return nil, fmt.Errorf("%w: it does not begin like a backup", ErrDamaged)
	}
	return b, nil
}

// read fills p, which is part of what the last checksum covers.
func (b *Reader) read(p []byte) error {
	if err := b.readRaw(p); err != nil {
		return err
	}
	b.whole.Write(p)
	return nil
}

func (b *Reader) readRaw(p []byte) error {
	_, err := io.ReadFull(b.r, p)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = fmt.Errorf("%w: it ends too early", ErrDamaged)
	}
	return err
}

// Next gives the next member; its reader is valid until the next call. io.EOF
// says that there are no more and that all was whole.
func (b *Reader) Next() (Member, io.Reader, error) {
	if b.err == nil && b.open != nil {
		_, b.err = io.Copy(io.Discard, b.open)
	}
	if b.err != nil {
		return Member{}, nil, b.err
	}
	m, err := b.next()
	if err != nil {
		b.err = err
		return Member{}, nil, err
	}
	b.open = &member{b: b, name: m.Name, sum: sha256.New()}
	return m, b.open, nil
}

func (b *Reader) next() (m Member, err error) {
	var kind [1]byte
	if err := b.read(kind[:]); err != nil {
		return m, err
	}
	switch kind[0] {
	case entryEnd:
		return m, b.end()
	case entryMember:
	default:
		return m, fmt.Errorf("%w: an entry of kind %d", ErrDamaged, kind[0])
	}
	var head [3]byte
	if err := b.read(head[:]); err != nil {
		return m, err
	}
	name := make([]byte, head[2])
	if err := b.read(name); err != nil {
		return m, err
	}
	m = Member{string(name), fs.FileMode(binary.BigEndian.Uint16(head[:]))}
	switch {
	case checkName(m.Name) != nil:
		return m, checkName(m.Name)
	case m.Mode&^fs.ModePerm != 0:
		return m, fmt.Errorf("%w: mode %o of %s", ErrDamaged, uint32(m.Mode), m.Name)
	case b.seen[m.Name], len(b.seen) == maxMembers:
		return m, fmt.Errorf("%w: %s is there twice, or there are too many", ErrDamaged, m.Name)
	}
	b.seen[m.Name] = true
	return m, nil
}

// end is io.EOF when the backup is whole.
func (b *Reader) end() error {
	var n [4]byte
	if err := b.read(n[:]); err != nil {
		return err
	}
	want := b.whole.Sum(nil)
	have := make([]byte, len(want))
	if err := b.readRaw(have); err != nil {
		return err
	}
	switch _, err := b.r.ReadByte(); {
	case string(have) != string(want):
		return fmt.Errorf("%w: its checksum is another", ErrDamaged)
	case binary.BigEndian.Uint32(n[:]) != uint32(len(b.seen)):
		return fmt.Errorf("%w: %d members, its end says %d", ErrDamaged, len(b.seen), binary.BigEndian.Uint32(n[:]))
	case err == nil:
		return fmt.Errorf("%w: something follows its end", ErrDamaged)
	case !errors.Is(err, io.EOF):
		return err
	}
	return io.EOF
}

// member reads the data of one member.
type member struct {
	b    *Reader
	name string
	sum  hash.Hash
	left uint32 // of the chunk
	done bool
}

// Read implements io.Reader. io.EOF comes only after the checksum was compared.
func (m *member) Read(p []byte) (int, error) {
	if m.b.err != nil {
		return 0, m.b.err
	}
	if m.done || m.b.open != m {
		return 0, io.EOF
	}
	if m.left == 0 {
		if err := m.nextChunk(); err != nil {
			if !errors.Is(err, io.EOF) {
				m.b.err = err
			}
			return 0, err
		}
	}
	n := min(len(p), int(m.left))
	if err := m.b.read(p[:n]); err != nil {
		m.b.err = err
		return 0, err
	}
	m.sum.Write(p[:n])
	m.left -= uint32(n)
	return n, nil
}

func (m *member) nextChunk() error {
	var size [4]byte
	if err := m.b.read(size[:]); err != nil {
		return err
	}
	if m.left = binary.BigEndian.Uint32(size[:]); m.left > maxChunk {
		return fmt.Errorf("%w: a chunk of %d bytes in %s", ErrDamaged, m.left, m.name)
	}
	if m.left > 0 {
		return nil
	}
	have := make([]byte, sha256.Size)
	if err := m.b.read(have); err != nil {
		return err
	}
	if string(have) != string(m.sum.Sum(nil)) {
		return fmt.Errorf("%w: the checksum of %s is another", ErrDamaged, m.name)
	}
	m.done = true
	return io.EOF
}

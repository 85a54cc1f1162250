package backup

import (
	"bufio"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"golang.org/x/crypto/scrypt"
)

// ErrPassphrase: the first bytes do not open with this passphrase. Whether it is
// wrong or the file was changed cannot be told.
var ErrPassphrase = errors.New("wrong passphrase, or the backup was changed")

// sealedMagic begins an encrypted backup. It is followed by the cost of scrypt
// (log2 N, r, p; a byte each) and the salt; all of that is the additional data of
// every piece.
const sealedMagic = "HWSRBKE1"

// What a guess at the passphrase costs: 128 MiB and about a third of a second. A
// file that asks for more is refused before the memory is taken.
const (
	scryptLogN    = 17
	scryptMinLogN = 10
	scryptR       = 8
	scryptP       = 1
	saltSize      = 16
	sealedHead    = len(sealedMagic) + 3 + saltSize
)

// pieceSize is how much is encrypted at once. Pieces are numbered, and the last
// one is marked, in the nonce: none can be left out, moved, or become the last.
const pieceSize = 64 << 10

func aead(head, passphrase []byte) (cipher.AEAD, error) {
	cost := head[len(sealedMagic):]
	if cost[0] < scryptMinLogN || cost[0] > scryptLogN || cost[1] != scryptR || cost[2] != scryptP {
		return nil, fmt.Errorf("%w: the cost of its passphrase is out of range", ErrDamaged)
	}
	key, err := scrypt.Key(passphrase, cost[3:], 1<<cost[0], scryptR, scryptP, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// pieceNonce never repeats under one key: the salt is new for each file.
func pieceNonce(n uint64, last bool) []byte {
	nonce := binary.BigEndian.AppendUint64(make([]byte, 3, 12), n)
	if last {
		return append(nonce, 1)
	}
	return append(nonce, 0)
}

// sealer is the writer that Encrypt gives.
type sealer struct {
	w    io.Writer
	aead cipher.AEAD
	head []byte
	buf  []byte // the piece that is being filled
	out  []byte
	n    uint64
}

// Encrypt gives a writer of which everything reaches w encrypted. Close writes the
// last piece; it does not close w.
func Encrypt(w io.Writer, passphrase []byte) (io.WriteCloser, error) {
	return encrypt(w, passphrase, scryptLogN)
}

func encrypt(w io.Writer, passphrase []byte, logN byte) (io.WriteCloser, error) {
	if len(passphrase) == 0 {
		return nil, errors.New("an empty passphrase protects nothing")
	}
	head := append([]byte(sealedMagic), logN, scryptR, scryptP)
	head = append(head, make([]byte, saltSize)...)
	if _, err := rand.Read(head[len(head)-saltSize:]); err != nil {
		return nil, err
	}
	a, err := aead(head, passphrase)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(head); err != nil {
		return nil, err
	}
	return &sealer{w: w, aead: a, head: head, buf: make([]byte, 0, pieceSize)}, nil
}

// Write implements io.Writer. A full piece waits for the next byte: it may be the
// last one.
func (s *sealer) Write(p []byte) (int, error) {
	total := len(p)
	for len(p) > 0 {
		if len(s.buf) == pieceSize {
			if err := s.seal(false); err != nil {
				return total - len(p), err
			}
		}
		n := min(len(p), pieceSize-len(s.buf))
		s.buf, p = append(s.buf, p[:n]...), p[n:]
	}
	return total, nil
}

func (s *sealer) seal(last bool) error {
	s.out = s.aead.Seal(s.out[:0], pieceNonce(s.n, last), s.buf, s.head)
	s.buf = s.buf[:0]
	s.n++
	_, err := s.w.Write(s.out)
	return err
}

// Close implements io.Closer.
func (s *sealer) Close() error { return s.seal(true) }

// Sealed reports whether a file that begins with head is an encrypted backup.
// Eight bytes are enough.
func Sealed(head []byte) bool {
	return len(head) >= len(sealedMagic) && string(head[:len(sealedMagic)]) == sealedMagic
}

// Open begins to read a backup; passphrase is asked if it is encrypted.
func Open(r io.Reader, passphrase func() ([]byte, error)) (*Reader, error) {
	br := bufio.NewReaderSize(r, pieceSize+16)
	head, err := br.Peek(len(sealedMagic))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if !Sealed(head) {
		return NewReader(br)
	}
	text, err := passphrase()
	if err != nil {
		return nil, err
	}
	clear, err := decrypt(br, text)
	if err != nil {
		return nil, err
	}
	return NewReader(clear)
}

// opener reads what a sealer wrote.
type opener struct {
	r      *bufio.Reader
	aead   cipher.AEAD
	head   []byte
	sealed []byte
	buf    []byte
	clear  []byte // of buf, not yet given
	n      uint64
	err    error
}

func decrypt(r *bufio.Reader, passphrase []byte) (io.Reader, error) {
	head := make([]byte, sealedHead)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, fmt.Errorf("%w: it ends too early", ErrDamaged)
	}
	a, err := aead(head, passphrase)
	if err != nil {
		return nil, err
	}
	return &opener{r: r, aead: a, head: head, sealed: make([]byte, pieceSize+a.Overhead())}, nil
}

// Read implements io.Reader. io.EOF comes only after the piece that is marked as
// the last.
func (o *opener) Read(p []byte) (int, error) {
	for len(o.clear) == 0 {
		if o.err != nil {
			return 0, o.err
		}
		o.err = o.piece()
	}
	n := copy(p, o.clear)
	o.clear = o.clear[n:]
	return n, nil
}

// piece opens the next one; io.EOF when it is the last.
func (o *opener) piece() error {
	n, err := io.ReadFull(o.r, o.sealed)
	last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	if err != nil && !last {
		return err
	}
	if !last { // a whole piece may be the last one
		_, err := o.r.Peek(1)
		if last = errors.Is(err, io.EOF); err != nil && !last {
			return err
		}
	}
	o.buf, err = o.aead.Open(o.buf[:0], pieceNonce(o.n, last), o.sealed[:n], o.head)
	o.clear = o.buf
	switch {
	case err != nil && o.n == 0:
		return ErrPassphrase
	case err != nil:
		return fmt.Errorf("%w: it was changed or cut off after %d bytes", ErrDamaged, o.n*pieceSize)
	case last:
		return io.EOF
	}
	o.n++
	return nil
}

// Package keyroom makes the key of one unit in a process of its own and puts it into
// the unit, so that the key is nowhere else.
//
// The process (Serve, started by Start) lives for one unit. It promises:
//   - it dumps no core (RLIMIT_CORE 0, PR_SET_DUMPABLE 0), and nobody but root may
//     attach to it or read its memory;
//   - the key is drawn by crypto/rand into a room of memory that is locked and excluded
//     from core dumps; in it are the identity block, what was read back of it and the
//     packets of the probe too. A room that cannot be locked ends the unit before there is
//     a key;
//   - the room is wiped when the unit is written, or when that failed, and then looked
//     at: bytes that are left are reported and fail the unit;
//   - the key leaves the process through the probe only. What it says to its parent over
//     the two pipes (messages.go), and every error in it, is free of it.
//
// What it cannot promise: crypto/ecdsa copies the key to Go's heap and stacks, where it is
// not wiped with certainty (what can be reached, is). These copies are why the process is
// short: they are gone when it ends, right after the unit. They are locked into memory too
// where the limit (RLIMIT_MEMLOCK) or the rights of the process allow it.
package keyroom

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"hawser/internal/factory"
	"hawser/internal/factory/probe"
	"hawser/internal/identity"
)

// Where things lie in the room.
const (
	scalarSize = factory.ScalarSize
	blockSize  = factory.IdentitySize
	atScalar   = 0
	atBlock    = 128
	atReadBack = 256
	atPackets  = 4096
	roomSize   = atPackets + probe.BufferSize
)

// errLeft reports a room that still holds something after it was wiped.
var errLeft = errors.New("the locked memory is not empty after it was wiped")

// Harden keeps this process out of core dumps and away from debuggers, for as long as it
// lives. Its children inherit the limit.
func Harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	return nil
}

// room is locked memory outside Go's heap.
type room struct{ mem []byte }

// newRoom maps the room. One that cannot be locked is an error: swapped out, the key would
// be in a file.
func newRoom() (*room, error) {
	mem, err := unix.Mmap(-1, 0, roomSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("get memory for the key: %w", err)
	}
	if err := unix.Mlock(mem); err != nil {
		return nil, fmt.Errorf("lock the memory for the key: %w: no key was made\n"+
			"hint: the limit RLIMIT_MEMLOCK is too low: ulimit -l 64 (KiB) before, or LimitMEMLOCK= of the service", err)
	}
	if err := unix.Madvise(mem, unix.MADV_DONTDUMP); err != nil {
		return nil, fmt.Errorf("exclude the memory for the key from core dumps: %w: no key was made", err)
	}
	return &room{mem}, nil
}

func (r *room) scalar() []byte  { return r.mem[atScalar : atScalar+scalarSize : atScalar+scalarSize] }
func (r *room) block() []byte   { return r.mem[atBlock : atBlock+blockSize : atBlock+blockSize] }
func (r *room) packets() []byte { return r.mem[atPackets:roomSize:roomSize] }
func (r *room) readBack() []byte {
	return r.mem[atReadBack : atReadBack+blockSize : atReadBack+blockSize]
}

// wipe overwrites all that was in the room, and looks whether it did.
func (r *room) wipe() error {
	clear(r.mem)
	return r.empty()
}

func (r *room) empty() error {
	for _, b := range r.mem {
		if b != 0 {
			return errLeft
		}
	}
	return nil
}

// draw puts a new scalar into the room, by drawing until there is one.
func (r *room) draw() error {
	for d := r.scalar(); ; {
		if _, err := rand.Read(d); err != nil {
			return fmt.Errorf("draw a key: %w", err)
		}
		if inRange(d) {
			return nil
		}
	}
}

// inRange is 1 <= d < n, the order of the group.
func inRange(d []byte) bool {
	order := elliptic.P256().Params().N.Bytes()
	return bytes.Compare(d, order) < 0 && !bytes.Equal(d, make([]byte, scalarSize))
}

// public gives the public key of the scalar in the room.
func (r *room) public() (*ecdsa.PublicKey, error) {
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), r.scalar())
	if err != nil {
		return nil, errors.New("the private key is not a scalar of P-256")
	}
	defer clear(key.D.Bits())
	return &key.PublicKey, nil
}

// request makes the certificate request of id with the scalar in the room.
func (r *room) request(id identity.ID) ([]byte, error) {
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), r.scalar())
	if err != nil {
		return nil, errors.New("the private key is not a scalar of P-256")
	}
	defer clear(key.D.Bits())
	t := &x509.CertificateRequest{Subject: pkix.Name{CommonName: id.String()}, SignatureAlgorithm: x509.ECDSAWithSHA256}
	der, err := x509.CreateCertificateRequest(rand.Reader, t, key)
	if err != nil {
		return nil, fmt.Errorf("make a certificate request: %w", err)
	}
	return der, nil
}

// window is how many bytes of the key in a row make a text a leak.
const window = 4

// clean gives text unless bytes of the scalar stand in it, as they are or in hex: a
// tool of the probe may repeat what it was given in its complaint.
func (r *room) clean(text string) string {
	d, lower := r.scalar(), bytes.ToLower([]byte(text))
	if bytes.Equal(d, make([]byte, scalarSize)) {
		return text
	}
	for i := 0; i+window <= len(d); i++ {
		w := d[i : i+window]
		if bytes.Contains([]byte(text), w) || bytes.Contains(lower, hex.AppendEncode(nil, w)) {
			return "the probe's complaint holds bytes of the key and is not shown"
		}
	}
	return text
}

package factory

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"hawser/internal/identity"
)

// The identity block: PROTOCOL.md, "Identity block". All numbers are little-endian but
// the private key, which is a big-endian scalar as everywhere in ECC.
const (
	IdentitySize = 128 // bytes
	ScalarSize   = 32  // bytes of a P-256 private key

	identityMagic   = "HWSR"
	identityVersion = 1
	offFlags        = 5
	offZero         = 6 // two bytes
	offID           = 8
	offScalar       = 12
	offErased       = offScalar + ScalarSize // 0xFF up to the checksum, as erased flash reads
	offIdentityCRC  = IdentitySize - 4
)

// The order n of P-256's group (SEC 2, 2.4.2): a private key d has 1 <= d < n.
const orderP256 = "\xff\xff\xff\xff\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff" +
	"\xbc\xe6\xfa\xad\xa7\x17\x9e\x84\xf3\xb9\xca\xc2\xfc\x63\x25\x51"

// ErrIdentity reports bytes that are not an identity block.
var ErrIdentity = errors.New("not an identity block")

// Identity is a parsed identity block.
type Identity struct {
	ID    identity.ID
	Flags uint8
	// Scalar is the private key. It lies within the bytes that were parsed: whoever wipes
	// those has wiped it.
	Scalar []byte
}

// PutIdentity writes the identity block into dst and makes no copy of scalar but that one,
// so that the caller can keep both in memory that is locked and wiped. On an error dst holds
// nothing of the scalar.
func PutIdentity(dst *[IdentitySize]byte, id identity.ID, scalar []byte, flags uint8) error {
	if !id.Issuable() {
		return identity.ErrID
	}
	if err := checkScalar(scalar); err != nil {
		return err
	}
	copy(dst[:], identityMagic)
	dst[4], dst[offFlags] = identityVersion, flags
	binary.LittleEndian.PutUint16(dst[offZero:], 0)
	binary.LittleEndian.PutUint32(dst[offID:], uint32(id))
	copy(dst[offScalar:], scalar)
	for i := offErased; i < offIdentityCRC; i++ {
		dst[i] = 0xff
	}
	binary.LittleEndian.PutUint32(dst[offIdentityCRC:], crc32.ChecksumIEEE(dst[:offIdentityCRC]))
	return nil
}

// EncodeIdentity is PutIdentity for callers to whom one more copy of the key is nothing.
func EncodeIdentity(id identity.ID, scalar []byte, flags uint8) (b [IdentitySize]byte, err error) {
	err = PutIdentity(&b, id, scalar, flags)
	return b, err
}

// ParseIdentity reads the 128 bytes of an identity block. Errors are ErrIdentity with what
// is wrong, and never hold a byte of the key.
func ParseIdentity(b []byte) (Identity, error) {
	if len(b) != IdentitySize {
		return Identity{}, fmt.Errorf("%w: %d bytes, not %d", ErrIdentity, len(b), IdentitySize)
	}
	if string(b[:4]) != identityMagic {
		return Identity{}, fmt.Errorf("%w: it does not begin with %s", ErrIdentity, identityMagic)
	}
	if sum := binary.LittleEndian.Uint32(b[offIdentityCRC:]); sum != crc32.ChecksumIEEE(b[:offIdentityCRC]) {
		return Identity{}, fmt.Errorf("%w: wrong checksum", ErrIdentity)
	}
	if b[4] != identityVersion {
		return Identity{}, fmt.Errorf("%w: layout version %d, not %d", ErrIdentity, b[4], identityVersion)
	}
	if err := checkFiller(b); err != nil {
		return Identity{}, err
	}
	v := Identity{ID: identity.ID(binary.LittleEndian.Uint32(b[offID:])), Flags: b[offFlags], Scalar: b[offScalar:offErased:offErased]}
	if !v.ID.Issuable() {
		return Identity{}, fmt.Errorf("%w: id %s is never issued", ErrIdentity, v.ID)
	}
	if err := checkScalar(v.Scalar); err != nil {
		return Identity{}, fmt.Errorf("%w: %v", ErrIdentity, err)
	}
	return v, nil
}

func checkFiller(b []byte) error {
	if b[offZero] != 0 || b[offZero+1] != 0 {
		return fmt.Errorf("%w: the reserved bytes 6 and 7 are not 0", ErrIdentity)
	}
	for i := offErased; i < offIdentityCRC; i++ {
		if b[i] != 0xff {
			return fmt.Errorf("%w: the reserved byte %d is not 0xff", ErrIdentity, i)
		}
	}
	return nil
}

// checkScalar holds d against 1 <= d < n, in constant time and without a big.Int, whose
// words would stay on the heap.
func checkScalar(d []byte) error {
	if len(d) != ScalarSize {
		return fmt.Errorf("a private key has %d bytes, not %d", ScalarSize, len(d))
	}
	bits := byte(0)
	borrow := 0 // of d - n: 1 in the end if d < n
	for i := ScalarSize - 1; i >= 0; i-- {
		bits |= d[i]
		borrow = (int(d[i]) - int(orderP256[i]) - borrow) >> 8 & 1
	}
	if bits == 0 || borrow == 0 {
		return errors.New("the private key is not between 1 and the order of the curve")
	}
	return nil
}

// Package factory holds the formats that a flashing bench and a server share: the
// identity block and the trust region that go into a unit, the block file that brings a
// bench its ids, and the station's journal that brings the units back.
//
// It promises that what it parses is accepted whole or refused with the reason, that
// nothing it writes but the identity block holds a secret, and that a journal record which
// was acknowledged is on disk, signed by the station and chained to the one before. It
// judges what can be judged from the file alone: whether ids were reserved, and for whom, is
// the registry's to say. It imports leaves, pki and libraries only and holds no state of its own.
package factory

import (
	"encoding/hex"
	"fmt"
)

// BlockID names a block of reserved ids: 16 random bytes, 32 lower-case hex digits in text.
type BlockID [16]byte

func (b BlockID) String() string { return hex.EncodeToString(b[:]) }

// ParseBlockID reads the one spelling of a block's name.
func ParseBlockID(s string) (b BlockID, err error) {
	raw, err := hex.DecodeString(s)
	if err != nil || len(raw) != len(b) || hex.EncodeToString(raw) != s || BlockID(raw) == (BlockID{}) {
		return b, fmt.Errorf("block id %q is not 32 lower-case hex digits", s)
	}
	return BlockID(raw), nil
}

package keyroom

import (
	"bytes"
	"encoding/binary"

	"hawser/internal/identity"
)

// headSize is the part of an identity block before the key: magic, version, flags, id.
const headSize = 12

// Sight is what a look at the unit on the probe shows without touching its key.
type Sight struct {
	Blind bool   `json:"blind,omitempty"` // the probe cannot read at all
	Head  []byte `json:"head,omitempty"`  // the first bytes of the place of the identity block
}

// Written is the sight of a unit that was given id.
func Written(id identity.ID, flags uint8) *Sight {
	head := append([]byte("HWSR"), 1, flags, 0, 0)
	return &Sight{Head: binary.LittleEndian.AppendUint32(head, uint32(id))}
}

// ID is the id that stands in the unit, if an identity block begins there.
func (s *Sight) ID() (id identity.ID, ok bool) {
	if len(s.Head) != headSize || string(s.Head[:4]) != "HWSR" {
		return 0, false
	}
	id = identity.ID(binary.LittleEndian.Uint32(s.Head[8:]))
	return id, id.Issuable()
}

// same reports whether s can be the unit that was seen as last. A blind probe cannot
// tell: whoever uses one says when the next unit is there.
func (s *Sight) same(last *Sight) bool {
	if last == nil || s.Blind || last.Blind {
		return false
	}
	return bytes.Equal(s.Head, last.Head)
}

// Reading is what a unit holds, as far as it may be told.
type Reading struct {
	Bad    string      `json:"bad,omitempty"` // what is wrong with the identity block; then there is no id
	ID     identity.ID `json:"id,omitzero"`
	Flags  uint8       `json:"flags"`
	Public []byte      `json:"public,omitempty"` // SubjectPublicKeyInfo of the private key in the block
	Trust  []byte      `json:"trust"`            // the bytes of the trust region
}

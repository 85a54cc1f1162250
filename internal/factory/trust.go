package factory

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// The trust region: PROTOCOL.md, "Trust region". It holds no secret.
const (
	TagCertificate = 1 // the device's certificate, DER
	TagAnchors     = 2 // the anchor set that the device is born with, COSE_Sign1

	// MaxTrust bounds a whole region, in bytes: a device sets that much flash apart.
	MaxTrust = 8 << 10

	trustMagic   = "HWTR"
	trustVersion = 1
	trustHead    = len(trustMagic) + 1
	entryHead    = 3
	trustCRC     = 4
)

// ErrTrust reports bytes that are not a trust region.
var ErrTrust = errors.New("not a trust region")

// Entry is one value of a trust region.
type Entry struct {
	Tag   uint8  // 1 and up
	Value []byte // 1 to 65535 bytes
}

// EncodeTrust gives the region of entries, whose tags ascend.
func EncodeTrust(entries []Entry) ([]byte, error) {
	out := append([]byte(trustMagic), trustVersion)
	last := uint8(0)
	for _, e := range entries {
		if e.Tag <= last {
			return nil, fmt.Errorf("tag %d after tag %d: the tags of a trust region ascend from 1", e.Tag, last)
		}
		if len(e.Value) == 0 || len(e.Value) > MaxTrust {
			return nil, fmt.Errorf("tag %d: a value of %d bytes does not go into a trust region", e.Tag, len(e.Value))
		}
		out = append(out, e.Tag)
		out = binary.LittleEndian.AppendUint16(out, uint16(len(e.Value)))
		out, last = append(out, e.Value...), e.Tag
	}
	out = append(out, 0)
	out = binary.LittleEndian.AppendUint32(out, crc32.ChecksumIEEE(out))
	if len(out) > MaxTrust {
		return nil, fmt.Errorf("a trust region of %d bytes is larger than %d", len(out), MaxTrust)
	}
	return out, nil
}

// ParseTrust reads the region that b begins with, and tells how many bytes it has: what
// follows is the rest of the flash page. Entries with tags that this version does not know are
// given as well. The values lie within b.
func ParseTrust(b []byte) (entries []Entry, size int, err error) {
	if len(b) < trustHead || string(b[:len(trustMagic)]) != trustMagic {
		return nil, 0, fmt.Errorf("%w: it does not begin with %s", ErrTrust, trustMagic)
	}
	if v := b[len(trustMagic)]; v != trustVersion {
		return nil, 0, fmt.Errorf("%w: version %d, not %d", ErrTrust, v, trustVersion)
	}
	b = b[:min(len(b), MaxTrust)]
	at, last := trustHead, uint8(0)
	for at < len(b) && b[at] != 0 {
		e, err := parseEntry(b[at:], last)
		if err != nil {
			return nil, 0, fmt.Errorf("%w: at byte %d: %w", ErrTrust, at, err)
		}
		entries, at, last = append(entries, e), at+entryHead+len(e.Value), e.Tag
	}
	if len(b) < at+1+trustCRC {
		return nil, 0, fmt.Errorf("%w: it is cut short", ErrTrust)
	}
	if sum := binary.LittleEndian.Uint32(b[at+1:]); sum != crc32.ChecksumIEEE(b[:at+1]) {
		return nil, 0, fmt.Errorf("%w: wrong checksum", ErrTrust)
	}
	return entries, at + 1 + trustCRC, nil
}

func parseEntry(b []byte, last uint8) (Entry, error) {
	if len(b) < entryHead {
		return Entry{}, errors.New("it is cut short")
	}
	n := int(binary.LittleEndian.Uint16(b[1:]))
	switch {
	case b[0] <= last:
		return Entry{}, fmt.Errorf("tag %d after tag %d", b[0], last)
	case n == 0:
		return Entry{}, fmt.Errorf("tag %d has no value", b[0])
	case n > len(b)-entryHead:
		return Entry{}, fmt.Errorf("tag %d reaches beyond the region", b[0])
	}
	return Entry{b[0], b[entryHead : entryHead+n : entryHead+n]}, nil
}

// Value gives the value under tag, or nil.
func Value(entries []Entry, tag uint8) []byte {
	for _, e := range entries {
		if e.Tag == tag {
			return e.Value
		}
	}
	return nil
}

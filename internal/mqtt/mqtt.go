// Package mqtt is the packets of MQTT 3.1.1 and 5.0 on the wire, in both
// directions: a broker and a client are built on it.
//
// It promises that Decode accepts nothing that the specifications call malformed
// or a protocol error and that can be seen from the one packet; that it takes no
// memory for a length before the bytes of that length are there; and that
// decoding and encoding PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP and the pings
// allocates nothing. What a Decode fills as []byte are views into the body it was
// given: whoever keeps them beyond the life of that buffer copies them.
//
// Splitting the stream is the caller's, and so are its limits: ParseHeader says how
// long a packet claims to be, and the caller compares that with its own maximum
// before it reads, or makes room for, the body.
//
// Append writes what it is given. A string or binary field beyond 65,535 bytes, or a
// packet beyond 268,435,455, is a mistake of the caller and panics.
package mqtt

import (
	"fmt"
	"math"
)

// Version is the protocol level of CONNECT.
type Version byte

// The protocol levels. V31 is recognised in CONNECT only, to be refused.
const (
	V31  Version = 3
	V311 Version = 4
	V5   Version = 5
)

func (v Version) String() string {
	switch v {
	case V31:
		return "3.1"
	case V311:
		return "3.1.1"
	case V5:
		return "5.0"
	}
	return fmt.Sprintf("level %d", byte(v))
}

// Type is the packet type in the upper half of the first byte.
type Type byte

// The packet types (MQTT 5.0 2.1.2). AUTH does not exist in 3.1.1.
const (
	CONNECT Type = iota + 1
	CONNACK
	PUBLISH
	PUBACK
	PUBREC
	PUBREL
	PUBCOMP
	SUBSCRIBE
	SUBACK
	UNSUBSCRIBE
	UNSUBACK
	PINGREQ
	PINGRESP
	DISCONNECT
	AUTH
)

func (t Type) String() string {
	const names = "RESERVED   CONNECT    CONNACK    PUBLISH    PUBACK     PUBREC     PUBREL     PUBCOMP    " +
		"SUBSCRIBE  SUBACK     UNSUBSCRIBEUNSUBACK   PINGREQ    PINGRESP   DISCONNECT AUTH       "
	const width = 11
	if t > AUTH {
		return fmt.Sprintf("type %d", byte(t))
	}
	name := names[int(t)*width : int(t+1)*width]
	for name[len(name)-1] == ' ' {
		name = name[:len(name)-1]
	}
	return name
}

// Error is why a packet was refused. Code is what a 5.0 peer is told in DISCONNECT
// or CONNACK; a 3.1.1 connection is just closed.
type Error struct {
	Code ReasonCode
	Text string
}

func (e *Error) Error() string { return "mqtt: " + e.Code.String() + ": " + e.Text }

func malformed(text string) *Error { return &Error{MalformedPacket, text} }
func violation(text string) *Error { return &Error{ProtocolError, text} }

// Header is the fixed header: Remaining counts the bytes of the body after it.
type Header struct {
	Type      Type
	Flags     byte
	Remaining int
}

// MaxRemaining is the longest body the length field can tell (MQTT 5.0 1.5.5).
const MaxRemaining = 268_435_455

// ParseHeader reads the fixed header at the start of b. n is its length in bytes; n == 0
// without an error means that b ends too early. A type of 0, and a length that takes
// five bytes or more bytes than it needs, are malformed. The flags are judged by the
// Decode of the packet. The caller compares Remaining with its own limit.
func ParseHeader(b []byte) (h Header, n int, err error) {
	if len(b) == 0 {
		return h, 0, nil
	}
	h.Type, h.Flags = Type(b[0]>>4), b[0]&0x0F
	if h.Type == 0 {
		return Header{}, 0, malformed("packet type 0")
	}
	v, used, bad := varint(b[1:])
	if bad != nil {
		return Header{}, 0, bad
	}
	if used == 0 {
		return Header{}, 0, nil
	}
	h.Remaining = int(v)
	return h, 1 + used, nil
}

// AppendHeader appends the fixed header of a packet with a body of remaining bytes.
func AppendHeader(dst []byte, t Type, flags byte, remaining int) []byte {
	if remaining < 0 || remaining > MaxRemaining {
		panic("mqtt: packet beyond 268,435,455 bytes")
	}
	return appendVarint(append(dst, byte(t)<<4|flags&0x0F), uint32(remaining))
}

// varint reads a variable byte integer (MQTT 5.0 1.5.5). used == 0 means too few bytes.
func varint(b []byte) (v uint32, used int, err *Error) {
	for i := 0; i < 4; i++ {
		if i >= len(b) {
			return 0, 0, nil
		}
		v |= uint32(b[i]&0x7F) << (7 * i)
		if b[i] < 0x80 {
			if i > 0 && b[i] == 0 {
				return 0, 0, malformed("length in more bytes than it needs")
			}
			return v, i + 1, nil
		}
	}
	return 0, 0, malformed("length of more than four bytes")
}

func appendVarint(dst []byte, v uint32) []byte {
	for v >= 0x80 {
		dst = append(dst, byte(v)|0x80)
		v >>= 7
	}
	return append(dst, byte(v))
}

func varintSize(v int) int {
	switch {
	case v < 1<<7:
		return 1
	case v < 1<<14:
		return 2
	case v < 1<<21:
		return 3
	}
	return 4
}

// openBlock leaves room for a length in front of what is appended next; closeBlock
// fills it in and closes the gap. It serves packets and property lists alike.
func openBlock(dst []byte) ([]byte, int) { return append(dst, 0, 0, 0, 0), len(dst) }

func closeBlock(dst []byte, mark int) []byte {
	body := dst[mark+4:]
	if len(body) > MaxRemaining {
		panic("mqtt: packet beyond 268,435,455 bytes")
	}
	head := appendVarint(dst[:mark], uint32(len(body)))
	return append(head, body...)
}

func appendUint16(dst []byte, v uint16) []byte { return append(dst, byte(v>>8), byte(v)) }

func appendUint32(dst []byte, v uint32) []byte {
	return append(dst, byte(v>>24), byte(v>>16), byte(v>>8), byte(v))
}

func appendField[T string | []byte](dst []byte, v T) []byte {
	if len(v) > math.MaxUint16 {
		panic("mqtt: field beyond 65,535 bytes")
	}
	return append(appendUint16(dst, uint16(len(v))), v...)
}

package mqtt

import (
	"bytes"
	"encoding/binary"
	"unicode/utf8"
)

// reader takes fields off the front of a packet body. The first error sticks and
// everything read after it is zero, so a decoder checks once, at its end.
type reader struct {
	b   []byte
	err *Error
}

func (r *reader) fail(e *Error) {
	if r.err == nil {
		r.err = e
	}
	r.b = nil
}

func (r *reader) take(n int) []byte {
	if n > len(r.b) {
		r.fail(malformed("packet ends too early"))
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) uint8() byte {
	if v := r.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (r *reader) uint16() uint16 {
	if v := r.take(2); v != nil {
		return binary.BigEndian.Uint16(v)
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if v := r.take(4); v != nil {
		return binary.BigEndian.Uint32(v)
	}
	return 0
}

func (r *reader) varint() uint32 {
	v, used, err := varint(r.b)
	if err == nil && used == 0 {
		err = malformed("packet ends too early")
	}
	if err != nil {
		r.fail(err)
		return 0
	}
	r.b = r.b[used:]
	return v
}

// packetID reads an identifier, which is never 0 (MQTT 5.0 2.2.1).
func (r *reader) packetID() uint16 {
	v := r.uint16()
	if v == 0 {
		r.fail(violation("packet identifier 0"))
	}
	return v
}

// binary reads two bytes of length and that many bytes.
func (r *reader) binary() []byte { return r.take(int(r.uint16())) }

// text reads a UTF-8 string (MQTT 5.0 1.5.4).
func (r *reader) text() []byte {
	v := r.binary()
	switch {
	case !utf8.Valid(v):
		r.fail(malformed("string is not UTF-8"))
	case bytes.IndexByte(v, 0) >= 0:
		r.fail(malformed("string holds U+0000"))
	}
	return v
}

// topicName reads a topic name. It may be empty: only PUBLISH can judge that.
func (r *reader) topicName() []byte {
	v := r.text()
	if bytes.IndexByte(v, '+') >= 0 || bytes.IndexByte(v, '#') >= 0 {
		r.fail(malformed("topic name holds a wildcard"))
	}
	return v
}

// filter reads a topic filter (MQTT 5.0 4.7.1): wildcards are whole levels, # is the last.
func (r *reader) filter() string {
	v := r.text()
	if r.err == nil && len(v) == 0 {
		r.fail(malformed("topic filter is empty"))
	}
	for i, c := range v {
		if c != '+' && c != '#' {
			continue
		}
		starts := i == 0 || v[i-1] == '/'
		ends := i == len(v)-1 || (c == '+' && v[i+1] == '/')
		if !starts || !ends {
			r.fail(malformed("wildcard in the middle of a topic filter"))
			break
		}
	}
	return string(v)
}

// end gives the first error, and refuses bytes that nothing has read.
func (r *reader) end() error {
	if r.err == nil && len(r.b) > 0 {
		r.fail(malformed("bytes after the end of the packet"))
	}
	if r.err != nil {
		return r.err
	}
	return nil
}

// checkFlags compares the low half of the first byte with what 2.1.3 demands.
func checkFlags(got, want byte) error {
	if got != want {
		return malformed("reserved flags of the fixed header")
	}
	return nil
}

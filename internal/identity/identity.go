// Package identity names the principals of a fleet and the topics they use.
//
// It promises that a value of type ID or Principal that came out of a Parse
// function can be put into a topic, a file name or a certificate subject as it
// stands: it holds no wildcard, no separator and no white space. It is pure,
// allocates nothing on the matching path, and imports the standard library only.
package identity

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// ID is the 32-bit identity of a device. Its only spelling is eight upper-case
// hex digits; 00000000 and FFFFFFFF are never issued (they are what blank and
// erased flash reads as).
type ID uint32

// ErrID reports a string that is not the spelling of an issuable device id.
var ErrID = errors.New("a device id is eight upper-case hex digits, not 00000000 or FFFFFFFF")

// ErrName reports a string that cannot name a service.
var ErrName = errors.New("a service name is [a-z][a-z0-9-]{0,30} and not eight hex digits")

const hexDigits = "0123456789ABCDEF"

// ParseID reads the one spelling of an id. Lower case is refused: two spellings
// of one identity are two ways past a comparison.
func ParseID(s string) (ID, error) {
	if len(s) != 8 {
		return 0, ErrID
	}
	var v uint32
	for i := 0; i < 8; i++ {
		d := hexValue(s[i])
		if d < 0 {
			return 0, ErrID
		}
		v = v<<4 | uint32(d)
	}
	if !ID(v).Issuable() {
		return 0, ErrID
	}
	return ID(v), nil
}

func hexValue(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// Issuable reports whether id may belong to a device.
func (id ID) Issuable() bool { return id != 0 && id != 0xFFFFFFFF }

// String gives the eight upper-case hex digits.
func (id ID) String() string {
	var b [8]byte
	for i := range b {
		b[i] = hexDigits[id>>(28-4*i)&0xF]
	}
	return string(b[:])
}

// MarshalText implements encoding.TextMarshaler.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler with the rules of ParseID.
func (id *ID) UnmarshalText(b []byte) error {
	v, err := ParseID(string(b))
	if err != nil {
		return err
	}
	*id = v
	return nil
}

// RandomID draws an issuable id from r. Whether it is free is the registry's to say.
func RandomID(r io.Reader) (ID, error) {
	var b [4]byte
	for {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return 0, fmt.Errorf("draw a device id: %w", err)
		}
		if id := ID(binary.BigEndian.Uint32(b[:])); id.Issuable() {
			return id, nil
		}
	}
}

// CheckName reports whether s can name a service. Names of eight hex digits are
// refused in either case, so that no service can be mistaken for a device.
func CheckName(s string) error {
	if len(s) == 0 || len(s) > 31 || s[0] < 'a' || s[0] > 'z' {
		return ErrName
	}
	hexOnly := true
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'f', c >= '0' && c <= '9':
		case c >= 'g' && c <= 'z', c == '-':
			hexOnly = false
		default:
			return ErrName
		}
	}
	if hexOnly && len(s) == 8 {
		return ErrName
	}
	return nil
}

// Kind says which rules a principal lives under.
type Kind uint8

// The kinds of principal. The zero value is nobody and may do nothing.
const (
	Nobody Kind = iota
	Device
	Service
	Server // Hawser itself: the only publisher under private/<id>/d/
)

func (k Kind) String() string {
	switch k {
	case Device:
		return "device"
	case Service:
		return "service"
	case Server:
		return "server"
	}
	return "nobody"
}

// Principal is who acts: comparable, so it can be a map key. Name is the eight
// digits of a device's id, a service's name, or "hawser" for the server.
type Principal struct {
	Kind Kind
	Name string
}

// TheServer is the principal under which Hawser publishes its own messages.
func TheServer() Principal { return Principal{Kind: Server, Name: "hawser"} }

// DevicePrincipal is the principal of a device.
func DevicePrincipal(id ID) Principal { return Principal{Kind: Device, Name: id.String()} }

// ServicePrincipal is the principal of the service called name.
func ServicePrincipal(name string) (Principal, error) {
	if err := CheckName(name); err != nil {
		return Principal{}, err
	}
	return Principal{Kind: Service, Name: name}, nil
}

// ID gives a device's id; ok is false for every other principal.
func (p Principal) ID() (id ID, ok bool) {
	if p.Kind != Device {
		return 0, false
	}
	id, err := ParseID(p.Name)
	return id, err == nil
}

func (p Principal) String() string { return p.Kind.String() + " " + p.Name }

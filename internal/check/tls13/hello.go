package tls13

import (
	"encoding/binary"
	"errors"
	"slices"
)

// Extension types (RFC 9846 4.3 and the registry).
const (
	ExtServerName    uint16 = 0
	ExtGroups        uint16 = 10
	ExtSchemes       uint16 = 13
	ExtALPN          uint16 = 16
	ExtCompress      uint16 = 27
	ExtRecordLimit   uint16 = 28
	ExtTicket        uint16 = 35
	ExtPSK           uint16 = 41
	ExtEarlyData     uint16 = 42
	ExtVersions      uint16 = 43
	ExtCookie        uint16 = 44
	ExtPSKModes      uint16 = 45
	ExtAuthorities   uint16 = 47
	ExtSchemesCert   uint16 = 50
	ExtKeyShare      uint16 = 51
	VersionTLS13     uint16 = 0x0304
	GroupP256        uint16 = 0x0017
	GroupP384        uint16 = 0x0018
	GroupX25519      uint16 = 0x001d
	ECDSAP256        uint16 = 0x0403 // ecdsa_secp256r1_sha256
	ECDSAP384        uint16 = 0x0503
	RSAPSS           uint16 = 0x0804 // rsa_pss_rsae_sha256
	maxExtensions           = 64
	maxListedNumbers        = 256
)

// Hello is a parsed ClientHello.
type Hello struct {
	Raw         []byte // the whole message
	Random      []byte
	Session     []byte
	Suites      []uint16
	Extensions  []uint16 // types, in order
	Name        string   // SNI
	Groups      []uint16
	Schemes     []uint16
	Versions    []uint16
	Shares      map[uint16][]byte
	Protocols   []string // ALPN
	RecordLimit int      // RFC 8449; 0 = none
	Early       bool     // early_data
	PSK         bool     // pre_shared_key
}

var errHello = errors.New("the ClientHello does not parse")

// reader takes a message apart; after the first thing wrong all it gives is empty.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if r.bad || n > len(r.b) {
		r.bad = true
		return nil
	}
	out := r.b[:n:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) number(size int) (n int) {
	for _, x := range r.take(size) {
		n = n<<8 | int(x)
	}
	return n
}

// vector takes a vector whose length stands before it in size bytes.
func (r *reader) vector(size int) *reader { return &reader{b: r.take(r.number(size)), bad: r.bad} }

func (r *reader) numbers() (list []uint16) {
	for len(r.b) > 0 && !r.bad && len(list) < maxListedNumbers {
		list = append(list, uint16(r.number(2)))
	}
	return list
}

// ParseHello reads a ClientHello message, its handshake header included.
func ParseHello(message []byte) (*Hello, error) {
	if len(message) < 4 || message[0] != ClientHello {
		return nil, errHello
	}
	r := &reader{b: message[4:]}
	h := &Hello{Raw: message, Shares: map[uint16][]byte{}}
	r.take(2)
	h.Random = r.take(32)
	h.Session = r.vector(1).b
	h.Suites = r.vector(2).numbers()
	r.vector(1)
	for exts := r.vector(2); len(exts.b) > 0 && !exts.bad; {
		kind := uint16(exts.number(2))
		body := exts.vector(2)
		if exts.bad || len(h.Extensions) == maxExtensions || !h.extension(kind, body) {
			return nil, errHello
		}
		h.Extensions = append(h.Extensions, kind)
	}
	if r.bad || len(r.b) > 0 || len(h.Session) > 32 {
		return nil, errHello
	}
	return h, nil
}

func (h *Hello) extension(kind uint16, r *reader) bool {
	switch kind {
	case ExtServerName:
		if list := r.vector(2); list.number(1) == 0 {
			h.Name = string(list.vector(2).b)
		}
	case ExtGroups:
		h.Groups = r.vector(2).numbers()
	case ExtSchemes:
		h.Schemes = r.vector(2).numbers()
	case ExtVersions:
		h.Versions = r.vector(1).numbers()
	case ExtRecordLimit:
		h.RecordLimit = r.number(2)
	case ExtEarlyData:
		h.Early = true
	case ExtPSK:
		h.PSK = true
	case ExtALPN:
		for list := r.vector(2); len(list.b) > 0 && !list.bad; {
			h.Protocols = append(h.Protocols, string(list.vector(1).b))
		}
	case ExtKeyShare:
		for list := r.vector(2); len(list.b) > 0 && !list.bad; {
			group := uint16(list.number(2))
			h.Shares[group] = list.vector(2).b
		}
	}
	return !r.bad
}

// Has reports whether the client sent an extension of that type.
func (h *Hello) Has(kind uint16) bool { return slices.Contains(h.Extensions, kind) }

// Extension is one extension as it goes on the wire.
type Extension struct {
	Type uint16
	Body []byte
}

func appendExtensions(b []byte, list []Extension) []byte {
	var all []byte
	for _, e := range list {
		all = binary.BigEndian.AppendUint16(all, e.Type)
		all = binary.BigEndian.AppendUint16(all, uint16(len(e.Body)))
		all = append(all, e.Body...)
	}
	b = binary.BigEndian.AppendUint16(b, uint16(len(all)))
	return append(b, all...)
}

func vector8(b []byte) []byte { return append([]byte{byte(len(b))}, b...) }
func vector16(b []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)
}
func vector24(b []byte) []byte {
	return append([]byte{byte(len(b) >> 16), byte(len(b) >> 8), byte(len(b))}, b...)
}

func numbers16(list ...uint16) (b []byte) {
	for _, n := range list {
		b = binary.BigEndian.AppendUint16(b, n)
	}
	return b
}

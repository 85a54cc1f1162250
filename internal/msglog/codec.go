package msglog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"unsafe"

	"hawser/internal/identity"
)

// One block format serves four uses, told apart by the magic. PROTOCOL.md, "Log
// formats", is its description; testdata/vectors/frame.json holds examples.
const (
	magicFrame    = 0x48574652 // HWFR
	magicQueue    = 0x48575155 // HWQU
	magicChunk    = 0x48574348 // HWCH
	magicRetained = 0x48575254 // HWRT

	blockVersion = 1
	headerSize   = 32
	trailerSize  = 4

	flagFinal = 1 // queue message: no further one belongs to the same frame
)

// The longest fields of a record, in bytes.
const (
	maxPayload  = 256 << 10
	maxProps    = 256 << 10
	maxClientID = 65535
)

const (
	bitsQoS      = 0x03
	bitRetain    = 0x04
	bitDirect    = 0x08
	bitExpiry    = 0x10
	bitPacketID  = 0x20
	bitClientID  = 0x40
	bitProps     = 0x80
	lowNibble    = 0x0F
	highestFrom  = uint8(identity.Server)
	highestKind  = uint8(KindStart)
	maxNameBytes = 31
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header is the fixed part of a block.
type header struct {
	magic  uint32
	flags  uint8
	count  int
	number uint64 // frame, queue, retained: number of the frame; chunk: floor (a Pos)
	link   uint64 // frame: checksum of the one before; queue, chunk: sequence of the one before
	base   int64  // unix milliseconds, added to the first record's time
}

func putHeader(b []byte, h header) {
	binary.BigEndian.PutUint32(b, h.magic)
	b[4], b[5] = blockVersion, h.flags
	binary.BigEndian.PutUint16(b[6:], uint16(h.count))
	binary.BigEndian.PutUint64(b[8:], h.number)
	binary.BigEndian.PutUint64(b[16:], h.link)
	binary.BigEndian.PutUint64(b[24:], uint64(h.base))
}

// seal writes header and trailer around the records in b[headerSize:] and
// returns the whole block and its checksum.
func seal(b []byte, h header) ([]byte, uint32) {
	putHeader(b, h)
	sum := crc32.Checksum(b, castagnoli)
	return binary.BigEndian.AppendUint32(b, sum), sum
}

// encoder appends records to a block under construction.
type encoder struct {
	positions bool  // blocks other than frames: each record carries its position
	lastPos   Pos   // of the record before
	lastTime  int64 // of the record before; the base time at the start
}

// append adds r, which check has found good.
func (e *encoder) append(b []byte, r *Record) []byte {
	if e.positions {
		b = binary.AppendUvarint(b, uint64(r.Pos-e.lastPos))
		e.lastPos = r.Pos
	}
	b = append(b, recordBits(r), uint8(r.Kind)|uint8(r.From.Kind)<<4)
	b = binary.AppendVarint(b, r.Time-e.lastTime)
	e.lastTime = r.Time
	b = appendString(b, r.From.Name)
	if r.ClientID != "" {
		b = appendString(b, r.ClientID)
	}
	if r.PacketID != 0 {
		b = binary.BigEndian.AppendUint16(b, r.PacketID)
	}
	if r.HasExpiry {
		b = binary.AppendUvarint(b, uint64(r.Expiry))
	}
	if len(r.Props) > 0 {
		b = append(binary.AppendUvarint(b, uint64(len(r.Props))), r.Props...)
	}
	b = appendString(b, r.Topic)
	return append(binary.AppendUvarint(b, uint64(len(r.Payload))), r.Payload...)
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func recordBits(r *Record) uint8 {
	bits := r.QoS & bitsQoS
	for _, f := range [...]struct {
		on  bool
		bit uint8
	}{
		{r.Retain, bitRetain}, {r.Direct, bitDirect}, {r.HasExpiry, bitExpiry},
		{r.PacketID != 0, bitPacketID}, {r.ClientID != "", bitClientID}, {len(r.Props) > 0, bitProps},
	} {
		if f.on {
			bits |= f.bit
		}
	}
	return bits
}

// sizeBound is at least the encoded size of r.
func sizeBound(r *Record) int {
	return 48 + len(r.From.Name) + len(r.ClientID) + len(r.Props) + len(r.Topic) + len(r.Payload)
}

// check reports why r cannot be stored.
func (r *Record) check() error {
	switch {
	case len(r.Topic) > identity.MaxTopic, len(r.Payload) > maxPayload, len(r.Props) > maxProps,
		len(r.ClientID) > maxClientID, len(r.From.Name) > maxNameBytes,
		sizeBound(r) > MaxFrame-headerSize-trailerSize:
		return ErrTooLarge
	case r.Kind == 0 || uint8(r.Kind) > highestKind, r.QoS > 2, uint8(r.From.Kind) > highestFrom:
		return fmt.Errorf("a record of kind %d, qos %d, from kind %d cannot be stored", r.Kind, r.QoS, r.From.Kind)
	}
	return nil
}

// What can be wrong with a block. Callers wrap it with where it was found.
var (
	errShort    = errors.New("it is cut off")
	errChecksum = errors.New("its checksum is wrong")
	errFormat   = errors.New("it is not in the format of this version")
)

// parseHeader checks a whole block's checksum and fixed part, and gives the
// bytes of its records and its checksum.
func parseHeader(b []byte, magic uint32) (h header, body []byte, sum uint32, err error) {
	if len(b) < headerSize+trailerSize {
		return h, nil, 0, errShort
	}
	body = b[headerSize : len(b)-trailerSize]
	sum = binary.BigEndian.Uint32(b[len(b)-trailerSize:])
	if crc32.Checksum(b[:len(b)-trailerSize], castagnoli) != sum {
		return h, nil, 0, errChecksum
	}
	h = header{
		magic: binary.BigEndian.Uint32(b), flags: b[5], count: int(binary.BigEndian.Uint16(b[6:])),
		number: binary.BigEndian.Uint64(b[8:]), link: binary.BigEndian.Uint64(b[16:]),
		base: int64(binary.BigEndian.Uint64(b[24:])),
	}
	if h.magic != magic || b[4] != blockVersion || h.flags&^flagFinal != 0 || h.flags != 0 && magic != magicQueue {
		return h, nil, 0, errFormat
	}
	return h, body, sum, nil
}

// decodeBlock reads a whole block and appends its records to recs. Strings and
// slices of the records are views of b, which must never change again.
func decodeBlock(b []byte, magic uint32, recs []Record) (header, []Record, uint32, error) {
	h, body, sum, err := parseHeader(b, magic)
	if err != nil {
		return h, recs, 0, err
	}
	d := decoder{b: body, positions: magic != magicFrame, lastTime: h.base}
	for i := range h.count {
		recs = append(recs, Record{})
		r := &recs[len(recs)-1]
		if magic == magicFrame {
			r.Pos = MakePos(h.number, i)
		}
		if !d.record(r) {
			return h, recs[:len(recs)-1], 0, errFormat
		}
	}
	if len(d.b) != 0 || h.count > MaxFrameRecords {
		return h, recs, 0, errFormat
	}
	return h, recs, sum, nil
}

// decoder reads records strictly: what the encoder would not have written is refused.
type decoder struct {
	b         []byte
	positions bool
	lastPos   Pos
	lastTime  int64
	bad       bool
}

func (d *decoder) record(r *Record) bool {
	if d.positions {
		d.position(r)
	}
	bits, kinds := d.byte(), d.byte()
	r.QoS, r.Retain, r.Direct = bits&bitsQoS, bits&bitRetain != 0, bits&bitDirect != 0
	r.Kind, r.From.Kind = Kind(kinds&lowNibble), identity.Kind(kinds>>4)
	r.Time = d.lastTime + d.varint()
	d.lastTime = r.Time
	r.From.Name = d.text(maxNameBytes)
	if bits&bitClientID != 0 {
		r.ClientID = d.text(maxClientID)
		d.bad = d.bad || r.ClientID == ""
	}
	if bits&bitPacketID != 0 {
		r.PacketID = d.uint16()
		d.bad = d.bad || r.PacketID == 0
	}
	if bits&bitExpiry != 0 {
		v := d.uvarint()
		r.HasExpiry, r.Expiry = true, uint32(v)
		d.bad = d.bad || v > math.MaxUint32
	}
	if bits&bitProps != 0 {
		r.Props = d.bytes(maxProps)
		d.bad = d.bad || len(r.Props) == 0
	}
	r.Topic = d.text(identity.MaxTopic)
	r.Payload = d.bytes(maxPayload)
	return !d.bad && r.QoS <= 2 && r.Kind != 0 && uint8(r.Kind) <= highestKind && uint8(r.From.Kind) <= highestFrom
}

func (d *decoder) position(r *Record) {
	step := d.uvarint()
	r.Pos = d.lastPos + Pos(step)
	d.bad = d.bad || step == 0 || r.Pos < d.lastPos
	d.lastPos = r.Pos
}

func (d *decoder) byte() byte {
	if len(d.b) == 0 {
		d.bad = true
		return 0
	}
	c := d.b[0]
	d.b = d.b[1:]
	return c
}

func (d *decoder) uint16() uint16 { return uint16(d.byte())<<8 | uint16(d.byte()) }

// uvarint refuses a spelling longer than needed.
func (d *decoder) uvarint() uint64 {
	if len(d.b) > 0 && d.b[0] < 0x80 {
		c := d.b[0]
		d.b = d.b[1:]
		return uint64(c)
	}
	v, n := binary.Uvarint(d.b)
	if n <= 0 || d.b[n-1] == 0 {
		d.bad = true
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) varint() int64 {
	u := d.uvarint()
	return int64(u>>1) ^ -int64(u&1)
}

func (d *decoder) bytes(limit int) []byte {
	n := d.uvarint()
	if d.bad || n > uint64(limit) || n > uint64(len(d.b)) {
		d.bad = true
		return nil
	}
	s := d.b[:n:n]
	d.b = d.b[n:]
	return s
}

// text is a view: the block is immutable from here on.
func (d *decoder) text(limit int) string {
	s := d.bytes(limit)
	return unsafe.String(unsafe.SliceData(s), len(s))
}

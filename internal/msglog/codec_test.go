package msglog

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"flag"
	"hash/crc32"
	"os"
	"reflect"
	"testing"

	"hawser/internal/identity"
)

var update = flag.Bool("update", false, "write testdata/vectors/frame.json anew")

const vectorFile = "../../testdata/vectors/frame.json"

type vector struct {
	Name    string   `json:"name"`
	Kind    string   `json:"kind"` // frame, queue, chunk, retained
	Number  uint64   `json:"number"`
	Link    uint64   `json:"link"`
	Base    int64    `json:"base"`
	Flags   uint8    `json:"flags"`
	Records []Record `json:"records"`
	Block   string   `json:"block"` // hex
}

var magics = map[string]uint32{"frame": magicFrame, "queue": magicQueue, "chunk": magicChunk, "retained": magicRetained}

func vectors() []vector {
	svc := identity.Principal{Kind: identity.Service, Name: "shop"}
	at := int64(1_800_000_000_000)
	full := Record{
		Pos: MakePos(7, 1), Kind: KindPublish, Time: at + 3, From: svc, ClientID: "c1", Topic: "private/ABCD1234/d/app/x",
		Payload: []byte("hello"), QoS: 2, Retain: true, PacketID: 258, HasExpiry: true, Expiry: 3600, Props: []byte{1, 1},
	}
	plain := Record{Pos: MakePos(7, 0), Kind: KindPublish, Time: at, From: device(1), Topic: "private/A0000001/u/t", Payload: []byte{0xFF, 0}, QoS: 1}
	release := Record{Pos: MakePos(7, 2), Kind: KindRelease, Time: at + 1, From: svc, ClientID: "c1", PacketID: 258}
	command := Record{Pos: MakePos(7, 3), Kind: KindPublish, Time: at + 1, From: identity.TheServer(), Topic: "private/A0000001/d/cmd", Payload: []byte{0xA0}, QoS: 1, Direct: true}
	return []vector{
		{Name: "frame of four records", Kind: "frame", Number: 7, Link: 0x12345678, Base: at, Records: []Record{plain, full, release, command}},
		{Name: "last queue message of frame 7", Kind: "queue", Number: 7, Link: 41, Base: at + 3, Flags: flagFinal, Records: []Record{full}},
		{Name: "mark", Kind: "queue", Number: 7, Flags: flagFinal},
		{Name: "chunk", Kind: "chunk", Number: uint64(MakePos(7, 4)), Link: 12, Base: at, Records: []Record{plain, command}},
		{Name: "retained message", Kind: "retained", Number: 7, Base: at + 3, Records: []Record{full}},
	}
}

func (v *vector) encode() []byte {
	b := make([]byte, headerSize)
	enc := encoder{positions: v.Kind != "frame", lastTime: v.Base}
	for i := range v.Records {
		b = enc.append(b, &v.Records[i])
	}
	b, _ = seal(b, header{magic: magics[v.Kind], flags: v.Flags, count: len(v.Records), number: v.Number, link: v.Link, base: v.Base})
	return b
}

// The stored format must not change under a log that exists.
func TestVectors(t *testing.T) {
	want := vectors()
	for i := range want {
		want[i].Block = hex.EncodeToString(want[i].encode())
	}
	if *update {
		b, err := json.MarshalIndent(want, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(vectorFile, append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(vectorFile)
	if err != nil {
		t.Fatal(err)
	}
	var got []vector
	if err := json.Unmarshal(raw, &got); err != nil {
		t.Fatal(err)
	}
	if len(got) != len(want) {
		t.Fatalf("%d vectors, want %d", len(got), len(want))
	}
	for i, v := range got {
		if v.Block != want[i].Block {
			t.Errorf("%s: encodes as %s, the vector is %s", v.Name, want[i].Block, v.Block)
		}
		block, err := hex.DecodeString(v.Block)
		if err != nil {
			t.Fatal(err)
		}
		h, recs, _, err := decodeBlock(block, magics[v.Kind], nil)
		if err != nil || h.number != v.Number || h.link != v.Link || h.flags != v.Flags || len(recs) != len(v.Records) {
			t.Fatalf("%s: %+v %v", v.Name, h, err)
		}
		for j := range recs {
			if recs[j].Payload = normal(recs[j].Payload); !reflect.DeepEqual(recs[j], v.Records[j]) {
				t.Errorf("%s: record %d is %+v", v.Name, j, recs[j])
			}
		}
	}
}

func normal(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	return b
}

// Every bit of a block counts.
func TestFlippedBit(t *testing.T) {
	for _, v := range vectors() {
		good := v.encode()
		for i := range len(good) * 8 {
			bad := bytes.Clone(good)
			bad[i/8] ^= 1 << (i % 8)
			if _, _, _, err := decodeBlock(bad, magics[v.Kind], nil); err == nil {
				t.Fatalf("%s: bit %d flipped and nobody noticed", v.Name, i)
			}
		}
		for n := range good {
			if _, _, _, err := decodeBlock(good[:n], magics[v.Kind], nil); err == nil {
				t.Fatalf("%s: cut to %d bytes and nobody noticed", v.Name, n)
			}
		}
	}
}

// There is one spelling of every block.
func TestStrict(t *testing.T) {
	start := &Record{Kind: KindStart, From: identity.TheServer()}
	enc := encoder{}
	body := enc.append(nil, start) // bits, kinds, time 0, name, topic 0, payload 0
	for name, bad := range map[string][]byte{
		"a byte too many":       append(bytes.Clone(body), 0),
		"a long number":         append(bytes.Clone(body[:len(body)-1]), 0x80, 0),
		"unknown kind":          append([]byte{0, 0x3F}, body[2:]...),
		"unknown principal":     append([]byte{0, 0x43}, body[2:]...),
		"qos 3":                 append([]byte{3, body[1]}, body[2:]...),
		"client id of no bytes": append(append([]byte{bitClientID, body[1]}, body[2:len(body)-2]...), 0, 0, 0),
		"properties of none":    append(append([]byte{bitProps, body[1]}, body[2:len(body)-2]...), 0, 0, 0),
		"packet id 0":           append(append([]byte{bitPacketID, body[1]}, body[2:len(body)-2]...), 0, 0, 0, 0),
		"expiry of 33 bits":     append(append([]byte{bitExpiry, body[1]}, body[2:len(body)-2]...), 0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 0, 0),
		"length past the end":   append(bytes.Clone(body[:len(body)-1]), 9),
	} {
		block, _ := seal(append(make([]byte, headerSize), bad...), header{magic: magicFrame, count: 1, number: 1})
		if _, _, _, err := decodeBlock(block, magicFrame, nil); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	block, _ := seal(append(make([]byte, headerSize), body...), header{magic: magicFrame, count: 1, number: 1, flags: flagFinal})
	if _, _, _, err := decodeBlock(block, magicFrame, nil); err == nil {
		t.Error("a flag where there is none: taken")
	}
	block, _ = seal(append(append(make([]byte, headerSize), 0), body...), header{magic: magicQueue, count: 1, number: 1})
	if _, _, _, err := decodeBlock(block, magicQueue, nil); err == nil {
		t.Error("a position that does not rise: taken")
	}
}

// FuzzDecode gives the decoder blocks with a good checksum: what it takes, the
// encoder must give back byte by byte.
func FuzzDecode(f *testing.F) {
	for _, v := range vectors() {
		b := v.encode()
		f.Add(b[:len(b)-trailerSize])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		block := binary.BigEndian.AppendUint32(bytes.Clone(b), crc32.Checksum(b, castagnoli))
		for _, magic := range magics {
			h, recs, _, err := decodeBlock(block, magic, nil)
			if err != nil {
				continue
			}
			out := make([]byte, headerSize)
			enc := encoder{positions: magic != magicFrame, lastTime: h.base}
			for i := range recs {
				out = enc.append(out, &recs[i])
			}
			if out, _ = seal(out, h); !bytes.Equal(out, block) {
				t.Fatalf("%x decodes, and encodes as %x", block, out)
			}
		}
	})
}

package factory

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"hash/crc32"
	"math/big"
	"os"
	"strings"
	"testing"

	"hawser/internal/identity"
)

const identityVectors = "../../testdata/vectors/identity.json"

type identityVector struct {
	Name   string `json:"name"`
	Valid  bool   `json:"valid"`
	Block  string `json:"block"`
	ID     string `json:"id,omitempty"`
	Flags  uint8  `json:"flags,omitempty"`
	Scalar string `json:"scalar,omitempty"`
}

type identityFile struct {
	Comment string           `json:"comment"`
	Cases   []identityVector `json:"cases"`
}

// scalars are the ends of the range and one in the middle with a leading zero byte.
func scalars() map[string][]byte {
	n, _ := new(big.Int).SetString("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551", 16)
	one := new(big.Int).SetInt64(1)
	return map[string][]byte{
		"smallest": one.FillBytes(make([]byte, 32)), "largest": new(big.Int).Sub(n, one).FillBytes(make([]byte, 32)),
		"padded": append([]byte{0}, bytes.Repeat([]byte{0x5a}, 31)...), "order": n.FillBytes(make([]byte, 32)),
		"order and one": new(big.Int).Add(n, one).FillBytes(make([]byte, 32)), "zero": make([]byte, 32), "ones": bytes.Repeat([]byte{0xff}, 32),
		"a high word below": append(append([]byte{0xff, 0xff, 0xff, 0xfe}, bytes.Repeat([]byte{0xff}, 28)...), nil...),
	}
}

func makeIdentityVectors(t *testing.T) identityFile {
	t.Helper()
	f := identityFile{Comment: "identity blocks: PROTOCOL.md; made by go test ./internal/factory -update"}
	s := scalars()
	good := func(name string, id identity.ID, scalar []byte, flags uint8) []byte {
		b, err := EncodeIdentity(id, scalar, flags)
		must(t, b, err)
		f.Cases = append(f.Cases, identityVector{name, true, hex.EncodeToString(b[:]), id.String(), flags, hex.EncodeToString(scalar)})
		return b[:]
	}
	block := good("padded with a zero byte", 0xABCD1234, s["padded"], 0)
	good("smallest key", 1, s["smallest"], 0)
	good("largest key", 0xFFFFFFFE, s["largest"], 0x81)
	bend := func(name string, at int, with ...byte) {
		b := bytes.Clone(block)
		copy(b[at:], with)
		binary.LittleEndian.PutUint32(b[124:], crc32.ChecksumIEEE(b[:124]))
		f.Cases = append(f.Cases, identityVector{Name: name, Block: hex.EncodeToString(b)})
	}
	raw := func(name string, b []byte) {
		f.Cases = append(f.Cases, identityVector{Name: name, Block: hex.EncodeToString(b)})
	}
	bend("another magic", 0, []byte("HWSX")...)
	bend("version 2", 4, 2)
	bend("reserved bytes not 0", 6, 1)
	bend("erased id", 8, 0xff, 0xff, 0xff, 0xff)
	bend("id 0", 8, 0, 0, 0, 0)
	bend("key 0", 12, s["zero"]...)
	bend("key equal to the order", 12, s["order"]...)
	bend("key above the order", 12, s["ones"]...)
	bend("reserved byte written", 44, 0)
	bend("last reserved byte written", 123, 0xfe)
	flipped := bytes.Clone(block)
	flipped[20] ^= 1
	raw("one bit of the key", flipped)
	flipped = bytes.Clone(block)
	flipped[124] ^= 1
	raw("one bit of the checksum", flipped)
	big := bytes.Clone(block)
	binary.BigEndian.PutUint32(big[124:], crc32.ChecksumIEEE(big[:124]))
	raw("checksum in the other order", big)
	raw("cut short", block[:127])
	raw("a byte too many", append(bytes.Clone(block), 0xff))
	raw("erased flash", bytes.Repeat([]byte{0xff}, 128))
	raw("blank flash", make([]byte, 128))
	return f
}

// The shared vectors: what a device and a bench accept and what they refuse.
func TestIdentityVectors(t *testing.T) {
	want := makeIdentityVectors(t)
	var f identityFile
	vectorFile(t, identityVectors, want, &f)
	if len(f.Cases) != len(want.Cases) {
		t.Fatalf("%d cases: the file is older than the test", len(f.Cases))
	}
	for i, c := range f.Cases {
		if c != want.Cases[i] {
			t.Errorf("%s: the file says %+v", c.Name, c)
		}
		b, err := hex.DecodeString(c.Block)
		must(t, b, err)
		v, err := ParseIdentity(b)
		if (err == nil) != c.Valid || err != nil && !errors.Is(err, ErrIdentity) {
			t.Errorf("%s: %v", c.Name, err)
			continue
		}
		if c.Valid && (v.ID.String() != c.ID || v.Flags != c.Flags || hex.EncodeToString(v.Scalar) != c.Scalar) {
			t.Errorf("%s: %+v", c.Name, v)
		}
	}
}

// vectorFile writes what the test makes, if asked to, and reads what stands in the tree.
func vectorFile(t *testing.T, path string, made, into any) {
	t.Helper()
	if *update {
		b, err := json.MarshalIndent(made, "", "  ")
		must(t, b, err)
		if err := os.WriteFile(path, append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := json.Unmarshal(read(t, path), into); err != nil {
		t.Fatal(err)
	}
}

// The layout, spelled out once more by hand.
func TestIdentityLayout(t *testing.T) {
	scalar := scalars()["padded"]
	b, err := EncodeIdentity(0xABCD1234, scalar, 9)
	must(t, b, err)
	want := append([]byte("HWSR\x01\x09\x00\x00\x34\x12\xcd\xab"), scalar...)
	want = append(want, bytes.Repeat([]byte{0xff}, 80)...)
	want = binary.LittleEndian.AppendUint32(want, crc32.ChecksumIEEE(want))
	if !bytes.Equal(b[:], want) {
		t.Errorf("got  %x\nwant %x", b, want)
	}
}

func TestScalarRange(t *testing.T) {
	for name, ok := range map[string]bool{"smallest": true, "largest": true, "padded": true, "a high word below": true,
		"order": false, "order and one": false, "zero": false, "ones": false} {
		dst := [IdentitySize]byte{}
		err := PutIdentity(&dst, 1, scalars()[name], 0)
		if (err == nil) != ok {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && dst != [IdentitySize]byte{} {
			t.Errorf("%s: something was written", name)
		}
	}
	for _, n := range []int{0, 31, 33} {
		if _, err := EncodeIdentity(1, make([]byte, n), 0); err == nil {
			t.Errorf("%d bytes were taken for a key", n)
		}
	}
	for _, id := range []identity.ID{0, 0xFFFFFFFF} {
		if _, err := EncodeIdentity(id, scalars()["padded"], 0); !errors.Is(err, identity.ErrID) {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// An error text never holds a byte of the key.
func TestIdentityErrorsHoldNoKey(t *testing.T) {
	scalar := bytes.Repeat([]byte{0xff}, 32)
	_, err := EncodeIdentity(1, scalar, 0)
	if err == nil || strings.Contains(strings.ToLower(err.Error()), "ffff") {
		t.Error(err)
	}
}

func FuzzParseIdentity(f *testing.F) {
	b, err := EncodeIdentity(0xABCD1234, scalars()["padded"], 0)
	must(f, b, err)
	f.Add(b[:])
	f.Add(bytes.Repeat([]byte{0xff}, 128))
	f.Fuzz(func(t *testing.T, data []byte) {
		v, err := ParseIdentity(data)
		if err != nil {
			return
		}
		if again, err := EncodeIdentity(v.ID, v.Scalar, v.Flags); err != nil || !bytes.Equal(again[:], data) {
			t.Errorf("two spellings of one block: %v", err)
		}
	})
}

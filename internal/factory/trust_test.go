package factory

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash/crc32"
	"testing"
)

const trustVectors = "../../testdata/vectors/trust.json"

type trustEntry struct {
	Tag   uint8  `json:"tag"`
	Value string `json:"value"`
}

type trustVector struct {
	Name    string       `json:"name"`
	Valid   bool         `json:"valid"`
	Region  string       `json:"region"`
	Size    int          `json:"size,omitempty"` // bytes of the region itself
	Entries []trustEntry `json:"entries,omitempty"`
}

type trustFile struct {
	Comment string        `json:"comment"`
	Cases   []trustVector `json:"cases"`
}

// sealed puts the end and the checksum behind a body.
func sealed(body ...byte) []byte {
	body = append(body, 0)
	return binary.LittleEndian.AppendUint32(body, crc32.ChecksumIEEE(body))
}

func body(s string) []byte { return append([]byte("HWTR\x01"), s...) }

func makeTrustVectors(t *testing.T) trustFile {
	t.Helper()
	f := trustFile{Comment: "trust regions: PROTOCOL.md; made by go test ./internal/factory -update"}
	good := func(name string, after []byte, entries ...Entry) {
		b, err := EncodeTrust(entries)
		must(t, b, err)
		v := trustVector{Name: name, Valid: true, Region: hex.EncodeToString(append(bytes.Clone(b), after...)), Size: len(b)}
		for _, e := range entries {
			v.Entries = append(v.Entries, trustEntry{e.Tag, hex.EncodeToString(e.Value)})
		}
		f.Cases = append(f.Cases, v)
	}
	cert, set := []byte{0x30, 3, 2, 1, 5}, []byte{0xd2, 0x84, 0x43}
	good("certificate and anchor set", nil, Entry{TagCertificate, cert}, Entry{TagAnchors, set})
	good("in a page of erased flash", bytes.Repeat([]byte{0xff}, 32), Entry{TagCertificate, cert}, Entry{TagAnchors, set})
	good("an entry of a later version", nil, Entry{TagCertificate, cert}, Entry{TagAnchors, set}, Entry{200, []byte{1}})
	good("a value of 300 bytes", nil, Entry{TagCertificate, bytes.Repeat([]byte{0x30}, 300)})
	good("nothing", nil)
	bad := func(name string, b []byte) {
		f.Cases = append(f.Cases, trustVector{Name: name, Region: hex.EncodeToString(b)})
	}
	whole := sealed(body("\x01\x02\x00ab")...)
	flipped := bytes.Clone(whole)
	flipped[8] ^= 1
	bad("one bit of a value", flipped)
	bad("another magic", sealed([]byte("HWTX\x01")...))
	bad("version 2", sealed([]byte("HWTR\x02")...))
	bad("a tag twice", sealed(body("\x01\x01\x00a\x01\x01\x00b")...))
	bad("tags that do not ascend", sealed(body("\x02\x01\x00a\x01\x01\x00b")...))
	bad("an empty value", sealed(body("\x01\x00\x00")...))
	bad("a length beyond the end", sealed(body("\x01\xff\xffab")...))
	bad("length in the other order", sealed(body("\x01\x00\x02ab")...))
	bad("no end", body("\x01\x02\x00ab"))
	bad("cut off in the checksum", whole[:len(whole)-1])
	bad("cut off in an entry", whole[:7])
	bad("cut off in the head", whole[:4])
	bad("erased flash", bytes.Repeat([]byte{0xff}, 64))
	return f
}

// The shared vectors: what a device and a bench accept and what they refuse.
func TestTrustVectors(t *testing.T) {
	want := makeTrustVectors(t)
	var f trustFile
	vectorFile(t, trustVectors, want, &f)
	if len(f.Cases) != len(want.Cases) {
		t.Fatalf("%d cases: the file is older than the test", len(f.Cases))
	}
	for i, c := range f.Cases {
		if c.Region != want.Cases[i].Region || c.Valid != want.Cases[i].Valid {
			t.Errorf("%s: the file says %+v", c.Name, c)
		}
		b, err := hex.DecodeString(c.Region)
		must(t, b, err)
		entries, size, err := ParseTrust(b)
		if (err == nil) != c.Valid || err != nil && !errors.Is(err, ErrTrust) {
			t.Errorf("%s: %v", c.Name, err)
			continue
		}
		if size != c.Size || len(entries) != len(c.Entries) {
			t.Errorf("%s: %d bytes, %d entries", c.Name, size, len(entries))
			continue
		}
		for i, e := range entries {
			if (trustEntry{e.Tag, hex.EncodeToString(e.Value)}) != c.Entries[i] {
				t.Errorf("%s: entry %d is %+v", c.Name, i, e)
			}
		}
	}
}

func TestEncodeTrustRefuses(t *testing.T) {
	for name, entries := range map[string][]Entry{
		"tag 0": {{0, []byte("a")}}, "a tag twice": {{1, []byte("a")}, {1, []byte("b")}}, "descending": {{2, []byte("a")}, {1, []byte("b")}},
		"no value": {{1, nil}}, "a huge value": {{1, make([]byte, 70000)}}, "too much": {{1, make([]byte, MaxTrust-10)}, {2, make([]byte, 10)}},
	} {
		if _, err := EncodeTrust(entries); err == nil {
			t.Errorf("%s was encoded", name)
		}
	}
	if b, err := EncodeTrust([]Entry{{1, make([]byte, MaxTrust-13)}}); err != nil || len(b) != MaxTrust {
		t.Errorf("the largest has %d bytes: %v", len(b), err)
	}
	if Value([]Entry{{1, []byte("a")}, {2, []byte("b")}}, TagAnchors)[0] != 'b' || Value(nil, 1) != nil {
		t.Error("the wrong value")
	}
}

func FuzzParseTrust(f *testing.F) {
	f.Add(sealed(body("\x01\x02\x00ab\x02\x01\x00c")...))
	f.Add(sealed(body("\x01\xff\xffab")...))
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, size, err := ParseTrust(data)
		if err != nil {
			return
		}
		if again, err := EncodeTrust(entries); err != nil || !bytes.Equal(again, data[:size]) {
			t.Errorf("two spellings of one region: %v", err)
		}
	})
}

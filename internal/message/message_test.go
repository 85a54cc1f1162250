package message

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
)

const vectorFile = "../../testdata/vectors/messages.json"

var update = flag.Bool("update", false, "write the vectors anew from the samples")

// vector is one entry of the file that C reads too.
type vector struct {
	Kind string          `json:"kind"`
	Note string          `json:"note"`
	CBOR string          `json:"cbor"` // hex
	JSON json.RawMessage `json:"json"`
}

type encoder interface{ Encode(Encoding) []byte }

func decode(kind string, payload []byte) (m encoder, err error) {
	switch kind {
	case "hello":
		return DecodeHello(payload)
	case "time":
		return DecodeTime(payload)
	case "command":
		return DecodeCommand(payload)
	case "answer":
		return DecodeAnswer(payload)
	case "config":
		return DecodeConfig(payload)
	case "report":
		return DecodeConfigReport(payload)
	case "pki":
		return DecodePKI(payload)
	case "pki-report":
		return DecodePKIReport(payload)
	}
	return nil, fmt.Errorf("no message %q", kind)
}

func kinds() []string {
	return []string{"hello", "time", "command", "answer", "config", "report", "pki", "pki-report"}
}

func value(t testing.TB, js string) Value {
	t.Helper()
	v, err := ValueFromJSON([]byte(js))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func repeated(b byte) (p [32]byte) {
	copy(p[:], bytes.Repeat([]byte{b}, len(p)))
	return p
}

type sample struct {
	kind, note string
	message    encoder
}

func samples(t testing.TB) []sample {
	return []sample{
		{"hello", "what a sensor says after its first connect", Hello{Class: "sensor", Firmware: "1.4.2", Image: bytes.Repeat([]byte{0xA5}, 32),
			TLS: "mbedTLS 3.6.7", Boot: "power-on", Nonce: 0xFEDCBA9876543210, Features: []string{"ota", "cfg"}}},
		{"hello", "nothing known, nothing supported", Hello{Image: []byte{}, Features: []string{}}},
		{"time", "", Time{Seconds: 1790000000, Millis: 250}},
		{"time", "the first second of 1970", Time{}},
		{"command", "epoch 1, counter 7, with args", Command{CID: 1<<32 | 7, Expiry: 1790003600, Name: "relay", Args: value(t, `{"on":true,"channel":2}`)}},
		{"command", "never expires, no args", Command{CID: 1, Name: "reboot"}},
		{"answer", "done, with a result", Answer{CID: 1<<32 | 7, Result: value(t, `{"t":21.5,"n":-3}`)}},
		{"answer", "failed, with a text", Answer{CID: 9, Status: Failed, Result: value(t, `"no such relay"`)}},
		{"answer", "not higher than one before", Answer{CID: 18446744073709551615, Status: Duplicate}},
		{"answer", "too late", Answer{CID: 10, Status: Expired}},
		{"answer", "no handler", Answer{CID: 11, Status: UnknownCommand}},
		{"config", "", Config{Version: 3, Document: value(t, `{"interval":60,"name":"wohnküche","limits":[1,2.5,null]}`)}},
		{"report", "", ConfigReport{Version: 3}},
		{"report", "", ConfigReport{Version: 4, Status: Refused, Text: "interval below 5"}},
		{"pki", "a certificate alone (three bytes stand for the DER)", PKI{No: 1, Certificate: []byte{0x30, 1, 2}}},
		{"pki", "an anchor set alone", PKI{No: 18446744073709551615, Anchors: []byte{0xD2, 0x84, 3}}},
		{"pki", "both", PKI{No: 1 << 32, Certificate: []byte{0x30, 1, 2}, Anchors: []byte{0xD2, 0x84, 3}}},
		{"pki-report", "stored beside the old, not proven yet", PKIReport{No: 1 << 32, Fingerprint: repeated(0xA5), Anchors: 1, Pending: 2}},
		{"pki-report", "first connection of a process: no answer to an offer", PKIReport{State: PKIInUse, Fingerprint: repeated(0x5A), Anchors: 2}},
		{"pki-report", "not taken", PKIReport{No: 7, State: PKIRefused, Fingerprint: repeated(0), Text: "the certificate is for another key"}},
	}
}

func TestVectors(t *testing.T) {
	if *update {
		writeVectors(t)
	}
	data, err := os.ReadFile(vectorFile)
	if err != nil {
		t.Fatal(err)
	}
	var vectors []vector
	if err := json.Unmarshal(data, &vectors); err != nil {
		t.Fatal(err)
	}
	want := samples(t)
	if len(vectors) != len(want) {
		t.Fatalf("%d vectors, %d samples", len(vectors), len(want))
	}
	for i, v := range vectors {
		bin, err := hex.DecodeString(v.CBOR)
		if err != nil {
			t.Fatal(err)
		}
		var js bytes.Buffer
		if err := json.Compact(&js, v.JSON); err != nil {
			t.Fatal(err)
		}
		for _, payload := range [][]byte{bin, js.Bytes()} {
			got, err := decode(v.Kind, payload)
			if err != nil || !reflect.DeepEqual(got, want[i].message) {
				t.Errorf("vector %d: %+v, %v; want %+v", i, got, err, want[i].message)
			}
		}
		if got := want[i].message.Encode(CBOR); !bytes.Equal(got, bin) {
			t.Errorf("vector %d: CBOR is %x", i, got)
		}
		if got := want[i].message.Encode(JSON); !bytes.Equal(got, js.Bytes()) {
			t.Errorf("vector %d: JSON is %s", i, got)
		}
	}
}

func writeVectors(t *testing.T) {
	t.Helper()
	var b bytes.Buffer
	b.WriteString("[\n")
	for i, s := range samples(t) {
		if i > 0 {
			b.WriteString(",\n")
		}
		fmt.Fprintf(&b, "{\"kind\": %q, \"note\": %q,\n \"cbor\": \"%x\",\n \"json\": %s}",
			s.kind, s.note, s.message.Encode(CBOR), s.message.Encode(JSON))
	}
	b.WriteString("\n]\n")
	if err := os.WriteFile(vectorFile, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestRefused(t *testing.T) {
	deep := strings.Repeat("[", MaxDepth+1) + strings.Repeat("]", MaxDepth+1)
	cases := []struct{ name, kind, payload string }{
		{"empty", "time", ""},
		{"array", "time", "\x82\x01\x02"},
		{"leading space", "time", ` {"time":"1","ms":2}`},
		{"cbor trailing byte", "time", "\xA2\x01\x01\x02\x02\x00"},
		{"json trailing value", "time", `{"time":"1","ms":2}{}`},
		{"cbor duplicate key", "time", "\xA3\x01\x01\x02\x02\x01\x03"},
		{"cbor duplicate unknown key", "time", "\xA4\x01\x01\x02\x02\x18\x63\x03\x18\x63\x03"},
		{"json duplicate key", "time", `{"time":"1","ms":2,"ms":3}`},
		{"json duplicate unknown key", "time", `{"time":"1","ms":2,"x":3,"x":3}`},
		{"missing key", "time", "\xA1\x01\x01"},
		{"missing name", "time", `{"time":"1"}`},
		{"name in other case", "time", `{"Time":"1","ms":2}`},
		{"ms beyond 999", "time", "\xA2\x01\x01\x02\x19\x03\xE8"},
		{"negative", "time", "\xA2\x01\x20\x02\x00"},
		{"json fraction", "time", `{"time":1.5,"ms":2}`},
		{"json beyond 64 bits", "time", `{"time":"18446744073709551616","ms":2}`},
		{"cbor text for a number", "time", "\xA2\x01\x611\x02\x00"},
		{"indefinite map", "time", "\xBF\x01\x01\x02\x02\xFF"},
		{"truncated", "time", "\xA2\x01\x01\x02"},
		{"tag", "config", "\xA2\x01\x01\x02\xC1\x01"},
		{"cid 0", "command", `{"cid":"0","expiry":"0","name":"x"}`},
		{"no command name", "command", `{"cid":"1","expiry":"0","name":""}`},
		{"control character", "command", `{"cid":"1","expiry":"0","name":"x\u001b[2J"}`},
		{"long name", "command", `{"cid":"1","expiry":"0","name":"` + strings.Repeat("x", MaxText+1) + `"}`},
		{"args too deep", "command", `{"cid":"1","expiry":"0","name":"x","args":` + deep + `}`},
		{"duplicate key in args", "command", "\xA4\x01\x01\x02\x00\x03\x61x\x04\xA2\x01\x01\x01\x01"},
		{"args beyond 64 bits", "command", `{"cid":"1","expiry":"0","name":"x","args":18446744073709551616}`},
		{"not UTF-8 in cbor", "command", "\xA3\x01\x01\x02\x00\x03\x61\xFF"},
		{"not UTF-8 in json", "command", "{\"cid\":\"1\",\"expiry\":\"0\",\"name\":\"\xFF\"}"},
		{"unknown status", "answer", "\xA2\x01\x01\x02\x05"},
		{"unknown status name", "answer", `{"cid":"1","status":"great"}`},
		{"image not hex", "hello", `{"class":"","firmware":"","image":"xx","tls":"","boot":"","nonce":"1","features":[]}`},
		{"feature not text", "hello", `{"class":"","firmware":"","image":"","tls":"","boot":"","nonce":"1","features":[1]}`},
		{"too many features", "hello", `{"class":"","firmware":"","image":"","tls":"","boot":"","nonce":"1","features":[` + strings.Repeat(`"",`, MaxFeatures) + `""]}`},
		{"no document", "config", `{"version":"1"}`},
		{"offer 0", "pki", `{"no":"0","certificate":"30"}`},
		{"offer of nothing", "pki", "\xA1\x01\x01"},
		{"empty certificate", "pki", "\xA2\x01\x01\x02\x40"},
		{"empty certificate beside a set", "pki", `{"no":"1","certificate":"","anchors":"d2"}`},
		{"certificate too long", "pki", `{"no":"1","certificate":"` + strings.Repeat("30", MaxCertificate+1) + `"}`},
		{"anchor set too long", "pki", `{"no":"1","anchors":"` + strings.Repeat("d2", MaxAnchors+1) + `"}`},
		{"anchor set as a text", "pki", "\xA2\x01\x01\x03\x61x"},
		{"short fingerprint", "pki-report", "\xA5\x01\x00\x02\x00\x03\x41\xA5\x04\x00\x05\x00"},
		{"long fingerprint", "pki-report", `{"no":"0","state":"in-use","fingerprint":"` + strings.Repeat("a5", 33) + `","anchors":"0","pending":"0"}`},
		{"unknown state", "pki-report", "\xA5\x01\x00\x02\x03\x03\x58\x20" + strings.Repeat("x", 32) + "\x04\x00\x05\x00"},
		{"no state", "pki-report", "\xA4\x01\x00\x03\x58\x20" + strings.Repeat("x", 32) + "\x04\x00\x05\x00"},
		{"too large", "config", `{"version":"1","document":"` + strings.Repeat("x", MaxSize) + `"}`},
		{"grows too large", "config", `{"version":"1","document":[` + strings.Repeat("1.5,", 20000) + `0]}`},
	}
	for _, c := range cases {
		if m, err := decode(c.kind, []byte(c.payload)); !errors.Is(err, ErrMessage) {
			t.Errorf("%s: %+v, %v", c.name, m, err)
		}
	}
}

func TestUnknownKeysAreIgnored(t *testing.T) {
	want := Time{Seconds: 1, Millis: 2}
	for _, p := range []string{"\xA4\x01\x01\x02\x02\x18\x63\x81\x01\x61x\x00", `{"time":"1","new":{"a":[1]},"ms":2}`} {
		if m, err := DecodeTime([]byte(p)); err != nil || m != want {
			t.Errorf("%q: %+v, %v", p, m, err)
		}
	}
}

func TestNumbersAreUnderstoodInJSON(t *testing.T) {
	m, err := DecodeCommand([]byte(`{"cid":18446744073709551615,"expiry":0,"name":"x"}`))
	if err != nil || m.CID != 1<<64-1 {
		t.Fatalf("%+v, %v", m, err)
	}
}

func TestDeepestValueTravels(t *testing.T) {
	v := value(t, strings.Repeat("[", MaxDepth)+strings.Repeat("]", MaxDepth))
	for _, enc := range []Encoding{CBOR, JSON} {
		m, err := DecodeConfig(Config{Version: 1, Document: v}.Encode(enc))
		if err != nil || !bytes.Equal(m.Document, v) {
			t.Errorf("encoding %d: %v", enc, err)
		}
	}
}

func TestValueJSON(t *testing.T) {
	for _, s := range []string{"null", "true", "false", "0", "-1", "-9007199254740992", "9007199254740992", "1.5", `"a\"b"`, "[]", "{}", `{"a":[1,{"b":null}]}`} {
		if got := string(value(t, s).JSON()); got != s {
			t.Errorf("%s became %s", s, got)
		}
	}
	shown := []struct{ cbor, json string }{
		{"\x42\xAB\xCD", `"abcd"`},
		{"\x1B\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF", `"18446744073709551615"`},
		{"\x3B\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF", `"-18446744073709551616"`},
		{"\xF9\x7E\x00", "null"},
		{"\xF7", "null"},
		{"\xA2\x01\x02\x61\x31\x03", `{"1":3,"(1)":2}`},
		{"\xA1\x41\xAB\x03", `{"\"ab\"":3}`},
	}
	for _, c := range shown {
		v, err := ParseValue([]byte(c.cbor))
		if err != nil || string(v.JSON()) != c.json {
			t.Errorf("%x: %s, %v; want %s", c.cbor, v.JSON(), err, c.json)
		}
	}
	if got := string(Value(nil).JSON()); got != "null" {
		t.Errorf("nil shows as %s", got)
	}
}

func TestValueOfAndUnmarshal(t *testing.T) {
	type reading struct {
		T float64 `cbor:"t"`
		N []int   `cbor:"n"`
	}
	in := reading{21.5, []int{1, 2}}
	v, err := ValueOf(in)
	if err != nil {
		t.Fatal(err)
	}
	var out reading
	if err := v.Unmarshal(&out); err != nil || !reflect.DeepEqual(in, out) {
		t.Fatalf("%+v, %v", out, err)
	}
	if _, err := ValueOf(make(chan int)); !errors.Is(err, ErrMessage) {
		t.Fatalf("a channel: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	for _, s := range samples(f) {
		f.Add(s.message.Encode(CBOR))
		f.Add(s.message.Encode(JSON))
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		for _, kind := range kinds() {
			m, err := decode(kind, payload)
			if err != nil {
				if !errors.Is(err, ErrMessage) {
					t.Fatalf("%s: %v is no ErrMessage", kind, err)
				}
				continue
			}
			again, err := decode(kind, m.Encode(CBOR))
			if err != nil || !reflect.DeepEqual(again, m) {
				t.Fatalf("%s: %+v came back as %+v, %v", kind, m, again, err)
			}
			if js := m.Encode(JSON); !json.Valid(js) {
				t.Fatalf("%s: %s is not JSON", kind, js)
			}
		}
	})
}

func FuzzValue(f *testing.F) {
	f.Add([]byte("\xA1\x01\x02"))
	f.Add([]byte(`{"a":[1,2.5,-3,null,true,"x"]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if v, err := ParseValue(b); err == nil && !json.Valid(v.JSON()) {
			t.Fatalf("%x shows as %s", b, v.JSON())
		}
		v, err := ValueFromJSON(b)
		if err != nil {
			return
		}
		again, err := ValueFromJSON(v.JSON())
		if err != nil || !json.Valid(again.JSON()) {
			t.Fatalf("%q: %s, %v", b, v.JSON(), err)
		}
		if _, err := ParseValue(v); err != nil {
			t.Fatalf("%q gave the CBOR %x: %v", b, []byte(v), err)
		}
	})
}

func BenchmarkDecodeCommand(b *testing.B) {
	p := Command{CID: 1<<32 | 7, Expiry: 1790003600, Name: "relay", Args: value(b, `{"on":true}`)}.Encode(CBOR)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := DecodeCommand(p); err != nil {
			b.Fatal(err)
		}
	}
}

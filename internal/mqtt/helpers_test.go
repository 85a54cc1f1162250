package mqtt

import (
	"encoding/hex"
	"reflect"
	"strings"
	"testing"
)

// packet is what every packet type can do.
type packet interface {
	Decode(v Version, flags byte, body []byte) error
	Append(dst []byte, v Version) []byte
}

// atClient decodes what a server sends, for the two packets where it matters.
type atClient struct{ packet }

func (c atClient) Decode(v Version, flags byte, body []byte) error {
	switch p := c.packet.(type) {
	case *Publish:
		return p.DecodeAtClient(v, flags, body)
	case *Disconnect:
		return p.DecodeAtClient(v, flags, body)
	}
	return c.packet.Decode(v, flags, body)
}

func newPacket(t Type) packet {
	switch t {
	case CONNECT:
		return &Connect{}
	case CONNACK:
		return &Connack{}
	case PUBLISH:
		return &Publish{}
	case PUBACK, PUBREC, PUBREL, PUBCOMP:
		return &Ack{Type: t}
	case SUBSCRIBE:
		return &Subscribe{}
	case SUBACK:
		return &Suback{}
	case UNSUBSCRIBE:
		return &Unsubscribe{}
	case UNSUBACK:
		return &Unsuback{}
	case DISCONNECT:
		return &Disconnect{}
	case AUTH:
		return &Auth{}
	}
	return &Ping{Type: t}
}

// unhex reads hex with spaces and 'text' in it: "00 04 'MQTT' 05".
func unhex(t testing.TB, s string) (out []byte) {
	t.Helper()
	for i, part := range strings.Split(s, "'") {
		if i%2 == 1 {
			out = append(out, part...)
			continue
		}
		b, err := hex.DecodeString(strings.ReplaceAll(part, " ", ""))
		if err != nil {
			t.Fatalf("%q: %v", part, err)
		}
		out = append(out, b...)
	}
	return out
}

// same is DeepEqual, but takes a nil slice for an empty one.
func same(a, b any) bool { return sameValue(reflect.ValueOf(a), reflect.ValueOf(b)) }

func sameValue(a, b reflect.Value) bool {
	if a.Kind() != b.Kind() {
		return false
	}
	switch a.Kind() {
	case reflect.Pointer, reflect.Interface:
		if a.IsNil() || b.IsNil() {
			return a.IsNil() == b.IsNil()
		}
		return sameValue(a.Elem(), b.Elem())
	case reflect.Slice:
		if a.Len() != b.Len() {
			return false
		}
		for i := range a.Len() {
			if !sameValue(a.Index(i), b.Index(i)) {
				return false
			}
		}
		return true
	case reflect.Struct:
		for i := range a.NumField() {
			if a.Type().Field(i).Name != "Scratch" && !sameValue(a.Field(i), b.Field(i)) {
				return false
			}
		}
		return true
	}
	return a.Equal(b)
}

// roundTrip encodes p, which has been decoded, and demands to decode the same again.
func roundTrip(t testing.TB, v Version, p, again packet) {
	t.Helper()
	wire := p.Append([]byte("before"), v)[len("before"):]
	h, n, err := ParseHeader(wire)
	if err != nil || n == 0 || n+h.Remaining != len(wire) {
		t.Fatalf("%+v: header of %x: %+v %d %v", p, wire, h, n, err)
	}
	if err := again.Decode(v, h.Flags, wire[n:]); err != nil {
		t.Fatalf("%+v: its encoding %x is refused: %v", p, wire, err)
	}
	if !same(p, again) {
		t.Fatalf("%+v came back as %+v", p, again)
	}
	if pub, ok := p.(*Publish); ok && PublishSize(v, pub) != len(wire) {
		t.Fatalf("%+v: PublishSize %d, packet %d", pub, PublishSize(v, pub), len(wire))
	}
}

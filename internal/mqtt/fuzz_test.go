package mqtt

import (
	"errors"
	"testing"
)

// fuzzDecode is the body of every fuzz target: what Decode accepts must come back the same
// from its own encoding, and what it refuses must be refused with an *Error.
func fuzzDecode(f *testing.F, types ...Type) {
	for i := range types {
		f.Add(byte(V5), byte(i), byte(0), []byte{0, 1})
	}
	f.Fuzz(func(t *testing.T, level, which, flags byte, body []byte) {
		v := V311
		if level%2 == 1 {
			v = V5
		}
		typ := types[int(which)%len(types)]
		for _, client := range []bool{false, true} {
			p, again := newPacket(typ), newPacket(typ)
			if client {
				p, again = atClient{p}, atClient{again}
			}
			err := p.Decode(v, flags&15, body)
			if err == nil {
				roundTrip(t, v, p, again)
				continue
			}
			if e := (*Error)(nil); !errors.As(err, &e) || !e.Code.Failed() || e.Code.failure() == "" {
				t.Fatalf("refused with %v", err)
			}
		}
	})
}

func FuzzConnect(f *testing.F)     { fuzzDecode(f, CONNECT) }
func FuzzConnack(f *testing.F)     { fuzzDecode(f, CONNACK) }
func FuzzPublish(f *testing.F)     { fuzzDecode(f, PUBLISH) }
func FuzzAck(f *testing.F)         { fuzzDecode(f, PUBACK, PUBREC, PUBREL, PUBCOMP) }
func FuzzSubscribe(f *testing.F)   { fuzzDecode(f, SUBSCRIBE) }
func FuzzSuback(f *testing.F)      { fuzzDecode(f, SUBACK) }
func FuzzUnsubscribe(f *testing.F) { fuzzDecode(f, UNSUBSCRIBE) }
func FuzzUnsuback(f *testing.F)    { fuzzDecode(f, UNSUBACK) }
func FuzzPing(f *testing.F)        { fuzzDecode(f, PINGREQ, PINGRESP) }
func FuzzDisconnect(f *testing.F)  { fuzzDecode(f, DISCONNECT) }
func FuzzAuth(f *testing.F)        { fuzzDecode(f, AUTH) }

func FuzzHeader(f *testing.F) {
	f.Add([]byte{0x30, 0x80, 0x01})
	f.Add([]byte{0x30, 0xFF, 0xFF, 0xFF, 0x7F})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, n, err := ParseHeader(b)
		if err != nil || n == 0 {
			return
		}
		if string(AppendHeader(nil, h.Type, h.Flags, h.Remaining)) != string(b[:n]) {
			t.Fatalf("%x gave %+v", b[:n], h)
		}
		for i := range n { // every beginning of it says "more"
			if _, n, err := ParseHeader(b[:i]); n != 0 || err != nil {
				t.Fatalf("%x: %d %v", b[:i], n, err)
			}
		}
	})
}

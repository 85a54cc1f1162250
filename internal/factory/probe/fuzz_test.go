package probe

import (
	"bytes"
	"testing"
)

// FuzzPacket: whatever comes, the decoder stays within its memory, and what was encoded
// after it comes out as it was.
func FuzzPacket(f *testing.F) {
	f.Add([]byte("+$OK#9a-"), []byte("data"))
	f.Add([]byte("$0* #7a%Stop:T05#c3"), []byte{'}', '#', '$', '*', 0, 255})
	f.Add([]byte("$*~#00$a*~*~*~#ff$$"), []byte{})
	f.Fuzz(func(t *testing.T, noise, data []byte) {
		out := make([]byte, 64, 65)
		out[:65][64] = 0xEE
		d := decoder{out: out}
		for _, b := range noise {
			if ev := d.push(b); ev == reply && len(d.data()) > 64 {
				t.Fatal("more than there is room for")
			}
		}
		if out[:65][64] != 0xEE {
			t.Fatal("written past the end")
		}
		data = data[:min(len(data), 30)] // escaped it may be twice as long
		enc := encoder{out: make([]byte, 2*len(data)+frameBytes)}
		enc.begin("")
		enc.binary(data)
		last := none
		for _, b := range enc.end() {
			last = d.push(b)
		}
		if got, ok := unescape(d.data()); last != reply || !ok || !bytes.Equal(got, data) {
			t.Fatalf("%x came out as %x, event %d", data, got, last)
		}
	})
}

// FuzzMemoryMap: a map that is taken is in order and has no gaps in what it says.
func FuzzMemoryMap(f *testing.F) {
	f.Add([]byte(`<memory-map><memory type="flash" start="0x8000000" length="0x100"><property name="blocksize">16</property></memory><memory type="ram" start="0" length="8"/></memory-map>`))
	f.Add([]byte(`<memory-map><memory type="ram" start="0xffffffffffffffff" length="2"/></memory-map>`))
	f.Add([]byte(`<memory-map/>`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		areas, err := parseMap(doc)
		if err != nil {
			return
		}
		end := uint64(0)
		for _, a := range areas {
			if a.start < end || a.end <= a.start || a.end > 1<<32 || a.kind == "flash" && (a.block == 0 || a.block > maxBlock) {
				t.Fatalf("%+v", areas)
			}
			end = a.end
		}
		pieces, err := cut([]Region{{Addr: 0x07FFFFF8, Data: make([]byte, 600)}}, areas)
		if err != nil {
			return
		}
		var flash []piece
		n := 0
		for _, p := range pieces {
			n += len(p.data)
			if p.flash != nil {
				flash = append(flash, p)
			}
		}
		end = 0
		for _, r := range runs(flash) {
			if r.start < end || r.end <= r.start || r.end > 1<<32 || n != 600 {
				t.Fatalf("run %#x to %#x", r.start, r.end)
			}
			end = r.end
		}
	})
}

// FuzzSpec: what is taken is written in a form that is taken as the same.
func FuzzSpec(f *testing.F) {
	f.Add("gdb:127.0.0.1:3333,identity=0x10001080,trust=4096")
	f.Add("exec:identity=1:cat >/dev/null")
	f.Add("gdb:[::1]:1")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := Parse(text)
		if err != nil {
			return
		}
		again, err := Parse(s.String())
		if err != nil || again.String() != s.String() || again.Command != s.Command || again.Server != s.Server {
			t.Fatalf("%q is written as %q: %v", text, s, err)
		}
		if s.Kind == "gdb" {
			if addr, err := loopback(s.Server); err != nil || !addr.Addr().IsLoopback() {
				t.Fatalf("%q is not loopback", s.Server)
			}
		}
	})
}

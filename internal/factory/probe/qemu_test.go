package probe

import (
	"bytes"
	"errors"
	"testing"
)

func TestQEMU(t *testing.T) {
	_, text := qemu(t)
	buf := make([]byte, BufferSize)
	p := open(t, text, func(s *Spec) { s.Buffer = buf })
	identity, trust := pattern(128), pattern(5000)
	regions := []Region{{0x20011000, trust, false}, {0x20010000, identity, true}}
	if err := p.Write(t.Context(), regions); err != nil {
		t.Fatal(err)
	}
	check := func(when string) {
		t.Helper()
		for _, r := range regions {
			got, err := p.Read(t.Context(), r.Addr, len(r.Data))
			if err != nil || !bytes.Equal(got, r.Data) {
				t.Fatalf("%s: %#x does not read back: %v", when, r.Addr, err)
			}
		}
		if !bytes.Equal(buf, make([]byte, len(buf))) {
			t.Errorf("%s: bytes are left in the buffer", when)
		}
	}
	check("after the write")
	if err := p.Reset(t.Context()); err != nil {
		t.Fatal(err)
	}
	check("after the reset") // this machine's RAM keeps its content, as flash would
}

// TestQEMUResets: after a reset the unit runs from its vector table.
func TestQEMUResets(t *testing.T) {
	_, text := qemu(t)
	p := open(t, text, nil)
	const inROM = 0 // QEMU loads the kernel again at a reset
	if err := p.Write(t.Context(), []Region{{Addr: inROM, Data: []byte{1, 2, 3, 4}}}); err != nil {
		t.Fatal(err)
	}
	if err := p.Reset(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := p.Read(t.Context(), inROM, 4); err != nil || !bytes.Equal(got, []byte{0, 4, 0, 0x20}) {
		t.Fatalf("vector table after the reset: % x, %v", got, err)
	}
}

// TestUnreadable: a read that the target refuses is told from a connection that is lost.
func TestUnreadable(t *testing.T) {
	cmd, text := qemu(t)
	p := open(t, text, nil)
	into := pattern(16)
	if err := p.ReadInto(t.Context(), 0x90000000, into); !errors.Is(err, ErrTarget) || errors.Is(err, ErrGone) {
		t.Errorf("where there is no memory: %v", err)
	}
	if !bytes.Equal(into, make([]byte, 16)) {
		t.Error("a failed read left something")
	}
	if _, err := p.Read(t.Context(), 0x20000000, 16); err != nil {
		t.Errorf("after a refused read: %v", err)
	}
	cmd.Process.Kill()
	cmd.Process.Wait()
	if _, err := p.Read(t.Context(), 0x20000000, 16); !errors.Is(err, ErrGone) || errors.Is(err, ErrTarget) {
		t.Errorf("without a server: %v", err)
	}
	if _, err := p.Read(t.Context(), 0x20000000, 16); !errors.Is(err, ErrGone) {
		t.Errorf("without a server, again: %v", err)
	}
}

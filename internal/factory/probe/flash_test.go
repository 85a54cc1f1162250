package probe

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
	"time"
)

// two regions share a block of flash, one lies across two blocks, one in RAM.
func fourRegions() []Region {
	return []Region{
		{flashAt + 0x410, pattern(128), true},
		{flashAt + 0x700, pattern(700), false},
		{flashAt + 0x1000, pattern(blockSize), false},
		{ramAt + 5, pattern(333), true},
	}
}

// TestFlash: after a Write flash holds the regions and, beside them, what it held before,
// over lines and with servers of every kind.
func TestFlash(t *testing.T) {
	for name, f := range map[string]faults{
		"plain":            {},
		"small packets":    {packetSize: leastPacket},
		"large packets":    {packetSize: 1 << 20},
		"no-ack mode":      {noAckMode: true},
		"damaged packets":  {naks: 2},
		"damaged answers":  {badSums: 3},
		"no acks":          {dropAcks: true},
		"a byte a segment": {oneByte: true, packetSize: 1024},
		"no X":             {noX: true},
		"chatter":          {chatter: true},
		"repeats":          {repeats: true, packetSize: 1024},
		"short answers":    {short: true},
		"black magic":      {noUnit: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f.reset = "reset"
			s := newStub(t, f)
			want, wantRAM := bytes.Clone(s.flash), bytes.Clone(s.ram)
			buf := make([]byte, BufferSize)
			p := open(t, "gdb:"+s.addr, func(sp *Spec) { sp.Buffer = buf })
			regions := fourRegions()
			for _, r := range regions {
				if r.Addr >= ramAt {
					copy(wantRAM[r.Addr-ramAt:], r.Data)
				} else {
					copy(want[r.Addr-flashAt:], r.Data)
				}
			}
			if err := p.Write(t.Context(), regions); err != nil {
				t.Fatal(err)
			}
			s.mu.Lock()
			if !bytes.Equal(s.flash, want) || !bytes.Equal(s.ram, wantRAM) {
				t.Error("memory does not hold what it should")
			}
			s.mu.Unlock()
			got, err := p.Read(t.Context(), flashAt, flashSize)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("flash does not read back: %v", err)
			}
			if err := p.Reset(t.Context()); err != nil || s.count("reset!") != 1 || s.count("D") != 1 {
				t.Errorf("reset: %v, %v", err, s.log)
			}
			if n := s.count("vFlashErase"); n != 2 {
				t.Errorf("%d erases", n) // blocks 1 and 2 in one, 4
			}
			if !bytes.Equal(buf, make([]byte, len(buf))) {
				t.Error("bytes are left in the buffer")
			}
		})
	}
}

// TestFlashIsNotErasedBlindly: what cannot be read cannot be kept, so nothing is erased.
func TestFlashIsNotErasedBlindly(t *testing.T) {
	s := newStub(t, faults{blindFrom: 0x600})
	p := open(t, "gdb:"+s.addr, nil)
	err := p.Write(t.Context(), fourRegions())
	if !errors.Is(err, ErrTarget) || !strings.Contains(err.Error(), "nothing was written") {
		t.Errorf("got %v", err)
	}
	if s.count("vFlashErase")+s.count("X20000005") > 0 {
		t.Error("something was erased or written")
	}
	// A region that fills its block has nothing beside it.
	if err := p.Write(t.Context(), fourRegions()[2:3]); err != nil {
		t.Errorf("a whole block: %v", err)
	}
}

func TestReadOnlyMemory(t *testing.T) {
	s := newStub(t, faults{})
	p := open(t, "gdb:"+s.addr, nil)
	err := p.Write(t.Context(), []Region{{ramAt, pattern(9), false}, {0xFF0, pattern(9), false}})
	if !errors.Is(err, ErrTarget) || !strings.Contains(err.Error(), "read-only") || s.count("X20000000") > 0 {
		t.Errorf("got %v", err)
	}
}

// TestDeathInMidWrite: one clear line, typed, without a byte of what was written.
func TestDeathInMidWrite(t *testing.T) {
	secret := pattern(600)
	for _, at := range []string{"X", "vFlashErase", "vFlashWrite", "m8"} {
		s := newStub(t, faults{dieAt: at})
		buf := make([]byte, BufferSize)
		p := open(t, "gdb:"+s.addr, func(sp *Spec) { sp.Buffer = buf })
		err := p.Write(t.Context(), []Region{{ramAt, secret, true}, {flashAt + 64, secret, true}, {flashAt + 0x1200, secret, true}})
		if !errors.Is(err, ErrGone) || errors.Is(err, ErrTarget) {
			t.Errorf("%s: %v", at, err)
			continue
		}
		text := err.Error()
		want := map[string]string{"X": "not whole", "m8": "nothing was written"}[at]
		if want == "" {
			want = "may be erased"
		}
		if !strings.Contains(text, want) || strings.ContainsAny(text, "\n\r") {
			t.Errorf("%s: %q", at, text)
		}
		if strings.Contains(text, string(secret[8:12])) || strings.Contains(text, hex.EncodeToString(secret[8:12])) {
			t.Errorf("%s: the error quotes the region: %q", at, text)
		}
		if !bytes.Equal(buf, make([]byte, len(buf))) {
			t.Errorf("%s: bytes are left in the buffer", at)
		}
		if err := p.Write(t.Context(), []Region{{ramAt, secret, true}}); err != nil {
			t.Errorf("%s: afterwards: %v", at, err)
		}
	}
}

// TestSilence: a server that does not answer costs the time-out, not the day.
func TestSilence(t *testing.T) {
	s := newStub(t, faults{silent: "m"})
	p := open(t, "gdb:"+s.addr, func(sp *Spec) { sp.Timeout = 50 * time.Millisecond })
	if _, err := p.Read(t.Context(), ramAt, 4); !errors.Is(err, ErrGone) {
		t.Errorf("got %v", err)
	}
	p = open(t, "gdb:"+s.addr, func(sp *Spec) { sp.Timeout = time.Hour })
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := p.Read(ctx, ramAt, 4); !errors.Is(err, context.Canceled) || errors.Is(err, ErrTarget) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestRunningUnit: a unit that is running when the debug server is asked is interrupted.
func TestRunningUnit(t *testing.T) {
	s := newStub(t, faults{silent: "?"})
	open(t, "gdb:"+s.addr, func(sp *Spec) { sp.Timeout = 50 * time.Millisecond })
}

func TestWaitEnds(t *testing.T) {
	spec, err := Parse("gdb:127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	p, err := spec.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := p.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, ErrGone) {
		t.Errorf("got %v", err)
	}
}

// TestBadServers: what is no server, or a broken one, gives a typed error and takes no
// memory.
func TestBadServers(t *testing.T) {
	for name, f := range map[string]faults{
		"tiny packets":       {packetSize: 16},
		"damaged for ever":   {badSums: 1 << 30},
		"never understands":  {naks: 1 << 30},
		"a map of nonsense":  {memoryMap: "<memory-map><memory type='flash' start='0' length='9'/></memory-map>"},
		"a map without end":  {memoryMap: strings.Repeat(" ", maxMap+1), packetSize: 4096},
		"overlapping memory": {memoryMap: "<memory-map><memory type='ram' start='0' length='9'/><memory type='ram' start='8' length='9'/></memory-map>"},
	} {
		s := newStub(t, f)
		spec, err := Parse("gdb:" + s.addr)
		if err != nil {
			t.Fatal(err)
		}
		p, err := spec.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Read(t.Context(), ramAt, 4); !errors.Is(err, ErrGone) {
			t.Errorf("%s: %v", name, err)
		}
		p.Close()
	}
}

func TestBadRegions(t *testing.T) {
	s := newStub(t, faults{})
	p := open(t, "gdb:"+s.addr, nil)
	for name, rs := range map[string][]Region{
		"none":     nil,
		"empty":    {{Addr: ramAt}},
		"overlap":  {{ramAt + 4, pattern(4), false}, {ramAt, pattern(5), false}},
		"past end": {{0xFFFFFFF0, pattern(17), false}},
		"too much": {{ramAt, make([]byte, maxWrite+1), false}},
	} {
		if err := p.Write(t.Context(), rs); err == nil || errors.Is(err, ErrTarget) || errors.Is(err, ErrGone) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := p.Read(t.Context(), 0xFFFFFFF0, 17); err == nil || s.count("mfffffff0") > 0 {
		t.Errorf("a read past the end: %v", err)
	}
}

// TestNoReset: a server that knows no reset is not taken for one that has reset.
func TestNoReset(t *testing.T) {
	s := newStub(t, faults{reset: "other"})
	p := open(t, "gdb:"+s.addr, nil)
	if err := p.Reset(t.Context()); !errors.Is(err, ErrTarget) || s.count("R00") != 1 || s.count("D") != 1 {
		t.Errorf("got %v, %v", err, s.log)
	}
}

package probe

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// parseHex reads Intel HEX as a flashing tool does.
func parseHex(text string) (map[uint32]byte, error) {
	mem := map[uint32]byte{}
	upper := uint32(0)
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	for i, line := range lines {
		rec, err := hex.DecodeString(strings.TrimPrefix(line, ":"))
		if err != nil || line == "" || line[0] != ':' || len(rec) < 5 || len(rec) != 5+int(rec[0]) || strings.ToUpper(line) != line {
			return nil, fmt.Errorf("line %d is no record", i+1)
		}
		sum := byte(0)
		for _, b := range rec {
			sum += b
		}
		addr, data := uint32(rec[1])<<8|uint32(rec[2]), rec[4:len(rec)-1]
		switch {
		case sum != 0:
			return nil, fmt.Errorf("line %d has a wrong checksum", i+1)
		case rec[3] == hexEnd && i == len(lines)-1 && len(data) == 0:
			return mem, nil
		case rec[3] == hexUpper && len(data) == 2 && addr == 0:
			upper = uint32(data[0])<<24 | uint32(data[1])<<16
		case rec[3] == hexData && len(data) > 0 && len(data) <= hexLine && addr+uint32(len(data)) <= 0x10000:
			for j, b := range data {
				at := upper | addr + uint32(j)
				if _, twice := mem[at]; twice {
					return nil, fmt.Errorf("line %d writes %#x again", i+1, at)
				}
				mem[at] = b
			}
		default:
			return nil, fmt.Errorf("line %d: type %d of length %d", i+1, rec[3], len(data))
		}
	}
	return nil, errors.New("no end record")
}

func execProbe(t *testing.T, command string, change func(*Spec)) (Probe, []byte) {
	t.Helper()
	buf := make([]byte, MinBuffer)
	p := open(t, "exec:"+command, func(s *Spec) {
		s.Buffer = buf
		if change != nil {
			change(s)
		}
	})
	return p, buf
}

// TestExec: the command gets every byte where it belongs, and nothing else.
func TestExec(t *testing.T) {
	out := filepath.Join(t.TempDir(), "hex")
	p, buf := execProbe(t, "cat >"+out, nil)
	regions := []Region{
		{0x1000FFF9, pattern(9000), false}, // over a 64 KiB border
		{0x20010000, pattern(128), true},
		{0x10001080, pattern(1), true},
		{0xFFFFFFF0, pattern(16), true},
	}
	want := map[uint32]byte{}
	for _, r := range regions {
		for i, b := range r.Data {
			want[r.Addr+uint32(i)] = b
		}
	}
	if err := p.Write(t.Context(), regions); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseHex(string(text))
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("the HEX is not what was to be written: %v", err)
	}
	if !bytes.Equal(buf, make([]byte, len(buf))) {
		t.Error("bytes are left in the buffer")
	}
	if _, err := p.Read(t.Context(), 0x20010000, 128); !errors.Is(err, ErrNoRead) {
		t.Errorf("read: %v", err)
	}
	if err := p.Reset(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestExecFails: what a command says when it fails is shown, without what it was given.
func TestExecFails(t *testing.T) {
	secret := bytes.Repeat([]byte{0xA7, 0x3C}, 3000) // more than a pipe holds in HEX
	quoted := "A73CA73C"
	for name, c := range map[string]struct{ command, want string }{
		"no reader":     {"exit 0", "without having read its input"},
		"fails at once": {"echo no probe found >&2; exit 3", "exit status 3: it said: no probe found: the unit"},
		"quotes":        {"cat >&2; echo and so on >&2; exit 1", "and so on"},
		"no command":    {"/nonexistent/tool", "exit status 127"},
		"terminal":      {"cat >/dev/null; printf 'a\\033[2Jb' >&2; exit 1", `a\x1b[2Jb`},
		"killed":        {"cat >/dev/null; kill -9 $$", "signal: killed"},
	} {
		p, buf := execProbe(t, c.command, nil)
		err := p.Write(t.Context(), []Region{{0x10000000, bytes.Repeat(secret, 20), true}})
		if !errors.Is(err, ErrTarget) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if text := err.Error(); strings.Contains(strings.ToUpper(text), quoted) || strings.Contains(text, "\n") || len(text) > 2*maxWords {
			t.Errorf("%s: %q", name, text)
		}
		if !bytes.Equal(buf, make([]byte, len(buf))) {
			t.Errorf("%s: bytes are left in the buffer", name)
		}
	}
}

// TestExecIsKilled: the end of the context, or of the time that a command has, ends the
// command and what it has started.
func TestExecIsKilled(t *testing.T) {
	dir := t.TempDir()
	command := "sleep 1000 & echo $! >" + dir + "/child; mv " + dir + "/child " + dir + "/pid; wait"
	gone := func() {
		t.Helper()
		text, err := os.ReadFile(dir + "/pid")
		if err != nil {
			t.Fatal(err)
		}
		pid, _ := strconv.Atoi(strings.TrimSpace(string(text)))
		await(t, "the command's child to end", func() bool {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			return err != nil || strings.Contains(string(stat), ") Z ")
		})
	}
	p, _ := execProbe(t, command, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		defer cancel()
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
			if _, err := os.Stat(dir + "/pid"); err == nil {
				return
			}
			<-time.After(5 * time.Millisecond)
		}
	}()
	if err := p.Write(ctx, []Region{{0, pattern(16), true}}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	gone()
	p, _ = execProbe(t, command, func(s *Spec) { s.FlashTimeout = 300 * time.Millisecond })
	if err := p.Write(t.Context(), []Region{{0, pattern(16), true}}); !errors.Is(err, ErrGone) {
		t.Errorf("too slow: %v", err)
	}
	gone()
}

// TestExecBackground: a process that the command leaves behind holds nothing up.
func TestExecBackground(t *testing.T) {
	dir := t.TempDir()
	p, _ := execProbe(t, "cat >/dev/null; sleep 1000 & echo $! >"+dir+"/pid", nil)
	if err := p.Write(t.Context(), []Region{{0, pattern(16), true}}); err != nil {
		t.Error(err)
	}
	text, err := os.ReadFile(dir + "/pid")
	pid, err2 := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || err2 != nil {
		t.Fatal(err, err2)
	}
	if child, err := os.FindProcess(pid); err == nil {
		child.Kill()
	}
}

// await polls for what has no event of its own.
func await(t *testing.T, what string, there func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !there(); <-time.After(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

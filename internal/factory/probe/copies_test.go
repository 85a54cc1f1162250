package probe

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// outside gives memory that the search for copies leaves out.
func outside(t *testing.T, n int) []byte {
	t.Helper()
	p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(p) })
	return p
}

// search looks for the needles in all of this process's writable memory but for pages that
// hold one of except. It says how much it has seen.
func search(t *testing.T, needles [][]byte, except ...[]byte) (found []string, seen int) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Skipf("no /proc: %v", err)
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	window := outside(t, 1<<20)
	own := append(slices.Clone(except), window)
	for _, line := range strings.Split(strings.TrimSpace(string(maps)), "\n") {
		var from, to uintptr
		if _, err := fmt.Sscanf(line, "%x-%x rw", &from, &to); err != nil || strings.Contains(line, "[v") {
			continue
		}
		const overlap = 256
		for at := from; at < to; at += uintptr(len(window) - overlap) {
			n, _ := mem.ReadAt(window[:min(len(window), int(to-at))], int64(at))
			seen += n
			for i, needle := range needles {
				for pos := 0; ; pos++ {
					j := bytes.Index(window[pos:n], needle)
					if j < 0 {
						break
					}
					pos += j
					if !lies(at+uintptr(pos), own) {
						found = append(found, fmt.Sprintf("form %d at %#x in %s", i, at+uintptr(pos), line))
						break
					}
				}
			}
		}
		clear(window)
	}
	return found, seen
}

// TestNoCopies: when Write and ReadInto have returned, the bytes of a region are nowhere in
// this process but where the caller keeps them: not as they are, not in hexadecimal, not
// escaped, not as Intel HEX.
func TestNoCopies(t *testing.T) {
	_, arm := qemu(t)
	host, _ := hostUnit(t)
	secret, back := outside(t, 4096)[:96], outside(t, 4096)[:96]
	forms := outside(t, 4096)
	rand.Read(secret)
	secret[40] = '#' // what X escapes
	part := secret[32:48]
	needles := [][]byte{
		forms[:16:16], forms[16:48:48], forms[48:80:80], forms[80:96:96],
	}
	copy(needles[0], part)
	hex.Encode(needles[1], part)
	copy(needles[2], needles[1])
	for i, c := range needles[2] {
		if c >= 'a' {
			needles[2][i] = c - 'a' + 'A'
		}
	}
	e := encoder{out: needles[3]}
	e.binary(part[4:12]) // holds the escape

	for _, spec := range []string{arm + "@20010000", host + "@10000000", "exec:cat >/dev/null@0"} { // with M, with X, as HEX
		text, at, _ := strings.Cut(spec, "@")
		addr, _ := strconv.ParseUint(at, 16, 32)
		p := open(t, text, func(s *Spec) { s.Buffer = outside(t, BufferSize) })
		if err := p.Write(t.Context(), []Region{{uint32(addr), secret, true}}); err != nil {
			t.Fatal(err)
		}
		if err := p.ReadInto(t.Context(), uint32(addr), back); !errors.Is(err, ErrNoRead) && (err != nil || !bytes.Equal(back, secret)) {
			t.Fatal(err)
		}
	}
	found, seen := search(t, needles[:3], secret, back, forms)
	more, _ := search(t, [][]byte{needles[3][:9]}, secret, back, forms)
	if found = append(found, more...); len(found) > 0 || seen < 1<<20 {
		t.Errorf("in %d bytes: %v", seen, found)
	}
	planted := bytes.Clone(part) // the search itself: does it find anything?
	if found, _ := search(t, needles[:3], secret, back, forms); len(found) == 0 {
		t.Errorf("a planted copy of %d bytes is not found", len(planted))
	}
	clear(planted)
}

func lies(addr uintptr, in [][]byte) bool {
	return slices.ContainsFunc(in, func(p []byte) bool {
		start := uintptr(unsafe.Pointer(unsafe.SliceData(p)))
		return addr >= start && addr < start+uintptr(cap(p))
	})
}

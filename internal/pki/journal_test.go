package pki

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"hawser/internal/durable"
)

func device(n int) Entry {
	return Entry{Time: "2026-07-01T12:00:00Z", Kind: KindDevice, Subject: fmt.Sprintf("%08X", n), Key: fmt.Sprintf("%064x", n), Vouched: "operator"}
}

// newJournal makes a journal with n devices and gives its path; it is closed.
func newJournal(t testing.TB, n int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "issued.journal")
	if err := CreateJournal(path, [16]byte{7}, testNow()); err != nil {
		t.Fatal(err)
	}
	j, err := OpenJournal(path)
	must(t, j, err)
	for i := range n {
		if err := j.Append(device(i + 1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestJournal(t *testing.T) {
	path := newJournal(t, 3)
	if err := CreateJournal(path, [16]byte{8}, testNow()); !errors.Is(err, fs.ErrExist) {
		t.Error("a journal was overwritten:", err)
	}
	j, err := OpenJournal(path)
	must(t, j, err)
	defer j.Close()
	if j.Len() != 4 || j.Fleet() != [16]byte{7} {
		t.Error(j.Len(), j.Fleet())
	}
	if _, err := OpenJournal(path); !errors.Is(err, durable.ErrLocked) {
		t.Error(err)
	}
	a, b := device(1), device(2)
	if !j.Vouches(KindDevice, a.Subject, a.Key) || j.Vouches(KindDevice, a.Subject, b.Key) || j.Vouches(KindDevice, "0000000F", "") || j.Vouches(KindService, a.Subject, a.Key) {
		t.Error("vouches for the wrong ones")
	}
	a.Key, b.Subject = device(9).Key, device(9).Subject
	for _, e := range []Entry{a, b} {
		if err := j.Append(e); !errors.Is(err, ErrBound) {
			t.Error(err)
		}
	}
	long := device(10)
	long.Class = strings.Repeat("x", maxLine)
	if err := j.Append(long); err == nil {
		t.Error("an entry of any length is taken")
	}
	if err := j.Append(device(1)); err != nil || j.Len() != 5 {
		t.Error(err, j.Len())
	}
	if _, err := OpenJournal(path + "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if _, err := os.Stat(path + "x"); err == nil {
		t.Error("a journal was made anew")
	}
}

// Every single byte that is changed, and every line that is taken out, doubled or
// moved, is found. Only the end can be cut off unseen: that is what copies are for.
func TestJournalChain(t *testing.T) {
	path := newJournal(t, 3)
	good, err := os.ReadFile(path)
	must(t, good, err)
	open := func(content []byte) error {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := OpenJournal(path)
		if err != nil {
			return err
		}
		return j.Close()
	}
	lines := bytes.SplitAfter(good, []byte("\n"))[:4]
	for name, order := range map[string][]int{"no first line": {1, 2, 3}, "a line taken out": {0, 1, 3}, "a line twice": {0, 1, 1, 2, 3}, "lines swapped": {0, 2, 1, 3}, "two beginnings": {0, 0}, "nothing": {}} {
		var bad []byte
		for _, i := range order {
			bad = append(bad, lines[i]...)
		}
		if err := open(bad); !errors.Is(err, ErrJournal) {
			t.Errorf("%s: %v", name, err)
		}
	}
	lastLine := len(good) - len(lines[3])
	for i := range lastLine {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		if err := open(bad); !errors.Is(err, ErrJournal) {
			t.Fatalf("byte %d (%q): %v", i, good[i], err)
		}
	}
	if err := open(bytes.Replace(good, []byte(`{"n":4`), []byte(`{"n":5`), 1)); !errors.Is(err, ErrJournal) {
		t.Error("the last line has another number:", err)
	}
	if err := open(good); err != nil {
		t.Fatal(err)
	}
}

// What a line says it is must fit its place, though the chain holds.
func TestJournalBeginsOnce(t *testing.T) {
	line := func(e Entry) []byte {
		b, err := encodeEntry(e)
		return must(t, b, err)
	}
	zeros, id := strings.Repeat("0", 64), strings.Repeat("7", 32)
	first := line(Entry{Number: 1, Prev: zeros, What: whatBegin, Fleet: id})
	prev := fmt.Sprintf("%x", sha256.Sum256(first[:len(first)-1]))
	for name, content := range map[string][]byte{
		"begins twice":       append(bytes.Clone(first), line(Entry{Number: 2, Prev: prev, What: whatBegin, Fleet: id})...),
		"begins with a leaf": line(Entry{Number: 1, Prev: zeros, What: whatIssue, Fleet: id}),
		"names no fleet":     line(Entry{Number: 1, Prev: zeros, What: whatBegin}),
	} {
		path := filepath.Join(t.TempDir(), "j")
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenJournal(path); !errors.Is(err, ErrJournal) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A line that was cut off by a crash never let a certificate out; the next one takes its place.
func TestJournalTornLine(t *testing.T) {
	path := newJournal(t, 2)
	good, err := os.ReadFile(path)
	must(t, good, err)
	if err := os.WriteFile(path, append(bytes.Clone(good), `{"n":4,"pr`...), 0o600); err != nil {
		t.Fatal(err)
	}
	j, err := OpenJournal(path)
	must(t, j, err)
	if err := j.Append(device(3)); err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j, err = OpenJournal(path)
	must(t, j, err)
	defer j.Close()
	if j.Len() != 4 {
		t.Error(j.Len())
	}
}

// After a write that failed, nobody knows what is on disk: nothing more is appended.
func TestJournalStopsAfterAFailedWrite(t *testing.T) {
	path := newJournal(t, 1)
	j, err := OpenJournal(path)
	must(t, j, err)
	file := j.f
	readOnly, err := os.Open(path)
	j.f = must(t, readOnly, err)
	if err := j.Append(device(2)); err == nil {
		t.Fatal("a write to a read-only file succeeded")
	}
	j.f = file
	if err := j.Append(device(3)); err == nil || j.Len() != 2 {
		t.Error("appended after a failed write")
	}
	if err := errors.Join(readOnly.Close(), j.Close()); err != nil {
		t.Error(err)
	}
}

func FuzzJournal(f *testing.F) {
	good, err := os.ReadFile(newJournal(f, 2))
	f.Add(must(f, good, err))
	f.Fuzz(func(t *testing.T, content []byte) {
		j := &Journal{keyOf: map[string]string{}, holder: map[string]string{}}
		for line := range bytes.Lines(content) {
			if j.replay(bytes.TrimSuffix(line, []byte("\n"))) != nil {
				return
			}
		}
	})
}

func BenchmarkOpenJournalOf10000(b *testing.B) {
	path := newJournal(b, 10000)
	for b.Loop() {
		j, err := OpenJournal(path)
		must(b, j, err)
		if err := j.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

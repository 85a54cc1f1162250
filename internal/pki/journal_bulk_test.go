package pki

import (
	"errors"
	"os"
	"testing"
)

// TestJournalTakesManyAtOnce: one write, the same chain; one bad entry and none is written.
func TestJournalTakesManyAtOnce(t *testing.T) {
	path := newJournal(t, 1)
	j, err := OpenJournal(path)
	must(t, j, err)
	if err := j.Append(device(2), device(3), device(3), device(4)); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	must(t, before, err)
	otherKey, otherID, known := device(5), device(6), device(2)
	otherKey.Key, otherID.Key, known.Key = device(9).Key, device(5).Key, device(9).Key
	for _, bad := range [][]Entry{{device(5), otherKey}, {device(5), otherID}, {device(5), known}} {
		if err := j.Append(bad...); !errors.Is(err, ErrBound) {
			t.Errorf("%v: %v", bad, err)
		}
	}
	after, err := os.ReadFile(path)
	must(t, after, err)
	if string(after) != string(before) {
		t.Error("a refused batch left something in the journal")
	}
	if err := errors.Join(j.Append(device(5)), j.Close()); err != nil {
		t.Fatal(err)
	}
	j, err = OpenJournal(path)
	must(t, j, err)
	defer j.Close()
	if d := device(5); j.Len() != 7 || !j.Vouches(KindDevice, d.Subject, d.Key) {
		t.Error(j.Len())
	}
}

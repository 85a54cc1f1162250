package factory

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"testing"
)

const (
	sampleBlock   = "../../testdata/vectors/line1.block"
	sampleJournal = "../../testdata/vectors/line1.journal"
)

// The samples in the tree were written once: what can read them can read the files of
// benches that are in use. The station's key is 32 times 0x42, the device CA's 32 times 0x41.
func TestSamples(t *testing.T) {
	if *update {
		writeSamples(t)
	}
	b, err := OpenBlock(read(t, sampleBlock))
	must(t, b, err)
	if b.Station != "line1" || b.ID != (BlockID{1}) || fmt.Sprint(b.IDs) != "[ABCD1234 00000002 00000003]" || !b.Expires.Equal(testNow()) {
		t.Errorf("%+v", b)
	}
	got := ""
	s, err := ReadJournal(bytes.NewReader(read(t, sampleJournal)), Known{}, func(l *Line) error {
		got += fmt.Sprintln(l.Number, l.What, l.ID, l.Class, l.Hardware, l.How, l.Reason)
		return nil
	})
	must(t, s, err)
	want := "1 begin   0  \n2 block   0  \n3 unit ABCD1234 sensor-a 3 probe \n4 burnt 00000002  0  the probe vanished\n5 renew   0  \n6 unit 00000003 sensor-a 3 csr \n"
	if got != want || s.Station != "line1" || s.Fleet != b.Fleet {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func writeSamples(t *testing.T) {
	t.Helper()
	r := newRig(t)
	path := r.journal(t, 0)
	j := r.open(t, path)
	next := r.newStation(t, "line1", fixedKey(t, 0x42))
	err := errors.Join(j.AppendUnit(r.unit(t, 0xABCD1234), testNow()), j.AppendBurnt(2, "the probe vanished", testNow()),
		j.AppendRenew(next.Cert, next.Signer, testNow()))
	r.station = next
	u := r.unit(t, 3)
	u.How = ByCSR
	err = errors.Join(err, j.AppendUnit(u, testNow()), j.Close(), os.WriteFile(sampleBlock, r.sign(t, r.block()), 0o644),
		os.WriteFile(sampleJournal, read(t, path), 0o644))
	if err != nil {
		t.Fatal(err)
	}
}

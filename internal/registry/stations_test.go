package registry

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"hawser/internal/identity"
)

func stationCert(station string, n int) StationCertificate {
	return StationCertificate{Fingerprint: keyOf(1000 + n), Station: station, KeyHash: keyOf(n), Generation: 1, DER: []byte{byte(n)},
		NotBefore: testMeta.Created, NotAfter: testMeta.Created.AddDate(1, 0, n)}
}

// reserve gives a signed block of count ids to a station whose key is number key.
func reserve(t testing.TB, r *Registry, station string, key, count int, block byte) Block {
	t.Helper()
	b := Block{ID: [16]byte{block}, Station: station, Anchors: 1, Expires: testMeta.Created.AddDate(1, 0, 0)}
	must(t, r, func(tx *Tx) error {
		if err := tx.RegisterStation("test", station, []byte{1}, keyOf(key)); err != nil {
			return err
		}
		if err := tx.ReserveBlock("test", &b, count, nil); err != nil {
			return err
		}
		return tx.SignedBlock("test", b.ID, stationCert(station, key))
	})
	return b
}

func unitOf(b Block, i, key int) Unit {
	id := b.IDs[i]
	return Unit{Line: uint64(i + 3), ID: id, Class: "sensor", Hardware: 3, KeyHash: keyOf(key), CSR: []byte{1}, Block: b.ID,
		Flashed: testMeta.Created, Certificate: certOf(identity.DevicePrincipal(id), key)}
}

// items is the Next of a JournalPart.
func items(units []Unit, burnt []BurntID) func() (JournalItem, error) {
	return func() (v JournalItem, err error) {
		switch {
		case len(units) > 0:
			v.Unit, units = &units[0], units[1:]
		case len(burnt) > 0:
			v.Burnt, burnt = &burnt[0], burnt[1:]
		default:
			err = io.EOF
		}
		return v, err
	}
}

func head(n int) (h [32]byte) {
	h[0] = byte(n)
	return h
}

func TestReserveAndImport(t *testing.T) {
	var told []Change
	r := newRegistry(t, Options{Changed: func(c Change) { told = append(told, c) }})
	b := reserve(t, r, "line1", 500, 20, 1)
	if len(b.IDs) != 20 || !slices.IsSorted(b.IDs) {
		t.Fatal(b.IDs)
	}
	part := JournalPart{Station: "line1", Lines: 5, Head: head(1), Next: items([]Unit{unitOf(b, 0, 1), unitOf(b, 1, 2)}, []BurntID{{Line: 5, ID: b.IDs[2], Reason: "x"}})}
	before := auditCount(t, r)
	must(t, r, func(tx *Tx) error { return tx.ImportJournal("test", &part) })
	if n := auditCount(t, r) - before; n != 3 {
		t.Errorf("%d audit rows for two units and the import", n)
	}
	if len(told) != 4 || told[0].Kind != DeviceAdded || told[1].Kind != CertificateAdded || told[1].Active.Fingerprint != unitOf(b, 0, 1).Certificate.Fingerprint {
		t.Errorf("told %+v", told)
	}
	d, err := r.Device(t.Context(), b.IDs[0])
	if err != nil || d.State != DeviceActive || d.Station != "line1" || d.Hardware != 3 || !d.Flashed.Equal(testMeta.Created) || d.Block != b.ID || d.Enrolled.IsZero() || d.Class != "sensor" {
		t.Errorf("%+v, %v", d, err)
	}
	if der, err := r.CSR(t.Context(), b.IDs[0]); err != nil || len(der) != 1 {
		t.Error("no CSR:", err)
	}
	list, err := r.Devices(t.Context(), DeviceFilter{Station: "line1"})
	if err != nil || len(list) != 2 {
		t.Errorf("%d devices of the station, %v", len(list), err)
	}
	s, err := r.Station(t.Context(), "line1")
	if err != nil || s.Lines != 5 || s.Head != head(1) || s.Imported.IsZero() || s.KeyHash != keyOf(500) {
		t.Errorf("%+v, %v", s, err)
	}
	use, err := r.Blocks(t.Context(), "line1")
	if err != nil || len(use) != 1 || use[0].Free != 17 || use[0].Used != 2 || use[0].Burnt != 1 || use[0].Signed.IsZero() {
		t.Errorf("%+v, %v", use, err)
	}
	var anchors int
	if err := r.read.QueryRow(`SELECT anchors FROM device_pki WHERE device = ?`, int64(b.IDs[0])).Scan(&anchors); err != nil || anchors != 1 {
		t.Error("born with", anchors, err)
	}
}

// Each refusal names the line, and leaves nothing of the whole import behind.
func TestImportRefusals(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, enrol(77))
	b, other := reserve(t, r, "line1", 500, 20, 1), reserve(t, r, "line2", 501, 5, 2)
	waiting := Block{ID: [16]byte{3}, Station: "line1", Expires: testMeta.Created}
	must(t, r, func(tx *Tx) error { return tx.ReserveBlock("test", &waiting, 1, nil) })
	second := reserve(t, r, "line1", 500, 5, 4)
	first := JournalPart{Station: "line1", Lines: 3, Head: head(1), Next: items([]Unit{unitOf(b, 0, 1)}, []BurntID{{Line: 4, ID: b.IDs[9]}})}
	must(t, r, func(tx *Tx) error { return tx.ImportJournal("test", &first) })
	with := func(bend func(*Unit)) Unit {
		u := unitOf(b, 5, 5)
		bend(&u)
		return u
	}
	for want, u := range map[string]Unit{
		"free ids: it is used already":                         with(func(u *Unit) { u.ID = b.IDs[0] }),
		"free ids: it is burnt already":                        with(func(u *Unit) { u.ID = b.IDs[9] }),
		"free ids: it was never reserved":                      with(func(u *Unit) { u.ID = 77 }),
		"free ids: it was reserved for station line2":          with(func(u *Unit) { u.ID, u.Block = other.IDs[0], other.ID }),
		"free ids: its block was never signed":                 with(func(u *Unit) { u.ID, u.Block = waiting.IDs[0], waiting.ID }),
		"free ids: it is not in the block that the line names": with(func(u *Unit) { u.Block = second.ID }),
		"this key is that of " + b.IDs[0].String():             with(func(u *Unit) { u.KeyHash = keyOf(1) }),
		"this key is that of 0000004D":                         with(func(u *Unit) { u.KeyHash = keyOf(77) }),
		"its certificate: already exists":                      with(func(u *Unit) { u.Certificate.Fingerprint = certOf(identity.DevicePrincipal(77), 77).Fingerprint }),
	} {
		before := auditCount(t, r)
		part := JournalPart{Station: "line1", FromLines: 3, FromHead: head(1), Lines: 9, Head: head(2), Next: items([]Unit{unitOf(b, 4, 4), u}, nil)}
		err := r.Update(t.Context(), func(tx *Tx) error { return tx.ImportJournal("test", &part) })
		if err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), fmt.Sprintf("line %d: %s: ", u.Line, u.ID)) {
			t.Errorf("%v, want %q", err, want)
		}
		if _, err := r.Device(t.Context(), b.IDs[4]); !errors.Is(err, ErrNotFound) || auditCount(t, r) != before {
			t.Errorf("%s: something was taken in: %v", want, err)
		}
	}
	if s, err := r.Station(t.Context(), "line1"); err != nil || s.Lines != 3 || s.Head != head(1) {
		t.Errorf("the head has moved: %+v, %v", s, err)
	}
	// Another import came between reading and applying.
	stale := JournalPart{Station: "line1", FromLines: 2, FromHead: head(9), Lines: 9, Head: head(2)}
	refused(t, r, ErrState, func(tx *Tx) error { return tx.ImportJournal("test", &stale) })
	must(t, r, func(tx *Tx) error { return tx.RevokeStation("test", "line1", "stolen") })
	late := JournalPart{Station: "line1", FromLines: 3, FromHead: head(1), Lines: 9, Head: head(2), Next: items([]Unit{unitOf(b, 4, 4)}, nil)}
	refused(t, r, ErrState, func(tx *Tx) error { return tx.ImportJournal("test", &late) })
	refused(t, r, ErrState, func(tx *Tx) error { return tx.ReserveBlock("test", &Block{ID: [16]byte{8}, Station: "line1"}, 1, nil) })
	refused(t, r, ErrState, func(tx *Tx) error { return tx.RegisterStation("test", "line1", []byte{1}, keyOf(500)) })
	if d, err := r.Device(t.Context(), b.IDs[0]); err != nil || d.State != DeviceActive {
		t.Error("a device of the station went with it:", d.State, err)
	}
}

// A reserved id is nobody else's, however it is asked for, and is never reserved twice.
func TestReservedIDs(t *testing.T) {
	r := newRegistry(t, Options{})
	b := reserve(t, r, "line1", 500, 3, 1)
	refused(t, r, ErrReserved, enrol(b.IDs[0]))
	if who, err := r.Reserved(t.Context(), b.IDs[0]); err != nil || who != "line1" {
		t.Error(who, err)
	}
	if who, err := r.Reserved(t.Context(), b.IDs[0]+1); err != nil || who != "" && !slices.Contains(b.IDs, b.IDs[0]+1) {
		t.Error(who, err)
	}
	err := r.Update(t.Context(), func(tx *Tx) error {
		return tx.exec(`INSERT INTO reserved_ids (id, block, state) VALUES (?, ?, 'free')`, int64(b.IDs[0]), b.ID[:])
	})
	if err == nil {
		t.Error("an id was reserved twice")
	}
	part := JournalPart{Station: "line1", Lines: 3, Head: head(1), Next: items([]Unit{unitOf(b, 0, 1)}, nil)}
	must(t, r, func(tx *Tx) error { return tx.ImportJournal("test", &part) })
	// The device that came of it is enrolled again as any other: same key, next certificate.
	c := certOf(identity.DevicePrincipal(b.IDs[0]), 9)
	must(t, r, func(tx *Tx) error {
		return tx.Enrol("test", Enrolment{ID: b.IDs[0], KeyHash: keyOf(1), CSR: []byte{1}, Certificate: &c, At: time.Now()})
	})
	// What is avoided is not drawn: with all but a few ids taken the draw would not end, so a
	// block is drawn twice and the second time the first's are passed over.
	avoid := map[identity.ID]bool{}
	for _, id := range b.IDs {
		avoid[id] = true
	}
	next := Block{ID: [16]byte{2}, Station: "line1", Expires: time.Now()}
	must(t, r, func(tx *Tx) error { return tx.ReserveBlock("test", &next, 1000, avoid) })
	for _, id := range next.IDs {
		if avoid[id] {
			t.Error("drawn though it was to be avoided:", id)
		}
	}
}

// An id that a device has is not reserved: with a source of ids that gives it first, the next is taken.
func TestReserveAvoidsDevices(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, enrol(7))
	b := Block{ID: [16]byte{1}, Station: "line1", Expires: time.Now()}
	must(t, r, func(tx *Tx) error {
		if err := tx.RegisterStation("test", "line1", []byte{1}, keyOf(1)); err != nil {
			return err
		}
		next := identity.ID(6)
		return tx.reserveBlock("test", &b, 2, nil, func() (identity.ID, error) { next++; return next, nil })
	})
	if fmt.Sprint(b.IDs) != "[00000008 00000009]" {
		t.Error(b.IDs)
	}
}

// A block that is made known again takes no id from a device or another block.
func TestAdoptAvoidsDevices(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, enrol(7))
	must(t, r, func(tx *Tx) error { return tx.RegisterStation("test", "line1", []byte{1}, keyOf(1)) })
	adopt := func(block byte, ids ...identity.ID) func(*Tx) error {
		b := Block{ID: [16]byte{block}, Station: "line1", Expires: time.Now(), IDs: ids}
		return func(tx *Tx) error { return tx.AdoptBlock("test", &b, stationCert("line1", 1)) }
	}
	refused(t, r, ErrExists, adopt(1, 6, 7))
	must(t, r, adopt(1, 6, 8))
	refused(t, r, ErrExists, adopt(2, 8, 9))
	must(t, r, adopt(2, 9))
}

// The key that a station was certified with is its key, until it is renewed.
func TestStationKey(t *testing.T) {
	r := newRegistry(t, Options{})
	register := func(key int) func(*Tx) error {
		return func(tx *Tx) error { return tx.RegisterStation("test", "line1", []byte{byte(key)}, keyOf(key)) }
	}
	must(t, r, register(1))
	must(t, r, register(2)) // nothing was certified yet
	must(t, r, func(tx *Tx) error { return tx.AddStationCertificate("test", stationCert("line1", 2)) })
	must(t, r, func(tx *Tx) error { return tx.AddStationCertificate("test", stationCert("line1", 2)) })
	refused(t, r, ErrKey, register(1))
	refused(t, r, ErrKey, func(tx *Tx) error { return tx.AddStationCertificate("test", stationCert("line1", 3)) })
	refused(t, r, ErrNotFound, func(tx *Tx) error { return tx.AddStationCertificate("test", stationCert("line9", 3)) })
	must(t, r, func(tx *Tx) error { return tx.RenewStation("test", []byte{3}, stationCert("line1", 3)) })
	refused(t, r, ErrKey, register(2))
	must(t, r, register(3))
	certs, err := r.StationCertificates(t.Context(), "line1")
	if err != nil || len(certs) != 2 || certs[0].KeyHash != keyOf(3) {
		t.Errorf("%+v, %v", certs, err)
	}
	for until, want := range map[time.Time]int{certs[0].NotAfter: 0, certs[0].NotAfter.Add(time.Second): 1} {
		if list, err := r.ExpiringStations(t.Context(), until); err != nil || len(list) != want {
			t.Errorf("%d stations end before %s, %v", len(list), until, err)
		}
	}
	if list, err := r.Stations(t.Context()); err != nil || len(list) != 1 || list[0].CSR[0] != 3 {
		t.Errorf("%+v, %v", list, err)
	}
	refused(t, r, ErrNotFound, func(tx *Tx) error { return tx.SignedBlock("test", [16]byte{9}, stationCert("line1", 3)) })
}

// importOnce imports all ids of block 1 as units and says when it begins, when all rows
// are written, and when they are committed.
func importOnce(path string) error {
	r, err := Open(context.Background(), path, Options{})
	if err != nil {
		return err
	}
	b, err := r.Block(context.Background(), [16]byte{1})
	if err != nil {
		return err
	}
	part := JournalPart{Station: "line1", Lines: 3, Head: head(1)}
	var units []Unit
	for i := range b.IDs {
		units = append(units, unitOf(b, i, 1000+i))
	}
	part.Next = items(units, nil)
	fmt.Println("begin")
	err = r.Update(context.Background(), func(tx *Tx) error {
		err := tx.ImportJournal("test", &part)
		fmt.Println("written")
		return err
	})
	fmt.Println("committed")
	return err
}

// TestKillLeavesNoHalfImport kills a process in the middle of an import: before it is
// acknowledged all of it is there or nothing, afterwards all.
func TestKillLeavesNoHalfImport(t *testing.T) {
	const count = 300
	for _, at := range []string{"begin", "begin", "begin", "written", "written", "written", "committed"} {
		r := newRegistry(t, Options{})
		b := reserve(t, r, "line1", 500, count, 1)
		path, before := r.Path(), auditCount(t, r)
		r.Close()
		killAt(t, child(t, "import", path), at)
		r = reopen(t, path, Options{})
		list, err := r.Devices(t.Context(), DeviceFilter{Limit: 2 * count})
		if err != nil {
			t.Fatal(err)
		}
		s, err := r.Station(t.Context(), "line1")
		if err != nil {
			t.Fatal(err)
		}
		use, err := r.Blocks(t.Context(), "line1")
		if err != nil {
			t.Fatal(err)
		}
		audited := auditCount(t, r) - before
		none := len(list) == 0 && s.Lines == 0 && use[0].Free == count && audited == 0
		all := len(list) == count && s.Lines == 3 && use[0].Used == count && audited == count+1
		if !all && (!none || at == "committed") {
			t.Errorf("killed at %q: %d devices, %d lines, %+v, %d audit rows", at, len(list), s.Lines, use[0], audited)
		}
		if none {
			part := JournalPart{Station: "line1", Lines: 3, Head: head(1), Next: items([]Unit{unitOf(b, 0, 1)}, nil)}
			must(t, r, func(tx *Tx) error { return tx.ImportJournal("test", &part) })
		}
	}
}

// killAt kills cmd when it prints a line.
func killAt(t *testing.T, cmd *exec.Cmd, at string) {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if lines.Text() == at {
			if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
				t.Fatal(err)
			}
			break
		}
	}
	_ = cmd.Wait() // killed, or just done
}

// BenchmarkImportUnits takes in 5,000 units at a time, each time with one commit.
func BenchmarkImportUnits(b *testing.B) {
	r := newRegistry(b, Options{})
	part := JournalPart{Station: "line1"}
	for n := 0; b.Loop(); n++ {
		b.StopTimer()
		block := reserve(b, r, "line1", 500, 5000, byte(n))
		part.FromLines, part.FromHead, part.Lines, part.Head = part.Lines, part.Head, part.Lines+1, head(n+1)
		var units []Unit
		for i := range block.IDs {
			units = append(units, unitOf(block, i, 10_000+5000*n+i))
		}
		part.Next = items(units, nil)
		b.StartTimer()
		must(b, r, func(tx *Tx) error { return tx.ImportJournal("test", &part) })
	}
	b.ReportMetric(5000*float64(b.N)/b.Elapsed().Seconds(), "units/s")
}

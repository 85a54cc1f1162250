package registry

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/internal/identity"
)

// restoreOf opens a copy of r as a restore makes it.
func restoreOf(t *testing.T, r *Registry) *Registry {
	t.Helper()
	path := filepath.Join(t.TempDir(), "copy.db")
	if err := r.Snapshot(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	c := reopen(t, path, Options{})
	must(t, c, func(tx *Tx) error { return tx.MarkRestored("test", time.Now(), 17) })
	return c
}

// A copy is of one moment, while changes go on.
func TestSnapshotIsOfOneMoment(t *testing.T) {
	r := newRegistry(t, Options{})
	stop, ended := make(chan struct{}), make(chan struct{})
	first := make(chan struct{})
	go func() {
		defer close(ended)
		for n := identity.ID(1); ; n++ { // a device and its tag in one change
			must(t, r, func(tx *Tx) error {
				if err := enrol(n)(tx); err != nil {
					return err
				}
				return tx.TagDevice("test", n, []string{"x"}, nil)
			})
			if n == 20 {
				close(first)
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	<-first
	c := restoreOf(t, r)
	close(stop)
	<-ended
	list, err := c.Devices(t.Context(), DeviceFilter{})
	if err != nil || len(list) < 20 {
		t.Fatalf("%d devices: %v", len(list), err)
	}
	for _, d := range list {
		if len(d.Tags) != 1 {
			t.Errorf("%s has the tags %v", d.ID, d.Tags)
		}
	}
	if err := r.Snapshot(t.Context(), c.Path()); err == nil {
		t.Error("a copy was written over a file")
	}
}

// After a restore the epoch is above every one that the fleet had meanwhile, also
// when the same backup is restored twice, and rises once.
func TestRestoreRaisesTheEpoch(t *testing.T) {
	r := newRegistry(t, Options{})
	start := func(r *Registry, at time.Time) (s ServerStart) {
		must(t, r, func(tx *Tx) (err error) { s, err = tx.RecordStart(0, 0, at); return err })
		return s
	}
	at := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	start(r, at)
	one, two := restoreOf(t, r), restoreOf(t, r)
	if m, err := one.Meta(t.Context()); err != nil || !m.RestoreDue || m.Requeue != 17 || m.Restored.IsZero() || m.BackupOf.IsZero() {
		t.Fatalf("%+v: %v", m, err)
	}
	a := start(one, at.Add(time.Minute))
	if !a.Raised || a.Epoch == 0 {
		t.Fatalf("the first start of the first restore: %+v", a)
	}
	if again := start(one, at.Add(time.Hour)); again.Raised || again.Epoch != a.Epoch {
		t.Errorf("the second start of the first restore: %+v after %+v", again, a)
	}
	if b := start(two, at.Add(time.Hour)); !b.Raised || b.Epoch <= a.Epoch {
		t.Errorf("the second restore begins epoch %d, the first %d", b.Epoch, a.Epoch)
	}
	for _, clock := range []time.Time{time.Unix(0, 0), time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)} {
		if e := epochOf(7, clock); e != 8 {
			t.Errorf("a clock at %v gives epoch %d", clock, e)
		}
	}
}

// What a device says that a restored registry cannot know is kept, once for each
// kind, and forgotten when the registry has caught up.
func TestAhead(t *testing.T) {
	r := newRegistry(t, Options{})
	const id = identity.ID(0xABCD1234)
	who := identity.DevicePrincipal(id)
	must(t, r, enrol(id))
	must(t, r, func(tx *Tx) error { return tx.ConfigApplied(id, 9, 0, "", time.Now()) })
	must(t, r, func(tx *Tx) error { return tx.AnchorsAhead(id, 2, time.Now()) })
	if n, err := r.AheadCount(t.Context()); n != 0 || err != nil {
		t.Fatalf("in a registry that was never restored %d devices are ahead: %v", n, err)
	}
	c := restoreOf(t, r)
	var cid uint64
	must(t, c, func(tx *Tx) (err error) {
		cid, err = tx.QueueCommand(Command{Device: id, Name: "x", CreatedBy: "test", Created: time.Now()})
		return err
	})
	cert := certOf(who, 1)
	for i := range 3 {
		must(t, c, func(tx *Tx) error { return tx.ConfigApplied(id, 10+uint64(i), 0, "", time.Now()) })
		must(t, c, func(tx *Tx) error {
			return tx.NoteAhead(Ahead{Device: id, Kind: AheadCertificate, Detail: fmt.Sprintf("%x", cert.Fingerprint), DER: cert.DER, At: time.Now()})
		})
	}
	must(t, c, func(tx *Tx) error {
		return tx.FinishCommand("device", CommandRef{Device: id, CID: cid}, Outcome{State: CommandUnknown, Status: 3, At: time.Now()})
	})
	expectAhead(t, c, "certificate command config")
	must(t, c, func(tx *Tx) error { return tx.AddCertificate("test", cert) })
	expectAhead(t, c, "command config")
	must(t, c, func(tx *Tx) error { _, err := tx.SetConfig("test", id, []byte("{}")); return err })
	expectAhead(t, c, "command")
	must(t, c, func(tx *Tx) error {
		return tx.FinishCommand("device", CommandRef{Device: id, CID: cid}, Outcome{State: CommandAnswered, At: time.Now()})
	})
	expectAhead(t, c, "")
	must(t, c, func(tx *Tx) error { return tx.AnchorsAhead(id, 2, time.Now()) })
	expectAhead(t, c, "anchors")
	must(t, c, func(tx *Tx) error { return tx.SaveAnchors(id, 1, 0) })
	expectAhead(t, c, "")
	refused(t, c, ErrNotFound, func(tx *Tx) error {
		return tx.NoteAhead(Ahead{Device: 1, Kind: AheadAnchors, Detail: "2", At: time.Now()})
	})
	refused(t, c, ErrInvalid, func(tx *Tx) error {
		return tx.NoteAhead(Ahead{Device: id, Kind: AheadCertificate, DER: make([]byte, maxAheadDER+1), At: time.Now()})
	})
}

func expectAhead(t *testing.T, r *Registry, kinds string) {
	t.Helper()
	list, err := r.Ahead(t.Context(), 0, 0)
	var have []string
	for _, a := range list {
		have = append(have, string(a.Kind))
	}
	if strings.Join(have, " ") != kinds || err != nil && !errors.Is(err, ErrNotFound) {
		t.Errorf("ahead are %q, not %q: %v", have, kinds, err)
	}
}

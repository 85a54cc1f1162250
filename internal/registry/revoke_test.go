package registry

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"hawser/internal/identity"
)

// certificateStates gives the states of a device's certificates by fingerprint.
func certificateStates(t *testing.T, r *Registry, id identity.ID) map[[32]byte]CertificateState {
	t.Helper()
	list, err := r.Certificates(t.Context(), identity.DevicePrincipal(id))
	if err != nil {
		t.Fatal(err)
	}
	states := map[[32]byte]CertificateState{}
	for _, c := range list {
		states[c.Fingerprint] = c.State
	}
	return states
}

// TestUnrevoke: the certificates that were active open the door again, a superseded
// one does not.
func TestUnrevoke(t *testing.T) {
	for _, to := range []DeviceState{DeviceRevoked, DeviceRetired} {
		r := newRegistry(t, Options{})
		id := identity.ID(0xABCD1234)
		p := identity.DevicePrincipal(id)
		must(t, r, enrol(id))
		old, now, next := certOf(p, int(id)), certOf(p, 2), certOf(p, 3)
		next.Generation = 2
		must(t, r, func(tx *Tx) error {
			return errors.Join(tx.AddCertificate("test", now), tx.AddCertificate("test", next))
		})
		before := certificateStates(t, r, id)
		for i, nonce := range []uint64{1, 2, 1} {
			must(t, r, func(tx *Tx) error {
				_, err := tx.SaveHello(id, Hello{Nonce: nonce, At: testMeta.Created, Pos: uint64(i + 1)})
				return err
			})
		}
		must(t, r, func(tx *Tx) error { return tx.SetDeviceState("test", id, to, "by mistake") })
		if to == DeviceRetired { // it was stolen from the bin: what it had before must survive that, too
			must(t, r, func(tx *Tx) error { return tx.SetDeviceState("test", id, DeviceRevoked, "stolen") })
		}
		if got := active(t, r); len(got) != 0 {
			t.Fatalf("%s: open doors: %v", to, got)
		}
		must(t, r, func(tx *Tx) error {
			n, err := tx.Unrevoke("test", id, "it was the other one")
			if n != 2 {
				t.Errorf("%d certificates came back", n)
			}
			return err
		})
		if got := certificateStates(t, r, id); fmt.Sprint(got) != fmt.Sprint(before) || got[old.Fingerprint] != CertificateSuperseded {
			t.Errorf("certificates: %v, before %v", got, before)
		}
		if d, err := r.Device(t.Context(), id); err != nil || d.State != DeviceActive || d.Reason != "" {
			t.Errorf("%+v, %v", d, err)
		}
		if n, err := r.CloneCount(t.Context()); err != nil || n != 0 {
			t.Errorf("%d reports of clones are left, %v", n, err)
		}
		refused(t, r, ErrState, func(tx *Tx) error { _, err := tx.Unrevoke("test", id, "again"); return err })
		must(t, r, func(tx *Tx) error { return tx.SetDeviceState("test", id, DeviceRevoked, "after all") })
		if got := active(t, r); len(got) != 0 {
			t.Errorf("revoked again: %v", got)
		}
	}
	r := newRegistry(t, Options{})
	refused(t, r, ErrNotFound, func(tx *Tx) error { _, err := tx.Unrevoke("test", 1, "x"); return err })
}

// TestUnrevokeDoesNotBringARetiredGenerationBack: it was retired while the device was
// revoked.
func TestUnrevokeDoesNotBringARetiredGenerationBack(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, enrol(1))
	must(t, r, func(tx *Tx) error {
		return errors.Join(tx.AddGeneration("test", 1, []byte{1}), tx.AddGeneration("test", 2, []byte{2}),
			tx.SetDeviceState("test", 1, DeviceRevoked, "x"), tx.retireGenerations(2))
	})
	must(t, r, func(tx *Tx) error {
		n, err := tx.Unrevoke("test", 1, "x")
		if n != 0 {
			t.Errorf("%d certificates of a retired generation came back", n)
		}
		return err
	})
	if got := active(t, r); len(got) != 0 {
		t.Errorf("open doors: %v", got)
	}
}

// TestBarMany: those that are revoked already are passed over, and one id that is
// not known refuses all.
func TestBarMany(t *testing.T) {
	r := newRegistry(t, Options{})
	for id := identity.ID(1); id <= 4; id++ {
		must(t, r, enrol(id))
	}
	bar := func(to DeviceState, ids ...identity.ID) (changed []identity.ID, err error) {
		err = r.Update(t.Context(), func(tx *Tx) (err error) { changed, err = tx.BarDevices("test", ids, to, "lot 7"); return err })
		return changed, err
	}
	if _, err := bar(DeviceRevoked, 1, 99, 2); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "00000063") {
		t.Errorf("an unknown id: %v", err)
	}
	if counts, err := r.DeviceCounts(t.Context()); err != nil || counts[DeviceActive] != 4 {
		t.Fatalf("something was revoked: %v, %v", counts, err)
	}
	if got, err := bar(DeviceRevoked, 2, 1, 2); err != nil || fmt.Sprint(got) != "[00000002 00000001]" {
		t.Errorf("%v, %v", got, err)
	}
	before := auditCount(t, r)
	if got, err := bar(DeviceRevoked, 1, 2, 3); err != nil || fmt.Sprint(got) != "[00000003]" {
		t.Errorf("again: %v, %v", got, err)
	}
	if n := auditCount(t, r) - before; n != 1 {
		t.Errorf("%d audit rows for one revocation", n)
	}
	if _, err := bar(DeviceRetired, 4, 1); !errors.Is(err, ErrState) {
		t.Errorf("a revoked one was retired: %v", err)
	}
	if _, err := bar(DeviceActive, 1); !errors.Is(err, ErrInvalid) {
		t.Errorf("bar as active: %v", err)
	}
	states, err := r.States(t.Context(), []identity.ID{1, 4, 99})
	if err != nil || fmt.Sprint(states) != fmt.Sprint(map[identity.ID]DeviceState{1: DeviceRevoked, 4: DeviceActive}) {
		t.Errorf("%v, %v", states, err)
	}
}

// TestQueueDroppedIsAudited of devices that are barred, and of no other.
func TestQueueDroppedIsAudited(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, enrol(1))
	must(t, r, enrol(2))
	must(t, r, func(tx *Tx) error { return tx.SetDeviceState("test", 1, DeviceQuarantined, "x") })
	before := auditCount(t, r)
	must(t, r, func(tx *Tx) error {
		return errors.Join(tx.QueueDropped("server", 1, 7), tx.QueueDropped("server", 2, 8), tx.QueueDropped("server", 99, 9))
	})
	list, err := r.Audit(t.Context(), AuditFilter{Action: "device.queue-dropped"})
	if err != nil || auditCount(t, r) != before+1 || len(list) != 1 || list[0].Subject != "00000001" || list[0].Detail != `{"messages":"7"}` {
		t.Errorf("%+v, %v", list, err)
	}
}

// TestCloneSequences: the boots in the order in which the log has them. A lower-case
// letter is a hello that is read again from the log, "." a restart, "!" a release.
func TestCloneSequences(t *testing.T) {
	for _, c := range []struct {
		what, boots string
		want        string // pairs that are reported, "back other"
	}{
		{"one boot", "A", ""},
		{"half-open socket, or a hello sent twice", "AA", ""},
		{"a reboot", "AB", ""},
		{"a reboot, then half-open sockets", "AABBB", ""},
		{"two reboots", "ABC", ""},
		{"many reboots", "ABCDEFGHIJKLM", ""},
		{"two holders", "ABA", "AB"},
		{"two holders that go on: once", "ABABABBAA", "AB"},
		{"two holders, seen at the second look", "AABBA", "AB"},
		{"three holders", "ABCA", "AC"},
		{"three holders that go on", "ABCABC", "AC BA CB"},
		{"the restart between", "AB.A", "AB"},
		{"restarts everywhere", ".A.A.B.A.B.", "AB"},
		{"only a reboot over a restart", "A.B", ""},
		{"read again after a crash", "AB.ab", ""},
		{"read again, with the proof", "ABA.aba", "AB"},
		{"read again, then another", "AB.abC", ""},
		{"released: the proof begins anew", "ABA!BA", "AB AB"},
		{"released: one of them has gone", "ABA!AAA", "AB"},
		{"released: a reboot is none", "ABA!C", "AB"},
		{"read again after a release", "ABA!.abaA", "AB"},
		{"no nonce", "0A00A", ""},
		{"too long ago", "ABCDEFGHIA", ""},
		{"just not too long ago", "ABCDEFGHA", "AH"},
	} {
		t.Run(c.what, func(t *testing.T) {
			r := newRegistry(t, Options{})
			must(t, r, enrol(5))
			must(t, r, enrol(6))
			if got := playBoots(t, r, c.boots); got != c.want {
				t.Errorf("%s: reported %q, want %q", c.boots, got, c.want)
			}
		})
	}
}

// playBoots gives the pairs that are reported.
func playBoots(t *testing.T, r *Registry, boots string) string {
	t.Helper()
	var pairs []string
	said := map[rune][]uint64{} // positions of each boot's hellos
	again := map[rune]int{}
	pos := uint64(1 << 16)
	for i, b := range boots {
		switch b {
		case '.':
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			r = reopen(t, r.Path(), Options{})
			continue
		case '!':
			must(t, r, func(tx *Tx) error { return tx.Release("test", 5, "looked at") })
			continue
		}
		at := pos
		if b >= 'a' {
			b -= 'a' - 'A'
			at = said[b][again[b]]
			again[b]++
		} else {
			pos += 3
			said[b] = append(said[b], at)
		}
		h := Hello{Nonce: uint64(b - '0'), Remote: fmt.Sprintf("192.0.2.%d:%d", b, i), At: testMeta.Created.Add(time.Duration(at)), Pos: at}
		must(t, r, func(tx *Tx) error {
			clone, err := tx.SaveHello(5, h)
			if clone != nil {
				pairs = append(pairs, string(rune(clone.Back.Nonce+'0'))+string(rune(clone.Other.Nonce+'0')))
				for _, b := range []Boot{clone.Back, clone.Other} {
					if !strings.HasPrefix(b.Remote, fmt.Sprintf("192.0.2.%d:", b.Nonce+'0')) {
						t.Errorf("boot %c is said to be at %s", rune(b.Nonce+'0'), b.Remote)
					}
				}
			}
			return err
		})
	}
	return strings.Join(pairs, " ")
}

// TestClonesArePersistentAndBounded: a holder of the key can draw nonces for ever.
func TestClonesArePersistentAndBounded(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, enrol(5))
	must(t, r, enrol(6))
	pos, found := uint64(0), 0
	say := func(id identity.ID, nonce uint64) {
		pos++
		must(t, r, func(tx *Tx) error {
			c, err := tx.SaveHello(id, Hello{Nonce: nonce, Remote: fmt.Sprintf("192.0.2.1:%d", pos), At: testMeta.Created, Pos: pos})
			if c != nil {
				found++
			}
			return err
		})
	}
	say(6, 77) // somebody else's nonce has nothing to do with it
	for n := uint64(100); n < 150; n++ {
		say(5, 1)
		say(5, n)
	}
	r.Close()
	r = reopen(t, r.Path(), Options{})
	say(6, 77)
	list, err := r.Clones(t.Context(), 5, 0)
	if err != nil || len(list) != maxClones || found != maxClones {
		t.Fatalf("%d clones, %d told, %v", len(list), found, err)
	}
	var boots, devices int
	if err := r.read.QueryRow(`SELECT COUNT(*) FROM boots WHERE device = 5`).Scan(&boots); err != nil || boots != maxBoots {
		t.Errorf("%d boots, %v", boots, err)
	}
	if devices, err = r.CloneCount(t.Context()); err != nil || devices != 1 {
		t.Errorf("%d devices, %v", devices, err)
	}
	if list, err := r.Clones(t.Context(), 6, 0); err != nil || len(list) != 0 {
		t.Errorf("clones of another: %v, %v", list, err)
	}
	audit, err := r.Audit(t.Context(), AuditFilter{Action: "device.clone"})
	if err != nil || len(audit) != maxClones || !strings.Contains(audit[0].Detail, `"remote":"192.0.2.1:`) || audit[0].Subject != "00000005" {
		t.Errorf("%d rows, %v: %+v", len(audit), err, audit)
	}
	must(t, r, func(tx *Tx) error { return tx.Release("test", 5, "replaced") })
	refused(t, r, ErrState, func(tx *Tx) error { return tx.Release("test", 5, "again") })
	if n, err := r.CloneCount(t.Context()); err != nil || n != 0 {
		t.Errorf("%d devices after the release, %v", n, err)
	}
}

// TestBootsAreWrittenWhenTheyChange, and not at each reconnect.
func TestBootsAreWrittenWhenTheyChange(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, enrol(5))
	for i, c := range []struct{ remote, want string }{
		{"", ""},
		{"192.0.2.1:1", "192.0.2.1:1"},
		{"192.0.2.1:2", "192.0.2.1:1"}, // the port alone is no news
		{"[2001:db8::1]:2", "[2001:db8::1]:2"},
		{"", "[2001:db8::1]:2"},
	} {
		must(t, r, func(tx *Tx) error {
			_, err := tx.SaveHello(5, Hello{Nonce: 9, Remote: c.remote, At: testMeta.Created, Pos: uint64(i + 1)})
			return err
		})
		var remote string
		if err := r.read.QueryRow(`SELECT remote FROM boots WHERE device = 5`).Scan(&remote); err != nil || remote != c.want {
			t.Errorf("after %q: %q, %v", c.remote, remote, err)
		}
	}
}

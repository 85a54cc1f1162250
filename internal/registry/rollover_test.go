package registry

import (
	"errors"
	"testing"
	"time"

	"hawser/internal/identity"
)

// rolling gives a registry with devices 1 to n that have a certificate of generation 1,
// in a rollover to generation 2 whose CA is there.
func rolling(t *testing.T, n int, o Options) *Registry {
	t.Helper()
	r := newRegistry(t, o)
	must(t, r, func(tx *Tx) error {
		errs := []error{tx.AddGeneration("test", 1, []byte("ca 1")), tx.AddAnchorSet("test", 1, []byte("set 1"), true)}
		for i := 1; i <= n; i++ {
			id := identity.ID(i)
			c := generationCert(id, 1)
			errs = append(errs, tx.Enrol("test", Enrolment{ID: id, KeyHash: keyOf(i), CSR: []byte{byte(i)}, Certificate: &c, At: time.Now()}))
		}
		_, err := tx.StartRollover("test", Rollover{FromGeneration: 1, ToGeneration: 2})
		return errors.Join(append(errs, err, tx.AddGeneration("test", 2, []byte("ca 2")))...)
	})
	return r
}

func generationCert(id identity.ID, generation uint32) Certificate {
	c := certOf(identity.DevicePrincipal(id), int(id)*10+int(generation))
	c.Generation = generation
	return c
}

func last(t *testing.T, r *Registry) Rollover {
	t.Helper()
	v, err := r.LastRollover(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func progress(t *testing.T, r *Registry) map[identity.ID]Progress {
	t.Helper()
	out := map[identity.ID]Progress{}
	err := r.Members(t.Context(), last(t, r), func(m Member) error { out[m.ID] = m.Progress; return nil })
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestRolloverCertificateKey: only the device's own key, only the generation that the
// rollover goes to, and a quarantined device is not let in by it.
func TestRolloverCertificateKey(t *testing.T) {
	var told []Change
	r := rolling(t, 3, Options{Changed: func(c Change) { told = append(told, c) }})
	add := func(id identity.ID, generation uint32, key [32]byte) func(*Tx) error {
		return func(tx *Tx) error {
			_, err := tx.RolloverCertificate("test", generationCert(id, generation), key)
			return err
		}
	}
	refused(t, r, ErrKey, add(1, 2, keyOf(2)))
	refused(t, r, ErrInvalid, add(1, 3, keyOf(1)))
	must(t, r, add(1, 2, keyOf(1)))
	must(t, r, func(tx *Tx) error {
		added, err := tx.RolloverCertificate("test", generationCert(1, 2), keyOf(1))
		if added {
			t.Error("the same certificate was added twice")
		}
		return err
	})
	must(t, r, func(tx *Tx) error {
		return errors.Join(tx.SetDeviceState("test", 2, DeviceQuarantined, ""), tx.SetDeviceState("test", 3, DeviceRevoked, ""))
	})
	told = nil
	must(t, r, add(2, 2, keyOf(2)))
	must(t, r, add(3, 2, keyOf(3)))
	if len(told) != 0 {
		t.Errorf("the door was opened: %v", told)
	}
	list, err := r.Unsigned(t.Context(), 2, 0, 10)
	if err != nil || len(list) != 0 {
		t.Errorf("unsigned: %v, %v", list, err)
	}
}

// TestRetireWaits: nobody is left behind who is not named, and who is left behind is out.
func TestRetireWaits(t *testing.T) {
	removed := map[identity.Principal]bool{}
	r := rolling(t, 3, Options{Changed: func(c Change) {
		if c.Kind == CertificateRemoved {
			removed[c.Principal] = true
		}
	}})
	must(t, r, func(tx *Tx) error {
		for id := identity.ID(1); id <= 2; id++ {
			if _, err := tx.RolloverCertificate("test", generationCert(id, 2), keyOf(int(id))); err != nil {
				return err
			}
		}
		return tx.RefuseRollover("test", 3, "no journal")
	})
	refused(t, r, ErrState, func(tx *Tx) error { return tx.RetireRollover("test", nil) }) // before it moves
	must(t, r, func(tx *Tx) error { return tx.RolloverStep("test", RolloverMoving) })
	must(t, r, func(tx *Tx) error {
		return errors.Join(tx.SaveFingerprint(1, generationCert(1, 2).Fingerprint), tx.SaveFingerprint(2, generationCert(2, 1).Fingerprint))
	})
	if p := progress(t, r); p[1] != ProgressProven || p[2] == ProgressProven || p[3] != ProgressFailed {
		t.Errorf("progress %v", p)
	}
	refused(t, r, ErrState, func(tx *Tx) error { return tx.RetireRollover("test", nil) })
	refused(t, r, ErrState, func(tx *Tx) error { return tx.RetireRollover("test", []identity.ID{2}) })
	refused(t, r, ErrState, func(tx *Tx) error { return tx.RetireRollover("test", []identity.ID{1, 3}) })
	must(t, r, func(tx *Tx) error { return tx.RetireRollover("test", []identity.ID{2, 3}) })
	err := r.ActiveCertificates(t.Context(), func(a ActiveCertificate) error {
		if a.Generation < 2 {
			t.Errorf("%s still gets in with generation %d", a.Principal, a.Generation)
		}
		return nil
	})
	if err != nil || len(removed) != 3 {
		t.Errorf("%d devices were told of, %v", len(removed), err)
	}
	gens, err := r.Generations(t.Context())
	if err != nil || gens[0].Active || !gens[1].Active {
		t.Errorf("generations %v, %v", gens, err)
	}
	must(t, r, func(tx *Tx) error { _, err := tx.StartRollover("test", Rollover{ToGeneration: 3}); return err })
	refused(t, r, ErrState, func(tx *Tx) error { _, err := tx.StartRollover("test", Rollover{ToAnchors: 2}); return err })
}

// TestFallingBack: a device that connects with its old certificate again has not arrived,
// whatever was before.
func TestFallingBack(t *testing.T) {
	r := rolling(t, 1, Options{})
	must(t, r, func(tx *Tx) error {
		_, err := tx.RolloverCertificate("test", generationCert(1, 2), keyOf(1))
		return errors.Join(err, tx.RolloverStep("test", RolloverMoving), tx.SaveFingerprint(1, generationCert(1, 2).Fingerprint))
	})
	due, err := r.Due(t.Context(), last(t, r), 1)
	if err != nil || due.Certificate != nil || progress(t, r)[1] != ProgressProven {
		t.Errorf("due %v, %v", due, err)
	}
	must(t, r, func(tx *Tx) error { return tx.SaveFingerprint(1, generationCert(1, 1).Fingerprint) })
	due, err = r.Due(t.Context(), last(t, r), 1)
	if err != nil || due.Generation != 2 || progress(t, r)[1] == ProgressProven {
		t.Errorf("due %v, %v", due, err)
	}
}

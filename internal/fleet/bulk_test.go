package fleet

import (
	"errors"
	"testing"
	"time"

	"hawser/internal/identity"
	"hawser/internal/pki"
)

// TestEnrollMany: every certificate is the one that its device asked for, and one
// device that may not be enrolled leaves all of them out.
func TestEnrollMany(t *testing.T) {
	l := mustInit(t, true)
	ca := mustCA(t, l.CADir("a"), "")
	list := make([]NewDevice, 40)
	for i := range list {
		list[i] = NewDevice{ID: identity.ID(i + 1), CSR: csrOf(t, newKey(t)), Class: "pump"}
	}
	certs, err := ca.EnrollDevices(list, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range certs {
		id, _, _, err := pki.VerifyDeviceLeaf(c.Raw, l.Trust().DeviceCAs)
		if err != nil || id != list[i].ID || !list[i].CSR.Pub.Equal(c.PublicKey) {
			t.Fatal(i, id, err)
		}
	}
	n := ca.journal.Len()
	fresh := NewDevice{ID: 100, CSR: csrOf(t, newKey(t))}
	for _, bad := range []NewDevice{{ID: 1, CSR: csrOf(t, newKey(t))}, {ID: 101, CSR: list[0].CSR}, {ID: 101, CSR: fresh.CSR}} {
		if _, err := ca.EnrollDevices([]NewDevice{fresh, bad}, time.Now()); !errors.Is(err, pki.ErrBound) {
			t.Error(bad.ID, err)
		}
	}
	if _, err := ca.EnrollDevices([]NewDevice{fresh, {ID: 102, CSR: csrOf(t, newKey(t)), Class: "No Class"}}, time.Now()); err == nil {
		t.Error("a class of capitals passed")
	}
	if ca.journal.Len() != n {
		t.Error("a refused batch left lines in the journal")
	}
}

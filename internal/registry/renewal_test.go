package registry

import (
	"fmt"
	"testing"
	"time"

	"hawser/internal/identity"
)

// validCert is certOf with an end that is still to come.
func validCert(p identity.Principal, n int) Certificate {
	c := certOf(p, n)
	c.NotAfter = time.Now().Add(time.Hour)
	return c
}

// states gives the states of a service's certificates by the number certOf made them from.
func states(t *testing.T, r *Registry, p identity.Principal, n int) (list []CertificateState) {
	t.Helper()
	all, err := r.Certificates(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		for _, c := range all {
			if c.Fingerprint == certOf(p, i+1).Fingerprint {
				list = append(list, c.State)
			}
		}
	}
	return list
}

// A renewal leaves the certificate in use alone until the new one was used; one that
// was never used gives way to the next.
func TestRenewalOverlaps(t *testing.T) {
	r := newRegistry(t, Options{})
	dash := identity.Principal{Kind: identity.Service, Name: "dash"}
	must(t, r, func(tx *Tx) error { return tx.AddService("test", "dash", nil) })
	add := func(n int) {
		t.Helper()
		must(t, r, func(tx *Tx) error { return tx.AddCertificate("test", validCert(dash, n)) })
	}
	check := func(want ...CertificateState) {
		t.Helper()
		if got := states(t, r, dash, len(want)); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%v, not %v", got, want)
		}
	}
	const on, off = CertificateActive, CertificateSuperseded
	add(1)
	check(on)
	add(2)
	check(on, on)
	if list, err := r.Overlaps(t.Context()); err != nil || len(list) != 1 || list[0].Name != "dash" || list[0].Newer != certOf(dash, 2).Fingerprint || time.Since(list[0].Since) > time.Hour {
		t.Errorf("%+v, %v", list, err)
	}
	must(t, r, func(tx *Tx) error { return tx.ServiceUsed("test", "dash", certOf(dash, 1).Fingerprint) })
	check(on, on)
	add(3)
	check(on, off, on)
	must(t, r, func(tx *Tx) error { return tx.ServiceUsed("test", "dash", certOf(dash, 3).Fingerprint) })
	check(off, off, on)
	refused(t, r, ErrNotFound, func(tx *Tx) error { return tx.ServiceUsed("test", "dash", certOf(dash, 1).Fingerprint) })
	if list, err := r.Overlaps(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
	must(t, r, func(tx *Tx) error { return tx.ReplaceCertificate("test", certOf(dash, 4)) })
	check(off, off, off, on)
	refused(t, r, ErrExists, func(tx *Tx) error { return tx.AddCertificate("test", certOf(dash, 4)) })
}

// A certificate that has ended is not in use: the newer one stays.
func TestRenewalAfterTheEnd(t *testing.T) {
	r := newRegistry(t, Options{})
	dash := identity.Principal{Kind: identity.Service, Name: "dash"}
	must(t, r, func(tx *Tx) error { return tx.AddService("test", "dash", nil) })
	for n := 1; n <= 3; n++ {
		c := validCert(dash, n)
		if n == 1 {
			c.NotAfter = time.Now().Add(-time.Hour)
		}
		must(t, r, func(tx *Tx) error { return tx.AddCertificate("test", c) })
	}
	if got := states(t, r, dash, 3); fmt.Sprint(got) != "[superseded active active]" {
		t.Error(got)
	}
}

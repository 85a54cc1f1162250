package server

import (
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/mqtt"
	"hawser/internal/pki"
	"hawser/internal/registry"
)

// TestRevokedCrowd revokes many devices at once: half are connected, and for each of
// the others messages wait. HAWSER_CROWD is how many (1000 for the goal: the last
// connection ends within a second), and that times hundred are known beside them; it
// logs how long things take.
func TestRevokedCrowd(t *testing.T) {
	n := 20
	if s := os.Getenv("HAWSER_CROWD"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	r := serve(t, makeFleet(t))
	r.strangers(100 * n)
	ids, certs := r.crowd(n)
	_, service := r.service("app", admin.Grant{Mode: "write", Filter: "private/+/d/app/#"})
	pub := r.connect(service, "app")
	var live []*client
	for i, id := range ids {
		c := r.connect(certs[i], id.String(), func(p *mqtt.Connect) { p.Props.SessionExpiry = 3600 })
		if i%2 == 0 {
			live = append(live, c)
			continue
		}
		c.queueing(id)
		for range 3 {
			pub.publish("private/"+id.String()+"/d/app/x", "x")
		}
	}
	until(t, "the live ones alone", func() bool { return len(r.srv.br.OnlineDevices()) == len(live) })
	ended := make(chan time.Time, len(live))
	for _, c := range live {
		go func() {
			for {
				if _, _, _, err := c.next(); err != nil {
					ended <- time.Now()
					return
				}
			}
		}()
	}
	start := time.Now()
	out, err := r.api.RevokeMany(t.Context(), ids, "all of them")
	answered := time.Since(start)
	r.ok(err)
	var last time.Duration
	for range live {
		last = max(last, (<-ended).Sub(start))
	}
	t.Logf("%d of %d revoked: the last of %d connections ended after %v, %d messages dropped and answered after %v",
		n, 101*n, len(live), last, *out.Dropped, answered)
	if out.Changed != n || *out.Dropped != uint64(3*(n-len(live))) {
		t.Errorf("%+v, %d dropped", out, *out.Dropped)
	}
	until(t, "the end of all sessions", func() bool { return len(r.srv.br.OnlineDevices()) == 0 })
	pub.publish("private/"+ids[0].String()+"/d/app/x", "to nobody")
}

// queueing gives a device a session for which messages wait, and ends its connection.
func (c *client) queueing(id identity.ID) {
	c.t.Helper()
	c.subscribe("private/" + id.String() + "/d/app/#")
	c.send((&mqtt.Disconnect{}).Append(nil, mqtt.V5))
	c.ended()
}

// crowd enrols devices that can connect.
func (r *rig) crowd(n int) (ids []identity.ID, certs []tls.Certificate) {
	r.t.Helper()
	list := make([]fleet.NewDevice, n)
	calls := make([]admin.NamedEnrolment, n)
	for i := range list {
		key, err := pki.GenerateKey()
		r.ok(err)
		list[i] = fleet.NewDevice{ID: 0xC0000000 + identity.ID(i), CSR: csrOf(r.t, key)}
		ids, certs = append(ids, list[i].ID), append(certs, tls.Certificate{PrivateKey: key})
	}
	ca, err := fleet.OpenCA(filepath.Join(r.dir, "ca-a"), nil)
	r.ok(err)
	issued, err := ca.EnrollDevices(list, time.Now())
	r.ok(err)
	r.ok(ca.Close())
	for i, c := range issued {
		certs[i].Certificate = [][]byte{c.Raw}
		calls[i] = admin.NamedEnrolment{ID: ids[i], Enrolment: admin.Enrolment{CSR: list[i].CSR.DER, Certificate: c.Raw}}
	}
	r.ok(r.api.EnrollMany(r.t.Context(), calls))
	return ids, certs
}

// strangers makes devices known that never connect.
func (r *rig) strangers(n int) {
	r.t.Helper()
	for first := 0; first < n; first += 10_000 {
		r.ok(r.srv.reg.Update(r.t.Context(), func(tx *registry.Tx) error {
			for i := first; i < min(n, first+10_000); i++ {
				id := identity.ID(0xD0000000 + i)
				der := binary.BigEndian.AppendUint32([]byte("stranger"), uint32(id))
				c := registry.Certificate{Fingerprint: sha256.Sum256(der), Principal: identity.DevicePrincipal(id), Generation: 1, DER: der,
					NotBefore: time.Now(), NotAfter: time.Now().AddDate(1, 0, 0)}
				err := tx.Enrol("test", registry.Enrolment{ID: id, KeyHash: sha256.Sum256(fmt.Append(nil, id)), CSR: der, Certificate: &c, At: time.Now()})
				if err != nil {
					return err
				}
			}
			return nil
		}))
	}
}

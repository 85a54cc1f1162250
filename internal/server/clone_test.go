package server

import (
	"crypto/tls"
	"database/sql"
	"strings"
	"testing"
	"time"

	"hawser/internal/admin"
	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/mqtt"
)

// holder is one of those who have the key of a device.
type holder struct {
	r     *rig
	cert  tls.Certificate
	id    string
	nonce uint64
	c     *client
}

func helloOf(nonce uint64) string {
	return string(message.Hello{Class: "sensor", Nonce: nonce}.Encode(message.JSON))
}

// speak connects and says hello; it gives the address it did so from.
func (h *holder) speak() string {
	h.r.t.Helper()
	before := h.heard()
	h.c = h.r.connect(h.cert, h.id)
	if code := h.c.publish("private/"+h.id+"/u/hello", helloOf(h.nonce)); code != mqtt.Success {
		h.r.t.Fatalf("hello: %v", code)
	}
	until(h.r.t, "hello in the registry", func() bool { return h.heard().After(before) })
	h.settled()
	return h.c.conn.LocalAddr().String()
}

// heard is when the last hello came, by the log's clock.
func (h *holder) heard() time.Time {
	h.r.t.Helper()
	id, err := identity.ParseID(h.id)
	h.r.ok(err)
	d, err := h.r.api.Device(h.r.t.Context(), id)
	h.r.ok(err)
	if d.Hello == nil {
		return time.Time{}
	}
	return d.Hello.At
}

// settled waits until what the log has of hellos is in the registry, and followed.
func (h *holder) settled() {
	h.r.t.Helper()
	until(h.r.t, "the last hello", func() bool { return h.r.srv.up.floor() == 0 })
	h.r.ok(h.r.srv.feed.sync(h.r.t.Context()))
}

func (r *rig) clones(id identity.ID) []admin.Clone {
	r.t.Helper()
	d, err := r.api.Device(r.t.Context(), id)
	r.ok(err)
	return d.Clones
}

// TestTwoHoldersAreReported with both addresses, once, and not again when the log is
// read again at a start.
func TestTwoHoldersAreReported(t *testing.T) {
	r := serve(t, makeFleet(t))
	id, _, cert := r.device("ABCD1234")
	a, b := &holder{r: r, cert: cert, id: "ABCD1234", nonce: 1}, &holder{r: r, cert: cert, id: "ABCD1234", nonce: 1<<64 - 1}
	a.speak()
	a.speak() // over a socket that the server still takes for open
	other := b.speak()
	b.speak()
	if got := r.clones(id); len(got) != 0 {
		t.Fatalf("a reboot was reported: %+v", got)
	}
	r.stop()
	r.start()
	back := a.speak()
	b.speak()
	a.speak()
	got := r.clones(id)
	if len(got) != 1 {
		t.Fatalf("reported: %+v", got)
	}
	if got[0].Back.Nonce != 1 || got[0].Other.Nonce != 1<<64-1 || got[0].Back.Remote != back ||
		!strings.HasPrefix(got[0].Other.Remote, "127.0.0.1:") || got[0].Other.Remote == back {
		t.Errorf("reported: %+v, one at %s, the other at %s", got, back, other)
	}
	if got[0].Other.Remote != other {
		t.Errorf("the other is said to be at %s, not %s", got[0].Other.Remote, other)
	}
	a.c.ping()
	r.logged("two holders of one identity", "ABCD1234", back, other, "policy=report")
	if s, err := r.api.Status(t.Context()); err != nil || s.Clones != 1 || s.Devices["active"] != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	if _, body := get(t, "http://"+r.srv.MetricsAddr().String()+"/metrics"); !strings.Contains(body, "hawser_clones_total 1\n") ||
		!strings.Contains(body, "hawser_devices_cloned 1\n") {
		t.Errorf("metrics: %s", body)
	}
	r.stop()
	forgetCheckpoint(t, r)
	r.start()
	a.settled()
	audit, err := r.api.Audit(t.Context(), admin.AuditFilter{Action: "device.clone"})
	r.ok(err)
	if len(audit) != 1 || audit[0].Actor != "server" || len(r.clones(id)) != 1 || r.srv.up.clones.Load() != 0 {
		t.Errorf("after the whole log was read again: %+v, %+v", audit, r.clones(id))
	}
	r.ok(r.api.Release(t.Context(), id, "the copy was found"))
	if got := r.clones(id); len(got) != 0 {
		t.Errorf("after the release: %+v", got)
	}
}

// forgetCheckpoint makes the next start read the whole log, as after a crash.
func forgetCheckpoint(t *testing.T, r *rig) {
	t.Helper()
	path := r.dir + "/server/registry.db"
	db, err := sql.Open("sqlite", path)
	r.ok(err)
	defer db.Close()
	_, err = db.ExecContext(t.Context(), `UPDATE meta SET checkpoint = 0`)
	r.ok(err)
}

// TestTwoHoldersAreQuarantined: neither stays, neither gets in, until the release;
// then the proof begins anew.
func TestTwoHoldersAreQuarantined(t *testing.T) {
	r := &rig{t: t, dir: makeFleet(t), book: &logBook{}, onClone: "quarantine"}
	t.Cleanup(r.stop)
	r.start()
	id, _, cert := r.device("ABCD1234")
	_, _, stranger := r.device("ABCD1235")
	a, b := &holder{r: r, cert: cert, id: "ABCD1234", nonce: 1}, &holder{r: r, cert: cert, id: "ABCD1234", nonce: 2}
	x := r.connect(stranger, "ABCD1235")
	for round := range 2 {
		one := a.speak()
		other := b.speak()
		back := a.speak()
		a.c.ended()
		b.c.ended()
		if _, err := r.dial(cert, "ABCD1234"); err == nil {
			t.Fatal("a holder of a doubled identity was let in")
		}
		d, err := r.api.Device(t.Context(), id)
		r.ok(err)
		if d.State != "quarantined" || !strings.Contains(d.Reason, other) || !strings.Contains(d.Reason, back) || strings.Contains(d.Reason, one) {
			t.Errorf("round %d: %s: %s, want %s and %s", round, d.State, d.Reason, back, other)
		}
		r.ok(r.api.Release(t.Context(), id, "looked at"))
		if err := r.api.Release(t.Context(), id, "again"); !admin.IsKind(err, admin.Conflict) {
			t.Errorf("released twice: %v", err)
		}
	}
	b.speak() // the one that is left
	b.speak()
	if d, err := r.api.Device(t.Context(), id); err != nil || d.State != "active" {
		t.Errorf("%+v, %v", d, err)
	}
	x.ping()
}

// TestNobodyGetsAnotherQuarantined: only the holder of a device's key says its hello,
// whatever else is granted.
func TestNobodyGetsAnotherQuarantined(t *testing.T) {
	r := &rig{t: t, dir: makeFleet(t), book: &logBook{}, onClone: "quarantine"}
	t.Cleanup(r.stop)
	r.start()
	id, _, victim := r.device("ABCD1234")
	_, _, thief := r.device("ABCD1235")
	_, service := r.service("app", admin.Grant{Mode: "write", Filter: "#"})
	v := &holder{r: r, cert: victim, id: "ABCD1234", nonce: 1}
	v.speak()
	for name, cert := range map[string]tls.Certificate{"ABCD1235": thief, "app": service} {
		c := r.connect(cert, name)
		for _, nonce := range []uint64{2, 1, 2, 1} {
			if code := c.publish("private/ABCD1234/u/hello", helloOf(nonce)); code != mqtt.NotAuthorized {
				t.Errorf("%s said another's hello: %v", name, code)
			}
		}
		v.settled()
	}
	v.c.ping()
	if d, err := r.api.Device(t.Context(), id); err != nil || d.State != "active" || len(d.Clones) != 0 || d.Hello.Nonce != 1 {
		t.Errorf("%+v, %v", d, err)
	}
}

func TestUnknownClonePolicyIsRefused(t *testing.T) {
	cfg := Config{Dir: makeFleet(t), Listen: "127.0.0.1:0", OnClone: "revoke"}
	if _, err := Start(t.Context(), cfg); !admin.IsKind(err, admin.Invalid) {
		t.Errorf("got %v", err)
	}
}

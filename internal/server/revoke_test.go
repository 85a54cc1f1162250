package server

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"hawser/internal/admin"
	"hawser/internal/identity"
)

// queueFor makes device dir wait for topics of its own and puts n messages into its queue.
func (r *rig) queueFor(pub *client, dir, id string, n int) {
	r.t.Helper()
	if out, err := r.mosquitto("mosquitto_sub", dir, id, "-c", "-q", "1", "-t", "private/"+id+"/d/app/#", "-E"); err != nil {
		r.t.Fatalf("mosquitto_sub: %v: %s", err, out)
	}
	for i := range n {
		pub.publish("private/"+id+"/d/app/x", fmt.Sprint(i))
	}
}

// TestManyRevokedAtOnce: those of a list, once, with what was queued for them; a
// second time they are counted.
func TestManyRevokedAtOnce(t *testing.T) {
	r := serve(t, makeFleet(t))
	_, service := r.service("app", admin.Grant{Mode: "write", Filter: "private/+/d/app/#"})
	pub := r.connect(service, "app")
	var ids []identity.ID
	var live []*client
	for i := range 8 {
		name := fmt.Sprintf("ABCD00%02d", i)
		id, dir, cert := r.device(name)
		ids = append(ids, id)
		if i < 2 {
			r.queueFor(pub, dir, name, 3+i)
			continue
		}
		live = append(live, r.connect(cert, name))
	}
	_, _, other := r.device("ABCD1234")
	stays := r.connect(other, "ABCD1234")
	if _, err := r.api.RevokeMany(t.Context(), append(ids, 0xFF), "lot 7"); !admin.IsKind(err, admin.NotFound) {
		t.Errorf("with an id that is not known: %v", err)
	}
	live[0].ping()
	r.ok(r.api.Revoke(t.Context(), ids[7], "first"))
	out, err := r.api.RevokeMany(t.Context(), ids, "lot 7")
	r.ok(err)
	if out.Changed != 7 || out.Already != 1 || out.Dropped == nil || *out.Dropped != 7 {
		t.Errorf("%+v", out)
	}
	for _, c := range live {
		c.ended()
	}
	stays.ping()
	audit, err := r.api.Audit(t.Context(), admin.AuditFilter{Action: "device.queue-dropped"})
	r.ok(err)
	if len(audit) != 2 || string(audit[0].Detail)+string(audit[1].Detail) != `{"messages":"4"}{"messages":"3"}` &&
		string(audit[0].Detail)+string(audit[1].Detail) != `{"messages":"3"}{"messages":"4"}` {
		t.Errorf("%+v", audit)
	}
	if out, err = r.api.RevokeMany(t.Context(), ids, "lot 7"); err != nil || out.Changed != 0 || out.Already != 8 || *out.Dropped != 0 {
		t.Errorf("again: %+v, %v", out, err)
	}
	for _, ids := range [][]identity.ID{nil, make([]identity.ID, maxBarred+1)} {
		if _, err := r.api.RevokeMany(t.Context(), ids, "x"); !admin.IsKind(err, admin.Invalid) {
			t.Errorf("%d ids: %v", len(ids), err)
		}
	}
	if _, err := r.api.RevokeMany(t.Context(), ids, " "); !admin.IsKind(err, admin.Invalid) {
		t.Errorf("without a reason: %v", err)
	}
	states, err := r.api.States(t.Context(), []identity.ID{ids[0], 0xABCD1234, 0xFF})
	r.ok(err)
	if states.Known[ids[0]] != "revoked" || states.Known[0xABCD1234] != "active" || fmt.Sprint(states.Unknown) != "[000000FF]" {
		t.Errorf("%+v", states)
	}
}

// TestRealClientsAreClosed: mosquitto clients lose their connections, and their
// reconnects are refused.
func TestRealClientsAreClosed(t *testing.T) {
	path, err := exec.LookPath("mosquitto_sub")
	if err != nil {
		t.Skip("mosquitto_sub is not installed (apt-get install mosquitto-clients)")
	}
	r := serve(t, makeFleet(t))
	var ids []identity.ID
	for i := range 3 {
		name := fmt.Sprintf("ABCD000%d", i)
		id, dir, _ := r.device(name)
		ids = append(ids, id)
		cmd := exec.CommandContext(t.Context(), path, "-h", "localhost", "-p", r.port(), "-i", name, "--cafile", filepath.Join(dir, "ca.crt"),
			"--cert", filepath.Join(dir, "device.crt"), "--key", filepath.Join(dir, "device.key"), "-t", "private/"+name+"/#")
		r.ok(cmd.Start())
		t.Cleanup(func() {
			_ = cmd.Process.Kill() // an error says that it has ended
			_ = cmd.Wait()
		})
	}
	until(t, "three clients", func() bool { return len(r.srv.br.OnlineDevices()) == 3 })
	_, err = r.api.RevokeMany(t.Context(), ids, "stolen")
	r.ok(err)
	until(t, "the end of their connections", func() bool { return r.srv.br.Stats().Connections.Load() == 0 })
	for _, id := range ids {
		r.logged("disconnected", id.String(), "revoked")
		r.logged("connection rejected", "revoked, of device "+id.String())
	}
}

// TestUnrevokedDeviceComesBack with its certificate and its configuration, and
// without what was queued.
func TestUnrevokedDeviceComesBack(t *testing.T) {
	r := serve(t, makeFleet(t))
	_, service := r.service("app", admin.Grant{Mode: "write", Filter: "private/+/d/app/#"})
	pub := r.connect(service, "app")
	for _, as := range []string{"revoke", "retire"} {
		name := map[string]string{"revoke": "ABCD0001", "retire": "ABCD0002"}[as]
		id, dir, cert := r.device(name)
		_, err := r.api.SetConfig(t.Context(), id, []byte(`{"interval":5}`))
		r.ok(err)
		r.queueFor(pub, dir, name, 2)
		retained := func() bool {
			r.ok(r.srv.feed.sync(t.Context()))
			_, ok := r.srv.br.Retained("private/" + name + "/d/cfg")
			return ok
		}
		until(t, "configuration", retained)
		out, err := r.api.Bar(t.Context(), id, as, "by mistake")
		r.ok(err)
		if out.Changed != 1 || *out.Dropped != 2 {
			t.Errorf("%s: %+v", as, out)
		}
		if retained() {
			t.Errorf("%s: the configuration is still retained", as)
		}
		if _, err := r.dial(cert, name); err == nil {
			t.Errorf("%s: was let in", as)
		}
		back, err := r.api.Unrevoke(t.Context(), id, "the other one")
		r.ok(err)
		if back.Certificates != 1 || back.ID != id {
			t.Errorf("%+v", back)
		}
		c := r.connect(cert, name)
		until(t, "configuration again", retained)
		c.ping()
		if n, _ := r.srv.br.Queue(id); n != 0 {
			t.Errorf("%s: %d messages wait", as, n)
		}
		if _, err := r.api.Unrevoke(t.Context(), id, "again"); !admin.IsKind(err, admin.Conflict) {
			t.Errorf("unrevoked twice: %v", err)
		}
		audit, err := r.api.Audit(t.Context(), admin.AuditFilter{Action: "device.unrevoked", Subject: name})
		r.ok(err)
		if len(audit) != 1 || !strings.Contains(string(audit[0].Detail), "the other one") {
			t.Errorf("%+v", audit)
		}
	}
	if _, err := r.api.Bar(t.Context(), 0xABCD0001, "retire", ""); !admin.IsKind(err, admin.Invalid) {
		t.Errorf("without a reason: %v", err)
	}
}

// TestRevokedWithoutAServer: what is queued goes at the next start, and is counted.
func TestRevokedWithoutAServer(t *testing.T) {
	r := serve(t, makeFleet(t))
	_, service := r.service("app", admin.Grant{Mode: "write", Filter: "private/+/d/app/#"})
	pub := r.connect(service, "app")
	id, dir, cert := r.device("ABCD1234")
	r.queueFor(pub, dir, "ABCD1234", 5)
	r.stop()
	c, closeIt, err := Connect(t.Context(), r.dir)
	r.ok(err)
	out, err := c.RevokeMany(t.Context(), []identity.ID{id}, "stolen")
	r.ok(err)
	if out.Changed != 1 || out.Dropped != nil {
		t.Errorf("%+v", out)
	}
	r.ok(closeIt())
	r.start()
	if _, err := r.dial(cert, "ABCD1234"); err == nil {
		t.Error("was let in")
	}
	until(t, "audit", func() bool {
		audit, err := r.api.Audit(t.Context(), admin.AuditFilter{Action: "device.queue-dropped"})
		r.ok(err)
		return len(audit) == 1 && audit[0].Subject == "ABCD1234" && string(audit[0].Detail) == `{"messages":"5"}`
	})
}

package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/device"
	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/mqtt"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// init, serve, a device, mosquitto_pub, PUBACK, tail: while it runs, and from the
// files when it has ended.
func TestFirstMessage(t *testing.T) {
	r := serve(t, makeFleet(t))
	id, dir, _ := r.device("ABCD1234")
	for _, text := range []string{"21", `{"t": 22}`, "plain"} {
		if out, err := r.mosquitto("mosquitto_pub", dir, "ABCD1234", "-q", "1", "-t", "private/ABCD1234/u/temp", "-m", text); err != nil {
			t.Fatalf("%v: %s\n%s", err, out, r.book)
		}
	}
	check := func(list []admin.Message) {
		t.Helper()
		want := []struct{ encoding, payload string }{{"json", "21"}, {"json", `{"t":22}`}, {"hex", `"706c61696e"`}}
		if len(list) != len(want) {
			t.Fatalf("%d messages, not %d: %v", len(list), len(want), list)
		}
		for i, m := range list {
			if m.From != "ABCD1234" || m.Topic != "private/ABCD1234/u/temp" || m.QoS != 1 || m.Encoding != want[i].encoding || string(m.Payload) != want[i].payload {
				t.Errorf("message %d: %+v", i, m)
			}
		}
	}
	check(r.tail(admin.Tail{}))
	check(r.tail(admin.Tail{Name: "ABCD1234"}))
	if out, err := r.mosquitto("mosquitto_pub", dir, "ABCD1235", "-q", "1", "-t", "private/ABCD1234/u/temp", "-m", "x"); err == nil {
		t.Errorf("another client id was let in: %s", out)
	}
	r.stop()
	offline, done, err := Connect(t.Context(), r.dir)
	r.ok(err)
	check(tailOf(t, offline, admin.Tail{}))
	check(tailOf(t, offline, admin.Tail{Name: "ABCD1234"}))
	d, err := offline.Device(t.Context(), id)
	r.ok(err)
	if d.LastSeen.IsZero() || d.Online != nil {
		t.Errorf("device without a server: %+v", d)
	}
	r.ok(done())
	r.start()
	check(r.tail(admin.Tail{Name: "ABCD1234"}))
	st, err := r.api.Status(t.Context())
	r.ok(err)
	if st.Starts != 2 || st.Epoch != 0 {
		t.Errorf("start %d, epoch %d", st.Starts, st.Epoch)
	}
}

func TestTailSelects(t *testing.T) {
	r := serve(t, makeFleet(t))
	_, _, a := r.device("ABCD1234")
	_, _, b := r.device("ABCD1235")
	ca, cb := r.connect(a, "ABCD1234"), r.connect(b, "ABCD1235")
	for _, v := range []string{"1", "2", "3"} {
		ca.publish("private/ABCD1234/u/x", v)
		cb.publish("private/ABCD1235/u/y", v+v)
	}
	for _, c := range []struct {
		sel  admin.Tail
		want string
	}{
		{admin.Tail{}, "1 11 2 22 3 33"},
		{admin.Tail{Reverse: true}, "33 3 22 2 11 1"},
		{admin.Tail{Limit: 2}, "3 33"},
		{admin.Tail{Limit: 3, Reverse: true}, "33 3 22"},
		{admin.Tail{Name: "ABCD1235"}, "11 22 33"},
		{admin.Tail{Name: "ABCD1235", Limit: 1}, "33"},
		{admin.Tail{Topic: "private/+/u/x"}, "1 2 3"},
		{admin.Tail{Topic: "private/+/u/x", Name: "ABCD1235"}, ""},
		{admin.Tail{Since: time.Now().Add(time.Hour)}, ""},
		{admin.Tail{Since: time.Now().Add(-time.Hour), Limit: 1}, "33"},
	} {
		var got []string
		for _, m := range r.tail(c.sel) {
			got = append(got, string(m.Payload))
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%+v: %v, not %s", c.sel, got, c.want)
		}
	}
	for _, sel := range []admin.Tail{{Topic: "a/#/b"}, {Name: "NOBODY"}, {Reverse: true, Follow: true}} {
		if err := r.api.Tail(t.Context(), sel, nil); !admin.IsKind(err, admin.Invalid) {
			t.Errorf("%+v: %v", sel, err)
		}
	}
	if err := r.api.Tail(t.Context(), admin.Tail{Name: "00000001"}, nil); !admin.IsKind(err, admin.NotFound) {
		t.Errorf("unknown device: %v", err)
	}
}

// What comes while a tail follows is in it, once.
func TestTailFollows(t *testing.T) {
	r := serve(t, makeFleet(t))
	_, _, cert := r.device("ABCD1234")
	c := r.connect(cert, "ABCD1234")
	c.publish("private/ABCD1234/u/x", "0")
	ctx, cancel := context.WithCancel(t.Context())
	got, ended := make(chan string, 16), make(chan error, 1)
	go func() {
		ended <- r.api.Tail(ctx, admin.Tail{Follow: true, Topic: "private/+/u/x"}, func(m *admin.Message) error {
			got <- string(m.Payload)
			return nil
		})
	}()
	for _, v := range []string{"0", "1", "2", "3"} {
		if v != "0" {
			c.publish("private/ABCD1234/u/x", v)
			c.publish("private/ABCD1234/u/other", v)
		}
		select {
		case m := <-got:
			if m != v {
				t.Fatalf("got %s, not %s", m, v)
			}
		case err := <-ended:
			t.Fatal(err)
		case <-time.After(patience):
			t.Fatalf("%s did not come", v)
		}
	}
	cancel()
	<-ended
}

func TestRevocationActsWithinASecond(t *testing.T) {
	r := serve(t, makeFleet(t))
	id, _, cert := r.device("ABCD1234")
	_, _, other := r.device("ABCD1235")
	c, o := r.connect(cert, "ABCD1234"), r.connect(other, "ABCD1235")
	c.ping()
	start := time.Now()
	r.ok(r.api.Revoke(t.Context(), id, "stolen"))
	c.ended()
	if took := time.Since(start); took > time.Second {
		t.Errorf("the session ended after %v", took)
	}
	o.ping()
	if _, err := r.dial(cert, "ABCD1234"); err == nil {
		t.Error("a revoked device was let in")
	}
	r.logged("connection rejected", "revoked, of device ABCD1234")
	if err := r.api.Revoke(t.Context(), id, "again"); !admin.IsKind(err, admin.Conflict) {
		t.Errorf("revoked twice: %v", err)
	}
	audit, err := r.api.Audit(t.Context(), admin.AuditFilter{Action: "device.revoked"})
	r.ok(err)
	if len(audit) != 1 || audit[0].Actor != UserName(os.Getuid()) || !strings.Contains(string(audit[0].Detail), "stolen") {
		t.Errorf("audit: %+v", audit)
	}
	r.stop()
	r.start()
	if _, err := r.dial(cert, "ABCD1234"); err == nil {
		t.Error("a revoked device was let in after a restart")
	}
}

func TestGrantTakenAwayActsWithinASecond(t *testing.T) {
	r := serve(t, makeFleet(t))
	_, _, dev := r.device("ABCD1234")
	read := admin.Grant{Mode: "read", Filter: "private/+/u/#"}
	write := admin.Grant{Mode: "write", Filter: "private/+/d/app/#"}
	_, cert := r.service("dashboard", read, write)
	s := r.connect(cert, "any id")
	if code := s.subscribe("private/+/u/#"); code.Failed() {
		t.Fatalf("subscription: %v", code)
	}
	d := r.connect(dev, "ABCD1234")
	d.publish("private/ABCD1234/u/x", "1")
	s.want(mqtt.PUBLISH)
	start := time.Now()
	_, err := r.api.ChangeGrants(t.Context(), "dashboard", nil, []admin.Grant{read})
	r.ok(err)
	s.ended()
	if took := time.Since(start); took > time.Second {
		t.Errorf("the session ended after %v", took)
	}
	s = r.connect(cert, "any id")
	if code := s.subscribe("private/+/u/#"); !code.Failed() {
		t.Error("subscribed without a grant")
	}
	if code := s.publish("private/ABCD1234/d/app/x", "1"); code.Failed() {
		t.Errorf("the grant that stayed: %v", code)
	}
	r.ok(r.api.RevokeService(t.Context(), "dashboard", "done"))
	s.ended()
	if _, err := r.dial(cert, "any id"); err == nil {
		t.Error("a revoked service was let in")
	}
}

// newLeaf puts a new broker certificate in the place of the one served.
func (r *rig) newLeaf() {
	r.t.Helper()
	l := r.srv.Layout()
	key, err := l.NewBrokerKey("localhost")
	r.ok(err)
	ca, err := fleet.OpenCA(l.CADir("a"), nil)
	r.ok(err)
	cert, err := ca.IssueBroker("localhost", &key.PublicKey, time.Now())
	r.ok(err)
	r.ok(ca.Close())
	_, err = l.InstallBrokerLeaf(cert.Raw)
	r.ok(err)
}

func TestLeafIsTakenUpWithoutDroppingAnybody(t *testing.T) {
	r := serve(t, makeFleet(t))
	_, _, cert := r.device("ABCD1234")
	_, _, other := r.device("ABCD1235")
	c := r.connect(cert, "ABCD1234")
	serial := func(c *client) string { return c.conn.ConnectionState().PeerCertificates[0].SerialNumber.String() }
	old := serial(c)
	r.newLeaf()
	until(t, "the new leaf by itself", func() bool { return serial(r.connect(other, "ABCD1235")) != old })
	c.ping()
	now := serial(r.connect(other, "ABCD1235"))

	r.newLeaf()
	r.ok(r.api.Reload(t.Context()))
	newest := serial(r.connect(other, "ABCD1235"))
	if newest == now {
		t.Error("reload did not take the new leaf up at once")
	}
	path := r.srv.Layout().BrokerCertPath("localhost")
	r.ok(os.WriteFile(path, []byte("no certificate"), 0o644))
	if err := r.api.Reload(t.Context()); err == nil && !strings.Contains(r.book.String(), "not taken up") {
		t.Error("a file that is no certificate was taken without a word")
	}
	if serial(r.connect(other, "ABCD1235")) != newest {
		t.Error("the old leaf did not stay")
	}
	c.ping()
}

// kit runs a device of the Go kit until the test ends.
func (r *rig) kit(dir string, edit func(*device.Config)) *device.Device {
	r.t.Helper()
	cfg, err := device.Load(dir)
	r.ok(err)
	cfg.Servers = []string{"localhost:" + r.port()}
	connected := make(chan struct{}, 8)
	cfg.Connected = func(string) { connected <- struct{}{} }
	edit(&cfg)
	d, err := device.New(cfg)
	r.ok(err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = d.Run(ctx) // it ends with ctx and for no other reason
	}()
	r.t.Cleanup(func() { cancel(); <-ended })
	select {
	case <-connected:
	case <-time.After(patience):
		r.t.Fatalf("the device did not connect\n%s", r.book)
	}
	return d
}

// Commands, configuration, hello and time, in both encodings.
func TestDeviceTalk(t *testing.T) {
	for _, json := range []bool{false, true} {
		t.Run(map[bool]string{false: "cbor", true: "json"}[json], func(t *testing.T) {
			r := serve(t, makeFleet(t))
			id, dir, _ := r.device("ABCD1234")
			set, err := r.api.SetConfig(t.Context(), id, []byte(`{"interval":5}`))
			r.ok(err)
			got := make(chan string, 4)
			d := r.kit(dir, func(c *device.Config) {
				c.JSON, c.Class, c.Firmware = json, "sensor", "1.2.3"
				c.Command = func(_ context.Context, cmd device.Command) (device.Value, error) { return cmd.Args, nil }
				c.Configure = func(_ context.Context, _ uint64, doc device.Value) error { got <- string(doc.JSON()); return nil }
			})
			if v := <-got; v != `{"interval":5}` {
				t.Errorf("configuration: %s", v)
			}
			sent, err := r.api.Send(t.Context(), id, admin.NewCommand{Name: "echo", Args: []byte(`{"a":[1,2]}`)})
			r.ok(err)
			c, err := r.api.Command(t.Context(), id, sent.CID, patience)
			r.ok(err)
			if c.State != "answered" || string(c.Result) != `{"a":[1,2]}` {
				t.Errorf("command: %+v", c)
			}
			until(t, "hello, report and time", func() bool {
				v, err := r.api.Device(t.Context(), id)
				r.ok(err)
				_, clock := d.Time()
				return clock && v.Hello != nil && v.Hello.Firmware == "1.2.3" && v.Hello.Encoding == map[bool]string{false: "cbor", true: "json"}[json] &&
					v.Config.AppliedVersion == set.Version && *v.Online
			})
			r.stop()
			offline, done, err := Connect(t.Context(), r.dir)
			r.ok(err)
			_, err = offline.SetConfig(t.Context(), id, []byte(`{"interval":6}`))
			r.ok(err)
			_, err = offline.Send(t.Context(), id, admin.NewCommand{Name: "echo"})
			r.ok(err)
			if _, err := offline.Command(t.Context(), id, sent.CID, time.Second); !admin.IsKind(err, admin.NoServer) {
				t.Errorf("waited without a server: %v", err)
			}
			r.ok(done())
			r.start()
			want := map[bool]byte{false: 0xA2, true: '{'}[json]
			until(t, "the configuration that was set without a server", func() bool {
				p, ok := r.srv.br.Retained(id.Topic("d/cfg"))
				return ok && p[0] == want && strings.Contains(string(p), "interval") && !strings.Contains(string(p), ":5")
			})
		})
	}
}

// An older registry beside a newer log begins a new epoch, and no id is given
// out before.
func TestRestoredRegistryBeginsAnEpoch(t *testing.T) {
	r := serve(t, makeFleet(t))
	id, _, _ := r.device("ABCD1234")
	first, err := r.api.Send(t.Context(), id, admin.NewCommand{Name: "a"})
	r.ok(err)
	r.stop()
	path := filepath.Join(r.dir, "server", "registry.db")
	backup, err := os.ReadFile(path)
	r.ok(err)
	r.start()
	_, err = r.api.Send(t.Context(), id, admin.NewCommand{Name: "b"})
	r.ok(err)
	r.stop()
	r.ok(os.WriteFile(path, backup, 0o600))
	offline, done, err := Connect(t.Context(), r.dir)
	r.ok(err)
	if _, err := offline.Send(t.Context(), id, admin.NewCommand{Name: "c"}); err == nil || !strings.Contains(err.Error(), "older than the log") {
		t.Errorf("an old registry gave an id out: %v", err)
	}
	r.ok(done())
	r.start()
	r.logged("the registry is older than the log")
	c, err := r.api.Send(t.Context(), id, admin.NewCommand{Name: "c"})
	r.ok(err)
	if first.CID>>32 != 0 || c.CID>>32 != 1 {
		t.Errorf("ids %x and %x", first.CID, c.CID)
	}
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestMetrics(t *testing.T) {
	r := serve(t, makeFleet(t))
	_, _, cert := r.device("ABCD1234")
	r.connect(cert, "ABCD1234").publish("private/ABCD1234/u/x", "1")
	base := "http://" + r.srv.MetricsAddr().String()
	if code, _ := get(t, base+"/healthz"); code != 200 {
		t.Errorf("healthz: %d", code)
	}
	if code, body := get(t, base+"/readyz"); code != 200 {
		t.Errorf("readyz: %d %s", code, body)
	}
	_, body := get(t, base+"/metrics")
	for _, want := range []string{
		"hawser_connections 1", "hawser_devices_online 1", `hawser_devices{state="active"} 1`, "hawser_messages_received_total 1",
		"hawser_messages_acknowledged_total 1", "hawser_log_healthy 1", `hawser_build_info{version="test"} 1`,
		`hawser_broker_certificate_expiry_seconds{domain="localhost"}`, "hawser_log_commit_seconds_count", "hawser_queue_depth 0",
		"hawser_connects_total 1", "hawser_registry_healthy 1", "go_goroutines",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("no %q in\n%s", want, body)
		}
	}
}

// A quarantined device that is released is let in without a restart.
func TestReleasedDeviceComesBack(t *testing.T) {
	r := serve(t, makeFleet(t))
	id, _, cert := r.device("ABCD1234")
	set := func(to registry.DeviceState) {
		t.Helper()
		r.ok(r.srv.reg.Update(t.Context(), func(tx *registry.Tx) error { return tx.SetDeviceState("test", id, to, "x") }))
		r.ok(r.srv.feed.sync(t.Context()))
	}
	c := r.connect(cert, "ABCD1234")
	set(registry.DeviceQuarantined)
	c.ended()
	if _, err := r.dial(cert, "ABCD1234"); err == nil {
		t.Error("a quarantined device was let in")
	}
	r.logged("connection rejected", "barred")
	_, err := r.api.Tag(t.Context(), id, []string{"watched"}, nil)
	r.ok(err)
	if _, err := r.dial(cert, "ABCD1234"); err == nil {
		t.Error("a tag let a quarantined device in")
	}
	set(registry.DeviceActive)
	r.connect(cert, "ABCD1234").ping()
}

// TestLeasedIsHelped: also when the log finds the other server at our first frame.
func TestLeasedIsHelped(t *testing.T) {
	err := leased(fmt.Errorf("write: %w", fmt.Errorf("%w: %w", msglog.ErrUnavailable, msglog.ErrLeased)))
	if !errors.Is(err, msglog.ErrLeased) || !strings.Contains(err.Error(), "\nhint: stop that server first") {
		t.Errorf("got %v", err)
	}
	if err := leased(io.EOF); err != io.EOF {
		t.Errorf("another error became %v", err)
	}
}

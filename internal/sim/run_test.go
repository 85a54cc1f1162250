package sim_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/pki"
	"hawser/internal/server"
	"hawser/internal/sim"
)

// rig is a trial fleet that is served.
type rig struct {
	t      testing.TB
	layout *fleet.Layout
	client *admin.Client
	server *server.Server
}

func newRig(t testing.TB, more ...string) *rig {
	t.Helper()
	ctx := t.Context()
	dir := filepath.Join(t.TempDir(), "fleet")
	l, err := server.Create(ctx, fleet.InitOptions{Dir: dir, Domains: append([]string{"localhost"}, more...), Trial: true}, "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	s, err := server.Start(ctx, server.Config{Dir: dir, Listen: "127.0.0.1:0", Metrics: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	c, done, err := server.Connect(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = done() })
	return &rig{t, l, c, s}
}

func (r *rig) enrol(n int) (all []*sim.Member, fresh int) {
	r.t.Helper()
	all, fresh, err := sim.Enrol(r.t.Context(), sim.Enrolment{Client: r.client, Layout: r.layout, Devices: n, Class: "sim"})
	if err != nil {
		r.t.Fatal(err)
	}
	return all, fresh
}

func (r *rig) start(members []*sim.Member, rate float64, count uint64, faults ...sim.Fault) *sim.Fleet {
	r.t.Helper()
	l, err := fleet.OpenLayout(r.layout.Dir) // as it is now
	if err != nil {
		r.t.Fatal(err)
	}
	f, err := sim.Start(r.t.Context(), sim.Config{Members: members, Layout: l, Address: r.server.Addr().String(), Faults: faults,
		Topic: "u/sim", Rate: rate, Count: count, Size: 64, Class: "sim", Firmware: "1"})
	if err != nil {
		r.t.Fatal(err)
	}
	select {
	case <-f.Connected():
	case <-time.After(30 * time.Second):
		f.Close()
		r.t.Fatalf("not connected: %+v", f.Totals())
	}
	return f
}

// stored counts what the log has of one device.
func (r *rig) stored(id identity.ID) (n int) {
	r.t.Helper()
	err := r.client.Tail(r.t.Context(), admin.Tail{Name: id.String(), Topic: id.Topic("u/sim")}, func(*admin.Message) error {
		n++
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

// TestFleetAtWork: what the simulator says was acknowledged is in the log, and a command
// is answered.
func TestFleetAtWork(t *testing.T) {
	r := newRig(t)
	members, fresh := r.enrol(30)
	if fresh != 30 {
		t.Error("fresh:", fresh)
	}
	f := r.start(members, 20, 5)
	defer f.Close()
	f.Begin(t.Context())
	cmd, err := r.client.Send(t.Context(), members[3].ID, admin.NewCommand{Name: "blink", Args: []byte(`{"times":3}`)})
	if err != nil {
		t.Fatal(err)
	}
	if cmd, err = r.client.Command(t.Context(), members[3].ID, cmd.CID, 20*time.Second); err != nil || cmd.State != "answered" {
		t.Fatal(cmd.State, err)
	}
	for deadline := time.Now().Add(30 * time.Second); f.Totals().Published < 150; {
		if time.Now().After(deadline) {
			t.Fatalf("%+v", f.Totals())
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-t.Context().Done():
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := f.Drain(ctx); err != nil {
		t.Fatal(err)
	}
	got := f.Totals()
	if got.Acked != 150 || got.Failed != 0 || got.Open != 0 || got.Troubles != 0 || got.Commands != 1 || got.Online != 30 {
		t.Errorf("%+v", got)
	}
	if v := f.Units()[3].View(); v.ID != members[3].ID.String() || v.Acked != 5 || v.Command != "blink" || !v.Online || v.Latency == 0 {
		t.Errorf("%+v", v)
	}
	for _, m := range members {
		if n := r.stored(m.ID); n != 5 {
			t.Errorf("%s has %d messages in the log", m.ID, n)
		}
	}
	f.Close()
	if n := f.Totals().Online; n != 0 {
		t.Error(n, "are online after the end")
	}
}

// TestSecondRunIsTheSameDevices, and passes over what is not its own or not active.
func TestSecondRunIsTheSameDevices(t *testing.T) {
	r := newRig(t)
	first, _ := r.enrol(5)
	again, fresh := r.enrol(8)
	if fresh != 3 {
		t.Error("fresh:", fresh)
	}
	for i, m := range first {
		if again[i].ID != m.ID || string(again[i].Cert.Certificate[0]) != string(m.Cert.Certificate[0]) {
			t.Error(m.ID, "is not what it was")
		}
	}
	if err := r.client.Revoke(t.Context(), first[1].ID, "test"); err != nil {
		t.Fatal(err)
	}
	r.foreign(first[4].ID + 4)
	members, fresh := r.enrol(8)
	if fresh != 1 || members[1].ID != first[2].ID || members[7].ID != first[4].ID+5 {
		t.Error(fresh, members[1].ID, members[7].ID)
	}
	page, err := r.client.Devices(t.Context(), admin.DeviceFilter{Tag: sim.Tag})
	if err != nil || len(page.Devices) != 9 {
		t.Error(len(page.Devices), err)
	}
	r.start(members, 0, 0).Close()
}

// foreign enrols somebody else's device under id, in place of the simulated one.
func (r *rig) foreign(id identity.ID) {
	r.t.Helper()
	ctx, t := r.t.Context(), r.t
	ca, err := fleet.OpenCA(r.layout.CADir("a"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer ca.Close()
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	csr := csrOf(t, key)
	cert, err := ca.EnrollDevice(id, csr, "", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.Enroll(ctx, id, admin.Enrolment{CSR: csr.DER, Certificate: cert.Raw}); err != nil {
		t.Fatal(err)
	}
}

// TestTroublesAreCounted: the server goes away in the middle. Nothing hangs, nothing is
// counted twice.
func TestTroublesAreCounted(t *testing.T) {
	r := newRig(t)
	members, _ := r.enrol(4)
	f := r.start(members, 50, 0)
	f.Begin(t.Context())
	if err := r.client.Revoke(t.Context(), members[2].ID, "test"); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); f.Totals().Troubles == 0; {
		if time.Now().After(deadline) {
			t.Fatal("the lost connection was not noticed")
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-t.Context().Done():
		}
	}
	f.Close()
	got := f.Totals()
	if got.Open != 0 || got.Published != got.Acked+got.Failed || !strings.Contains(got.Trouble, members[2].ID.String()) {
		t.Errorf("%+v", got)
	}
}

func TestProductionIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "fleet")
	l, err := server.Create(t.Context(), fleet.InitOptions{Dir: dir, Domains: []string{"localhost"},
		Passphrases: func(label string) ([]byte, error) { return []byte("passphrase " + label), nil }}, "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = sim.Enrol(t.Context(), sim.Enrolment{Layout: l, Devices: 1})
	if err == nil || !strings.Contains(err.Error(), "production fleet") || !strings.Contains(err.Error(), "\nhint: ") {
		t.Error(err)
	}
	if _, err := os.Stat(l.SimSeedPath()); !errors.Is(err, os.ErrNotExist) {
		t.Error("a production fleet has a seed:", err)
	}
}

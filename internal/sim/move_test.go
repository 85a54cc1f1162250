package sim_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/pki"
	"hawser/internal/sim"
)

// move begins a rollover, as `hawser ca rollover start` does in a trial fleet.
func (r *rig) move(w admin.What) {
	r.t.Helper()
	v, err := r.client.StartRollover(r.t.Context(), w)
	r.must(err)
	if w.Generation {
		r.resign(v.ToGeneration)
	}
	if w.Roots {
		r.newRoots(v.ToAnchors, v.OldestAnchors)
	}
	_, err = r.client.MoveRollover(r.t.Context())
	r.must(err)
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) open(dir string) *fleet.CA {
	r.t.Helper()
	ca, err := fleet.OpenCA(r.layout.CADir(dir), nil)
	r.must(err)
	return ca
}

func (r *rig) resign(generation uint32) {
	r.t.Helper()
	ctx, now := r.t.Context(), time.Now()
	ca := r.open("a")
	defer ca.Close()
	cert, err := ca.MakeGeneration(generation, "", now)
	r.must(err)
	r.must(r.client.RolloverCA(ctx, cert.Raw))
	sign, err := ca.Resigner(generation, fleet.Flashed{}, now)
	r.must(err)
	list, err := r.client.Unsigned(ctx, 0, 1000)
	r.must(err)
	var orders []fleet.Resign
	for _, u := range list {
		orders = append(orders, fleet.Resign{ID: u.ID, CSR: u.CSR, Old: u.Certificate})
	}
	signed, err := sign(orders)
	r.must(err)
	var answers []admin.Resigned
	for _, s := range signed {
		r.must(s.Refused)
		answers = append(answers, admin.Resigned{ID: s.ID, Certificate: s.Cert.Raw})
	}
	_, err = r.client.RolloverCertificates(ctx, answers)
	r.must(err)
}

// newRoots signs the next set with the standby root, and serves each domain under the root
// that its devices accept.
func (r *rig) newRoots(sequence, oldest uint64) {
	r.t.Helper()
	l, err := fleet.OpenLayout(r.layout.Dir)
	r.must(err)
	_, set, err := l.Anchors()
	r.must(err)
	label, err := pki.NextRootLabel(pki.RootLabel(set.Standby))
	r.must(err)
	dir := strings.ToLower(label)
	root, err := fleet.MakeRoot(l.CADir(dir), label, pki.Name{Organisation: l.Config.Fleet.Organisation, Country: l.Config.Fleet.Country}, l.FleetID(), nil, time.Now())
	r.must(err)
	ca := r.open(strings.ToLower(pki.RootLabel(set.Standby)))
	next := *set
	next.Sequence, next.InUse, next.Standby = sequence, set.Standby, root
	cose, err := ca.SignAnchors(&next, time.Now())
	r.must(err)
	r.must(ca.Close())
	r.must(r.client.RolloverAnchors(r.t.Context(), cose))
	l, err = fleet.OpenLayout(r.layout.Dir)
	r.must(err)
	for _, d := range l.Config.Fleet.Domains {
		want, err := l.WantedRoot(d, oldest)
		r.must(err)
		ca := r.open(strings.ToLower(pki.RootLabel(want)))
		key, err := l.NewBrokerKey(d)
		r.must(err)
		leaf, err := ca.IssueBroker(d, &key.PublicKey, time.Now())
		r.must(err)
		_, err = l.InstallBrokerLeaf(leaf.Raw)
		r.must(err)
		r.must(ca.Close())
	}
	r.must(r.client.Reload(r.t.Context()))
}

// await waits until so many devices have arrived, and gives the others.
func (r *rig) await(proven int) map[identity.ID]admin.RolloverDevice {
	r.t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var v admin.Rollover
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); <-tick.C {
		var err error
		v, err = r.client.Rollover(r.t.Context(), 1000)
		r.must(err)
		if v.Counts["proven"] == proven {
			left := map[identity.ID]admin.RolloverDevice{}
			for _, d := range v.Unproven {
				left[d.ID] = d
			}
			return left
		}
	}
	r.t.Fatalf("%v, left: %+v", v.Counts, v.Unproven)
	return nil
}

// eventually waits for what must come.
func (r *rig) eventually(what string, ok func() bool) {
	r.t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(30 * time.Second); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			r.t.Fatal("in vain: " + what)
		}
	}
}

// TestFaultyDevices move to another generation and other roots, or do not, as their fault
// has it. Those that have not are named with the reason, and are out after the retire.
func TestFaultyDevices(t *testing.T) {
	r := newRig(t)
	members, _ := r.enrol(8)
	f := r.start(members, 20, 0, sim.Faults()...)
	defer f.Close()
	units := map[sim.Fault]*sim.Unit{}
	for _, u := range f.Units() {
		units[u.Fault()] = u
	}
	f.Begin(t.Context())
	r.move(admin.What{Generation: true, Roots: true})
	left := r.await(4) // the sound ones, and the one that loses its power
	for fault, want := range map[sim.Fault][]string{
		sim.Liar:      {"failed", "connects with another"},
		sim.Away:      {"offered", ""},
		sim.ForgedSet: {"failed", "not signed by the pinned standby root"},
		sim.OldSet:    {"failed", "not newer than the one held: number 2, held 4294967296"},
	} {
		r.eventually(fault.String(), func() bool {
			left = r.await(4)
			d, ok := left[units[fault].ID()]
			return ok && d.State == want[0] && strings.Contains(d.Reason, want[1])
		})
	}
	if len(left) != 4 {
		t.Errorf("%+v", left)
	}
	var waive []identity.ID
	for id := range left {
		waive = append(waive, id)
	}
	slices.Sort(waive)
	if _, err := r.client.RetireRollover(t.Context(), waive[1:]); err == nil {
		t.Fatalf("retired although %s has not arrived", waive[0])
	}
	_, err := r.client.RetireRollover(t.Context(), waive)
	r.must(err)
	r.eventually("nobody is left behind and online", func() bool { return f.Totals().Online == 4 })
	units[sim.Away].PowerOn()
	r.eventually("the one that was away is turned away", func() bool {
		return strings.Contains(units[sim.Away].View().Trouble, "remote error: tls: bad certificate")
	})
	if units[sim.Away].View().Online {
		t.Error("the old device CA still gets a device in")
	}
}

// TestRescueDomain: a device that slept through two moves pins {A, B}, in a fleet that is
// served under C. It comes home over the rescue domain, set by set.
func TestRescueDomain(t *testing.T) {
	r := newRig(t, "rescue.localhost")
	members, _ := r.enrol(3)
	f := r.start(members, 0, 0)
	defer f.Close()
	sleeper := f.Units()[1]
	sleeper.PowerOff()
	for range 2 {
		r.move(admin.What{Roots: true})
		left := r.await(2)
		if len(left) != 1 || left[sleeper.ID()].ID != sleeper.ID() {
			t.Fatalf("%+v", left)
		}
		// The sleeper is waived, not forgotten: its certificate is still good.
		_, err := r.client.RetireRollover(t.Context(), []identity.ID{sleeper.ID()})
		r.must(err)
	}
	sleeper.PowerOn()
	r.eventually("it uses the newest set", func() bool {
		v, err := r.client.Rollover(t.Context(), 0)
		r.must(err)
		return v.OldestAnchors == 3
	})
}

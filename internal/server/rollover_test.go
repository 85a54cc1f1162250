package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/device"
	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/mqtt"
	"hawser/internal/pki"
)

// twoDomains: the second one is the rescue domain.
func twoDomains(o *fleet.InitOptions) { o.Domains = []string{"localhost", "rescue.localhost"} }

// roll does what "hawser ca rollover start" does in a trial fleet.
func (r *rig) roll(w admin.What) admin.Rollover {
	r.t.Helper()
	v, err := r.api.StartRollover(r.t.Context(), w)
	r.ok(err)
	if w.Generation {
		r.resign(&v)
	}
	if w.Roots {
		r.reroot(&v)
	}
	v, err = r.api.MoveRollover(r.t.Context())
	r.ok(err)
	return v
}

func (r *rig) resign(v *admin.Rollover) {
	r.t.Helper()
	ca, err := fleet.OpenCA(filepath.Join(r.dir, "ca-a"), nil)
	r.ok(err)
	defer ca.Close()
	cert, err := ca.MakeGeneration(v.ToGeneration, "", time.Now())
	r.ok(err)
	r.ok(r.api.RolloverCA(r.t.Context(), cert.Raw))
	sign, err := ca.Resigner(v.ToGeneration, fleet.Flashed{}, time.Now())
	r.ok(err)
	list, err := r.api.Unsigned(r.t.Context(), 0, 1000)
	r.ok(err)
	var orders []fleet.Resign
	for _, u := range list {
		orders = append(orders, fleet.Resign{ID: u.ID, CSR: u.CSR, Old: u.Certificate})
	}
	answers, err := sign(orders)
	r.ok(err)
	var out []admin.Resigned
	for _, a := range answers {
		one := admin.Resigned{ID: a.ID}
		if a.Refused != nil {
			one.Refused = a.Refused.Error()
		} else {
			one.Certificate = a.Cert.Raw
		}
		out = append(out, one)
	}
	_, err = r.api.RolloverCertificates(r.t.Context(), out)
	r.ok(err)
}

// nextSet signs the set after the newest one with its standby root.
func (r *rig) nextSet() []byte {
	r.t.Helper()
	l, err := fleet.OpenLayout(r.dir)
	r.ok(err)
	_, set, err := l.Anchors()
	r.ok(err)
	label, err := pki.NextRootLabel(pki.RootLabel(set.Standby))
	r.ok(err)
	root, err := fleet.MakeRoot(l.CADir(strings.ToLower(label)), label, pki.Name{Organisation: "Test", Country: "DE"}, l.FleetID(), nil, time.Now())
	r.ok(err)
	ca, err := fleet.OpenCA(l.CADir(strings.ToLower(pki.RootLabel(set.Standby))), nil)
	r.ok(err)
	defer ca.Close()
	cose, err := ca.SignAnchors(&pki.AnchorSet{Fleet: l.FleetID(), Sequence: set.Sequence + 1, InUse: set.Standby, Standby: root,
		Port: set.Port, Domains: set.Domains}, time.Now())
	r.ok(err)
	return cose
}

func (r *rig) reroot(v *admin.Rollover) {
	r.t.Helper()
	if _, set, err := r.srv.Layout().Anchors(); err != nil || set.Sequence < v.ToAnchors {
		r.ok(err)
		r.ok(r.api.RolloverAnchors(r.t.Context(), r.nextSet()))
	}
	l, err := fleet.OpenLayout(r.dir)
	r.ok(err)
	for _, d := range l.Config.Fleet.Domains {
		want, err := l.WantedRoot(d, v.OldestAnchors)
		r.ok(err)
		have, err := l.LeafRoot(d)
		r.ok(err)
		if !have.Equal(want) {
			r.leaf(l, d, strings.ToLower(pki.RootLabel(want)))
		}
	}
}

// leaf serves domain under a root.
func (r *rig) leaf(l *fleet.Layout, domain, root string) {
	r.t.Helper()
	key, err := l.NewBrokerKey(domain)
	r.ok(err)
	ca, err := fleet.OpenCA(l.CADir(root), nil)
	r.ok(err)
	defer ca.Close()
	cert, err := ca.IssueBroker(domain, &key.PublicKey, time.Now())
	r.ok(err)
	_, err = l.InstallBrokerLeaf(cert.Raw)
	r.ok(err)
	r.ok(r.api.Reload(r.t.Context()))
}

// kit is a device as it was provisioned, which can be switched on and off.
type kit struct {
	r     *rig
	id    identity.ID
	cert  tls.Certificate
	set   []byte
	store *device.MemStore
	off   func()
}

// unit enrols a device. It is off.
func (r *rig) unit(name string) *kit {
	r.t.Helper()
	id, _, cert := r.device(name)
	set, _, err := r.srv.Layout().Anchors()
	r.ok(err)
	return &kit{r: r, id: id, cert: cert, set: set, store: &device.MemStore{}}
}

// on runs the device until off.
func (k *kit) on() {
	k.r.t.Helper()
	addr := k.r.srv.Addr().String()
	d, err := device.New(device.Config{Certificate: k.cert, Anchors: k.set, Store: k.store, BackoffMin: 5 * time.Millisecond, BackoffMax: 50 * time.Millisecond,
		Log: slog.New(slog.DiscardHandler),
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, addr)
		}})
	k.r.ok(err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = d.Run(ctx) // ends with the context
	}()
	k.off = func() { cancel(); <-ended }
	k.r.t.Cleanup(k.off)
}

// counts waits until so many devices have arrived.
func (r *rig) proven(n int) {
	r.t.Helper()
	until(r.t, "the devices to arrive", func() bool {
		v, err := r.api.Rollover(r.t.Context(), 0)
		r.ok(err)
		return v.Counts["proven"] == n
	})
}

// TestRolloverOfTheFleet moves devices to generation 2 and root B. One is away, one lies
// and one breaks off; retire names them and waits; what is retired does not get in.
func TestRolloverOfTheFleet(t *testing.T) {
	r := serve(t, makeFleet(t, twoDomains))
	var kits []*kit
	for _, name := range []string{"ABCD0001", "ABCD0002", "ABCD0003"} {
		k := r.unit(name)
		kits = append(kits, k)
		k.on()
	}
	away, liar := r.unit("ABCD0010"), r.unit("ABCD0011")
	said := r.connect(liar.cert, "ABCD0011")
	said.subscribe("private/ABCD0011/d/#")
	r.roll(admin.What{Generation: true, Roots: true})
	r.proven(3)

	offer := said.offer()
	lie := message.PKIReport{No: offer.No, State: message.PKIInUse, Fingerprint: pki.Fingerprint(offer.Certificate), Anchors: 2}
	said.publish("private/ABCD0011/u/pki", string(lie.Encode(message.CBOR)))
	until(t, "the liar to be named", func() bool {
		v, err := r.api.Rollover(t.Context(), 10)
		r.ok(err)
		return v.Counts["failed"] == 1 && v.Counts["absent"] == 1 && len(v.Unproven) == 2 &&
			v.Unproven[0].ID == away.id && strings.Contains(v.Unproven[1].Reason, "connects with another")
	})
	honest := message.PKIReport{No: offer.No, State: message.PKIInUse, Fingerprint: pki.Fingerprint(liar.cert.Certificate[0]), Anchors: 9}
	said.publish("private/ABCD0011/u/pki", string(honest.Encode(message.CBOR)))
	until(t, "the set that does not exist to be named", func() bool {
		v, err := r.api.Rollover(t.Context(), 10)
		r.ok(err)
		return strings.Contains(v.Unproven[1].Reason, "does not exist")
	})

	r.stop()
	r.start() // the state of each device stands in the registry
	r.proven(3)
	_, err := r.api.RetireRollover(t.Context(), nil)
	if err == nil || !strings.Contains(err.Error(), "ABCD0010, ABCD0011") {
		t.Fatalf("retired with two unproven devices: %v", err)
	}
	live := r.connect(liar.cert, "ABCD0011")
	if _, err := r.api.RetireRollover(t.Context(), []identity.ID{away.id, liar.id}); err != nil {
		t.Fatal(err)
	}
	live.ended()
	for _, k := range append(kits, away, liar) {
		if _, err := r.dial(k.cert, k.id.String()); err == nil {
			t.Errorf("%s got in with its certificate of generation 1", k.id)
		}
	}
	r.logged("superseded, of device ABCD0010")
	r.stop()
	r.start()
	if n := len(r.srv.Layout().Trust().DeviceCAs); n != 1 {
		t.Errorf("%d device CAs are trusted", n)
	}
	if _, err := r.dial(away.cert, "ABCD0010"); err == nil {
		t.Error("after a restart the old certificate gets in")
	}
	for _, k := range kits {
		k.off()
		k.on()
		until(t, k.id.String()+" to be online with what it has stored", func() bool {
			d, err := r.api.Device(t.Context(), k.id)
			r.ok(err)
			return *d.Online
		})
	}
}

// offer waits for a d/pki and acknowledges it.
func (c *client) offer() message.PKI {
	c.t.Helper()
	for {
		typ, flags, body, err := c.next()
		if err != nil {
			c.t.Fatal(err)
		}
		if typ != mqtt.PUBLISH {
			continue
		}
		var p mqtt.Publish
		if err := p.Decode(mqtt.V5, flags, body); err != nil {
			c.t.Fatal(err)
		}
		if p.QoS > 0 {
			c.send((&mqtt.Ack{Type: mqtt.PUBACK, PacketID: p.PacketID}).Append(nil, mqtt.V5))
		}
		if !strings.HasSuffix(string(p.Topic), "/d/pki") {
			continue
		}
		m, err := message.DecodePKI(p.Payload)
		if err != nil {
			c.t.Fatal(err)
		}
		return m
	}
}

// TestAbortLocksNobodyOut: who has moved comes back, who has not stays, and all get in.
func TestAbortLocksNobodyOut(t *testing.T) {
	r := serve(t, makeFleet(t, twoDomains))
	moved, away := r.unit("ABCD0001"), r.unit("ABCD0002")
	moved.on()
	r.roll(admin.What{Generation: true})
	r.proven(1)
	first, err := r.api.AbortRollover(t.Context())
	r.ok(err)
	active := func(id identity.ID) (gens []uint32) {
		d, err := r.api.Device(t.Context(), id)
		r.ok(err)
		for _, c := range d.Certificates {
			if c.State == "active" {
				gens = append(gens, c.Generation)
			}
		}
		return gens
	}
	if g := active(away.id); len(g) != 1 || g[0] != 1 {
		t.Errorf("the device that was away has the generations %v", g)
	}
	until(t, "the device that moved to be back", func() bool { g := active(moved.id); return len(g) == 1 && g[0] == 1 })
	r.connect(away.cert, "ABCD0002")
	if again := r.roll(admin.What{Generation: true}); again.No == first.No || again.ToGeneration != 2 {
		t.Errorf("the next rollover is number %d to generation %d", again.No, again.ToGeneration)
	}
	away.on()
	r.proven(2)
	_, err = r.api.RetireRollover(t.Context(), nil)
	r.ok(err)
}

// TestAbortOfRoots: who has taken the new roots goes on with them, who has not is not sent
// them any more, and both are let in. The next start takes up the set that is there.
func TestAbortOfRoots(t *testing.T) {
	r := serve(t, makeFleet(t, twoDomains))
	moved, late := r.unit("ABCD0001"), r.unit("ABCD0002")
	moved.on()
	r.roll(admin.What{Roots: true})
	r.proven(1)
	_, err := r.api.AbortRollover(t.Context())
	r.ok(err)
	late.on()
	online := func(k *kit) {
		until(t, k.id.String()+" to be online", func() bool {
			d, err := r.api.Device(t.Context(), k.id)
			r.ok(err)
			return *d.Online
		})
	}
	online(late)
	moved.off()
	moved.on()
	online(moved)
	if v, err := r.api.Rollover(t.Context(), 0); err != nil || v.OldestAnchors != 1 {
		t.Errorf("after the abort a device was sent set %d, %v", v.OldestAnchors, err)
	}
	if again := r.roll(admin.What{Roots: true}); again.ToAnchors != 2 {
		t.Errorf("the next rollover goes to set %d", again.ToAnchors)
	}
	r.proven(2)
	_, err = r.api.RetireRollover(t.Context(), nil)
	r.ok(err)
}

// TestSleeperComesHome: a device that slept through two moves of the roots pins {A, B}. It
// finds the rescue domain, and takes the sets one after the other.
func TestSleeperComesHome(t *testing.T) {
	r := serve(t, makeFleet(t, twoDomains))
	awake, sleeper := r.unit("ABCD0001"), r.unit("ABCD0002")
	awake.on()
	for range 2 {
		r.roll(admin.What{Roots: true})
		r.proven(1)
		_, err := r.api.RetireRollover(t.Context(), []identity.ID{sleeper.id})
		r.ok(err)
	}
	for domain, want := range map[string]string{"localhost": "C", "rescue.localhost": "B"} {
		root, err := r.srv.Layout().LeafRoot(domain)
		r.ok(err)
		if label := pki.RootLabel(root); label != want {
			t.Errorf("%s is served under root %s, want %s", domain, label, want)
		}
	}
	sleeper.on()
	until(t, "the sleeper to use set 3", func() bool {
		v, err := r.api.Rollover(t.Context(), 0)
		r.ok(err)
		return v.OldestAnchors == 3
	})
}

// TestTrustAndRegistryAgree: a crash between registry and files is mended at the next start,
// an older registry beside newer files is refused.
func TestTrustAndRegistryAgree(t *testing.T) {
	r := serve(t, makeFleet(t))
	k := r.unit("ABCD0001")
	path := filepath.Join(r.dir, "server", "device-cas.crt")
	one, err := os.ReadFile(path)
	r.ok(err)
	r.roll(admin.What{Generation: true})
	both, err := os.ReadFile(path)
	r.ok(err)
	for _, text := range [][]byte{one, both[len(one):]} {
		r.stop()
		r.ok(os.WriteFile(path, text, 0o644))
		if text := string(text); text == string(one) { // cut off before the file was written
			r.start()
			if n := len(r.srv.Layout().Trust().DeviceCAs); n != 2 {
				t.Errorf("%d device CAs after the start", n)
			}
			continue
		}
		if _, err := Start(t.Context(), r.config()); err == nil || !strings.Contains(err.Error(), "no device CA 1") {
			t.Errorf("an older registry beside newer files: %v", err)
		}
	}
	r.ok(os.WriteFile(path, both, 0o644))
	r.start()
	k.on()
	r.proven(1)
	k.off()
	_, err = r.api.RetireRollover(t.Context(), nil)
	r.ok(err)
	r.stop()
	r.ok(os.WriteFile(path, both, 0o644)) // cut off after the registry knew
	r.start()
	if n := len(r.srv.Layout().Trust().DeviceCAs); n != 1 {
		t.Errorf("%d device CAs after the retire", n)
	}
}

// TestEmergencyDuringARollover: the roots move while the fleet is on its way to another
// generation, and one retire ends both.
func TestEmergencyDuringARollover(t *testing.T) {
	r := serve(t, makeFleet(t, twoDomains))
	one, late := r.unit("ABCD0001"), r.unit("ABCD0002")
	one.on()
	first := r.roll(admin.What{Generation: true})
	r.proven(1)
	if second := r.roll(admin.What{Roots: true}); second.No != first.No || second.ToGeneration != 2 || second.ToAnchors != 2 {
		t.Errorf("another rollover: %+v", second)
	}
	r.proven(1)
	late.on()
	r.proven(2)
	_, err := r.api.RetireRollover(t.Context(), nil)
	r.ok(err)
}

// TestAnchorsThatDoNotFollow: the server takes no set but the one that the standby root
// signed, and no leaf stays behind.
func TestAnchorsThatDoNotFollow(t *testing.T) {
	r := serve(t, makeFleet(t, twoDomains))
	ctx := t.Context()
	old, _, err := r.srv.Layout().Anchors()
	r.ok(err)
	if err := r.api.RolloverAnchors(ctx, old); err == nil {
		t.Error("a set was taken without a rollover")
	}
	_, err = r.api.StartRollover(ctx, admin.What{Roots: true})
	r.ok(err)
	next := r.nextSet()
	forged := append([]byte(nil), next...)
	forged[len(forged)-1] ^= 1
	if err := r.api.RolloverAnchors(ctx, forged); err == nil {
		t.Error("a set with a bad signature was taken")
	}
	if _, err := r.api.MoveRollover(ctx); err == nil {
		t.Error("devices would move to a set that is not there")
	}
	r.ok(r.api.RolloverAnchors(ctx, next))
	if _, err := r.api.MoveRollover(ctx); err == nil || !strings.Contains(err.Error(), "under root A") {
		t.Errorf("devices would move away from what is served: %v", err)
	}
	if err := os.Remove(filepath.Join(r.dir, "server", "anchors", "1.cose")); err != nil {
		t.Fatal(err)
	}
	if _, err := fleet.OpenLayout(r.dir); err == nil {
		t.Error("a chain without its beginning was opened")
	}
}

// TestSwappedRequests: a thief of the server who swaps two stored requests gets neither
// signed, and both are named.
func TestSwappedRequests(t *testing.T) {
	r := serve(t, makeFleet(t))
	a, b := r.unit("ABCD0001"), r.unit("ABCD0002")
	csr := func(k *kit) []byte { return csrOf(t, k.cert.PrivateKey.(*ecdsa.PrivateKey)).DER }
	v, err := r.api.StartRollover(t.Context(), admin.What{Generation: true})
	r.ok(err)
	ca, err := fleet.OpenCA(filepath.Join(r.dir, "ca-a"), nil)
	r.ok(err)
	defer ca.Close()
	cert, err := ca.MakeGeneration(v.ToGeneration, "", time.Now())
	r.ok(err)
	r.ok(r.api.RolloverCA(t.Context(), cert.Raw))
	sign, err := ca.Resigner(v.ToGeneration, fleet.Flashed{}, time.Now())
	r.ok(err)
	answers, err := sign([]fleet.Resign{{ID: a.id, CSR: csr(b), Old: a.cert.Certificate[0]}, {ID: b.id, CSR: csr(a), Old: b.cert.Certificate[0]}})
	r.ok(err)
	for _, v := range answers {
		if v.Cert != nil || v.Refused == nil || !strings.Contains(v.Refused.Error(), v.ID.String()) {
			t.Errorf("%s: %v", v.ID, v.Refused)
		}
	}
	// A safe that did sign would be held against the key that the registry has.
	good, err := sign([]fleet.Resign{{ID: a.id, CSR: csr(a)}})
	r.ok(err)
	_, err = r.api.RolloverCertificates(t.Context(), []admin.Resigned{{ID: b.id, Certificate: good[0].Cert.Raw}})
	if err == nil {
		t.Error("a certificate was taken for another device")
	}
	key, err := pki.ReadKey(filepath.Join(r.dir, "ca-a", "device-2.key"), nil)
	r.ok(err)
	issuer, err := pki.NewIssuer(cert, key, pki.DeviceCA)
	r.ok(err)
	wrong, err := pki.IssueDeviceLeaf(issuer, b.id, &a.cert.PrivateKey.(*ecdsa.PrivateKey).PublicKey, time.Now())
	r.ok(err)
	_, err = r.api.RolloverCertificates(t.Context(), []admin.Resigned{{ID: b.id, Certificate: wrong.Raw}})
	if err == nil {
		t.Error("a certificate was taken for another key than the device's")
	}
}

package device

import (
	"bytes"
	"context"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	"hawser/internal/message"
	"hawser/internal/mqtt"
	"hawser/internal/pki"
)

// TestMoves: a certificate, then an anchor set, then both, each proven before it is in use.
func TestMoves(t *testing.T) {
	r := newPKIRig(t)
	d := start(t, r.config())
	p, cert, reports := r.come()
	r.want(reports, inUse(0, r.old, 1))
	d.stateMu.Lock()
	if !bytes.Equal(cert, r.old) || d.pki != nil {
		t.Error("not the certificate it was born with, or memory is taken for nothing")
	}
	d.stateMu.Unlock()

	got := p.offer(message.PKI{No: 5, Certificate: r.fresh})
	r.want([]message.PKIReport{got}, message.PKIReport{No: 5, State: message.PKIInstalled, Fingerprint: sha256.Sum256(r.old), Anchors: 1})
	p.gone()
	p, cert, reports = r.come()
	r.want(reports, inUse(5, r.fresh, 1))
	if !bytes.Equal(cert, r.fresh) {
		t.Fatal("reconnected with the old certificate")
	}

	r.serve(testServer, r.b)
	got = p.offer(message.PKI{No: 6, Anchors: anchors(t, r.b, 2, r.b, r.c)})
	r.want([]message.PKIReport{got}, message.PKIReport{No: 6, State: message.PKIInstalled, Fingerprint: sha256.Sum256(r.fresh), Anchors: 1, Pending: 2})
	p.gone()
	p, _, reports = r.come()
	r.want(reports, inUse(6, r.fresh, 2))

	r.serve(testServer, r.c)
	third := r.certify(t, testID, &r.key.PublicKey)
	p.offer(message.PKI{No: 7, Certificate: third, Anchors: anchors(t, r.c, 3, r.c, r.d)})
	p.gone()
	p, cert, reports = r.come()
	r.want(reports, inUse(7, third, 3))
	if !bytes.Equal(cert, third) {
		t.Fatal("reconnected with an older certificate")
	}
	// What was reported once is not reported on the next connection.
	p.conn.Close()
	_, _, reports = r.come()
	r.want(reports)
}

// TestThiefOfRootA poses as the broker in vain once the device is on {B, C}, also after a
// restart: what it was born with is no way back.
func TestThiefOfRootA(t *testing.T) {
	r := newPKIRig(t)
	d, err := New(r.config())
	if err != nil {
		t.Fatal(err)
	}
	stop := run(t, d)
	p, _, _ := r.come()
	r.serve(testServer, r.b)
	p.offer(message.PKI{No: 1, Anchors: anchors(t, r.b, 2, r.b, r.c)})
	p.gone()
	r.come()
	stop()
	r.serve(testServer, r.a)
	cfg := r.config()
	dials := make(chan bool, 100)
	dial := cfg.Dial
	cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		select {
		case dials <- true:
		default:
		}
		return dial(ctx, network, addr)
	}
	start(t, cfg)
	for range 6 {
		wait(t, dials)
	}
	if len(r.peers) != 0 {
		t.Fatal("the device said CONNECT to who holds root A")
	}
	r.serve(testServer, r.c)
	r.come()
}

// TestOffersInUse: what is in use already needs no other connection.
func TestOffersInUse(t *testing.T) {
	r := newPKIRig(t)
	cfg := r.config()
	cfg.JSON = true
	start(t, cfg)
	p, _, _ := r.come()
	got := p.offer(message.PKI{No: 3, Certificate: r.old, Anchors: cfg.Anchors})
	r.want([]message.PKIReport{got}, inUse(3, r.old, 1))
}

// TestRefusals: each with its reason, and nothing of the offer is stored.
func TestRefusals(t *testing.T) {
	r := newPKIRig(t)
	other := newKey(t, elliptic.P256())
	good := anchors(t, r.b, 2, r.b, r.c)
	flipped := slices.Clone(good)
	flipped[len(flipped)-1] ^= 1
	foreign, err := pki.SignAnchors(r.b.Signer, &pki.AnchorSet{Fleet: [16]byte{2}, Sequence: 2, InUse: r.b.Cert, Standby: r.c.Cert, Port: 8883, Domains: []string{"a.b"}})
	if err != nil {
		t.Fatal(err)
	}
	start(t, r.config())
	p, _, _ := r.come()
	cases := []struct {
		name  string
		offer message.PKI
		want  string
	}{
		{"another key", message.PKI{Certificate: r.certify(t, testID, &other.PublicKey)}, "for another key"},
		{"another id", message.PKI{Certificate: r.certify(t, "ABCD1235", &r.key.PublicKey)}, `for "ABCD1235", not for ABCD1234`},
		{"no certificate", message.PKI{Certificate: []byte{0x30, 0}}, "the certificate: "},
		{"bytes after it", message.PKI{Certificate: append(slices.Clone(r.fresh), 0)}, "the certificate: "},
		{"signed by the root in use", message.PKI{Anchors: anchors(t, r.a, 2, r.b, r.c)}, "not signed by the pinned standby root"},
		{"signed by the root that it brings", message.PKI{Anchors: anchors(t, r.c, 2, r.b, r.c)}, "not signed by the pinned standby root"},
		{"one bit", message.PKI{Anchors: flipped}, "not signed by the pinned standby root"},
		{"not newer", message.PKI{Anchors: anchors(t, r.b, 1, r.b, r.c)}, "not newer than the one held: number 1, held 1"},
		{"another fleet", message.PKI{Anchors: foreign}, "for another fleet"},
		{"a good certificate with a bad set", message.PKI{Certificate: r.fresh, Anchors: flipped}, "not signed by"},
		{"a good set with a bad certificate", message.PKI{Certificate: r.certify(t, testID, &other.PublicKey), Anchors: good}, "for another key"},
	}
	for i, c := range cases {
		c.offer.No = uint64(i + 1)
		got := p.offer(c.offer)
		if got.State != message.PKIRefused || got.No != c.offer.No || !strings.Contains(got.Text, c.want) || got.Pending != 0 || got.Fingerprint != sha256.Sum256(r.old) {
			t.Errorf("%s: %+v", c.name, got)
		}
	}
	if blob, _ := r.store.Load(pkiName); blob != nil {
		t.Errorf("%d bytes are stored", len(blob))
	}
}

// TestPendingSetIsNotReplaced by an older one, nor by another with its number.
func TestPendingSetIsNotReplaced(t *testing.T) {
	r := newPKIRig(t)
	d, err := New(r.config())
	if err != nil {
		t.Fatal(err)
	}
	set := anchors(t, r.b, 5, r.b, r.c)
	install := func(no uint64, set []byte) (bool, error) { return d.install(&message.PKI{No: no, Anchors: set}) }
	if fresh, err := install(1, set); err != nil || !fresh {
		t.Fatal(fresh, err)
	}
	if fresh, err := install(1, set); err != nil || fresh {
		t.Fatal("the same offer again:", fresh, err)
	}
	for _, sequence := range []uint64{4, 5} {
		if _, err := install(2, anchors(t, r.b, sequence, r.b, r.d)); err == nil || !strings.Contains(err.Error(), "not newer than the one that waits") {
			t.Error(sequence, err)
		}
	}
	if fresh, err := install(3, anchors(t, r.b, 6, r.b, r.d)); err != nil || !fresh {
		t.Fatal(fresh, err)
	}
	if p := d.pkiNow(); p.newSequence != 6 || p.offer != 3 || p.set != nil {
		t.Fatalf("%+v", p)
	}
}

// TestPendingFails: the server does not know the new certificate. The device goes on with the
// old one, says why, tries again in turn, and takes it over when it works.
func TestPendingFails(t *testing.T) {
	r := newPKIRig(t)
	r.turnAway(r.fresh, true)
	start(t, r.config())
	p, _, _ := r.come()
	p.offer(message.PKI{No: 9, Certificate: r.fresh})
	p.gone()
	p, cert, reports := r.come()
	if !bytes.Equal(cert, r.old) || len(reports) != 1 || reports[0].State != message.PKIInstalled || reports[0].No != 9 || !strings.Contains(reports[0].Text, "bad certificate") {
		t.Fatalf("%+v", reports)
	}
	r.turnAway(r.fresh, false)
	p.gone() // after a while the device leaves by itself
	p, cert, reports = r.come()
	r.want(reports, inUse(9, r.fresh, 1))
	if !bytes.Equal(cert, r.fresh) {
		t.Fatal("reports what it does not show")
	}
	// The old one is given up by the server; the new one alone does.
	r.turnAway(r.old, true)
	p.conn.Close()
	r.come()
}

// TestPendingSetFails: under the set that waits the server is a stranger. Certificate and set
// are proven apart.
func TestPendingSetFails(t *testing.T) {
	r := newPKIRig(t)
	start(t, r.config())
	p, _, _ := r.come()
	p.offer(message.PKI{No: 4, Certificate: r.fresh, Anchors: anchors(t, r.b, 2, r.c, r.d)})
	p.gone()
	p, cert, reports := r.come() // still under A
	if !bytes.Equal(cert, r.fresh) || len(reports) != 2 {
		t.Fatalf("%+v", reports)
	}
	if !strings.Contains(reports[1].Text, "not signed by a pinned root") {
		t.Errorf("%+v", reports[1])
	}
	r.want(reports, message.PKIReport{State: message.PKIInUse, Fingerprint: sha256.Sum256(r.fresh), Anchors: 1, Pending: 2},
		message.PKIReport{No: 4, State: message.PKIInstalled, Fingerprint: sha256.Sum256(r.fresh), Anchors: 1, Pending: 2})
	r.serve(testServer, r.c)
	p.gone()
	_, _, reports = r.come()
	r.want(reports, inUse(4, r.fresh, 2))
}

// TestRestoredRegistry knows the old certificate only: the device comes back to it after
// the one in use was turned away three times, and says so.
func TestRestoredRegistry(t *testing.T) {
	r := newPKIRig(t)
	start(t, r.config())
	p, _, _ := r.come()
	p.offer(message.PKI{No: 2, Certificate: r.fresh})
	p.gone()
	p, _, _ = r.come()
	r.turnAway(r.fresh, true)
	p.conn.Close()
	p, cert, reports := r.come()
	r.want(reports, inUse(0, r.old, 1))
	if !bytes.Equal(cert, r.old) {
		t.Fatal("not the old certificate")
	}
	// It is offered again, and the move is made again.
	r.turnAway(r.fresh, false)
	p.offer(message.PKI{No: 3, Certificate: r.fresh})
	p.gone()
	_, _, reports = r.come()
	r.want(reports, inUse(3, r.fresh, 1))
}

// TestBusyServer: a server that has no time is no verdict on the certificate, one that is
// not authorized is.
func TestBusyServer(t *testing.T) {
	r := newPKIRig(t)
	start(t, r.config())
	p, _, _ := r.come()
	p.offer(message.PKI{No: 2, Certificate: r.fresh})
	p.gone()
	p, _, _ = r.come()
	p.conn.Close()
	refuse := func(code mqtt.ReasonCode, times int) (shown []string) {
		for range times {
			p := r.peer()
			name := "old"
			if bytes.Equal(p.conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Raw, r.fresh) {
				name = "new"
			}
			shown = append(shown, name)
			p.send(&mqtt.Connack{Code: code})
			p.conn.Close()
		}
		return shown
	}
	if got := refuse(mqtt.ServerBusy, 5); slices.Contains(got, "old") {
		t.Error("busy:", got)
	}
	if got := refuse(mqtt.NotAuthorized, 5); strings.Join(got, " ") != "new new new old new" {
		t.Error("not authorized:", got)
	}
}

// TestTurn: in turn means that no certificate that worked is left out, and that the one in
// use has its turn too.
func TestTurn(t *testing.T) {
	r := newPKIRig(t)
	d, err := New(r.config())
	if err != nil {
		t.Fatal(err)
	}
	p := &pkiState{current: []byte{1}, previous: []byte{2}}
	var got []string
	for d.refused = 0; d.refused < 9; d.refused++ {
		name := map[byte]string{1: "current", 2: "previous", 0x30: "born"}[d.turn(p)[0]]
		got = append(got, name)
	}
	if want := "current current current previous born current previous born current"; strings.Join(got, " ") != want {
		t.Errorf("%v", got)
	}
	for d.refused = 0; d.refused < 9; d.refused++ {
		if d.turn(&pkiState{}) != nil {
			t.Error("there is none but the one it was born with")
		}
	}
}

// TestPowerLoss between install and reconnect, and between reconnect and report: whatever is
// durable at that moment, the device comes back.
func TestPowerLoss(t *testing.T) {
	r := newPKIRig(t)
	d, err := New(r.config())
	if err != nil {
		t.Fatal(err)
	}
	stop := run(t, d)
	p, _, _ := r.come()
	p.say("d/pki", 1, message.PKI{No: 1, Certificate: r.fresh, Anchors: anchors(t, r.b, 2, r.b, r.c)}.Encode(message.CBOR))
	p.expect(mqtt.PUBACK)
	r.serve(testServer, r.b)
	p.publish() // not acknowledged
	stop()

	d, err = New(r.config())
	if err != nil {
		t.Fatal(err)
	}
	if p := d.pkiNow(); !bytes.Equal(p.pending, r.fresh) || p.newSequence != 2 || p.offer != 1 {
		t.Fatalf("%+v", p)
	}
	stop = run(t, d)
	p = r.peer() // in use before anything is said
	p.send(&mqtt.Connack{})
	p.publish()
	stop()

	d, err = New(r.config())
	if err != nil {
		t.Fatal(err)
	}
	if p := d.pkiNow(); !bytes.Equal(p.current, r.fresh) || !bytes.Equal(p.previous, r.old) || p.sequence != 2 || p.unproven() {
		t.Fatalf("%+v", p)
	}
	run(t, d)
	_, _, reports := r.come()
	r.want(reports, inUse(1, r.fresh, 2))
}

// brokenStore fails to save the PKI state, before or after it is written.
type brokenStore struct {
	*MemStore
	mu       sync.Mutex
	fails    bool // guarded by mu
	written  bool // guarded by mu: fails after it has written
	failures chan struct{}
}

func (s *brokenStore) Save(name string, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if name != pkiName || !s.fails {
		return s.MemStore.Save(name, data)
	}
	if s.written {
		if err := s.MemStore.Save(name, data); err != nil {
			return err
		}
	}
	select {
	case s.failures <- struct{}{}:
	default:
	}
	return errors.New("flash is worn out")
}

func (s *brokenStore) set(fails, written bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fails, s.written = fails, written
}

// TestSaveFails: at the install the offer is refused; at the takeover the device goes on with
// what is durable.
func TestSaveFails(t *testing.T) {
	for _, written := range []bool{false, true} {
		r := newPKIRig(t)
		store := &brokenStore{MemStore: r.store, failures: make(chan struct{}, 1)}
		cfg := r.config()
		cfg.Store = store
		d, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		stop := run(t, d)
		p, _, _ := r.come()
		store.set(true, written)
		if got := p.offer(message.PKI{No: 1, Certificate: r.fresh}); got.State != message.PKIRefused || !strings.Contains(got.Text, "flash is worn out") {
			t.Fatalf("%+v", got)
		}
		<-store.failures
		store.set(false, false)
		p.offer(message.PKI{No: 2, Certificate: r.fresh})
		store.set(true, written)
		p.gone()
		p = r.peer() // CONNACK is known when the takeover fails
		p.send(&mqtt.Connack{})
		wait(t, store.failures)
		_, cert, reports := r.come()
		if !bytes.Equal(cert, r.old) || len(reports) != 1 || reports[0].State != message.PKIInstalled || !strings.Contains(reports[0].Text, "flash is worn out") {
			t.Fatalf("%+v", reports)
		}
		stop()
		store.set(false, false)
		cfg.Store = r.store
		start(t, cfg)
		_, cert, reports = r.come()
		r.want(reports, inUse(2, r.fresh, 1))
		if !bytes.Equal(cert, r.fresh) {
			t.Fatal("not in use after all")
		}
	}
}

// TestRescueDomain: a device that slept through two moves pins {A, B}, and every name but the
// last is served under C. It comes home over the last one, set by set.
func TestRescueDomain(t *testing.T) {
	r := newPKIRig(t)
	home := []string{"one.test", "two.test", "rescue.test"}
	cfg := r.config()
	cfg.Anchors = anchors(t, r.b, 1, r.a, r.b, home...)
	for _, name := range home[:2] {
		r.serve(name, r.c)
	}
	r.serve(home[2], r.b)
	var mu sync.Mutex
	var tried []string
	dial := cfg.Dial
	cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		mu.Lock()
		defer mu.Unlock()
		tried = append(tried, addr)
		return dial(ctx, network, addr)
	}
	start(t, cfg)
	p, _, reports := r.come()
	r.want(reports, inUse(0, r.old, 1))
	mu.Lock()
	if !slices.Equal(tried, []string{"one.test:8883", "two.test:8883", "rescue.test:8883"}) {
		t.Errorf("tried %v", tried)
	}
	mu.Unlock()
	if got := p.offer(message.PKI{No: 1, Anchors: anchors(t, r.c, 3, r.c, r.d, home...)}); got.State != message.PKIRefused {
		t.Fatalf("a set that the pinned standby root has not signed: %+v", got)
	}
	for i, set := range [][]byte{anchors(t, r.b, 2, r.b, r.c, home...), anchors(t, r.c, 3, r.c, r.d, home...)} {
		p.offer(message.PKI{No: uint64(i + 2), Anchors: set})
		p.gone()
		p, _, reports = r.come()
		r.want(reports, inUse(uint64(i+2), r.old, uint64(i+2)))
		if name := p.conn.(*tls.Conn).ConnectionState().ServerName; name != "one.test" {
			t.Errorf("with set %d it is at %s", i+2, name)
		}
	}
}

package rollover

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/pki"
	"hawser/internal/registry"
)

const patience = 20 * time.Second

// outbox is where offers go.
type outbox struct{ sent chan identity.ID }

func (o *outbox) SendPKI(id identity.ID, _ []byte, done func(bool)) {
	o.sent <- id
	done(true)
}

// world is a registry with n devices in a rollover to generation 2.
type world struct {
	t    *testing.T
	reg  *registry.Registry
	box  *outbox
	s    *Service
	root *pki.Issuer
	leaf *x509.Certificate // under root
}

func print(id identity.ID, generation uint32) [32]byte {
	return sha256.Sum256(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, uint32(id)), generation))
}

func certificate(id identity.ID, generation uint32) registry.Certificate {
	return registry.Certificate{Fingerprint: print(id, generation), Principal: identity.DevicePrincipal(id), Generation: generation,
		DER: []byte("certificate"), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
}

func newWorld(t *testing.T, n int) *world {
	t.Helper()
	w := &world{t: t, box: &outbox{make(chan identity.ID, 10*n)}}
	path := filepath.Join(t.TempDir(), "registry.db")
	w.ok(registry.Create(t.Context(), path, registry.Meta{FleetID: [16]byte{1}, Created: time.Now()}))
	var err error
	w.reg, err = registry.Open(t.Context(), path, registry.Options{})
	w.ok(err)
	t.Cleanup(func() { w.reg.Close() })
	w.ok(w.reg.Update(t.Context(), func(tx *registry.Tx) error { return w.fill(tx, n) }))
	key, err := pki.GenerateKey()
	w.ok(err)
	w.root, err = pki.IssueBrokerRoot(key, pki.Name{Organisation: "Test", Country: "DE"}, "B", time.Now())
	w.ok(err)
	w.leaf, err = pki.IssueBrokerLeaf(w.root, "localhost", pub(t), time.Now())
	w.ok(err)
	w.start()
	return w
}

func (w *world) fill(tx *registry.Tx, n int) error {
	errs := []error{tx.AddGeneration("test", 1, []byte("1")), tx.AddGeneration("test", 2, []byte("2")),
		tx.AddAnchorSet("test", 1, []byte("set 1"), true)}
	for i := 1; i <= n; i++ {
		id := identity.ID(i)
		key := print(id, 0)
		c := certificate(id, 1)
		errs = append(errs, tx.Enrol("test", registry.Enrolment{ID: id, KeyHash: key, CSR: []byte("csr"), Certificate: &c, At: time.Now()}))
	}
	_, err := tx.StartRollover("test", registry.Rollover{FromGeneration: 1, ToGeneration: 2, FromAnchors: 1, ToAnchors: 2})
	errs = append(errs, err, tx.AddAnchorSet("test", 2, []byte("set 2"), false))
	for i := 1; i <= n; i++ {
		id := identity.ID(i)
		_, err := tx.RolloverCertificate("test", certificate(id, 2), print(id, 0))
		errs = append(errs, err)
	}
	return errors.Join(append(errs, tx.RolloverStep("test", registry.RolloverMoving))...)
}

// start makes the service and runs it until the test ends.
func (w *world) start() {
	w.t.Helper()
	var err error
	w.s, err = New(w.t.Context(), Config{Store: w.reg, Sender: w.box, Log: slog.New(slog.DiscardHandler),
		Encoding: func(identity.ID) message.Encoding { return message.CBOR },
		InUse: func(n uint64) *x509.Certificate {
			if n > 2 {
				return nil
			}
			return w.root.Cert
		}})
	w.ok(err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.s.Run(ctx)
	}()
	w.t.Cleanup(func() { cancel(); <-ended })
}

func (w *world) ok(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) offered() identity.ID {
	w.t.Helper()
	select {
	case id := <-w.box.sent:
		return id
	case <-time.After(patience):
		w.t.Fatal("no offer came")
		return 0
	}
}

// settle waits until the registry has all that was submitted.
func (w *world) settle() { w.ok(w.reg.Update(w.t.Context(), func(*registry.Tx) error { return nil })) }

func (w *world) report(id identity.ID, m message.PKIReport) {
	w.t.Helper()
	w.ok(w.s.Report(id, m.Encode(message.CBOR)))
	w.settle()
}

func (w *world) member(id identity.ID) (m registry.Member) {
	w.t.Helper()
	v, err := w.reg.LastRollover(w.t.Context())
	w.ok(err)
	w.ok(w.reg.Members(w.t.Context(), v, func(x registry.Member) error {
		if x.ID == id {
			m = x
		}
		return nil
	}))
	return m
}

// TestBoundedRate: no more than InFlight devices are on their way, and each that arrives
// makes room for another.
func TestBoundedRate(t *testing.T) {
	const all = InFlight + 5
	w := newWorld(t, all)
	for i := 1; i <= all; i++ {
		w.s.Ready(identity.ID(i))
	}
	var first identity.ID
	for range InFlight {
		first = w.offered()
	}
	w.settle()
	if n := len(w.box.sent); n != 0 {
		t.Fatalf("%d offers too many", n)
	}
	w.s.Admitted(first, print(first, 2), w.leaf)
	w.report(first, message.PKIReport{State: message.PKIInUse, Fingerprint: print(first, 2), Anchors: 2})
	if id := w.offered(); id <= InFlight {
		t.Errorf("%s was offered the same again", id)
	}
	if m := w.member(first); m.Progress != registry.ProgressProven {
		t.Errorf("%s is %s", first, m.Progress)
	}
}

// TestLiarsAreNamed: what a device says and the broker did not see counts for nothing.
func TestLiarsAreNamed(t *testing.T) {
	w := newWorld(t, 4)
	other, err := pki.IssueBrokerRoot(key(t), pki.Name{Organisation: "Test", Country: "DE"}, "A", time.Now())
	w.ok(err)
	foreign, err := pki.IssueBrokerLeaf(other, "localhost", pub(t), time.Now())
	w.ok(err)
	w.s.Admitted(1, print(1, 1), w.leaf)
	w.report(1, message.PKIReport{State: message.PKIInUse, Fingerprint: print(1, 2), Anchors: 2})
	w.s.Admitted(2, print(2, 2), w.leaf)
	w.report(2, message.PKIReport{State: message.PKIInUse, Fingerprint: print(2, 2), Anchors: 9})
	w.s.Admitted(3, print(3, 2), foreign)
	w.report(3, message.PKIReport{State: message.PKIInUse, Fingerprint: print(3, 2), Anchors: 2})
	w.s.Admitted(4, print(4, 1), w.leaf)
	w.report(4, message.PKIReport{No: 1, State: message.PKIRefused, Fingerprint: print(4, 1), Anchors: 1, Text: "no \u202eroom"})
	for id, want := range map[identity.ID]string{1: "connects with another", 2: "does not exist", 3: "under another root", 4: "refused: no ?room"} {
		if m := w.member(id); m.Progress != registry.ProgressFailed || !strings.Contains(m.Reason, want) {
			t.Errorf("%s is %s: %q, want %q", id, m.Progress, m.Reason, want)
		}
	}
}

// TestRestartGoesOn: what was proven stays so, what was not is offered again.
func TestRestartGoesOn(t *testing.T) {
	w := newWorld(t, 2)
	for id := identity.ID(1); id <= 2; id++ {
		w.s.Ready(id)
		w.offered()
	}
	w.s.Admitted(1, print(1, 2), w.leaf)
	w.report(1, message.PKIReport{State: message.PKIInUse, Fingerprint: print(1, 2), Anchors: 2})
	w.report(2, message.PKIReport{No: 1, State: message.PKIInstalled, Fingerprint: print(2, 1), Anchors: 1, Pending: 2})
	w.start()
	w.s.Ready(1)
	w.s.Ready(2)
	if id := w.offered(); id != 2 {
		t.Errorf("%s was offered what it has", id)
	}
	if m := w.member(2); m.Progress != registry.ProgressInstalled {
		t.Errorf("2 is %s", m.Progress)
	}
}

func key(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func pub(t *testing.T) *ecdsa.PublicKey { return &key(t).PublicKey }

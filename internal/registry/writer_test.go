package registry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"hawser/internal/identity"
)

// hold keeps the writer busy until the returned function is called, so that what
// is submitted meanwhile shares one commit.
func hold(r *Registry) (release func()) {
	entered, leave := make(chan struct{}), make(chan struct{})
	r.Submit(func(*Tx) error { close(entered); <-leave; return nil }, func(error) {})
	<-entered
	return func() { close(leave) }
}

func TestFailingChangeHarmsNobody(t *testing.T) {
	var told []Change
	r := newRegistry(t, Options{Changed: func(c Change) { told = append(told, c) }})
	release := hold(r)
	boom := errors.New("boom")
	var order []int
	errs := make([]error, 30)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Add(1)
		r.Submit(func(tx *Tx) error {
			if err := enrol(identity.ID(i + 1))(tx); err != nil {
				return err
			}
			if i%3 == 1 {
				return boom // after it has written
			}
			return nil
		}, func(err error) { errs[i] = err; order = append(order, i); wg.Done() })
	}
	release()
	wg.Wait()
	list, err := r.Devices(t.Context(), DeviceFilter{})
	if err != nil || len(list) != 20 {
		t.Fatalf("%d devices, %v", len(list), err)
	}
	for i, err := range errs {
		if want := i%3 == 1; errors.Is(err, boom) != want || (err != nil) != want {
			t.Errorf("change %d: %v", i, err)
		}
	}
	if !slices.IsSorted(order) || len(order) != 30 {
		t.Errorf("told in the order %v", order)
	}
	if n := auditCount(t, r); n != 40 {
		t.Errorf("%d audit rows for 20 enrolments with a certificate", n)
	}
	if len(told) != 40 || told[0].Kind != DeviceAdded || told[1].Kind != CertificateAdded {
		t.Errorf("%d changes told: %v", len(told), told)
	}
	for _, c := range told {
		if id, _ := c.Principal.ID(); (int(id)-1)%3 == 1 {
			t.Errorf("a change that failed was told: %v", c)
		}
	}
}

func TestChangeIsToldBeforeItsCaller(t *testing.T) {
	told := false
	var r *Registry
	r = newRegistry(t, Options{Changed: func(Change) {
		if _, err := r.Device(context.Background(), 7); err != nil {
			t.Errorf("not committed yet: %v", err)
		}
		told = true
	}})
	must(t, r, enrol(7))
	if !told {
		t.Error("the caller was told first")
	}
}

func TestCancelledBeforeItBegins(t *testing.T) {
	r := newRegistry(t, Options{})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := r.Update(ctx, enrol(7)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := r.Device(t.Context(), 7); !errors.Is(err, ErrNotFound) {
		t.Errorf("it was applied all the same: %v", err)
	}
}

func TestCloseFinishesWhatIsQueued(t *testing.T) {
	r := newRegistry(t, Options{})
	release := hold(r)
	errs := make(chan error, 100)
	for i := range 100 {
		r.Submit(enrol(identity.ID(i+1)), func(err error) { errs <- err })
	}
	closed := make(chan error)
	go func() { closed <- r.Close() }()
	release()
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if err := <-errs; err != nil && !errors.Is(err, ErrClosed) {
			t.Fatal(err)
		}
	}
	if err := r.Update(t.Context(), enrol(200)); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if list, err := reopen(t, r.Path(), Options{}).Devices(t.Context(), DeviceFilter{}); err != nil || len(list) != 100 {
		t.Errorf("%d devices, %v", len(list), err)
	}
}

func TestEveryChangeNeedsAnActor(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, enrol(1))
	must(t, r, func(tx *Tx) error { return tx.AddService("test", "dash", []Grant{{GrantRead, "a"}}) })
	dash := identity.Principal{Kind: identity.Service, Name: "dash"}
	for n := range 2 {
		must(t, r, func(tx *Tx) error { return tx.AddCertificate("test", validCert(dash, n+1)) })
	}
	before := auditCount(t, r)
	for name, apply := range map[string]func(*Tx) error{
		"enrol":   func(tx *Tx) error { return tx.Enrol("", Enrolment{ID: 2, KeyHash: keyOf(2), CSR: []byte{1}}) },
		"state":   func(tx *Tx) error { return tx.SetDeviceState("", 1, DeviceRevoked, "x") },
		"tag":     func(tx *Tx) error { return tx.TagDevice("", 1, []string{"x"}, nil) },
		"note":    func(tx *Tx) error { return tx.NoteDevice("", 1, "", "x") },
		"cert":    func(tx *Tx) error { return tx.AddCertificate("", certOf(identity.DevicePrincipal(1), 5)) },
		"replace": func(tx *Tx) error { return tx.ReplaceCertificate("", certOf(dash, 3)) },
		"used":    func(tx *Tx) error { return tx.ServiceUsed("", "dash", certOf(dash, 2).Fingerprint) },
		"service": func(tx *Tx) error { return tx.AddService("", "other", nil) },
		"give":    func(tx *Tx) error { return tx.ChangeGrants("", "dash", []Grant{{GrantRead, "b"}}, nil) },
		"take":    func(tx *Tx) error { return tx.ChangeGrants("", "dash", nil, []Grant{{GrantRead, "a"}}) },
		"revoke":  func(tx *Tx) error { return tx.RevokeService("", "dash", "x") },
		"command": func(tx *Tx) error { _, err := tx.QueueCommand(Command{Device: 1}); return err },
		"config":  func(tx *Tx) error { _, err := tx.SetConfig("", 1, nil); return err },
		"stream":  func(tx *Tx) error { return tx.AddStream("", "X") },
		"request": func(tx *Tx) error { return tx.AddRequest("", Request{ID: "1", Body: []byte{1}}) },
	} {
		if err := r.Update(t.Context(), apply); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if d, err := r.Device(t.Context(), 1); err != nil || d.State != DeviceActive || len(d.Tags) != 0 || auditCount(t, r) != before {
		t.Errorf("something stayed: %+v, %v", d, err)
	}
}

// TestEachChangeHasItsAuditRow counts rows after each operation.
func TestEachChangeHasItsAuditRow(t *testing.T) {
	r := newRegistry(t, Options{})
	var cid uint64
	dash := identity.Principal{Kind: identity.Service, Name: "dash"}
	steps := []struct {
		action string
		apply  func(*Tx) error
	}{
		{"device.enrol", func(tx *Tx) error { return tx.Enrol("test", Enrolment{ID: 1, KeyHash: keyOf(1), CSR: []byte{1}}) }},
		{"certificate.add", func(tx *Tx) error { return tx.AddCertificate("test", certOf(identity.DevicePrincipal(1), 1)) }},
		{"device.tag", func(tx *Tx) error { return tx.TagDevice("test", 1, []string{"x"}, []string{"y"}) }},
		{"device.note", func(tx *Tx) error { return tx.NoteDevice("test", 1, "", "n") }},
		{"command.queue", func(tx *Tx) (err error) {
			cid, err = tx.QueueCommand(Command{Device: 1, Name: "led", CreatedBy: "test"})
			return err
		}},
		{"command.delivered", func(tx *Tx) error { return tx.CommandDelivered(CommandRef{1, cid}, testMeta.Created) }},
		{"command.answered", func(tx *Tx) error {
			return tx.FinishCommand("device", CommandRef{1, cid}, Outcome{State: CommandAnswered})
		}},
		{"config.set", func(tx *Tx) error { _, err := tx.SetConfig("test", 1, nil); return err }},
		{"config.applied", func(tx *Tx) error { return tx.ConfigApplied(1, 1, 0, "", testMeta.Created) }},
		{"service.add", func(tx *Tx) error { return tx.AddService("test", "dash", nil) }},
		{"certificate.add", func(tx *Tx) error { return tx.AddCertificate("test", validCert(dash, 1)) }},
		{"certificate.add", func(tx *Tx) error { return tx.AddCertificate("test", validCert(dash, 2)) }},
		{"certificate.supersede", func(tx *Tx) error { return tx.ServiceUsed("test", "dash", certOf(dash, 2).Fingerprint) }},
		{"certificate.add", func(tx *Tx) error { return tx.ReplaceCertificate("test", certOf(dash, 3)) }},
		{"grant.give", func(tx *Tx) error { return tx.ChangeGrants("test", "dash", []Grant{{GrantRead, "a"}}, nil) }},
		{"grant.take", func(tx *Tx) error { return tx.ChangeGrants("test", "dash", nil, []Grant{{GrantRead, "a"}}) }},
		{"service.revoked", func(tx *Tx) error { return tx.RevokeService("test", "dash", "x") }},
		{"stream.add", func(tx *Tx) error { return tx.AddStream("test", "LOG") }},
		{"request.add", func(tx *Tx) error { return tx.AddRequest("test", Request{ID: "1", Body: []byte{1}}) }},
		{"request.done", func(tx *Tx) error { return tx.EndRequest("test", "1", RequestDone) }},
		{"device.revoked", func(tx *Tx) error { return tx.SetDeviceState("test", 1, DeviceRevoked, "x") }},
	}
	for i, s := range steps {
		must(t, r, s.apply)
		list, err := r.Audit(t.Context(), AuditFilter{})
		if err != nil || len(list) != i+1 || list[0].Action != s.action {
			t.Fatalf("after %s: %d rows, the last is %+v, %v", s.action, len(list), list[0], err)
		}
	}
	list, err := r.Audit(t.Context(), AuditFilter{Subject: "00000001", Actor: "test", Action: "device.tag", Since: testMeta.Created, Limit: 5})
	if err != nil || len(list) != 1 || list[0].Detail != `{"add":"x","remove":"y"}` {
		t.Errorf("%+v, %v", list, err)
	}
	if list, _ = r.Audit(t.Context(), AuditFilter{Before: list[0].No}); len(list) != 2 {
		t.Errorf("before: %v", list)
	}
	if _, err := r.Request(t.Context(), "1"); err != nil {
		t.Error(err)
	}
	if list, err := r.Requests(t.Context(), RequestDone, 0); err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
}

func TestConcurrentChangesAndReads(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, enrol(1))
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 50 {
				err := r.Update(context.Background(), func(tx *Tx) error {
					_, err := tx.QueueCommand(Command{Device: 1, Name: fmt.Sprint(g, i), CreatedBy: "test"})
					return err
				})
				if err != nil {
					t.Error(err)
				}
				if _, err := r.PendingCommands(context.Background(), 1, 0, 1); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	wg.Wait()
	list, err := r.PendingCommands(t.Context(), 1, 0, 1000)
	if err != nil || len(list) != 400 {
		t.Fatalf("%d, %v", len(list), err)
	}
	for i, c := range list {
		if c.CID != uint64(i+1) {
			t.Fatalf("command %d has cid %d", i, c.CID)
		}
	}
}

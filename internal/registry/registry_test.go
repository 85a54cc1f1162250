package registry

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"hawser/internal/identity"
)

var testMeta = Meta{FleetID: [16]byte{1, 2, 3}, Created: time.UnixMilli(1_700_000_000_000).UTC()}

// newRegistry makes and opens a registry that closes with the test.
func newRegistry(t testing.TB, o Options) *Registry {
	t.Helper()
	path := filepath.Join(t.TempDir(), "registry.db")
	if err := Create(t.Context(), path, testMeta); err != nil {
		t.Fatal(err)
	}
	return reopen(t, path, o)
}

func reopen(t testing.TB, path string, o Options) *Registry {
	t.Helper()
	r, err := Open(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// must applies a change that has to succeed.
func must(t testing.TB, r *Registry, apply func(*Tx) error) {
	t.Helper()
	if err := r.Update(context.Background(), apply); err != nil {
		t.Fatal(err)
	}
}

// refused applies a change that has to fail with want.
func refused(t testing.TB, r *Registry, want error, apply func(*Tx) error) {
	t.Helper()
	if err := r.Update(context.Background(), apply); !errors.Is(err, want) {
		t.Fatalf("got %v, want %v", err, want)
	}
}

func keyOf(n int) [32]byte {
	return sha256.Sum256(binary.BigEndian.AppendUint64([]byte("key"), uint64(n)))
}

func certOf(p identity.Principal, n int) Certificate {
	der := binary.BigEndian.AppendUint64([]byte("cert "+p.Name), uint64(n))
	return Certificate{Fingerprint: sha256.Sum256(der), Principal: p, Generation: 1, DER: der,
		NotBefore: testMeta.Created, NotAfter: testMeta.Created.AddDate(1, 0, 0)}
}

// enrol is an enrolment of device id with a key and certificate of its own.
func enrol(id identity.ID) func(*Tx) error {
	return func(tx *Tx) error {
		c := certOf(identity.DevicePrincipal(id), int(id))
		return tx.Enrol("test", Enrolment{ID: id, Class: "sensor", KeyHash: keyOf(int(id)), CSR: []byte{1},
			Certificate: &c, At: testMeta.Created})
	}
}

func auditCount(t testing.TB, r *Registry) int {
	t.Helper()
	list, err := r.Audit(context.Background(), AuditFilter{Limit: 1_000_000})
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestMetaSurvives(t *testing.T) {
	r := newRegistry(t, Options{})
	m, err := r.Meta(t.Context())
	if err != nil || m != testMeta {
		t.Fatalf("got %+v, %v", m, err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Create(t.Context(), r.Path(), testMeta); !errors.Is(err, ErrExists) {
		t.Fatalf("a second Create: %v", err)
	}
}

func TestStartEpoch(t *testing.T) {
	r := newRegistry(t, Options{})
	start := func(logStart uint64, logEpoch uint32) ServerStart {
		var s ServerStart
		must(t, r, func(tx *Tx) (err error) { s, err = tx.RecordStart(logStart, logEpoch, time.Now()); return err })
		return s
	}
	for i, step := range []struct {
		log   uint64
		epoch uint32
		want  ServerStart
	}{
		{0, 0, ServerStart{1, 0, false}},
		{1, 0, ServerStart{2, 0, false}},
		{1, 0, ServerStart{3, 0, false}}, // the log did not get start 2: a crash, no old registry
		{7, 0, ServerStart{8, 1, true}},  // the log has seen start 7, this registry only 3
		{9, 4, ServerStart{10, 5, true}}, // the same backup restored a second time
		{10, 5, ServerStart{11, 5, false}},
	} {
		if got := start(step.log, step.epoch); got != step.want {
			t.Errorf("step %d: got %+v, want %+v", i, got, step.want)
		}
	}
}

// TestCommandIDsOnlyGrow restores an old registry under a log that has seen more.
func TestCommandIDsOnlyGrow(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, enrol(1))
	var cids []uint64
	queue := func() {
		must(t, r, func(tx *Tx) error {
			cid, err := tx.QueueCommand(Command{Device: 1, Name: "x", CreatedBy: "test"})
			cids = append(cids, cid)
			return err
		})
	}
	start := func(number uint64, epoch uint32) {
		must(t, r, func(tx *Tx) error { _, err := tx.RecordStart(number, epoch, time.Now()); return err })
	}
	start(0, 0)
	queue()
	queue()
	start(5, 0)
	queue()
	queue()
	start(6, 1)
	queue()
	if want := []uint64{1, 2, 1<<32 | 1, 1<<32 | 2, 1<<32 | 3}; !slices.Equal(cids, want) {
		t.Errorf("got %x, want %x", cids, want)
	}
}

func TestEnrolment(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, enrol(0xABCD1234))
	t.Run("another key for the id", func(t *testing.T) {
		refused(t, r, ErrKey, func(tx *Tx) error {
			return tx.Enrol("test", Enrolment{ID: 0xABCD1234, KeyHash: keyOf(7), CSR: []byte{1}})
		})
	})
	t.Run("the key under another id", func(t *testing.T) {
		refused(t, r, ErrKey, func(tx *Tx) error {
			return tx.Enrol("test", Enrolment{ID: 0xABCD1235, KeyHash: keyOf(0xABCD1234), CSR: []byte{1}})
		})
	})
	t.Run("the same again with a new certificate", func(t *testing.T) {
		c := certOf(identity.DevicePrincipal(0xABCD1234), 2)
		must(t, r, func(tx *Tx) error {
			return tx.Enrol("test", Enrolment{ID: 0xABCD1234, KeyHash: keyOf(0xABCD1234), CSR: []byte{2}, Certificate: &c, Tags: []string{"b", "a"}})
		})
		list, err := r.Certificates(t.Context(), identity.DevicePrincipal(0xABCD1234))
		if err != nil || len(list) != 2 {
			t.Fatalf("%v, %v", list, err)
		}
		if csr, _ := r.CSR(t.Context(), 0xABCD1234); len(csr) != 1 || csr[0] != 1 {
			t.Errorf("the first CSR is kept for life, got %x", csr)
		}
		if got := active(t, r); len(got) != 1 || got[0].Fingerprint != c.Fingerprint {
			t.Errorf("active: %v", got)
		}
	})
	d, err := r.Device(t.Context(), 0xABCD1234)
	if err != nil || d.Class != "sensor" || len(d.Tags) != 2 || d.Tags[0] != "a" || d.Enrolled.IsZero() {
		t.Fatalf("%+v, %v", d, err)
	}
}

func active(t testing.TB, r *Registry) []ActiveCertificate {
	t.Helper()
	var list []ActiveCertificate
	err := r.ActiveCertificates(context.Background(), func(a ActiveCertificate) error {
		list = append(list, a)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestRevocation(t *testing.T) {
	r := newRegistry(t, Options{})
	id := identity.ID(0xABCD1234)
	must(t, r, enrol(id))
	must(t, r, func(tx *Tx) error {
		return tx.SaveSession(&Session{No: r.NextSession(), Key: SessionKey{identity.DevicePrincipal(id), id.String()}})
	})
	must(t, r, func(tx *Tx) error { return tx.SetDeviceState("test", id, DeviceQuarantined, "clone") })
	if got := active(t, r); len(got) != 0 {
		t.Fatalf("a quarantined device has an open door: %v", got)
	}
	refused(t, r, ErrState, func(tx *Tx) error { _, err := tx.QueueCommand(Command{Device: id, CreatedBy: "x"}); return err })
	must(t, r, func(tx *Tx) error { return tx.SetDeviceState("test", id, DeviceActive, "") })
	if got := active(t, r); len(got) != 1 {
		t.Fatalf("back from quarantine: %v", got)
	}
	var commands [2]uint64
	must(t, r, func(tx *Tx) (err error) {
		for i := range commands {
			if commands[i], err = tx.QueueCommand(Command{Device: id, CreatedBy: "x"}); err != nil {
				return err
			}
		}
		return tx.CommandDelivered(CommandRef{id, commands[0]}, testMeta.Created)
	})
	must(t, r, func(tx *Tx) error { return tx.SetDeviceState("test", id, DeviceRevoked, "stolen") })
	for i, want := range []CommandState{CommandUnknown, CommandCancelled} {
		if c, err := r.Command(t.Context(), CommandRef{id, commands[i]}); err != nil || c.State != want {
			t.Errorf("%+v, %v, want %s", c, err, want)
		}
	}
	refused(t, r, ErrFenced, func(tx *Tx) error { // the broker was slower than the revocation
		return tx.SaveSession(&Session{No: r.NextSession(), Key: SessionKey{identity.DevicePrincipal(id), id.String()}})
	})
	if got := active(t, r); len(got) != 0 {
		t.Fatalf("revoked: %v", got)
	}
	if n := len(sessions(t, r)); n != 0 {
		t.Fatalf("%d sessions of a revoked device", n)
	}
	refused(t, r, ErrState, func(tx *Tx) error { return tx.SetDeviceState("test", id, DeviceActive, "") })
	refused(t, r, ErrState, enrol(id))
	refused(t, r, ErrState, func(tx *Tx) error {
		return tx.Enrol("test", Enrolment{ID: id, KeyHash: keyOf(int(id)), CSR: []byte{1}})
	})
	refused(t, r, ErrState, func(tx *Tx) error { return tx.AddCertificate("test", certOf(identity.DevicePrincipal(id), 9)) })
}

func TestServicesAndGrants(t *testing.T) {
	r := newRegistry(t, Options{})
	dash := identity.Principal{Kind: identity.Service, Name: "dash"}
	read := Grant{GrantRead, "private/+/u/#"}
	must(t, r, func(tx *Tx) error { return tx.AddService("test", "dash", []Grant{read}) })
	must(t, r, func(tx *Tx) error { return tx.AddCertificate("test", certOf(dash, 1)) })
	refused(t, r, ErrExists, func(tx *Tx) error { return tx.AddService("test", "dash", nil) })
	refused(t, r, ErrInvalid, func(tx *Tx) error { return tx.AddService("test", "abcd1234", nil) })
	refused(t, r, ErrNotFound, func(tx *Tx) error { return tx.ChangeGrants("test", "nobody", []Grant{read}, nil) })
	for _, bad := range []Grant{{GrantRead, "$SYS/#"}, {GrantRead, "a/#/b"}, {"all", "a"}, {GrantWrite, ""}} {
		refused(t, r, ErrInvalid, func(tx *Tx) error { return tx.ChangeGrants("test", "dash", []Grant{bad}, nil) })
	}
	refused(t, r, ErrNotFound, func(tx *Tx) error { return tx.ChangeGrants("test", "dash", nil, []Grant{{GrantWrite, "x"}}) })
	s, err := r.Service(t.Context(), "dash")
	if err != nil || len(s.Grants) != 1 || s.Grants[0] != read {
		t.Fatalf("%+v, %v", s, err)
	}
	must(t, r, func(tx *Tx) error { return tx.RevokeService("test", "dash", "gone") })
	if s, _ = r.Service(t.Context(), "dash"); s.State != ServiceRevoked || len(s.Grants) != 0 || len(active(t, r)) != 0 {
		t.Fatalf("%+v", s)
	}
	refused(t, r, ErrState, func(tx *Tx) error { return tx.ChangeGrants("test", "dash", []Grant{read}, nil) })
	refused(t, r, ErrFenced, func(tx *Tx) error {
		return tx.SaveSession(&Session{No: r.NextSession(), Key: SessionKey{dash, "any"}})
	})
}

func TestDeviceLists(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, func(tx *Tx) error {
		for i := 0; i < 300; i++ {
			id := identity.ID(0xAB000000 + i)
			if i >= 200 {
				id = identity.ID(0xFFFFFF00 + i - 200)
			}
			if err := enrol(id)(tx); err != nil {
				return err
			}
			if i%3 == 0 {
				if err := tx.TagDevice("test", id, []string{"third"}, nil); err != nil {
					return err
				}
			}
		}
		return tx.SetDeviceState("test", 0xAB000003, DeviceRetired, "")
	})
	count := func(f DeviceFilter) (n int) {
		f.Limit = 7
		for {
			list, err := r.Devices(t.Context(), f)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range list {
				if d.ID <= f.After {
					t.Fatalf("%s after %s", d.ID, f.After)
				}
				f.After = d.ID
			}
			if n += len(list); len(list) < 7 {
				return n
			}
		}
	}
	for _, c := range []struct {
		f    DeviceFilter
		want int
	}{
		{DeviceFilter{}, 300}, {DeviceFilter{Prefix: "AB"}, 200}, {DeviceFilter{Prefix: "F"}, 100},
		{DeviceFilter{Prefix: "AB000003"}, 1}, {DeviceFilter{Tag: "third"}, 100},
		{DeviceFilter{Tag: "third", Prefix: "AB"}, 67}, {DeviceFilter{State: DeviceRetired}, 1},
		{DeviceFilter{State: DeviceActive, Tag: "third"}, 99}, {DeviceFilter{Class: "sensor"}, 300}, {DeviceFilter{Class: "x"}, 0},
	} {
		if got := count(c.f); got != c.want {
			t.Errorf("%+v: %d, want %d", c.f, got, c.want)
		}
	}
	for _, bad := range []string{"ab", "G", "ABCD12345", "-1", "+1"} {
		if _, err := r.Devices(t.Context(), DeviceFilter{Prefix: bad}); !errors.Is(err, ErrInvalid) {
			t.Errorf("prefix %q: %v", bad, err)
		}
	}
	counts, err := r.DeviceCounts(t.Context())
	if err != nil || counts[DeviceActive] != 299 || counts[DeviceRetired] != 1 {
		t.Errorf("%v, %v", counts, err)
	}
}

func TestHelloAndConfig(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, enrol(5))
	h := Hello{Class: "sensor", Firmware: "1.2", Image: []byte{9}, TLS: "x", Boot: "power", Nonce: 1<<64 - 1, Features: []string{"a"}, Encoding: "json", At: testMeta.Created}
	before := auditCount(t, r)
	must(t, r, func(tx *Tx) error { _, err := tx.SaveHello(5, h); return err })
	must(t, r, func(tx *Tx) error { return tx.SaveSeen([]Seen{{5, testMeta.Created}, {99, testMeta.Created}}) })
	if n := auditCount(t, r); n != before {
		t.Errorf("a hello wrote %d audit rows", n-before)
	}
	d, err := r.Device(t.Context(), 5)
	if err != nil || d.Hello == nil || fmt.Sprint(*d.Hello) != fmt.Sprint(h) || d.LastSeen != testMeta.Created {
		t.Fatalf("%+v %+v, %v", d, d.Hello, err)
	}
	set := func() (v uint64) {
		must(t, r, func(tx *Tx) (err error) { v, err = tx.SetConfig("test", 5, []byte{0xA0}); return err })
		return v
	}
	if v := set(); v != 1 {
		t.Errorf("first version %d", v)
	}
	must(t, r, func(tx *Tx) error { return tx.ConfigApplied(5, 41, 0, "", testMeta.Created) })
	if v := set(); v != 42 {
		t.Errorf("version %d after the device has reported 41", v)
	}
	refused(t, r, ErrInvalid, func(tx *Tx) error { return tx.ConfigApplied(5, 1<<63, 0, "", testMeta.Created) })
	c, err := r.DeviceConfig(t.Context(), 5)
	if err != nil || c.Version != 42 || c.AppliedVersion != 41 {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestWriterIsDurable(t *testing.T) {
	r := newRegistry(t, Options{})
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1"} {
		var got string
		must(t, r, func(tx *Tx) error { return tx.row("PRAGMA "+pragma, nil, &got) })
		if got != want {
			t.Errorf("%s is %s, want %s", pragma, got, want)
		}
	}
	if _, err := r.read.Exec(`DELETE FROM meta`); err == nil {
		t.Error("a reader can write")
	}
}

// FuzzPrefix holds the range of a prefix against the spelling of its ends.
func FuzzPrefix(f *testing.F) {
	for _, seed := range []string{"", "A", "AB00", "FFFFFFFF", "00000000", "g", "+1", "ab", "123456789"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		low, high, err := prefixRange(s)
		if err != nil {
			return
		}
		first, last := identity.ID(low).String(), identity.ID(high).String()
		zeros, ones := strings.Repeat("0", 8-len(s)), strings.Repeat("F", 8-len(s))
		if first != s+zeros || last != s+ones {
			t.Errorf("%q: %s to %s", s, first, last)
		}
	})
}

package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"hawser/device"
	"hawser/internal/admin"
	"hawser/internal/backup"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// backUp gives the whole backup of a running server.
func (r *rig) backUp() []byte {
	r.t.Helper()
	var out bytes.Buffer
	r.ok(r.api.Backup(r.t.Context(), &out))
	return out.Bytes()
}

func noPassphrase() ([]byte, error) { return nil, errors.New("nobody knows a passphrase") }

// restored serves what a backup gives, in a directory of its own.
func (r *rig) restored(data []byte) *rig {
	r.t.Helper()
	dir := filepath.Join(r.t.TempDir(), "new")
	_, err := Restore(r.t.Context(), RestoreConfig{File: bytes.NewReader(data), Dir: dir, Passphrase: noPassphrase, Actor: "test"})
	r.ok(err)
	r.stop()
	return serve(r.t, dir)
}

// members reads a backup.
func members(t *testing.T, data []byte) map[string][]byte {
	t.Helper()
	b, err := backup.Open(bytes.NewReader(data), noPassphrase)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string][]byte{}
	for {
		m, r, err := b.Next()
		if errors.Is(err, io.EOF) {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		if got[m.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

// What a backup holds: all that the server needs, and no CA key, wherever one lies.
func TestBackupHoldsNoCAKey(t *testing.T) {
	r := serve(t, makeFleet(t))
	r.device("ABCD1234")
	key, err := os.ReadFile(filepath.Join(r.dir, "ca-a", "device-1.key"))
	r.ok(err)
	r.ok(os.WriteFile(filepath.Join(r.dir, "server", "stray.pem"), key, 0o600))
	r.ok(os.WriteFile(filepath.Join(r.dir, "server", "requests", "note.json"), []byte("{}"), 0o600))
	got := members(t, r.backUp())
	for _, want := range []string{"hawser.toml", "registry.db", "log/LOG", "log/Q", "log/R", "log/H", "manifest.json", "server/anchors.cose",
		"server/broker-roots.crt", "server/device-cas.crt", "server/service-cas.crt", "server/broker-localhost.key",
		"server/broker-localhost.crt", "server/requests/note.json"} {
		if len(got[want]) == 0 {
			t.Errorf("there is no %s", want)
		}
	}
	l, err := fleet.OpenLayout(r.dir)
	r.ok(err)
	keys := l.CAKeysPresent()
	if len(keys) < 5 {
		t.Fatalf("the fleet has the CA keys %v", keys)
	}
	for _, k := range keys {
		text, err := os.ReadFile(filepath.Join(r.dir, k))
		r.ok(err)
		for name, data := range got {
			if bytes.Contains(data, bytes.TrimSpace(text)) {
				t.Errorf("%s holds %s", name, k)
			}
		}
	}
	for name := range got {
		if strings.HasPrefix(name, "ca-") || strings.Contains(name, ".tmp-") || strings.Contains(name, "lock") {
			t.Errorf("%s is in it", name)
		}
	}
	left, err := filepath.Glob(filepath.Join(r.dir, "server", ".tmp-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("%v is left: %v", left, err)
	}
}

// stuck is a client that stops reading in the middle.
type stuck struct{ reached, on chan struct{} }

func (s *stuck) Write(b []byte) (int, error) {
	select {
	case s.reached <- struct{}{}:
	default:
	}
	<-s.on
	return len(b), nil
}

// Somebody who does not take his backup holds up neither another change, nor the
// end of the server; and a second backup at the same time is refused.
func TestBackupThatNobodyTakes(t *testing.T) {
	r := serve(t, makeFleet(t))
	r.ok(os.WriteFile(filepath.Join(r.dir, "server", "requests", "big"), make([]byte, 8<<20), 0o600))
	s := &stuck{make(chan struct{}, 1), make(chan struct{})}
	ended := make(chan error, 1)
	go func() { ended <- r.api.Backup(t.Context(), s) }()
	<-s.reached
	if err := r.api.Backup(t.Context(), io.Discard); !admin.IsKind(err, admin.Conflict) {
		t.Errorf("a second backup: %v", err)
	}
	_, _, cert := r.device("ABCD1234")
	r.connect(cert, "ABCD1234").publish("private/ABCD1234/u/x", "stored all the same")
	r.stop()
	close(s.on)
	if err := <-ended; err == nil {
		t.Error("half a backup was taken for a whole one")
	}
}

// kitUnit is a device of the device kit until the end of the test or stop.
type kitUnit struct {
	dev  *device.Device
	ran  chan string // names of commands that ran
	up   chan string
	stop func()
}

func (r *rig) kitUnit(files string) *kitUnit {
	r.t.Helper()
	cfg, err := device.Load(files)
	r.ok(err)
	k := &kitUnit{ran: make(chan string, 100), up: make(chan string, 100)}
	cfg.Servers, cfg.BackoffMin, cfg.BackoffMax = []string{"localhost:" + r.port()}, 10*time.Millisecond, 50*time.Millisecond
	cfg.Command = func(_ context.Context, c device.Command) (device.Value, error) {
		k.ran <- c.Name
		return nil, nil
	}
	cfg.Configure = func(context.Context, uint64, device.Value) error { return nil }
	cfg.Connected = func(s string) { k.up <- s }
	k.dev, err = device.New(cfg)
	r.ok(err)
	ctx, cancel := context.WithCancel(r.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- k.dev.Run(ctx) }()
	k.stop = sync.OnceFunc(func() {
		cancel()
		<-ended
		if c, ok := cfg.Store.(io.Closer); ok {
			r.ok(c.Close())
		}
	})
	r.t.Cleanup(k.stop)
	return k
}

func (r *rig) send(id identity.ID, name string) admin.Command {
	r.t.Helper()
	c, err := r.api.Send(r.t.Context(), id, admin.NewCommand{Name: name})
	r.ok(err)
	return c
}

func (r *rig) outcome(c admin.Command, want string) {
	r.t.Helper()
	var have string
	until(r.t, fmt.Sprintf("command %s is %s", c.Name, want), func() bool {
		v, err := r.api.Command(r.t.Context(), c.Device, c.CID, 0)
		r.ok(err)
		have = v.State
		return have == want
	})
}

// No command runs twice: one that was open at the backup and ran since is sent again
// after the restore, the device says duplicate, and it ends unknown. New commands
// work, and configuration versions go on growing, though the device has seen higher
// ones than the backup knows.
func TestNoCommandRunsTwiceAfterARestore(t *testing.T) {
	r := serve(t, makeFleet(t))
	id, files, _ := r.device("ABCD1234")
	k := r.kitUnit(files)
	first := r.send(id, "first")
	r.outcome(first, "answered")
	k.stop()
	open := r.send(id, "open")
	data := r.backUp()
	k2 := r.kitUnit(files)
	r.outcome(open, "answered")
	for range 3 {
		r.outcome(r.send(id, "later"), "answered")
	}
	var set admin.Config
	for i := range 3 {
		var err error
		set, err = r.api.SetConfig(t.Context(), id, []byte(fmt.Sprintf(`{"n":%d}`, i)))
		r.ok(err)
	}
	until(t, "the device reports its configuration", func() bool {
		c, err := r.api.Config(t.Context(), id)
		r.ok(err)
		return c.AppliedVersion == set.Version
	})
	k2.stop()
	n := r.restored(data)
	k3 := n.kitUnit(files)
	n.outcome(open, "unknown")
	command := fmt.Sprint("ABCD1234 true command ", open.CID)
	if list := n.aheadNow(); !slices.Contains(list, command) {
		t.Errorf("ahead are %q, without the command", list)
	}
	fresh := n.send(id, "fresh")
	n.outcome(fresh, "answered")
	if list := n.aheadNow(); slices.Contains(list, command) {
		t.Errorf("ahead are %q, though a later command is answered", list)
	}
	again, err := n.api.SetConfig(t.Context(), id, []byte(`{"n":9}`))
	n.ok(err)
	if again.Version <= set.Version {
		t.Errorf("version %d after the restore, %d before", again.Version, set.Version)
	}
	until(t, "the device takes the new configuration", func() bool {
		c, err := n.api.Config(t.Context(), id)
		n.ok(err)
		return c.AppliedVersion == again.Version
	})
	k3.stop()
	var ran []string
	for _, c := range []chan string{k.ran, k2.ran, k3.ran} {
		close(c)
		for name := range c {
			ran = append(ran, name)
		}
	}
	if want := []string{"first", "open", "later", "later", "later", "fresh"}; !slices.Equal(ran, want) {
		t.Errorf("the device ran %v, not %v", ran, want)
	}
}

// A certificate that was imported after the backup is not forgotten silently: it is
// refused, but who has proven to hold it is listed, and may be adopted.
func TestCertificateNewerThanTheBackup(t *testing.T) {
	r := serve(t, makeFleet(t))
	id, files, old := r.device("ABCD1234")
	key, err := pki.ReadKey(filepath.Join(files, "device.key"), nil)
	r.ok(err)
	other, err := pki.GenerateKey()
	r.ok(err)
	data := r.backUp()
	csr := csrOf(t, key)
	cert := r.ca(func(ca *fleet.CA) (*x509.Certificate, error) { return ca.EnrollDevice(id, csr, "", time.Now()) })
	_, err = r.api.Enroll(t.Context(), id, admin.Enrolment{CSR: csr.DER, Certificate: cert.Raw})
	r.ok(err)
	r.device("ABCD5678")
	otherCert := r.ca(func(ca *fleet.CA) (*x509.Certificate, error) {
		return ca.EnrollDevice(id+1, csrOf(t, other), "", time.Now())
	})
	pair := tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
	n := r.restored(data)
	if s, err := n.api.Status(t.Context()); err != nil || s.Restored.IsZero() || s.Ahead != 0 {
		t.Fatalf("status after the restore: %+v, %v", s, err)
	}
	// Without the key the certificate, which is public, tells nothing.
	stolen := tls.Certificate{Certificate: pair.Certificate, PrivateKey: &mute{key.Public(), other}}
	if _, err := n.dial(stolen, "ABCD1234"); err == nil {
		t.Fatal("a thief of a certificate was let in")
	}
	n.logged("connection rejected", "invalid signature")
	n.settled()
	n.ahead()
	forged := r.forge(id, other)
	if _, err := n.dial(forged, "ABCD1234"); err == nil {
		t.Fatal("another key was let in under a known id")
	}
	n.logged("connection rejected", "never imported", fmt.Sprintf("%x", pki.Fingerprint(forged.Certificate[0])))
	n.settled()
	n.ahead()
	if _, err := n.dial(pair, "ABCD1234"); err == nil {
		t.Fatal("a certificate that the registry does not know was let in")
	}
	n.logged("connection rejected", "never imported")
	n.ahead("ABCD1234 true certificate " + fmt.Sprintf("%x", pki.Fingerprint(cert.Raw)))
	stranger := tls.Certificate{Certificate: [][]byte{otherCert.Raw}, PrivateKey: other}
	if _, err := n.dial(stranger, "ABCD1235"); err == nil {
		t.Fatal("a device that the registry does not know was let in")
	}
	n.ahead("ABCD1234 true certificate "+fmt.Sprintf("%x", pki.Fingerprint(cert.Raw)),
		"ABCD1235 false certificate "+fmt.Sprintf("%x", pki.Fingerprint(otherCert.Raw)))
	if s, err := n.api.Status(t.Context()); err != nil || s.Ahead != 2 || !slices.Equal(s.AheadDevices, []identity.ID{id, id + 1}) {
		t.Errorf("status names %d devices, %v: %v", s.Ahead, s.AheadDevices, err)
	}
	if _, err := n.api.Adopt(t.Context(), id+1); !admin.IsKind(err, admin.NotFound) {
		t.Errorf("a device that is not known was adopted: %v", err)
	}
	if c, err := n.api.Adopt(t.Context(), id); err != nil || c.State != "active" {
		t.Fatalf("adopt: %+v, %v", c, err)
	}
	n.connect(pair, "ABCD1234").ping()
	if _, err := n.dial(old, "ABCD1234"); err == nil {
		t.Error("the certificate before it is let in as well")
	}
	if _, err := n.api.Adopt(t.Context(), id); !admin.IsKind(err, admin.NotFound) {
		t.Errorf("it was adopted twice: %v", err)
	}
}

// ahead waits for exactly this list.
func (r *rig) ahead(want ...string) {
	r.t.Helper()
	until(r.t, fmt.Sprintf("ahead: %v", want), func() bool { return slices.Equal(r.aheadNow(), want) })
}

func (r *rig) aheadNow() (have []string) {
	r.t.Helper()
	list, err := r.api.Ahead(r.t.Context(), 0)
	r.ok(err)
	for _, a := range list {
		have = append(have, fmt.Sprint(a.Device, a.Known, " ", a.What, " ", a.Detail))
	}
	return have
}

// settled returns when what the broker told the server before is worked off.
func (r *rig) settled() {
	r.t.Helper()
	done := make(chan struct{})
	r.srv.work.do(func() { close(done) })
	<-done
}

// forge signs with the device CA what its journal would refuse.
func (r *rig) forge(id identity.ID, key *ecdsa.PrivateKey) tls.Certificate {
	r.t.Helper()
	ca, err := pki.ReadKey(filepath.Join(r.dir, "ca-a", "device-1.key"), nil)
	r.ok(err)
	l, err := fleet.OpenLayout(r.dir)
	r.ok(err)
	issuer, err := pki.NewIssuer(l.Trust().DeviceCAs[0], ca, pki.DeviceCA)
	r.ok(err)
	leaf, err := pki.IssueDeviceLeaf(issuer, id, &key.PublicKey, time.Now())
	r.ok(err)
	return tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}
}

// mute is a key that signs with another one than it says.
type mute struct {
	pub  crypto.PublicKey
	real *ecdsa.PrivateKey
}

func (m *mute) Public() crypto.PublicKey { return m.pub }

func (m *mute) Sign(rand io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	return m.real.Sign(rand, digest, o)
}

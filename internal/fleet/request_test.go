package fleet

import (
	"crypto/x509"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/internal/pki"
)

// agree types what is asked for, and keeps what was shown.
func agree(shown *string) Confirm {
	return func(summary, want string) (string, error) {
		*shown = summary
		return want, nil
	}
}

func never(t *testing.T) Confirm {
	return func(summary, _ string) (string, error) {
		t.Errorf("asked about\n%s", summary)
		return "", errors.New("nobody is there")
	}
}

func request(t *testing.T, l *Layout, kind, subject, root string, csr *pki.CSR) (*pki.Request, []byte) {
	t.Helper()
	r, err := pki.NewRequest(l.FleetID(), kind, subject, csr)
	if err != nil {
		t.Fatal(err)
	}
	r.Root = root
	path, err := l.SaveRequest(r)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return r, file
}

// The production way from end to end: the server has no CA key, the safe has no server.
func TestRequestGoesToTheSafeAndBack(t *testing.T) {
	l := mustInit(t, false)
	safe := t.TempDir()
	for _, d := range []string{"a", "b"} {
		if err := os.Rename(l.CADir(d), filepath.Join(safe, d)); err != nil {
			t.Fatal(err)
		}
	}
	a, b := mustCA(t, filepath.Join(safe, "a"), passA), mustCA(t, filepath.Join(safe, "b"), passB)
	csr := csrOf(t, newKey(t))
	_, file := request(t, l, pki.KindDevice, "ABCD1234", "", csr)
	var shown string
	if _, err := a.SignRequest(file, func(_, _ string) (string, error) { return "yes", nil }, time.Now()); !errors.Is(err, ErrNotConfirmed) {
		t.Error("signed without being confirmed:", err)
	}
	if _, err := b.SignRequest(file, agree(&shown), time.Now()); !errors.Is(err, ErrNotHere) {
		t.Error("ca-b signed a device:", err)
	}
	result, err := a.SignRequest(file, agree(&shown), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"device", "ABCD1234", l.Config.Fleet.ID.String()} {
		if !strings.Contains(shown, want) {
			t.Errorf("no %q in what was shown:\n%s", want, shown)
		}
	}
	req, certs, err := l.OpenResult(result)
	if err != nil || req.Subject != "ABCD1234" || len(certs) != 1 {
		t.Fatal(err)
	}
	if err := l.DropRequest(req); err != nil {
		t.Fatal(err)
	}
	if _, _, err := l.OpenResult(result); err == nil || !strings.Contains(err.Error(), "no request") {
		t.Error("imported without a request:", err)
	}
	// The same id and key again: the journal vouches.
	_, file = request(t, l, pki.KindDevice, "ABCD1234", "", csr)
	if _, err := a.SignRequest(file, never(t), time.Now()); err != nil {
		t.Error(err)
	}
	// Another key for that id, whatever is typed.
	_, file = request(t, l, pki.KindDevice, "ABCD1234", "", csrOf(t, newKey(t)))
	if _, err := a.SignRequest(file, agree(&shown), time.Now()); !errors.Is(err, pki.ErrBound) {
		t.Error(err)
	}
	text, err := os.ReadFile(filepath.Join(safe, "a", journalFile))
	if err != nil || !strings.Contains(string(text), `"vouched":"typed"`) || !strings.Contains(string(text), `"vouched":"journal"`) {
		t.Errorf("%v\n%s", err, text)
	}
}

func TestRequestOfAnotherFleet(t *testing.T) {
	l, other := mustInit(t, true), mustInit(t, true)
	r, file := request(t, l, pki.KindService, "dashboard", "", csrOf(t, newKey(t)))
	var shown string
	if _, err := mustCA(t, other.CADir("a"), "").SignRequest(file, agree(&shown), time.Now()); err == nil || !strings.Contains(err.Error(), "fleet") {
		t.Error(err)
	}
	if _, err := other.SaveRequest(r); err == nil {
		t.Error("another fleet's request was kept")
	}
}

// A new leaf under root B, with a new key: the old pair serves until the new one is whole.
func TestBrokerLeafUnderRootB(t *testing.T) {
	const domain = "mqtt.example.com"
	l := mustInit(t, true)
	before, err := l.LoadBrokerLeaf(domain, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	key, err := l.NewBrokerKey(domain)
	if err != nil {
		t.Fatal(err)
	}
	again, err := l.NewBrokerKey(domain)
	if err != nil || !again.Equal(key) {
		t.Error("a second request made another key:", err)
	}
	_, file := request(t, l, pki.KindBroker, domain, "b", csrOf(t, key))
	var shown string
	if _, err := mustCA(t, l.CADir("a"), "").SignRequest(file, agree(&shown), time.Now()); !errors.Is(err, ErrNotHere) {
		t.Error("root A signed what was for root B:", err)
	}
	result, err := mustCA(t, l.CADir("b"), "").SignRequest(file, agree(&shown), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	_, certs, err := l.OpenResult(result)
	if err != nil {
		t.Fatal(err)
	}
	if now, err := l.LoadBrokerLeaf(domain, time.Now()); err != nil || !now.Leaf.Equal(before.Leaf) {
		t.Error("the old pair no longer serves:", err)
	}
	if got, err := l.InstallBrokerLeaf(certs[0].Raw); err != nil || got != domain {
		t.Fatal(got, err)
	}
	after, err := l.LoadBrokerLeaf(domain, time.Now())
	if err != nil || !after.Leaf.Equal(certs[0]) || after.Leaf.Issuer.CommonName != "Hawser broker root B" {
		t.Fatal(err)
	}
	if _, err := os.Stat(l.nextKey(domain)); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the waiting key is still there")
	}
	if _, err := l.InstallBrokerLeaf(certs[0].Raw); err == nil {
		t.Error("installed without a key that waits for it")
	}
}

// A crash at each step of the installation leaves a pair that belongs together.
func TestInstallBrokerLeafSurvivesACrash(t *testing.T) {
	const domain = "mqtt.example.com"
	for step := range 3 {
		l := mustInit(t, true)
		key, err := l.NewBrokerKey(domain)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := mustCA(t, l.CADir("a"), "").IssueBroker(domain, &key.PublicKey, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(l.nextCert(domain), pki.EncodeCert(cert.Raw), 0o600); err != nil {
			t.Fatal(err)
		}
		if step >= 1 {
			if err := os.Rename(l.nextKey(domain), l.BrokerKeyPath(domain)); err != nil {
				t.Fatal(err)
			}
		}
		if step == 2 {
			if err := os.Rename(l.nextCert(domain), l.BrokerCertPath(domain)); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			again, err := OpenLayout(l.Dir)
			if err != nil {
				t.Fatalf("step %d: %v", step, err)
			}
			got, err := again.LoadBrokerLeaf(domain, time.Now())
			if err != nil || got.Leaf.Equal(cert) != (step >= 1) {
				t.Errorf("step %d: %v", step, err)
			}
		}
	}
}

// A reader that runs while leaves are installed, as a server does beside the command,
// never sees a pair that does not belong together, and neither trips over the other.
func TestInstallBesideAReader(t *testing.T) {
	const domain = "mqtt.example.com"
	l := mustInit(t, true)
	ca := mustCA(t, l.CADir("a"), "")
	done, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-done:
				stopped <- nil
				return
			default:
			}
			if _, err := l.LoadBrokerLeaf(domain, time.Now()); err != nil {
				stopped <- err
				return
			}
		}
	}()
	for range 50 {
		key, err := l.NewBrokerKey(domain)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := ca.IssueBroker(domain, &key.PublicKey, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.InstallBrokerLeaf(cert.Raw); err != nil {
			t.Error(err)
		}
	}
	close(done)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

func TestInstallBrokerLeafRefuses(t *testing.T) {
	const domain = "mqtt.example.com"
	l, other := mustInit(t, true), mustInit(t, true)
	key, err := l.NewBrokerKey(domain)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := mustCA(t, other.CADir("a"), "").IssueBroker(domain, &key.PublicKey, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	ca := mustCA(t, l.CADir("a"), "")
	otherKey, err := ca.IssueBroker(domain, &newKey(t).PublicKey, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	device, err := ca.EnrollDevice(1, csrOf(t, key), "", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]*x509.Certificate{"another fleet's": foreign, "for another key": otherKey, "a device's": device} {
		if _, err := l.InstallBrokerLeaf(c.Raw); err == nil {
			t.Errorf("%s certificate was installed", name)
		}
	}
	if _, err := l.NewBrokerKey("../../etc/x"); !errors.Is(err, pki.ErrDomain) {
		t.Error(err)
	}
}

// The certificate of one domain does not serve another.
func TestBrokerPairOfAnotherDomain(t *testing.T) {
	l := mustInit(t, true)
	for _, path := range []func(string) string{l.BrokerCertPath, l.BrokerKeyPath} {
		if err := os.Rename(path("rescue.example.com"), path("mqtt.example.com")); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.LoadBrokerLeaf("mqtt.example.com", time.Now()); err == nil || !strings.Contains(err.Error(), "is for rescue.example.com") {
		t.Error(err)
	}
}

// A key and a certificate that do not belong together are not served, and a third
// file beside them does not change that.
func TestBrokerPairBelongsTogether(t *testing.T) {
	const domain = "mqtt.example.com"
	l := mustInit(t, true)
	cert, err := mustCA(t, l.CADir("a"), "").IssueBroker(domain, &newKey(t).PublicKey, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(l.nextCert(domain), pki.EncodeCert(cert.Raw), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(l.BrokerKeyPath(domain)); err != nil {
		t.Fatal(err)
	}
	if err := pki.WriteKey(l.BrokerKeyPath(domain), newKey(t), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenLayout(l.Dir); err == nil || !strings.Contains(err.Error(), "does not belong to") {
		t.Error(err)
	}
}

// A result file that somebody else wrote finds no request, whatever name it gives.
func TestOpenResultStaysInItsDirectory(t *testing.T) {
	l := mustInit(t, true)
	for _, hash := range []string{"../../hawser", strings.Repeat("0", 64), hex.EncodeToString([]byte("x"))} {
		if _, _, err := l.OpenResult([]byte(`{"format":"hawser result 1","request":"` + hash + `","certificates":[]}`)); err == nil {
			t.Errorf("%s was found", hash)
		}
	}
}

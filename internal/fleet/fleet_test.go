package fleet

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/internal/config"
	"hawser/internal/durable"
	"hawser/internal/pki"
)

const (
	passA = "passphrase of the first safe"
	passB = "passphrase of the second safe"
)

func ask(p string) func() ([]byte, error) { return func() ([]byte, error) { return []byte(p), nil } }

func passphrases(label string) ([]byte, error) {
	return []byte(map[string]string{"ca-a": passA, "ca-b": passB}[label]), nil
}

func options(t *testing.T, trial bool) InitOptions {
	t.Helper()
	return InitOptions{
		Dir: filepath.Join(t.TempDir(), "fleet"), Trial: trial, Passphrases: passphrases,
		Domains: []string{"mqtt.example.com", "rescue.example.com"}, Organisation: "Acme Pumps", Country: "DE",
	}
}

// mustInit makes a trial fleet, or gives a copy of the one production fleet that
// TestMain made: its scrypt costs ten seconds under the race detector.
func mustInit(t *testing.T, trial bool) *Layout {
	t.Helper()
	o := options(t, trial)
	if trial {
		l, err := Init(o)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	copyTree(t, production, o.Dir)
	l, err := OpenLayout(o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

var production string // set by TestMain, never written to afterwards

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "hawser-fleet-*")
	if err != nil {
		panic(err)
	}
	production = filepath.Join(dir, "fleet")
	_, err = Init(InitOptions{Dir: production, Passphrases: passphrases, Organisation: "Acme Pumps", Country: "DE",
		Domains: []string{"mqtt.example.com", "rescue.example.com"}})
	if err != nil {
		panic(err)
	}
	code := m.Run()
	if err := os.RemoveAll(dir); err != nil {
		panic(err)
	}
	os.Exit(code)
}

// copyTree copies files and directories with their permissions.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		target := filepath.Join(to, strings.TrimPrefix(path, from))
		if d.IsDir() {
			return os.Mkdir(target, info.Mode().Perm())
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(target, data, info.Mode().Perm())
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestInitMakesTheLayout(t *testing.T) {
	for _, trial := range []bool{true, false} {
		var hooked string
		o := options(t, trial)
		o.Make = func(dir string, id [16]byte, cfg *config.Config) error {
			hooked = dir
			if id != [16]byte(cfg.Fleet.ID) || id == [16]byte{} {
				t.Errorf("fleet id %x", id)
			}
			return os.WriteFile(filepath.Join(dir, "registry.db"), []byte("x"), 0o600)
		}
		l, err := Init(o)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(hooked, "/server") || strings.HasPrefix(hooked, o.Dir) {
			t.Errorf("hook got %s", hooked)
		}
		if _, err := os.Stat(l.RegistryPath()); err != nil {
			t.Error(err)
		}
		checkModes(t, o.Dir)
		want := 4 // root A, device-1, service, root B
		if got := l.CAKeysPresent(); len(got) != want {
			t.Errorf("trial %t: CA keys %v", trial, got)
		}
		if _, err := os.Stat(l.SimSeedPath()); (err == nil) != trial {
			t.Errorf("trial %t: sim.seed: %v", trial, err)
		}
		left, err := filepath.Glob(filepath.Join(filepath.Dir(o.Dir), ".hawser-init-*"))
		if err != nil || len(left) != 0 {
			t.Errorf("left behind: %v %v", left, err)
		}
	}
}

func checkModes(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		private := d.IsDir() || strings.HasSuffix(path, ".key") || strings.HasSuffix(path, ".journal") || strings.HasSuffix(path, ".seed")
		if private && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// What openssl, which shares no code with us, says about every certificate of a new fleet.
func TestOpensslReadsTheFleet(t *testing.T) {
	l := mustInit(t, false)
	for _, tc := range []struct{ file, want string }{
		{"ca-a/root.crt", "CN = Hawser broker root A"}, {"ca-b/root.crt", "CN = Hawser broker root B"},
		{"ca-a/device-1.crt", "CN = Hawser device CA 1"}, {"ca-a/service.crt", "CN = Hawser service CA"},
	} {
		text := openssl(t, "x509", "-in", filepath.Join(l.Dir, tc.file), "-noout", "-text")
		for _, want := range []string{tc.want, "O = Acme Pumps", "C = DE", "X509v3 Basic Constraints: critical\n                CA:TRUE\n",
			"X509v3 Key Usage: critical\n                Certificate Sign, CRL Sign", "Subject Key Identifier", "prime256v1", "ecdsa-with-SHA256"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s: no %q in\n%s", tc.file, want, text)
			}
		}
		for _, no := range []string{"Extended Key Usage", "Alternative Name", "Authority Key", "pathlen"} {
			if strings.Contains(text, no) {
				t.Errorf("%s has %q", tc.file, no)
			}
		}
	}
	leaf := l.BrokerCertPath("mqtt.example.com")
	text := openssl(t, "x509", "-in", leaf, "-noout", "-text")
	for _, want := range []string{"Subject: CN = broker\n", "DNS:mqtt.example.com\n", "TLS Web Server Authentication\n", "X509v3 Key Usage: critical\n                Digital Signature\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	openssl(t, "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "mqtt.example.com", "-CAfile", filepath.Join(l.CADir("a"), "root.crt"), leaf)
	pub := openssl(t, "pkey", "-in", filepath.Join(l.CADir("b"), "root.key"), "-passin", "pass:"+passB, "-pubout")
	if pub != openssl(t, "x509", "-in", filepath.Join(l.CADir("b"), "root.crt"), "-noout", "-pubkey") {
		t.Error("root B's key is not that of its certificate")
	}
}

// A CSR made by openssl, enrolled; what is in it besides the key is not taken over.
func TestEnrollOpensslCSR(t *testing.T) {
	l := mustInit(t, true)
	dir := t.TempDir()
	key, req, out := filepath.Join(dir, "d.key"), filepath.Join(dir, "d.csr"), filepath.Join(dir, "d.crt")
	openssl(t, "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
	openssl(t, "req", "-new", "-key", key, "-subj", "/CN=#/O=evil", "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "subjectAltName=DNS:mqtt.example.com", "-out", req)
	text, err := os.ReadFile(req)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.ParseCSR(text)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := mustCA(t, l.CADir("a"), "").EnrollDevice(0xABCD1234, csr, "pump", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(out, pki.EncodeCert(cert.Raw), 0o600); err != nil {
		t.Fatal(err)
	}
	got := openssl(t, "x509", "-in", out, "-noout", "-text")
	for _, want := range []string{"Subject: CN = ABCD1234\n", "Not After : Dec 31 23:59:59 9999 GMT", "TLS Web Client Authentication\n", "Authority Key Identifier"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	for _, no := range []string{"evil", "CA:TRUE", "Alternative Name", "Subject Key Identifier", "Basic Constraints"} {
		if strings.Contains(got, no) {
			t.Errorf("%q was taken over or added:\n%s", no, got)
		}
	}
	openssl(t, "verify", "-purpose", "sslclient", "-CAfile", filepath.Join(l.CADir("a"), "device-1.crt"), out)
	id, gen, _, err := pki.VerifyDeviceLeaf(cert.Raw, l.Trust().DeviceCAs)
	if err != nil || id != 0xABCD1234 || gen != 1 {
		t.Fatal(id, gen, err)
	}
}

func TestInitRefuses(t *testing.T) {
	l := mustInit(t, true)
	for name, tc := range map[string]struct {
		change func(*InitOptions)
		want   string
	}{
		"a fleet is there":    {func(o *InitOptions) { o.Dir = l.Dir }, "holds a fleet already"},
		"a file is there":     {func(o *InitOptions) { o.Dir = filepath.Dir(l.Dir) }, "is not empty"},
		"no domain":           {func(o *InitOptions) { o.Domains = nil }, "domain"},
		"an address":          {func(o *InitOptions) { o.Domains = []string{"10.0.0.1"} }, "domain"},
		"a domain twice":      {func(o *InitOptions) { o.Domains = []string{"a.b", "a.b"} }, "twice"},
		"country":             {func(o *InitOptions) { o.Country = "Germany" }, "country"},
		"port":                {func(o *InitOptions) { o.Port = 70000 }, "port"},
		"no passphrases":      {func(o *InitOptions) { o.Passphrases = nil }, "two passphrases"},
		"the same passphrase": {func(o *InitOptions) { o.Passphrases = func(string) ([]byte, error) { return []byte("the same"), nil } }, "same passphrase"},
		"a short passphrase":  {func(o *InitOptions) { o.Passphrases = func(string) ([]byte, error) { return []byte("1234567"), nil } }, "shorter"},
		"an empty passphrase": {func(o *InitOptions) { o.Passphrases = func(string) ([]byte, error) { return nil, nil } }, "shorter"},
	} {
		o := options(t, false)
		tc.change(&o)
		if _, err := Init(o); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := OpenLayout(l.Dir); err != nil {
		t.Errorf("the fleet that was there was touched: %v", err)
	}
}

func TestFailedInitLeavesNothing(t *testing.T) {
	o := options(t, true)
	boom := errors.New("no log")
	o.Make = func(string, [16]byte, *config.Config) error { return boom }
	if _, err := Init(o); !errors.Is(err, boom) {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(filepath.Dir(o.Dir))
	if err != nil || len(entries) != 0 {
		t.Fatalf("%v %v", entries, err)
	}
}

// Each file of the layout, taken away or damaged, is named and not replaced.
func TestOpenLayoutNamesWhatIsWrong(t *testing.T) {
	l := mustInit(t, true)
	other := mustInit(t, true)
	for _, path := range []string{l.ConfigPath(), l.AnchorsPath(), l.BrokerRootsPath(), l.server(deviceCAsFile), l.server(serviceCAsFile),
		l.BrokerCertPath("rescue.example.com"), l.BrokerKeyPath("rescue.example.com")} {
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		foreign, err := os.ReadFile(filepath.Join(other.Dir, strings.TrimPrefix(path, l.Dir)))
		if err != nil {
			t.Fatal(err)
		}
		half := good[:len(good)/2]
		if path == l.ConfigPath() {
			half = half[:bytes.LastIndexByte(half, '\n')] // in the middle of a word it is no TOML
		}
		broken := map[string][]byte{"missing": nil, "empty": {}, "truncated": half, "of another fleet": foreign}
		for what, content := range broken {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if content != nil {
				if err := os.WriteFile(path, content, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			// A client CA's bundle of another fleet is whole in itself: the registry knows better.
			// Half a config is a config whose other keys have their defaults.
			silent := what == "of another fleet" && (strings.HasSuffix(path, deviceCAsFile) || strings.HasSuffix(path, serviceCAsFile)) ||
				what == "truncated" && path == l.ConfigPath()
			if _, err := OpenLayout(l.Dir); (err == nil) != silent {
				t.Errorf("%s %s: %v", path, what, err)
			} else if err != nil && what == "missing" && !strings.Contains(err.Error(), filepath.Base(path)) {
				t.Errorf("%s is not named: %v", path, err)
			}
			if content == nil {
				if _, err := os.Stat(path); err == nil {
					t.Errorf("%s was made anew", path)
				}
			}
			if err := os.WriteFile(path, good, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := OpenLayout(l.Dir); err != nil {
		t.Fatal(err)
	}
}

// A bundle holds what its name says, and the roots are two.
func TestBundles(t *testing.T) {
	l := mustInit(t, true)
	other := mustInit(t, true)
	read := func(path string) []byte {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	service := read(l.server(serviceCAsFile))
	for path, content := range map[string][]byte{
		l.server(deviceCAsFile):  service,
		l.server(serviceCAsFile): append(service, read(l.BrokerCertPath("mqtt.example.com"))...),
		l.BrokerRootsPath():      append(read(l.BrokerRootsPath()), read(filepath.Join(other.CADir("a"), "root.crt"))...),
		l.AnchorsPath():          read(l.BrokerRootsPath()),
	} {
		good := read(path)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenLayout(l.Dir); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	text := strings.Replace(string(read(l.ConfigPath())), `"mqtt.example.com"`, `"mqtt_example"`, 1)
	if err := os.WriteFile(l.ConfigPath(), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenLayout(l.Dir); !errors.Is(err, pki.ErrDomain) {
		t.Error(err)
	}
}

func TestExposedKeyIsRefused(t *testing.T) {
	l := mustInit(t, true)
	if err := os.Chmod(l.BrokerKeyPath("mqtt.example.com"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenLayout(l.Dir); !errors.Is(err, durable.ErrExposed) {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(l.CADir("a"), "device-1.key"), 0o640); err != nil {
		t.Fatal(err)
	}
	_, err := mustCA(t, l.CADir("a"), "").EnrollDevice(1, csrOf(t, newKey(t)), "", time.Now())
	if !errors.Is(err, durable.ErrExposed) {
		t.Fatal(err)
	}
}

func TestBrokerLeafDates(t *testing.T) {
	l := mustInit(t, true)
	if _, err := l.LoadBrokerLeaf("mqtt.example.com", time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := l.LoadBrokerLeaf("mqtt.example.com", time.Now().AddDate(1, 0, 1)); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Fatal(err)
	}
	if _, err := l.LoadBrokerLeaf("mqtt.example.com", time.Now().AddDate(0, 0, -2)); err == nil || !strings.Contains(err.Error(), "clock") {
		t.Fatal(err)
	}
}

func TestCAKeysPresent(t *testing.T) {
	l := mustInit(t, false)
	safe := filepath.Join(t.TempDir(), "ca-b")
	if err := os.Rename(l.CADir("b"), safe); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(l.CADir("a")); err != nil {
		t.Fatal(err)
	}
	device := filepath.Join(l.Dir, "device.key")
	if err := pki.WriteKey(device, newKey(t), nil); err != nil {
		t.Fatal(err)
	}
	if got := l.CAKeysPresent(); len(got) != 0 {
		t.Fatalf("a broker or device key passes for a CA key: %v", got)
	}
	if err := os.Symlink(safe, filepath.Join(l.ServerDir(), "link")); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(l.CAKeysPresent()); got != "[server/link/root.key]" {
		t.Fatal(got)
	}
	if err := os.Remove(filepath.Join(l.ServerDir(), "link")); err != nil {
		t.Fatal(err)
	}
	// What cannot be looked into is not known to be harmless.
	if err := os.Symlink("loop", filepath.Join(l.ServerDir(), "loop")); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(l.CAKeysPresent()); got != "[server/loop]" {
		t.Error(got)
	}
	if err := os.Remove(filepath.Join(l.ServerDir(), "loop")); err != nil {
		t.Fatal(err)
	}
	// Decrypted and renamed by openssl, in SEC1 form.
	openssl(t, "ec", "-in", filepath.Join(safe, "root.key"), "-passin", "pass:"+passB, "-out", filepath.Join(l.ServerDir(), "notes.txt"))
	if got := fmt.Sprint(l.CAKeysPresent()); got != "[server/notes.txt]" {
		t.Fatal(got)
	}
}

func TestPassphrases(t *testing.T) {
	l := mustInit(t, false)
	_, err := mustCA(t, l.CADir("a"), passB).EnrollDevice(1, csrOf(t, newKey(t)), "", time.Now())
	if !errors.Is(err, pki.ErrPassphrase) {
		t.Fatal(err)
	}
	ca, err := OpenCA(l.CADir("b"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer ca.Close()
	if _, err := ca.IssueBroker("mqtt.example.com", &newKey(t).PublicKey, time.Now()); !errors.Is(err, pki.ErrNoPassphrase) {
		t.Fatal(err)
	}
	if _, err := ca.EnrollDevice(1, csrOf(t, newKey(t)), "", time.Now()); !errors.Is(err, ErrNotHere) {
		t.Fatal(err)
	}
}

// A passphrase is asked for once, and two keys open with it.
func TestPassphraseAskedOnce(t *testing.T) {
	l := mustInit(t, false)
	asked := 0
	ca, err := OpenCA(l.CADir("a"), func() ([]byte, error) { asked++; return []byte(passA), nil })
	if err != nil {
		t.Fatal(err)
	}
	defer ca.Close()
	if asked != 0 {
		t.Error("asked before a key was needed")
	}
	if _, err := ca.EnrollDevice(1, csrOf(t, newKey(t)), "", time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.IssueService("dashboard", &newKey(t).PublicKey, time.Now()); err != nil {
		t.Fatal(err)
	}
	if asked != 1 {
		t.Errorf("asked %d times", asked)
	}
}

func TestIdAndKeyAreBoundForLife(t *testing.T) {
	l := mustInit(t, true)
	a, b := csrOf(t, newKey(t)), csrOf(t, newKey(t))
	ca := mustCA(t, l.CADir("a"), "")
	if _, err := ca.EnrollDevice(1, a, "", time.Now()); err != nil {
		t.Fatal(err)
	}
	ca.Close()
	ca = mustCA(t, l.CADir("a"), "")
	if _, err := ca.EnrollDevice(1, b, "", time.Now()); !errors.Is(err, pki.ErrBound) {
		t.Error("another key for the id:", err)
	}
	if _, err := ca.EnrollDevice(2, a, "", time.Now()); !errors.Is(err, pki.ErrBound) {
		t.Error("another id for the key:", err)
	}
	if _, err := ca.EnrollDevice(1, a, "", time.Now()); err != nil {
		t.Error("the same again:", err)
	}
	// It is refused before anybody is asked for a passphrase.
	ca.Close()
	ca, err := OpenCA(l.CADir("a"), func() ([]byte, error) { t.Error("asked"); return nil, nil })
	if err != nil {
		t.Fatal(err)
	}
	defer ca.Close()
	if err := os.Remove(filepath.Join(l.CADir("a"), "device-1.key")); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.EnrollDevice(1, b, "", time.Now()); !errors.Is(err, pki.ErrBound) {
		t.Error("the key was looked for first:", err)
	}
}

// A certificate that was not recorded does not leave the CA.
func TestNoJournalNoCertificate(t *testing.T) {
	l := mustInit(t, true)
	journal := filepath.Join(l.CADir("a"), journalFile)
	ca := mustCA(t, l.CADir("a"), "")
	if _, err := openJournal(journal, 0); !errors.Is(err, durable.ErrLocked) {
		t.Error("two hold one CA:", err)
	}
	before, err := os.ReadFile(journal)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.EnrollDevice(1, csrOf(t, newKey(t)), "pump", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(journal)
	print := pki.Fingerprint(cert.Raw)
	if err != nil || !bytes.HasPrefix(after, before) || !bytes.Contains(after[len(before):], []byte(fmt.Sprintf("%x", print))) {
		t.Fatalf("%v\n%s", err, after)
	}
	ca.Close()
	if err := os.Remove(journal); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenCA(l.CADir("a"), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a journal is missing:", err)
	}
	if _, err := os.Stat(journal); err == nil {
		t.Error("the journal was made anew")
	}
}

func BenchmarkEnroll(b *testing.B) {
	l, err := Init(InitOptions{Dir: filepath.Join(b.TempDir(), "fleet"), Trial: true, Domains: []string{"localhost"}})
	if err != nil {
		b.Fatal(err)
	}
	ca, err := OpenCA(l.CADir("a"), nil)
	if err != nil {
		b.Fatal(err)
	}
	defer ca.Close()
	key, err := pki.GenerateKey()
	if err != nil {
		b.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		b.Fatal(err)
	}
	csr, err := pki.ParseCSR(der)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := ca.EnrollDevice(7, csr, "", time.Now()); err != nil {
			b.Fatal(err)
		}
	}
}

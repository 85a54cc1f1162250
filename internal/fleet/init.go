package fleet

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"hawser/internal/config"
	"hawser/internal/durable"
	"hawser/internal/pki"
)

// minPassphrase is in bytes. scrypt makes a guess cost 0.1 s and more; it cannot make
// up for a passphrase of four letters.
const minPassphrase = 8

// ErrHasFleet reports that init was pointed at a directory with something in it.
var ErrHasFleet = errors.New("is not empty")

// InitOptions say what fleet to make.
type InitOptions struct {
	Dir          string   // must not exist, or be empty; its parent must exist
	Domains      []string // 1 to 8, in the order in which devices try them
	Trial        bool     // keys unencrypted
	Organisation string   // "" means the default of the config
	Country      string   // the same
	Port         int      // 0 means 8883
	NATSURL      string   // "" means the log is embedded

	// Passphrases is asked once for each CA directory, "ca-a" then "ca-b"; not in a
	// trial fleet. At least 8 bytes, and not the same for both.
	Passphrases func(label string) ([]byte, error)
	// Make makes registry and log in the server directory, which will be renamed to its
	// final place afterwards. It comes last: when it fails, nothing is left on this machine.
	Make func(serverDir string, fleetID [16]byte, cfg *config.Config) error
	Now  func() time.Time // nil means time.Now
}

// Init makes the state directory of a new fleet. It is built beside its final place
// and renamed when all of it is on disk, so a failure leaves nothing.
func Init(o InitOptions) (*Layout, error) {
	cfg, err := o.config()
	if err != nil {
		return nil, err
	}
	dir, err := freeDir(o.Dir)
	if err != nil {
		return nil, err
	}
	passA, passB, err := o.passphrases()
	if err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".hawser-init-*")
	if err != nil {
		return nil, fmt.Errorf("make fleet: %w", err)
	}
	defer os.RemoveAll(tmp) // after the rename there is nothing left of that name
	b := &builder{dir: tmp, cfg: cfg, passA: passA, passB: passB, now: o.now()}
	if err := b.build(); err != nil {
		return nil, fmt.Errorf("make fleet: %w", err)
	}
	if o.Make != nil {
		if err := o.Make(filepath.Join(tmp, serverDir), [16]byte(cfg.Fleet.ID), cfg); err != nil {
			return nil, fmt.Errorf("make fleet: %w", err)
		}
	}
	if err := syncTree(tmp); err != nil {
		return nil, fmt.Errorf("make fleet: %w", err)
	}
	if err := rename(tmp, dir); err != nil {
		return nil, fmt.Errorf("make fleet: %w", err)
	}
	return OpenLayout(dir)
}

func (o *InitOptions) now() time.Time {
	if o.Now == nil {
		return time.Now()
	}
	return o.Now()
}

// config fills a default config in and checks it, the parts that end up in
// certificates and anchors included.
func (o *InitOptions) config() (*config.Config, error) {
	cfg := config.Default()
	if _, err := rand.Read(cfg.Fleet.ID[:]); err != nil {
		return nil, fmt.Errorf("draw the fleet id: %w", err)
	}
	cfg.Fleet.Domains, cfg.Fleet.Trial, cfg.Log.NATSURL = o.Domains, o.Trial, o.NATSURL
	if o.Organisation != "" {
		cfg.Fleet.Organisation = o.Organisation
	}
	if o.Country != "" {
		cfg.Fleet.Country = o.Country
	}
	if o.Port != 0 {
		if o.Port < 1 || o.Port > 65535 {
			return nil, fmt.Errorf("port %d does not exist", o.Port)
		}
		cfg.Fleet.Port = uint16(o.Port)
		cfg.Serve.Listen = fmt.Sprintf(":%d", o.Port)
	}
	if len(o.Domains) == 0 {
		return nil, errors.New("a fleet needs a domain under which devices reach the broker\nhint: --domain mqtt.example.com")
	}
	for _, d := range o.Domains {
		if err := pki.CheckDomain(d); err != nil {
			return nil, fmt.Errorf("domain %q: %w", d, err)
		}
	}
	if err := (pki.Name{Organisation: cfg.Fleet.Organisation, Country: cfg.Fleet.Country}).Check(); err != nil {
		return nil, err
	}
	return &cfg, cfg.Validate()
}

// freeDir gives the absolute path of dir, which nothing may be lost by renaming over.
func freeDir(dir string) (string, error) {
	if dir == "" {
		return "", errors.New("no directory for the fleet was given")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("fleet directory: %w", err)
	}
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return dir, nil
	case err != nil:
		return "", fmt.Errorf("fleet directory: %w", err)
	case len(entries) == 0:
		return dir, nil
	}
	if _, err := os.Lstat(filepath.Join(dir, configFile)); err == nil {
		return "", fmt.Errorf("%s %w: it holds a fleet already\nhint: choose another --dir; a fleet is never made over another", dir, ErrHasFleet)
	}
	return "", fmt.Errorf("%s %w\nhint: choose another --dir, one that does not exist yet", dir, ErrHasFleet)
}

// passphrases gives nil for a trial fleet, which is what WriteKey takes for "in the clear".
func (o *InitOptions) passphrases() (a, b []byte, err error) {
	if o.Trial {
		return nil, nil, nil
	}
	if o.Passphrases == nil {
		return nil, nil, errors.New("a production fleet needs two passphrases\nhint: --passphrase-fd N, or --trial to try things out")
	}
	if a, err = o.passphrase("ca-a"); err != nil {
		return nil, nil, err
	}
	if b, err = o.passphrase("ca-b"); err != nil {
		return nil, nil, err
	}
	if bytes.Equal(a, b) {
		return nil, nil, errors.New("ca-a and ca-b have the same passphrase: whoever learns one has both safes\nhint: give each its own")
	}
	return a, b, nil
}

func (o *InitOptions) passphrase(label string) ([]byte, error) {
	p, err := o.Passphrases(label)
	if err != nil {
		return nil, fmt.Errorf("passphrase for %s: %w", label, err)
	}
	if len(p) < minPassphrase {
		return nil, fmt.Errorf("the passphrase for %s is shorter than %d bytes", label, minPassphrase)
	}
	return p, nil
}

// builder makes the files of a new fleet in dir.
type builder struct {
	dir          string
	cfg          *config.Config
	passA, passB []byte // nil: in the clear
	now          time.Time
}

func (b *builder) build() error {
	for _, d := range []string{serverDir, filepath.Join(serverDir, requestsDir), "ca-a", "ca-b"} {
		if err := os.Mkdir(filepath.Join(b.dir, d), 0o700); err != nil {
			return err
		}
	}
	rootA, err := b.root("a", b.passA)
	if err != nil {
		return err
	}
	rootB, err := b.root("b", b.passB)
	if err != nil {
		return err
	}
	if err := b.clientCAs(); err != nil {
		return err
	}
	if err := b.server(rootA, rootB); err != nil {
		return err
	}
	text, err := config.Marshal(b.cfg)
	if err != nil {
		return err
	}
	return b.write(configFile, text)
}

func (b *builder) name() pki.Name {
	return pki.Name{Organisation: b.cfg.Fleet.Organisation, Country: b.cfg.Fleet.Country}
}

// root makes ca-a or ca-b with its root and its journal.
func (b *builder) root(letter string, pass []byte) (*pki.Issuer, error) {
	label := map[string]string{"a": "A", "b": "B"}[letter]
	dir := "ca-" + letter
	root, err := b.ca(filepath.Join(dir, "root"), pass, func(key *ecdsa.PrivateKey) (*pki.Issuer, error) {
		return pki.IssueBrokerRoot(key, b.name(), label, b.now)
	})
	if err != nil {
		return nil, err
	}
	return root, pki.CreateJournal(filepath.Join(b.dir, dir, journalFile), [16]byte(b.cfg.Fleet.ID), b.now)
}

// clientCAs makes generation 1 of the device CA and the service CA, both in ca-a.
func (b *builder) clientCAs() error {
	device, err := b.ca("ca-a/device-1", b.passA, func(key *ecdsa.PrivateKey) (*pki.Issuer, error) {
		return pki.IssueDeviceCA(key, b.name(), 1, b.now)
	})
	if err != nil {
		return err
	}
	service, err := b.ca("ca-a/service", b.passA, func(key *ecdsa.PrivateKey) (*pki.Issuer, error) {
		return pki.IssueServiceCA(key, b.name(), b.now)
	})
	if err != nil {
		return err
	}
	return errors.Join(b.bundle(deviceCAsFile, device.Cert), b.bundle(serviceCAsFile, service.Cert))
}

// ca makes base.key and base.crt.
func (b *builder) ca(base string, pass []byte, issue func(*ecdsa.PrivateKey) (*pki.Issuer, error)) (*pki.Issuer, error) {
	key, err := pki.GenerateKey()
	if err != nil {
		return nil, err
	}
	issuer, err := issue(key)
	if err != nil {
		return nil, err
	}
	if err := pki.WriteKey(filepath.Join(b.dir, base+".key"), key, pass); err != nil {
		return nil, err
	}
	return issuer, b.write(base+".crt", pki.EncodeCert(issuer.Cert.Raw))
}

// server makes what the server needs: bundles, a leaf under root A for each domain
// and anchor set 1 signed by root B.
func (b *builder) server(rootA, rootB *pki.Issuer) error {
	if err := b.bundle(rootsFile, rootA.Cert, rootB.Cert); err != nil {
		return err
	}
	for _, d := range b.cfg.Fleet.Domains {
		if err := b.brokerLeaf(rootA, d); err != nil {
			return err
		}
	}
	sign1, err := pki.SignAnchors(rootB.Signer, &pki.AnchorSet{
		Fleet: [16]byte(b.cfg.Fleet.ID), Sequence: 1, InUse: rootA.Cert, Standby: rootB.Cert,
		Port: b.cfg.Fleet.Port, Domains: b.cfg.Fleet.Domains,
	})
	if err != nil {
		return err
	}
	if err := b.write(filepath.Join("ca-a", firstAnchorsFile), sign1); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(b.dir, serverDir, anchorsDir), 0o700); err != nil {
		return err
	}
	for _, name := range []string{anchorsFile, filepath.Join(anchorsDir, "1.cose")} {
		if err := b.write(filepath.Join(serverDir, name), sign1); err != nil {
			return err
		}
	}
	if !b.cfg.Fleet.Trial {
		return nil
	}
	var seed [32]byte
	if _, err := rand.Read(seed[:]); err != nil {
		return err
	}
	return durable.CreateFile(filepath.Join(b.dir, serverDir, seedFile), seed[:], 0o600)
}

func (b *builder) brokerLeaf(root *pki.Issuer, domain string) error {
	key, err := pki.GenerateKey()
	if err != nil {
		return err
	}
	leaf, err := pki.IssueBrokerLeaf(root, domain, &key.PublicKey, b.now)
	if err != nil {
		return err
	}
	if err := journalOnce(filepath.Join(b.dir, "ca-a", journalFile), root, pki.KindBroker, domain, leaf, b.now); err != nil {
		return err
	}
	base := filepath.Join(serverDir, "broker-"+domain)
	if err := pki.WriteKey(filepath.Join(b.dir, base+".key"), key, nil); err != nil {
		return err
	}
	return b.write(base+".crt", pki.EncodeCert(leaf.Raw))
}

func (b *builder) bundle(name string, certs ...*x509.Certificate) error {
	var text []byte
	for _, c := range certs {
		text = append(text, pki.EncodeCert(c.Raw)...)
	}
	return b.write(filepath.Join(serverDir, name), text)
}

func (b *builder) write(name string, data []byte) error {
	return durable.CreateFile(filepath.Join(b.dir, name), data, 0o644)
}

// syncTree makes the names in every directory under dir durable. The files were
// synced by whoever wrote them.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		return durable.SyncDir(path)
	})
}

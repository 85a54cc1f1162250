// Package fleet is the state directory of a fleet: who makes it, where each file
// lies, and what must hold before any of them is used.
//
// It promises that a directory made by Init is whole or not there, that a missing,
// damaged or exposed file is named and refused and never made anew, and that a
// certificate leaves a CA only after the CA's own journal holds it on disk.
//
//	fleet/hawser.toml      the configuration
//	fleet/server/          what serve needs; in production this and hawser.toml go to the server
//	fleet/ca-a/            root A, device CA, service CA and their keys, issued.journal
//	fleet/ca-b/            root B and its key, issued.journal
//
// In server/, anchors/N.cose are all anchor sets and anchors.cose the newest one;
// broker-roots.crt and device-cas.crt are what is accepted.
package fleet

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"hawser/internal/config"
	"hawser/internal/durable"
	"hawser/internal/pki"
)

const (
	configFile     = "hawser.toml"
	serverDir      = "server"
	anchorsFile    = "anchors.cose"
	rootsFile      = "broker-roots.crt"
	deviceCAsFile  = "device-cas.crt"
	serviceCAsFile = "service-cas.crt"
	seedFile       = "sim.seed"
	requestsDir    = "requests"
	journalFile    = "issued.journal"
)

// Layout is an existing state directory whose files passed OpenLayout.
type Layout struct {
	Dir    string // absolute
	Config *config.Config

	mu     sync.RWMutex
	trust  pki.Trust        // mu
	sets   []*pki.AnchorSet // mu; the oldest first
	signed [][]byte         // mu; their COSE_Sign1
}

// ConfigPath is hawser.toml.
func (l *Layout) ConfigPath() string { return filepath.Join(l.Dir, configFile) }

// ServerDir is the directory that goes to the server.
func (l *Layout) ServerDir() string { return filepath.Join(l.Dir, serverDir) }

// RegistryPath is the SQLite file.
func (l *Layout) RegistryPath() string { return l.server("registry.db") }

// LogDir is where the embedded log lies.
func (l *Layout) LogDir() string { return l.server("log") }

// AdminSocket is the socket of the running server.
func (l *Layout) AdminSocket() string { return config.Path(l.Dir, l.Config.Serve.AdminSocket) }

// NATSCredentials is the credentials file of an outside log, or "".
func (l *Layout) NATSCredentials() string {
	if l.Config.Log.NATSCredentials == "" {
		return ""
	}
	return config.Path(l.Dir, l.Config.Log.NATSCredentials)
}

// BrokerRootsPath is the PEM bundle of the broker roots: the one in use, the standby
// root, then older ones that devices may still pin.
func (l *Layout) BrokerRootsPath() string { return l.server(rootsFile) }

// AnchorsPath is the newest signed anchor set.
func (l *Layout) AnchorsPath() string { return l.server(anchorsFile) }

// SimSeedPath is the seed of the simulator's keys; trial fleets only.
func (l *Layout) SimSeedPath() string { return l.server(seedFile) }

// RequestsDir holds the requests that wait for an answer from the safe.
func (l *Layout) RequestsDir() string { return l.server(requestsDir) }

// BrokerCertPath is the certificate that is served for domain.
func (l *Layout) BrokerCertPath(domain string) string { return l.server("broker-" + domain + ".crt") }

// BrokerKeyPath is the key of that certificate.
func (l *Layout) BrokerKeyPath(domain string) string { return l.server("broker-" + domain + ".key") }

// CADir is the directory of root "a" or "b", where it lies after init. In
// production it is in a safe and not here.
func (l *Layout) CADir(root string) string { return filepath.Join(l.Dir, "ca-"+root) }

func (l *Layout) server(name string) string { return filepath.Join(l.Dir, serverDir, name) }

// Trust gives the CA certificates against which imports are verified.
func (l *Layout) Trust() pki.Trust {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.trust
}

// FleetID is the fleet's 128-bit id.
func (l *Layout) FleetID() [16]byte { return [16]byte(l.Config.Fleet.ID) }

// OpenLayout reads hawser.toml and the trust bundles, and checks the anchor set
// and, for each domain, that a key with the right permissions and its certificate
// are there. It does not open the registry or the log, and judges no dates.
func OpenLayout(dir string) (*Layout, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("fleet directory: %w", err)
	}
	l := &Layout{Dir: dir}
	l.Config, err = config.Load(l.ConfigPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s holds no fleet: there is no %s\nhint: hawser init --dir %s --domain NAME", dir, configFile, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("%w\nhint: the comments in hawser.toml, as init writes it, name every key and its values", err)
	}
	for _, d := range l.Config.Fleet.Domains {
		if err := pki.CheckDomain(d); err != nil {
			return nil, fmt.Errorf("%s: fleet.domains: %q: %w", l.ConfigPath(), d, err)
		}
	}
	if err := l.checkFiles(); err != nil {
		return nil, withHint(err)
	}
	return l, nil
}

func (l *Layout) checkFiles() error {
	if err := l.loadAnchors(); err != nil {
		return err
	}
	if err := l.loadTrust(); err != nil {
		return err
	}
	if err := l.checkRoots(); err != nil {
		return err
	}
	for _, d := range l.Config.Fleet.Domains {
		if _, _, err := l.brokerPair(d); err != nil {
			return err
		}
	}
	return nil
}

const restoreHint = "hint: restore it from a backup; hawser makes no state anew"

// withHint says what helps against a file that is not what was written, unless
// the error says so itself.
func withHint(err error) error {
	if strings.Contains(err.Error(), "\nhint: ") {
		return err
	}
	return fmt.Errorf("%w\n%s", err, restoreHint)
}

func (l *Layout) loadTrust() error {
	var t pki.Trust
	var err error
	if t.BrokerRoots, err = readBundle(l.server(rootsFile), pki.BrokerRoot); err != nil {
		return err
	}
	if len(t.BrokerRoots) < 2 {
		return fmt.Errorf("%s: %d broker roots, not 2 or more", l.server(rootsFile), len(t.BrokerRoots))
	}
	if t.DeviceCAs, err = readBundle(l.server(deviceCAsFile), pki.DeviceCA); err != nil {
		return err
	}
	if t.ServiceCAs, err = readBundle(l.server(serviceCAsFile), pki.ServiceCA); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.trust = t
	return nil
}

// readBundle reads the CA certificates in a PEM file; each must conform to p.
func readBundle(path string, p pki.Profile) ([]*x509.Certificate, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, missing(err)
	}
	certs, err := pki.ParseCerts(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, c := range certs {
		if err := pki.CheckCA(c, p); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	return certs, nil
}

// missing adds to an error about a file that should be there what to do about it.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the fleet is incomplete: %w\n%s", err, restoreHint)
	}
	return err
}

// LoadBrokerLeaf gives what the listener serves for domain. A certificate that is
// not valid at now is an error that names it and how to replace it.
func (l *Layout) LoadBrokerLeaf(domain string, now time.Time) (*tls.Certificate, error) {
	cert, key, err := l.brokerPair(domain)
	if err != nil {
		return nil, err
	}
	if now.After(cert.NotAfter) {
		return nil, fmt.Errorf("the broker certificate for %s expired at %s (%s)\nhint: hawser ca issue-broker --dir %s",
			domain, cert.NotAfter.Format(time.RFC3339), l.BrokerCertPath(domain), l.Dir)
	}
	if now.Before(cert.NotBefore) {
		return nil, fmt.Errorf("the broker certificate for %s is valid only from %s (%s)\nhint: check this machine's clock",
			domain, cert.NotBefore.Format(time.RFC3339), l.BrokerCertPath(domain))
	}
	return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}, nil
}

// overtaken is how often a reader of a pair looks again: whoever installs one may come to
// a rename between any two reads, and to the next one after that.
const overtaken = 10

// brokerPair reads key and certificate of a domain. Between the two renames of
// InstallBrokerLeaf (a crash, or another process that is at it right now) the new
// key stands with the old certificate, and the new certificate beside it: then the
// second rename is made here.
func (l *Layout) brokerPair(domain string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	for range overtaken {
		cert, key, err := l.readBrokerPair(domain)
		if err != nil || key.PublicKey.Equal(cert.PublicKey) {
			return cert, key, err
		}
		next, err := l.readBrokerCert(l.nextCert(domain), domain)
		if err == nil && key.PublicKey.Equal(next.PublicKey) {
			return next, key, l.finishInstall(domain)
		}
	}
	return nil, nil, fmt.Errorf("%s does not belong to %s\n%s", l.BrokerKeyPath(domain), l.BrokerCertPath(domain), restoreHint)
}

func (l *Layout) readBrokerPair(domain string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := pki.ReadKey(l.BrokerKeyPath(domain), nil)
	if err != nil {
		return nil, nil, missing(err)
	}
	cert, err := l.readBrokerCert(l.BrokerCertPath(domain), domain)
	return cert, key, missing(err)
}

// finishInstall is the second rename; another process may have made it already.
func (l *Layout) finishInstall(domain string) error {
	err := rename(l.nextCert(domain), l.BrokerCertPath(domain))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (l *Layout) readBrokerCert(path, domain string) (*x509.Certificate, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	cert, err := pki.ParseCert(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	name, _, err := pki.VerifyBrokerLeaf(cert.Raw, l.Trust().BrokerRoots)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if name != domain {
		return nil, fmt.Errorf("%s is for %s, not for %s", path, name, domain)
	}
	return cert, nil
}

func (l *Layout) nextCert(domain string) string { return l.server("broker-" + domain + ".next.crt") }
func (l *Layout) nextKey(domain string) string  { return l.server("broker-" + domain + ".next.key") }

// NewBrokerKey makes the key that the next leaf of domain will certify, or gives
// the one that an earlier, unanswered request was made for.
func (l *Layout) NewBrokerKey(domain string) (*ecdsa.PrivateKey, error) {
	if err := pki.CheckDomain(domain); err != nil {
		return nil, err
	}
	key, err := pki.ReadKey(l.nextKey(domain), nil)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if key, err = pki.GenerateKey(); err != nil {
		return nil, err
	}
	return key, pki.WriteKey(l.nextKey(domain), key, nil)
}

// InstallBrokerLeaf puts a leaf in the place from which it is served, together with
// the key that NewBrokerKey made for it. A crash leaves the old pair or the new one.
func (l *Layout) InstallBrokerLeaf(der []byte) (domain string, err error) {
	domain, cert, err := pki.VerifyBrokerLeaf(der, l.Trust().BrokerRoots)
	if err != nil {
		return "", err
	}
	if !bytes.Equal(cert.Raw, der) {
		return "", errors.New("bytes after the certificate")
	}
	key, err := pki.ReadKey(l.nextKey(domain), nil)
	if err != nil {
		return "", fmt.Errorf("no key waits for a certificate of %s: %w\nhint: hawser ca issue-broker --dir %s", domain, err, l.Dir)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return "", fmt.Errorf("the certificate for %s is not for the key that waits for it", domain)
	}
	if err := durable.WriteFile(l.nextCert(domain), pki.EncodeCert(der), 0o644); err != nil {
		return "", err
	}
	if err := rename(l.nextKey(domain), l.BrokerKeyPath(domain)); err != nil {
		return "", err
	}
	return domain, l.finishInstall(domain)
}

// rename is durable when it returns.
func rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(to))
}

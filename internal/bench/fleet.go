package bench

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/gob"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"hawser/internal/broker"
	"hawser/internal/config"
	"hawser/internal/durable"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/msglog"
	"hawser/internal/pki"
	"hawser/internal/registry"
)

const (
	domain      = "localhost"
	serviceName = "bench"
	keptKeys    = 12_000 // devices whose keys are kept: only they connect
)

// fleetFiles is a fleet that is enrolled and not running: a state directory and
// the credentials of its clients.
type fleetFiles struct {
	dir     string
	devices []device
	service device
	leaf    []byte // the broker's certificate, DER
}

// device is one client's credentials.
type device struct {
	name string
	cert tls.Certificate
}

// credential is a device as it is cached.
type credential struct {
	Name string
	DER  []byte
	Key  []byte
}

// firstID is the id of the first device of a bench fleet.
const firstID identity.ID = 0xB0000000

// fleet copies a fleet of n devices into the run's directory. It is made once and
// kept in the cache: only the copy is ever served.
func (r *runner) fleet(ctx context.Context, name string, n int) (*fleetFiles, error) {
	cached := filepath.Join(r.Cache, fmt.Sprintf("fleet-%d", n))
	if _, err := os.Stat(filepath.Join(cached, "clients")); err != nil {
		if err := r.makeFleet(ctx, cached, n); err != nil {
			return nil, err
		}
	}
	f := &fleetFiles{dir: filepath.Join(r.dir, name)}
	if err := os.CopyFS(f.dir, os.DirFS(filepath.Join(cached, "fleet"))); err != nil {
		return nil, err
	}
	if err := privateKeys(f.dir); err != nil {
		return nil, err
	}
	if err := f.loadClients(filepath.Join(cached, "clients")); err != nil {
		return nil, err
	}
	l, err := fleet.OpenLayout(f.dir)
	if err != nil {
		return nil, err
	}
	leaf, err := l.LoadBrokerLeaf(domain, time.Now())
	if err != nil {
		return nil, err
	}
	f.leaf = leaf.Certificate[0]
	return f, nil
}

// privateKeys gives copied keys their mode back: CopyFS leaves it to the umask.
func privateKeys(dir string) error {
	return filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		mode := os.FileMode(0o600)
		if e.IsDir() {
			mode = 0o700
		}
		return os.Chmod(path, mode)
	})
}

func (f *fleetFiles) loadClients(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	var list []credential
	if err := gob.NewDecoder(file).Decode(&list); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, c := range list {
		key, err := x509.ParseECPrivateKey(c.Key)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		d := device{name: c.Name, cert: tls.Certificate{Certificate: [][]byte{c.DER}, PrivateKey: key}}
		if c.Name == serviceName {
			f.service = d
		} else {
			f.devices = append(f.devices, d)
		}
	}
	return nil
}

// makeFleet makes a trial fleet and enrols n devices and one service.
func (r *runner) makeFleet(ctx context.Context, cached string, n int) error {
	if err := errors.Join(os.RemoveAll(cached), os.MkdirAll(cached, 0o700)); err != nil {
		return err
	}
	bar := r.progress(n, fmt.Sprintf("enrol %d devices (once)", n))
	l, err := fleet.Init(fleet.InitOptions{Dir: filepath.Join(cached, "fleet"), Domains: []string{domain}, Trial: true,
		Make: func(server string, id [16]byte, _ *config.Config) error { return makeState(ctx, server, id) }})
	if err != nil {
		return err
	}
	reg, err := registry.Open(ctx, l.RegistryPath(), registry.Options{})
	if err != nil {
		return err
	}
	defer reg.Close()
	e := &enroller{reg: reg, now: time.Now()}
	if e.devices, err = issuer(l, "device-1", pki.DeviceCA); err != nil {
		return err
	}
	if e.services, err = issuer(l, "service", pki.ServiceCA); err != nil {
		return err
	}
	for at := 0; at < n; at += enrolBatch {
		if err := e.batch(ctx, at, min(enrolBatch, n-at)); err != nil {
			return err
		}
		bar.Add(min(enrolBatch, n-at))
	}
	if err := e.service(ctx); err != nil {
		return err
	}
	if err := reg.Close(); err != nil {
		return err
	}
	return e.save(filepath.Join(cached, "clients"))
}

// makeState makes the registry and the log of a new fleet.
func makeState(ctx context.Context, server string, id [16]byte) error {
	path := filepath.Join(server, "registry.db")
	if err := registry.Create(ctx, path, registry.Meta{FleetID: id, Created: time.Now()}); err != nil {
		return err
	}
	if err := msglog.Create(ctx, msglog.Config{Fleet: hex.EncodeToString(id[:]), Dir: filepath.Join(server, "log")}); err != nil {
		return err
	}
	reg, err := registry.Open(ctx, path, registry.Options{})
	if err != nil {
		return err
	}
	defer reg.Close()
	return reg.Update(ctx, func(tx *registry.Tx) error {
		return errors.Join(tx.AddStream("bench", broker.StreamLog), tx.AddStream("bench", broker.StreamQueue),
			tx.AddStream("bench", broker.StreamRetained), tx.AddStream("bench", broker.StreamHistory))
	})
}

func issuer(l *fleet.Layout, base string, p pki.Profile) (*pki.Issuer, error) {
	text, err := os.ReadFile(filepath.Join(l.CADir("a"), base+".crt"))
	if err != nil {
		return nil, err
	}
	cert, err := pki.ParseCert(text)
	if err != nil {
		return nil, err
	}
	key, err := pki.ReadKey(filepath.Join(l.CADir("a"), base+".key"), nil)
	if err != nil {
		return nil, err
	}
	return pki.NewIssuer(cert, key, p)
}

// enrolBatch is how many devices share one commit.
const enrolBatch = 1000

// enroller signs with the trial fleet's CA in memory. The journal of the CA is
// left out: this fleet is thrown away.
type enroller struct {
	reg               *registry.Registry
	devices, services *pki.Issuer
	now               time.Time
	kept              []credential
}

// batch enrols n devices, signing on all cores.
func (e *enroller) batch(ctx context.Context, at, n int) error {
	list, keys, errs := make([]registry.Enrolment, n), make([]credential, n), make([]error, n)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := w; i < n; i += 4 {
				list[i], keys[i], errs[i] = e.sign(firstID + identity.ID(at+i))
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if len(e.kept) < keptKeys {
		e.kept = append(e.kept, keys...)
	}
	return e.reg.Update(ctx, func(tx *registry.Tx) error {
		for i := range list {
			if err := tx.Enrol("bench", list[i]); err != nil {
				return err
			}
		}
		return nil
	})
}

func (e *enroller) sign(id identity.ID) (out registry.Enrolment, kept credential, err error) {
	key, err := pki.GenerateKey()
	if err != nil {
		return out, kept, err
	}
	hash, err := pki.KeyFingerprint(&key.PublicKey)
	if err != nil {
		return out, kept, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return out, kept, err
	}
	cert, err := pki.IssueDeviceLeaf(e.devices, id, &key.PublicKey, e.now)
	if err != nil {
		return out, kept, err
	}
	kept, err = credentialOf(id.String(), cert, key)
	return registry.Enrolment{ID: id, Class: "bench", KeyHash: hash, CSR: csr, At: e.now,
		Certificate: certificateOf(identity.DevicePrincipal(id), cert, e.now)}, kept, err
}

func certificateOf(who identity.Principal, c *x509.Certificate, at time.Time) *registry.Certificate {
	return &registry.Certificate{Fingerprint: pki.Fingerprint(c.Raw), Principal: who, Generation: 1, DER: c.Raw,
		NotBefore: c.NotBefore, NotAfter: c.NotAfter, State: registry.CertificateActive, At: at}
}

func credentialOf(name string, c *x509.Certificate, key *ecdsa.PrivateKey) (credential, error) {
	der, err := x509.MarshalECPrivateKey(key)
	return credential{Name: name, DER: c.Raw, Key: der}, err
}

// service enrols the one service, which may write to every device.
func (e *enroller) service(ctx context.Context) error {
	key, err := pki.GenerateKey()
	if err != nil {
		return err
	}
	cert, err := pki.IssueServiceLeaf(e.services, serviceName, &key.PublicKey, e.now)
	if err != nil {
		return err
	}
	c, err := credentialOf(serviceName, cert, key)
	if err != nil {
		return err
	}
	e.kept = append(e.kept, c)
	who, err := identity.ServicePrincipal(serviceName)
	if err != nil {
		return err
	}
	return e.reg.Update(ctx, func(tx *registry.Tx) error {
		grants := []registry.Grant{{Mode: registry.GrantWrite, Filter: "private/+/d/app/#"}}
		return errors.Join(tx.AddService("bench", serviceName, grants), tx.AddCertificate("bench", *certificateOf(who, cert, e.now)))
	})
}

// save writes the credentials last: their file says that the fleet is whole.
func (e *enroller) save(path string) error {
	f, err := os.OpenFile(path+".part", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(gob.NewEncoder(f).Encode(e.kept), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".part", path); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

package fleet

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"hawser/internal/durable"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// Who answers for a certificate in issued.journal.
const (
	byOperator = "operator" // whoever ran the command with the CA at hand
	byTyping   = "typed"    // a request, confirmed by typing its subject
	byJournal  = "journal"  // a request for an id and key that the journal holds already
)

// lockWait is how long OpenCA waits for another process that is signing.
const lockWait = 10 * time.Second

// ErrNotConfirmed reports that a request was shown and not confirmed.
var ErrNotConfirmed = errors.New("not confirmed: nothing was signed")

// ErrNotHere reports a CA directory that does not hold the CA that is needed.
var ErrNotHere = errors.New("this CA directory cannot sign that")

// CA is an open CA directory. It holds the lock of its journal until Close and is
// not safe for concurrent use. Keys are read, and the passphrase asked for, when
// the first signature needs them.
type CA struct {
	dir        string
	journal    *pki.Journal
	passphrase func() ([]byte, error)
	pass       []byte                 // remembered once a key opened with it
	issuers    map[string]*pki.Issuer // by base name: root, device-2, service
	newest     string                 // base name of the newest device CA, or ""
}

// OpenCA opens ca-a or ca-b, wherever it lies. passphrase may be nil for a trial
// fleet. The journal's chain is checked; while another process holds it, OpenCA
// waits up to 10 s and then returns durable.ErrLocked.
func OpenCA(dir string, passphrase func() ([]byte, error)) (*CA, error) {
	if _, err := os.Stat(filepath.Join(dir, "root.crt")); err != nil {
		return nil, fmt.Errorf("%s is no CA directory: %w\nhint: --ca DIR names ca-a or ca-b as init made it", dir, err)
	}
	newest, err := newestDeviceCA(dir)
	if err != nil {
		return nil, err
	}
	j, err := openJournal(filepath.Join(dir, journalFile), lockWait)
	if err != nil {
		return nil, missing(err)
	}
	return &CA{dir: dir, journal: j, passphrase: passphrase, issuers: map[string]*pki.Issuer{}, newest: newest}, nil
}

// openJournal polls: flock has no wait with a deadline, and whoever holds the
// journal is done within milliseconds.
func openJournal(path string, wait time.Duration) (*pki.Journal, error) {
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		j, err := pki.OpenJournal(path)
		if !errors.Is(err, durable.ErrLocked) || time.Since(start) > wait {
			return j, err
		}
	}
}

// newestDeviceCA finds the device-N.crt with the highest N, or "".
func newestDeviceCA(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	best, name := 0, ""
	for _, e := range entries {
		base, isCert := strings.CutSuffix(e.Name(), ".crt")
		var n int
		if _, err := fmt.Sscanf(base, "device-%d", &n); !isCert || err != nil || base != fmt.Sprintf("device-%d", n) {
			continue
		}
		if n > best {
			best, name = n, base
		}
	}
	return name, nil
}

// Close gives the CA directory up.
func (c *CA) Close() error { return c.journal.Close() }

// Fleet is the fleet whose CA this is.
func (c *CA) Fleet() [16]byte { return c.journal.Fleet() }

// issuer opens the CA called base and checks that its key belongs to it.
func (c *CA) issuer(base string, p pki.Profile) (*pki.Issuer, error) {
	if i := c.issuers[base]; i != nil {
		return i, nil
	}
	path := filepath.Join(c.dir, base)
	text, err := os.ReadFile(path + ".crt")
	if base == "" || errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: there is no %s in %s\nhint: device and service certificates are signed in ca-a", ErrNotHere, p, c.dir)
	}
	if err != nil {
		return nil, err
	}
	cert, err := pki.ParseCert(text)
	if err != nil {
		return nil, fmt.Errorf("%s.crt: %w", path, err)
	}
	key, err := pki.OpenKey("file:"+path+".key", c.askOnce)
	if err != nil {
		c.pass = nil
		return nil, missing(err)
	}
	i, err := pki.NewIssuer(cert, key, p)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	c.issuers[base] = i
	return i, nil
}

func (c *CA) askOnce() ([]byte, error) {
	if c.pass != nil {
		return c.pass, nil
	}
	if c.passphrase == nil {
		return nil, pki.ErrNoPassphrase
	}
	p, err := c.passphrase()
	if err == nil {
		c.pass = p
	}
	return p, err
}

// EnrollDevice certifies the key of csr for id under the newest device CA. An id
// or key that was certified with another before is refused: pki.ErrBound.
func (c *CA) EnrollDevice(id identity.ID, csr *pki.CSR, class string, now time.Time) (*x509.Certificate, error) {
	certs, err := c.EnrollDevices([]NewDevice{{id, csr, class}}, now)
	if err != nil {
		return nil, err
	}
	return certs[0], nil
}

// IssueService certifies pub for the service called name.
func (c *CA) IssueService(name string, pub *ecdsa.PublicKey, now time.Time) (*x509.Certificate, error) {
	return c.sign(order{kind: pki.KindService, subject: name, pub: pub, vouched: byOperator}, now)
}

// IssueBroker certifies pub for domain under the root of this directory.
func (c *CA) IssueBroker(domain string, pub *ecdsa.PublicKey, now time.Time) (*x509.Certificate, error) {
	return c.sign(order{kind: pki.KindBroker, subject: domain, pub: pub, vouched: byOperator}, now)
}

// order is one certificate to make.
type order struct {
	kind, subject, class string
	pub                  *ecdsa.PublicKey
	block                string // of a station: the block signed with it, or ""
	request              string // SHA-256 of the request file, hex, or ""
	vouched              string
}

// sign issues, then records, and only then gives the certificate away.
func (c *CA) sign(o order, now time.Time) (*x509.Certificate, error) {
	key, err := pki.KeyFingerprint(o.pub)
	if err != nil {
		return nil, err
	}
	if err := c.journal.CheckBound(o.kind, o.subject, hex.EncodeToString(key[:])); err != nil {
		return nil, err
	}
	issuer, cert, err := c.issue(o, now)
	if err != nil {
		return nil, err
	}
	if err := c.journal.Append(entry(o, issuer, cert, key, now)); err != nil {
		return nil, err
	}
	return cert, nil
}

func (c *CA) issue(o order, now time.Time) (*pki.Issuer, *x509.Certificate, error) {
	switch o.kind {
	case pki.KindDevice:
		id, err := identity.ParseID(o.subject)
		if err != nil {
			return nil, nil, err
		}
		ca, err := c.issuer(c.newest, pki.DeviceCA)
		if err != nil {
			return nil, nil, err
		}
		cert, err := pki.IssueDeviceLeaf(ca, id, o.pub, now)
		return ca, cert, err
	case pki.KindStation:
		ca, err := c.issuer(c.newest, pki.DeviceCA)
		if err != nil {
			return nil, nil, err
		}
		cert, err := pki.IssueStationCA(ca, o.subject, o.pub, now)
		return ca, cert, err
	case pki.KindService:
		ca, err := c.issuer("service", pki.ServiceCA)
		if err != nil {
			return nil, nil, err
		}
		cert, err := pki.IssueServiceLeaf(ca, o.subject, o.pub, now)
		return ca, cert, err
	}
	ca, err := c.issuer("root", pki.BrokerRoot)
	if err != nil {
		return nil, nil, err
	}
	cert, err := pki.IssueBrokerLeaf(ca, o.subject, o.pub, now)
	return ca, cert, err
}

func entry(o order, ca *pki.Issuer, cert *x509.Certificate, key [32]byte, now time.Time) pki.Entry {
	print := pki.Fingerprint(cert.Raw)
	return pki.Entry{
		Time: now.UTC().Format(time.RFC3339), Kind: o.kind, Subject: o.subject, Class: o.class, Block: o.block,
		CA: ca.Cert.Subject.CommonName, Key: hex.EncodeToString(key[:]), Cert: hex.EncodeToString(print[:]),
		Request: o.request, Vouched: o.vouched,
	}
}

// journalOnce records a leaf that init made before the CA directory can be opened.
func journalOnce(path string, ca *pki.Issuer, kind, subject string, cert *x509.Certificate, now time.Time) error {
	pub, err := pki.PublicKey(cert)
	if err != nil {
		return err
	}
	key, err := pki.KeyFingerprint(pub)
	if err != nil {
		return err
	}
	j, err := pki.OpenJournal(path)
	if err != nil {
		return err
	}
	o := order{kind: kind, subject: subject, vouched: byOperator}
	return errors.Join(j.Append(entry(o, ca, cert, key, now)), j.Close())
}

package check

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"hawser/internal/durable"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// World is a throw-away fleet: two broker roots, the honest broker's leaf, and the
// identity of the device under test. No key of a real fleet is ever in one: a false
// broker's certificate that such a key had signed would be one for ever. The roots bear
// the names that a device of Hawser's demands of broker roots, so that it takes an anchor
// set of theirs; their organization says "Hawser check".
type World struct {
	Domain string // the name that the client believes it talks to
	rootA  *authority
	rootB  *authority
	Device identity.ID

	clientCA  *authority
	brokerKey *ecdsa.PrivateKey
	broker    [][]byte // the honest chain: the leaf alone, directly under root A
	deviceKey *ecdsa.PrivateKey
	deviceDER []byte

	upstream string // in the field: the real broker, which is the honest one
}

// NewWorld makes a world for one run.
func NewWorld(domain string) (*World, error) {
	w := &World{Domain: domain, Device: 0xC4EC0001}
	var err error
	for _, ca := range []struct {
		to   **authority
		name string
	}{{&w.rootA, "Hawser broker root A"}, {&w.rootB, "Hawser broker root B"}, {&w.clientCA, "Check device CA"}} {
		if *ca.to, err = newAuthority(ca.name); err != nil {
			return nil, err
		}
	}
	if w.brokerKey, err = pki.GenerateKey(); err != nil {
		return nil, err
	}
	if w.deviceKey, err = pki.GenerateKey(); err != nil {
		return nil, err
	}
	leaf, err := w.leaf(w.rootA, w.brokerKey.Public(), nil)
	if err != nil {
		return nil, err
	}
	w.broker = [][]byte{leaf}
	w.deviceDER, err = w.deviceLeaf()
	return w, err
}

func newAuthority(name string) (*authority, error) {
	key, err := pki.GenerateKey()
	if err != nil {
		return nil, err
	}
	return selfSigned(name, key, nil)
}

// selfSigned makes a root; change may spoil it.
func selfSigned(name string, key *ecdsa.PrivateKey, change func(*draft)) (*authority, error) {
	a := &authority{name: pkix.Name{CommonName: name, Organization: []string{"Hawser check"}, Country: []string{"ZZ"}}, key: key}
	return a, a.certify(a, change)
}

// certify makes a's own certificate, signed by issuer.
func (a *authority) certify(issuer *authority, change func(*draft)) error {
	spki, err := spkiOf(a.key.Public())
	if err != nil {
		return err
	}
	if a.ski == nil {
		s := sha256.Sum256(spki)
		a.ski = s[:20]
	}
	d := newDraft(issuer, a.name, spki)
	d.copied.subject = a.raw
	d.to = d.from.AddDate(10, 0, 0)
	d.ext = []pkix.Extension{keyUsage(5, 6), basicConstraints(true, -1), subjectKey(a.ski)}
	if issuer != a {
		d.ext = append(d.ext, authorityKey(issuer.ski))
	}
	if change != nil {
		change(d)
	}
	a.der, err = d.sign(issuer.key)
	return err
}

// under makes a CA below issuer; change may spoil it.
func under(issuer *authority, name string, change func(*draft)) (*authority, error) {
	key, err := pki.GenerateKey()
	if err != nil {
		return nil, err
	}
	a := &authority{name: pkix.Name{CommonName: name, Organization: []string{"Hawser check"}, Country: []string{"ZZ"}}, key: key}
	return a, a.certify(issuer, change)
}

func newDraft(issuer *authority, subject pkix.Name, spki []byte) *draft {
	now := time.Now()
	d := &draft{serial: newSerial(), issuer: issuer.name, subject: subject, spki: spki,
		from: now.Add(-time.Hour), to: now.AddDate(1, 0, 0), algorithm: oidECDSA(2), hash: crypto.SHA256}
	d.copied.issuer = issuer.raw
	return d
}

// leaf makes a broker's certificate under ca as the profile wants it; change spoils it.
func (w *World) leaf(ca *authority, pub crypto.PublicKey, change func(*draft)) ([]byte, error) {
	spki, err := spkiOf(pub)
	if err != nil {
		return nil, err
	}
	d := newDraft(ca, pkix.Name{CommonName: "broker"}, spki)
	d.ext = []pkix.Extension{keyUsage(0), extUsage(serverAuth), authorityKey(ca.ski), altNames([]string{w.Domain})}
	if change != nil {
		change(d)
	}
	return d.sign(ca.key)
}

func (w *World) deviceLeaf() ([]byte, error) {
	spki, err := spkiOf(w.deviceKey.Public())
	if err != nil {
		return nil, err
	}
	d := newDraft(w.clientCA, pkix.Name{CommonName: w.Device.String()}, spki)
	d.to = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)
	d.ext = []pkix.Extension{keyUsage(0), extUsage(clientAuth), authorityKey(w.clientCA.ski)}
	return d.sign(w.clientCA.key)
}

// The files of a world that a client under test needs.
const (
	fileRoots     = "ca.crt"
	fileCert      = "device.crt"
	fileKey       = "device.key"
	fileRootA     = "root-a.key"
	fileRootB     = "root-b.key"
	fileRootACert = "root-a.crt"
	fileRootBCert = "root-b.crt"
	fileBroker    = "broker.crt"
	fileBrokerKey = "broker.key"
	fileDomain    = "domain"
)

// Save writes the world into dir, which must be empty or not exist.
func (w *World) Save(dir string) error {
	if entries, err := os.ReadDir(dir); err == nil && len(entries) > 0 {
		return fmt.Errorf("%s is not empty: a world is not written over another", dir)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	roots := append(pki.EncodeCert(w.rootA.der), pki.EncodeCert(w.rootB.der)...)
	for name, text := range map[string][]byte{
		fileRoots: roots, fileCert: pki.EncodeCert(w.deviceDER), fileRootACert: pki.EncodeCert(w.rootA.der),
		fileRootBCert: pki.EncodeCert(w.rootB.der), fileBroker: pki.EncodeCert(w.broker[0]), fileDomain: []byte(w.Domain + "\n"),
	} {
		if err := durable.CreateFile(filepath.Join(dir, name), text, 0o644); err != nil {
			return err
		}
	}
	for name, key := range map[string]*ecdsa.PrivateKey{
		fileKey: w.deviceKey, fileRootA: w.rootA.key, fileRootB: w.rootB.key, fileBrokerKey: w.brokerKey,
	} {
		if err := pki.WriteKey(filepath.Join(dir, name), key, nil); err != nil {
			return err
		}
	}
	return nil
}

// LoadWorld reads a world that Save wrote. fs.ErrNotExist says that there is none.
func LoadWorld(dir string) (*World, error) {
	domain, err := os.ReadFile(filepath.Join(dir, fileDomain))
	if err != nil {
		return nil, err
	}
	w := &World{Domain: string(bytes.TrimSpace(domain))}
	if w.rootA, err = loadAuthority(dir, fileRootACert, fileRootA); err != nil {
		return nil, err
	}
	if w.rootB, err = loadAuthority(dir, fileRootBCert, fileRootB); err != nil {
		return nil, err
	}
	if w.clientCA, err = newAuthority("Check device CA"); err != nil { // signs nothing more
		return nil, err
	}
	if w.brokerKey, err = pki.ReadKey(filepath.Join(dir, fileBrokerKey), nil); err != nil {
		return nil, err
	}
	if w.deviceKey, err = pki.ReadKey(filepath.Join(dir, fileKey), nil); err != nil {
		return nil, err
	}
	if w.deviceDER, err = readDER(filepath.Join(dir, fileCert)); err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(w.deviceDER)
	if err != nil {
		return nil, err
	}
	if w.Device, err = identity.ParseID(cert.Subject.CommonName); err != nil {
		return nil, err
	}
	leaf, err := w.leaf(w.rootA, w.brokerKey.Public(), nil)
	w.broker = [][]byte{leaf}
	return w, err
}

// OpenWorld is LoadWorld, or makes a new world in dir where there is none.
func OpenWorld(dir, domain string) (*World, error) {
	w, err := LoadWorld(dir)
	if _, e := os.Stat(filepath.Join(dir, fileDomain)); errors.Is(e, fs.ErrNotExist) {
		if w, err = NewWorld(domain); err == nil {
			err = w.Save(dir)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("the world in %s: %w", dir, err)
	}
	if w.Domain != domain && domain != "" {
		return nil, fmt.Errorf("the world in %s is for the name %s, not %s", dir, w.Domain, domain)
	}
	return w, nil
}

func loadAuthority(dir, cert, key string) (*authority, error) {
	der, err := readDER(filepath.Join(dir, cert))
	if err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	k, err := pki.ReadKey(filepath.Join(dir, key), nil)
	if err != nil {
		return nil, err
	}
	if !k.PublicKey.Equal(c.PublicKey) {
		return nil, fmt.Errorf("%s does not belong to %s", key, cert)
	}
	name := pkix.Name{CommonName: c.Subject.CommonName, Organization: c.Subject.Organization, Country: c.Subject.Country}
	return &authority{der: der, name: name, ski: c.SubjectKeyId, key: k}, nil
}

func readDER(path string) ([]byte, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	b, _ := pem.Decode(text)
	if b == nil {
		return nil, fmt.Errorf("%s is no PEM file", path)
	}
	return b.Bytes, nil
}

func p384() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P384(), rand.Reader) }

package fleet

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"hawser/internal/durable"
	"hawser/internal/pki"
)

// kindAnchors is the kind of an issued.journal line for an anchor set.
const kindAnchors = "anchors"

func generationBase(n uint32) string { return "device-" + strconv.FormatUint(uint64(n), 10) }

// MakeGeneration gives the certificate of device CA n. If it is not there, it is made,
// its key encrypted like that of the newest one, which must be n-1.
func (c *CA) MakeGeneration(n uint32, now time.Time) (*x509.Certificate, error) {
	base := generationBase(n)
	if _, err := os.Stat(filepath.Join(c.dir, base+".crt")); err == nil {
		i, err := c.issuer(base, pki.DeviceCA)
		if err != nil {
			return nil, err
		}
		return i.Cert, nil
	}
	newest, err := c.issuer(c.newest, pki.DeviceCA) // learns the passphrase
	if err != nil {
		return nil, err
	}
	if have, err := pki.Generation(newest.Cert); err != nil || uint32(have)+1 != n {
		return nil, errors.Join(fmt.Errorf("%s holds device CA %d, so it cannot make number %d", c.dir, have, n), err)
	}
	key, err := c.makeKey(filepath.Join(c.dir, base+".key"))
	if err != nil {
		return nil, err
	}
	i, err := pki.IssueDeviceCA(key, subjectOf(newest.Cert), int(n), now)
	if err != nil {
		return nil, err
	}
	if err := durable.CreateFile(filepath.Join(c.dir, base+".crt"), pki.EncodeCert(i.Cert.Raw), 0o644); err != nil {
		return nil, err
	}
	c.issuers[base], c.newest = i, base
	return i.Cert, nil
}

// makeKey makes a key file, or opens the one that an attempt before has left.
func (c *CA) makeKey(path string) (*ecdsa.PrivateKey, error) {
	key, err := pki.ReadKey(path, c.askOnce)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if key, err = pki.GenerateKey(); err != nil {
		return nil, err
	}
	return key, pki.WriteKey(path, key, c.pass)
}

func subjectOf(ca *x509.Certificate) (n pki.Name) {
	if len(ca.Subject.Organization) == 1 && len(ca.Subject.Country) == 1 {
		n = pki.Name{Organisation: ca.Subject.Organization[0], Country: ca.Subject.Country[0]}
	}
	return n
}

// Root is the certificate of this directory's broker root.
func (c *CA) Root() (*x509.Certificate, error) {
	i, err := c.issuer("root", pki.BrokerRoot)
	if err != nil {
		return nil, err
	}
	return i.Cert, nil
}

// SignAnchors signs a set with this directory's root. For one number there is one set
// only, now and for ever: it is kept beside the key and given again; another one is
// refused, since of two sets with one number each would lock the other's devices out.
func (c *CA) SignAnchors(set *pki.AnchorSet, now time.Time) ([]byte, error) {
	if set.Fleet != c.Fleet() {
		return nil, errors.New("the anchor set is of another fleet")
	}
	root, err := c.issuer("root", pki.BrokerRoot)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(c.dir, fmt.Sprintf("anchors-%d.cose", set.Sequence))
	had, err := os.ReadFile(path)
	if err == nil {
		return had, sameSet(had, root.Cert, set)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	sign1, err := pki.SignAnchors(root.Signer, set)
	if err != nil {
		return nil, err
	}
	pub, err := pki.PublicKey(set.Standby)
	if err != nil {
		return nil, err
	}
	key, err := pki.KeyFingerprint(pub)
	if err != nil {
		return nil, err
	}
	hash := sha256.Sum256(sign1)
	err = c.journal.Append(pki.Entry{Time: now.UTC().Format(time.RFC3339), Kind: kindAnchors, Subject: strconv.FormatUint(set.Sequence, 10),
		CA: root.Cert.Subject.CommonName, Key: hex.EncodeToString(key[:]), Cert: hex.EncodeToString(hash[:]), Vouched: byOperator})
	if err != nil {
		return nil, err
	}
	return sign1, durable.CreateFile(path, sign1, 0o644)
}

// sameSet refuses a second set with a number that was given.
func sameSet(sign1 []byte, root *x509.Certificate, want *pki.AnchorSet) error {
	have, err := pki.VerifyAnchors(sign1, root, 0)
	if err != nil {
		return err
	}
	same := have.Sequence == want.Sequence && have.InUse.Equal(want.InUse) && have.Standby.Equal(want.Standby) &&
		have.Port == want.Port && strings.Join(have.Domains, " ") == strings.Join(want.Domains, " ")
	if !same {
		return fmt.Errorf("another anchor set with the number %d was signed before: nothing was signed", want.Sequence)
	}
	return nil
}

// MakeRoot gives the certificate of the root labelled so in dir. If dir is not there, it
// is made: root, key and an empty journal, all or nothing. pass is nil for a trial fleet.
// A directory with root.crt alone will do: its key may be elsewhere.
func MakeRoot(dir, label string, name pki.Name, fleet [16]byte, pass func() ([]byte, error), now time.Time) (*x509.Certificate, error) {
	text, err := os.ReadFile(filepath.Join(dir, "root.crt"))
	if errors.Is(err, fs.ErrNotExist) {
		if dir, err = freeDir(dir); err != nil {
			return nil, err
		}
		if text, err = makeRootDir(dir, label, name, fleet, pass, now); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	root, err := pki.ParseCert(text)
	if err == nil {
		err = pki.CheckCA(root, pki.BrokerRoot)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, "root.crt"), err)
	}
	if have := pki.RootLabel(root); have != label {
		return nil, fmt.Errorf("%s is root %s, not root %s", dir, have, label)
	}
	return root, nil
}

func makeRootDir(dir, label string, name pki.Name, fleet [16]byte, pass func() ([]byte, error), now time.Time) ([]byte, error) {
	var secret []byte
	if pass != nil {
		var err error
		if secret, err = pass(); err != nil {
			return nil, err
		}
		if len(secret) < minPassphrase {
			return nil, fmt.Errorf("the passphrase for %s is shorter than %d bytes", dir, minPassphrase)
		}
	}
	key, err := pki.GenerateKey()
	if err != nil {
		return nil, err
	}
	root, err := pki.IssueBrokerRoot(key, name, label, now)
	if err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".hawser-root-*")
	if err != nil {
		return nil, fmt.Errorf("make root %s: %w", label, err)
	}
	defer os.RemoveAll(tmp)
	text := pki.EncodeCert(root.Cert.Raw)
	for _, step := range []func() error{
		func() error { return pki.WriteKey(filepath.Join(tmp, "root.key"), key, secret) },
		func() error { return durable.CreateFile(filepath.Join(tmp, "root.crt"), text, 0o644) },
		func() error { return pki.CreateJournal(filepath.Join(tmp, journalFile), fleet, now) },
		func() error { return rename(tmp, dir) },
	} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("make root %s: %w", label, err)
		}
	}
	return text, nil
}

// compromisedFile lists generations whose CA key is no longer only ours: "device-1", one a line.
const compromisedFile = "compromised"

// Compromised tells whether a device CA of this directory was marked so.
func (c *CA) Compromised(n uint32) (bool, error) {
	text, err := os.ReadFile(filepath.Join(c.dir, compromisedFile))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	for line := range bytes.Lines(text) {
		if string(bytes.TrimSpace(line)) == generationBase(n) {
			return true, nil
		}
	}
	return false, err
}

// MarkCompromised notes that the key of a device CA, "device-1", may be in other hands:
// from then on its certificates vouch for nothing. There is no way back.
func (c *CA) MarkCompromised(name string) error {
	digits, ok := strings.CutPrefix(name, "device-")
	n, err := strconv.ParseUint(digits, 10, 16)
	if !ok || err != nil || generationBase(uint32(n)) != name {
		return fmt.Errorf("%q is not the name of a device CA: device-1, device-2, ...", name)
	}
	if _, err := os.Stat(filepath.Join(c.dir, name+".crt")); err != nil {
		return fmt.Errorf("%w: there is no %s in %s", ErrNotHere, name, c.dir)
	}
	if was, err := c.Compromised(uint32(n)); was || err != nil {
		return err
	}
	path := filepath.Join(c.dir, compromisedFile)
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.WriteFile(path, append(text, name+"\n"...), 0o600)
}

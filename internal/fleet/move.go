package fleet

import (
	"crypto"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"hawser/internal/durable"
	"hawser/internal/pki"
)

// ErrOnToken reports a key that its token does not give out.
var ErrOnToken = errors.New("is on a token, which gives no key out")

// Move says which CA key is to be kept where.
type Move struct {
	Dir  string // CA directory
	Base string // root, device-1, service
	To   string // URI; a file's path absolute

	Old func() ([]byte, error) // asked for the passphrase of the key as it is
	New func() ([]byte, error) // asked for the new file's passphrase, or the token's PIN
}

// Moved tells what a Move did.
type Moved struct {
	From, To string // URIs
	Cleared  string // the file that was removed; "" if there was none left
}

// Do moves the key. At every moment one of the two places has it and BASE.uri, or
// its absence, names that one; what is left of an interrupted move is finished by
// the same Move again. The old file is removed only after the key in its new place
// made a signature that the CA's certificate verifies.
func (m *Move) Do() (*Moved, error) {
	to, err := m.target()
	if err != nil {
		return nil, err
	}
	j, err := openJournal(filepath.Join(m.Dir, journalFile), lockWait)
	if err != nil {
		return nil, missing(err)
	}
	defer j.Close() // nothing was written to it: it is held so that nobody signs meanwhile
	from, err := caURI(m.Dir, m.Base)
	if err != nil {
		return nil, err
	}
	if from == to {
		return m.again(to)
	}
	if err := m.mayLeave(from, to); err != nil {
		return nil, err
	}
	if err := m.bring(from, to); err != nil {
		return nil, err
	}
	if err := m.enter(from, to); err != nil {
		return nil, err
	}
	return m.finish(to)
}

// again goes on with a move that was interrupted after the new place was entered.
func (m *Move) again(to pki.KeyURI) (*Moved, error) {
	if _, err := os.Stat(m.path(oldSuffix)); errors.Is(err, fs.ErrNotExist) {
		return nil, m.thereAlready()
	}
	pub, err := m.public()
	if err != nil {
		return nil, err
	}
	key, err := pki.OpenKey(to.String(), m.New)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(pki.ProveKey(key, pub), pki.CloseKey(key)); err != nil {
		return nil, err
	}
	return m.finish(to)
}

func (m *Move) thereAlready() error { return fmt.Errorf("the key of %s is there already", m.Base) }

// mayLeave refuses what cannot be taken out, and places that are one and the same by
// another name: clearing the old one would lose the key.
func (m *Move) mayLeave(from, to pki.KeyURI) error {
	if from.OnToken() {
		return fmt.Errorf("the key of %s %w: it stays where it is\nhint: a new CA can be kept elsewhere", m.Base, ErrOnToken)
	}
	info, err := os.Lstat(from.Path)
	if err != nil {
		return missing(err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is a link: only a key file itself can be moved\nhint: put the key there in place of the link", from.Path)
	}
	if !to.OnToken() && sameFile(from.Path, to.Path) {
		return m.thereAlready()
	}
	return nil
}

func sameFile(a, b string) bool {
	x, errA := os.Stat(a)
	y, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(x, y)
}

func (m *Move) target() (pki.KeyURI, error) {
	bases, err := caBases(m.Dir)
	if err != nil {
		return pki.KeyURI{}, err
	}
	if !slices.Contains(bases, m.Base) {
		return pki.KeyURI{}, fmt.Errorf("%w: there is no %q in %s\nhint: hawser ca list --ca %s", ErrNotHere, m.Base, m.Dir, m.Dir)
	}
	to, err := pki.ParseKeyURI(m.To)
	if err == nil && !to.OnToken() && !filepath.IsAbs(to.Path) {
		err = fmt.Errorf("%s: file: is not followed by an absolute path", m.To)
	}
	if err == nil && !to.OnToken() {
		to.Path = filepath.Clean(to.Path)
	}
	return to, err
}

// bring makes sure that the key is in its new place. One that is there already is
// taken if it is the same: an interrupted move left it.
func (m *Move) bring(from, to pki.KeyURI) error {
	pub, err := m.public()
	if err != nil {
		return err
	}
	key, err := pki.ReadKey(from.Path, m.Old)
	if err != nil {
		return missing(err)
	}
	if !key.PublicKey.Equal(pub) {
		return fmt.Errorf("%s does not belong to the certificate of %s\n%s", from.Path, m.Base, restoreHint)
	}
	new := m.secret(to)
	moved, err := pki.ImportKey(to.String(), key, new)
	if errors.Is(err, fs.ErrExist) || errors.Is(err, pki.ErrKeyThere) {
		moved, err = m.there(to, pub, new, err)
	}
	if err != nil {
		return err
	}
	return errors.Join(pki.ProveKey(moved, pub), pki.CloseKey(moved))
}

// there opens what is in the new place already; exists is how that was found out.
func (m *Move) there(to pki.KeyURI, pub *ecdsa.PublicKey, pass func() ([]byte, error), exists error) (crypto.Signer, error) {
	moved, err := pki.OpenKey(to.String(), pass)
	if err != nil {
		return nil, fmt.Errorf("%w: and it did not open: %w", exists, err)
	}
	if pki.ProveKey(moved, pub) != nil {
		return nil, errors.Join(fmt.Errorf("%w: it is another key", exists), pki.CloseKey(moved))
	}
	return moved, nil
}

// secret asks New once, and holds a passphrase to what init demands of one.
func (m *Move) secret(to pki.KeyURI) func() ([]byte, error) {
	var pass []byte
	return func() (_ []byte, err error) {
		if pass == nil {
			pass, err = m.New()
		}
		if err == nil && !to.OnToken() && len(pass) < minPassphrase {
			err = fmt.Errorf("the new passphrase is shorter than %d bytes", minPassphrase)
		}
		return pass, err
	}
}

func (m *Move) public() (*ecdsa.PublicKey, error) {
	cert, err := caCert(m.Dir, m.Base)
	if err != nil {
		return nil, err
	}
	return pki.PublicKey(cert)
}

// enter writes down what is to be cleared and then the new place, in that order.
func (m *Move) enter(from, to pki.KeyURI) error {
	if err := durable.WriteFile(m.path(oldSuffix), []byte(from.String()+"\n"), 0o600); err != nil {
		return err
	}
	return durable.WriteFile(m.path(uriSuffix), []byte(to.String()+"\n"), 0o600)
}

func (m *Move) path(suffix string) string { return filepath.Join(m.Dir, m.Base+suffix) }

// finish clears the old place, which is never the one that BASE.uri names.
func (m *Move) finish(to pki.KeyURI) (*Moved, error) {
	done := &Moved{From: to.String(), To: to.String()}
	old, err := readURI(m.path(oldSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		return done, nil
	}
	if err != nil {
		return nil, err
	}
	done.From = old.String()
	if !old.OnToken() && old != to && !sameFile(old.Path, to.Path) {
		switch err := durable.Remove(old.Path); {
		case err == nil:
			done.Cleared = old.Path
		case !errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("the key is moved, but the old file is still there: %w", err)
		}
	}
	return done, durable.Remove(m.path(oldSuffix))
}

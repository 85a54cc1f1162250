package fleet

import (
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"hawser/internal/durable"
	"hawser/internal/pki"
)

// keyLike makes the key of the CA called base where that of model is kept, whose key
// is open: a file beside it with the same passphrase, or an object called base on the
// same token. A key that an attempt before has left is taken.
func (c *CA) keyLike(model, base string) (crypto.Signer, error) {
	like, err := caURI(c.dir, model)
	if err != nil {
		return nil, err
	}
	u := like
	if u.OnToken() {
		u.Object, u.ID = base, ""
	} else {
		u.Path = filepath.Join(filepath.Dir(like.Path), base+keySuffix)
	}
	again, err := c.note(base, &u)
	if err != nil {
		return nil, err
	}
	pass := c.given(c.slot(&like), c.slot(&u))
	key, err := pki.OpenKey(u.String(), pass)
	switch {
	case err == nil && u.OnToken() && !again:
		return nil, errors.Join(fmt.Errorf("%s: %w", u.Object, pki.ErrKeyThere), pki.CloseKey(key))
	case errors.Is(err, pki.ErrNoKey), !u.OnToken() && errors.Is(err, fs.ErrNotExist):
		return pki.CreateKey(u.String(), pass)
	}
	return key, err
}

// note writes BASE.uri, unless the key goes to where it is looked for without. again
// says that it was there: an attempt before has written it.
func (c *CA) note(base string, u *pki.KeyURI) (again bool, err error) {
	if !u.OnToken() && sameFile(filepath.Dir(u.Path), c.dir) {
		return false, nil
	}
	path := filepath.Join(c.dir, base+uriSuffix)
	if _, err := os.Lstat(path); err == nil {
		have, err := readURI(path)
		if err == nil && have != *u {
			err = fmt.Errorf("%s names another key: %s", path, have)
		}
		return true, err
	}
	return false, durable.CreateFile(path, []byte(u.String()+"\n"), 0o600)
}

// given hands the secret that opened one key on to another; nil where none was asked for.
func (c *CA) given(from, to string) func() ([]byte, error) {
	secret := c.secrets[from]
	if secret == nil {
		return nil
	}
	c.secrets[to] = secret
	return func() ([]byte, error) { return secret, nil }
}

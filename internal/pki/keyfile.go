package pki

import (
	"crypto"
	"crypto/ecdsa"
	"fmt"
	"os"
	"strings"

	"hawser/internal/durable"
)

// WriteKey makes a key file, mode 0600, encrypted when passphrase is not nil. A
// file that is already there is never overwritten: the error is fs.ErrExist.
func WriteKey(path string, key *ecdsa.PrivateKey, passphrase []byte) error {
	text, err := MarshalKey(key, passphrase)
	if err != nil {
		return err
	}
	return durable.CreateFile(path, text, 0o600)
}

// ReadKey reads a key file, which nobody but its owner may be able to read
// (durable.ErrExposed), see ParseKey.
func ReadKey(path string, passphrase func() ([]byte, error)) (*ecdsa.PrivateKey, error) {
	if err := durable.CheckPrivate(path); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	key, err := ParseKey(text, passphrase)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}

// OpenKey opens the key that a URI names. The scheme file: is followed by a path,
// relative or absolute ("file:ca-a/root.key"), and is the only one.
func OpenKey(uri string, passphrase func() ([]byte, error)) (crypto.Signer, error) {
	path, ok := strings.CutPrefix(uri, "file:")
	if !ok || path == "" {
		return nil, fmt.Errorf("key %q is not a file: URI", uri)
	}
	return ReadKey(path, passphrase)
}

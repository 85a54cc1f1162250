package pki

import (
	"bufio"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"hawser/internal/durable"
)

// What can be wrong with a key on a token.
var (
	ErrNoPKCS11 = errors.New("pkcs11: is not in this build, which was made without cgo")
	ErrModule   = errors.New("the PKCS#11 module does not load")
	ErrNoToken  = errors.New("is not there")
	ErrNoKey    = errors.New("is not on the token")
	ErrPIN      = errors.New("wrong PIN")
	ErrKeyThere = errors.New("is on the token already")
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

// OpenKey opens the P-256 key that a URI names, see ParseKeyURI. passphrase is asked
// for that of an encrypted file or for the PIN of a token, once: a token counts
// wrong ones and locks itself, so nothing here tries a second time. CloseKey gives
// the key up.
func OpenKey(uri string, passphrase func() ([]byte, error)) (crypto.Signer, error) {
	u, err := ParseKeyURI(uri)
	if err != nil {
		return nil, err
	}
	if u.OnToken() {
		return openToken(&u, passphrase)
	}
	return ReadKey(u.Path, passphrase)
}

// CreateKey makes a P-256 key where uri says, and opens it. A file is encrypted
// unless passphrase is nil. A token makes the key itself, sensitive and not
// extractable, and what it says of the key is checked. A key that is there already is
// left alone: fs.ErrExist or ErrKeyThere.
func CreateKey(uri string, passphrase func() ([]byte, error)) (crypto.Signer, error) {
	u, err := ParseKeyURI(uri)
	if err != nil {
		return nil, err
	}
	if u.OnToken() {
		return createOnToken(&u, passphrase)
	}
	key, err := GenerateKey()
	if err != nil {
		return nil, err
	}
	return key, putFile(u.Path, key, passphrase)
}

// ImportKey puts an existing key where uri says, opens it there and proves by a
// signature that it is the same. Nothing is overwritten, see CreateKey.
func ImportKey(uri string, key *ecdsa.PrivateKey, passphrase func() ([]byte, error)) (crypto.Signer, error) {
	u, err := ParseKeyURI(uri)
	if err != nil {
		return nil, err
	}
	if u.OnToken() {
		return importToToken(&u, key, passphrase)
	}
	pass, err := newPassphrase(passphrase)
	if err != nil {
		return nil, err
	}
	if err := WriteKey(u.Path, key, pass); err != nil {
		return nil, err
	}
	again, err := ReadKey(u.Path, func() ([]byte, error) { return pass, nil })
	if err != nil {
		return nil, err
	}
	return again, ProveKey(again, &key.PublicKey)
}

func putFile(path string, key *ecdsa.PrivateKey, passphrase func() ([]byte, error)) error {
	pass, err := newPassphrase(passphrase)
	if err != nil {
		return err
	}
	return WriteKey(path, key, pass)
}

// newPassphrase gives nil, which is "in the clear", only where there is nobody to ask.
func newPassphrase(passphrase func() ([]byte, error)) ([]byte, error) {
	if passphrase == nil {
		return nil, nil
	}
	p, err := passphrase()
	if err != nil {
		return nil, fmt.Errorf("read passphrase: %w", err)
	}
	if len(p) == 0 {
		return nil, errors.New("the passphrase is empty")
	}
	return p, nil
}

// CloseKey gives up what OpenKey holds for a key: the session with its token. For a
// key from a file there is nothing to do.
func CloseKey(key crypto.Signer) error {
	if c, ok := key.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// ProveKey lets key sign and checks that pub verifies it: whoever holds the
// certificate of pub can then be sure that key is its key.
func ProveKey(key crypto.Signer, pub *ecdsa.PublicKey) error {
	digest := sha256.Sum256([]byte("hawser-key-proof-v1"))
	signature, err := key.Sign(nil, digest[:], crypto.SHA256)
	if err != nil {
		return fmt.Errorf("the key does not sign: %w", err)
	}
	if !ecdsa.VerifyASN1(pub, digest[:], signature) {
		return errors.New("the key is another than it should be: its signature does not verify")
	}
	return nil
}

// pin reads the PIN from pin-source, or asks.
func (u *KeyURI) pin(ask func() ([]byte, error)) (string, error) {
	if u.PINSource != "" {
		return pinFile(u.PINSource)
	}
	if ask == nil {
		return "", fmt.Errorf("%s asks for a PIN, and there is nobody to ask", u.on())
	}
	pin, err := ask()
	if err != nil {
		return "", fmt.Errorf("read PIN: %w", err)
	}
	if len(pin) == 0 {
		return "", errors.New("the PIN is empty; the token was not asked")
	}
	return string(pin), nil
}

func pinFile(path string) (string, error) {
	if err := durable.CheckPrivate(path); err != nil {
		return "", fmt.Errorf("pin-source: %w", err)
	}
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("pin-source: %w", err)
	}
	defer f.Close()
	line, err := bufio.NewReader(io.LimitReader(f, 1<<10)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("pin-source: %w", err)
	}
	line = strings.TrimRight(line, "\r\n")
	if line == "" {
		return "", fmt.Errorf("pin-source: the first line of %s is empty", path)
	}
	return line, nil
}

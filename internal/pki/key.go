package pki

import (
	"bytes"
	"crypto/aes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/youmark/pkcs8"
)

const (
	blockKey       = "PRIVATE KEY"
	blockEncrypted = "ENCRYPTED PRIVATE KEY"
	maxKeyFile     = 16 << 10 // bytes; ours have 241 and about 380
)

// The cost of one guess at a passphrase. openssl 3.0 grants scrypt 32 MiB, which
// bounds N*r; the time is bought with p instead (128*N*r = 16 MiB, p times over).
const (
	scryptN    = 1 << 14
	scryptR    = 8
	scryptP    = 8
	scryptSalt = 16
)

// What a key file may ask for when it is read: memory in bytes (128*N*r), and
// N*r*p as a measure of time, 16 times our own.
const (
	maxScryptMemory = 256 << 20
	maxScryptWork   = 16 * scryptN * scryptR * scryptP
)

// ErrPassphrase reports that a key file did not open with the passphrase given.
var ErrPassphrase = errors.New("wrong passphrase")

// ErrNoPassphrase reports an encrypted key file and no way to ask for its passphrase.
var ErrNoPassphrase = errors.New("the key is encrypted and no passphrase was given")

// GenerateKey makes a P-256 key.
func GenerateKey() (*ecdsa.PrivateKey, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	return k, nil
}

// MarshalKey gives a P-256 key as PEM: plain PKCS#8 when passphrase is nil, else
// PKCS#8 with PBES2 (scrypt, AES-256-CBC) as openssl reads it. A passphrase that
// is empty but not nil is an error, so that a prompt left blank cannot leave a
// key in the clear.
func MarshalKey(key *ecdsa.PrivateKey, passphrase []byte) ([]byte, error) {
	if key == nil || key.Curve != elliptic.P256() {
		return nil, errors.New("key is not on the curve P-256")
	}
	if passphrase == nil {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, fmt.Errorf("encode key: %w", err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: blockKey, Bytes: der}), nil
	}
	if len(passphrase) == 0 {
		return nil, errors.New("the passphrase is empty")
	}
	der, err := pkcs8.MarshalPrivateKey(key, passphrase, &pkcs8.Opts{
		Cipher:  pkcs8.AES256CBC,
		KDFOpts: pkcs8.ScryptOpts{SaltSize: scryptSalt, CostParameter: scryptN, BlockSize: scryptR, ParallelizationParameter: scryptP},
	})
	if err != nil {
		return nil, fmt.Errorf("encrypt key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: blockEncrypted, Bytes: der}), nil
}

// IsKey reports whether text holds a private key of any common kind, ours or not.
func IsKey(text []byte) bool { return bytes.Contains(text, []byte(blockKey+"-----")) }

// ParseKey reads one P-256 key from PEM. passphrase is asked only for an
// encrypted key and may be nil. Errors: ErrPassphrase, ErrNoPassphrase, or what
// is wrong with the file.
func ParseKey(text []byte, passphrase func() ([]byte, error)) (*ecdsa.PrivateKey, error) {
	if len(text) > maxKeyFile {
		return nil, fmt.Errorf("key file of %d bytes is larger than %d", len(text), maxKeyFile)
	}
	b, rest := pem.Decode(text)
	if b == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("not one PEM private key")
	}
	switch b.Type {
	case blockKey:
		k, err := x509.ParsePKCS8PrivateKey(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse key: %w", err)
		}
		return p256Key(k)
	case blockEncrypted:
		return decryptKey(b.Bytes, passphrase)
	}
	return nil, fmt.Errorf("PEM block %q is not a PKCS#8 key", b.Type)
}

func decryptKey(der []byte, passphrase func() ([]byte, error)) (*ecdsa.PrivateKey, error) {
	if passphrase == nil {
		return nil, ErrNoPassphrase
	}
	if err := checkPBES2(der); err != nil {
		return nil, err
	}
	pass, err := passphrase()
	if err != nil {
		return nil, fmt.Errorf("read passphrase: %w", err)
	}
	// An empty passphrase makes the library take the key to be in the clear, which
	// checkPBES2 has excluded: it fails like any wrong one.
	k, _, err := pkcs8.ParsePrivateKey(der, pass)
	if err != nil {
		return nil, ErrPassphrase
	}
	return p256Key(k)
}

func p256Key(k any) (*ecdsa.PrivateKey, error) {
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("key is not on the curve P-256")
	}
	return key, nil
}

// pbes2 is EncryptedPrivateKeyInfo (RFC 5208 6) with PBES2 (RFC 8018 A.4) and scrypt (RFC 7914 7).
type pbes2 struct {
	Alg struct {
		OID    asn1.ObjectIdentifier
		Params struct {
			KDF struct {
				OID    asn1.ObjectIdentifier
				Params scryptParams
			}
			Cipher pkix.AlgorithmIdentifier
		}
	}
	Data []byte
}

type scryptParams struct {
	Salt      []byte
	N, R, P   int
	KeyLength int `asn1:"optional"`
}

// checkPBES2 looks at an encrypted key before the library does: it would run
// whatever cost the file asks for, and panics on a ciphertext that is not made
// of whole blocks or has another IV length.
func checkPBES2(der []byte) error {
	var e pbes2
	if rest, err := asn1.Unmarshal(der, &e); err != nil || len(rest) > 0 {
		return errors.New("encrypted key is not PKCS#8 with PBES2 and scrypt")
	}
	p := e.Alg.Params
	if e.Alg.OID.String() != "1.2.840.113549.1.5.13" || p.KDF.OID.String() != "1.3.6.1.4.1.11591.4.11" {
		return errors.New("encrypted key is not PKCS#8 with PBES2 and scrypt")
	}
	var iv []byte
	_, err := asn1.Unmarshal(p.Cipher.Parameters.FullBytes, &iv) // one value: there can be no rest
	if err != nil || p.Cipher.Algorithm.String() != "2.16.840.1.101.3.4.1.42" || len(iv) != aes.BlockSize {
		return errors.New("encrypted key is not encrypted with AES-256-CBC")
	}
	if len(e.Data) == 0 || len(e.Data)%aes.BlockSize != 0 {
		return errors.New("encrypted key is damaged: not whole cipher blocks")
	}
	return p.KDF.Params.check()
}

func (s scryptParams) check() error {
	if s.N < 2 || s.R < 1 || s.P < 1 || s.KeyLength != 0 && s.KeyLength != 32 {
		return errors.New("encrypted key is damaged: scrypt parameters")
	}
	// Divisions, so that no product overflows.
	if s.N > maxScryptMemory/128/s.R || s.P > maxScryptWork/s.N/s.R {
		return fmt.Errorf("encrypted key asks for scrypt N=%d r=%d p=%d, more than is granted", s.N, s.R, s.P)
	}
	return nil
}

package bench

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"hawser/internal/durable"
	"hawser/internal/pki"
)

// Init makes the bench directory dir, which must not exist or be empty, and the station's
// key, unless the key is there already. pass gives the passphrase of the key; a trial bench
// has none. It gives the path of the station's certificate request.
func Init(dir string, s Settings, pass func() ([]byte, error)) (csr string, err error) {
	if err := s.check(); err != nil {
		return "", err
	}
	made, err := makeDir(dir)
	if err != nil {
		return "", err
	}
	if err := fill(dir, &s, pass); err != nil {
		if made {
			err = errors.Join(err, os.RemoveAll(dir))
		}
		return "", err
	}
	return filepath.Join(dir, fileCSR), nil
}

// makeDir reports whether the directory is new.
func makeDir(dir string) (made bool, err error) {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return true, os.MkdirAll(dir, 0o700)
	case err != nil:
		return false, err
	case len(entries) > 0:
		return false, fmt.Errorf("%s is not empty: nothing was made\nhint: --dir NAME of a new directory", dir)
	}
	return false, nil
}

// fill writes bench.toml last: without it the directory is no bench.
func fill(dir string, s *Settings, pass func() ([]byte, error)) error {
	key, err := stationKey(dir, s, pass)
	if err != nil {
		return err
	}
	if err := writeCSR(dir, s.Station, key); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, dirBlocks), 0o700); err != nil {
		return err
	}
	if err := (&reserved{}).write(dir); err != nil {
		return err
	}
	return s.write(dir)
}

// stationKey opens the key, or makes it where there is none.
func stationKey(dir string, s *Settings, pass func() ([]byte, error)) (crypto.Signer, error) {
	uri := s.keyURI(dir)
	path, isFile := strings.CutPrefix(uri, "file:")
	if !isFile {
		return pki.OpenKey(uri, pass)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return pki.OpenKey(uri, pass)
	}
	key, err := pki.GenerateKey()
	if err != nil {
		return nil, err
	}
	var secret []byte
	if !s.Trial {
		if secret, err = pass(); err != nil {
			return nil, err
		}
	}
	return key, pki.WriteKey(path, key, secret)
}

func writeCSR(dir, station string, key crypto.Signer) error {
	t := &x509.CertificateRequest{Subject: pkix.Name{CommonName: station}, SignatureAlgorithm: x509.ECDSAWithSHA256}
	der, err := x509.CreateCertificateRequest(rand.Reader, t, key)
	if err != nil {
		return fmt.Errorf("make the station's certificate request: %w", err)
	}
	return durable.WriteFile(filepath.Join(dir, fileCSR), pki.EncodeCSR(der), 0o644)
}

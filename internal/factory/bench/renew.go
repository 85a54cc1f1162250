package bench

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"hawser/internal/pki"
)

// Request writes the station's certificate request anew, for the key that the bench has,
// and gives its path.
func Request(dir string, pass func() ([]byte, error)) (path string, err error) {
	s, err := readSettings(dir)
	if err != nil {
		return "", err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return "", err
	}
	err = request(dir, s, pass)
	return filepath.Join(dir, fileCSR), errors.Join(err, lock.Close())
}

func request(dir string, s *Settings, pass func() ([]byte, error)) error {
	key, err := pki.OpenKey(s.keyURI(dir), pass)
	if err != nil {
		return err
	}
	if err := sameKey(dir, key); err != nil {
		return errors.Join(err, pki.CloseKey(key))
	}
	return errors.Join(writeCSR(dir, s.Station, key), pki.CloseKey(key))
}

// sameKey refuses a key that is not the one with which the bench was set up.
func sameKey(dir string, key crypto.Signer) error {
	text, err := os.ReadFile(filepath.Join(dir, fileCSR))
	if err != nil {
		return err
	}
	csr, err := pki.ParseCSR(text)
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(dir, fileCSR), err)
	}
	if !csr.Pub.Equal(key.Public()) {
		return fmt.Errorf("the key is another than that of %s: nothing was written", filepath.Join(dir, fileCSR))
	}
	return nil
}

// Renew takes a new certificate of the station in: it is in the journal, and in force,
// when Renew returns nil. One that is in force already changes nothing.
func (b *Bench) Renew(der []byte, now time.Time) (*x509.Certificate, error) {
	name, _, cert, err := pki.VerifyStationCA(der, b.pinned())
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w\nhint: the first block from a new device CA brings the certificate, with --device-ca", err)
	case name != b.Settings.Station:
		return nil, fmt.Errorf("the certificate is for station %q, not for %q: nothing was changed", name, b.Settings.Station)
	case cert.Equal(b.station):
		return cert, nil
	case cert.NotBefore.Before(b.station.NotBefore):
		return nil, fmt.Errorf("the certificate is older than the one in force, which ends at %s: nothing was changed", stamp(b.station.NotAfter))
	}
	if err := b.journal.AppendRenew(cert, b.key, now); err != nil {
		return nil, err
	}
	b.station = cert
	return cert, nil
}

// pinned is the device CA from which the bench takes certificates.
func (b *Bench) pinned() []*x509.Certificate {
	for _, l := range b.blocks {
		if Fingerprint(l) == b.Settings.DeviceCA {
			return []*x509.Certificate{l.DeviceCA}
		}
	}
	return nil
}

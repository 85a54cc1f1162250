package fleet

import (
	"crypto/x509"
	"encoding/hex"
	"errors"
	"runtime"
	"sync"
	"time"

	"hawser/internal/identity"
	"hawser/internal/pki"
)

// NewDevice is one device to certify. Class may be empty.
type NewDevice struct {
	ID    identity.ID
	CSR   *pki.CSR
	Class string
}

// EnrollDevices is EnrollDevice for many: signed on all cores, recorded with one
// write, all or none. The certificates are in the order of list.
func (c *CA) EnrollDevices(list []NewDevice, now time.Time) ([]*x509.Certificate, error) {
	keys := make([][32]byte, len(list))
	for i, d := range list {
		var err error
		if keys[i], err = c.mayEnrol(d); err != nil {
			return nil, err
		}
	}
	ca, err := c.issuer(c.newest, pki.DeviceCA)
	if err != nil {
		return nil, err
	}
	certs, entries := make([]*x509.Certificate, len(list)), make([]pki.Entry, len(list))
	err = eachOnAllCores(len(list), func(i int) (err error) {
		d := list[i]
		if certs[i], err = pki.IssueDeviceLeaf(ca, d.ID, d.CSR.Pub, now); err == nil {
			o := order{kind: pki.KindDevice, subject: d.ID.String(), class: d.Class, vouched: byOperator}
			entries[i] = entry(o, ca, certs[i], keys[i], now)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := c.journal.Append(entries...); err != nil {
		return nil, err
	}
	return certs, nil
}

// mayEnrol refuses before any key is looked for. It gives the device's fingerprint.
func (c *CA) mayEnrol(d NewDevice) (key [32]byte, err error) {
	if d.Class != "" {
		if err := pki.CheckClass(d.Class); err != nil {
			return key, err
		}
	}
	if key, err = pki.KeyFingerprint(d.CSR.Pub); err != nil {
		return key, err
	}
	return key, c.journal.CheckBound(pki.KindDevice, d.ID.String(), hex.EncodeToString(key[:]))
}

// eachOnAllCores calls do for 0 to n-1 and gives all that failed.
func eachOnAllCores(n int, do func(i int) error) error {
	workers := min(n, runtime.GOMAXPROCS(0))
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n && errs[w] == nil; i += workers {
				errs[w] = do(i)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

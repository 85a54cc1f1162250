package sim

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

const (
	enrolBatch = 1000 // devices in one call of the API
	listPage   = 10_000
	askers     = 8 // calls of the API at a time
)

// Member is one simulated device with its credentials.
type Member struct {
	ID   identity.ID
	Cert tls.Certificate
	key  *ecdsa.PrivateKey
}

// Enrolment says which devices to bring into which fleet.
type Enrolment struct {
	Client   *admin.Client
	Layout   *fleet.Layout
	Devices  int
	Class    string
	Progress func(enrolled int) // may be nil
}

// Enrol gives the first devices that follow from the fleet's seed, and enrols those that
// the registry does not know yet: fresh is how many. Ids that others have, and simulated
// devices that are not active any more, are passed over.
func Enrol(ctx context.Context, e Enrolment) (all []*Member, fresh int, err error) {
	if !e.Layout.Config.Fleet.Trial {
		return nil, 0, errors.New("this is a production fleet: simulated devices are for trial fleets only, nothing was enrolled\n" +
			"hint: hawser init --dir trial --domain localhost --trial makes one")
	}
	if e.Devices < 1 || e.Devices > MaxDevices {
		return nil, 0, fmt.Errorf("%d devices: 1 to %d can be simulated", e.Devices, MaxDevices)
	}
	seed, err := ReadSeed(e.Layout.SimSeedPath())
	if err != nil {
		return nil, 0, err
	}
	all, known, err := e.choose(ctx, seed)
	if err != nil {
		return nil, 0, err
	}
	if err := e.fetch(ctx, known); err != nil {
		return nil, 0, err
	}
	var missing []*Member
	for _, m := range all {
		if m.Cert.Certificate == nil {
			missing = append(missing, m)
		}
	}
	return all, len(missing), e.enrol(ctx, missing)
}

// choose takes the first slots that are free or hold a device of this seed.
func (e *Enrolment) choose(ctx context.Context, seed *Seed) (all, known []*Member, err error) {
	base, err := seed.base()
	if err != nil {
		return nil, nil, err
	}
	there, err := e.list(ctx, prefix(base))
	if err != nil {
		return nil, nil, err
	}
	for slot := identity.ID(0); len(all) < e.Devices; slot++ {
		id := base + slot
		if slot == 1<<slotBits {
			return nil, nil, fmt.Errorf("only %d ids are left for simulated devices", len(all))
		}
		if !id.Issuable() {
			continue
		}
		m := &Member{ID: id}
		if m.key, err = seed.key(id); err != nil {
			return nil, nil, err
		}
		if d, ok := there[id]; ok {
			ours, err := holds(d, m.key)
			if err != nil {
				return nil, nil, err
			}
			if !ours {
				continue
			}
			known = append(known, m)
		}
		all = append(all, m)
	}
	return all, known, nil
}

// holds reports whether d is active and has this key.
func holds(d admin.Device, key *ecdsa.PrivateKey) (bool, error) {
	print, err := pki.KeyFingerprint(&key.PublicKey)
	return d.State == "active" && bytes.Equal(d.Key, print[:]), err
}

func (e *Enrolment) list(ctx context.Context, prefix string) (map[identity.ID]admin.Device, error) {
	there := map[identity.ID]admin.Device{}
	f := admin.DeviceFilter{Prefix: prefix, Limit: listPage}
	for {
		page, err := e.Client.Devices(ctx, f)
		if err != nil {
			return nil, err
		}
		for _, d := range page.Devices {
			there[d.ID] = d
		}
		if page.More == 0 {
			return there, nil
		}
		f.After = page.More
	}
}

// fetch asks for the certificates of devices that are enrolled already.
func (e *Enrolment) fetch(ctx context.Context, known []*Member) error {
	now := time.Now()
	return parallel(len(known), askers, func(i int) error {
		d, err := e.Client.Device(ctx, known[i].ID)
		if err != nil {
			return err
		}
		for _, c := range d.Certificates {
			if c.State == "active" && now.After(c.NotBefore) && now.Before(c.NotAfter) {
				known[i].take(c.DER)
			}
		}
		return nil
	})
}

func (m *Member) take(der []byte) {
	m.Cert = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: m.key}
}

// enrol certifies and imports in batches.
func (e *Enrolment) enrol(ctx context.Context, missing []*Member) error {
	if len(missing) == 0 {
		return nil
	}
	ca, err := fleet.OpenCA(e.Layout.CADir("a"), nil)
	if err != nil {
		return err
	}
	defer ca.Close()
	for at := 0; at < len(missing); at += enrolBatch {
		part := missing[at:min(at+enrolBatch, len(missing))]
		if err := e.batch(ctx, ca, part); err != nil {
			return fmt.Errorf("%d of %d devices enrolled: %w", at, len(missing), err)
		}
		if e.Progress != nil {
			e.Progress(at + len(part))
		}
	}
	return nil
}

func (e *Enrolment) batch(ctx context.Context, ca *fleet.CA, part []*Member) error {
	list, calls := make([]fleet.NewDevice, len(part)), make([]admin.NamedEnrolment, len(part))
	err := parallel(len(part), runtime.GOMAXPROCS(0), func(i int) error {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, part[i].key)
		if err != nil {
			return err
		}
		csr, err := pki.ParseCSR(der)
		list[i] = fleet.NewDevice{ID: part[i].ID, CSR: csr, Class: e.Class}
		return err
	})
	if err != nil {
		return err
	}
	certs, err := ca.EnrollDevices(list, time.Now())
	if err != nil {
		return err
	}
	for i, c := range certs {
		part[i].take(c.Raw)
		calls[i] = admin.NamedEnrolment{ID: part[i].ID, Enrolment: admin.Enrolment{
			CSR: list[i].CSR.DER, Certificate: c.Raw, Class: e.Class, Tags: []string{Tag}}}
	}
	return e.Client.EnrollMany(ctx, calls)
}

// parallel calls do for 0 to n-1 on some goroutines and gives what failed.
func parallel(n, workers int, do func(i int) error) error {
	workers = min(n, workers)
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

package sim

import (
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"hawser/device"
	"hawser/internal/pki"
)

// Fault is what is wrong with a simulated device. All but Sound show when the device is
// offered a certificate or an anchor set.
type Fault byte

// The faults.
const (
	Sound     Fault = iota
	PowerLoss       // loses its power each time it has stored something, before it says so, and restarts
	Liar            // says that it has installed and uses whatever it is offered, and stores nothing
	Away            // loses its power before it has stored the first offer; PowerOn brings it back
	ForgedSet       // pins another standby root: the fleet's next set is forged to it
	OldSet          // holds a set with a far higher number: the fleet's next one is old to it
)

// Faults are all that there are, in the order in which they are planted.
func Faults() []Fault { return []Fault{PowerLoss, Liar, Away, ForgedSet, OldSet} }

func (f Fault) String() string {
	names := []string{"sound", "loses power", "lies", "goes away", "takes the next anchor set for a forgery", "takes the next anchor set for an old one"}
	if int(f) < len(names) {
		return names[f]
	}
	return fmt.Sprintf("fault %d", f)
}

// fault is that of the i-th member.
func (c *Config) fault(i int) Fault {
	if at := i - (len(c.Members) - len(c.Faults)); at >= 0 {
		return c.Faults[at]
	}
	return Sound
}

// stateOfOffers is the kit's name for what it keeps of offers.
const stateOfOffers = "pki"

// faultStore is the flash of a faulty device.
type faultStore struct {
	device.Store
	unit *Unit
	gone bool // Away has been away; one offer at a time is dealt with
}

// Save implements device.Store. What a loss of power interrupts is the kit's caller.
func (s *faultStore) Save(name string, data []byte) error {
	if name != stateOfOffers {
		return s.Store.Save(name, data)
	}
	switch u := s.unit; {
	case u.fault == Away && !s.gone:
		s.gone = true
		u.PowerOff()
		return errors.New("there is no power")
	case u.fault == PowerLoss:
		err := s.Store.Save(name, data)
		u.PowerOff()
		u.PowerOn()
		return err
	}
	return s.Store.Save(name, data)
}

const farAhead = 1 << 32 // sequence of the set that OldSet holds

// misprovision gives a device other anchors than the fleet's, where its fault is that.
func (u *Unit) misprovision(cfg *device.Config) (err error) {
	set := *u.fleet.set
	var signer *pki.Issuer
	switch u.fault {
	case ForgedSet:
		key, err := pki.GenerateKey()
		if err != nil {
			return err
		}
		if signer, err = pki.IssueBrokerRoot(key, pki.Name{Organisation: "Elsewhere", Country: "DE"}, "X", time.Now()); err != nil {
			return err
		}
		set.Standby = signer.Cert
	case OldSet:
		set.Sequence = farAhead
		if signer, err = standby(u.fleet); err != nil {
			return err
		}
	default:
		return nil
	}
	cfg.Roots = []*x509.Certificate{set.InUse, set.Standby}
	cfg.Anchors, err = pki.SignAnchors(signer.Signer, &set)
	return err
}

// standby opens the root that signs the fleet's next set, which a trial fleet has at hand. It
// signs here past the CA's journal: the set is for a simulated device alone.
func standby(f *Fleet) (*pki.Issuer, error) {
	root := f.set.Standby
	dir := f.cfg.Layout.CADir(strings.ToLower(pki.RootLabel(root)))
	key, err := pki.ReadKey(filepath.Join(dir, "root.key"), nil)
	if err != nil {
		return nil, err
	}
	return pki.NewIssuer(root, key, pki.BrokerRoot)
}

package fleet

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"hawser/internal/durable"
	"hawser/internal/pki"
)

// anchorsDir holds every set, N.cose for number N.
const anchorsDir = "anchors"

func (l *Layout) setPath(n uint64) string {
	return filepath.Join(l.server(anchorsDir), strconv.FormatUint(n, 10)+".cose")
}

// loadAnchors reads and checks all sets. Where InstallAnchors was cut off, the rest of
// it is done here.
func (l *Layout) loadAnchors() error {
	newest, err := os.ReadFile(l.AnchorsPath())
	if err != nil {
		return missing(err)
	}
	signed, err := l.readSets(newest)
	if err != nil {
		return err
	}
	sets, err := pki.VerifyAnchorChain(signed)
	if err != nil {
		return fmt.Errorf("%s: %w", l.server(anchorsDir), err)
	}
	last := len(sets) - 1
	if id := sets[last].Fleet; id != l.FleetID() {
		return fmt.Errorf("%s belongs to the fleet %s, hawser.toml to %s", l.AnchorsPath(), hex.EncodeToString(id[:]), l.Config.Fleet.ID)
	}
	l.mu.Lock()
	l.sets, l.signed = sets, signed
	l.mu.Unlock()
	switch {
	case bytes.Equal(newest, signed[last]):
		return nil
	case last > 0 && bytes.Equal(newest, signed[last-1]):
		return l.publishAnchors()
	}
	return fmt.Errorf("%s is neither set %d nor the one before", l.AnchorsPath(), last+1)
}

// readSets reads anchors/1.cose and up. A fleet made before there was a second set has
// only anchors.cose.
func (l *Layout) readSets(newest []byte) (signed [][]byte, err error) {
	entries, err := os.ReadDir(l.server(anchorsDir))
	if errors.Is(err, fs.ErrNotExist) {
		return [][]byte{newest}, nil // a newer one than set 1 fails the check of the chain
	}
	if err != nil {
		return nil, err
	}
	for n := uint64(1); ; n++ {
		b, err := os.ReadFile(l.setPath(n))
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return nil, err
		}
		signed = append(signed, b)
	}
	count := 0
	for _, e := range entries {
		if ok, _ := filepath.Match("*.cose", e.Name()); ok {
			count++
		}
	}
	if len(signed) == 0 || len(signed) != count {
		return nil, fmt.Errorf("%s: the sets 1 to %d are not all there\n%s", l.server(anchorsDir), max(count, 1), restoreHint)
	}
	return signed, nil
}

// checkRoots: the bundle begins with the roots of the newest set, and has none that is
// in no set.
func (l *Layout) checkRoots() error {
	_, set, err := l.Anchors()
	if err != nil {
		return err
	}
	roots := l.Trust().BrokerRoots
	if !roots[0].Equal(set.InUse) || !roots[1].Equal(set.Standby) {
		return fmt.Errorf("%s does not begin with the two roots of anchor set %d, which the standby root has signed", l.server(rootsFile), set.Sequence)
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	for _, r := range roots {
		if !slices.ContainsFunc(l.sets, func(s *pki.AnchorSet) bool { return r.Equal(s.InUse) || r.Equal(s.Standby) }) {
			return fmt.Errorf("%s: %q is in no anchor set of this fleet", l.server(rootsFile), r.Subject.CommonName)
		}
	}
	return nil
}

// Anchors gives the newest anchor set, whose chain of signatures was checked.
func (l *Layout) Anchors() (sign1 []byte, set *pki.AnchorSet, err error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if len(l.sets) == 0 {
		return nil, nil, errors.New("the anchor sets are not loaded")
	}
	last := len(l.sets) - 1
	return l.signed[last], l.sets[last], nil
}

// AnchorSet gives set n, 1 and up; false where there is none.
func (l *Layout) AnchorSet(n uint64) (sign1 []byte, set *pki.AnchorSet, ok bool) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if n == 0 || n > uint64(len(l.sets)) {
		return nil, nil, false
	}
	return l.signed[n-1], l.sets[n-1], true
}

// InstallAnchors takes a set up that follows the newest one: it becomes the newest, and
// its roots come first in the bundle. A crash leaves the old state or the new one after
// the next open. The set that is the newest already changes nothing.
func (l *Layout) InstallAnchors(sign1 []byte) (*pki.AnchorSet, error) {
	newest, last, err := l.Anchors()
	if err != nil {
		return nil, err
	}
	if bytes.Equal(newest, sign1) {
		return last, nil
	}
	set, err := pki.VerifyNextAnchors(sign1, last)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(l.server(anchorsDir), 0o700); err != nil {
		return nil, err
	}
	for i, file := range [][]byte{newest, sign1} { // the last one may stand in anchors.cose alone
		if err := durable.WriteFile(l.setPath(last.Sequence+uint64(i)), file, 0o644); err != nil {
			return nil, err
		}
	}
	if err := durable.SyncDir(l.ServerDir()); err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.sets, l.signed = append(slices.Clip(l.sets), set), append(slices.Clip(l.signed), sign1)
	l.mu.Unlock()
	if err := l.publishAnchors(); err != nil {
		return nil, err
	}
	return set, l.loadTrust()
}

// publishAnchors makes bundle and anchors.cose follow the newest set. The roots of all
// older sets stay behind its own.
func (l *Layout) publishAnchors() error {
	if err := l.writeRoots(1); err != nil {
		return err
	}
	newest, _, err := l.Anchors()
	if err != nil {
		return err
	}
	return durable.WriteFile(l.AnchorsPath(), newest, 0o644)
}

// writeRoots writes the bundle: the newest set's roots, then those of the older sets
// from number oldest on.
func (l *Layout) writeRoots(oldest uint64) error {
	l.mu.RLock()
	sets := l.sets
	l.mu.RUnlock()
	var roots []*x509.Certificate
	for i := len(sets) - 1; i >= 0 && sets[i].Sequence >= oldest; i-- {
		for _, r := range []*x509.Certificate{sets[i].InUse, sets[i].Standby} {
			if !slices.ContainsFunc(roots, r.Equal) {
				roots = append(roots, r)
			}
		}
	}
	var text []byte
	for _, r := range roots {
		text = append(text, pki.EncodeCert(r.Raw)...)
	}
	return durable.WriteFile(l.server(rootsFile), text, 0o644)
}

// ForgetRoots takes roots out of the bundle that only sets below oldest have. While a
// leaf under one of them is served, all stay.
func (l *Layout) ForgetRoots(oldest uint64) error {
	for _, d := range l.Config.Fleet.Domains {
		root, err := l.LeafRoot(d)
		if err != nil {
			return err
		}
		for n := oldest; root != nil; n++ {
			_, set, ok := l.AnchorSet(n)
			if !ok {
				return nil
			}
			if root.Equal(set.InUse) || root.Equal(set.Standby) {
				break
			}
		}
	}
	if err := l.writeRoots(oldest); err != nil {
		return err
	}
	return l.loadTrust()
}

// LeafRoot is the broker root that signed what is served for domain.
func (l *Layout) LeafRoot(domain string) (*x509.Certificate, error) {
	leaf, err := l.readBrokerCert(l.BrokerCertPath(domain), domain)
	if err != nil {
		return nil, missing(err)
	}
	for _, r := range l.Trust().BrokerRoots {
		if pki.IssuedUnder(leaf, r) {
			return r, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", l.BrokerCertPath(domain), pki.ErrIssuer)
}

// WantedRoot is the root that should sign the leaf of domain, while oldest is the lowest
// number of a set that a device uses. The last of several domains is the rescue domain:
// it is served under the standby root of that set, which is the one root such a device
// is sure to accept. All others are served under the root in use.
func (l *Layout) WantedRoot(domain string, oldest uint64) (*x509.Certificate, error) {
	_, newest, err := l.Anchors()
	if err != nil {
		return nil, err
	}
	domains := l.Config.Fleet.Domains
	rescue := len(domains) > 1 && domain == domains[len(domains)-1]
	if _, set, ok := l.AnchorSet(oldest); rescue && ok && oldest < newest.Sequence {
		return set.Standby, nil
	}
	return newest.InUse, nil
}

// DeviceRoots is the PEM text of what a new device pins: both roots of the newest set.
func (l *Layout) DeviceRoots() ([]byte, error) {
	_, set, err := l.Anchors()
	if err != nil {
		return nil, err
	}
	return append(pki.EncodeCert(set.InUse.Raw), pki.EncodeCert(set.Standby.Raw)...), nil
}

// SetDeviceCAs makes cas the device CAs whose certificates are accepted.
func (l *Layout) SetDeviceCAs(cas []*x509.Certificate) error {
	var text []byte
	for _, c := range cas {
		if err := pki.CheckCA(c, pki.DeviceCA); err != nil {
			return err
		}
		text = append(text, pki.EncodeCert(c.Raw)...)
	}
	if len(cas) == 0 {
		return errors.New("no device CA would be left")
	}
	if err := durable.WriteFile(l.server(deviceCAsFile), text, 0o644); err != nil {
		return err
	}
	return l.loadTrust()
}

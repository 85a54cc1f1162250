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
	"strings"
	"time"

	"hawser/internal/factory"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// firstAnchorsFile is, beside the device CAs, the set that init made. It tells the safe
// what no server can: which roots the fleet began with.
const firstAnchorsFile = "first-anchors.cose"

// StationOrder is what a flashing bench needs: a certificate for its key and a block of ids.
type StationOrder struct {
	Station string
	CSR     *pki.CSR
	Block   factory.BlockID
	IDs     []identity.ID // ascending
	Expires time.Time
	Anchors [][]byte // all anchor sets of the fleet, the first one first
}

// Request makes the request that asks a safe for o.
func (o *StationOrder) Request(fleet [16]byte) (*pki.Request, error) {
	r, err := pki.NewRequest(fleet, pki.KindStation, o.Station, o.CSR)
	if err != nil {
		return nil, err
	}
	words := make([]string, len(o.IDs))
	for i, id := range o.IDs {
		words[i] = id.String()
	}
	r.Station = &pki.Order{Block: o.Block.String(), Expires: o.Expires.UTC().Format(time.RFC3339), IDs: strings.Join(words, " "), Anchors: o.Anchors}
	return r, nil
}

// orderOf reads a request back.
func orderOf(r *pki.Request) (*StationOrder, error) {
	o := &StationOrder{Station: r.Subject, CSR: r.ParsedCSR(), Anchors: r.Station.Anchors}
	var err error
	if o.Block, err = factory.ParseBlockID(r.Station.Block); err != nil {
		return nil, err
	}
	if o.IDs, err = r.Station.ParseIDs(); err != nil {
		return nil, err
	}
	o.Expires, err = time.Parse(time.RFC3339, r.Station.Expires)
	return o, err
}

// SignStation certifies a station's key for a year and signs its block, both under the
// newest device CA. The block's units will be born with the last of the anchor sets,
// which must lead back to the one that the fleet began with.
func (c *CA) SignStation(o *StationOrder, now time.Time) (*x509.Certificate, []byte, error) {
	set, err := c.checkStation(o, now)
	if err != nil {
		return nil, nil, err
	}
	return c.signStation(o, set, order{vouched: byOperator}, now)
}

// signStation fills in as what the journal records beside what o says.
func (c *CA) signStation(o *StationOrder, anchors []byte, as order, now time.Time) (*x509.Certificate, []byte, error) {
	as.kind, as.subject, as.pub, as.block = pki.KindStation, o.Station, o.CSR.Pub, o.Block.String()
	cert, err := c.sign(as, now)
	if err != nil {
		return nil, nil, err
	}
	ca, err := c.issuer(c.newest, pki.DeviceCA)
	if err != nil {
		return nil, nil, err
	}
	file, err := factory.SignBlock(ca, &factory.Block{Fleet: c.Fleet(), Station: o.Station, ID: o.Block, IDs: o.IDs,
		Expires: o.Expires.UTC(), DeviceCA: ca.Cert, StationCert: cert, Anchors: anchors})
	return cert, file, err
}

// RenewStation certifies a station's key, the same or a new one, for another year.
func (c *CA) RenewStation(station string, csr *pki.CSR, now time.Time) (*x509.Certificate, error) {
	return c.sign(order{kind: pki.KindStation, subject: station, pub: csr.Pub, vouched: byOperator}, now)
}

// checkStation refuses what the safe knows better: ids that it certified itself, and
// anchors that do not come from this fleet's first ones. It gives the newest set.
func (c *CA) checkStation(o *StationOrder, now time.Time) (anchors []byte, err error) {
	if !o.Expires.After(now) {
		return nil, fmt.Errorf("the block expired at %s: nothing was signed", o.Expires.UTC().Format(time.RFC3339))
	}
	if len(o.IDs) == 0 || len(o.IDs) > factory.MaxBlockIDs {
		return nil, fmt.Errorf("a block has 1 to %d ids, not %d: nothing was signed", factory.MaxBlockIDs, len(o.IDs))
	}
	for _, id := range o.IDs {
		if c.journal.Certified(id.String()) {
			return nil, fmt.Errorf("%w: %s belongs to a device that this CA has certified: nothing was signed", pki.ErrBound, id)
		}
	}
	sets, err := pki.VerifyAnchorChain(o.Anchors)
	if err != nil {
		return nil, err
	}
	if sets[0].Fleet != c.Fleet() {
		return nil, errors.New("the anchor sets are of another fleet: nothing was signed")
	}
	return o.Anchors[len(o.Anchors)-1], c.checkFirst(o.Anchors[0], sets[0])
}

// checkFirst holds the first set against the copy that init left here. A directory made
// before there was one has its own root to compare, and what is shown for the rest.
func (c *CA) checkFirst(sign1 []byte, set *pki.AnchorSet) error {
	want, err := os.ReadFile(filepath.Join(c.dir, firstAnchorsFile))
	if err == nil {
		if bytes.Equal(want, sign1) {
			return nil
		}
		return errors.New("the first anchor set is not the one that this fleet began with: nothing was signed\n" +
			"hint: whoever wrote the request would have new units trust other brokers; find out who had access to the server")
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	text, err := os.ReadFile(filepath.Join(c.dir, "root.crt"))
	if err != nil {
		return missing(err)
	}
	root, err := pki.ParseCert(text)
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(c.dir, "root.crt"), err)
	}
	if !set.InUse.Equal(root) && !set.Standby.Equal(root) {
		return errors.New("the first anchor set does not name the root of this CA directory: nothing was signed")
	}
	return nil
}

// signStationRequest answers a request of the kind station. Its subject is always typed.
func (c *CA) signStationRequest(req *pki.Request, confirm Confirm, now time.Time) ([]byte, error) {
	o, err := orderOf(req)
	if err != nil {
		return nil, err
	}
	anchors, err := c.checkStation(o, now)
	if err != nil {
		return nil, err
	}
	typed, err := confirm(Summary(req)+stationSummary(o), req.Subject)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotConfirmed, err)
	}
	if typed != req.Subject {
		return nil, ErrNotConfirmed
	}
	hash := req.Hash()
	cert, block, err := c.signStation(o, anchors, order{request: hex.EncodeToString(hash[:]), vouched: byTyping}, now)
	if err != nil {
		return nil, err
	}
	return pki.NewStationResult(req, cert, block)
}

// stationSummary says what a bench gets, and the roots that its units will trust.
func stationSummary(o *StationOrder) string {
	var b strings.Builder
	fmt.Fprintf(&b, "ids      %d, %s to %s\nblock    %s\nexpires  %s\n", len(o.IDs), o.IDs[0], o.IDs[len(o.IDs)-1], o.Block,
		o.Expires.UTC().Format(time.RFC3339))
	if set, err := pki.InspectAnchors(o.Anchors[len(o.Anchors)-1]); err == nil {
		fmt.Fprintf(&b, "root     %x  in use\nroot     %x  standby\n", pki.Fingerprint(set.InUse.Raw), pki.Fingerprint(set.Standby.Raw))
	}
	return b.String()
}

// AnchorChain gives all anchor sets, the first one first, as a StationOrder wants them.
func (l *Layout) AnchorChain() [][]byte {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return append([][]byte(nil), l.signed...)
}

// OpenBlock reads a block file that was signed for this fleet: by one of its device CAs,
// with its fleet id.
func (l *Layout) OpenBlock(file []byte) (*factory.Block, error) {
	b, err := factory.OpenBlock(file)
	if err != nil {
		return nil, err
	}
	if b.Fleet != l.FleetID() {
		return nil, errors.New("the block is of another fleet")
	}
	for _, ca := range l.Trust().DeviceCAs {
		if ca.Equal(b.DeviceCA) {
			return b, nil
		}
	}
	return nil, errors.New("the block is not signed by a device CA of this fleet")
}

package device

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"

	"hawser/internal/message"
)

const (
	pkiName     = "pki"
	pkiVersion  = 1
	turnedAfter = 3 // refusals of the certificate in use in a row, before another one is tried
)

// pkiState is what a device shows and pins, beside what it was configured with. Its byte
// strings are never changed, and shared with whoever gave them.
type pkiState struct {
	current  []byte // certificate in use, DER; nil: Config.Certificate
	previous []byte // the one in use before, which worked; nil: none
	pending  []byte // certificate that is stored and not proven yet; nil: none
	set      []byte // anchor set in use, COSE; nil: Config.Anchors, or the bare Config.Roots
	newSet   []byte // set that is stored and not proven yet; nil: none
	offer    uint64 // the last offer that was installed; 0: none

	// Of set and newSet.
	sequence, newSequence uint64
}

func (p *pkiState) unproven() bool { return p.pending != nil || p.newSet != nil }

// fields are the byte strings in the order in which they are stored.
func (p *pkiState) fields() []*[]byte {
	return []*[]byte{&p.current, &p.previous, &p.pending, &p.set, &p.newSet}
}

// encode gives the blob: layout version, offer big-endian, each field with its length in two
// bytes, CRC-32 (IEEE) over all before it.
func (p *pkiState) encode() []byte {
	b := binary.BigEndian.AppendUint64([]byte{pkiVersion}, p.offer)
	for _, f := range p.fields() {
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(*f))), *f...)
	}
	return withSum(b)
}

func withSum(b []byte) []byte { return binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b)) }

var errPKIDamaged = errors.New("the stored certificates and anchor sets are damaged\n" +
	"hint: restore the file pki of the device's state; removing it makes the device begin with what it was provisioned with, which the server may refuse by now")

func parsePKI(b []byte) (*pkiState, error) {
	const head, sum = 9, 4
	if len(b) < head+sum || b[0] != pkiVersion || crc32.ChecksumIEEE(b[:len(b)-sum]) != binary.BigEndian.Uint32(b[len(b)-sum:]) {
		return nil, errPKIDamaged
	}
	p := &pkiState{offer: binary.BigEndian.Uint64(b[1:])}
	b = b[head : len(b)-sum]
	for _, f := range p.fields() {
		if len(b) < 2 || len(b)-2 < int(binary.BigEndian.Uint16(b)) {
			return nil, errPKIDamaged
		}
		n := int(binary.BigEndian.Uint16(b))
		if n > 0 {
			*f = b[2 : 2+n : 2+n]
		}
		b = b[2+n:]
	}
	if len(b) > 0 {
		return nil, errPKIDamaged
	}
	return p, nil
}

// loadPKI reads what earlier offers have left. Nothing stored is a device that lives on what
// it was configured with.
func (d *Device) loadPKI() error {
	data, err := d.cfg.Store.Load(pkiName)
	if err != nil || data == nil {
		return err
	}
	p, err := parsePKI(data)
	if err != nil {
		return err
	}
	for _, cert := range [][]byte{p.current, p.previous, p.pending} {
		if cert == nil {
			continue
		}
		if err := d.checkOwn(cert); err != nil {
			return fmt.Errorf("the stored state belongs to another device: %w\n"+
				"hint: give each device a state of its own", err)
		}
	}
	if p.set != nil {
		if err := d.keepSet(p); err != nil {
			return err
		}
	}
	if p.newSet != nil {
		if p.newSequence, err = d.checkSet(p, p.newSet); err != nil {
			d.log.Warn("stored anchor set left out", "device", d.id, "error", err)
			p.newSet = nil
		}
	}
	d.pki = p
	return nil
}

// keepSet reads the stored set in use. One that is not newer than Config.Anchors is left out:
// the device was provisioned anew.
func (d *Device) keepSet(p *pkiState) error {
	set, err := heldAnchors(p.set)
	switch {
	case err != nil:
		return fmt.Errorf("%w (%v)", errPKIDamaged, err)
	case set.fleet != d.born.fleet:
		return errors.New("the stored anchor set belongs to another fleet than the device's own\n" +
			"hint: give each device a state of its own")
	case set.sequence <= d.born.sequence:
		p.set = nil
	default:
		p.sequence = set.sequence
	}
	return nil
}

// checkSet gives the sequence of an offered set, if the standby root of the set in use has
// signed it and it is a later one.
func (d *Device) checkSet(p *pkiState, offered []byte) (sequence uint64, err error) {
	held := p.set
	if held == nil {
		held = d.cfg.Anchors
	}
	if held == nil {
		return 0, errors.New("this device was provisioned without an anchor set, and so cannot tell who may change what it pins")
	}
	now, err := heldAnchors(held)
	if err != nil {
		return 0, err
	}
	set, err := verifyAnchors(offered, now.standby, now.sequence)
	switch {
	case err != nil:
		return 0, err
	case set.fleet != now.fleet:
		return 0, errors.New("anchor set is for another fleet")
	}
	return set.sequence, nil
}

// birth is what is kept of Config.Anchors. The zero value: there is none.
type birth struct {
	fleet    [16]byte
	sequence uint64
	servers  []string
}

// takeAnchors checks Config.Anchors and pins what they name.
func (d *Device) takeAnchors(cfg *Config) error {
	if cfg.Anchors == nil {
		return checkRoots(cfg.Roots)
	}
	set, err := bornAnchors(cfg.Anchors)
	if err != nil {
		return fmt.Errorf("the device's own anchor set: %w\nhint: provision the device again", err)
	}
	d.born = birth{fleet: set.fleet, sequence: set.sequence}
	if len(cfg.Servers) == 0 {
		d.born.servers = set.servers()
	}
	if len(cfg.Roots) == 0 {
		cfg.Roots = []*x509.Certificate{set.inUse, set.standby}
	}
	// Thousands of devices share their roots: what was parsed here is dropped.
	pinned := func(r *x509.Certificate) bool { return slices.ContainsFunc(cfg.Roots, r.Equal) }
	if len(cfg.Roots) != 2 || !pinned(set.inUse) || !pinned(set.standby) {
		return errors.New("the device's roots are not those of its anchor set\nhint: ca.crt and anchors.cose belong together")
	}
	return nil
}

// checkOwn refuses a certificate that is not for this device's key and id. Who has signed it
// is not judged: a device does not know the device CA, whose one judge is the server. By a
// certificate that it will not admit, the server hurts itself only: the old one is kept.
func (d *Device) checkOwn(der []byte) error {
	if len(der) > message.MaxCertificate {
		return fmt.Errorf("the certificate of %d bytes is larger than %d", len(der), message.MaxCertificate)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("the certificate: %w", err)
	}
	own := d.cfg.Certificate.Leaf
	switch {
	case cert.Subject.CommonName != d.ID():
		return fmt.Errorf("the certificate is for %q, not for %s", cert.Subject.CommonName, d.id)
	case !isP256(cert.PublicKey) || !cert.PublicKey.(*ecdsa.PublicKey).Equal(own.PublicKey):
		return errors.New("the certificate is for another key")
	}
	return nil
}

// updatePKI replaces the state: memory follows only what is durable. stateMu is held.
func (d *Device) updatePKI(next pkiState) error {
	if err := d.cfg.Store.Save(pkiName, next.encode()); err != nil {
		return fmt.Errorf("save the device's certificates: %w", err)
	}
	d.pki = &next
	return nil
}

func (d *Device) pkiNow() pkiState {
	d.stateMu.Lock()
	defer d.stateMu.Unlock()
	return d.pkiHeld()
}

// pkiHeld is pkiNow for who holds stateMu.
func (d *Device) pkiHeld() pkiState {
	if d.pki == nil {
		return pkiState{}
	}
	return *d.pki
}

// inUse gives the certificate in use and the sequence of the set in use.
func (d *Device) inUse(p *pkiState) (cert []byte, sequence uint64) {
	cert, sequence = p.current, p.sequence
	if cert == nil {
		cert = d.cfg.Certificate.Certificate[0]
	}
	if p.set == nil {
		sequence = d.born.sequence
	}
	return cert, sequence
}

// credentials are what one attempt shows and pins.
type credentials struct {
	cert []byte // DER; nil: Config.Certificate
	set  []byte // COSE; nil: Config.Roots
}

// plans are the credentials to try, best first: what is not proven yet together, then
// each of the two alone, then what is known to work.
func (d *Device) plans() (all []credentials) {
	p := d.pkiNow()
	certs, sets := [][]byte{d.turn(&p)}, [][]byte{p.set}
	if p.pending != nil {
		certs = [][]byte{p.pending, certs[0]}
	}
	if p.newSet != nil {
		sets = [][]byte{p.newSet, p.set}
	}
	for _, c := range certs {
		for _, s := range sets {
			all = append(all, credentials{c, s})
		}
	}
	return all
}

// turn is the certificate to show: the one in use, and after a few refusals in turn with those
// that worked before. A registry that was restored may know an older one only.
func (d *Device) turn(p *pkiState) []byte {
	if d.refused < turnedAfter {
		return p.current
	}
	worked := [][]byte{p.current}
	for _, c := range [][]byte{p.previous, d.cfg.Certificate.Certificate[0]} {
		if c != nil && p.current != nil && !slices.ContainsFunc(worked, func(w []byte) bool { return bytes.Equal(w, c) }) {
			worked = append(worked, c)
		}
	}
	return worked[(d.refused-turnedAfter+1)%len(worked)]
}

// admitted notes that a server has let the device in with c: what was pending is in use from
// now on. On disk it is so before anybody hears of it.
func (d *Device) admitted(c credentials) error {
	d.refused = 0
	d.stateMu.Lock()
	defer d.stateMu.Unlock()
	was := d.pkiHeld()
	next := was
	if !bytes.Equal(c.cert, next.current) {
		next.previous, _ = d.inUse(&next)
		if next.current = c.cert; bytes.Equal(c.cert, next.pending) {
			next.pending = nil
		} else if !next.unproven() {
			next.offer = 0 // an older one is back: the offer has come to nothing
		}
	}
	if c.set != nil && bytes.Equal(c.set, next.newSet) {
		next.set, next.sequence = next.newSet, next.newSequence
		next.newSet, next.newSequence = nil, 0
	}
	if next.same(&was) {
		return nil
	}
	d.log.Info("in use from now on", "device", d.id, "certificate", fmt.Sprintf("%x", d.fingerprint(&next)), "anchors", next.sequence)
	return d.updatePKI(next)
}

func (p *pkiState) same(q *pkiState) bool {
	theirs := q.fields()
	for i, f := range p.fields() {
		if !bytes.Equal(*f, *theirs[i]) {
			return false
		}
	}
	return p.offer == q.offer
}

func (d *Device) fingerprint(p *pkiState) [32]byte {
	cert, _ := d.inUse(p)
	return sha256.Sum256(cert)
}

// pins gives what an attempt with c pins and where it goes. What is parsed for it is not kept.
func (d *Device) pins(c credentials) (roots []*x509.Certificate, servers []string, err error) {
	servers = d.cfg.Servers
	if c.set == nil {
		if len(servers) == 0 {
			servers = d.born.servers
		}
		return d.cfg.Roots, servers, nil
	}
	set, err := heldAnchors(c.set)
	if err != nil {
		return nil, nil, err
	}
	if len(servers) == 0 {
		servers = set.servers()
	}
	return []*x509.Certificate{set.inUse, set.standby}, servers, nil
}

// shows is the certificate of an attempt, with the device's one key.
func (d *Device) shows(c credentials) tls.Certificate {
	if c.cert == nil {
		return d.cfg.Certificate
	}
	return tls.Certificate{Certificate: [][]byte{c.cert}, PrivateKey: d.cfg.Certificate.PrivateKey}
}

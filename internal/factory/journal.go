package factory

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"

	"hawser/internal/durable"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// ErrUsed reports an id or a key that the journal holds already.
var ErrUsed = errors.New("an id and a key are used once")

// Journal is a station's journal, open for appending. One process holds it at a time; it is
// not safe for concurrent use.
type Journal struct {
	state
	lock    *durable.FileLock
	f       *os.File
	signer  crypto.Signer
	write   func([]byte) error // writes and syncs; a field so that a test can make it fail either way
	stopped error              // a write that failed: what is on disk is unknown until the next open
}

// CreateJournal makes the journal of a station that has just been given its first
// certificate; signer holds its key. A journal that is there is never overwritten (fs.ErrExist).
func CreateJournal(path string, signer crypto.Signer, fleet [16]byte, station *x509.Certificate, now time.Time) error {
	j := &Journal{signer: signer}
	r := Record{What: Begin, Fleet: hex.EncodeToString(fleet[:]), Station: station.Subject.CommonName, Cert: station.Raw}
	_, text, err := j.prepare(r, now)
	if err != nil {
		return err
	}
	return durable.CreateFile(path, append(text, '\n'), 0o644)
}

// OpenJournal locks the journal, checks its chain and all signatures and opens it for
// appending with the station's key. A last line without its newline is cut off: the unit that
// it would have recorded was never called done. Errors: durable.ErrLocked, ErrJournal,
// fs.ErrNotExist; a journal is never made anew.
func OpenJournal(path string, signer crypto.Signer) (*Journal, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	lock, err := durable.Lock(path)
	if err != nil {
		return nil, err
	}
	j := &Journal{lock: lock, signer: signer}
	if err := j.load(path); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), lock.Close())
	}
	return j, nil
}

func (j *Journal) load(path string) (err error) {
	if j.f, err = os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0); err != nil {
		return err
	}
	j.write = j.writeSync
	scan := scanner{state: &j.state}
	if err = scan.run(j.f); err == nil {
		err = j.checkSigner()
	}
	if err == nil && scan.torn > 0 {
		err = errors.Join(j.f.Truncate(scan.size), j.f.Sync())
	}
	if err != nil {
		return errors.Join(err, j.f.Close())
	}
	return nil
}

func (j *Journal) checkSigner() error {
	pub, err := pki.PublicKey(j.cert)
	if err != nil {
		return err
	}
	if !pub.Equal(j.signer.Public()) {
		return fmt.Errorf("the journal of station %q was not written with this key", j.station)
	}
	return nil
}

// AppendBlock records that a block was taken in. A block that is there is not recorded again.
func (j *Journal) AppendBlock(id BlockID, now time.Time) error {
	if j.blocks[id.String()] {
		return nil
	}
	return j.append(Record{What: Load, Block: id.String()}, now)
}

// NewUnit is what a bench knows about a unit that it has made.
type NewUnit struct {
	ID       identity.ID
	Block    BlockID
	Class    string // may be ""
	Hardware uint32 // revision, 0 for none
	How      string // ByProbe or ByCSR
	CSR      []byte // DER
	Cert     *x509.Certificate
}

// AppendUnit records a unit: with its return the unit is done. What the server would not
// import is refused: an id or key that is there (ErrUsed), a block that was not taken in, a
// certificate or request that does not fit.
func (j *Journal) AppendUnit(u NewUnit, now time.Time) error {
	return j.append(Record{What: Made, Block: u.Block.String(), ID: u.ID.String(), Class: u.Class, Hardware: u.Hardware,
		How: u.How, CSR: u.CSR, Cert: u.Cert.Raw}, now)
}

// AppendBurnt records that id was begun and will never be a unit; reason is cut to 200
// characters of plain ASCII.
func (j *Journal) AppendBurnt(id identity.ID, reason string, now time.Time) error {
	return j.append(Record{What: Burnt, ID: id.String(), Reason: cleanReason(reason)}, now)
}

// AppendRenew records a new certificate of the station. The record is signed with the key
// in force so far; signer, which may be the same, signs from the next record on.
func (j *Journal) AppendRenew(cert *x509.Certificate, signer crypto.Signer, now time.Time) error {
	pub, err := pki.PublicKey(cert)
	if err != nil {
		return err
	}
	if !pub.Equal(signer.Public()) {
		return errors.New("the station's new certificate is for another key")
	}
	if err := j.append(Record{What: Renew, Cert: cert.Raw}, now); err != nil {
		return err
	}
	j.signer = signer
	return nil
}

// append signs r as the next record and writes it. When it returns nil the line is on
// disk; when r is refused nothing is written. After a failed write the journal refuses all
// further appends until it is opened again.
func (j *Journal) append(r Record, now time.Time) error {
	if j.stopped != nil {
		return fmt.Errorf("the journal had a write error before: %w", j.stopped)
	}
	l, text, err := j.prepare(r, now)
	if err != nil {
		return err
	}
	if err := j.write(append(text, '\n')); err != nil {
		j.stopped = err
		return fmt.Errorf("write journal: %w", err)
	}
	j.take(l)
	j.claim(l)
	return nil
}

// prepare gives the line of r, which passes every check that a reader makes.
func (j *Journal) prepare(r Record, now time.Time) (*Line, []byte, error) {
	r.Number, r.Prev, r.Time = j.n+1, hex.EncodeToString(j.head[:]), now.UTC().Format(time.RFC3339)
	digest, err := r.digest()
	if err != nil {
		return nil, nil, err
	}
	sig, err := j.signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, nil, fmt.Errorf("sign journal record: %w", err)
	}
	r.Sig = hex.EncodeToString(sig)
	text, err := r.encode()
	if err != nil {
		return nil, nil, err
	}
	l, err := parseLine(text)
	if err != nil {
		return nil, nil, err
	}
	if err := errors.Join(j.check(l), j.checkKey(l)); err != nil {
		return nil, nil, err
	}
	if err := l.verify(true); err != nil {
		return nil, nil, err
	}
	return l, text, nil
}

func (j *Journal) writeSync(line []byte) error {
	if _, err := j.f.Write(line); err != nil {
		return err
	}
	return j.f.Sync()
}

// Has reports whether id is a unit's or burnt.
func (j *Journal) Has(id identity.ID) bool { return j.ids[id] }

// HasBlock reports whether a block was taken in.
func (j *Journal) HasBlock(id BlockID) bool { return j.blocks[id.String()] }

// Close gives the journal up.
func (j *Journal) Close() error { return errors.Join(j.f.Close(), j.lock.Close()) }

// state is what the lines so far have established; it is the same for the bench that writes
// and for whoever reads.
type state struct {
	n       uint64
	head    [32]byte // hash of the last line
	fleet   [16]byte
	station string
	cert    *x509.Certificate // the station's, in force for the next line
	blocks  map[string]bool
	ids     map[identity.ID]bool // made or burnt
	keys    map[[32]byte]identity.ID
	units   int
	burnt   int
}

// check reports whether l can follow, and notes which certificate it must be signed under.
// Line 1 is signed under the certificate that it brings.
func (s *state) check(l *Line) error {
	prev := hex.EncodeToString(s.head[:])
	if l.Number != s.n+1 || l.Prev != prev || (l.What == Begin) != (s.n == 0) {
		return fmt.Errorf("%w: it does not continue the line before", ErrJournal)
	}
	l.StationCert = s.cert
	switch l.What {
	case Begin:
		l.StationCert = l.cert
	case Renew:
		if cn := l.cert.Subject.CommonName; cn != s.station {
			return fmt.Errorf("%w: the journal of %q with a certificate of %q", ErrJournal, s.station, cn)
		}
	case Load:
		if s.blocks[l.Block] {
			return fmt.Errorf("%w: block %s twice", ErrJournal, l.Block)
		}
	case Made:
		if !s.blocks[l.Block] {
			return fmt.Errorf("%s: block %s was never taken in", l.ID, l.Block)
		}
	}
	if l.id != 0 && s.ids[l.id] {
		return fmt.Errorf("%w: %s is in the journal already", ErrUsed, l.ID)
	}
	return nil
}

// take makes l the last line.
func (s *state) take(l *Line) {
	s.n, s.head = l.Number, l.Hash
	switch l.What {
	case Begin:
		raw, _ := hex.DecodeString(l.Fleet) // checked by checkBegin
		s.fleet, s.station, s.cert = [16]byte(raw), l.Station, l.cert
		s.blocks, s.ids, s.keys = map[string]bool{}, map[identity.ID]bool{}, map[[32]byte]identity.ID{}
	case Renew:
		s.cert = l.cert
	case Load:
		s.blocks[l.Block] = true
	case Made:
		s.ids[l.id] = true
		s.units++
	case Burnt:
		s.ids[l.id] = true
		s.burnt++
	}
}

// checkKey refuses a unit whose key another one has.
func (s *state) checkKey(l *Line) error {
	if other, ok := s.keys[l.key]; ok && l.What == Made {
		return fmt.Errorf("%w: %s has the key of %s", ErrUsed, l.ID, other)
	}
	return nil
}

// claim takes the key of a unit in.
func (s *state) claim(l *Line) {
	if l.What == Made {
		s.keys[l.key] = l.id
	}
}

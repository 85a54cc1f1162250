package factory

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"hawser/internal/identity"
	"hawser/internal/pki"
)

// The kinds of record.
const (
	Begin = "begin" // the first one: fleet, station and the station's certificate
	Load  = "block" // a block was taken in
	Made  = "unit"  // a unit is done
	Burnt = "burnt" // an id was begun and will never be a unit
	Renew = "renew" // a new certificate of the station, in force from the next record on
)

// How a unit got its key.
const (
	ByProbe = "probe" // the bench made it and wrote it
	ByCSR   = "csr"   // the unit made it and sent a request
)

const (
	signaturePrefix = "hawser-journal-v1\n"
	maxLine         = 16 << 10 // bytes of a line, newline excluded
	maxCSR          = 6 << 10  // bytes of DER; a plain one has about 220
	maxCert         = 2 << 10  // bytes of DER; ours have about 400
	maxReason       = 200      // bytes
)

// ErrJournal reports a journal whose chain, signatures or order do not hold.
var ErrJournal = errors.New("the journal is damaged or was changed")

// Record is one line of a station's journal: PROTOCOL.md, "Station journal". Each kind has
// the fields that are named after it here, and no others.
type Record struct {
	Number   uint64 `json:"n"`                  // 1 and up, without a gap
	Prev     string `json:"prev"`               // SHA-256 of the line before, newline excluded; 64 zeros in line 1
	Time     string `json:"time"`               // RFC 3339 UTC, by the bench's clock
	What     string `json:"what"`               // the kind
	Fleet    string `json:"fleet,omitempty"`    // begin
	Station  string `json:"station,omitempty"`  // begin
	Block    string `json:"block,omitempty"`    // block, unit
	ID       string `json:"id,omitempty"`       // unit, burnt
	Class    string `json:"class,omitempty"`    // unit, may be absent
	Hardware uint32 `json:"hardware,omitempty"` // unit, may be absent: the revision
	How      string `json:"how,omitempty"`      // unit
	CSR      []byte `json:"csr,omitempty"`      // unit: DER, in base64
	Cert     []byte `json:"cert,omitempty"`     // begin and renew: the station's; unit: the unit's; DER, in base64
	Reason   string `json:"reason,omitempty"`   // burnt
	Sig      string `json:"sig,omitempty"`      // ASN.1 ECDSA-SHA256, hex, over the prefix and the line without it
}

// Line is a record that was read.
type Line struct {
	Record
	When        time.Time         // Time, parsed
	Hash        [32]byte          // SHA-256 of the line
	StationCert *x509.Certificate // the station's, in force, under which the record was signed
	Unit        *Unit             // of a unit record whose content was checked

	id     identity.ID
	signed [32]byte          // what the signature is over
	cert   *x509.Certificate // Cert, parsed
	key    [32]byte          // of a unit: its pki.KeyFingerprint
}

// Unit is what a unit record proves: the unit's key is its own, and the station certified
// it under this id.
type Unit struct {
	ID   identity.ID
	Cert *x509.Certificate
	CSR  *pki.CSR
	Key  [32]byte // pki.KeyFingerprint
}

// parseLine reads a line in its one spelling and checks what it says of itself: the fields
// of its kind and no others.
func parseLine(text []byte) (*Line, error) {
	l := &Line{Hash: sha256.Sum256(text)}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&l.Record); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrJournal, err)
	}
	again, err := l.encode()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, text) {
		return nil, fmt.Errorf("%w: it is not as a bench writes it", ErrJournal)
	}
	if err := l.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrJournal, err)
	}
	l.signed, err = l.digest()
	return l, err
}

// check holds each field against its kind.
func (l *Line) check() (err error) {
	if l.When, err = time.Parse(time.RFC3339, l.Time); err != nil || l.When.UTC().Format(time.RFC3339) != l.Time {
		return fmt.Errorf("time %q is not RFC 3339 in UTC", l.Time)
	}
	r := &l.Record
	only := Record{Number: r.Number, Prev: r.Prev, Time: r.Time, What: r.What, Sig: r.Sig}
	switch r.What {
	case Begin:
		only.Fleet, only.Station, only.Cert = r.Fleet, r.Station, r.Cert
		err = l.checkBegin()
	case Renew:
		only.Cert = r.Cert
		err = l.parseCert(pki.StationCA)
	case Load:
		only.Block = r.Block
		_, err = ParseBlockID(r.Block)
	case Burnt:
		only.ID, only.Reason = r.ID, r.Reason
		err = l.checkBurnt()
	case Made:
		only.Block, only.ID, only.Class, only.Hardware, only.How, only.CSR, only.Cert = r.Block, r.ID, r.Class, r.Hardware, r.How, r.CSR, r.Cert
		err = l.checkMade()
	default:
		return fmt.Errorf("%q is no kind of record", r.What)
	}
	if err != nil {
		return err
	}
	return only.same(r)
}

func (r *Record) same(other *Record) error {
	a, err := r.encode()
	if err != nil {
		return err
	}
	b, err := other.encode()
	if err != nil {
		return err
	}
	if !bytes.Equal(a, b) {
		return fmt.Errorf("a %s record has fields that do not belong in it", r.What)
	}
	return nil
}

func (l *Line) checkBegin() error {
	raw, err := hex.DecodeString(l.Fleet)
	if err != nil || len(raw) != 16 || hex.EncodeToString(raw) != l.Fleet {
		return errors.New("the fleet id is not 32 lower-case hex digits")
	}
	if err := l.parseCert(pki.StationCA); err != nil {
		return err
	}
	if cn := l.cert.Subject.CommonName; cn != l.Station {
		return fmt.Errorf("it is station %q with the certificate of %q", l.Station, cn)
	}
	return nil
}

func (l *Line) checkBurnt() (err error) {
	if l.id, err = identity.ParseID(l.ID); err != nil {
		return fmt.Errorf("id %q: %w", l.ID, err)
	}
	if l.Reason == "" || l.Reason != cleanReason(l.Reason) {
		return errors.New("the reason is not 1 to 200 characters of plain text")
	}
	return nil
}

func (l *Line) checkMade() (err error) {
	if l.id, err = identity.ParseID(l.ID); err != nil {
		return fmt.Errorf("id %q: %w", l.ID, err)
	}
	if _, err := ParseBlockID(l.Block); err != nil {
		return err
	}
	if l.How != ByProbe && l.How != ByCSR {
		return fmt.Errorf("%s: %q is no way to make a unit", l.ID, l.How)
	}
	if l.Class != "" {
		if err := pki.CheckClass(l.Class); err != nil {
			return fmt.Errorf("%s: class %q: %w", l.ID, l.Class, err)
		}
	}
	if len(l.CSR) == 0 || len(l.CSR) > maxCSR {
		return fmt.Errorf("%s: a certificate request of %d bytes", l.ID, len(l.CSR))
	}
	if err := l.parseCert(pki.DeviceLeaf); err != nil {
		return fmt.Errorf("%s: %w", l.ID, err)
	}
	pub, err := pki.PublicKey(l.cert)
	if err != nil {
		return fmt.Errorf("%s: certificate: %w", l.ID, err)
	}
	l.key, err = pki.KeyFingerprint(pub)
	return err
}

// parseCert reads the certificate. A unit's is held against its profile by VerifyStationLeaf.
func (l *Line) parseCert(p pki.Profile) (err error) {
	if len(l.Cert) > maxCert {
		return fmt.Errorf("a certificate of %d bytes", len(l.Cert))
	}
	if l.cert, err = x509.ParseCertificate(l.Cert); err != nil {
		return fmt.Errorf("certificate: %w", err)
	}
	if p == pki.StationCA {
		return pki.CheckCA(l.cert, p)
	}
	return nil
}

// verify checks the signature and, where whole is set, what the record claims about a unit.
func (l *Line) verify(whole bool) error {
	sig, err := hex.DecodeString(l.Sig)
	if err != nil || hex.EncodeToString(sig) != l.Sig {
		return fmt.Errorf("%w: the signature is not lower-case hex", ErrJournal)
	}
	pub, err := pki.PublicKey(l.StationCert)
	if err != nil {
		return err
	}
	if !ecdsa.VerifyASN1(pub, l.signed[:], sig) {
		return fmt.Errorf("%w: the station did not sign it", ErrJournal)
	}
	if !whole || l.What != Made {
		return nil
	}
	if err := l.verifyUnit(); err != nil {
		return fmt.Errorf("%s: %w", l.ID, err)
	}
	return nil
}

func (l *Line) verifyUnit() error {
	csr, err := pki.ParseCSR(l.CSR)
	if err != nil {
		return err
	}
	if !csr.Pub.Equal(l.cert.PublicKey) {
		return errors.New("certificate request is for another key than the one that was certified")
	}
	id, cert, err := pki.VerifyStationLeaf(l.Cert, l.StationCert)
	if err != nil {
		return err
	}
	if id != l.id {
		return fmt.Errorf("certificate is for %s", id)
	}
	l.Unit = &Unit{ID: id, Cert: cert, CSR: csr, Key: l.key}
	return nil
}

// digest is what the station signs: the line without its signature, behind a prefix that no
// other signature of the station's key has (those are over certificates).
func (r *Record) digest() ([32]byte, error) {
	bare := *r
	bare.Sig = ""
	text, err := bare.encode()
	return sha256.Sum256(append([]byte(signaturePrefix), text...)), err
}

func (r *Record) encode() ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(r); err != nil {
		return nil, fmt.Errorf("encode journal record: %w", err)
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// cleanReason leaves printable ASCII that JSON writes as it stands.
func cleanReason(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' || r == '"' || r == '\\' {
			return '?'
		}
		return r
	}, s)
	return s[:min(len(s), maxReason)]
}

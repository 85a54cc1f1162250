package device

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/fxamacker/cbor/v2"
)

// PROTOCOL.md, "Anchor set". This is the receiver's side; the sender's is in internal/pki,
// which a device does not import: it would bring along the libraries of the CA's tokens.
// Shared vectors and a fuzz target hold the two to the same verdicts.
const (
	anchorsHead   = "\xd2\x84\x43\xa1\x01\x26\xa0" // COSE_Sign1 with ES256 alone in its header
	anchorsAAD    = "hawser-anchors-v1"
	maxAnchors    = 4096
	maxDomains    = 8
	signatureSize = 64
	rootMark      = "Hawser broker root "
)

// anchorSet is what a device pins and where it connects.
type anchorSet struct {
	fleet    [16]byte
	sequence uint64
	inUse    *x509.Certificate
	standby  *x509.Certificate
	port     uint16
	domains  []string // the last of several is the rescue domain
}

// anchorMap is the payload.
type anchorMap struct {
	Fleet    []byte   `cbor:"1,keyasint"`
	Sequence uint64   `cbor:"2,keyasint"`
	InUse    []byte   `cbor:"3,keyasint"`
	Standby  []byte   `cbor:"4,keyasint"`
	Port     uint16   `cbor:"5,keyasint"`
	Domains  []string `cbor:"6,keyasint"`
}

// signedAnchors is a set apart from its signature, which is not verified yet.
type signedAnchors struct {
	payload   []byte
	signature []byte
}

// verifyAnchors accepts a set only if the pinned standby root has signed it and its number
// is higher than the stored one.
func verifyAnchors(sign1 []byte, standby *x509.Certificate, stored uint64) (*anchorSet, error) {
	msg, err := splitAnchors(sign1)
	if err != nil {
		return nil, err
	}
	if err := checkRoot(standby); err != nil {
		return nil, fmt.Errorf("pinned root: %w", err)
	}
	if !msg.signedBy(standby) {
		return nil, errors.New("anchor set is not signed by the pinned standby root")
	}
	set, err := parseAnchors(msg.payload)
	if err != nil {
		return nil, err
	}
	if set.sequence <= stored {
		return nil, fmt.Errorf("anchor set is not newer than the one held: number %d, held %d", set.sequence, stored)
	}
	return set, nil
}

// heldAnchors reads a set that was verified when it was stored.
func heldAnchors(sign1 []byte) (*anchorSet, error) {
	msg, err := splitAnchors(sign1)
	if err != nil {
		return nil, err
	}
	return parseAnchors(msg.payload)
}

// bornAnchors reads the set that a device is provisioned with. Whoever wrote it beside the
// key is trusted; the signature, by the root in standby then or before, shows damage.
func bornAnchors(sign1 []byte) (*anchorSet, error) {
	msg, err := splitAnchors(sign1)
	if err != nil {
		return nil, err
	}
	set, err := parseAnchors(msg.payload)
	if err == nil && !msg.signedBy(set.standby) && !msg.signedBy(set.inUse) {
		err = errors.New("anchor set is not signed by one of its own roots")
	}
	return set, err
}

// splitAnchors takes the COSE_Sign1 apart (RFC 9052 4.2). There is one spelling of all that
// stands before the payload.
func splitAnchors(sign1 []byte) (m signedAnchors, err error) {
	if len(sign1) > maxAnchors {
		return m, fmt.Errorf("anchor set of %d bytes is larger than %d", len(sign1), maxAnchors)
	}
	rest, ok := bytes.CutPrefix(sign1, []byte(anchorsHead))
	if !ok {
		return m, errors.New("anchor set is not a COSE_Sign1 with ES256 alone in its header")
	}
	dec, err := strictCBOR()
	if err != nil {
		return m, err
	}
	for _, part := range []*[]byte{&m.payload, &m.signature} {
		if len(rest) == 0 || rest[0]>>5 != 2 {
			return m, errors.New("anchor set without a payload or a signature")
		}
		if rest, err = dec.UnmarshalFirst(rest, part); err != nil {
			return m, fmt.Errorf("parse anchor set: %w", err)
		}
	}
	if len(rest) > 0 || len(m.signature) != signatureSize {
		return m, errors.New("anchor set ends with something other than a signature of 64 bytes")
	}
	return m, nil
}

// signedBy verifies the signature over the Sig_structure (RFC 9052 4.4).
func (m signedAnchors) signedBy(root *x509.Certificate) bool {
	pub, ok := root.PublicKey.(*ecdsa.PublicKey)
	if !ok || !isP256(root.PublicKey) {
		return false
	}
	tbs, err := cbor.Marshal([]any{"Signature1", []byte{0xa1, 0x01, 0x26}, []byte(anchorsAAD), m.payload})
	if err != nil {
		return false
	}
	hash := sha256.Sum256(tbs)
	r, s := new(big.Int).SetBytes(m.signature[:32]), new(big.Int).SetBytes(m.signature[32:])
	return ecdsa.Verify(pub, hash[:], r, s)
}

func strictCBOR() (cbor.DecMode, error) {
	return cbor.DecOptions{DupMapKey: cbor.DupMapKeyEnforcedAPF, ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden}.DecMode()
}

// parseAnchors reads the payload, which must be in its one deterministic spelling.
func parseAnchors(payload []byte) (*anchorSet, error) {
	dec, err := strictCBOR()
	if err != nil {
		return nil, err
	}
	var m anchorMap
	if err := dec.Unmarshal(payload, &m); err != nil {
		return nil, fmt.Errorf("parse anchor set: %w", err)
	}
	enc, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		return nil, err
	}
	if again, err := enc.Marshal(m); err != nil || !bytes.Equal(again, payload) {
		return nil, errors.New("anchor set is not in deterministic CBOR")
	}
	set := &anchorSet{sequence: m.Sequence, port: m.Port, domains: m.Domains}
	if len(m.Fleet) != len(set.fleet) || [16]byte(m.Fleet) == [16]byte{} {
		return nil, errors.New("anchor set names no fleet")
	}
	set.fleet = [16]byte(m.Fleet)
	if set.inUse, err = x509.ParseCertificate(m.InUse); err != nil {
		return nil, fmt.Errorf("anchor set: root in use: %w", err)
	}
	if set.standby, err = x509.ParseCertificate(m.Standby); err != nil {
		return nil, fmt.Errorf("anchor set: standby root: %w", err)
	}
	return set, set.check()
}

func (s *anchorSet) check() error {
	switch {
	case s.sequence == 0:
		return errors.New("anchor set has the sequence number 0")
	case s.port == 0:
		return errors.New("anchor set has the port 0")
	case len(s.domains) == 0 || len(s.domains) > maxDomains:
		return fmt.Errorf("anchor set has %d domains, not 1 to %d", len(s.domains), maxDomains)
	}
	for i, d := range s.domains {
		if !isDomain(d) || slices.Contains(s.domains[:i], d) {
			return fmt.Errorf("anchor set: %q is no domain, or there twice", d)
		}
	}
	for _, r := range []*x509.Certificate{s.inUse, s.standby} {
		if err := checkRoot(r); err != nil {
			return fmt.Errorf("anchor set: %w", err)
		}
	}
	a, b := s.inUse.PublicKey.(*ecdsa.PublicKey), s.standby.PublicKey.(*ecdsa.PublicKey) // checkRoot has seen to that
	if a.Equal(b) || bytes.Equal(s.inUse.RawSubject, s.standby.RawSubject) {
		return errors.New("anchor set: the root in use and the standby root share a key or a name")
	}
	return nil
}

// isDomain: labels of RFC 1123 in lower case; the last one holds a letter, so that no IPv4
// address passes.
func isDomain(d string) bool {
	if len(d) > 253 {
		return false
	}
	labels := strings.Split(d, ".")
	for _, l := range labels {
		if len(l) == 0 || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' || strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return false
		}
	}
	return strings.Trim(labels[len(labels)-1], "0123456789") != ""
}

// checkRoot: the profile of a broker root (PROTOCOL.md, "Anchor set"), and nothing beside it.
func checkRoot(c *x509.Certificate) error {
	label, marked := strings.CutPrefix(c.Subject.CommonName, rootMark)
	serial := c.SerialNumber.BitLen()
	switch {
	case c.Version != 3 || c.SignatureAlgorithm != x509.ECDSAWithSHA256 || !isP256(c.PublicKey):
		return errors.New("a root is not an X.509 v3 certificate of P-256 with SHA-256")
	case c.SerialNumber.Sign() <= 0 || serial <= 64 || serial > 128 || !c.NotAfter.After(c.NotBefore):
		return errors.New("a root has a serial number or dates that its profile does not allow")
	case !marked || len(label) != 1 || label[0] < 'A' || label[0] > 'Z' || !plainSubject(c):
		return fmt.Errorf("%q is not the name of a broker root", c.Subject)
	case !c.IsCA || c.MaxPathLen != -1 || c.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || len(c.SubjectKeyId) == 0:
		return errors.New("a root is not a CA as its profile has it")
	case !rootExtensions(c.Extensions):
		return errors.New("a root has other extensions than its profile")
	case !bytes.Equal(c.RawSubject, c.RawIssuer) || c.CheckSignatureFrom(c) != nil:
		return fmt.Errorf("%q is not signed by itself", c.Subject.CommonName)
	}
	return nil
}

// plainSubject: one CN, one O, one C, and nothing else.
func plainSubject(c *x509.Certificate) bool {
	s := c.Subject
	want := pkix.Name{CommonName: s.CommonName, Organization: s.Organization, Country: s.Country}
	raw, err := asn1.Marshal(want.ToRDNSequence())
	return err == nil && len(s.Organization) == 1 && len(s.Country) == 1 && bytes.Equal(raw, c.RawSubject)
}

// rootExtensions: critical keyUsage and basicConstraints, subjectKeyIdentifier. The parser
// refuses one that stands twice.
func rootExtensions(all []pkix.Extension) bool {
	for _, e := range all {
		id := e.Id.String()
		if e.Critical != (id == "2.5.29.15" || id == "2.5.29.19") || !e.Critical && id != "2.5.29.14" {
			return false
		}
	}
	return len(all) == 3
}

// servers are the domains with the port, in the order of trying.
func (s *anchorSet) servers() []string {
	out := make([]string, len(s.domains))
	for i, d := range s.domains {
		out[i] = net.JoinHostPort(d, strconv.Itoa(int(s.port)))
	}
	return out
}

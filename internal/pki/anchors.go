package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/fxamacker/cbor/v2"
	"github.com/veraison/go-cose"
)

const (
	anchorsAAD   = "hawser-anchors-v1" // external_aad, RFC 9052 4.4
	maxAnchors   = 4096                // bytes of a whole signed set; a device holds it in RAM to check it
	maxDomains   = 8
	coseSign1Tag = "\xd2\x84\x43\xa1\x01\x26\xa0" // tag 18, array of 4, {1: -7} (ES256), {}
)

// ErrReplayed reports an anchor set that is not newer than the one held.
var ErrReplayed = errors.New("anchor set is not newer than the one held")

// AnchorSet is what a device pins and where it connects: exactly two broker
// roots with their roles, one port, and the domains in the order of trying.
type AnchorSet struct {
	Fleet    [16]byte          // drawn once, at init
	Sequence uint64            // 1 and up; grows with every set
	InUse    *x509.Certificate // signs the leaves that are served
	Standby  *x509.Certificate // signs the next set
	Port     uint16            // TCP, not 0
	Domains  []string          // 1 to 8; the last one of several is the rescue domain
}

// anchorMap is the payload: PROTOCOL.md, "Anchor set".
type anchorMap struct {
	Fleet    []byte   `cbor:"1,keyasint"`
	Sequence uint64   `cbor:"2,keyasint"`
	InUse    []byte   `cbor:"3,keyasint"`
	Standby  []byte   `cbor:"4,keyasint"`
	Port     uint16   `cbor:"5,keyasint"`
	Domains  []string `cbor:"6,keyasint"`
}

// Check reports whether s can be an anchor set at all.
func (s *AnchorSet) Check() error {
	switch {
	case s.Fleet == [16]byte{}:
		return errors.New("anchor set names no fleet")
	case s.Sequence == 0:
		return errors.New("anchor set has the sequence number 0")
	case s.Port == 0:
		return errors.New("anchor set has the port 0")
	case s.InUse == nil || s.Standby == nil:
		return errors.New("anchor set lacks a root")
	case len(s.Domains) == 0 || len(s.Domains) > maxDomains:
		return fmt.Errorf("anchor set has %d domains, not 1 to %d", len(s.Domains), maxDomains)
	}
	for i, d := range s.Domains {
		if err := CheckDomain(d); err != nil {
			return fmt.Errorf("anchor set: %w", err)
		}
		if slices.Contains(s.Domains[:i], d) {
			return fmt.Errorf("anchor set names the domain %q twice", d)
		}
	}
	return s.checkRoots()
}

func (s *AnchorSet) checkRoots() error {
	for _, r := range []*x509.Certificate{s.InUse, s.Standby} {
		if err := CheckCA(r, BrokerRoot); err != nil {
			return fmt.Errorf("anchor set: %w", err)
		}
	}
	a, err := p256(s.InUse.PublicKey)
	if err != nil {
		return err
	}
	if a.Equal(s.Standby.PublicKey) || bytes.Equal(s.InUse.RawSubject, s.Standby.RawSubject) {
		return errors.New("anchor set: the root in use and the standby root share a key or a name")
	}
	return nil
}

// SignAnchors gives the COSE_Sign1 of s, signed by key: the key of the standby
// root that the receiving devices pin now. At most 4096 bytes.
func SignAnchors(key crypto.Signer, s *AnchorSet) ([]byte, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	if _, err := p256(key.Public()); err != nil {
		return nil, err
	}
	payload, err := s.payload()
	if err != nil {
		return nil, err
	}
	signer, err := cose.NewSigner(cose.AlgorithmES256, key)
	if err != nil {
		return nil, fmt.Errorf("sign anchor set: %w", err)
	}
	h := cose.Headers{Protected: cose.ProtectedHeader{cose.HeaderLabelAlgorithm: cose.AlgorithmES256}}
	out, err := cose.Sign1(rand.Reader, signer, h, payload, []byte(anchorsAAD))
	if err != nil {
		return nil, fmt.Errorf("sign anchor set: %w", err)
	}
	if len(out) > maxAnchors {
		return nil, fmt.Errorf("anchor set of %d bytes is larger than %d", len(out), maxAnchors)
	}
	return out, nil
}

// payload gives the deterministic CBOR (RFC 8949 4.2.1) of s.
func (s *AnchorSet) payload() ([]byte, error) {
	enc, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		return nil, fmt.Errorf("encode anchor set: %w", err)
	}
	b, err := enc.Marshal(anchorMap{s.Fleet[:], s.Sequence, s.InUse.Raw, s.Standby.Raw, s.Port, s.Domains})
	if err != nil {
		return nil, fmt.Errorf("encode anchor set: %w", err)
	}
	return b, nil
}

// VerifyAnchors accepts a set only if the pinned standby root signed it and its
// sequence number is higher than stored (0 where none is held yet: then any).
// Whether set.Fleet is the caller's fleet is implied by the root, which belongs
// to one fleet. Errors: ErrReplayed, or what is wrong.
func VerifyAnchors(sign1 []byte, pinnedStandby *x509.Certificate, stored uint64) (*AnchorSet, error) {
	if err := CheckCA(pinnedStandby, BrokerRoot); err != nil {
		return nil, fmt.Errorf("pinned root: %w", err)
	}
	m, err := openAnchors(sign1)
	if err != nil {
		return nil, err
	}
	v, err := cose.NewVerifier(cose.AlgorithmES256, pinnedStandby.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("pinned root: %w", err)
	}
	if err := m.Verify([]byte(anchorsAAD), v); err != nil {
		return nil, errors.New("anchor set is not signed by the pinned standby root")
	}
	s, err := parseAnchors(m.Payload)
	if err != nil {
		return nil, err
	}
	if s.Sequence <= stored {
		return nil, fmt.Errorf("%w: number %d, held %d", ErrReplayed, s.Sequence, stored)
	}
	return s, nil
}

// openAnchors takes the envelope apart. The signature is not checked.
func openAnchors(sign1 []byte) (*cose.Sign1Message, error) {
	if len(sign1) > maxAnchors {
		return nil, fmt.Errorf("anchor set of %d bytes is larger than %d", len(sign1), maxAnchors)
	}
	// One spelling only, so that a device can compare seven bytes instead of parsing headers.
	if !bytes.HasPrefix(sign1, []byte(coseSign1Tag)) {
		return nil, errors.New("anchor set is not a COSE_Sign1 with ES256 alone in its header")
	}
	m := new(cose.Sign1Message)
	if err := m.UnmarshalCBOR(sign1); err != nil {
		return nil, fmt.Errorf("parse anchor set: %w", err)
	}
	return m, nil
}

// InspectAnchors reads a set where no root is pinned yet: it must be signed by one of
// the two roots that it names (set 1 by its standby root, a later one by the root that
// it puts in use). Whether those are the right roots is for whoever knows them to say.
func InspectAnchors(sign1 []byte) (*AnchorSet, error) {
	m, err := openAnchors(sign1)
	if err != nil {
		return nil, err
	}
	s, err := parseAnchors(m.Payload)
	if err != nil {
		return nil, err
	}
	for _, root := range []*x509.Certificate{s.Standby, s.InUse} {
		v, err := cose.NewVerifier(cose.AlgorithmES256, root.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("anchor set: %w", err)
		}
		if m.Verify([]byte(anchorsAAD), v) == nil {
			return s, nil
		}
	}
	return nil, errors.New("anchor set is signed by neither of its roots")
}

// parseAnchors reads the payload, which must be in its one deterministic spelling.
func parseAnchors(payload []byte) (*AnchorSet, error) {
	dec, err := cbor.DecOptions{DupMapKey: cbor.DupMapKeyEnforcedAPF, ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden}.DecMode()
	if err != nil {
		return nil, fmt.Errorf("parse anchor set: %w", err)
	}
	var m anchorMap
	if err := dec.Unmarshal(payload, &m); err != nil {
		return nil, fmt.Errorf("parse anchor set: %w", err)
	}
	s := &AnchorSet{Sequence: m.Sequence, Port: m.Port, Domains: m.Domains}
	if copy(s.Fleet[:], m.Fleet) != len(s.Fleet) || len(m.Fleet) != len(s.Fleet) {
		return nil, fmt.Errorf("anchor set: fleet id of %d bytes", len(m.Fleet))
	}
	if s.InUse, err = x509.ParseCertificate(m.InUse); err != nil {
		return nil, fmt.Errorf("anchor set: root in use: %w", err)
	}
	if s.Standby, err = x509.ParseCertificate(m.Standby); err != nil {
		return nil, fmt.Errorf("anchor set: standby root: %w", err)
	}
	if err := s.Check(); err != nil {
		return nil, err
	}
	again, err := s.payload()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, payload) {
		return nil, errors.New("anchor set is not in deterministic CBOR")
	}
	return s, nil
}

// PublicKey gives the P-256 key of a certificate.
func PublicKey(c *x509.Certificate) (*ecdsa.PublicKey, error) { return p256(c.PublicKey) }

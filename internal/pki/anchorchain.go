package pki

import (
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/veraison/go-cose"
)

// VerifyAnchorChain checks the sets of one fleet, from the first a device was ever born
// with to the newest: each is signed by the standby root of the one before, and numbers
// grow by one. The first must be signed by its own standby root, as init does it; that
// it is ours is for the caller to see.
func VerifyAnchorChain(signed [][]byte) ([]*AnchorSet, error) {
	var sets []*AnchorSet
	for i, sign1 := range signed {
		var s *AnchorSet
		var err error
		if i == 0 {
			s, err = verifyFirstAnchors(sign1)
		} else {
			s, err = VerifyNextAnchors(sign1, sets[i-1])
		}
		if err != nil {
			return nil, fmt.Errorf("anchor set %d: %w", i+1, err)
		}
		sets = append(sets, s)
	}
	if len(sets) == 0 {
		return nil, errors.New("there is no anchor set")
	}
	return sets, nil
}

// VerifyNextAnchors checks the set that follows last.
func VerifyNextAnchors(sign1 []byte, last *AnchorSet) (*AnchorSet, error) {
	s, err := VerifyAnchors(sign1, last.Standby, last.Sequence)
	switch {
	case err != nil:
		return nil, err
	case s.Sequence != last.Sequence+1:
		return nil, fmt.Errorf("it has the number %d, %d comes next", s.Sequence, last.Sequence+1)
	case s.Fleet != last.Fleet:
		return nil, errors.New("it is of another fleet")
	}
	return s, nil
}

func verifyFirstAnchors(sign1 []byte) (*AnchorSet, error) {
	if len(sign1) > maxAnchors {
		return nil, fmt.Errorf("anchor set of %d bytes is larger than %d", len(sign1), maxAnchors)
	}
	var m cose.Sign1Message
	if err := m.UnmarshalCBOR(sign1); err != nil {
		return nil, fmt.Errorf("parse anchor set: %w", err)
	}
	claimed, err := parseAnchors(m.Payload)
	if err != nil {
		return nil, err
	}
	s, err := VerifyAnchors(sign1, claimed.Standby, 0)
	if err == nil && s.Sequence != 1 {
		err = fmt.Errorf("it has the number %d, 1 comes first", s.Sequence)
	}
	return s, err
}

// IssuedUnder reports whether root signed leaf.
func IssuedUnder(leaf, root *x509.Certificate) bool { return signedBy(leaf, root) }

// NextRootLabel is the letter of the root after the one labelled so: B after A.
func NextRootLabel(label string) (string, error) {
	if len(label) != 1 || label[0] < 'A' || label[0] >= 'Z' {
		return "", fmt.Errorf("no root comes after %q", label)
	}
	return string(label[0] + 1), nil
}

package check

import (
	"crypto/ecdsa"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"

	"hawser/internal/check/tls13"
	"hawser/internal/pki"
)

// chainOf shows the client a chain and the key of its leaf.
func chainOf(make func(w *World) (chain [][]byte, key *ecdsa.PrivateKey, err error)) func(*stage) error {
	return func(s *stage) error {
		chain, key, err := make(s.w)
		if err != nil {
			return fmt.Errorf("the check could not make its certificates: %w", err)
		}
		return s.pose(chain, key)
	}
}

// pose plays the broker with another chain and key, and goes on to MQTT if it is let.
func (s *stage) pose(chain [][]byte, key *ecdsa.PrivateKey) error {
	v := s.server()
	v.Chain, v.Key = chain, key
	return s.lure(v)
}

// lure plays a handshake and, where the client finishes it, waits for its CONNECT.
func (s *stage) lure(v *tls13.Server) error {
	if err := s.shake(v); err != nil {
		return err
	}
	return s.hear()
}

// leafOf is chainOf for a spoilt leaf directly under root A.
func leafOf(change func(w *World, d *draft)) func(*stage) error {
	return chainOf(func(w *World) ([][]byte, *ecdsa.PrivateKey, error) {
		leaf, err := w.leaf(w.rootA, w.brokerKey.Public(), func(d *draft) { change(w, d) })
		return [][]byte{leaf}, w.brokerKey, err
	})
}

// issuedBy is chainOf for a good leaf under a CA that is made from the world, with what
// stands between it and the root.
func issuedBy(make func(w *World) (ca *authority, between [][]byte, err error)) func(*stage) error {
	return chainOf(func(w *World) ([][]byte, *ecdsa.PrivateKey, error) {
		ca, between, err := make(w)
		if err != nil {
			return nil, nil, err
		}
		leaf, err := w.leaf(ca, w.brokerKey.Public(), nil)
		return append([][]byte{leaf}, between...), w.brokerKey, err
	})
}

// below is issuedBy for one CA directly under root A that change has spoilt.
func below(change func(d *draft)) func(*stage) error {
	return issuedBy(func(w *World) (*authority, [][]byte, error) {
		ca, err := under(w.rootA, "Check intermediate", change)
		return ca, [][]byte{ca.der}, err
	})
}

const (
	chainClause  = "RFC 5280 6.1; RFC 9846 4.5.1"
	toldToReject = "gives up, before its certificate or a byte of MQTT leaves"
)

// chainCases are certificates that nobody may trust, whoever vouches for them.
func chainCases() []Case {
	cases := []Case{
		{ID: "X1.unknown-ca", Does: "a leaf under a CA that the client does not pin", play: issuedBy(func(w *World) (*authority, [][]byte, error) {
			ca, err := newAuthority("Somebody's root")
			return ca, nil, err
		})},
		{ID: "X1.self-signed", Does: "a leaf that signs itself", play: chainOf(selfSignedLeaf)},
		{ID: "X1.other-key", Does: "the honest certificate, and a signature by another key", Clause: "RFC 9846 4.5.2",
			play: chainOf(func(w *World) ([][]byte, *ecdsa.PrivateKey, error) {
				key, err := pki.GenerateKey()
				return w.broker, key, err
			})},
		{ID: "X1.unknown-ca-sent", Does: "a leaf under an unknown CA, whose certificate is sent along", play: issuedBy(func(w *World) (*authority, [][]byte, error) {
			ca, err := newAuthority("Somebody's root")
			return ca, [][]byte{ca.der}, err
		})},
		{ID: "X2.twin", Does: "a leaf under a CA with the pinned root's name and key id, and another key", play: issuedBy(twin)},
		{ID: "X2.twin-sent", Does: "the same, with the twin's certificate sent along", play: issuedBy(func(w *World) (*authority, [][]byte, error) {
			ca, _, err := twin(w)
			return ca, [][]byte{ca.der}, err
		})},
		{ID: "X8.leaf-issuer", Does: "a leaf that the honest broker's own leaf key has signed", play: issuedBy(leafAsIssuer),
			Clause: "RFC 5280 4.2.1.9; CVE-2002-0862"},
		{ID: "X8.ca-false", Does: "a leaf under an intermediate with CA:FALSE", play: below(func(d *draft) {
			d.ext = replaced(d.ext, basicConstraints(false, -1))
		}), Clause: "RFC 5280 4.2.1.9"},
		{ID: "X8.no-constraints", Does: "a leaf under an intermediate without basicConstraints", play: below(func(d *draft) { d.ext = without(d.ext, 19) }),
			Clause: "RFC 5280 4.2.1.9"},
		{ID: "X8.no-cert-sign", Does: "a leaf under an intermediate whose key usage does not sign certificates", play: below(func(d *draft) {
			d.ext = replaced(d.ext, keyUsage(0))
		}), Clause: "RFC 5280 4.2.1.3"},
		{ID: "X9.malformed-constraints", Does: "a leaf under an intermediate whose basicConstraints do not parse", play: below(func(d *draft) {
			d.ext = replaced(d.ext, pkix.Extension{Id: oidOf(19), Critical: true, Value: []byte{0x30, 0x05, 0x01, 0x01, 0xff}})
		}), Clause: "RFC 5280 4.2.1.9"},
		{ID: "X10.path-length", Does: "a leaf two CAs below one with path length 0", play: issuedBy(pathExceeded), Clause: "RFC 5280 4.2.1.9"},
		{ID: "X10.critical-ca", Does: "a leaf under an intermediate with an unknown critical extension", play: below(addCritical), Clause: "RFC 5280 4.2"},
		{ID: "X10.critical-leaf", Does: "a leaf with an unknown critical extension", play: leafOf(func(_ *World, d *draft) { addCritical(d) }), Clause: "RFC 5280 4.2"},
		{ID: "X11.name-constraint", Does: "a leaf under an intermediate that may not certify this name", play: issuedBy(nameConstrained), Clause: "RFC 5280 4.2.1.10"},
		{ID: "X13.empty", Does: "a Certificate message without a certificate", Clause: "RFC 9846 4.5.1.4", play: chainOf(func(w *World) ([][]byte, *ecdsa.PrivateKey, error) {
			return nil, w.brokerKey, nil
		})},
		{ID: "X13.root-first", Does: "the root before the leaf", Clause: "RFC 9846 4.5.1", play: chainOf(func(w *World) ([][]byte, *ecdsa.PrivateKey, error) {
			return [][]byte{w.rootA.der, w.broker[0]}, w.brokerKey, nil
		})},
		{ID: "X13.missing-intermediate", Does: "a leaf under an intermediate that is not sent", play: issuedBy(func(w *World) (*authority, [][]byte, error) {
			ca, err := under(w.rootA, "Check intermediate", nil)
			return ca, nil, err
		})},
		{ID: "X13.huge", Does: "a chain of 64 KB", play: chainOf(hugeChain), Clause: "RFC 9846 4.5.1; CVE-2009-2409 class"},
		{ID: "X13.deep", Does: "a chain of ten CAs", play: issuedBy(deep), kind: rejectMCU},
		{ID: "X13.larger", Does: "an honest leaf that is a fifth larger", kind: accept, play: larger, Expect: "connects", Clause: "RFC 5280 4.2"},
	}
	return withDefaults(cases, toldToReject, chainClause)
}

func withDefaults(cases []Case, expect, clause string) []Case {
	for i := range cases {
		if cases[i].Expect == "" {
			cases[i].Expect = expect
		}
		if cases[i].Clause == "" {
			cases[i].Clause = clause
		}
	}
	return cases
}

func selfSignedLeaf(w *World) ([][]byte, *ecdsa.PrivateKey, error) {
	key, err := pki.GenerateKey()
	if err != nil {
		return nil, nil, err
	}
	me := &authority{name: pkix.Name{CommonName: "broker"}, ski: []byte("self"), key: key}
	leaf, err := w.leaf(me, key.Public(), nil)
	return [][]byte{leaf}, key, err
}

// twin has the pinned root's name and key id; only its key differs.
func twin(w *World) (*authority, [][]byte, error) {
	key, err := pki.GenerateKey()
	if err != nil {
		return nil, nil, err
	}
	ca := &authority{name: w.rootA.name, raw: w.rootA.raw, ski: w.rootA.ski, key: key}
	return ca, nil, ca.certify(ca, nil)
}

func leafAsIssuer(w *World) (*authority, [][]byte, error) {
	ca := &authority{name: pkix.Name{CommonName: "broker"}, ski: []byte("leaf"), key: w.brokerKey}
	key, err := pki.GenerateKey()
	if err != nil {
		return nil, nil, err
	}
	ca.key = key
	leaf, err := w.leaf(w.rootA, key.Public(), func(d *draft) { d.ext = append(d.ext, subjectKey(ca.ski)) })
	return ca, [][]byte{leaf}, err
}

func pathExceeded(w *World) (*authority, [][]byte, error) {
	first, err := under(w.rootA, "Check intermediate 1", func(d *draft) { d.ext = replaced(d.ext, basicConstraints(true, 0)) })
	if err != nil {
		return nil, nil, err
	}
	second, err := under(first, "Check intermediate 2", nil)
	return second, [][]byte{second.der, first.der}, err
}

func addCritical(d *draft) {
	d.ext = append(d.ext, pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 32473, 1}, Critical: true, Value: []byte{5, 0}})
}

// nameConstrained is a CA that may certify names below example.invalid only.
func nameConstrained(w *World) (*authority, [][]byte, error) {
	type subtree struct {
		Base asn1.RawValue
	}
	value := mustDER(struct {
		Permitted []subtree `asn1:"tag:0"`
	}{[]subtree{{asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 2, Bytes: []byte("example.invalid")}}}})
	ca, err := under(w.rootA, "Check constrained", func(d *draft) {
		d.ext = append(d.ext, pkix.Extension{Id: oidOf(30), Critical: true, Value: value})
	})
	return ca, [][]byte{ca.der}, err
}

// hugeChain is the honest leaf and what is not needed, 64 KB in all.
func hugeChain(w *World) ([][]byte, *ecdsa.PrivateKey, error) {
	other, err := newAuthority("Somebody's root")
	if err != nil {
		return nil, nil, err
	}
	leaf, err := w.leaf(other, w.brokerKey.Public(), nil)
	chain, size := [][]byte{leaf}, len(leaf)
	for size < 64<<10 {
		chain, size = append(chain, other.der), size+len(other.der)+5
	}
	return chain, w.brokerKey, err
}

func deep(w *World) (ca *authority, between [][]byte, err error) {
	ca = w.rootA
	for i := range 10 {
		if ca, err = under(ca, fmt.Sprintf("Check intermediate %d", i+1), nil); err != nil {
			return nil, nil, err
		}
		between = append([][]byte{ca.der}, between...)
	}
	return ca, between, nil
}

// larger pads the honest leaf with an extension that nobody has to know.
func larger(s *stage) error {
	leaf, err := s.w.leaf(s.w.rootA, s.w.brokerKey.Public(), func(d *draft) {
		d.ext = append(d.ext, pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 32473, 2}, Value: mustDER(make([]byte, len(s.w.broker[0])/5))})
	})
	if err != nil {
		return err
	}
	return s.pose([][]byte{leaf}, s.w.brokerKey)
}

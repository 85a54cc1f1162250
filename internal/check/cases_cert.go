package check

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"net"
	"strings"
	"time"
)

// names is a leaf under root A with other names in its SAN.
func names(dns func(domain string) []string, ips ...net.IP) func(*stage) error {
	return leafOf(func(w *World, d *draft) { d.ext = replaced(d.ext, altNames(dns(w.Domain), ips...)) })
}

func only(name string) func(string) []string { return func(string) []string { return []string{name} } }

// embedded puts the wildcard inside a label: l*t for localhost.
func embedded(domain string) string {
	first, rest, _ := strings.Cut(domain, ".")
	star := first[:1] + "*" + first[len(first)-1:]
	return strings.TrimSuffix(star+"."+rest, ".")
}

// across is a wildcard that would have to stand for the first two labels of the name.
func across(s *stage) error {
	labels := strings.Split(s.w.Domain, ".")
	if len(labels) < 4 {
		return skipf("the name %s has too few labels for it: see --domain", s.w.Domain)
	}
	return names(only("*." + strings.Join(labels[2:], ".")))(s)
}

// topmost is a wildcard for the whole of a top level domain.
func topmost(domain string) string {
	if i := strings.LastIndexByte(domain, '.'); i >= 0 {
		return "*" + domain[i:]
	}
	return "*"
}

const nameClause = "RFC 9525 6.3; RFC 6125 6.4"

// certificateCases are leaves under the pinned root that are not the broker's.
func certificateCases() []Case {
	cases := []Case{
		{ID: "X3.other-host", Does: "a leaf under the pinned root for another name", play: names(only("elsewhere.invalid"))},
		{ID: "X3.longer-host", Does: "a leaf for the name with a label after it", play: names(func(d string) []string { return []string{d + ".invalid"} })},
		{ID: "X3.suffix", Does: "a leaf for a name that ends like the right one", play: names(func(d string) []string { return []string{"x" + d} })},
		{ID: "X3.nul", Does: "a leaf for the name, a NUL and more", play: names(func(d string) []string { return []string{d + "\x00.invalid"} }), Clause: "CVE-2009-2408"},
		{ID: "X3.very-large-san", Does: "a leaf with 300 other names", play: names(manyNames)},
		{ID: "X4.common-name", Does: "the name in the CN, and no SAN", play: leafOf(func(w *World, d *draft) {
			d.ext, d.subject = without(d.ext, 17), pkix.Name{CommonName: w.Domain}
		}), Expect: toldToReject + " (mbedTLS takes the CN where there is no SAN, unless its user prevents it)", Clause: "RFC 9525 2; RFC 6125 6.4.4"},
		{ID: "X4.common-name-beside", Does: "the name in the CN, another in the SAN", play: leafOf(func(w *World, d *draft) {
			d.ext, d.subject = replaced(d.ext, altNames([]string{"elsewhere.invalid"})), pkix.Name{CommonName: w.Domain}
		})},
		{ID: "X5.wrong-ip", Does: "a leaf for an IP address that is not the broker's", play: names(func(string) []string { return nil }, net.IP{192, 0, 2, 1})},
		{ID: "X5.ip-as-name", Does: "a leaf with the address as a DNS name", play: names(only("127.0.0.1"))},
		{ID: "X5.wildcard-across", Does: "a wildcard that would have to stand for two labels", play: across},
		{ID: "X5.wildcard-none", Does: "a wildcard that would have to stand for no label", play: names(func(d string) []string { return []string{"*." + d} })},
		{ID: "X5.wildcard-embedded", Does: "a wildcard within a label", play: names(func(d string) []string { return []string{embedded(d)} })},
		{ID: "X5.wildcard-top", Does: "a wildcard for a whole top level domain", play: names(func(d string) []string { return []string{topmost(d)} })},
		{ID: "X6.expired", Does: "a leaf that ended yesterday", kind: rejectDated, Clause: "RFC 5280 4.1.2.5", play: leafOf(func(_ *World, d *draft) {
			d.from, d.to = time.Now().AddDate(-1, 0, 0), time.Now().AddDate(0, 0, -1)
		})},
		{ID: "X6.not-yet", Does: "a leaf that begins in a year", kind: rejectDated, Clause: "RFC 5280 4.1.2.5", play: leafOf(func(_ *World, d *draft) {
			d.from, d.to = time.Now().AddDate(1, 0, 0), time.Now().AddDate(2, 0, 0)
		})},
		{ID: "X7.client-auth", Does: "a device's own kind of certificate (clientAuth) as the broker's", play: usage(clientAuth), Clause: "RFC 5280 4.2.1.12"},
		{ID: "X7.code-signing", Does: "a code signing certificate as the broker's", play: usage(codeSigning), Clause: "RFC 5280 4.2.1.12"},
		{ID: "X7.empty-usage", Does: "a leaf whose extended key usage is empty", play: usage(), Clause: "RFC 5280 4.2.1.12"},
		{ID: "X7.no-signature", Does: "a leaf whose key usage allows no signatures", Clause: "RFC 5280 4.2.1.3; RFC 9846 4.5.1.2", play: leafOf(func(_ *World, d *draft) {
			d.ext = replaced(d.ext, keyUsage(4))
		})},
		{ID: "X12.rsa", Does: "an RSA leaf under the pinned root", kind: rejectMCU, play: rsaLeaf, Clause: "RFC 9846 4.3.3"},
		{ID: "X12.p384", Does: "a P-384 leaf under the pinned root", kind: rejectMCU, Clause: "RFC 9846 4.3.3", play: chainOf(func(w *World) ([][]byte, *ecdsa.PrivateKey, error) {
			key, err := p384()
			if err != nil {
				return nil, nil, err
			}
			leaf, err := w.leaf(w.rootA, key.Public(), nil)
			return [][]byte{leaf}, key, err
		})},
		{ID: "X12.p384-ca", Does: "a leaf under a P-384 intermediate", kind: rejectMCU, play: issuedBy(p384CA), Clause: "RFC 9846 4.3.3"},
		{ID: "X12.sha1", Does: "a leaf that is signed with SHA-1", Clause: "RFC 9846 4.5.1.4; RFC 9155", play: leafOf(func(_ *World, d *draft) {
			d.algorithm, d.hash = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 1}, crypto.SHA1
		})},
		{ID: "X12.explicit-curve", Does: "a key with explicit curve parameters", play: keyed(explicitCurve), Clause: "RFC 5480 2.1.1; CVE-2020-0601"},
		{ID: "X12.zero-point", Does: "a key with a point of length zero", play: keyed(func(*ecdsa.PrivateKey) []byte { return ecKey(namedP256(), nil) }), Clause: "RFC 5480 2.2"},
		{ID: "X12.infinity", Does: "a key that is the point at infinity", play: keyed(func(*ecdsa.PrivateKey) []byte { return ecKey(namedP256(), []byte{0}) }), Clause: "SEC 1 3.2.2"},
		{ID: "X12.off-curve", Does: "a key that is no point of the curve", play: keyed(func(k *ecdsa.PrivateKey) []byte {
			return ecKey(namedP256(), offCurve(k))
		}), Clause: "SEC 1 3.2.2; CVE-2018-5383 class"},
	}
	return withDefaults(cases, toldToReject, nameClause)
}

func manyNames(string) (list []string) {
	for i := range 300 {
		list = append(list, fmt.Sprintf("host-%d.invalid", i))
	}
	return list
}

func usage(list ...int) func(*stage) error {
	return leafOf(func(_ *World, d *draft) { d.ext = replaced(d.ext, extUsage(list...)) })
}

func rsaLeaf(s *stage) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	s.until(s.limit) // what the key took is not the client's time
	leaf, err := s.w.leaf(s.w.rootA, key.Public(), nil)
	if err != nil {
		return err
	}
	v := s.server()
	v.Chain, v.Key = [][]byte{leaf}, key
	return s.lure(v)
}

func p384CA(w *World) (*authority, [][]byte, error) {
	key, err := p384()
	if err != nil {
		return nil, nil, err
	}
	ca := &authority{name: pkix.Name{CommonName: "Check P-384"}, key: key}
	err = ca.certify(w.rootA, nil)
	return ca, [][]byte{ca.der}, err
}

// keyed is a leaf under root A with a public key in a form of its own.
func keyed(spki func(key *ecdsa.PrivateKey) []byte) func(*stage) error {
	return func(s *stage) error {
		leaf, err := s.w.leaf(s.w.rootA, s.w.brokerKey.Public(), func(d *draft) { d.spki = spki(s.w.brokerKey) })
		if err != nil {
			return err
		}
		v := s.server()
		v.Chain = [][]byte{leaf}
		return s.lure(v)
	}
}

func ecKey(params asn1.RawValue, point []byte) []byte {
	return mustDER(struct {
		Algorithm pkix.AlgorithmIdentifier
		Point     asn1.BitString
	}{pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}, Parameters: params}, asn1.BitString{Bytes: point, BitLength: 8 * len(point)}})
}

func namedP256() asn1.RawValue {
	return asn1.RawValue{FullBytes: mustDER(asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7})}
}

func pointOf(k *ecdsa.PrivateKey) []byte {
	b, err := k.PublicKey.Bytes()
	if err != nil {
		panic("check: " + err.Error()) // a key that was made here
	}
	return b
}

func offCurve(k *ecdsa.PrivateKey) []byte {
	p := pointOf(k)
	p[len(p)-1] ^= 1
	return p
}

// explicitCurve describes P-256 by its numbers, with the key itself as the generator:
// what CVE-2020-0601 made of it.
func explicitCurve(k *ecdsa.PrivateKey) []byte {
	c := k.Curve.Params()
	fixed := func(n *big.Int) []byte { return n.FillBytes(make([]byte, 32)) }
	a := new(big.Int).Sub(c.P, big.NewInt(3))
	params := mustDER(struct {
		Version int
		Field   struct {
			Type asn1.ObjectIdentifier
			P    *big.Int
		}
		Curve     struct{ A, B []byte }
		Generator []byte
		Order     *big.Int
		Cofactor  int
	}{Version: 1, Field: struct {
		Type asn1.ObjectIdentifier
		P    *big.Int
	}{asn1.ObjectIdentifier{1, 2, 840, 10045, 1, 1}, c.P}, Curve: struct{ A, B []byte }{fixed(a), fixed(c.B)}, Generator: pointOf(k), Order: c.N, Cofactor: 1})
	return ecKey(asn1.RawValue{FullBytes: params}, pointOf(k))
}

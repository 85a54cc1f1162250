package check

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net"
	"strings"
	"time"
)

// shown is a certificate as the client under test reads it: no more is parsed than what
// it judges, and a malformed part is judged only where it is used.
type shown struct {
	raw, tbs        []byte
	issuer, subject []byte
	cn              string
	from, to        time.Time
	spki            []byte
	algorithm       asn1.ObjectIdentifier
	signature       []byte
	ext             []pkix.Extension
}

func parseShown(der []byte) (*shown, error) {
	var c struct {
		TBS struct {
			Raw       asn1.RawContent
			Version   int `asn1:"explicit,tag:0"`
			Serial    asn1.RawValue
			Algorithm pkix.AlgorithmIdentifier
			Issuer    asn1.RawValue
			Validity  struct{ From, To time.Time }
			Subject   asn1.RawValue
			Key       asn1.RawValue
			Ext       []pkix.Extension `asn1:"optional,explicit,tag:3"`
		}
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}
	if rest, err := asn1.Unmarshal(der, &c); err != nil || len(rest) > 0 {
		return nil, errParse
	}
	s := &shown{raw: der, tbs: c.TBS.Raw, issuer: c.TBS.Issuer.FullBytes, subject: c.TBS.Subject.FullBytes, from: c.TBS.Validity.From,
		to: c.TBS.Validity.To, spki: c.TBS.Key.FullBytes, algorithm: c.Algorithm.Algorithm, signature: c.Signature.Bytes, ext: c.TBS.Ext}
	var names pkix.RDNSequence
	if _, err := asn1.Unmarshal(s.subject, &names); err == nil {
		var n pkix.Name
		n.FillFromRDNSequence(&names)
		s.cn = n.CommonName
	}
	return s, nil
}

// extension gives the value of one of id-ce.
func (s *shown) extension(n int) ([]byte, bool) {
	for _, e := range s.ext {
		if e.Id.Equal(oidOf(n)) {
			return e.Value, true
		}
	}
	return nil, false
}

// key is the P-256 key of a certificate.
func (t *wire) publicKey(s *shown) (*ecdsa.PublicKey, error) {
	var k struct {
		Algorithm pkix.AlgorithmIdentifier
		Point     asn1.BitString
	}
	if _, err := asn1.Unmarshal(s.spki, &k); err != nil {
		return nil, errParse
	}
	var curve asn1.ObjectIdentifier
	_, err := asn1.Unmarshal(k.Algorithm.Parameters.FullBytes, &curve)
	if (err != nil || !curve.Equal(asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7})) && !t.flaws["any-parameters"] {
		return nil, refuse("another curve")
	}
	return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), k.Point.Bytes)
}

// signed reports whether the key has made the certificate's signature.
func (t *wire) signed(s *shown, key *ecdsa.PublicKey) bool {
	switch {
	case s.algorithm.Equal(oidECDSA(2)):
		sum := sha256.Sum256(s.tbs)
		return ecdsa.VerifyASN1(key, sum[:], s.signature)
	case s.algorithm.Equal(asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 1}) && t.flaws["sha1"]:
		sum := sha1.Sum(s.tbs)
		return ecdsa.VerifyASN1(key, sum[:], s.signature)
	}
	return false
}

// trust judges a chain and gives the key of its leaf.
func (t *wire) trust(ders [][]byte) (*ecdsa.PublicKey, error) {
	if len(ders) == 0 && t.flaws["empty-chain"] {
		return nil, nil
	}
	if len(ders) == 0 {
		return nil, refuse("no certificate")
	}
	if len(ders) > 32 && t.flaws["long-chain"] {
		ders = ders[:1]
	} else if err := t.chain(ders); err != nil && !t.flaws["no-trust"] {
		return nil, err
	}
	leaf, err := parseShown(t.first(ders))
	if err != nil {
		return nil, err
	}
	key, err := t.publicKey(leaf)
	if err != nil && t.flaws["bad-key"] {
		return nil, nil
	}
	return key, err
}

// first is the leaf; sorting the list is a flaw.
func (t *wire) first(ders [][]byte) []byte {
	for _, der := range ders {
		if c, err := parseShown(der); t.flaws["sorts"] && err == nil {
			if _, ok := c.extension(17); ok {
				return der
			}
		}
	}
	return ders[0]
}

// chain walks from the leaf to a pinned root.
func (t *wire) chain(ders [][]byte) error {
	ders = append([][]byte{t.first(ders)}, ders[1:]...)
	cur, err := parseShown(ders[0])
	if err != nil {
		return err
	}
	if err := t.leaf(cur); err != nil {
		return err
	}
	for depth := 0; ; depth++ {
		if t.anchored(cur) || t.flaws["self-signed"] && bytes.Equal(cur.issuer, cur.subject) {
			return nil
		}
		if depth+1 >= len(ders) {
			if t.flaws["partial-chain"] {
				return nil
			}
			return refuse("no pinned root")
		}
		next, err := parseShown(ders[depth+1])
		if err != nil {
			return err
		}
		if err := t.issued(cur, next, depth); err != nil {
			return err
		}
		if cur = next; depth > 3 && !t.flaws["any-depth"] {
			return refuse("the chain is too long")
		}
		if t.flaws["sent-root"] && bytes.Equal(cur.issuer, cur.subject) {
			return nil
		}
	}
}

// anchored reports whether a pinned root has signed c, or is it.
func (t *wire) anchored(c *shown) bool {
	roots := []*authority{t.w.rootA, t.w.rootB}
	if t.flaws["root-a-only"] {
		roots = roots[:1]
	}
	if t.flaws["root-b-only"] {
		roots = roots[1:]
	}
	for _, r := range roots {
		root, err := parseShown(r.der)
		must(err)
		if !bytes.Equal(c.issuer, root.subject) {
			continue
		}
		if t.signed(c, &r.key.PublicKey) || t.flaws["pins-by-name"] {
			return true
		}
	}
	return false
}

// issued judges a CA on the way. depth is how many CAs are below it.
func (t *wire) issued(c, ca *shown, depth int) error {
	key, err := t.publicKey(ca)
	if err != nil {
		return err
	}
	if !bytes.Equal(c.issuer, ca.subject) || !t.signed(c, key) {
		return refuse("signed by somebody else")
	}
	if err := t.constrained(ca, depth); err != nil {
		return err
	}
	if !t.usage(ca, 5) && !t.flaws["no-cert-sign"] && !t.flaws["any-issuer"] {
		return refuse("an issuer that does not sign certificates")
	}
	if err := t.critical(ca, "no-critical-ca"); err != nil {
		return err
	}
	return t.dates(ca)
}

func (t *wire) constrained(ca *shown, depth int) error {
	if t.flaws["any-issuer"] {
		return nil
	}
	value, ok := ca.extension(19)
	if !ok {
		if t.flaws["no-constraints"] {
			return nil
		}
		return refuse("no basicConstraints")
	}
	bc := constraints{PathLen: -1}
	if rest, err := asn1.Unmarshal(value, &bc); err != nil || len(rest) > 0 {
		if t.flaws["lax-constraints"] {
			return nil
		}
		return errParse
	}
	switch {
	case !bc.CA && !t.flaws["ca-false"]:
		return refuse("no CA")
	case bc.PathLen >= 0 && depth > bc.PathLen && !t.flaws["no-path-length"]:
		return refuse("path length")
	}
	return nil
}

// usage reports whether the key usage has bit n; where there is none it has.
func (t *wire) usage(c *shown, n int) bool {
	value, ok := c.extension(15)
	if !ok {
		return true
	}
	var bits asn1.BitString
	_, err := asn1.Unmarshal(value, &bits)
	return err == nil && bits.At(n) == 1
}

// critical refuses what is critical and not known here, unless there is that flaw.
func (t *wire) critical(c *shown, flaw string) error {
	for _, e := range c.ext {
		switch {
		case !e.Critical, e.Id.Equal(oidOf(15)), e.Id.Equal(oidOf(17)), e.Id.Equal(oidOf(19)), e.Id.Equal(oidOf(37)):
		case e.Id.Equal(oidOf(30)) && t.flaws["no-name-constraints"]:
		case !e.Id.Equal(oidOf(30)) && t.flaws[flaw]:
		default:
			return refuse("a critical extension %v", e.Id)
		}
	}
	return nil
}

func (t *wire) dates(c *shown) error {
	now := time.Now()
	switch {
	case now.After(c.to) && !t.flaws["no-end"]:
		return refuse("expired")
	case now.Before(c.from) && !t.flaws["no-begin"]:
		return refuse("not yet valid")
	}
	return nil
}

// leaf judges what only the broker's own certificate has.
func (t *wire) leaf(c *shown) error {
	if err := t.critical(c, "no-critical-leaf"); err != nil {
		return err
	}
	if err := t.dates(c); err != nil {
		return err
	}
	if !t.usage(c, 0) && !t.flaws["no-key-usage"] {
		return refuse("no digitalSignature")
	}
	if err := t.purpose(c); err != nil {
		return err
	}
	if !t.named(c) && !t.flaws["no-name"] {
		return refuse("another name")
	}
	return nil
}

func (t *wire) purpose(c *shown) error {
	value, ok := c.extension(37)
	var list []asn1.ObjectIdentifier
	if ok {
		if _, err := asn1.Unmarshal(value, &list); err != nil {
			return errParse
		}
	}
	if t.flaws["no-purpose"] || len(list) == 0 && t.flaws["empty-purpose"] {
		return nil
	}
	for _, oid := range list {
		if oid.Equal(asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, serverAuth}) {
			return nil
		}
	}
	return refuse("not for servers")
}

// named reports whether the certificate is for the broker.
func (t *wire) named(c *shown) bool {
	value, ok := c.extension(17)
	var list []asn1.RawValue
	if ok {
		if _, err := asn1.Unmarshal(value, &list); err != nil {
			return false
		}
	}
	want := t.w.Domain
	if (t.flaws["cn-fallback"] && !ok || t.flaws["cn-always"]) && strings.EqualFold(c.cn, want) {
		return true
	}
	if len(list) > 64 && t.flaws["long-san"] {
		return true
	}
	for _, n := range list {
		if n.Tag == 7 && t.flaws["any-address"] {
			return true
		}
		if n.Tag == 2 && t.same(string(n.Bytes), want) {
			return true
		}
	}
	return false
}

// same compares a name of the certificate with the wanted one, as the flaws have it.
func (t *wire) same(have, want string) bool {
	cut, _, _ := strings.Cut(have, "\x00")
	host, _, _ := net.SplitHostPort(t.raw.RemoteAddr().String())
	star, _, _ := strings.Cut(have, "*")
	_, tail, wild := strings.Cut(have, "*")
	between, fits := strings.CutPrefix(want, star)
	if fits {
		between, fits = strings.CutSuffix(between, tail)
	}
	inLabel := !strings.Contains(between, ".")
	switch {
	case strings.EqualFold(have, want),
		t.flaws["c-string"] && strings.EqualFold(cut, want),
		t.flaws["prefix"] && len(have) > len(want) && strings.HasPrefix(have, want) && have[len(want)] != 0,
		t.flaws["suffix"] && strings.HasSuffix(have, want),
		t.flaws["address-is-name"] && have == host,
		t.flaws["star-in-label"] && wild && fits && inLabel,
		t.flaws["star-crosses"] && wild && fits && star == "" && strings.Count(tail, ".") > 1,
		t.flaws["star-is-nothing"] && have == "*."+want,
		t.flaws["star-on-top"] && wild && fits && star == "" && strings.Count(tail, ".") == 1:
		return true
	}
	return false
}

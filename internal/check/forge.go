package check

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"net"
	"time"
)

// draft is a certificate before it is signed. Unlike those of crypto/x509 it can say
// anything: no field is looked at.
type draft struct {
	serial    *big.Int
	issuer    pkix.Name
	subject   pkix.Name
	copied    struct{ issuer, subject []byte } // DER in their place; nil: none
	from, to  time.Time
	spki      []byte // SubjectPublicKeyInfo, DER
	ext       []pkix.Extension
	algorithm asn1.ObjectIdentifier // of the signature
	hash      crypto.Hash
}

// tbs is TBSCertificate (RFC 5280 4.1).
type tbs struct {
	Version   int `asn1:"explicit,tag:0"`
	Serial    *big.Int
	Algorithm pkix.AlgorithmIdentifier
	Issuer    asn1.RawValue
	Validity  struct{ From, To time.Time }
	Subject   asn1.RawValue
	Key       asn1.RawValue
	Ext       []pkix.Extension `asn1:"omitempty,explicit,tag:3"`
}

func oidECDSA(hash int) asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, hash}
}

func oidOf(n ...int) asn1.ObjectIdentifier { return append(asn1.ObjectIdentifier{2, 5, 29}, n...) }

// sign makes the certificate.
func (d *draft) sign(key crypto.Signer) ([]byte, error) {
	alg := pkix.AlgorithmIdentifier{Algorithm: d.algorithm}
	t := tbs{Version: 2, Serial: d.serial, Algorithm: alg, Key: asn1.RawValue{FullBytes: d.spki}, Ext: d.ext}
	t.Validity.From, t.Validity.To = d.from.UTC().Truncate(time.Second), d.to.UTC().Truncate(time.Second)
	for _, n := range []struct {
		to   *asn1.RawValue
		name pkix.Name
		der  []byte
	}{{&t.Issuer, d.issuer, d.copied.issuer}, {&t.Subject, d.subject, d.copied.subject}} {
		var err error
		if n.to.FullBytes = n.der; n.der != nil {
			continue
		}
		if n.to.FullBytes, err = asn1.Marshal(n.name.ToRDNSequence()); err != nil {
			return nil, err
		}
	}
	body, err := asn1.Marshal(t)
	if err != nil {
		return nil, fmt.Errorf("forge a certificate: %w", err)
	}
	sum, opts := d.digest(body)
	sig, err := key.Sign(rand.Reader, sum, opts)
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(struct {
		TBS asn1.RawValue
		Alg pkix.AlgorithmIdentifier
		Sig asn1.BitString
	}{asn1.RawValue{FullBytes: body}, alg, asn1.BitString{Bytes: sig, BitLength: 8 * len(sig)}})
}

func (d *draft) digest(body []byte) ([]byte, crypto.SignerOpts) {
	if d.hash == crypto.SHA1 { // what a correct client refuses
		s := sha1.Sum(body)
		return s[:], crypto.SHA1
	}
	h := d.hash.New()
	h.Write(body)
	return h.Sum(nil), d.hash
}

// authority is a CA or what poses as one.
type authority struct {
	der  []byte
	name pkix.Name
	raw  []byte // its name, copied from a certificate byte by byte; nil: name
	ski  []byte
	key  *ecdsa.PrivateKey
}

func newSerial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b)
	b[0] |= 0x40
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b)
}

// mustDER is for structures that are built here and always encode.
func mustDER(v any) []byte {
	der, err := asn1.Marshal(v)
	if err != nil {
		panic("check: " + err.Error())
	}
	return der
}

func keyUsage(bits ...int) pkix.Extension {
	var b byte
	for _, n := range bits {
		b |= 0x80 >> n
	}
	return pkix.Extension{Id: oidOf(15), Critical: true, Value: mustDER(asn1.BitString{Bytes: []byte{b}, BitLength: 8})}
}

type constraints struct {
	CA      bool `asn1:"optional"`
	PathLen int  `asn1:"optional,default:-1"`
}

func basicConstraints(ca bool, pathLen int) pkix.Extension {
	return pkix.Extension{Id: oidOf(19), Critical: true, Value: mustDER(constraints{ca, pathLen})}
}

// Extended key usages (RFC 5280 4.2.1.12), the last arc of 1.3.6.1.5.5.7.3.
const (
	serverAuth  = 1
	clientAuth  = 2
	codeSigning = 3
)

func extUsage(list ...int) pkix.Extension {
	oids := []asn1.ObjectIdentifier{}
	for _, n := range list {
		oids = append(oids, asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, n})
	}
	return pkix.Extension{Id: oidOf(37), Value: mustDER(oids)}
}

func subjectKey(ski []byte) pkix.Extension { return pkix.Extension{Id: oidOf(14), Value: mustDER(ski)} }

func authorityKey(ski []byte) pkix.Extension {
	return pkix.Extension{Id: oidOf(35), Value: mustDER(struct {
		ID []byte `asn1:"tag:0"`
	}{ski})}
}

func altNames(dns []string, ips ...net.IP) pkix.Extension {
	var list []asn1.RawValue
	for _, n := range dns {
		list = append(list, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 2, Bytes: []byte(n)})
	}
	for _, ip := range ips {
		list = append(list, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 7, Bytes: ip})
	}
	return pkix.Extension{Id: oidOf(17), Value: mustDER(list)}
}

// without gives the extensions but that with the last arc n.
func without(list []pkix.Extension, n int) (out []pkix.Extension) {
	for _, e := range list {
		if !e.Id.Equal(oidOf(n)) {
			out = append(out, e)
		}
	}
	return out
}

// replaced gives the extensions with e in place of that of the same kind.
func replaced(list []pkix.Extension, e pkix.Extension) []pkix.Extension {
	out := append([]pkix.Extension(nil), list...)
	for i := range out {
		if out[i].Id.Equal(e.Id) {
			out[i] = e
			return out
		}
	}
	return append(out, e)
}

func spkiOf(pub any) ([]byte, error) { return x509.MarshalPKIXPublicKey(pub) }

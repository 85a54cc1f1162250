package check

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"io"
	"math/big"
	"net"
	"slices"
	"strings"
	"time"

	"hawser/internal/check/tls13"
)

// The faults of admission.
const (
	noCertificate   fault = "lets in who shows no certificate"
	anyCA           fault = "does not look at the chain"
	issuerByName    fault = "compares the issuer's name alone"
	trustsSelf      fault = "trusts what is signed by itself"
	skipsP384       fault = "lets pass what has a P-384 key"
	skipsRSA        fault = "lets pass what has an RSA key"
	noDates         fault = "ignores dates"
	noUsage         fault = "ignores the extended key usage"
	noRevocation    fault = "forgets revocations when it starts again"
	takesTLS12      fault = "takes TLS 1.2"
	takesTLS11      fault = "takes TLS 1.1"
	takesTLS10      fault = "takes TLS 1.0"
	takesAES256     fault = "takes TLS_AES_256_GCM_SHA384"
	takesAnySuite   fault = "chooses whatever suite it is offered"
	takesAnyVersion fault = "does not look at the version"
	noVerify        fault = "ignores CertificateVerify"
	zeroSignature   fault = "takes a signature of zeros (CVE-2022-21449)"
	anyRole         fault = "takes a CertificateVerify of the server's role"
	anyTranscript   fault = "takes a CertificateVerify over nothing"
	unsigned        fault = "goes on without CertificateVerify"
	anyFinished     fault = "ignores Finished"
	neverFinished   fault = "does not wait for Finished"
	endless         fault = "gathers handshake messages of any length"
	neverRefuses    fault = "neither lets in nor refuses"
	oneHandshake    fault = "has one place for handshakes"
	silentPlaces    fault = "has a hundred places for clients that say nothing, for ever"
	halfPlaces      fault = "has a hundred places for handshakes that do not end, for ever"
	diesOfUpdates   fault = "dies of 1,000 KeyUpdates"
	diesOfEmpty     fault = "dies of 1,000 empty records"
	diesOfCCS       fault = "dies of 1,000 change_cipher_spec records"
	diesOfSmall     fault = "dies of 1,000 records of one byte"
	diesOfNoise     fault = "dies of noise"
	waitsOnNoise    fault = "waits for ever after noise"
)

// own are the faults that crypto/tls cannot be talked into.
func (b *broker) own() bool {
	return b.has(takesAnySuite, takesAnyVersion, noVerify, zeroSignature, anyRole, anyTranscript, unsigned, anyFinished, neverFinished, endless, neverRefuses,
		diesOfUpdates, diesOfEmpty, diesOfCCS, diesOfSmall)
}

var errStranger = errors.New("a stranger")

// admitted makes the handshake, and says who came.
func (b *broker) admitted(raw net.Conn) (io.ReadWriter, string, error) {
	if b.has(oneHandshake) {
		b.admitting.Lock()
		defer b.admitting.Unlock()
	}
	if !b.has(oneHandshake, silentPlaces, halfPlaces, endless, waitsOnNoise, neverRefuses) {
		raw.SetDeadline(time.Now().Add(5 * time.Second))
		defer raw.SetDeadline(time.Time{})
	}
	if b.own() {
		return b.handshake(raw)
	}
	c := tls.Server(raw, b.config())
	if err := c.Handshake(); err != nil {
		return nil, "", b.refused(raw, err)
	}
	if b.has(halfPlaces) {
		b.place(false)
	}
	s := c.ConnectionState()
	if s.Version == tls.VersionTLS13 && s.CipherSuite == tls.TLS_AES_256_GCM_SHA384 && !b.has(takesAES256) {
		return nil, "", errStranger
	}
	if len(s.PeerCertificates) == 0 {
		return c, nameDevice, nil // whoever the client id says
	}
	return c, s.PeerCertificates[0].Subject.CommonName, nil
}

// place takes one of the few places, if there is one, or gives one back.
func (b *broker) place(take bool) bool {
	from, to := b.places, (chan struct{})(nil)
	if take {
		from, to = nil, b.places
	}
	select {
	case to <- struct{}{}:
	case <-from:
	default:
		return false
	}
	return true
}

// refused is what becomes of a handshake that failed.
func (b *broker) refused(raw net.Conn, err error) error {
	if !errors.As(err, new(tls.RecordHeaderError)) {
		return err
	}
	if b.has(diesOfNoise) {
		b.die()
	}
	if b.has(waitsOnNoise) {
		io.Copy(io.Discard, raw)
	}
	return err
}

func (b *broker) config() *tls.Config {
	chain, key := b.serverKey()
	c := &tls.Config{Certificates: []tls.Certificate{{Certificate: chain, PrivateKey: key}}, MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAnyClientCert,
		NextProtos: []string{"mqtt"}, SessionTicketsDisabled: true}
	c.VerifyConnection = func(s tls.ConnectionState) error { return b.admit(s.PeerCertificates) }
	c.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		if b.has(silentPlaces) {
			b.place(false)
		}
		if newest := slices.Max(append(h.SupportedVersions, 0)); b.has(halfPlaces) && !b.place(true) || newest < tls.VersionTLS13 && newest != c.MinVersion {
			return nil, errStranger
		}
		if slices.Contains(h.SupportedVersions, tls.VersionTLS13) && !slices.Contains(h.CipherSuites, tls13.AES128) && !b.has(takesAES256) {
			return nil, errStranger
		}
		return nil, nil
	}
	switch b.fault {
	case noCertificate:
		c.ClientAuth = tls.RequestClientCert
	case takesTLS12:
		c.MinVersion = tls.VersionTLS12
	case takesTLS11:
		c.MinVersion = tls.VersionTLS11
	case takesTLS10:
		c.MinVersion = tls.VersionTLS10
	}
	return c
}

// admit judges a chain.
func (b *broker) admit(chain []*x509.Certificate) error {
	if len(chain) == 0 {
		if b.has(noCertificate) {
			return nil
		}
		return errStranger
	}
	b.mu.Lock()
	revoked := b.revoked[chain[0].Subject.CommonName]
	b.mu.Unlock()
	if _, known := b.realm.people[chain[0].Subject.CommonName]; !known || revoked && !b.has(b.readmission(chain[0].Subject.CommonName)) {
		return errStranger
	}
	if b.waves(chain[0]) {
		return nil
	}
	ca, err := x509.ParseCertificate(b.realm.world.clientCA.der)
	if err != nil {
		return err
	}
	o := x509.VerifyOptions{Roots: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	o.Roots.AddCert(ca)
	if b.has(noDates) {
		o.CurrentTime = chain[0].NotBefore.Add(time.Second)
	}
	if b.has(noUsage) {
		o.KeyUsages = []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
	}
	_, err = chain[0].Verify(o)
	return err
}

// readmission is the fault with which somebody comes in although he was revoked: before
// the broker's start, or while it ran.
func (b *broker) readmission(name string) fault {
	if name == nameRevoked {
		return noRevocation
	}
	return readmits
}

// waves reports whether the broker lets a certificate pass without a look at its signature.
func (b *broker) waves(c *x509.Certificate) bool {
	switch b.fault {
	case anyCA:
		return true
	case issuerByName:
		return c.Issuer.CommonName == b.realm.world.clientCA.name.CommonName
	case trustsSelf:
		return c.Issuer.CommonName == c.Subject.CommonName
	case skipsP384:
		k, ok := c.PublicKey.(*ecdsa.PublicKey)
		return ok && k.Curve == elliptic.P384()
	case skipsRSA:
		_, ok := c.PublicKey.(*rsa.PublicKey)
		return ok
	}
	return false
}

// handshake is that of a broker with TLS of its own.
func (b *broker) handshake(raw net.Conn) (io.ReadWriter, string, error) {
	chain, key := b.serverKey()
	s := &tls13.Server{Chain: chain, Key: key, Suite: tls13.AES128, Ask: true, Lax: b.lax()}
	c := &tls13.Conn{Raw: &tally{Conn: raw, b: b}}
	h, err := c.ReadHello()
	if err != nil {
		return nil, "", err
	}
	if !slices.Contains(h.Versions, tls13.VersionTLS13) && !b.has(takesAnyVersion) {
		return nil, "", errStranger
	}
	if !slices.Contains(h.Suites, tls13.AES128) {
		if !b.has(takesAnySuite) {
			return nil, "", errStranger
		}
		s.Hello = func(out *tls13.Hellos) { out.Suite = h.Suites[0] }
	}
	p, err := s.From(c, h)
	if err != nil {
		if b.has(endless) && strings.Contains(err.Error(), "a handshake message of") {
			io.Copy(io.Discard, raw)
		}
		return nil, "", err
	}
	if err := b.admit(p.Chain); err != nil {
		return nil, "", err
	}
	return c, p.Chain[0].Subject.CommonName, nil
}

// lax is what the broker does not judge, nil if that is nothing.
func (b *broker) lax() *tls13.Lax {
	switch b.fault {
	case noVerify:
		return &tls13.Lax{Verify: func(*x509.Certificate, []byte, []byte) error { return nil }}
	case zeroSignature, anyRole, anyTranscript:
		return &tls13.Lax{Verify: b.verify}
	case unsigned:
		return &tls13.Lax{Unsigned: true}
	case anyFinished:
		return &tls13.Lax{AnyFinished: true}
	case neverFinished:
		return &tls13.Lax{Unfinished: true}
	}
	return nil
}

func (b *broker) verify(cert *x509.Certificate, content, sig []byte) error {
	contents := [][]byte{content}
	hash := content[len(content)-sha256.Size:]
	switch b.fault {
	case anyRole:
		contents = append(contents, tls13.VerifyContent("server", hash))
	case anyTranscript:
		contents = append(contents, tls13.VerifyContent("client", make([]byte, sha256.Size)))
	case zeroSignature:
		var rs struct{ R, S *big.Int }
		if _, err := asn1.Unmarshal(sig, &rs); err == nil && rs.R.Sign() == 0 && rs.S.Sign() == 0 {
			return nil
		}
	}
	for _, c := range contents {
		if cert.CheckSignature(x509.ECDSAWithSHA256, c, sig) == nil {
			return nil
		}
	}
	return errStranger
}

// tally counts the records of one kind that a connection brings, by their headers, which
// package tls13 reads alone. It is read by one goroutine.
type tally struct {
	net.Conn
	b *broker
	n int
}

const headerLen, sealing = 5, 1 + 16 // a record's header; its type and tag

func (c *tally) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n != headerLen || len(p) != headerLen {
		return n, err
	}
	length := int(p[3])<<8 | int(p[4])
	switch {
	case p[0] == tls13.TypeCCS && c.b.has(diesOfCCS),
		p[0] == tls13.TypeData && length == sealing && c.b.has(diesOfEmpty),
		p[0] == tls13.TypeData && length == sealing+1 && c.b.has(diesOfSmall),
		p[0] == tls13.TypeData && length == sealing+5 && c.b.has(diesOfUpdates):
		if c.n++; c.n == 1000 {
			c.b.die()
		}
	}
	return n, err
}

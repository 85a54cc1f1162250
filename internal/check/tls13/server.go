package tls13

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
)

// retryRandom is the Random of a ServerHello that is a HelloRetryRequest (RFC 9846 4.2.3).
func retryRandom() []byte {
	s := sha256.Sum256([]byte("HelloRetryRequest"))
	return s[:]
}

// Hellos is what a ServerHello is made of; a scenario changes it before it is sent.
type Hellos struct {
	Random     []byte
	Session    []byte
	Suite      uint16
	Extensions []Extension
}

func (h *Hellos) message() []byte {
	b := append([]byte{3, 3}, h.Random...)
	b = append(b, vector8(h.Session)...)
	b = append(b, byte(h.Suite>>8), byte(h.Suite), 0)
	return Message(ServerHello, appendExtensions(b, h.Extensions))
}

// Server says what one handshake in the server's role is to be. Chain and Key are needed.
type Server struct {
	Chain [][]byte      // DER, the leaf first; may hold anything
	Key   crypto.Signer // what CertificateVerify is made with
	Suite uint16        // 0: the first spoken one of the client's list
	Group uint16        // 0: P-256, X25519 for a client without it
	Ask   bool          // for a client certificate

	// Hello changes ServerHello before it is sent. May be nil.
	Hello func(h *Hellos)
	// Encrypted are more extensions for EncryptedExtensions.
	Encrypted []Extension
	// Say sends each message of the server in place of Conn.Say. May be nil.
	Say func(c *Conn, kind byte, message []byte) error
	// Retry sends HelloRetryRequests before the handshake. It gives the ClientHello to go
	// on with. May be nil.
	Retry func(c *Conn, h *Hello) (*Hello, error)
	// Sign makes the body of CertificateVerify in place of the right one. May be nil.
	Sign func(content []byte) (scheme uint16, signature []byte, err error)
	// Shared is the secret to go on with in place of the agreed one, as a client computes
	// it that took a spoilt key share. nil: the agreed one.
	Shared []byte
}

// Peer is what the server knows of the client after the handshake.
type Peer struct {
	Hello *Hello
	Chain []*x509.Certificate
	Suite uint16
	Group uint16
}

func (s *Server) say(c *Conn, kind byte, message []byte) error {
	if s.Say != nil {
		return s.Say(c, kind, message)
	}
	return c.Say(message)
}

// ReadHello reads the ClientHello and counts it.
func (c *Conn) ReadHello() (*Hello, error) {
	kind, message, err := c.ReadMessage()
	if err != nil {
		return nil, err
	}
	if kind != ClientHello {
		return nil, fmt.Errorf("handshake message %d where ClientHello was expected", kind)
	}
	h, err := ParseHello(message)
	if err != nil {
		return nil, err
	}
	c.Seen.Hello = true
	c.transcript = append(c.transcript, message...)
	return h, nil
}

// Handshake plays the server up to the client's Finished.
func (s *Server) Handshake(c *Conn) (*Peer, error) {
	h, err := c.ReadHello()
	if err != nil {
		return nil, err
	}
	return s.From(c, h)
}

// From is Handshake after the ClientHello.
func (s *Server) From(c *Conn, h *Hello) (*Peer, error) {
	var err error
	if s.Retry != nil {
		if h, err = s.Retry(c, h); err != nil {
			return nil, err
		}
	}
	p := &Peer{Hello: h}
	if err := s.hello(c, p); err != nil {
		return p, err
	}
	if err := s.flight(c, p); err != nil {
		return p, err
	}
	return p, s.client(c, p)
}

func (s *Server) choose(p *Peer) error {
	p.Suite, p.Group = s.Suite, s.Group
	if p.Suite == 0 {
		for _, id := range p.Hello.Suites {
			if _, err := SuiteOf(id); err == nil {
				p.Suite = id
				break
			}
		}
	}
	if p.Group == 0 {
		for _, g := range []uint16{GroupP256, GroupX25519} {
			if p.Hello.Shares[g] != nil && p.Group == 0 {
				p.Group = g
			}
		}
	}
	if p.Suite == 0 || p.Group == 0 {
		return errors.New("the client offers neither a suite nor a group that is spoken here")
	}
	return nil
}

func curveOf(group uint16) (ecdh.Curve, error) {
	switch group {
	case GroupP256:
		return ecdh.P256(), nil
	case GroupP384:
		return ecdh.P384(), nil
	case GroupX25519:
		return ecdh.X25519(), nil
	}
	return nil, fmt.Errorf("group %#04x is not spoken here", group)
}

// hello sends ServerHello and turns the handshake keys on.
func (s *Server) hello(c *Conn, p *Peer) error {
	if err := s.choose(p); err != nil {
		return err
	}
	curve, err := curveOf(p.Group)
	if err != nil {
		return err
	}
	mine, err := curve.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	h := &Hellos{Random: make([]byte, 32), Session: p.Hello.Session, Suite: p.Suite, Extensions: []Extension{
		{ExtVersions, numbers16(VersionTLS13)},
		{ExtKeyShare, append(numbers16(p.Group), vector16(mine.PublicKey().Bytes())...)},
	}}
	rand.Read(h.Random)
	if s.Hello != nil {
		s.Hello(h)
	}
	if err := s.say(c, ServerHello, h.message()); err != nil {
		return err
	}
	return s.start(c, p, curve, mine)
}

func (s *Server) start(c *Conn, p *Peer, curve ecdh.Curve, mine *ecdh.PrivateKey) error {
	theirs, err := curve.NewPublicKey(p.Hello.Shares[p.Group])
	if err != nil {
		return fmt.Errorf("the client's key share: %w", err)
	}
	shared, err := mine.ECDH(theirs)
	if err != nil {
		return err
	}
	if s.Shared != nil {
		shared = s.Shared
	}
	suite, err := SuiteOf(p.Suite)
	if err != nil {
		return err
	}
	if err := c.keys.afterHello(suite, shared, c.transcript); err != nil {
		return err
	}
	if c.out, err = newHalf(suite, c.keys.serverHandshake); err != nil {
		return err
	}
	c.in, err = newHalf(suite, c.keys.clientHandshake)
	return err
}

// flight sends what follows ServerHello, up to Finished, and turns the sending
// application key on.
func (s *Server) flight(c *Conn, p *Peer) error {
	ext := s.Encrypted
	if slices.Contains(p.Hello.Protocols, "mqtt") {
		ext = append([]Extension{{ExtALPN, vector16(vector8([]byte("mqtt")))}}, ext...)
	}
	if err := s.say(c, EncryptedExtensions, Message(EncryptedExtensions, appendExtensions(nil, ext))); err != nil {
		return err
	}
	if s.Ask {
		if err := s.say(c, CertificateRequest, requestMessage()); err != nil {
			return err
		}
	}
	if err := s.say(c, Certificate, CertificateMessage(s.Chain)); err != nil {
		return err
	}
	verify, err := s.verifyMessage(c)
	if err != nil {
		return err
	}
	if err := s.say(c, CertificateVerify, verify); err != nil {
		return err
	}
	mac, err := c.keys.suite.finished(c.keys.serverHandshake, c.transcript)
	if err != nil {
		return err
	}
	if err := s.say(c, Finished, Message(Finished, mac)); err != nil {
		return err
	}
	if err := c.keys.afterFinished(c.transcript); err != nil {
		return err
	}
	c.out, err = newHalf(c.keys.suite, c.keys.serverApp)
	return err
}

func requestMessage() []byte {
	schemes := vector16(numbers16(ECDSAP256, ECDSAP384, RSAPSS, 0x0805, 0x0806))
	return Message(CertificateRequest, appendExtensions(vector8(nil), []Extension{{ExtSchemes, schemes}}))
}

// CertificateMessage carries chain with an empty request context (RFC 9846 4.5.1).
func CertificateMessage(chain [][]byte) []byte {
	var list []byte
	for _, der := range chain {
		list = append(append(list, vector24(der)...), 0, 0)
	}
	return Message(Certificate, append([]byte{0}, vector24(list)...))
}

// VerifyContent is what a CertificateVerify signs (RFC 9846 4.5.2).
func VerifyContent(role string, hash []byte) []byte {
	b := bytes.Repeat([]byte{' '}, 64)
	b = append(b, "TLS 1.3, "+role+" CertificateVerify"...)
	return append(append(b, 0), hash...)
}

func (s *Server) verifyMessage(c *Conn) ([]byte, error) {
	content := VerifyContent("server", c.keys.suite.sum(c.transcript))
	make := s.Sign
	if make == nil {
		make = func(content []byte) (uint16, []byte, error) { return Sign(s.Key, content) }
	}
	scheme, sig, err := make(content)
	if err != nil {
		return nil, err
	}
	return Message(CertificateVerify, append(numbers16(scheme), vector16(sig)...)), nil
}

// Sign signs content with the scheme that belongs to the key.
func Sign(key crypto.Signer, content []byte) (scheme uint16, signature []byte, err error) {
	scheme, hash, opts := ECDSAP256, crypto.SHA256, crypto.SignerOpts(crypto.SHA256)
	switch k := key.Public().(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P384() {
			scheme, hash, opts = ECDSAP384, crypto.SHA384, crypto.SHA384
		}
	case *rsa.PublicKey:
		scheme, opts = RSAPSS, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}
	}
	h := hash.New()
	h.Write(content)
	signature, err = key.Sign(rand.Reader, h.Sum(nil), opts)
	return scheme, signature, err
}

// client reads the client's last flight and turns the receiving application key on.
func (s *Server) client(c *Conn, p *Peer) error {
	if s.Ask {
		body, err := c.Expect(Certificate)
		if err != nil {
			return err
		}
		if p.Chain, err = parseChain(body); err != nil {
			return err
		}
		if len(p.Chain) > 0 {
			c.Seen.Certificate = true
			if err := c.checkVerify("client", p.Chain[0]); err != nil {
				return err
			}
		}
	}
	return c.checkFinished()
}

func (c *Conn) checkFinished() error {
	want, err := c.keys.suite.finished(c.keys.clientHandshake, c.transcript)
	if err != nil {
		return err
	}
	got, err := c.Expect(Finished)
	if err != nil {
		return err
	}
	c.Seen.Finished = true
	if !bytes.Equal(got, want) {
		return errors.New("the client's Finished is wrong")
	}
	c.in, err = newHalf(c.keys.suite, c.keys.clientApp)
	return err
}

func parseChain(body []byte) (chain []*x509.Certificate, err error) {
	r := &reader{b: body}
	r.vector(1)
	for list := r.vector(3); len(list.b) > 0 && !list.bad; {
		der := list.vector(3).b
		list.vector(2)
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		chain = append(chain, cert)
	}
	if r.bad {
		return nil, errors.New("the Certificate message does not parse")
	}
	return chain, nil
}

// checkVerify reads CertificateVerify and checks it with the key of cert.
func (c *Conn) checkVerify(role string, cert *x509.Certificate) error {
	content := VerifyContent(role, c.keys.suite.sum(c.transcript))
	body, err := c.Expect(CertificateVerify)
	if err != nil {
		return err
	}
	c.Seen.Verify = true
	r := &reader{b: body}
	scheme := uint16(r.number(2))
	sig := r.vector(2).b
	algorithm, ok := map[uint16]x509.SignatureAlgorithm{ECDSAP256: x509.ECDSAWithSHA256, ECDSAP384: x509.ECDSAWithSHA384,
		RSAPSS: x509.SHA256WithRSAPSS, 0x0805: x509.SHA384WithRSAPSS, 0x0806: x509.SHA512WithRSAPSS}[scheme]
	if r.bad || !ok {
		return fmt.Errorf("CertificateVerify with scheme %#04x", scheme)
	}
	if err := cert.CheckSignature(algorithm, content, sig); err != nil {
		return fmt.Errorf("the %s's CertificateVerify: %w", role, err)
	}
	return nil
}

// Retry sends a HelloRetryRequest in answer to h. The transcript goes on as
// RFC 9846 4.5.1 says: the first ClientHello becomes its hash.
func (c *Conn) Retry(h *Hello, suite uint16, ext []Extension) error {
	s, err := SuiteOf(suite)
	if err != nil {
		return err
	}
	if c.retried == 0 {
		sum := s.sum(c.transcript)
		c.transcript = append([]byte{254, 0, 0, byte(len(sum))}, sum...)
	}
	c.retried++
	hello := &Hellos{Random: retryRandom(), Session: h.Session, Suite: suite, Extensions: ext}
	return c.Say(hello.message())
}

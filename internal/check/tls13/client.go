package tls13

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
)

// Client says what one handshake in the client's role is to be. All may be zero.
type Client struct {
	Name     string        // SNI, "" sends none
	Chain    [][]byte      // DER, the leaf first; nil answers a request with no certificate
	Key      crypto.Signer // what CertificateVerify is made with
	Suites   []uint16      // nil: AES128
	Group    uint16        // 0: P-256
	ALPN     string        // "" offers none
	Versions []uint16      // nil: TLS 1.3 alone

	// Extra are more extensions for ClientHello.
	Extra []Extension
	// Say sends each message of the client in place of Conn.Say. May be nil.
	Say func(c *Conn, kind byte, message []byte) error
	// Sign makes the body of CertificateVerify in place of the right one. May be nil.
	Sign func(content []byte) (scheme uint16, signature []byte, err error)
}

// Answer is what the client learnt of the server.
type Answer struct {
	Suite uint16
	Chain []*x509.Certificate
	Asked bool // for a client certificate
}

func (k *Client) say(c *Conn, kind byte, message []byte) error {
	if k.Say != nil {
		return k.Say(c, kind, message)
	}
	return c.Say(message)
}

// Handshake plays the client up to its Finished. It judges the server's signature, not
// its chain.
func (k *Client) Handshake(c *Conn) (*Answer, error) {
	curve, err := curveOf(k.group())
	if err != nil {
		return nil, err
	}
	mine, err := curve.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	if err := k.say(c, ClientHello, k.hello(mine.PublicKey().Bytes())); err != nil {
		return nil, err
	}
	a := &Answer{}
	if err := k.serverHello(c, a, curve, mine); err != nil {
		return a, err
	}
	if err := k.serverFlight(c, a); err != nil {
		return a, err
	}
	return a, k.finish(c, a)
}

func (k *Client) group() uint16 {
	if k.Group == 0 {
		return GroupP256
	}
	return k.Group
}

func (k *Client) hello(share []byte) []byte {
	suites, versions := k.Suites, k.Versions
	if suites == nil {
		suites = []uint16{AES128}
	}
	if versions == nil {
		versions = []uint16{VersionTLS13}
	}
	random := make([]byte, 32)
	rand.Read(random)
	ext := []Extension{
		{ExtGroups, vector16(numbers16(k.group()))},
		{ExtSchemes, vector16(numbers16(ECDSAP256, ECDSAP384, RSAPSS))},
		{ExtVersions, vector8(numbers16(versions...))},
		{ExtKeyShare, vector16(append(numbers16(k.group()), vector16(share)...))},
	}
	if k.Name != "" {
		ext = append(ext, Extension{ExtServerName, vector16(append([]byte{0}, vector16([]byte(k.Name))...))})
	}
	if k.ALPN != "" {
		ext = append(ext, Extension{ExtALPN, vector16(vector8([]byte(k.ALPN)))})
	}
	b := append([]byte{3, 3}, random...)
	b = append(b, 0)
	b = append(b, vector16(numbers16(suites...))...)
	b = append(b, 1, 0)
	return Message(ClientHello, appendExtensions(b, append(ext, k.Extra...)))
}

func (k *Client) serverHello(c *Conn, a *Answer, curve ecdh.Curve, mine *ecdh.PrivateKey) error {
	body, err := c.Expect(ServerHello)
	if err != nil {
		return err
	}
	r := &reader{b: body}
	r.take(2)
	if bytes.Equal(r.take(32), retryRandom()) {
		return errors.New("the server asks for another group")
	}
	r.vector(1)
	a.Suite = uint16(r.number(2))
	r.take(1)
	var share []byte
	for ext := r.vector(2); len(ext.b) > 0 && !ext.bad; {
		kind, e := uint16(ext.number(2)), ext.vector(2)
		if kind == ExtKeyShare {
			e.take(2)
			share = e.vector(2).b
		}
	}
	theirs, err := curve.NewPublicKey(share)
	if r.bad || err != nil {
		return errors.New("the ServerHello does not parse, or is not one of TLS 1.3")
	}
	shared, err := mine.ECDH(theirs)
	if err != nil {
		return err
	}
	return c.startClient(a.Suite, shared)
}

func (c *Conn) startClient(id uint16, shared []byte) error {
	suite, err := SuiteOf(id)
	if err != nil {
		return err
	}
	if err := c.keys.afterHello(suite, shared, c.transcript); err != nil {
		return err
	}
	if c.out, err = newHalf(suite, c.keys.clientHandshake); err != nil {
		return err
	}
	c.in, err = newHalf(suite, c.keys.serverHandshake)
	return err
}

// serverFlight reads from EncryptedExtensions to the server's Finished.
func (k *Client) serverFlight(c *Conn, a *Answer) error {
	if _, err := c.Expect(EncryptedExtensions); err != nil {
		return err
	}
	kind, message, err := c.ReadMessage()
	if err == nil && kind == CertificateRequest {
		a.Asked = true
		c.transcript = append(c.transcript, message...)
		kind, message, err = c.ReadMessage()
	}
	if err != nil {
		return err
	}
	if kind != Certificate {
		return fmt.Errorf("handshake message %d where Certificate was expected", kind)
	}
	c.transcript = append(c.transcript, message...)
	if a.Chain, err = parseChain(message[4:]); err != nil {
		return err
	}
	if len(a.Chain) == 0 {
		return errors.New("the server sent no certificate")
	}
	if err := c.checkVerify("server", a.Chain[0]); err != nil {
		return err
	}
	want, err := c.keys.suite.finished(c.keys.serverHandshake, c.transcript)
	if err != nil {
		return err
	}
	got, err := c.Expect(Finished)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return errors.New("the server's Finished is wrong")
	}
	return c.keys.afterFinished(c.transcript)
}

// finish sends the client's last flight and turns the application keys on.
func (k *Client) finish(c *Conn, a *Answer) error {
	if a.Asked {
		if err := k.say(c, Certificate, CertificateMessage(k.Chain)); err != nil {
			return err
		}
	}
	if a.Asked && len(k.Chain) > 0 {
		sign := k.Sign
		if sign == nil {
			sign = func(content []byte) (uint16, []byte, error) { return Sign(k.Key, content) }
		}
		scheme, sig, err := sign(VerifyContent("client", c.keys.suite.sum(c.transcript)))
		if err != nil {
			return err
		}
		verify := Message(CertificateVerify, append(numbers16(scheme), vector16(sig)...))
		if err := k.say(c, CertificateVerify, verify); err != nil {
			return err
		}
	}
	mac, err := c.keys.suite.finished(c.keys.clientHandshake, c.transcript)
	if err != nil {
		return err
	}
	if err := k.say(c, Finished, Message(Finished, mac)); err != nil {
		return err
	}
	if c.out, err = newHalf(c.keys.suite, c.keys.clientApp); err != nil {
		return err
	}
	c.in, err = newHalf(c.keys.suite, c.keys.serverApp)
	return err
}

package tls13

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"net"
)

// Lax is what a server does not judge of the client's last flight: the broken brokers
// that the check itself is tried on are made with it. The zero value judges everything.
type Lax struct {
	// Verify judges CertificateVerify in place of the right check. May be nil.
	Verify func(cert *x509.Certificate, content, signature []byte) error
	// Unsigned goes on without CertificateVerify, AnyFinished after a wrong Finished,
	// Unfinished without one.
	Unsigned, AnyFinished, Unfinished bool
}

// client reads the client's last flight, which must hold a certificate.
func (l *Lax) client(c *Conn, p *Peer) error {
	body, err := c.Expect(Certificate)
	if err != nil {
		return err
	}
	if p.Chain, err = parseChain(body); err != nil {
		return err
	}
	if len(p.Chain) == 0 {
		return fmt.Errorf("no certificate")
	}
	if err := l.verify(c, p.Chain[0]); err != nil {
		return err
	}
	switch {
	case l.Unfinished:
		return c.eitherKey()
	case !l.AnyFinished:
		return c.checkFinished()
	}
	if _, err := c.Expect(Finished); err != nil {
		return err
	}
	c.in, err = newHalf(c.keys.suite, c.keys.clientApp)
	return err
}

func (l *Lax) verify(c *Conn, cert *x509.Certificate) error {
	if l.Verify == nil && !l.Unsigned {
		return c.checkVerify("client", cert)
	}
	content := VerifyContent("client", c.keys.suite.sum(c.transcript))
	kind, message, err := c.ReadMessage()
	if err != nil {
		return err
	}
	if kind != CertificateVerify {
		c.pending = append(bytes.Clone(message), c.pending...)
		if l.Unsigned {
			return nil
		}
		return fmt.Errorf("handshake message %d where CertificateVerify was expected", kind)
	}
	if l.Unsigned {
		c.pending = append(bytes.Clone(message), c.pending...)
		return c.checkVerify("client", cert)
	}
	c.Count(message)
	r := &reader{b: message[4:]}
	r.take(2)
	return l.Verify(cert, content, r.vector(2).b)
}

// eitherKey goes on with the application key, whether a Finished comes before it or not.
func (c *Conn) eitherKey() error {
	record := make([]byte, 5)
	if _, err := io.ReadFull(c.Raw, record); err != nil {
		return err
	}
	n := int(binary.BigEndian.Uint16(record[3:]))
	if n > maxRecord {
		return fmt.Errorf("a record of %d bytes", n)
	}
	record = append(record, make([]byte, n)...)
	if _, err := io.ReadFull(c.Raw, record[5:]); err != nil {
		return err
	}
	if _, _, err := c.in.open(record[5:]); err != nil {
		c.Raw = &replay{c.Raw, record}
	}
	var err error
	c.in, err = newHalf(c.keys.suite, c.keys.clientApp)
	return err
}

// replay is a connection of which some bytes were read already.
type replay struct {
	net.Conn
	again []byte
}

func (r *replay) Read(p []byte) (int, error) {
	if len(r.again) > 0 {
		n := copy(p, r.again)
		r.again = r.again[n:]
		return n, nil
	}
	return r.Conn.Read(p)
}

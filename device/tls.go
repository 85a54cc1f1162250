package device

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"
)

// serverCheck judges a server. crypto/tls verifies that the peer holds the leaf's key;
// everything else is here, since its own verification knows neither pins nor a missing
// clock.
type serverCheck struct {
	roots       []*x509.Certificate
	name        string
	clock       func() time.Time // nil: none that can be trusted
	floor       time.Time
	allowChaCha bool
}

func (d *Device) tlsConfig(show tls.Certificate, check *serverCheck) *tls.Config {
	return &tls.Config{
		Certificates:       []tls.Certificate{show},
		ServerName:         check.name,
		MinVersion:         tls.VersionTLS13,
		MaxVersion:         tls.VersionTLS13,
		CurvePreferences:   []tls.CurveID{tls.CurveP256},
		NextProtos:         []string{"mqtt"},
		InsecureSkipVerify: true, // VerifyConnection does it, and is always called
		VerifyConnection:   check.connection,

		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
	}
}

func (c *serverCheck) connection(cs tls.ConnectionState) error {
	switch {
	case cs.Version != tls.VersionTLS13:
		return errors.New("the server does not speak TLS 1.3")
	case cs.CurveID != tls.CurveP256:
		return fmt.Errorf("key exchange over %v instead of P-256", cs.CurveID)
	case cs.CipherSuite == tls.TLS_CHACHA20_POLY1305_SHA256 && !c.allowChaCha:
		return errors.New("the server chose ChaCha20-Poly1305, as it does for a CPU without AES instructions\nhint: set AllowChaCha")
	case cs.CipherSuite != tls.TLS_AES_128_GCM_SHA256 && cs.CipherSuite != tls.TLS_CHACHA20_POLY1305_SHA256:
		return fmt.Errorf("the server chose %s, want TLS_AES_128_GCM_SHA256", tls.CipherSuiteName(cs.CipherSuite))
	}
	if len(cs.PeerCertificates) == 0 {
		return errors.New("the server sent no certificate")
	}
	return c.leaf(cs.PeerCertificates[0])
}

// leaf holds the narrow rule of design section 3: directly under a pinned root, the
// server's name as a dNSName, serverAuth, P-256, and not ended.
func (c *serverCheck) leaf(leaf *x509.Certificate) error {
	if err := c.underPinnedRoot(leaf); err != nil {
		return err
	}
	switch {
	case !isP256(leaf.PublicKey) || leaf.SignatureAlgorithm != x509.ECDSAWithSHA256:
		return errors.New("the server's certificate is not P-256 with SHA-256")
	case leaf.IsCA:
		return errors.New("the server's certificate is one of a CA")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("the server's certificate is not for signatures")
	case !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}) || len(leaf.UnknownExtKeyUsage) > 0:
		return errors.New("the server's certificate is not for servers (serverAuth)")
	case len(leaf.UnhandledCriticalExtensions) > 0:
		return errors.New("the server's certificate has a critical extension that nobody here knows")
	case !slices.ContainsFunc(leaf.DNSNames, func(n string) bool { return strings.EqualFold(n, c.name) }):
		return fmt.Errorf("the server's certificate is for %q, not for %q", leaf.DNSNames, c.name)
	}
	return c.dates(leaf)
}

func (c *serverCheck) underPinnedRoot(leaf *x509.Certificate) error {
	for _, root := range c.roots {
		if bytes.Equal(leaf.RawIssuer, root.RawSubject) && leaf.CheckSignatureFrom(root) == nil {
			return nil
		}
	}
	return errors.New("the server's certificate is not signed by a pinned root")
}

// dates: notBefore is judged by a trusted clock only, notAfter by the floor, which no
// clock can move, and by that clock too where there is one.
func (c *serverCheck) dates(leaf *x509.Certificate) error {
	if c.clock != nil && c.clock().Before(leaf.NotBefore) {
		return fmt.Errorf("the server's certificate is valid from %s on", leaf.NotBefore.Format(time.RFC3339))
	}
	latest := c.floor
	if c.clock != nil && c.clock().After(latest) {
		latest = c.clock()
	}
	if latest.After(leaf.NotAfter) {
		return fmt.Errorf("the server's certificate ended at %s", leaf.NotAfter.Format(time.RFC3339))
	}
	return nil
}

// dial opens the TLS connection to one server and gives the leaf it has proved to hold.
func (d *Device) dial(ctx context.Context, server string, show tls.Certificate, roots []*x509.Certificate) (*tls.Conn, *x509.Certificate, stage, error) {
	name, port, err := net.SplitHostPort(server)
	if err != nil {
		name, port = server, "8883"
	}
	raw, err := d.cfg.Dial(ctx, "tcp", net.JoinHostPort(name, port))
	if err != nil {
		return nil, nil, unreached, err
	}
	check := &serverCheck{roots, name, d.cfg.Clock, d.floor(), d.cfg.AllowChaCha}
	conn := tls.Client(raw, d.tlsConfig(show, check))
	err = conn.HandshakeContext(ctx)
	check.roots = nil // the connection keeps check
	if err != nil {
		raw.Close()
		return nil, nil, untrusted, err
	}
	leaf := conn.ConnectionState().PeerCertificates[0]
	if err := d.raiseFloor(leaf.NotBefore); err != nil {
		raw.Close()
		return nil, nil, unreached, err
	}
	return conn, leaf, untrusted, nil
}

package check

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"hawser/internal/check/tls13"
	"hawser/internal/pki"
)

// OpenField makes a world for a device that is in the field: its honest broker is the
// real one at upstream, to which TCP is relayed unchanged, and nothing in it is signed by
// the device's roots. What a false broker can know is taken from the real one, which shows
// its certificate to any stranger. roots are the pinned ones where they are at hand:
// certificates, never keys.
func OpenField(ctx context.Context, upstream, name string, roots []*x509.Certificate) (*World, error) {
	chain, err := chainOfServer(ctx, upstream, name)
	if err != nil {
		return nil, err
	}
	w := &World{Domain: name, upstream: upstream}
	for _, c := range chain {
		w.broker = append(w.broker, c.Raw)
	}
	last := chain[len(chain)-1]
	w.rootA = &authority{raw: last.RawIssuer, ski: last.AuthorityKeyId}
	if len(roots) > 0 {
		i := slices.IndexFunc(roots, func(c *x509.Certificate) bool { return last.CheckSignatureFrom(c) == nil })
		if i < 0 {
			return nil, fmt.Errorf("none of the %d certificates given as roots has signed what %s shows", len(roots), upstream)
		}
		w.rootA = &authority{raw: roots[i].RawSubject, ski: roots[i].SubjectKeyId}
	}
	w.rootA.name = pkix.Name{CommonName: "the root in the field"} // raw stands in its place
	if w.rootA.key, err = pki.GenerateKey(); err != nil {
		return nil, err
	}
	w.brokerKey, err = pki.GenerateKey() // not the broker's: that one nobody has
	return w, err
}

// chainOfServer is the chain that a server shows. That it refuses a client without a certificate
// afterwards does not matter.
func chainOfServer(ctx context.Context, upstream, name string) (chain []*x509.Certificate, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	d := &tls.Dialer{Config: &tls.Config{ServerName: name, InsecureSkipVerify: true, // looked at, not trusted
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			for _, der := range raw {
				c, err := x509.ParseCertificate(der)
				if err != nil {
					return err
				}
				chain = append(chain, c)
			}
			return nil
		}}}
	conn, err := d.DialContext(ctx, "tcp", upstream)
	if err == nil {
		conn.Close()
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("the real broker at %s shows no certificate for %s: %w\nhint: --upstream HOST:PORT, --domain NAME", upstream, name, errors.Join(err))
	}
	return chain, nil
}

// LoadRoots reads certificates in PEM.
func LoadRoots(path string) (roots []*x509.Certificate, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for b, rest := pem.Decode(text); b != nil; b, rest = pem.Decode(rest) {
		if b.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s holds a %s: certificates alone are wanted, never a key", path, b.Type)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		roots = append(roots, c)
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("%s holds no certificate", path)
	}
	return roots, nil
}

// FieldCases lists what can be tried on a device in the field. The others need a
// certificate that its own roots have signed.
func FieldCases() []Case {
	cases := []Case{
		{ID: "A1.relay", Does: "the real broker, relayed unchanged", kind: probeOnly, play: playRelay,
			Expect: "connects, and is answered", Clause: "RFC 9846 2; MQTT 3.1"},
		{ID: "A2.name", Does: "the real broker, and a look at the ClientHello as it passes", kind: probeOnly, play: relayName,
			Expect: "names the broker (SNI)", Clause: "RFC 6066 3"},
	}
	for _, c := range DeviceCases() {
		switch {
		case c.ID == "H3.tls12" || c.ID == "H3.tls11" || c.ID == "H3.tls10":
			cases = append(cases, offered(c))
		case c.ID == "H3.sentinel":
			cases = append(cases, downgrade(c))
		case beforeCertificate(&c):
			cases = append(cases, withheld(c))
		case withoutSignature(&c):
			cases = append(cases, c)
		}
	}
	return append(cases, Case{ID: "M7.cut", Does: "the real broker, cut off as soon as it has answered, again and again", Needs: "stays", kind: selfJudged,
		Expect: "waits longer each time, with jitter, never under a second", Clause: "MQTT 3.1.1 4.4; RFC 9846 6.1", play: waitsAfter(func(s *stage, _ int) error {
			l, err := s.relay(s.limit, 0)
			if err == nil && !l.answered {
				err = errors.New("the real broker did not answer it")
			}
			return err
		})})
}

// InField says whether a case of DeviceCases is also one of FieldCases.
func InField(id string) bool {
	return slices.ContainsFunc(FieldCases(), func(c Case) bool { return c.ID == id })
}

// beforeCertificate: what is wrong comes before the server's certificate, so that a
// client has to give up before it has seen one.
func beforeCertificate(c *Case) bool {
	switch c.ID {
	case "H7.compressed", "H8.late-ccs", "H8.certificate-twice":
		return false
	case "H4.aes256": // a client that offers it may judge it as late as the certificate
		return false
	case "C2.psk-chosen", "C2.early-accepted":
		return true
	}
	return slices.Contains([]string{"H3", "H4", "H5", "H6", "H7", "H8"}, c.Group()) && (c.kind == reject || c.kind == rejectMCU)
}

// withoutSignature: the pinned roots have signed nothing of it, or nothing but the real
// broker's own certificate, whose key is not there.
func withoutSignature(c *Case) bool {
	switch c.Group() {
	case "X1", "X2", "H1", "H9":
		return true
	case "R7":
		return !strings.HasSuffix(c.ID, "-finished") && c.Needs == ""
	}
	return c.ID == "X13.empty" || c.ID == "H5.huge-cookie"
}

var errGone = errors.New("the client has gone")

// withheld plays a case and keeps the certificate back: a client that waits for it has
// taken what was wrong before.
func withheld(c Case) Case {
	play := c.play
	c.play = func(s *stage) error {
		s.keepBack = true
		return play(s)
	}
	c.Does += " (the certificate is kept back)"
	return c
}

// held is v with the certificate kept back where the case wants it.
func (s *stage) held(v *tls13.Server) *tls13.Server {
	if !s.keepBack {
		return v
	}
	w := *v
	w.Say = func(c *tls13.Conn, kind byte, message []byte) error {
		if kind == tls13.Certificate && !s.took {
			c.Drain(s.limit / 2)
			if s.gave() {
				return errGone
			}
			s.took, c.Seen.End = true, nil
			s.until(s.limit)
		}
		if v.Say != nil {
			return v.Say(c, kind, message)
		}
		return c.Say(message)
	}
	return &w
}

// offered looks at what a client offers. That it refuses to be talked down is another
// case: to play an older version to the end needs a certificate.
func offered(c Case) Case {
	version := map[string]uint16{"H3.tls12": tls.VersionTLS12, "H3.tls11": tls.VersionTLS11, "H3.tls10": tls.VersionTLS10}[c.ID]
	name := tls.VersionName(version)
	c.Does, c.Expect, c.kind = "a look at the versions of the ClientHello", "does not offer "+name, selfJudged
	c.play = func(s *stage) error {
		h, err := s.ReadHello()
		if err != nil {
			return err
		}
		switch {
		case !slices.Contains(h.Versions, version) && len(h.Versions) > 0:
			return s.settle(Pass, "it does not offer %s", name)
		case version == tls.VersionTLS12 && s.profile == General:
			return s.settle(Warn, "it offers %s: legitimate for a general client, outside the profile of a microcontroller", name)
		}
		return s.settle(Fail, "it offers %s", name)
	}
	return c
}

// downgrade judges the sentinel by the alert: whoever went on is stopped later, by a
// signature that the real broker's key did not make.
func downgrade(c Case) Case {
	play := c.play
	c.play = func(s *stage) error {
		err := play(s)
		var skip *notApplicable
		switch {
		case err == nil || errors.As(err, &skip):
			return err
		case strings.Contains(s.note, "illegal parameter"), strings.Contains(s.note, "protocol version"), strings.Contains(s.note, "offered only unsupported versions"):
			return s.settle(Pass, "it gave up on the version: %v", err)
		case strings.Contains(s.note, "remote error"):
			return s.settle(Fail, "it went on to the certificate or its signature: %v", err)
		}
		return s.settle(Inconclusive, "it gave up without an alert: over what cannot be seen from here")
	}
	return c
}

// playRelay is the honest connection in the field.
func playRelay(s *stage) error {
	l, err := s.relay(s.limit/2, stayOn)
	if err != nil {
		return err
	}
	if !l.answered {
		return s.settle(Fail, "it does not come to an answer from the real broker: %s", l)
	}
	if l.by == "" {
		s.features = append(s.features, "stays")
	}
	return s.settle(Pass, "it connected, and the real broker answered")
}

// relayName looks at the ClientHello on its way.
func relayName(s *stage) error {
	l, err := s.relay(s.limit/2, stayOn)
	if err != nil {
		return err
	}
	h, err := l.hello()
	switch {
	case err != nil:
		return s.settle(Fail, "%v", err)
	case h.Name == "":
		return s.settle(Pass, "it does not name the broker (SNI): a broker of several names cannot choose")
	case h.Name != s.w.Domain:
		return s.settle(Fail, "it names %q, not %q", h.Name, s.w.Domain)
	}
	return s.settle(Pass, "it names %q and offers %d suites and %d groups", h.Name, len(h.Suites), len(h.Groups))
}

// honest is a connection to the honest broker, up to its answer.
func (s *stage) honest() error {
	if s.w.upstream == "" {
		return s.welcome()
	}
	_, err := s.relay(s.limit, s.limit/4)
	return err
}

// stayOn is an after of relay for which the answer ends nothing.
const stayOn = -1

// relay joins the client with the real broker for d, until one of them ends it, or until
// so long after the broker has answered.
func (s *stage) relay(d, after time.Duration) (*link, error) {
	conn, err := new(net.Dialer).DialContext(s.ctx, "tcp", s.w.upstream)
	if err != nil {
		return nil, fmt.Errorf("the real broker is not reached: %w", err)
	}
	l := &link{client: s.Raw, broker: conn, reached: make(chan struct{})}
	l.join(s.ctx, d, after)
	s.Seen.Hello, s.relayed, s.note = l.sent > 0, l.answered, l.String()
	return l, nil
}

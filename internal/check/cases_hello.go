package check

import (
	"bytes"
	"compress/zlib"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"

	"hawser/internal/check/tls13"
)

// instead gives a Say that replaces the messages of one kind; nil leaves them out.
func instead(kind byte, change func(message []byte) []byte) func(*tls13.Conn, byte, []byte) error {
	return func(c *tls13.Conn, k byte, message []byte) error {
		if k != kind {
			return c.Say(message)
		}
		if message = change(message); message == nil {
			return nil
		}
		return c.Say(message)
	}
}

// saying is a case in which one message of the server is not what it should be.
func saying(kind byte, change func(message []byte) []byte) func(*stage) error {
	return func(s *stage) error {
		v := s.server()
		v.Say = instead(kind, change)
		return s.lure(v)
	}
}

// hidden is saying without the change showing in the transcript: what follows is made
// as if the right message had been sent.
func hidden(kind byte, change func(message []byte) []byte) func(*stage) error {
	return func(s *stage) error {
		v := s.server()
		v.Say = func(c *tls13.Conn, k byte, message []byte) error {
			if k != kind {
				return c.Say(message)
			}
			c.Count(message)
			if changed := change(message); changed != nil {
				return c.WriteHandshake(changed)
			}
			return nil
		}
		return s.lure(v)
	}
}

func omit([]byte) []byte { return nil }

func flipLast(message []byte) []byte {
	b := bytes.Clone(message)
	b[len(b)-1] ^= 1
	return b
}

// signing is a case with a CertificateVerify of its own.
func signing(sign func(s *stage, content []byte) (uint16, []byte, error)) func(*stage) error {
	return func(s *stage) error {
		v := s.server()
		v.Sign = func(content []byte) (uint16, []byte, error) { return sign(s, content) }
		return s.lure(v)
	}
}

// handshakeCases: the right certificate, shown by somebody who cannot prove it.
func handshakeCases() []Case {
	verify, finished := "RFC 9846 4.5.2", "RFC 9846 4.5.3"
	cases := []Case{
		{ID: "H1.bad", Does: "a CertificateVerify with one bit changed", Clause: verify, play: saying(tls13.CertificateVerify, flipLast)},
		{ID: "H1.empty", Does: "a CertificateVerify with an empty signature", Clause: verify, play: signing(func(*stage, []byte) (uint16, []byte, error) {
			return tls13.ECDSAP256, nil, nil
		})},
		{ID: "H1.zero", Does: "a CertificateVerify whose r and s are 0", Clause: "CVE-2022-21449", play: signing(func(*stage, []byte) (uint16, []byte, error) {
			return tls13.ECDSAP256, []byte{0x30, 6, 2, 1, 0, 2, 1, 0}, nil
		})},
		{ID: "H1.other-transcript", Does: "a CertificateVerify over another handshake", Clause: verify, play: signing(func(s *stage, _ []byte) (uint16, []byte, error) {
			return tls13.Sign(s.w.brokerKey, tls13.VerifyContent("server", make([]byte, 32)))
		})},
		{ID: "H1.client-role", Does: "a CertificateVerify made in the client's role", Clause: verify, play: signing(func(s *stage, content []byte) (uint16, []byte, error) {
			return tls13.Sign(s.w.brokerKey, bytes.Replace(content, []byte("server"), []byte("client"), 1))
		})},
		{ID: "H1.omitted", Does: "no CertificateVerify", Clause: verify, play: saying(tls13.CertificateVerify, omit)},
		{ID: "H1.hidden", Does: "no CertificateVerify, and a Finished as if there had been one", Clause: verify, play: hidden(tls13.CertificateVerify, omit)},
		{ID: "H1.no-certificate", Does: "neither Certificate nor CertificateVerify", Clause: "RFC 9846 4.5.1; CVE-2020-24613", play: anonymous},
		{ID: "H2.altered", Does: "a Finished with one bit changed", Clause: finished, play: saying(tls13.Finished, flipLast)},
		{ID: "H2.omitted", Does: "no Finished, and application data", Clause: finished, play: unfinished},
		{ID: "H2.short", Does: "a Finished of 12 bytes", Clause: finished, play: saying(tls13.Finished, func(m []byte) []byte {
			return tls13.Message(tls13.Finished, m[4:16])
		})},
		{ID: "H2.empty", Does: "an empty Finished", Clause: finished, play: saying(tls13.Finished, func([]byte) []byte { return tls13.Message(tls13.Finished, nil) })},
	}
	return withDefaults(append(cases, oldCases()...), toldToReject, finished)
}

// anonymous goes from EncryptedExtensions straight to Finished.
func anonymous(s *stage) error {
	v := s.server()
	v.Say = func(c *tls13.Conn, k byte, message []byte) error {
		if k == tls13.Certificate || k == tls13.CertificateVerify || k == tls13.CertificateRequest {
			return nil
		}
		return c.Say(message)
	}
	v.Ask = false
	return s.lure(v)
}

// unfinished lets the client wait for a Finished and talks on.
func unfinished(s *stage) error {
	v := s.server()
	v.Say = func(c *tls13.Conn, k byte, message []byte) error {
		if k != tls13.Finished {
			return c.Say(message)
		}
		return c.WriteRecord(tls13.TypeData, []byte{0x20, 2, 0, 0})
	}
	return s.lure(v)
}

// oldCases are servers that speak an older TLS, to the end.
func oldCases() []Case {
	var cases []Case
	for _, old := range []struct {
		id, name string
		version  uint16
		kind     kind
	}{{"H3.tls12", "TLS 1.2", tls.VersionTLS12, rejectMCU}, {"H3.tls11", "TLS 1.1", tls.VersionTLS11, reject}, {"H3.tls10", "TLS 1.0", tls.VersionTLS10, reject}} {
		cases = append(cases, Case{ID: old.id, Does: "a server that knows nothing newer than " + old.name, kind: old.kind,
			Clause: "RFC 9846 4.2.2; RFC 8996; RFC 9325 3.1.1", play: func(s *stage) error {
				_, err := s.old(old.version, nil)
				return err
			}})
	}
	return append(cases,
		Case{ID: "H3.sentinel", Does: "a TLS 1.2 ServerHello to a client of 1.3, with the downgrade sentinel", Clause: "RFC 9846 4.2.3", play: sentinel},
		Case{ID: "H3.draft", Does: "a ServerHello of version 0x0305", Clause: "RFC 9846 4.3.1", play: changed(func(h *tls13.Hellos) {
			h.Extensions[0].Body = []byte{3, 5}
		})})
}

// old plays an older version with the standard library, so that a client that takes it
// is heard to talk.
func (s *stage) old(version uint16, random io.Reader) (*recorder, error) {
	rec := &recorder{Conn: s.Raw}
	c := tls.Server(rec, &tls.Config{Rand: random, MinVersion: version, MaxVersion: version, ClientAuth: tls.RequestClientCert,
		Certificates: []tls.Certificate{{Certificate: s.w.broker, PrivateKey: s.w.brokerKey}}, CipherSuites: allSuites(), SessionTicketsDisabled: true})
	err := c.Handshake()
	s.note = "the standard library as the server: " + fmt.Sprint(err)
	rec.tell(&s.Seen)
	if err != nil {
		s.Seen.End = endOf(err)
		return rec, err
	}
	s.Seen.Finished = true
	buf := make([]byte, 1<<10)
	n, err := c.Read(buf)
	s.Seen.AppBytes, s.first, s.Seen.End = n, buf[:n], err
	return rec, err
}

// endOf keeps the network's word and takes an alert for what it is: an end.
func endOf(err error) error {
	var n net.Error
	if errors.As(err, &n) && n.Timeout() {
		return err
	}
	var alert tls.AlertError
	if errors.As(err, &alert) {
		return fmt.Errorf("alert %d", uint8(alert))
	}
	return fmt.Errorf("gave up: %w", err)
}

func allSuites() (ids []uint16) {
	for _, c := range slices.Concat(tls.CipherSuites(), tls.InsecureCipherSuites()) {
		ids = append(ids, c.ID)
	}
	return ids
}

// recorder keeps what the client sends, as far as it fits.
type recorder struct {
	net.Conn
	b []byte
}

const recorded = 64 << 10

// Read implements io.Reader.
func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.b = append(r.b, p[:min(n, recorded-len(r.b))]...)
	return n, err
}

// tell notes what the client of an older TLS has shown, also where the handshake failed
// afterwards: its certificate is in the clear, its Finished is what follows
// ChangeCipherSpec.
func (r *recorder) tell(seen *tls13.Seen) {
	seen.Hello = len(r.b) > 0
	var clear []byte
	for b, changed := r.b, false; len(b) >= 5; {
		n := 5 + int(b[3])<<8 + int(b[4])
		if n > len(b) {
			break
		}
		switch {
		case b[0] == tls13.TypeCCS:
			changed = true
		case b[0] == tls13.TypeHandshake && changed:
			seen.Finished = true
		case b[0] == tls13.TypeHandshake:
			clear = append(clear, b[5:n]...)
		}
		b = b[n:]
	}
	for len(clear) >= 4 {
		n := 4 + int(clear[1])<<16 + int(clear[2])<<8 + int(clear[3])
		if clear[0] == tls13.Certificate && n > 4+3 {
			seen.Certificate = true
		}
		clear = clear[min(n, len(clear)):]
	}
}

// hello is the ClientHello that was recorded.
func (r *recorder) hello() (*tls13.Hello, error) {
	if len(r.b) < 5 {
		return nil, io.ErrUnexpectedEOF
	}
	n := min(len(r.b), 5+int(r.b[3])<<8+int(r.b[4]))
	return tls13.ParseHello(r.b[5:n])
}

// changed is a case with another ServerHello.
func changed(change func(h *tls13.Hellos)) func(*stage) error {
	return func(s *stage) error {
		v := s.server()
		v.Hello = change
		return s.lure(v)
	}
}

// downgraded gives random bytes; 32 of them at once end in the sentinel of a server that
// knows TLS 1.3 and was made to speak 1.2.
type downgraded struct{}

// Read implements io.Reader.
func (downgraded) Read(p []byte) (int, error) {
	rand.Read(p)
	if len(p) == 32 {
		copy(p[24:], "DOWNGRD\x01")
	}
	return len(p), nil
}

// sentinel plays TLS 1.2 to the end, as a man in the middle would who has taken TLS 1.3
// out of the ClientHello.
func sentinel(s *stage) error {
	rec, err := s.old(tls.VersionTLS12, downgraded{})
	if h, e := rec.hello(); e == nil && !slices.Contains(h.Versions, tls13.VersionTLS13) {
		return skipf("it does not offer TLS 1.3: there is nothing to downgrade from")
	}
	return err
}

// helloCases: a server whose hello is wrong, or which is none at all.
func helloCases() []Case {
	var cases []Case
	for _, c := range []struct {
		id    string
		suite uint16
	}{{"H4.chacha", 0x1303}, {"H4.ccm", 0x1304}, {"H4.ccm8", 0x1305}, {"H4.grease", 0x0a0a}, {"H4.null", 0}, {"H4.integrity-only", 0xc0b4}} {
		cases = append(cases, Case{ID: c.id, Does: fmt.Sprintf("a ServerHello with the suite %#04x", c.suite), Clause: "RFC 9846 4.2.3; RFC 8701",
			play: func(s *stage) error { return s.unoffered(c.suite) }})
	}
	cases = append(cases,
		Case{ID: "H4.aes256", Does: "TLS_AES_256_GCM_SHA384, spoken to the end", kind: rejectMCU, Clause: "RFC 9846 9.1", play: func(s *stage) error {
			v := s.server()
			v.Suite = tls13.AES256
			return s.lure(v)
		}},
		Case{ID: "H5.unoffered-group", Does: "a HelloRetryRequest for a group that was not offered", play: retry(0xfe00, 0)},
		Case{ID: "H5.no-change", Does: "a HelloRetryRequest that changes nothing", play: retryNothing},
		Case{ID: "H5.twice", Does: "two HelloRetryRequests", play: retryTwice},
		Case{ID: "H5.suite-changed", Does: "a HelloRetryRequest, then another suite", play: retrySuite},
		Case{ID: "H5.huge-cookie", Does: "a HelloRetryRequest with a cookie of 60,000 bytes", kind: survive, Expect: "echoes it or gives up, and comes back", play: hugeCookie},
		Case{ID: "H6.off-curve", Does: "a key share that is no point of the curve", Clause: "RFC 9846 4.3.8.2", play: onP256(flipLast)},
		Case{ID: "H6.infinity", Does: "a key share that is the point at infinity", Clause: "RFC 9846 4.3.8.2", play: infinity},
		Case{ID: "H6.short", Does: "a key share that is one byte short", Clause: "RFC 9846 4.3.8.2", play: onP256(func(b []byte) []byte { return b[:len(b)-1] })},
		Case{ID: "H6.declared", Does: "a key share declared as 65,535 bytes", Clause: "RFC 9846 4.3.8", play: declared},
		Case{ID: "H6.other-group", Does: "a key share of a group that the client sent none for", Clause: "RFC 9846 4.3.8", play: otherGroup},
		Case{ID: "H7.hello", Does: "an extension in ServerHello that nobody asked for", Clause: "RFC 9846 4.3", play: changed(func(h *tls13.Hellos) {
			h.Extensions = append(h.Extensions, tls13.Extension{Type: 0xfe01, Body: []byte{1}})
		})},
		Case{ID: "H7.encrypted", Does: "an extension in EncryptedExtensions that nobody asked for", Clause: "RFC 9846 4.3", play: func(s *stage) error {
			v := s.server()
			v.Encrypted = []tls13.Extension{{Type: 0xfe01, Body: []byte{1}}}
			return s.lure(v)
		}},
		Case{ID: "H7.alpn", Does: "a protocol (ALPN) that nobody asked for", Clause: "RFC 7301 3.2", play: func(s *stage) error {
			v := s.server()
			v.Encrypted = []tls13.Extension{{Type: tls13.ExtALPN, Body: []byte{0, 3, 2, 'h', '2'}}}
			return s.lure(v)
		}},
		Case{ID: "H7.compressed", Does: "a compressed certificate that nobody asked for", Clause: "RFC 8879 4", play: compressed},
		Case{ID: "H7.session", Does: "another session id than the client's", Clause: "RFC 9846 4.2.3", play: changed(func(h *tls13.Hellos) {
			h.Session = bytes.Repeat([]byte{7}, 32)
		})},
		Case{ID: "H8.across-keys", Does: "EncryptedExtensions in the clear, in the record of ServerHello", Clause: "RFC 9846 5.1", play: acrossKeys},
		Case{ID: "H8.data-first", Does: "application data before the handshake", Clause: "RFC 9846 5.1", play: dataFirst},
		Case{ID: "H8.two-hellos", Does: "two ServerHellos", Clause: "RFC 9846 4", play: twoHellos},
		Case{ID: "H8.late-ccs", Does: "ChangeCipherSpec after the handshake", Clause: "RFC 9846 5", kind: selfJudged, play: afterwards(func(s *stage) error {
			return s.WriteRaw([]byte{tls13.TypeCCS, 3, 3, 0, 1, 1})
		})},
		Case{ID: "H8.certificate-twice", Does: "two Certificate messages", Clause: "RFC 9846 4.5", play: twice(tls13.Certificate)},
		Case{ID: "H9.connack", Does: "a CONNACK in the clear", Clause: "RFC 9846 5", play: plain([]byte{0x20, 2, 0, 0, 0xd0, 0, 0xd0, 0})},
		Case{ID: "H9.http", Does: "an HTTP server", Clause: "RFC 9846 5", play: plain([]byte("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"))},
		Case{ID: "H9.noise", Does: "noise", Clause: "RFC 9846 5", play: plain(bytes.Repeat([]byte{0xa5, 0x5a, 0x17}, 400))},
	)
	return withDefaults(cases, toldToReject, "RFC 9846 4.2.4")
}

// unoffered names a suite and talks on under one that can be spoken.
func (s *stage) unoffered(suite uint16) error {
	h, err := s.ReadHello()
	if err != nil {
		return err
	}
	if slices.Contains(h.Suites, suite) {
		return skipf("it offers this suite, and may use it")
	}
	v := s.server()
	v.Hello = func(h *tls13.Hellos) { h.Suite = suite }
	return s.lureFrom(v, h)
}

func (s *stage) lureFrom(v *tls13.Server, h *tls13.Hello) error {
	p, err := s.held(v).From(s.Conn, h)
	s.p = p
	if err != nil {
		return err
	}
	return s.hear()
}

// spoilt changes the server's key share.
func spoilt(change func([]byte) []byte) func(*tls13.Hellos) {
	return func(h *tls13.Hellos) {
		for i, e := range h.Extensions {
			if e.Type == tls13.ExtKeyShare {
				point := change(e.Body[4:])
				h.Extensions[i].Body = append([]byte{e.Body[0], e.Body[1], byte(len(point) >> 8), byte(len(point))}, point...)
			}
		}
	}
}

// onP256 spoils a key share of P-256; any 32 bytes are one of X25519. The secret stays
// the one of the x coordinate, so that a client that looks at no more can go on.
func onP256(change func([]byte) []byte) func(*stage) error {
	return func(s *stage) error {
		h, err := s.ReadHello()
		if err != nil {
			return err
		}
		if h.Shares[tls13.GroupP256] == nil {
			if !slices.Contains(h.Groups, tls13.GroupP256) {
				return skipf("it does not speak P-256")
			}
			suite, err := suiteFor(h)
			if err != nil {
				return err
			}
			if h, err = retryRequest(s.Conn, h, suite, groupRequest(tls13.GroupP256)); err != nil {
				return err
			}
		}
		v := s.server()
		v.Group, v.Hello = tls13.GroupP256, spoilt(change)
		return s.lureFrom(v, h)
	}
}

// infinity goes on with the secret that a client without a check computes: zero.
func infinity(s *stage) error {
	v := s.server()
	v.Hello, v.Shared = spoilt(func(b []byte) []byte { return make([]byte, len(b)) }), make([]byte, 32)
	return s.lure(v)
}

func declared(s *stage) error {
	v := s.server()
	v.Hello = func(h *tls13.Hellos) {
		for i, e := range h.Extensions {
			if e.Type == tls13.ExtKeyShare {
				h.Extensions[i].Body = append([]byte{e.Body[0], e.Body[1], 0xff, 0xff}, e.Body[4:]...)
			}
		}
	}
	return s.lure(v)
}

func otherGroup(s *stage) error {
	h, err := s.ReadHello()
	if err != nil {
		return err
	}
	for _, g := range []uint16{tls13.GroupP384, tls13.GroupX25519, tls13.GroupP256} {
		if h.Shares[g] != nil {
			continue
		}
		v := s.server()
		v.Hello = func(o *tls13.Hellos) {
			for i, e := range o.Extensions {
				if e.Type == tls13.ExtKeyShare {
					o.Extensions[i].Body = append([]byte{byte(g >> 8), byte(g)}, e.Body[2:]...)
				}
			}
		}
		return s.lureFrom(v, h)
	}
	return skipf("it sends a share for every group that is spoken here")
}

func compressed(s *stage) error {
	v := s.server()
	v.Say = func(c *tls13.Conn, k byte, message []byte) error {
		if k != tls13.Certificate {
			return c.Say(message)
		}
		var b bytes.Buffer
		w := zlib.NewWriter(&b)
		if _, err := w.Write(message[4:]); err != nil {
			return err
		}
		if err := w.Close(); err != nil {
			return err
		}
		body := append([]byte{0, 1}, message[1:4]...) // zlib, and the length before
		body = append(body, 0, byte(b.Len()>>8), byte(b.Len()))
		return c.Say(tls13.Message(tls13.CompressedCert, append(body, b.Bytes()...)))
	}
	return s.lure(v)
}

func twice(kind byte) func(*stage) error {
	return func(s *stage) error {
		v := s.server()
		v.Say = func(c *tls13.Conn, k byte, message []byte) error {
			if k == kind {
				if err := c.Say(message); err != nil {
					return err
				}
			}
			return c.Say(message)
		}
		return s.lure(v)
	}
}

func acrossKeys(s *stage) error {
	v := s.server()
	v.Say = func(c *tls13.Conn, k byte, message []byte) error {
		switch k {
		case tls13.ServerHello:
			c.Count(message)
			return c.WriteHandshake(append(bytes.Clone(message), tls13.Message(tls13.EncryptedExtensions, []byte{0, 0})...))
		case tls13.EncryptedExtensions:
			c.Count(tls13.Message(tls13.EncryptedExtensions, []byte{0, 0}))
			return nil
		}
		return c.Say(message)
	}
	return s.lure(v)
}

func dataFirst(s *stage) error {
	h, err := s.ReadHello()
	if err != nil {
		return err
	}
	if err := s.WriteRecord(tls13.TypeData, []byte{0x20, 2, 0, 0}); err != nil {
		return err
	}
	return s.lureFrom(s.server(), h)
}

func twoHellos(s *stage) error {
	v := s.server()
	v.Say = func(c *tls13.Conn, k byte, message []byte) error {
		if k != tls13.ServerHello {
			return c.Say(message)
		}
		if err := c.Say(message); err != nil {
			return err
		}
		return c.WriteHandshake(message)
	}
	return s.lure(v)
}

// plain answers the ClientHello with something else than TLS. Whoever takes it for the
// broker's word goes on in the clear.
func plain(b []byte) func(*stage) error {
	return func(s *stage) error {
		if _, err := s.ReadHello(); err != nil {
			return err
		}
		if err := s.WriteRaw(b); err != nil {
			return err
		}
		buf := make([]byte, 1<<10)
		n, err := s.Raw.Read(buf)
		if n > 2 && (buf[0] < tls13.TypeCCS || buf[0] > tls13.TypeData || buf[1] != 3) {
			s.Seen.AppBytes, s.first = n, buf[:n]
			return nil
		}
		if s.Seen.End = err; n > 6 && buf[0] == tls13.TypeAlert {
			s.Seen.Alert = &tls13.Alert{Level: buf[5], Code: buf[6]}
			s.Seen.End = fmt.Errorf("%w: %v", tls13.ErrAlert, s.Seen.Alert)
		}
		return err
	}
}

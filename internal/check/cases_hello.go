package check

import (
	"bytes"
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
			Clause: "RFC 9846 4.2.2; RFC 8996; RFC 9325 3.1.1", play: func(s *stage) error { return s.old(old.version) }})
	}
	return append(cases,
		Case{ID: "H3.sentinel", Does: "a TLS 1.2 ServerHello to a client of 1.3, with the downgrade sentinel", Clause: "RFC 9846 4.2.3", play: sentinel},
		Case{ID: "H3.draft", Does: "a ServerHello of version 0x0305", Clause: "RFC 9846 4.3.1", play: changed(func(h *tls13.Hellos) {
			h.Extensions[0].Body = []byte{3, 5}
		})})
}

// old plays an older version with the standard library, so that a client that takes it
// is heard to talk.
func (s *stage) old(version uint16) error {
	rec := &recorder{Conn: s.Raw}
	c := tls.Server(rec, &tls.Config{MinVersion: version, MaxVersion: version, ClientAuth: tls.RequestClientCert,
		Certificates: []tls.Certificate{{Certificate: s.w.broker, PrivateKey: s.w.brokerKey}}, CipherSuites: allSuites(), SessionTicketsDisabled: true})
	err := c.Handshake()
	s.Seen.Hello = rec.n > 0
	s.note = "the standard library as the server: " + fmt.Sprint(err)
	if err != nil {
		s.Seen.End = endOf(err)
		return err
	}
	s.Seen.Finished = true
	s.Seen.Certificate = len(c.ConnectionState().PeerCertificates) > 0
	buf := make([]byte, 1<<10)
	n, err := c.Read(buf)
	s.Seen.AppBytes, s.first, s.Seen.End = n, buf[:n], err
	return err
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

// recorder counts what the client sends.
type recorder struct {
	net.Conn
	n int
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.n += n
	return n, err
}

// changed is a case with another ServerHello.
func changed(change func(h *tls13.Hellos)) func(*stage) error {
	return func(s *stage) error {
		v := s.server()
		v.Hello = change
		return s.lure(v)
	}
}

func sentinel(s *stage) error {
	h, err := s.ReadHello()
	if err != nil {
		return err
	}
	if !slices.Contains(h.Versions, 0x0303) {
		s.note = "it does not offer TLS 1.2"
	}
	random := append(make([]byte, 24), "DOWNGRD\x01"...)
	suite := uint16(0xc02b) // ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
	body := append([]byte{3, 3}, random...)
	body = append(body, 0, byte(suite>>8), byte(suite), 0, 0, 0)
	if err := s.WriteHandshake(append(tls13.Message(tls13.ServerHello, body), certificate12(s.w.broker)...)); err != nil {
		return err
	}
	// What a client that goes on would wait for, without a key to go with it.
	if err := s.WriteHandshake(tls13.Message(14, nil)); err != nil {
		return err
	}
	_, _, err = s.ReadRecord()
	return err
}

func certificate12(chain [][]byte) []byte {
	var list []byte
	for _, der := range chain {
		list = append(append(list, byte(len(der)>>16), byte(len(der)>>8), byte(len(der))), der...)
	}
	return tls13.Message(tls13.Certificate, append([]byte{byte(len(list) >> 16), byte(len(list) >> 8), byte(len(list))}, list...))
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
		Case{ID: "H6.off-curve", Does: "a key share that is no point of the curve", Clause: "RFC 9846 4.3.8.2", play: sharing(func(b []byte) []byte { return flipLast(b) })},
		Case{ID: "H6.infinity", Does: "a key share that is the point at infinity", Clause: "RFC 9846 4.3.8.2", play: sharing(func(b []byte) []byte { return make([]byte, len(b)) })},
		Case{ID: "H6.short", Does: "a key share that is one byte short", Clause: "RFC 9846 4.3.8.2", play: sharing(func(b []byte) []byte { return b[:len(b)-1] })},
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
		Case{ID: "H8.late-ccs", Does: "ChangeCipherSpec after the handshake", Clause: "RFC 9846 5", play: lateCCS, kind: selfJudged, Expect: "gives up, or passes over it"},
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
	p, err := v.From(s.Conn, h)
	s.p = p
	if err != nil {
		return err
	}
	return s.hear()
}

func sharing(change func([]byte) []byte) func(*stage) error {
	return changed(func(h *tls13.Hellos) {
		for i, e := range h.Extensions {
			if e.Type == tls13.ExtKeyShare {
				point := change(e.Body[4:])
				h.Extensions[i].Body = append([]byte{e.Body[0], e.Body[1], byte(len(point) >> 8), byte(len(point))}, point...)
			}
		}
	})
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
		body := append([]byte{0, 1, 0, byte(len(message) >> 8), byte(len(message)), 0, 0, 4}, 0x78, 0x9c, 3, 0)
		return c.Say(tls13.Message(tls13.CompressedCert, body))
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

// lateCCS: what a correct client does is not one thing; that it goes on as if nothing
// were is the worst that is allowed.
func lateCCS(s *stage) error {
	if err := s.welcome(); err != nil {
		return err
	}
	if err := s.WriteRaw([]byte{tls13.TypeCCS, 3, 3, 0, 1, 1}); err != nil {
		return err
	}
	s.Drain(s.limit / 2)
	if s.Seen.Alert != nil && s.Seen.Alert.Code != tls13.CloseNotify {
		return s.settle(Pass, "it gave up: %v", s.Seen.Alert)
	}
	return s.settle(Pass, "it took no notice: %s", s.Seen.EndText())
}

func plain(b []byte) func(*stage) error {
	return func(s *stage) error {
		if _, err := s.ReadHello(); err != nil {
			return err
		}
		if err := s.WriteRaw(b); err != nil {
			return err
		}
		if _, _, err := s.ReadRecord(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		_, _, err := s.ReadRecord()
		return err
	}
}

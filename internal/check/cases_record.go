package check

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"hawser/internal/check/tls13"
	"hawser/internal/mqtt"
)

func eachByte(b []byte) (parts [][]byte) {
	for i := range b {
		parts = append(parts, b[i:i+1])
	}
	return parts
}

const recordClause = "RFC 9846 5.1"

// recordCases: what a record may look like, and what not.
func recordCases() []Case {
	cases := []Case{
		{ID: "R1.bytes", Does: "an honest broker that sends one byte per TCP segment", kind: accept, Expect: "connects", play: func(s *stage) error {
			s.Cut, s.Pause = eachByte, time.Millisecond
			return s.welcome()
		}},
		{ID: "R1.fragments", Does: "an honest handshake in fragments of one byte", kind: accept, Expect: "connects", play: func(s *stage) error {
			s.Fragment = 1
			return s.welcome()
		}},
		{ID: "R1.padding", Does: "an honest broker that pads every record", kind: accept, Expect: "connects", Clause: "RFC 9846 5.4", play: func(s *stage) error {
			s.Padding = 64
			return s.welcome()
		}},
		{ID: "R1.coalesced", Does: "an honest flight in one record", kind: accept, Expect: "connects", play: coalesced},
		{ID: "R2.zero-handshake", Does: "a handshake record of length zero", play: func(s *stage) error {
			v := s.server()
			v.Say = func(c *tls13.Conn, k byte, m []byte) error {
				if k == tls13.Certificate {
					if err := c.WriteRecord(tls13.TypeHandshake, nil); err != nil {
						return err
					}
				}
				return c.Say(m)
			}
			return s.lure(v)
		}},
		{ID: "R2.zero-data", Does: "application data of length zero before CONNACK", kind: selfJudged, Expect: "goes on", play: unmoved(func(s *stage) error {
			return s.WriteRecord(tls13.TypeData, nil)
		})},
		{ID: "R3.over-plain", Does: "a record of more than 2^14 bytes of content", play: inPlace(func(s *stage) error {
			return s.WriteRecord(tls13.TypeData, s.large(1<<14+1))
		}), kind: selfJudged},
		{ID: "R3.over-limit", Does: "a record over its record_size_limit", Clause: "RFC 8449 4", play: overLimit, kind: selfJudged},
		{ID: "R3.over-cipher", Does: "a record of more than 2^14 + 256 bytes", Clause: "RFC 9846 5.2", kind: selfJudged, play: inPlace(overCipher)},
		{ID: "R3.bad-tag", Does: "a record whose tag is wrong", Clause: "RFC 9846 5.2", kind: selfJudged, play: inPlace(func(s *stage) error {
			return s.WriteRaw(flipLast(s.Sealed(tls13.TypeData, s.connack())))
		})},
		{ID: "R3.replay", Does: "a record that is sent twice", Clause: "RFC 9846 5.3", kind: selfJudged, play: afterwards(func(s *stage) error {
			r := s.Sealed(tls13.TypeData, nil)
			return s.WriteRaw(append(bytes.Clone(r), r...))
		})},
		{ID: "R3.clear", Does: "application data in the clear after the handshake", Clause: "RFC 9846 5.2", kind: selfJudged, play: inPlace(func(s *stage) error {
			b := s.connack()
			return s.WriteRaw(append([]byte{tls13.TypeData, 3, 3, 0, byte(len(b))}, b...))
		})},
		{ID: "R3.clear-handshake", Does: "a handshake message in the clear after the handshake", Clause: "RFC 9846 5", kind: selfJudged, play: afterwards(func(s *stage) error {
			return s.WriteRaw([]byte{tls13.TypeHandshake, 3, 3, 0, 4, 24, 0, 0, 0})
		})},
		{ID: "R3.no-type", Does: "a record of nothing but padding", Clause: "RFC 9846 5.4", kind: selfJudged, play: afterwards(func(s *stage) error {
			return s.WriteRecord(0, make([]byte, 20))
		})},
	}
	return withDefaults(append(cases, keyCases()...), toldToReject, recordClause)
}

// early does something after the handshake and hears CONNECT.
func (s *stage) early(do func() error) error {
	if err := s.shake(s.server()); err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	return s.hear()
}

// wary is early, and then the client is welcome.
func (s *stage) wary(do func() error) error {
	if err := s.early(do); err != nil {
		return err
	}
	return s.send(&mqtt.Connack{})
}

// unmoved does something that is allowed before CONNACK; the client must go on. That it
// has sent CONNECT says nothing: it need not have read by then.
func unmoved(do func(s *stage) error) func(*stage) error {
	return func(s *stage) error {
		if err := s.wary(func() error { return do(s) }); err != nil {
			return err
		}
		err := s.attend(s.limit/2, func(mqtt.Header) bool { return true })
		if err == nil {
			return s.settle(Pass, "it goes on")
		}
		if s.gave() {
			return s.settle(Fail, "it ended the connection, %s, though nothing was wrong", s.Seen.EndText())
		}
		return s.settle(Pass, "it stays")
	}
}

func (s *stage) connack() []byte { return (&mqtt.Connack{}).Append(nil, s.version) }

// large is CONNACK and a PUBLISH, n bytes in all: a client that takes it goes on.
func (s *stage) large(n int) []byte {
	b := s.connack()
	p := &mqtt.Publish{Topic: []byte("check"), Payload: make([]byte, max(0, n-len(b)-16))}
	p.Payload = make([]byte, len(p.Payload)+n-len(b)-mqtt.PublishSize(s.version, p))
	return mqtt.AppendPublish(b, s.version, p)
}

// overCipher is a CONNACK with so much padding that its record is one byte too long.
func overCipher(s *stage) error {
	b := s.connack()
	s.Padding = 1<<14 + 257 - 16 - 1 - len(b)
	defer func() { s.Padding = 0 }()
	return s.WriteRecord(tls13.TypeData, b)
}

func coalesced(s *stage) error {
	v := s.server()
	var gathered []byte
	v.Say = func(c *tls13.Conn, k byte, m []byte) error {
		if k == tls13.ServerHello {
			return c.Say(m)
		}
		c.Count(m)
		if gathered = append(gathered, m...); k != tls13.Finished {
			return nil
		}
		return c.WriteHandshake(gathered)
	}
	if err := s.shake(v); err != nil {
		return err
	}
	return s.hear()
}

// afterwards does something that a client must end the connection for, after CONNECT,
// and welcomes it then: one that took no notice goes on, and is seen to.
func afterwards(do func(s *stage) error) func(*stage) error {
	return inPlace(func(s *stage) error {
		if err := do(s); err != nil {
			return err
		}
		return s.send(&mqtt.Connack{})
	})
}

// inPlace is afterwards without the welcome: what is done holds a CONNACK, for those
// that take it.
func inPlace(do func(s *stage) error) func(*stage) error {
	return func(s *stage) error {
		if err := s.lure(s.server()); err != nil {
			return err
		}
		return s.provoke(do)
	}
}

// provoke does something in place of CONNACK and judges by what comes then.
func (s *stage) provoke(do func(s *stage) error) error {
	sent := s.Seen.AppBytes
	_ = do(s) // it may have gone in the middle of it: how it went is judged
	s.Drain(s.limit)
	switch {
	case s.Seen.Alert != nil && s.Seen.Alert.Code != tls13.CloseNotify:
		return s.settle(Pass, "it ended the connection: %v", s.Seen.Alert)
	case s.Seen.AppBytes > sent:
		return s.settle(Fail, "it went on: %d more bytes", s.Seen.AppBytes-sent)
	case s.Seen.Foreign > 0:
		return s.settle(Fail, "it went on, under keys of its own: %d bytes", s.Seen.Foreign)
	case s.Seen.Later > 0:
		return s.settle(Fail, "it went on: %d handshake messages", s.Seen.Later)
	case s.gave():
		return s.settle(Pass, "it ended the connection: %s", s.Seen.EndText())
	}
	return s.settle(Inconclusive, "it neither went on nor gave up while the check waited")
}

func overLimit(s *stage) error {
	h, err := s.ReadHello()
	if err != nil {
		return err
	}
	if h.RecordLimit == 0 {
		return skipf("it sets no record_size_limit")
	}
	v := s.server()
	v.Encrypted = []tls13.Extension{{Type: tls13.ExtRecordLimit, Body: []byte{0x40, 0}}}
	if err := s.lureFrom(v, h); err != nil {
		return err
	}
	s.note = fmt.Sprintf("its limit is %d", h.RecordLimit) // the type of the content counts (RFC 8449 4)
	return s.provoke(func(s *stage) error { return s.WriteRecord(tls13.TypeData, s.large(h.RecordLimit)) })
}

// keyCases: messages after the handshake.
func keyCases() []Case {
	update := "RFC 9846 4.7.3"
	return []Case{
		{ID: "R4.update", Does: "a KeyUpdate that asks for the client's own, before CONNACK", kind: survive, Clause: update,
			Expect: "goes on under new keys, or reconnects in order (mbedTLS knows no KeyUpdate)", play: func(s *stage) error {
				return s.wary(func() error { return s.UpdateKey(true) })
			}},
		{ID: "R4.early", Does: "a KeyUpdate in the middle of the handshake", Clause: update, play: func(s *stage) error {
			v := s.server()
			v.Say = func(c *tls13.Conn, k byte, m []byte) error {
				if k == tls13.Certificate {
					if err := c.WriteHandshake(tls13.Message(tls13.KeyUpdate, []byte{0})); err != nil {
						return err
					}
				}
				return c.Say(m)
			}
			return s.lure(v)
		}},
		{ID: "R4.malformed", Does: "a KeyUpdate with a value that does not exist", Clause: update, kind: selfJudged, play: afterwards(func(s *stage) error {
			if err := s.WriteHandshake(tls13.Message(tls13.KeyUpdate, []byte{7})); err != nil {
				return err
			}
			return s.NextKey() // one that takes it does so too
		})},
		{ID: "R4.flood", Does: "1,000 KeyUpdates", kind: survive, Clause: update + "; CVE-2018-12404 class", Expect: "goes on or gives up, and comes back", play: func(s *stage) error {
			return s.wary(func() error { return s.times(1000, func(int) error { return s.UpdateKey(false) }) })
		}},
		{ID: "R5.one", Does: "a NewSessionTicket", kind: selfJudged, Clause: "RFC 9846 4.7.1", Expect: "goes on", play: unmoved(tickets(1))},
		{ID: "R5.four", Does: "4 NewSessionTickets", kind: selfJudged, Clause: "RFC 9846 4.7.1", Expect: "goes on", play: unmoved(tickets(4))},
		{ID: "R5.flood", Does: "1,000 NewSessionTickets", kind: survive, Clause: "RFC 9846 4.7.1", Expect: "goes on or gives up, and comes back", play: func(s *stage) error {
			return s.wary(func() error { return tickets(1000)(s) })
		}},
		{ID: "R6.hello-request", Does: "a HelloRequest of TLS 1.2 after the handshake", kind: selfJudged, Clause: "RFC 9846 4", play: afterwards(func(s *stage) error {
			return s.WriteHandshake(tls13.Message(0, nil))
		})},
		{ID: "R6.certificate-request", Does: "a CertificateRequest after the handshake, without post_handshake_auth", kind: selfJudged, Clause: "RFC 9846 4.7.2",
			play: postHandshake},
		{ID: "R6.server-hello", Does: "a ServerHello after the handshake", kind: selfJudged, Clause: "RFC 9846 4", play: afterwards(func(s *stage) error {
			return s.WriteHandshake(tls13.Message(tls13.ServerHello, make([]byte, 40)))
		})},
	}
}

func (s *stage) times(n int, do func(i int) error) error {
	for i := range n {
		if err := do(i); err != nil {
			return err
		}
	}
	return nil
}

// ticket is a NewSessionTicket of a week.
func ticket(i int, ext []byte) []byte {
	b := []byte{0, 9, 0x3a, 0x80, 1, 2, 3, byte(i), 2, byte(i >> 8), byte(i), 0, 32}
	b = append(b, bytes.Repeat([]byte{byte(i)}, 32)...)
	b = append(b, byte(len(ext)>>8), byte(len(ext)))
	return tls13.Message(tls13.NewSessionTicket, append(b, ext...))
}

func tickets(n int) func(*stage) error {
	return func(s *stage) error {
		return s.times(n, func(i int) error { return s.WriteHandshake(ticket(i, nil)) })
	}
}

func postHandshake(s *stage) error {
	h, err := s.ReadHello()
	if err != nil {
		return err
	}
	if h.Has(49) { // post_handshake_auth
		return skipf("it offers post_handshake_auth, and may answer")
	}
	if err := s.lureFrom(s.server(), h); err != nil {
		return err
	}
	body := []byte{4, 1, 2, 3, 4, 0, 8, 0, 13, 0, 4, 0, 2, 4, 3}
	return s.provoke(func(s *stage) error {
		if err := s.WriteHandshake(tls13.Message(tls13.CertificateRequest, body)); err != nil {
			return err
		}
		return s.send(&mqtt.Connack{})
	})
}

// flights are the points at which a server can fall silent or go.
func flights() []struct {
	name string
	upTo func(s *stage) error
} {
	return []struct {
		name string
		upTo func(s *stage) error
	}{
		{"tcp", func(*stage) error { return nil }},
		{"hello", func(s *stage) error { _, err := s.ReadHello(); return err }},
		{"certificate", func(s *stage) error { return s.partly(tls13.CertificateVerify) }},
		{"finished", func(s *stage) error {
			if err := s.shake(s.server()); err != nil {
				return err
			}
			return s.hear()
		}},
	}
}

var errPartly = errors.New("as far as was wanted")

// partly plays the server and stops before a message of that kind.
func (s *stage) partly(kind byte) error {
	v := s.server()
	v.Say = func(c *tls13.Conn, k byte, m []byte) error {
		if k == kind {
			return errPartly
		}
		return c.Say(m)
	}
	if err := s.shake(v); !errors.Is(err, errPartly) {
		return err
	}
	return nil
}

// stallCases: a server that goes away, politely or not, at every flight.
func stallCases() []Case {
	var cases []Case
	clause := "RFC 9846 6.1; RFC 9293 3.10"
	for _, f := range flights() {
		cases = append(cases,
			Case{ID: "R7.stall-" + f.name, Does: "silence " + whenText(f.name), kind: silence, Expect: "gives up by its own time-out and tries again", Clause: clause, play: f.upTo},
			Case{ID: "R7.rst-" + f.name, Does: "a reset " + whenText(f.name), kind: selfJudged, Expect: "tries again", Clause: clause, play: gone(f.upTo, true)},
			Case{ID: "R7.fin-" + f.name, Does: "the end of TCP without close_notify " + whenText(f.name), kind: selfJudged, Expect: "tries again", Clause: clause, play: gone(f.upTo, false)})
	}
	return append(cases, Case{ID: "R7.half-open", Does: "the broker's half of TCP closed after CONNACK, the client's left open", kind: selfJudged, Needs: "stays",
		Expect: "ends the connection", Clause: clause, play: halfOpen})
}

func whenText(flight string) string {
	return map[string]string{"tcp": "after the TCP connect", "hello": "after the ClientHello", "certificate": "after Certificate",
		"finished": "after CONNECT"}[flight]
}

// gone ends the connection; that the client comes back is what is looked at next.
func gone(upTo func(*stage) error, reset bool) func(*stage) error {
	return func(s *stage) error {
		if err := upTo(s); err != nil {
			return fmt.Errorf("before the provocation: %w", err)
		}
		if t, ok := s.Raw.(*net.TCPConn); ok && reset {
			if err := t.SetLinger(0); err != nil {
				return err
			}
		}
		s.Raw.Close()
		return s.settle(Pass, "the connection was ended on it")
	}
}

func halfOpen(s *stage) error {
	if err := s.welcome(); err != nil {
		return err
	}
	t, ok := s.Raw.(*net.TCPConn)
	if !ok {
		return errors.New("not a TCP connection")
	}
	if err := t.CloseWrite(); err != nil {
		return err
	}
	began := time.Now()
	s.Drain(s.limit)
	if !s.gave() {
		return s.settle(Fail, "it did not notice within %v that the broker had gone", s.limit)
	}
	return s.settle(Pass, "it ended the connection after %v", time.Since(began).Round(time.Millisecond))
}

// rolloverCases: what is left after roots have changed, and short cuts.
func rolloverCases() []Case {
	cases := []Case{
		{ID: "C1.stale-root", Does: "a leaf under a root that was replaced before this client was made", Clause: "design of anchor sets; RFC 5280 6.1", play: issuedBy(func(w *World) (*authority, [][]byte, error) {
			ca, err := newAuthority(strings.Replace(w.rootA.name.CommonName, "A", "Z", 1))
			return ca, [][]byte{ca.der}, err
		})},
		{ID: "C1.standby-root", Does: "an honest leaf under the second pinned root", kind: accept, Expect: "connects: that root was pinned for this day", play: func(s *stage) error {
			leaf, err := s.w.leaf(s.w.rootB, s.w.brokerKey.Public(), nil)
			if err != nil {
				return err
			}
			return s.pose([][]byte{leaf}, s.w.brokerKey)
		}},
		{ID: "C2.early-data", Does: "a ticket that allows 0-RTT, then a second connection", kind: selfJudged, Clause: "RFC 9846 2.3, 8; RFC 9325 3.4", Needs: "stays",
			Expect: "sends no early data", play: bait([]byte{0, 42, 0, 4, 0xff, 0xff, 0xff, 0xff})},
		{ID: "C2.psk-chosen", Does: "a ServerHello that chooses a PSK that was not offered", Clause: "RFC 9846 4.3.11", play: changed(func(h *tls13.Hellos) {
			h.Extensions = append(h.Extensions, tls13.Extension{Type: tls13.ExtPSK, Body: []byte{0, 0}})
		})},
		{ID: "C2.early-accepted", Does: "early data accepted that was not offered", Clause: "RFC 9846 4.3.10", play: func(s *stage) error {
			v := s.server()
			v.Encrypted = []tls13.Extension{{Type: tls13.ExtEarlyData}}
			return s.lure(v)
		}},
	}
	return withDefaults(cases, toldToReject, chainClause)
}

// bait hands out a ticket and looks at how the client comes back.
func bait(ext []byte) func(*stage) error {
	return func(s *stage) error {
		if err := s.wary(func() error { return s.WriteHandshake(ticket(1, ext)) }); err != nil {
			return err
		}
		s.Raw.Close()
		next, err := s.again(s.ctx)
		if err != nil {
			return s.absent(err)
		}
		defer next.Raw.Close()
		h, err := next.ReadHello()
		if err != nil {
			return err
		}
		if h.Early {
			return s.settle(Fail, "it offers early data: what it sends first can be replayed")
		}
		if h.PSK {
			return s.settle(Pass, "it offers to resume, without early data")
		}
		return s.settle(Pass, "it makes a full handshake")
	}
}

package check

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"
)

// subject is a client under test: a device that connects, subscribes to its commands,
// publishes, pings, and comes back whatever happens, if nothing is wrong with it.
type subject struct {
	flaws
	w     *World
	addr  string
	slow  bool                             // wait before a reconnect as a device in the field does
	dial  func(raw net.Conn) (talk, error) // another TLS than the test's own; nil: that
	ran   map[string]int                   // how often each command ran, by its number
	ctx   context.Context
	count int  // connections so far
	dies  bool // a crash ends the process
}

// talk is a connection that carries application data.
type talk interface {
	data() ([]byte, error)
	write(kind byte, b []byte) error
}

// patience is how long the subject waits for any answer.
const patience = 3 * time.Second

// run connects until ctx ends, or until the subject has broken for good.
func (s *subject) run(ctx context.Context) {
	defer func() {
		if s.dies {
			return
		}
		_ = recover() // it has crashed: nobody starts it again
	}()
	s.ctx, s.ran = ctx, map[string]int{}
	for n := 0; ctx.Err() == nil; n++ {
		began := time.Now()
		err := s.once(ctx)
		if s.gone(err) {
			return
		}
		if time.Since(began) > 5*time.Second {
			n = 0
		}
		if !s.pause(ctx, n) {
			return
		}
	}
}

// gone reports whether it gives up for good after err.
func (s *subject) gone(err error) bool {
	lost := errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrUnexpectedEOF)
	var no notWelcome
	return s.flaws["no-retry"] && lost || errors.As(err, &no) && s.flaws[fmt.Sprintf("no-retry-%d", byte(no))]
}

// pause is the wait before attempt n+1.
func (s *subject) pause(ctx context.Context, n int) bool {
	d := 2 * time.Millisecond
	if s.slow {
		d = time.Duration(float64(time.Second) * (1.02 + rand.Float64()/10) * pow(1.35, min(n, 8)))
	}
	switch {
	case s.slow && s.flaws["no-backoff"]:
		d = 2 * time.Millisecond
	case s.slow && s.flaws["flat-backoff"]:
		d = 1100 * time.Millisecond
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func pow(x float64, n int) float64 {
	y := 1.0
	for range n {
		y *= x
	}
	return y
}

// once is one connection.
func (s *subject) once(ctx context.Context) error {
	var d net.Dialer
	raw, err := d.DialContext(ctx, "tcp", s.addr)
	if err != nil {
		return err
	}
	defer raw.Close()
	defer context.AfterFunc(ctx, func() { raw.Close() })()
	s.count++
	if s.flaws["forgets"] {
		s.ran = map[string]int{}
	}
	if !s.flaws["waits-for-ever"] {
		raw.SetDeadline(time.Now().Add(patience))
	}
	t, err := s.connect(raw)
	if err != nil {
		return err
	}
	m := &session{subject: s, talk: t, raw: raw}
	return m.run()
}

func (s *subject) connect(raw net.Conn) (talk, error) {
	if s.dial != nil {
		return s.dial(raw)
	}
	t := &wire{flaws: s.flaws, w: s.w, raw: raw, early: s.count > 1 && s.flaws["early-data"]}
	err := t.shake()
	switch {
	case errors.Is(err, errNoTLS) && s.flaws["plain-fallback"]:
		return clear{raw}, nil
	case err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded):
		t.alert(40)
	}
	return t, err
}

// clear is a connection without TLS.
type clear struct{ raw net.Conn }

func (c clear) data() ([]byte, error) {
	b := make([]byte, 1<<10)
	n, err := c.raw.Read(b)
	return b[:n], err
}

func (c clear) write(_ byte, b []byte) error { _, err := c.raw.Write(b); return err }

// session is one MQTT connection of the subject, of version 3.1.1.
type session struct {
	*subject
	talk
	raw     net.Conn
	b       []byte
	welcome bool
	waits   map[uint16]string // what is not acknowledged yet, by packet id
	since   time.Time         // since when something is waited for; zero: nothing is
	pinged  time.Time
	ids     uint16
	retain  int
}

// notWelcome is the code of a CONNACK that refuses.
type notWelcome byte

// Error implements error.
func (n notWelcome) Error() string { return fmt.Sprintf("the broker refuses: %d", byte(n)) }

func (m *session) put(kind byte, body []byte) error {
	head := []byte{kind}
	for n := len(body); ; {
		b := byte(n & 127)
		if n >>= 7; n > 0 {
			b |= 128
		}
		if head = append(head, b); n == 0 {
			break
		}
	}
	return m.write(23, append(head, body...))
}

// expect starts the clock of an answer, without that flaw.
func (m *session) expect(flaw string) {
	if m.since.IsZero() && !m.flaws[flaw] {
		m.since = time.Now()
	}
}

func text(s string) []byte { return append([]byte{byte(len(s) >> 8), byte(len(s))}, s...) }

func (m *session) run() error {
	m.waits = map[uint16]string{}
	connect := append(append(text("MQTT"), 4, 2, 0, 60), text(m.w.Device.String())...)
	if err := m.put(0x10, connect); err != nil {
		return err
	}
	m.since = time.Now()
	for {
		m.deadline()
		b, err := m.data()
		if m.flaws["ignores-end"] && errors.Is(err, io.EOF) {
			<-m.ctx.Done()
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = m.idle()
		}
		if errors.Is(err, errRefuse) {
			_ = m.write(21, []byte{2, 10}) // it goes anyway
		}
		if err != nil {
			return err
		}
		m.b = append(m.b, b...)
		if err := m.packets(); err != nil {
			return err
		}
	}
}

// quiet is after how long without a word it pings.
const quiet = 250 * time.Millisecond

func (m *session) deadline() {
	if m.flaws["waits-for-ever"] {
		m.raw.SetDeadline(time.Now().Add(quiet)) // it goes on pinging
		return
	}
	at := time.Now().Add(quiet)
	for _, since := range []time.Time{m.since, m.pinged} {
		if last := since.Add(patience); !since.IsZero() && last.Before(at) {
			at = last
		}
	}
	m.raw.SetDeadline(at)
}

// idle is what happens when nothing came.
func (m *session) idle() error {
	m.raw.SetDeadline(time.Now().Add(patience))
	for _, since := range []time.Time{m.since, m.pinged} {
		if !since.IsZero() && time.Since(since) >= patience && !m.flaws["waits-for-ever"] {
			return errors.New("no answer")
		}
	}
	if !m.welcome || !m.pinged.IsZero() {
		return nil
	}
	if !m.flaws["waits-pingresp"] {
		m.pinged = time.Now()
	}
	return m.put(0xc0, nil)
}

// packets takes what is whole.
func (m *session) packets() error {
	for {
		n, used, err := m.length()
		if err != nil || used == 0 {
			return err
		}
		if n > 64<<10 {
			if m.flaws["trusts-length"] {
				panic("no memory for this packet")
			}
			return refuse("a packet of %d bytes", n)
		}
		if len(m.b) < used+n {
			return nil
		}
		head, body := m.b[0], m.b[used:used+n]
		m.b = m.b[used+n:]
		if err := m.packet(head, body); err != nil {
			return err
		}
	}
}

// length reads the remaining length. used is 0 while it is not all there.
func (m *session) length() (n, used int, err error) {
	for i := 1; i < len(m.b); i++ {
		n |= int(m.b[i]&127) << (7 * (i - 1))
		if m.b[i] < 128 {
			if i > 4 {
				panic("a length that does not fit") // with long-length alone
			}
			return n, i + 1, nil
		}
		if i == 4 && !m.flaws["long-length"] {
			return 0, 0, refuse("a length of more than four bytes")
		}
	}
	return 0, 0, nil
}

func (m *session) packet(head byte, body []byte) error {
	if !m.welcome && head>>4 != 2 {
		if m.flaws["early-crash"] {
			panic("no session yet")
		}
		return refuse("packet %#02x before CONNACK", head)
	}
	if head>>4 != 3 && head&15 != 0 {
		if m.flaws["flags-crash"] {
			panic("no handler for these flags")
		}
		return refuse("reserved flags")
	}
	switch head >> 4 {
	case 2:
		return m.connack(body)
	case 3:
		return m.publish(head, body)
	case 4, 9:
		return m.acknowledged(head>>4, body)
	case 13:
		m.pinged = time.Time{}
		return nil
	}
	if m.flaws["type-crash"] {
		panic("no handler for this type")
	}
	return refuse("packet %#02x", head)
}

func (m *session) connack(body []byte) error {
	if len(body) != 2 && !m.flaws["connack-crash"] || m.welcome {
		return refuse("CONNACK")
	}
	if body[1] != 0 { // beyond the end with connack-crash
		return notWelcome(body[1])
	}
	m.welcome, m.since = true, time.Time{}
	if m.flaws["believes-session"] && body[0] == 1 {
		return nil
	}
	m.ids++
	m.waits[m.ids] = "SUBACK"
	m.expect("waits-suback")
	if err := m.put(0x82, append([]byte{0, byte(m.ids)}, append(text("private/"+m.w.Device.String()+"/d/#"), 1)...)); err != nil {
		return err
	}
	return m.tell("u/state", "on")
}

// tell publishes with QoS 1.
func (m *session) tell(topic, payload string) error {
	m.ids++
	m.waits[m.ids] = "PUBACK"
	m.expect("waits-puback")
	b := append(text("private/"+m.w.Device.String()+"/"+topic), byte(m.ids>>8), byte(m.ids))
	return m.put(0x32, append(b, payload...))
}

func (m *session) acknowledged(kind byte, body []byte) error {
	if len(body) < 2 {
		return refuse("an acknowledgement")
	}
	id := uint16(body[0])<<8 | uint16(body[1])
	what := m.waits[id]
	if what != map[byte]string{4: "PUBACK", 9: "SUBACK"}[kind] {
		if m.flaws["suback-id-crash"] {
			panic("no such subscription")
		}
		return refuse("an acknowledgement of nothing")
	}
	if kind == 9 {
		if len(body) < 3 && !m.flaws["suback-crash"] {
			return refuse("SUBACK")
		}
		if body[2] > 2 && m.flaws["suback-refused-crash"] {
			panic("no such QoS")
		}
	}
	delete(m.waits, id)
	m.since = time.Time{}
	for _, what := range m.waits { // the next one has its time from now on
		m.expect(map[string]string{"PUBACK": "waits-puback", "SUBACK": "waits-suback"}[what])
	}
	return nil
}

func (m *session) publish(head byte, body []byte) error {
	qos := head >> 1 & 3
	if qos == 3 {
		if m.flaws["qos-crash"] {
			panic("no such QoS")
		}
		return refuse("QoS 3")
	}
	if len(body) < 2 {
		return refuse("PUBLISH")
	}
	n := int(body[0])<<8 | int(body[1])
	if n+2 > len(body) && !m.flaws["trusts-topic"] {
		return refuse("a topic longer than its packet")
	}
	topic, rest := string(body[2:2+n]), body[2+n:] // beyond the end with trusts-topic
	switch odd := strings.ContainsAny(topic, "#+"); {
	case !utf8.ValidString(topic) && m.flaws["utf8-crash"], odd && m.flaws["wildcard-crash"]:
		panic("a topic that is none")
	case !utf8.ValidString(topic) || odd:
		return refuse("a topic that is none")
	}
	if m.retain += int(head & 1); m.retain > 500 && m.flaws["retained-crash"] {
		panic("no room for a message")
	}
	if qos == 1 && len(rest) >= 2 {
		if err := m.put(0x40, rest[:2]); err != nil {
			return err
		}
		rest = rest[2:]
	}
	return m.command(topic, rest)
}

// command runs a command once, if it is one and for this device.
func (m *session) command(topic string, payload []byte) error {
	mine := topic == "private/"+m.w.Device.String()+"/d/cmd" || m.flaws["any-topic"] || m.flaws["any-device"] && strings.HasSuffix(topic, "/d/cmd")
	_, cid, ok := bytes.Cut(payload, []byte(`"cid":"`))
	cid, _, whole := bytes.Cut(cid, []byte(`"`))
	if !mine || !ok || !whole {
		return nil
	}
	status := "done"
	if m.ran[string(cid)] > 0 && !m.flaws["runs-twice"] {
		status = "duplicate"
	} else {
		m.ran[string(cid)]++
	}
	return m.tell("u/cmd", fmt.Sprintf(`{"cid":"%s","status":"%s"}`, cid, status))
}

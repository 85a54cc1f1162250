// Package tls13 is a TLS 1.3 stack for provoking the other side: it can speak the
// protocol correctly in both roles, and it can say anything wrong on purpose.
//
// It promises:
//   - Without a change asked for, it is a correct peer (RFC 9846) with full handshakes,
//     client certificates, the groups P-256 and X25519 and the two AES-GCM suites.
//   - Each message can be replaced, left out, repeated or cut up by the caller, and the
//     rest of the handshake goes on as well as it can: keys follow what was really sent.
//   - What the other side did is written down as it happens: how far it came, its alert,
//     how the connection ended, how many bytes of application data it sent.
//   - Nothing that arrives is believed: lengths are bounded before memory is taken, and
//     every read ends with its deadline.
//
// It is no library for protecting anything: it keeps secrets in plain memory, and is
// not careful with time.
package tls13

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// Content types (RFC 9846 5.1).
const (
	TypeCCS       byte = 20
	TypeAlert     byte = 21
	TypeHandshake byte = 22
	TypeData      byte = 23
)

// Handshake types (RFC 9846 4).
const (
	ClientHello         byte = 1
	ServerHello         byte = 2
	NewSessionTicket    byte = 4
	EndOfEarlyData      byte = 5
	EncryptedExtensions byte = 8
	Certificate         byte = 11
	CertificateRequest  byte = 13
	CertificateVerify   byte = 15
	Finished            byte = 20
	KeyUpdate           byte = 24
	CompressedCert      byte = 25
)

const (
	maxRecord    = 1<<14 + 256 // ciphertext of one record
	maxHandshake = 1 << 17     // bytes of one message that are gathered
)

// Alert is what the other side sent before it gave up.
type Alert struct {
	Level, Code byte
	Protected   bool // it was encrypted: the peer had derived the handshake keys
}

// CloseNotify is the alert that ends a connection in order.
const CloseNotify = 0

func (a *Alert) String() string {
	if a == nil {
		return "no alert"
	}
	return fmt.Sprintf("alert %s", alertName(a.Code))
}

func alertName(code byte) string {
	names := map[byte]string{0: "close_notify", 10: "unexpected_message", 20: "bad_record_mac", 22: "record_overflow",
		40: "handshake_failure", 42: "bad_certificate", 43: "unsupported_certificate", 44: "certificate_revoked",
		45: "certificate_expired", 46: "certificate_unknown", 47: "illegal_parameter", 48: "unknown_ca", 49: "access_denied",
		50: "decode_error", 51: "decrypt_error", 70: "protocol_version", 71: "insufficient_security", 80: "internal_error",
		86: "inappropriate_fallback", 90: "user_canceled", 109: "missing_extension", 110: "unsupported_extension",
		112: "unrecognized_name", 113: "bad_certificate_status_response", 116: "certificate_required", 120: "no_application_protocol"}
	if n, ok := names[code]; ok {
		return n
	}
	return fmt.Sprintf("number %d", code)
}

// Seen is what the other side has done so far.
type Seen struct {
	Hello       bool // its hello parsed
	Certificate bool // a client's certificate message with a certificate in it
	Verify      bool // CertificateVerify
	Finished    bool
	AppBytes    int // plaintext bytes of application data
	Foreign     int // bytes of protected records under keys that are not ours, alerts left out
	Later       int // handshake messages after the handshake that are no KeyUpdate
	Alert       *Alert
	End         error // why reading ended; nil while it goes on
}

// Farthest names the last thing that the other side sent.
func (s *Seen) Farthest() string {
	switch {
	case s.AppBytes > 0:
		return "application data"
	case s.Foreign > 0:
		return "records under keys of its own"
	case s.Finished:
		return "Finished"
	case s.Verify:
		return "CertificateVerify"
	case s.Certificate:
		return "Certificate"
	case s.Hello:
		return "ClientHello"
	}
	return "nothing"
}

// EndText says how the connection ended, as far as was seen.
func (s *Seen) EndText() string {
	switch {
	case s.Alert != nil && s.Alert.Code != CloseNotify:
		return s.Alert.String()
	case s.End == nil:
		return "still open"
	case errors.Is(s.End, io.EOF), errors.Is(s.End, io.ErrUnexpectedEOF):
		return "closed"
	case errors.Is(s.End, syscall.ECONNRESET), errors.Is(s.End, syscall.EPIPE):
		return "reset"
	case errors.Is(s.End, os.ErrDeadlineExceeded):
		return "silence"
	}
	return s.End.Error()
}

// Conn is one connection in either role.
type Conn struct {
	Raw  net.Conn
	Seen Seen

	// Cut cuts what is written into TCP writes; nil writes each record whole.
	Cut func(record []byte) [][]byte
	// Pause is how long to wait before each of the first parts of a record, which hold its
	// header: without it the network puts them together again.
	Pause time.Duration
	// Fragment is how many bytes of handshake data go into one record; 0 is as many as fit.
	Fragment int
	// Padding is how many zeros follow the content of each protected record (RFC 9846 5.4).
	Padding int

	in, out    half
	keys       schedule
	transcript []byte // every handshake message, in order
	pending    []byte // handshake bytes read and not parsed
	retried    int    // HelloRetryRequests sent
}

func header(kind byte, n int) []byte {
	return []byte{kind, 3, 3, byte(n >> 8), byte(n)}
}

// Message puts a handshake header before body.
func Message(kind byte, body []byte) []byte {
	return append([]byte{kind, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
}

// WriteRaw writes bytes as they are, cut as Cut says.
func (c *Conn) WriteRaw(b []byte) error {
	parts := [][]byte{b}
	if c.Cut != nil {
		parts = c.Cut(b)
	}
	for i, p := range parts {
		if c.Pause > 0 && i > 0 && i < 8 {
			time.Sleep(c.Pause)
		}
		if _, err := c.Raw.Write(p); err != nil {
			return err
		}
	}
	return nil
}

// WriteRecord writes one record of any content, protected once there are keys.
func (c *Conn) WriteRecord(kind byte, content []byte) error {
	if c.out.aead == nil {
		return c.WriteRaw(append(header(kind, len(content)), content...))
	}
	return c.WriteRaw(c.out.seal(kind, content, c.Padding))
}

// Sealed is a protected record that was not sent yet.
func (c *Conn) Sealed(kind byte, content []byte) []byte { return c.out.seal(kind, content, c.Padding) }

// WriteHandshake sends handshake bytes in records of at most Fragment bytes. It does
// not touch the transcript.
func (c *Conn) WriteHandshake(b []byte) error {
	size := c.Fragment
	if size == 0 {
		size = 1 << 14
	}
	for len(b) > 0 {
		n := min(size, len(b))
		if err := c.WriteRecord(TypeHandshake, b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// Say sends a handshake message and counts it into the transcript.
func (c *Conn) Say(message []byte) error {
	c.transcript = append(c.transcript, message...)
	return c.WriteHandshake(message)
}

// Count takes a message into the transcript that is not sent, or sent otherwise.
func (c *Conn) Count(message []byte) { c.transcript = append(c.transcript, message...) }

// SendAlert sends an alert and does not wait.
func (c *Conn) SendAlert(level, code byte) error {
	return c.WriteRecord(TypeAlert, []byte{level, code})
}

// ReadRecord reads one record, unprotected, and notes alerts and how the connection
// ended. ChangeCipherSpec is passed over.
func (c *Conn) ReadRecord() (kind byte, content []byte, err error) {
	for {
		kind, content, err = c.record()
		if err != nil {
			if c.Seen.End == nil {
				c.Seen.End = err
			}
			return 0, nil, err
		}
		if kind == TypeCCS {
			continue
		}
		if kind == TypeAlert {
			return kind, content, c.alerted(content, c.in.aead != nil)
		}
		return kind, content, nil
	}
}

// ErrAlert is what reading fails with after an alert.
var ErrAlert = errors.New("the peer sent an alert")

func (c *Conn) alerted(b []byte, protected bool) error {
	if len(b) != 2 {
		c.Seen.End = errors.New("an alert that is not two bytes long")
		return c.Seen.End
	}
	c.Seen.Alert = &Alert{b[0], b[1], protected}
	err := fmt.Errorf("%w: %s", ErrAlert, alertName(b[1]))
	if c.Seen.End == nil && b[1] == CloseNotify {
		err = io.EOF
	}
	c.Seen.End = err
	return err
}

func (c *Conn) record() (kind byte, content []byte, err error) {
	var h [5]byte
	if _, err := io.ReadFull(c.Raw, h[:]); err != nil {
		return 0, nil, err
	}
	n := int(binary.BigEndian.Uint16(h[3:]))
	if h[0] < TypeCCS || h[0] > TypeData || h[1] != 3 || n > maxRecord {
		return 0, nil, fmt.Errorf("no TLS record: % x", h)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(c.Raw, body); err != nil {
		return 0, nil, err
	}
	if c.in.aead == nil || h[0] == TypeCCS {
		return h[0], body, nil
	}
	if h[0] == TypeAlert && n == 2 { // a peer that has no keys yet says it in the clear
		c.Seen.Alert = &Alert{Level: body[0], Code: body[1]}
		return 0, nil, fmt.Errorf("%w: %s", ErrAlert, alertName(body[1]))
	}
	kind, content, err = c.in.open(body)
	if errors.Is(err, errTag) && n > sealedAlert {
		c.Seen.Foreign += n
	}
	return kind, content, err
}

// sealedAlert is the length of a protected alert: two bytes, the type, the tag. A peer
// that cannot follow sends one under whatever keys it has.
const sealedAlert = 2 + 1 + 16

// ReadMessage reads one handshake message, which is not counted into the transcript.
// Any other content in between is an error.
func (c *Conn) ReadMessage() (kind byte, message []byte, err error) {
	for {
		if len(c.pending) >= 4 {
			n := 4 + int(c.pending[1])<<16 + int(c.pending[2])<<8 + int(c.pending[3])
			if n > maxHandshake {
				return 0, nil, fmt.Errorf("a handshake message of %d bytes", n)
			}
			if len(c.pending) >= n {
				message, c.pending = c.pending[:n:n], c.pending[n:]
				return message[0], message, nil
			}
		}
		kind, content, err := c.ReadRecord()
		if err != nil {
			return 0, nil, err
		}
		if kind != TypeHandshake {
			if kind == TypeData {
				c.Seen.AppBytes += len(content)
			}
			return 0, nil, fmt.Errorf("content type %d where a handshake message was expected", kind)
		}
		c.pending = append(c.pending, content...)
	}
}

// Expect reads one handshake message of a kind and counts it.
func (c *Conn) Expect(kind byte) (body []byte, err error) {
	got, message, err := c.ReadMessage()
	if err != nil {
		return nil, err
	}
	if got != kind {
		return nil, fmt.Errorf("handshake message %d where %d was expected", got, kind)
	}
	c.transcript = append(c.transcript, message...)
	return message[4:], nil
}

// Read gives application data, at most what one record holds. Handshake messages after
// the handshake (tickets, KeyUpdate) are obeyed.
func (c *Conn) Read(p []byte) (int, error) {
	for {
		kind, content, err := c.ReadRecord()
		if err != nil {
			return 0, err
		}
		switch kind {
		case TypeData:
			c.Seen.AppBytes += len(content)
			if len(content) > len(p) {
				return 0, io.ErrShortBuffer
			}
			if len(content) > 0 {
				return copy(p, content), nil
			}
		case TypeHandshake:
			if err := c.afterwards(content); err != nil {
				return 0, err
			}
		default:
			return 0, fmt.Errorf("content type %d after the handshake", kind)
		}
	}
}

// afterwards obeys a message that came after the handshake.
func (c *Conn) afterwards(b []byte) error {
	if len(b) != 5 || b[0] != KeyUpdate {
		c.Seen.Later++
		return nil // a ticket: nothing is resumed here
	}
	next, err := c.in.next()
	if err != nil {
		return err
	}
	c.in = next
	if b[4] == 1 {
		return c.UpdateKey(false)
	}
	return nil
}

// UpdateKey sends KeyUpdate and goes on with the next key; request asks the peer for its own.
func (c *Conn) UpdateKey(request bool) error {
	b := byte(0)
	if request {
		b = 1
	}
	if err := c.WriteHandshake(Message(KeyUpdate, []byte{b})); err != nil {
		return err
	}
	return c.NextKey()
}

// NextKey goes on with the next sending key, without a word to the peer.
func (c *Conn) NextKey() error {
	next, err := c.out.next()
	c.out = next
	return err
}

// Write sends application data, in records as large as may be.
func (c *Conn) Write(p []byte) (n int, err error) {
	for len(p[n:]) > 0 {
		part := p[n:min(len(p), n+1<<14)]
		if err := c.WriteRecord(TypeData, part); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// Drain reads until the other side ends the connection or the deadline passes, so that
// Seen tells how it ended.
func (c *Conn) Drain(limit time.Duration) {
	if c.Seen.End != nil {
		return
	}
	if err := c.Raw.SetReadDeadline(time.Now().Add(limit)); err != nil {
		c.Seen.End = err
		return
	}
	for {
		kind, content, err := c.ReadRecord()
		if err != nil {
			return
		}
		switch {
		case kind == TypeData:
			c.Seen.AppBytes += len(content)
		case kind == TypeHandshake && c.keys.serverApp != nil:
			if c.Seen.End = c.afterwards(content); c.Seen.End != nil {
				return
			}
		}
	}
}

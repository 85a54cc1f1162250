package tls13

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"
)

// replayed is the network for a Conn: what the other side says is fixed, and what it is
// told is dropped.
type replayed struct {
	net.Conn
	io.Reader
}

// Read implements io.Reader.
func (r replayed) Read(p []byte) (int, error) { return r.Reader.Read(p) }

// Write implements io.Writer.
func (replayed) Write(p []byte) (int, error) { return len(p), nil }

// SetReadDeadline is what Drain sets.
func (replayed) SetReadDeadline(time.Time) error { return nil }

// FuzzHandshake: whatever a client sends first, the server comes to an end, and keeps no
// more than what fits.
func FuzzHandshake(f *testing.F) {
	hello := (&Client{Name: "localhost", ALPN: "mqtt"}).hello(bytes.Repeat([]byte{4}, 65))
	f.Add(append(header(TypeHandshake, len(hello)), hello...))
	f.Add([]byte{TypeAlert, 3, 3, 0, 2, 2, 40})
	f.Add([]byte{TypeHandshake, 3, 3, 0, 4, 1, 0xff, 0xff, 0xff})
	f.Add([]byte{TypeCCS, 3, 3, 0, 1, 1, TypeData, 3, 3, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &Conn{Raw: replayed{Reader: bytes.NewReader(b)}}
		if _, err := (&Server{Chain: [][]byte{{0}}, Ask: true}).Handshake(c); err == nil {
			t.Fatal("a handshake without a key came about")
		}
		c.Drain(time.Second)
		if len(c.pending) > maxHandshake+maxRecord || c.Seen.Finished || c.Seen.Certificate {
			t.Errorf("%d bytes kept, seen %+v", len(c.pending), c.Seen)
		}
	})
}

// FuzzChain: a Certificate message is read to its end or refused.
func FuzzChain(f *testing.F) {
	f.Add(CertificateMessage(nil)[4:])
	f.Add(CertificateMessage([][]byte{{0x30, 0}})[4:])
	f.Add([]byte{0, 0xff, 0xff, 0xff, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if chain, err := parseChain(b); err == nil && len(chain)*6 > len(b) {
			t.Errorf("%d certificates in %d bytes", len(chain), len(b))
		}
	})
}

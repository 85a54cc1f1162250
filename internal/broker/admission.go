package broker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Why a client was turned away before it was admitted.
var (
	errNotTLS   = errors.New("first bytes are not a TLS handshake")
	errBudget   = errors.New("too many bytes before admission")
	errSuite    = errors.New("no cipher suite of the allow-list was offered")
	errNoClient = errors.New("client gave no certificate")
	errBusy     = errors.New("too many connections are waiting for admission")
	errRate     = errors.New("too many connections from this address")
)

// tlsConfig is the whole of what the broker demands of TLS. Session tickets are
// off: a resumption would bypass the pin (RFC 9846 4.6.1).
func (b *Broker) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		MaxVersion:                  tls.VersionTLS13,
		CurvePreferences:            []tls.CurveID{tls.CurveP256},
		ClientAuth:                  tls.RequireAnyClientCert,
		NextProtos:                  []string{"mqtt"},
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
		GetConfigForClient:          b.judgeHello,
		GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			leaf, err := b.cfg.Leaf(h.ServerName)
			if g, ok := h.Conn.(*gate); ok && err == nil {
				g.leaf = leaf.Leaf
			}
			return leaf, err
		},
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			if len(raw) == 0 {
				return errNoClient
			}
			_, err := b.dir.lookup(Fingerprint(raw[0]), time.Now())
			return err
		},
	}
}

// judgeHello refuses early what would be refused after the handshake anyway.
func (b *Broker) judgeHello(h *tls.ClientHelloInfo) (*tls.Config, error) {
	if !slices.Contains(h.SupportedVersions, tls.VersionTLS13) {
		return nil, nil // MinVersion refuses it, and says why
	}
	for _, s := range h.CipherSuites {
		if slices.Contains(b.cfg.Suites, s) {
			return nil, nil
		}
	}
	return nil, fmt.Errorf("%w: %s", errSuite, suiteNames(h.CipherSuites))
}

// suiteNames names the suites of TLS 1.3 among ids (RFC 9846 B.4).
func suiteNames(ids []uint16) (names []string) {
	for _, id := range ids {
		if id>>8 == 0x13 {
			names = append(names, tls.CipherSuiteName(id))
		}
	}
	return names
}

// gate is the connection below TLS. Until the client is admitted it counts what
// comes in, and replays the ClientHello that was read before a handshake slot
// was taken. Only the connection's reading goroutine uses its fields.
type gate struct {
	net.Conn
	head   []byte // read ahead, not yet taken by TLS
	budget int    // bytes that may still come; negative: admitted, no limit

	leaf *x509.Certificate // what the broker showed; nil before the ClientHello was read
}

func (g *gate) Read(p []byte) (int, error) {
	if len(g.head) > 0 {
		n := copy(p, g.head)
		if g.head = g.head[n:]; len(g.head) == 0 {
			g.head = nil
		}
		return n, nil
	}
	if g.budget < 0 {
		return g.Conn.Read(p)
	}
	if g.budget == 0 {
		return 0, errBudget
	}
	n, err := g.Conn.Read(p[:min(len(p), g.budget)])
	g.budget -= n
	return n, err
}

// awaitHello reads the first TLS record whole. A client that sends nothing, or
// slowly, waits here, where it costs a few KiB and holds up nobody.
func (g *gate) awaitHello() error {
	const recordHeader = 5
	head := make([]byte, 0, 512)
	want := recordHeader
	for len(head) < want {
		if cap(head) < want {
			head = append(make([]byte, 0, want), head...)
		}
		n, err := g.Read(head[len(head):min(cap(head), max(want, 512))])
		head = head[:len(head)+n]
		if err != nil {
			return err
		}
		if head[0] != 0x16 { // handshake (RFC 9846 5.1)
			return errNotTLS
		}
		if len(head) >= recordHeader {
			want = recordHeader + int(head[3])<<8 + int(head[4])
		}
	}
	g.head = head
	return nil
}

// handshake brings a fresh connection to the point where its client has proved
// that it holds the key of an active certificate.
func (b *Broker) handshake(raw net.Conn) (*tls.Conn, *member, error) {
	deadline := time.Now().Add(b.cfg.Limits.PreAdmission)
	if err := raw.SetDeadline(deadline); err != nil {
		return nil, nil, err
	}
	g := &gate{Conn: raw, budget: b.cfg.Limits.PreAdmissionBytes}
	if err := g.awaitHello(); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithDeadline(b.ctx, deadline)
	defer cancel()
	select {
	case b.slots <- struct{}{}:
		defer func() { <-b.slots }()
	case <-ctx.Done():
		return nil, nil, errBusy
	}
	t := tls.Server(g, b.tls)
	if err := t.Handshake(); err != nil {
		return nil, nil, err
	}
	state := t.ConnectionState()
	if !slices.Contains(b.cfg.Suites, state.CipherSuite) {
		return nil, nil, fmt.Errorf("%w: %s was chosen", errSuite, tls.CipherSuiteName(state.CipherSuite))
	}
	// Asked again: only now has the client proved that the certificate is its own.
	who, err := b.dir.lookup(Fingerprint(state.PeerCertificates[0].Raw), time.Now())
	if err != nil {
		return nil, nil, err
	}
	g.budget = -1
	return t, b.dir.member(who), nil
}

// addresses bounds the rate of new connections from one address.
type addresses struct {
	rate  float64
	burst float64

	mu    sync.Mutex
	seen  map[netip.Addr]bucket // guarded by mu
	swept time.Time             // guarded by mu
}

type bucket struct {
	level float64
	at    time.Time
}

// allow reports whether one more connection from a may come in.
func (s *addresses) allow(a netip.Addr, now time.Time) bool {
	if a.IsLoopback() {
		return true
	}
	if a.Is6() && !a.Is4In6() { // one host owns a whole /64
		if p, err := a.Prefix(64); err == nil {
			a = p.Addr()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweep(now)
	k := s.seen[a]
	k.level = max(0, k.level-now.Sub(k.at).Seconds()*s.rate) + 1
	k.at = now
	if k.level > s.burst {
		k.level = s.burst
		s.seen[a] = k
		return false
	}
	s.seen[a] = k
	return true
}

// sweep forgets addresses whose bucket has run empty, so that the table is
// bounded by the number of connections of the last minute.
func (s *addresses) sweep(now time.Time) {
	if now.Sub(s.swept) < time.Minute {
		return
	}
	s.swept = now
	for a, k := range s.seen {
		if now.Sub(k.at).Seconds()*s.rate > k.level {
			delete(s.seen, a)
		}
	}
}

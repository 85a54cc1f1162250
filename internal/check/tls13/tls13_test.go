package tls13

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"testing"
	"time"
)

// world is one CA-less certificate for both ends.
func world(t *testing.T) (der []byte, key *ecdsa.PrivateKey, pool *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, DNSNames: []string{"localhost"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err = x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool = x509.NewCertPool()
	pool.AddCert(parsed)
	return der, key, pool
}

func pair(t *testing.T) (ours, theirs net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if theirs, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if ours, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{ours, theirs} {
		c.SetDeadline(time.Now().Add(20 * time.Second))
		t.Cleanup(func() { c.Close() })
	}
	return ours, theirs
}

// TestServer: crypto/tls as the client, with every suite and group, with and without a
// client certificate, a byte at a time and in small fragments.
func TestServer(t *testing.T) {
	der, key, pool := world(t)
	for name, c := range map[string]struct {
		suite, group uint16
		ask          bool
		cut          bool
		fragment     int
		padding      int
	}{
		"plain":     {},
		"aes256":    {suite: AES256},
		"x25519":    {group: GroupX25519},
		"asks":      {ask: true},
		"bytewise":  {ask: true, cut: true},
		"fragments": {ask: true, fragment: 1},
		"padding":   {ask: true, padding: 100},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := pair(t)
			client := tls.Client(theirs, &tls.Config{RootCAs: pool, ServerName: "localhost", NextProtos: []string{"mqtt"},
				CurvePreferences: []tls.CurveID{tls.CurveP256, tls.X25519}, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
			if c.group == GroupX25519 {
				client = tls.Client(theirs, &tls.Config{RootCAs: pool, ServerName: "localhost", CurvePreferences: []tls.CurveID{tls.X25519}})
			}
			failed := make(chan error, 1)
			go func() {
				err := client.Handshake()
				if err == nil {
					_, err = client.Write([]byte("ping"))
				}
				failed <- err
			}()
			conn := &Conn{Raw: ours, Fragment: c.fragment, Padding: c.padding}
			if c.cut {
				conn.Cut = func(b []byte) (parts [][]byte) {
					for i := range b {
						parts = append(parts, b[i:i+1])
					}
					return parts
				}
			}
			s := &Server{Chain: [][]byte{der}, Key: key, Suite: c.suite, Group: c.group, Ask: c.ask}
			p, err := s.Handshake(conn)
			if err != nil {
				t.Fatal(err)
			}
			if err := <-failed; err != nil {
				t.Fatal(err)
			}
			if p.Hello.Name != "localhost" || c.ask && len(p.Chain) != 1 || conn.Seen.Certificate != c.ask {
				t.Errorf("peer %+v, seen %+v", p, conn.Seen)
			}
			buf := make([]byte, 100)
			n, err := conn.Read(buf)
			if err != nil || string(buf[:n]) != "ping" {
				t.Fatalf("%q, %v", buf[:n], err)
			}
			pong(t, conn, client)
		})
	}
}

// pong sends over two keys, and sees the client's goodbye.
func pong(t *testing.T, conn *Conn, client *tls.Conn) {
	t.Helper()
	if _, err := conn.Write([]byte("po")); err != nil {
		t.Fatal(err)
	}
	if err := conn.UpdateKey(true); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("ng")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := io.ReadFull(client, got); err != nil || string(got) != "pong" {
		t.Fatalf("%q, %v", got, err)
	}
	if _, err := client.Write([]byte("bye")); err != nil {
		t.Fatal(err)
	}
	client.Close()
	conn.Drain(10 * time.Second)
	if s := conn.Seen; s.AppBytes != 7 || s.Alert == nil || s.Alert.Code != CloseNotify || s.EndText() != "closed" {
		t.Errorf("seen %+v, %s", s, s.EndText())
	}
}

// TestClient: crypto/tls as the server.
func TestClient(t *testing.T) {
	der, key, pool := world(t)
	for _, with := range []bool{true, false} {
		ours, theirs := pair(t)
		config := &tls.Config{ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool,
			Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"mqtt"}}
		server := tls.Server(theirs, config)
		failed := make(chan error, 1)
		go func() {
			err := server.Handshake()
			if err == nil {
				_, err = server.Write([]byte("hello"))
			}
			failed <- err
		}()
		k := &Client{Name: "localhost", ALPN: "mqtt", Suites: []uint16{AES256, AES128}}
		if with {
			k.Chain, k.Key = [][]byte{der}, key
		}
		conn := &Conn{Raw: ours}
		a, err := k.Handshake(conn)
		if err != nil {
			t.Fatal(err)
		}
		if err := <-failed; err != nil {
			t.Fatal(err)
		}
		if !a.Asked || len(a.Chain) != 1 || len(server.ConnectionState().PeerCertificates) != map[bool]int{true: 1}[with] {
			t.Errorf("%+v, the server saw %d certificates", a, len(server.ConnectionState().PeerCertificates))
		}
		buf := make([]byte, 10)
		if n, err := conn.Read(buf); err != nil || string(buf[:n]) != "hello" {
			t.Errorf("%q, %v", buf[:n], err)
		}
	}
}

// TestAlert: a client that refuses says so, and it is seen.
func TestAlert(t *testing.T) {
	der, key, _ := world(t)
	ours, theirs := pair(t)
	client := tls.Client(theirs, &tls.Config{ServerName: "localhost", RootCAs: x509.NewCertPool()})
	go func() { client.Handshake(); theirs.Close() }()
	conn := &Conn{Raw: ours}
	if _, err := (&Server{Chain: [][]byte{der}, Key: key, Ask: true}).Handshake(conn); err == nil {
		t.Fatal("the client took an unknown CA")
	}
	conn.Drain(10 * time.Second)
	if s := conn.Seen; s.Alert == nil || !s.Alert.Protected || s.Farthest() != "ClientHello" || s.EndText() != "alert bad_certificate" {
		t.Errorf("seen %+v %v: %s, %s", s, s.Alert, s.Farthest(), s.EndText())
	}
}

func FuzzHello(f *testing.F) {
	f.Add((&Client{Name: "localhost", ALPN: "mqtt"}).hello(make([]byte, 65)))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHello(b)
		if err == nil && (len(h.Extensions) > maxExtensions || len(h.Suites) > maxListedNumbers) {
			t.Errorf("%d extensions, %d suites", len(h.Extensions), len(h.Suites))
		}
	})
}

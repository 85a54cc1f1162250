package tls13

import (
	"crypto/rand"
	"testing"
	"time"
)

// foreign plays a server whose client answers ServerHello with one record of n bytes
// that no key of this handshake has made.
func foreign(t *testing.T, n int) Seen {
	t.Helper()
	der, key, _ := world(t)
	ours, theirs := pair(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer theirs.Close()
		c := &Conn{Raw: theirs}
		if err := c.Say((&Client{}).hello(share(t))); err != nil {
			t.Error(err)
		}
		if _, err := c.Expect(ServerHello); err != nil {
			t.Error(err)
		}
		if err := c.WriteRaw(append(header(TypeData, n), make([]byte, n)...)); err != nil {
			t.Error(err)
		}
	}()
	conn := &Conn{Raw: ours}
	if _, err := (&Server{Chain: [][]byte{der}, Key: key, Shared: make([]byte, 32)}).Handshake(conn); err == nil {
		t.Error("the handshake came about")
	}
	conn.Drain(10 * time.Second)
	<-done
	return conn.Seen
}

func share(t *testing.T) []byte {
	t.Helper()
	curve, err := curveOf(GroupP256)
	if err != nil {
		t.Fatal(err)
	}
	k, err := curve.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k.PublicKey().Bytes()
}

// TestForeign: records under other keys are counted, an alert under them is not.
func TestForeign(t *testing.T) {
	if s := foreign(t, 400); s.Foreign != 400 || s.Farthest() != "records under keys of its own" {
		t.Errorf("%+v: %s", s, s.Farthest())
	}
	if s := foreign(t, sealedAlert); s.Foreign != 0 || s.Farthest() != "ClientHello" {
		t.Errorf("%+v: %s", s, s.Farthest())
	}
}

package broker

import (
	"crypto/x509"
	"testing"

	"hawser/internal/identity"
	"hawser/internal/mqtt"
)

// TestAdmittedTells shows that the hook hears of who got a CONNACK, by which
// certificate and under which leaf, and of nobody else.
func TestAdmittedTells(t *testing.T) {
	type event struct {
		who    identity.Principal
		fp     [32]byte
		remote string
		leaf   *x509.Certificate
	}
	heard := make(chan event, 8)
	r := newRig(t, func(r *rig) {
		r.edit = func(c *Config) {
			c.Admitted = func(who identity.Principal, fp [32]byte, remote string, leaf *x509.Certificate) {
				heard <- event{who, fp, remote, leaf}
			}
		}
	})
	cert := r.device("ABCD1234")
	if ack := r.dial(cert, mqtt.V5).hello("ABCD9999"); ack.Code == mqtt.Success {
		t.Fatal("a client id that differs from the certificate's name was let in")
	}
	c := r.connect(cert, mqtt.V5, "ABCD1234")
	e := <-heard // was told before CONNACK went out
	if e.who.Name != "ABCD1234" || e.fp != Fingerprint(cert.Certificate[0]) {
		t.Errorf("heard of %v with %x", e.who, e.fp)
	}
	if e.remote != c.c.LocalAddr().String() {
		t.Errorf("heard of the address %q, the client has %v", e.remote, c.c.LocalAddr())
	}
	if e.leaf != r.w.leaf.Leaf {
		t.Error("heard of another leaf than the one that was shown")
	}
	if len(heard) != 0 {
		t.Error("heard of a connection that was refused")
	}
}

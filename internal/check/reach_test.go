package check

import (
	"context"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"hawser/internal/check/tls13"
)

// counted counts the bytes of both directions.
type counted struct {
	net.Conn
	in, out int
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.in += n
	return n, err
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.out += n
	return n, err
}

// reach lets a client meet a false broker, which stops before a message of the kind, and
// gives what passed until the client gave up, and what it had been sent.
func reach(t *testing.T, command string, stop byte) (c *counted, s *stage, sent []byte) {
	t.Helper()
	w, err := NewWorld("localhost")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "world")
	if err := w.Save(dir); err != nil {
		t.Fatal(err)
	}
	o := &DeviceOptions{World: w, Dir: dir, Host: "localhost", Exec: command, Wait: 20 * time.Second, Step: 10 * time.Second}
	a := &attempt{o: o}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a.listen, a.own = l.(*net.TCPListener), true
	if err := a.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer a.end()
	s, err = (&run{o: o}).stage(context.Background(), a)
	if err != nil {
		t.Fatal(err)
	}
	c = &counted{Conn: s.Raw}
	s.Raw = c
	defer c.Close()
	s.until(o.Step)
	twin, _, err := twin(w)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := w.leaf(twin, w.brokerKey.Public(), nil)
	if err != nil {
		t.Fatal(err)
	}
	v := s.server()
	v.Chain = [][]byte{leaf}
	v.Say = func(c *tls13.Conn, kind byte, m []byte) error {
		if kind == stop {
			return errPartly
		}
		sent = append(sent, kind)
		return c.Say(m)
	}
	if err := s.shake(v); err == nil {
		t.Fatal("the client goes on with a false broker")
	}
	s.Drain(o.Step)
	return c, s, sent
}

// TestWhatAFalseBrokerReaches measures how far somebody comes who has the path and no key
// of a pinned root, with the nearest that he can make: a twin of the CA. The client gives
// up while CertificateVerify and Finished are still kept back, so that neither their code
// nor that of MQTT has run: what a false broker can feed are the parsers of TLS records, of
// ServerHello, EncryptedExtensions, CertificateRequest and Certificate, and of X.509.
func TestWhatAFalseBrokerReaches(t *testing.T) {
	t.Parallel()
	kit := filepath.Join(t.TempDir(), "kitclient")
	if out, err := exec.Command("go", "build", "-o", kit, "./testdata/kitclient").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, command := range map[string]string{
		"device kit":    "exec " + kit + " {host} {port} {cafile} {cert} {key}",
		"mosquitto_pub": "exec mosquitto_pub -h {host} -p {port} --cafile {cafile} --cert {cert} --key {key} -t t -m x",
	} {
		if _, err := exec.LookPath("mosquitto_pub"); name == "mosquitto_pub" && err != nil {
			t.Log("mosquitto_pub is not installed: the bytes are measured on the device kit alone")
			continue
		}
		c, s, sent := reach(t, command, tls13.Finished) // OpenSSL reports after CertificateVerify at the latest
		t.Logf("%s: the client sent %d bytes and took %d of ours until %s; messages %v", name, c.in, c.out, s.Seen.EndText(), sent)
		if leaked := s.leaked(); leaked != "" || !s.gave() {
			t.Errorf("%s: leaked %q, ended: %s", name, leaked, s.Seen.EndText())
		}
		if c.in > 800 || c.out > 1200 {
			t.Errorf("%s: %d bytes up and %d down before it was refused", name, c.in, c.out)
		}
		if c, s, sent = reach(t, command, tls13.CertificateVerify); !s.gave() || slices.Contains(sent, tls13.CertificateVerify) {
			t.Errorf("%s: it still waits for CertificateVerify under a certificate that it cannot trust (%d bytes)", name, c.out)
		}
	}
}

package e2e

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"hawser/internal/mqtt"
)

// credentials reads the files that device add and service add have written.
func credentials(t testing.TB, dir string) *tls.Config {
	t.Helper()
	name := "device"
	if _, err := os.Stat(filepath.Join(dir, "service.crt")); err == nil {
		name = "service"
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key"))
	if err != nil {
		t.Fatal(err)
	}
	roots, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(roots)
	return &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool, ServerName: "localhost",
		MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.CurveP256}}
}

// client speaks raw MQTT 3.1.1. Its methods give errors: a server that is killed is no failure.
type client struct {
	conn net.Conn
	buf  []byte
}

// packet is one packet that came.
type packet struct {
	mqtt.Header
	id      uint16 // of an acknowledgement or a PUBLISH
	code    byte   // CONNACK: return code; SUBACK: the first code
	present bool   // CONNACK: session present
	pub     mqtt.Publish
}

// dial connects and says CONNECT.
func dial(addr string, cfg *tls.Config, p *mqtt.Connect) (c *client, ack packet, err error) {
	d := &net.Dialer{Timeout: patience}
	conn, err := tls.DialWithDialer(d, "tcp", addr, cfg)
	if err != nil {
		return nil, ack, err
	}
	c = &client{conn: conn}
	if err = c.write(p.Append(nil, mqtt.V311)); err == nil {
		ack, err = c.next()
	}
	if err == nil && (ack.Type != mqtt.CONNACK || ack.code != 0) {
		err = fmt.Errorf("%v with code %d", ack.Type, ack.code)
	}
	if err != nil {
		conn.Close()
		return nil, ack, err
	}
	return c, ack, nil
}

func mustDial(t testing.TB, s *server, dir, id string) *client {
	t.Helper()
	c, _, err := dial(s.addr, credentials(t, dir), &mqtt.Connect{Version: mqtt.V311, CleanStart: true, ClientID: id})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.conn.Close() })
	return c
}

func (c *client) write(b []byte) error {
	if err := c.conn.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err := c.conn.Write(b)
	return err
}

func (c *client) next() (p packet, err error) { return c.nextWithin(patience) }

func (c *client) nextWithin(limit time.Duration) (p packet, err error) {
	if err := c.conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return p, err
	}
	for {
		h, n, err := mqtt.ParseHeader(c.buf)
		if err != nil {
			return p, err
		}
		if n > 0 && len(c.buf) >= n+h.Remaining {
			body := bytes.Clone(c.buf[n : n+h.Remaining])
			c.buf = c.buf[n+h.Remaining:]
			return decode(h, body)
		}
		tmp := make([]byte, 4096)
		m, err := c.conn.Read(tmp)
		c.buf = append(c.buf, tmp[:m]...)
		if err != nil && m == 0 {
			return p, err
		}
	}
}

func decode(h mqtt.Header, body []byte) (p packet, err error) {
	p.Header = h
	switch h.Type {
	case mqtt.CONNACK:
		p.present, p.code = body[0]&1 != 0, body[1]
	case mqtt.PUBLISH:
		err = p.pub.DecodeAtClient(mqtt.V311, h.Flags, body)
		p.id = p.pub.PacketID
	case mqtt.PUBACK, mqtt.PUBREC, mqtt.PUBREL, mqtt.PUBCOMP, mqtt.SUBACK:
		p.id = uint16(body[0])<<8 | uint16(body[1])
		if h.Type == mqtt.SUBACK {
			p.code = body[2]
		}
	}
	return p, err
}

func (c *client) publish(topic, payload string, qos byte, id uint16, dup bool) error {
	return c.write((&mqtt.Publish{Topic: []byte(topic), Payload: []byte(payload), QoS: qos, PacketID: id, Dup: dup}).Append(nil, mqtt.V311))
}

// publishWait publishes at QoS 1 and waits for the PUBACK.
func (c *client) publishWait(topic, payload string, id uint16) error {
	if err := c.publish(topic, payload, 1, id, false); err != nil {
		return err
	}
	p, err := c.next()
	if err == nil && (p.Type != mqtt.PUBACK || p.id != id) {
		err = fmt.Errorf("%v for %d instead of PUBACK for %d", p.Type, p.id, id)
	}
	return err
}

func (c *client) release(id uint16) error {
	return c.write((&mqtt.Ack{Type: mqtt.PUBREL, PacketID: id}).Append(nil, mqtt.V311))
}

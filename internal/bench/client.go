package bench

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"hawser/internal/mqtt"
)

// ioTimeout ends a run whose server no longer answers.
const ioTimeout = 60 * time.Second

// client is one MQTT connection. It has no goroutine: it reads when it is told to.
type client struct {
	dev  *device
	v    mqtt.Version
	raw  *held
	conn *tls.Conn
	in   []byte // read and not yet taken
	buf  [4096]byte
	head []byte // PUBLISH up to the packet id
	out  []byte // the whole PUBLISH; pid and payload are written into it
	pid  uint16
	seq  uint64 // of the last message, in its payload
}

// session is how a client connects.
type session struct {
	v       mqtt.Version
	clean   bool
	expiry  uint32
	filter  string // subscribed unless ""
	id      string // client id, "" for the device's own
	present bool   // the server must say that the session is there
	waiting int    // QoS 1 messages that it then must send
}

// tlsConfig is the one way in which clients connect. The server is known by its
// certificate itself, which is cheaper for the generator than its chain.
func (f *fleetFiles) tlsConfig(d *device) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.CurveP256},
		Certificates: []tls.Certificate{d.cert}, ServerName: domain, InsecureSkipVerify: true,
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			if len(raw) == 0 || string(raw[0]) != string(f.leaf) {
				return errors.New("the server shows another certificate")
			}
			return nil
		},
	}
}

// held is a connection whose writes can be held back, so that the records of a
// window leave in one system call: the generator is to cost less than the server.
type held struct {
	net.Conn
	buf  []byte
	hold bool
}

func (h *held) Write(p []byte) (int, error) {
	if !h.hold {
		return h.Conn.Write(p)
	}
	h.buf = append(h.buf, p...)
	return len(p), nil
}

// release sends what was held back.
func (h *held) release() error {
	h.hold = false
	_, err := h.Conn.Write(h.buf)
	h.buf = h.buf[:0]
	return err
}

// connect brings a client to CONNACK and, with a filter, to SUBACK.
func (f *fleetFiles) connect(addr string, d *device, s session) (*client, error) {
	raw, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	c := &client{dev: d, v: s.v, raw: &held{Conn: raw}}
	c.conn = tls.Client(c.raw, f.tlsConfig(d))
	raw.SetDeadline(time.Now().Add(ioTimeout))
	if err := c.hello(s); err != nil {
		raw.Close()
		return nil, fmt.Errorf("client %s: %w", d.name, err)
	}
	return c, nil
}

func (c *client) hello(s session) error {
	if err := c.conn.Handshake(); err != nil {
		return err
	}
	if suite := c.conn.ConnectionState().CipherSuite; suite != tls.TLS_AES_128_GCM_SHA256 {
		return fmt.Errorf("cipher suite %s", tls.CipherSuiteName(suite))
	}
	if s.id == "" {
		s.id = c.dev.name
	}
	p := mqtt.Connect{Version: s.v, CleanStart: s.clean, ClientID: s.id, KeepAlive: 1800}
	p.Props.SessionExpiry = s.expiry
	if _, err := c.conn.Write(p.Append(nil, s.v)); err != nil {
		return err
	}
	body, err := c.expect(mqtt.CONNACK)
	if err != nil {
		return err
	}
	var ack mqtt.Connack
	if err := ack.Decode(s.v, 0, body); err != nil {
		return err
	}
	if ack.Code != mqtt.Success || ack.SessionPresent != s.present {
		return fmt.Errorf("CONNACK %v, session present %v", ack.Code, ack.SessionPresent)
	}
	if s.filter != "" {
		return c.subscribe(s.filter)
	}
	return c.receive(s.waiting)
}

func (c *client) subscribe(filter string) error {
	p := mqtt.Subscribe{PacketID: 1, Filters: []mqtt.Subscription{{Filter: filter, QoS: 1}}}
	if _, err := c.conn.Write(p.Append(nil, c.v)); err != nil {
		return err
	}
	body, err := c.expect(mqtt.SUBACK)
	if err != nil {
		return err
	}
	var ack mqtt.Suback
	if err := ack.Decode(c.v, 0, body); err != nil {
		return err
	}
	if ack.Codes[0] != mqtt.GrantedQoS1 {
		return fmt.Errorf("SUBACK %v", ack.Codes[0])
	}
	return nil
}

// next gives the next packet; its body is valid until the following call.
func (c *client) next() (h mqtt.Header, body []byte, err error) {
	for {
		h, n, err := mqtt.ParseHeader(c.in)
		if err != nil {
			return h, nil, err
		}
		if n > 0 && len(c.in) >= n+h.Remaining {
			body = c.in[n : n+h.Remaining]
			c.in = c.in[n+h.Remaining:]
			if h.Type == mqtt.PUBLISH && h.Flags>>1&3 == 0 {
				continue // the time of day, which Hawser tells a new subscriber
			}
			return h, body, nil
		}
		if err := c.fill(); err != nil {
			return h, nil, err
		}
	}
}

// fill reads once. What is left of the last read moves to the front.
func (c *client) fill() error {
	n := copy(c.buf[:], c.in)
	if n == len(c.buf) {
		return errors.New("a packet larger than the generator reads")
	}
	m, err := c.conn.Read(c.buf[n:])
	c.in = c.buf[:n+m]
	if m > 0 {
		return nil
	}
	if err == nil {
		return io.ErrNoProgress
	}
	return err
}

func (c *client) expect(t mqtt.Type) ([]byte, error) {
	h, body, err := c.next()
	if err == nil && h.Type != t {
		err = fmt.Errorf("%v instead of %v", h.Type, t)
	}
	return body, err
}

// prepare makes the PUBLISH that the client will send again and again.
func (c *client) prepare(topic string, qos byte, payload int) {
	p := mqtt.Publish{Topic: []byte(topic), Payload: make([]byte, payload), QoS: qos, PacketID: uint16(qos)}
	c.out = mqtt.AppendPublish(c.out[:0], c.v, &p)
	c.head = c.out[:len(c.out)-payload]
}

// publish sends one message with the next number. At QoS 1 its packet id is the
// low half of that number, without 0.
func (c *client) publish() error {
	c.seq++
	if c.out[0]>>1&3 > 0 {
		c.pid++
		if c.pid == 0 {
			c.pid = 1
		}
		at := len(c.head) - 2
		if c.v == mqtt.V5 {
			at-- // the empty property list comes between
		}
		binary.BigEndian.PutUint16(c.out[at:], c.pid)
	}
	binary.BigEndian.PutUint64(c.out[len(c.head):], c.seq)
	_, err := c.conn.Write(c.out)
	return err
}

// acks waits for at least one PUBACK and takes all that have come.
func (c *client) acks() (n int, err error) {
	for {
		h, size, err := mqtt.ParseHeader(c.in)
		if err != nil {
			return n, err
		}
		if size == 0 || len(c.in) < size+h.Remaining {
			if n > 0 {
				return n, nil
			}
			if err := c.fill(); err != nil {
				return n, err
			}
			continue
		}
		if h.Type == mqtt.PUBLISH && h.Flags>>1&3 == 0 {
			c.in = c.in[size+h.Remaining:]
			continue
		}
		if h.Type != mqtt.PUBACK {
			return n, fmt.Errorf("%v instead of PUBACK", h.Type)
		}
		if h.Remaining > 2 && c.in[size+2] >= 0x80 {
			return n, fmt.Errorf("PUBACK %v", mqtt.ReasonCode(c.in[size+2]))
		}
		c.in = c.in[size+h.Remaining:]
		n++
	}
}

func (c *client) extend() { c.conn.SetDeadline(time.Now().Add(ioTimeout)) }

// leave says goodbye.
func (c *client) leave() {
	c.extend()
	c.conn.Write((&mqtt.Disconnect{}).Append(nil, c.v))
	c.conn.Close()
}

package sim

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"hawser/internal/message"
	"hawser/internal/mqtt"
	"hawser/internal/pki"
)

const liarPause = time.Second // before it connects again

// liar is a device that says that it has installed and uses what it is offered, and has
// stored nothing: it goes on with its old certificate. The kit makes no such device, so it
// speaks MQTT by itself.
type liar struct {
	unit *Unit
	conn net.Conn
	in   []byte
	lie  message.PKIReport // what it says it uses; without a number until it was offered something
}

func (l *liar) run(ctx context.Context) {
	for ctx.Err() == nil {
		err := l.connection(ctx)
		if ctx.Err() == nil {
			l.unit.leave()
			l.unit.complain(err.Error())
		}
		select {
		case <-time.After(liarPause):
		case <-ctx.Done():
		}
	}
}

// connection is one connection to its end.
func (l *liar) connection(ctx context.Context) error {
	if err := l.dial(ctx); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { l.conn.Close() })()
	defer l.conn.Close()
	if err := l.login(); err != nil {
		return err
	}
	l.unit.connected("")
	defer l.unit.disconnected(nil)
	for {
		h, body, err := l.packet()
		if err != nil {
			return err
		}
		if h.Type == mqtt.PUBLISH {
			err = l.receive(h, body)
		}
		if err != nil {
			return err
		}
	}
}

func (l *liar) dial(ctx context.Context) error {
	f := l.unit.fleet
	pool := x509.NewCertPool()
	for _, r := range f.roots {
		pool.AddCert(r)
	}
	name := f.set.Domains[0]
	raw, err := l.unit.dial(ctx, "tcp", net.JoinHostPort(name, fmt.Sprint(f.set.Port)))
	if err != nil {
		return err
	}
	c := tls.Client(raw, &tls.Config{Certificates: []tls.Certificate{l.unit.member.Cert}, RootCAs: pool, ServerName: name,
		MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.CurveP256}, NextProtos: []string{"mqtt"}})
	if err := c.HandshakeContext(ctx); err != nil {
		raw.Close()
		return err
	}
	l.conn, l.in = c, nil
	return nil
}

// login ends with SUBSCRIBE. Before it, the lie of the last time is told again.
func (l *liar) login() error {
	id := l.unit.member.ID
	c := mqtt.Connect{Version: mqtt.V5, CleanStart: true, ClientID: id.String()}
	if err := l.send(c.Append(nil, mqtt.V5)); err != nil {
		return err
	}
	h, body, err := l.packet()
	if err != nil {
		return err
	}
	var ack mqtt.Connack
	if h.Type != mqtt.CONNACK {
		return errors.New("no CONNACK")
	}
	if err := ack.Decode(mqtt.V5, h.Flags, body); err != nil {
		return err
	}
	if ack.Code.Failed() {
		return fmt.Errorf("the server refused the connection: %v", ack.Code)
	}
	if l.lie.No != 0 {
		if err := l.report(1, message.PKIInUse); err != nil {
			return err
		}
	}
	sub := mqtt.Subscribe{PacketID: 2, Filters: []mqtt.Subscription{{Filter: id.Topic("d/#"), QoS: 1}}}
	return l.send(sub.Append(nil, mqtt.V5))
}

// receive acknowledges everything, and answers an offer with two lies.
func (l *liar) receive(h mqtt.Header, body []byte) error {
	var p mqtt.Publish
	if err := p.DecodeAtClient(mqtt.V5, h.Flags, body); err != nil {
		return err
	}
	if p.QoS > 0 {
		if err := l.send((&mqtt.Ack{Type: mqtt.PUBACK, PacketID: p.PacketID}).Append(nil, mqtt.V5)); err != nil {
			return err
		}
	}
	if !strings.HasSuffix(string(p.Topic), "/d/pki") {
		return nil
	}
	m, err := message.DecodePKI(p.Payload)
	if err != nil {
		return err
	}
	l.lie = message.PKIReport{No: m.No, Fingerprint: sha256.Sum256(l.unit.member.Cert.Certificate[0]), Anchors: l.unit.fleet.set.Sequence}
	if m.Certificate != nil {
		l.lie.Fingerprint = sha256.Sum256(m.Certificate)
	}
	if m.Anchors != nil {
		if next, err := pki.VerifyAnchors(m.Anchors, l.unit.fleet.set.Standby, 0); err == nil {
			l.lie.Anchors = next.Sequence
		}
	}
	if err := l.report(3, message.PKIInstalled); err != nil {
		return err
	}
	return l.report(4, message.PKIInUse)
}

func (l *liar) report(packet uint16, state message.PKIState) error {
	r := l.lie
	r.State = state
	p := mqtt.Publish{Topic: []byte(l.unit.member.ID.Topic("u/pki")), QoS: 1, PacketID: packet, Payload: r.Encode(message.CBOR)}
	return l.send(p.Append(nil, mqtt.V5))
}

func (l *liar) send(b []byte) error {
	_, err := l.conn.Write(b)
	return err
}

func (l *liar) packet() (mqtt.Header, []byte, error) {
	for {
		h, n, err := mqtt.ParseHeader(l.in)
		switch {
		case err != nil:
			return h, nil, err
		case n > 0 && n+h.Remaining <= len(l.in):
			body := l.in[n : n+h.Remaining : n+h.Remaining]
			l.in = l.in[n+h.Remaining:]
			return h, body, nil
		case h.Remaining > mqtt.MaxRemaining:
			return h, nil, errors.New("packet too large")
		}
		var b [1024]byte
		m, err := l.conn.Read(b[:])
		if l.in = append(l.in, b[:m]...); err != nil {
			return h, nil, err
		}
	}
}

package device

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"time"

	"hawser/internal/mqtt"
)

const (
	attemptTimeout = 30 * time.Second // TCP, TLS and CONNACK of one attempt
	writeTimeout   = 15 * time.Second
	closeTimeout   = 500 * time.Millisecond // from DISCONNECT to the server's close
	stableAfter    = time.Minute            // a connection of this age starts the backoff anew
	maxPacket      = 256 << 10              // what is read, announced in CONNECT
	readBuffer     = 1 << 10                // kept while idle
	flushAt        = 16 << 10
	sessionExpiry  = 30 * 24 * 3600 // seconds that the server keeps the session
	receiveMaximum = 16             // messages of the server on their way to handlers
)

// stage is how far an attempt came.
type stage byte

const (
	unreached  stage = iota // no TLS handshake began, or the server has no time at present
	untrusted               // the handshake failed: the server is not what is pinned, or wants something else
	turnedAway              // the server is right, and gave no CONNACK or one that refuses this device
	letIn
)

// session is one connection. Its reader is the goroutine of Run; whoever has something to
// say writes.
type session struct {
	device    *Device
	conn      net.Conn
	leaf      *x509.Certificate
	version   mqtt.Version
	topics    string
	maxPacket int
	window    int
	resumed   bool
	keepAlive time.Duration

	subs uint16 // packet identifier of the SUBSCRIBE

	// guarded by Device.mu
	out       []byte // to be written
	spare     []byte
	writing   bool
	failed    error     // why the connection ended: nothing is written any more
	settled   []outcome // to be told after the next write
	lastWrite time.Time
	closeBy   time.Time // not zero: DISCONNECT is said, and the server has until then to close

	// the reader's
	in       []byte // read and not parsed
	live     bool   // after CONNACK: the keep alive counts
	lastRead time.Time
	pingedAt time.Time // zero: nothing is asked
}

// Run connects and stays connected until ctx ends, whose error it returns. Before that it
// never gives up: it tries the servers in order and waits between the rounds, from
// 1 s to 5 min, doubling, with jitter. It can be called once.
func (d *Device) Run(ctx context.Context) error {
	d.mu.Lock()
	if d.started {
		d.mu.Unlock()
		return errors.New("the device was run before")
	}
	d.started = true
	d.mu.Unlock()
	for round := 0; ctx.Err() == nil; round++ {
		s, server, err := d.connectAny(ctx)
		if err == nil {
			began := time.Now()
			err = d.serve(ctx, s, server)
			if time.Since(began) >= stableAfter {
				round = 0
			}
		}
		if ctx.Err() != nil {
			break
		}
		if d.moved() {
			round = -1
			continue
		}
		wait := backoff(round, d.cfg.BackoffMin, d.cfg.BackoffMax)
		d.log.Warn("not connected", "device", d.id, "error", err, "retry", wait)
		pause(ctx, wait)
	}
	d.workers.Wait()
	d.fail(ErrStopped)
	return ctx.Err()
}

// backoff is the wait before round n+1: uniform between half and whole of a base that
// begins at twice the shortest and doubles up to the longest.
func backoff(n int, shortest, longest time.Duration) time.Duration {
	base := longest
	if n < 32 && shortest<<(n+1) > 0 {
		base = min(longest, shortest<<(n+1))
	}
	return max(shortest, base/2+rand.N(base/2+1))
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// connectAny works on a goroutine of its own: the handshake grows the stack, which the
// reader would keep for the life of the connection.
func (d *Device) connectAny(ctx context.Context) (s *session, server string, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s, server, err = d.tryPlans(ctx)
	}()
	<-done
	return s, server, err
}

// tryPlans tries what is not proven yet, then what is known to work. Where no server is
// reached, other credentials would not help.
func (d *Device) tryPlans(ctx context.Context) (*session, string, error) {
	var all error
	for _, c := range d.plans() {
		s, server, how, err := d.tryServers(ctx, c)
		if how == letIn {
			if err = d.admitted(c); err == nil {
				return s, server, nil
			}
			s.conn.Close()
		}
		all = errors.Join(all, err)
		if ctx.Err() != nil || how == unreached {
			break
		}
		d.noteFailure(c, how, err)
	}
	return nil, "", all
}

// tryServers tries one server after the other; how is the furthest that an attempt came.
func (d *Device) tryServers(ctx context.Context, c credentials) (s *session, server string, how stage, err error) {
	roots, servers, err := d.pins(c)
	if err != nil {
		return nil, "", untrusted, err
	}
	show := d.shows(c)
	var all error
	for _, server = range servers {
		s, at, err := d.connect(ctx, server, show, roots)
		if err == nil {
			return s, server, letIn, nil
		}
		all, how = errors.Join(all, fmt.Errorf("%s: %w", server, err)), max(how, at)
	}
	return nil, "", how, all
}

func (d *Device) connect(ctx context.Context, server string, show tls.Certificate, roots []*x509.Certificate) (*session, stage, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	conn, leaf, how, err := d.dial(ctx, server, show, roots)
	if err != nil {
		return nil, how, err
	}
	s := &session{device: d, conn: conn, leaf: leaf, version: d.version, topics: d.id.Topic("d/#"),
		keepAlive: d.cfg.KeepAlive, maxPacket: mqtt.MaxRemaining, window: maxWindow}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	err = s.login(d)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	switch {
	case err == nil:
		return s, letIn, nil
	case errors.Is(err, errBusy):
		how = unreached
	default:
		how = turnedAway
	}
	conn.Close()
	return nil, how, err
}

var errBusy = errors.New("the server refused the connection for now")

// judge gives the error of a CONNACK. What has nothing to do with who the device is, is
// errBusy: another certificate would not help.
func judge(ack *mqtt.Connack) error {
	switch ack.Code {
	case mqtt.ServerUnavailable, mqtt.ServerBusy, mqtt.ServerShuttingDown, mqtt.QuotaExceeded, mqtt.ConnectionRateExceeded:
		return fmt.Errorf("%w: %v %s", errBusy, ack.Code, ack.Props.Reason)
	}
	if ack.Code.Failed() {
		return fmt.Errorf("the server refused the connection: %v %s", ack.Code, ack.Props.Reason)
	}
	return nil
}

// login says CONNECT and waits for CONNACK.
func (s *session) login(d *Device) error {
	c := mqtt.Connect{Version: d.version, ClientID: d.ID(), KeepAlive: uint16(d.cfg.KeepAlive / time.Second)}
	c.Props.SessionExpiry, c.Props.ReceiveMaximum, c.Props.MaxPacketSize = sessionExpiry, receiveMaximum, maxPacket
	_, unsent := s.conn.Write(c.Append(nil, d.version))
	h, body, err := s.packet() // also for the alert that says why nothing could be sent
	if op := (*net.OpError)(nil); unsent != nil && !(errors.As(err, &op) && op.Op == "remote error") {
		return unsent
	}
	if err != nil {
		return err
	}
	var ack mqtt.Connack
	if h.Type != mqtt.CONNACK {
		return &mqtt.Error{Code: mqtt.ProtocolError, Text: h.Type.String() + " instead of CONNACK"}
	}
	if err := ack.Decode(d.version, h.Flags, body); err != nil {
		return err
	}
	if err := judge(&ack); err != nil {
		return err
	}
	s.agree(&ack)
	return nil
}

// agree takes over what the server demands.
func (s *session) agree(ack *mqtt.Connack) {
	s.resumed = ack.SessionPresent
	if n := int(ack.Props.ReceiveMaximum); n > 0 {
		s.window = min(s.window, n)
	}
	if n := ack.Props.MaxPacketSize; n > 0 {
		s.maxPacket = int(min(n, mqtt.MaxRemaining))
	}
	if ack.Props.HasKeepAlive && ack.Props.ServerKeepAlive > 0 {
		s.keepAlive = time.Duration(ack.Props.ServerKeepAlive) * time.Second
	}
}

// subscribe appends the one SUBSCRIBE there is: all that the server may say to this device.
func (s *session) subscribe(id uint16) {
	s.subs = id
	p := mqtt.Subscribe{PacketID: id, Filters: []mqtt.Subscription{{Filter: s.topics, QoS: 1}}}
	s.out = p.Append(s.out, s.version)
}

// serve is a connection from CONNACK to its end.
func (d *Device) serve(ctx context.Context, s *session, server string) error {
	stop := context.AfterFunc(ctx, func() { d.goodbye(s) })
	defer stop()
	s.live, s.lastRead = true, time.Now()
	d.adopt(s)
	d.log.Info("connected", "device", d.id, "server", server, "resumed", s.resumed)
	if d.cfg.Connected != nil {
		d.cfg.Connected(server)
	}
	defer d.retryLater(s)()
	err := d.read(ctx, s)
	d.mu.Lock()
	switch {
	case s.failed != nil:
		err = s.failed
	case d.moving:
		err = errMoving
	}
	d.mu.Unlock()
	s.conn.Close()
	d.orphan(s)
	if d.cfg.Disconnected != nil {
		d.cfg.Disconnected(err)
	}
	return err
}

func (d *Device) read(ctx context.Context, s *session) error {
	for {
		h, body, err := s.packet()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = d.tick(s)
		} else if err == nil {
			err = d.handle(ctx, s, h, body)
		}
		if e := (*mqtt.Error)(nil); errors.As(err, &e) {
			d.complain(s, e)
		}
		if err != nil {
			return err
		}
	}
}

// packet gives the next packet; body is valid until the next call. A read that runs into
// the keep alive gives os.ErrDeadlineExceeded and loses nothing.
func (s *session) packet() (mqtt.Header, []byte, error) {
	for {
		h, n, err := mqtt.ParseHeader(s.in)
		switch {
		case err != nil:
			return h, nil, err
		case n > 0 && n+h.Remaining > maxPacket:
			return h, nil, &mqtt.Error{Code: mqtt.PacketTooLarge, Text: "packet beyond 256 KiB"}
		case n > 0 && n+h.Remaining <= len(s.in):
			body := s.in[n : n+h.Remaining : n+h.Remaining]
			s.in = s.in[n+h.Remaining:]
			return h, body, nil
		}
		if err := s.fill(); err != nil {
			return h, nil, err
		}
	}
}

// fill reads more. It makes room as bytes arrive, not as a length field claims.
func (s *session) fill() error {
	if cap(s.in)-len(s.in) < readBuffer/2 {
		s.in = append(make([]byte, 0, max(readBuffer, 2*len(s.in))), s.in...)
	}
	if err := s.limitRead(); err != nil {
		return err
	}
	n, err := s.conn.Read(s.in[len(s.in):cap(s.in)])
	if s.in = s.in[:len(s.in)+n]; n > 0 {
		s.lastRead, s.pingedAt = time.Now(), time.Time{}
		return nil
	}
	return err
}

// limitRead sets when the next read gives up: when it is time to ping, since nothing was
// read or nothing was written, when the answer to a ping is overdue, or at closeBy. Before
// CONNACK the limit is that of the whole attempt. The lock keeps it from undoing goodbye's.
func (s *session) limitRead() error {
	if !s.live {
		return nil
	}
	s.device.mu.Lock()
	defer s.device.mu.Unlock()
	quiet := s.lastRead
	if s.lastWrite.Before(quiet) {
		quiet = s.lastWrite
	}
	limit := quiet.Add(s.keepAlive * 3 / 4)
	switch {
	case !s.closeBy.IsZero():
		limit = s.closeBy
	case !s.pingedAt.IsZero():
		limit = s.pingedAt.Add(max(s.keepAlive/2, time.Second))
	}
	return s.conn.SetReadDeadline(limit)
}

// tick is called when a read gave up: it pings, or gives the connection up.
func (d *Device) tick(s *session) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !s.pingedAt.IsZero() || !s.closeBy.IsZero() {
		return errors.New("the server does not answer")
	}
	s.pingedAt = time.Now()
	s.out = (&mqtt.Ping{Type: mqtt.PINGREQ}).Append(s.out, s.version)
	d.flush(s)
	return s.failed
}

// flush writes what has gathered. Only one goroutine writes at a time; others leave their
// bytes to it. d.mu is held, and let go of during the write.
func (d *Device) flush(s *session) {
	if s.writing {
		return
	}
	s.writing = true
	for s.failed == nil {
		d.load(s)
		if len(s.out) == 0 && len(s.settled) == 0 {
			break
		}
		b, settled := s.out, s.settled
		s.out, s.settled = s.spare[:0], nil
		if len(b) > 0 {
			s.lastWrite = time.Now()
		}
		limit := time.Now().Add(writeTimeout)
		if !s.closeBy.IsZero() {
			limit = s.closeBy
		}
		d.mu.Unlock()
		err := s.write(b, limit)
		tell(settled, err)
		d.mu.Lock()
		if s.spare = b[:0]; cap(b) > 2*flushAt {
			s.spare = nil
		}
		if err != nil {
			s.failed = err
			s.conn.Close() // wakes the reader, which ends the session
		}
	}
	s.writing = false
}

func (s *session) write(b []byte, limit time.Time) error {
	if len(b) == 0 {
		return nil
	}
	if err := s.conn.SetWriteDeadline(limit); err != nil {
		return errors.Join(ErrNotSent, err)
	}
	if _, err := s.conn.Write(b); err != nil {
		return errors.Join(ErrNotSent, err)
	}
	return nil
}

// goodbye ends the connection in order, so that the server sees no failure. The reader goes
// on until the server has closed: a close with unread bytes would be a reset, which could
// overtake the DISCONNECT.
func (d *Device) goodbye(s *session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s.out = (&mqtt.Disconnect{}).Append(s.out, s.version)
	s.closeBy = time.Now().Add(closeTimeout)
	s.conn.SetWriteDeadline(s.closeBy) // also for a write that is under way
	d.flush(s)
	s.conn.SetReadDeadline(s.closeBy)
}

// complain tells a 5.0 server what is wrong with it.
func (d *Device) complain(s *session, e *mqtt.Error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s.version == mqtt.V5 && s.closeBy.IsZero() {
		s.out = (&mqtt.Disconnect{Code: e.Code}).Append(s.out, s.version)
		d.flush(s)
	}
}

func (d *Device) handle(ctx context.Context, s *session, h mqtt.Header, body []byte) error {
	switch h.Type {
	case mqtt.PUBLISH:
		var p mqtt.Publish
		if err := p.DecodeAtClient(s.version, h.Flags, body); err != nil {
			return err
		}
		return d.receive(ctx, s, &p)
	case mqtt.PUBACK:
		a := mqtt.Ack{Type: mqtt.PUBACK}
		if err := a.Decode(s.version, h.Flags, body); err != nil {
			return err
		}
		return d.acked(&a)
	case mqtt.SUBACK:
		return s.subscribed(h, body)
	case mqtt.PINGRESP:
		return (&mqtt.Ping{}).Decode(s.version, h.Flags, body)
	case mqtt.DISCONNECT:
		var p mqtt.Disconnect
		if err := p.DecodeAtClient(s.version, h.Flags, body); err != nil {
			return err
		}
		return fmt.Errorf("the server ended the connection: %v %s", p.Code, p.Reason)
	}
	return &mqtt.Error{Code: mqtt.ProtocolError, Text: "unexpected " + h.Type.String()}
}

func (s *session) subscribed(h mqtt.Header, body []byte) error {
	var p mqtt.Suback
	if err := p.Decode(s.version, h.Flags, body); err != nil {
		return err
	}
	if p.PacketID != s.subs || len(p.Codes) != 1 {
		return &mqtt.Error{Code: mqtt.ProtocolError, Text: "SUBACK for what was not asked"}
	}
	if p.Codes[0].Failed() {
		return fmt.Errorf("the server refused the subscription: %v %s", p.Codes[0], p.Reason)
	}
	return nil
}

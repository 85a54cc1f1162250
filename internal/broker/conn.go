package broker

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"hawser/internal/mqtt"
)

// conn is one admitted connection. It has one goroutine, which reads; who has
// something to send appends to out, and a goroutine exists only while there is
// something to write. An idle connection costs its TLS state, this struct and
// one small stack.
type conn struct {
	b     *Broker
	tls   *tls.Conn
	m     *member
	q     *Quota
	s     *session // set once, before serve
	gen   uint64   // the session's, as of this connection; set with s
	ready bool     // CONNACK is out: deliveries may follow; guarded by session.mu

	version   mqtt.Version
	keepAlive time.Duration // 1.5 times what the client said; 0: none
	maxPacket int           // the client's, 0: none
	window    int           // of QoS 1 and 2 deliveries: the client's receive maximum, or ours
	problems  bool          // the client takes reason strings

	// Owned by the reading goroutine.
	aliases  []string
	deadline time.Duration // of the next read, as last set; since Broker.born
	small    [256]byte     // most packets of a device fit; larger ones borrow from a pool

	writeBy time.Duration // deadline, as last set, since Broker.born; owned by the goroutine that writes

	wmu      sync.Mutex
	out      *buffer // waiting to be written; guarded by wmu
	flushing bool    // a goroutine writes; guarded by wmu
	closing  bool    // close the socket when out is empty; guarded by wmu
	hungry   bool    // tell the session when out is empty; guarded by wmu

	pending atomic.Int32  // publishes that wait for the log
	unacked atomic.Int32  // QoS 1 publishes without a PUBACK
	room    chan struct{} // a waiting publish was stored; capacity 1
	gone    chan struct{} // closed when the connection ends
	once    sync.Once

	fate atomic.Pointer[fate]
}

// fate is why a connection ends. The first one counts.
type fate struct {
	code mqtt.ReasonCode
	err  error
	will bool // the Will is to be published
}

// buffer is a piece of output, from a pool.
type buffer struct{ b []byte }

const keptBuffer = 4 << 10 // larger ones are left to the garbage collector

func (b *Broker) getBuffer() *buffer { return b.buffers.Get().(*buffer) }

func (b *Broker) putBuffer(o *buffer) {
	if cap(o.b) <= keptBuffer {
		o.b = o.b[:0]
		b.buffers.Put(o)
	}
}

// packet is what can be sent.
type packet interface {
	Append(dst []byte, v mqtt.Version) []byte
}

// send queues one packet. It never blocks.
func (c *conn) send(p packet) {
	c.wmu.Lock()
	over := false
	if !c.closing {
		c.grab()
		start := len(c.out.b)
		c.out.b = p.Append(c.out.b, c.version)
		if over = c.maxPacket > 0 && len(c.out.b)-start > c.maxPacket; over { // MQTT 5.0 3.1.2-24
			c.out.b = c.out.b[:start]
		}
		c.kick()
	}
	c.wmu.Unlock()
	if over {
		c.end(fate{code: mqtt.PacketTooLarge, err: errAnswerTooLarge, will: true})
	}
}

var errAnswerTooLarge = errors.New("an answer is larger than the client's maximum packet size")

// sendAck queues a PUBACK, PUBREC, PUBREL or PUBCOMP without starting the
// writer: acks of one frame leave together, see Broker.committed.
func (c *conn) sendAck(t mqtt.Type, pid uint16, code mqtt.ReasonCode) {
	a := mqtt.Ack{Type: t, PacketID: pid, Code: code}
	c.wmu.Lock()
	if !c.closing {
		c.grab()
		c.out.b = a.Append(c.out.b, c.version)
	}
	c.wmu.Unlock()
}

// start makes what was queued leave.
func (c *conn) start() {
	c.wmu.Lock()
	c.kick()
	c.wmu.Unlock()
}

// What became of a delivery that was handed to the connection.
type sent uint8

const (
	queued  sent = iota
	refused      // the client takes too little, or is about to go
	never        // not allowed, or too large for this client
)

// sendPublish queues a delivery. It is the one way out for messages, live,
// queued, retained or sent again, and asks the authorizer on both ends: the
// publisher must still be allowed to say this, and the client to hear it. At
// QoS 0 it gives up when the client takes too little. The caller holds the
// session's lock.
func (c *conn) sendPublish(d *delivery, left uint32) sent {
	if !c.m.may(Receive, d.msg.topic) || !c.b.dir.stillMayPublish(d.msg.from, d.msg.topic) {
		c.b.stats.Refused.Add(1)
		return never
	}
	var p mqtt.Publish
	d.packet(&p, left)
	if c.maxPacket > 0 && mqtt.PublishSize(c.version, &p) > c.maxPacket {
		c.b.stats.TooLarge.Add(1)
		return never
	}
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if c.closing {
		return refused
	}
	if d.qos == 0 && c.out != nil && len(c.out.b) > c.q.OutBytes {
		c.b.stats.Dropped.Add(1)
		return refused
	}
	c.grab()
	c.out.b = mqtt.AppendPublish(c.out.b, c.version, &p)
	c.kick()
	return queued
}

// full reports whether QoS 0 would be dropped, and asks for a call of
// session.drained when it no longer would.
func (c *conn) full() bool {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if c.out != nil && len(c.out.b) > c.q.OutBytes/2 {
		c.hungry = true
		return true
	}
	return false
}

// grab makes sure there is a buffer. The caller holds wmu.
func (c *conn) grab() {
	if c.out == nil {
		c.out = c.b.getBuffer()
	}
}

// kick starts the writer. The caller holds wmu.
func (c *conn) kick() {
	if !c.flushing && (c.out != nil || c.closing) {
		c.flushing = true
		go c.flush()
	}
}

// flush writes until nothing is left.
func (c *conn) flush() {
	for {
		c.wmu.Lock()
		out, hungry := c.out, c.hungry
		c.out, c.hungry = nil, false
		if out == nil {
			c.flushing = false
			closing := c.closing
			c.wmu.Unlock()
			if closing {
				c.hangUp()
			}
			if hungry {
				c.s.drained(c)
			}
			return
		}
		if hungry {
			c.hungry = true
		}
		c.wmu.Unlock()
		if err := c.write(out.b); err != nil {
			c.end(fate{err: fmt.Errorf("write: %w", err), will: true})
			c.hangUp()
			return
		}
		c.b.putBuffer(out)
	}
}

// write hands p to TLS in pieces of at most one record: a device with a small
// input buffer dies on a larger one, and Go knows no record_size_limit.
func (c *conn) write(p []byte) error {
	if err := c.allowTime(); err != nil {
		return err
	}
	for len(p) > 0 {
		n, err := c.tls.Write(p[:min(len(p), c.q.Record)])
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// allowTime gives a write the WriteTimeout, or up to a quarter more: moving the timer for
// each PUBACK would be a twentieth of its cost.
func (c *conn) allowTime() error {
	limit, now := c.b.cfg.Limits.WriteTimeout, time.Since(c.b.born)
	if c.writeBy-now >= limit {
		return nil
	}
	c.writeBy = now + limit + limit/4
	return c.tls.SetWriteDeadline(c.b.born.Add(c.writeBy))
}

// end decides the connection's fate and makes its reader come to an end. A 5.0
// client is told the code, unless it is Success.
func (c *conn) end(f fate) {
	if !c.fate.CompareAndSwap(nil, &f) {
		return
	}
	c.once.Do(func() { close(c.gone) })
	c.wmu.Lock()
	if c.version == mqtt.V5 && f.code != mqtt.Success && !c.closing {
		d := mqtt.Disconnect{Code: f.code}
		if c.problems && f.err != nil {
			d.Reason = clip(f.err.Error(), 200)
		}
		c.grab()
		start := len(c.out.b)
		c.out.b = d.Append(c.out.b, c.version)
		if c.maxPacket > 0 && len(c.out.b)-start > c.maxPacket { // MQTT 5.0 3.14.2.2.3
			d.Reason = ""
			c.out.b = d.Append(c.out.b[:start], c.version)
		}
	}
	c.closing = true
	c.kick()
	c.wmu.Unlock()
}

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}

// hangUp closes the socket: half first, so that what was written arrives. The
// close_notify must not wait for a client that takes nothing.
func (c *conn) hangUp() {
	c.tls.SetDeadline(time.Now().Add(time.Second))
	c.tls.CloseWrite()
	c.tls.NetConn().Close()
}

// errEnded ends the read loop of a connection whose fate is sealed elsewhere.
var errEnded = errors.New("connection ended")

// serve reads until the connection ends, then takes it off its session. It runs
// on a goroutine of its own: the handshake's has grown a stack of 16 KiB.
func (c *conn) serve() {
	err := c.readPackets()
	f := fate{err: err, will: true}
	var bad *mqtt.Error
	switch {
	case errors.As(err, &bad):
		f.code = bad.Code
	case errors.Is(err, os.ErrDeadlineExceeded):
		f.code, f.err = mqtt.KeepAliveTimeout, errKeepAlive
	case errors.Is(err, net.ErrClosed), errors.Is(err, io.EOF), errors.Is(err, errEnded):
	}
	c.end(f)
	c.b.detach(c)
}

var errKeepAlive = errors.New("nothing was heard for 1.5 times the keep alive")

// readPackets handles packets until an error. Between packets it waits with the
// small buffer only.
func (c *conn) readPackets() error {
	for {
		if err := c.await(); err != nil {
			return err
		}
		n, err := c.tls.Read(c.small[:])
		if err != nil {
			return err
		}
		rest, err := c.handle(c.small[:n])
		if err != nil {
			return err
		}
		if len(rest) > 0 {
			if err := c.readLarge(rest); err != nil {
				return err
			}
		}
	}
}

// await sets the time by which the client must be heard again (MQTT 5.0
// 3.1.2.10). It moves the timer only when that is off by a tenth.
func (c *conn) await() error {
	if c.keepAlive == 0 {
		return nil
	}
	at := time.Since(c.b.born) + c.keepAlive
	if at-c.deadline < c.keepAlive/10 {
		return nil
	}
	c.deadline = at
	return c.tls.SetReadDeadline(c.b.born.Add(at))
}

// readLarge goes on with the beginning of a packet, in a borrowed buffer, until
// the buffer holds no part of a packet.
func (c *conn) readLarge(rest []byte) error {
	buf := c.b.getBuffer()
	defer func() { c.b.putBuffer(buf) }()
	buf.b = append(buf.b[:0], rest...)
	for len(buf.b) > 0 {
		need, err := c.needed(buf.b)
		if err != nil {
			return err
		}
		if cap(buf.b) < need {
			// Doubling, not the claimed length: memory follows the bytes.
			grown := make([]byte, len(buf.b), min(max(need, 1024), max(2*cap(buf.b), 2048)))
			copy(grown, buf.b)
			c.b.putBuffer(buf)
			buf = &buffer{grown}
		}
		if err := c.await(); err != nil {
			return err
		}
		n, err := c.tls.Read(buf.b[len(buf.b):cap(buf.b)])
		if err != nil {
			return err
		}
		rest, err := c.handle(buf.b[:len(buf.b)+n])
		if err != nil {
			return err
		}
		buf.b = buf.b[:copy(buf.b[:cap(buf.b)], rest)]
	}
	return nil
}

// needed is how long the packet is that begins in b: at least one byte more
// than b holds. A packet over the limit is refused by its header alone.
func (c *conn) needed(b []byte) (int, error) {
	h, n, err := mqtt.ParseHeader(b)
	if err != nil {
		return 0, err
	}
	if n == 0 {
		return len(b) + 1, nil
	}
	if n+h.Remaining > c.b.cfg.Limits.MaxPacket {
		return 0, &mqtt.Error{Code: mqtt.PacketTooLarge, Text: "packet of more than the maximum size"}
	}
	return n + h.Remaining, nil
}

// handle takes the whole packets off b and gives back what is left.
func (c *conn) handle(b []byte) (rest []byte, err error) {
	for len(b) > 0 {
		h, n, err := mqtt.ParseHeader(b)
		if err != nil {
			return nil, err
		}
		if n > 0 && n+h.Remaining > c.b.cfg.Limits.MaxPacket {
			return nil, &mqtt.Error{Code: mqtt.PacketTooLarge, Text: "packet of more than the maximum size"}
		}
		if n == 0 || len(b) < n+h.Remaining {
			return b, nil
		}
		if err := c.dispatch(h, b[n:n+h.Remaining]); err != nil {
			return nil, err
		}
		b = b[n+h.Remaining:]
		if c.fate.Load() != nil {
			return nil, errEnded
		}
	}
	return nil, nil
}

// dispatch handles one packet.
func (c *conn) dispatch(h mqtt.Header, body []byte) error {
	switch h.Type {
	case mqtt.PUBLISH:
		return c.onPublish(h.Flags, body)
	case mqtt.PUBACK, mqtt.PUBREC, mqtt.PUBREL, mqtt.PUBCOMP:
		return c.onAck(h, body)
	case mqtt.SUBSCRIBE:
		return c.onSubscribe(h.Flags, body)
	case mqtt.UNSUBSCRIBE:
		return c.onUnsubscribe(h.Flags, body)
	case mqtt.PINGREQ:
		p := mqtt.Ping{Type: mqtt.PINGREQ}
		if err := p.Decode(c.version, h.Flags, body); err != nil {
			return err
		}
		p.Type = mqtt.PINGRESP
		c.send(&p)
		return nil
	case mqtt.DISCONNECT:
		return c.onDisconnect(h.Flags, body)
	}
	return &mqtt.Error{Code: mqtt.ProtocolError, Text: h.Type.String() + " from a client"}
}

// onDisconnect ends the connection as the client wants it. Only a normal end takes
// the Will back (MQTT 5.0 3.14.4-3).
func (c *conn) onDisconnect(flags byte, body []byte) error {
	var d mqtt.Disconnect
	if err := d.Decode(c.version, flags, body); err != nil {
		return err
	}
	if d.HasSessionExpiry {
		if err := c.s.setExpiry(c, d.SessionExpiry); err != nil {
			return err
		}
	}
	c.end(fate{err: errEnded, will: d.Code != mqtt.Success})
	return errEnded
}

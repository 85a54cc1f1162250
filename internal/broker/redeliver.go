package broker

import (
	"math"
	"time"

	"hawser/internal/mqtt"
	"hawser/internal/msglog"
)

// rewind prepares for a new connection: what was sent and not acknowledged is to
// be sent again (MQTT 5.0 4.4). Messages in the session's order are read back
// from disk first, the others are still in memory.
func (o *outgoing) rewind() {
	for i := range o.window {
		d := &o.window[i]
		d.dup = d.dup || d.state == stateSent
		d.due = d.state <= stateSent
	}
}

// resume sends what a new connection needs first: the second halves of QoS 2
// deliveries, then the first ones that are due, then whatever is on disk. A
// PUBREL whose PUBREC is on its way to disk follows it. The caller holds mu.
func (s *session) resume(c *conn) {
	c.ready = true
	for i := range s.out.window {
		if d := &s.out.window[i]; d.state == stateReleased {
			c.send(&mqtt.Ack{Type: mqtt.PUBREL, PacketID: d.pid})
		}
	}
	s.pump()
}

// everywhere is above every position.
const everywhere = msglog.Pos(math.MaxUint64)

// sendDue sends what has its place in the window and was not sent on this
// connection, in the order of the window (MQTT 5.0 4.6.0-1): as far as it has
// been read back, packet ids are on disk, and the client's receive maximum goes,
// which may be smaller than that of the connection before. What lies behind the
// position it gives must wait for one that is not read back yet.
func (s *session) sendDue(c *conn) (hold msglog.Pos) {
	o := &s.out
	flying := 0
	for i := range o.window {
		if !o.window[i].due {
			flying++
		}
	}
	for i := 0; i < len(o.window); {
		d := &o.window[i]
		switch {
		case !d.due:
			i++
			continue
		case d.msg == nil:
			return d.pos
		case flying >= c.window, d.state == stateStoring && o.storing > 0:
			return everywhere
		}
		d.due, d.state = false, stateSent
		if s.transmit(c, d, time.Now()) {
			flying++
			i++
		}
	}
	return everywhere
}

// holds reports whether the next delivery must wait for the one at hold.
func (o *outgoing) holds(hold msglog.Pos) bool {
	return hold != everywhere && (len(o.retained) > 0 || len(o.waiting) > 0 && o.waiting[0].pos > hold)
}

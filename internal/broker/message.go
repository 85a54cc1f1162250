package broker

import (
	"strings"
	"time"

	"hawser/internal/identity"
	"hawser/internal/mqtt"
	"hawser/internal/msglog"
)

// message is one application message on its way out. It is shared by all who
// get it and never changes. It is a copy: a record is a view of a whole frame,
// and one slow client would keep half a megabyte for each of its messages.
type message struct {
	pos     msglog.Pos
	from    identity.Principal
	client  string // client id of a service, for No Local
	topic   string
	payload []byte
	props   []byte
	qos     byte
	retain  bool  // as it was published
	at      int64 // when it was taken, unix milliseconds
	expires int64 // unix milliseconds; 0: never
}

func newMessage(r *msglog.Record) *message {
	m := &message{pos: r.Pos, from: r.From, client: strings.Clone(r.ClientID), topic: strings.Clone(r.Topic),
		qos: r.QoS, retain: r.Retain, at: r.Time}
	m.from.Name = strings.Clone(m.from.Name)
	m.payload = append([]byte(nil), r.Payload...)
	if len(r.Props) > 0 {
		m.props = append([]byte(nil), r.Props...)
	}
	m.expires = expiryOf(r)
	return m
}

// expiryOf is when a record's message expires, 0 for never.
func expiryOf(r *msglog.Record) int64 {
	if !r.HasExpiry {
		return 0
	}
	return r.Time + int64(r.Expiry)*1000
}

// left is the message expiry interval to send on: what is left of it (MQTT 5.0
// 3.3.2.3.3). dead: it has run out.
func (m *message) left(now time.Time) (seconds uint32, dead bool) {
	if m.expires == 0 {
		return 0, false
	}
	ms := m.expires - now.UnixMilli()
	if ms <= 0 {
		return 0, true
	}
	return uint32((ms + 999) / 1000), false
}

func (m *message) size() int { return len(m.topic) + len(m.payload) + len(m.props) }

// How far a delivery of QoS 1 or 2 has come. The values are stored in the
// registry (registry.Inflight.State).
const (
	stateWaiting  = iota // no packet id yet
	stateStoring         // QoS 2: its packet id is on its way to disk
	stateSent            // PUBLISH has gone out
	stateReceived        // QoS 2: PUBREC is on its way to disk
	stateReleased        // QoS 2: PUBREL has gone out
	stateDone            // QoS 2: PUBCOMP came; remembered until the cursor has passed it
)

// delivery is one message for one session.
type delivery struct {
	msg    *message // nil: known by its position only, to be read again
	pos    msglog.Pos
	seq    uint64 // of the queue message it lies in; 0: in none
	ids    []uint32
	direct *direct
	group  *group
	pid    uint16
	qos    byte
	state  byte
	retain bool // the RETAIN flag to send
	dup    bool
	due    bool          // has its place in the window and is yet to be sent on this connection
	kept   bool          // from the retained messages, not from the log's order
	greets *subscription // whose retained message this is, where it must not be lost
}

// packet fills p for this delivery to a client.
func (d *delivery) packet(p *mqtt.Publish, left uint32) {
	*p = mqtt.Publish{
		Dup: d.dup, Retain: d.retain, QoS: d.qos, PacketID: d.pid, Payload: d.msg.payload,
		Topic: []byte(d.msg.topic), HasExpiry: d.msg.expires != 0, Expiry: left, SubIDs: d.ids, Forward: d.msg.props,
	}
}

// subscription is one filter of a session.
type subscription struct {
	s       *session
	group   *group // of a $share subscription
	full    string // as subscribed, with $share
	filter  string // what is matched
	id      uint32 // subscription identifier, 0: none
	start   msglog.Pos
	qos     byte
	noLocal bool
	asIs    bool // Retain As Published
	rh      byte // retain handling

	// What its retained messages have come to; guarded by session.mu.
	ungreeted bool // the row says that not all of them were acknowledged
	greeting  int  // QoS 1 and 2 ones on their way
}

// notGreeted is a bit of the stored options, above those of the packet: after a
// restart the retained messages are sent again.
const notGreeted = 1 << 7

// options is the byte of MQTT 5.0 3.8.3.1, and notGreeted, as the registry keeps
// it. The caller holds session.mu.
func (s *subscription) options() byte {
	o := s.qos | s.rh<<4
	if s.noLocal {
		o |= 1 << 2
	}
	if s.asIs {
		o |= 1 << 3
	}
	if s.ungreeted {
		o |= notGreeted
	}
	return o
}

func (s *subscription) setOptions(o byte) {
	s.qos, s.noLocal, s.asIs, s.rh, s.ungreeted = o&3, o&4 != 0, o&8 != 0, o>>4&3, o&notGreeted != 0
}

// loops reports what No Local keeps back (MQTT 5.0 3.8.3.1-3): what this very
// client published. Records of a device carry no client id: it is the name.
func (s *subscription) loops(from identity.Principal, client string) bool {
	return s.noLocal && from == s.s.key.Principal && (s.s.isDevice() || client == s.s.key.ClientID)
}

// match is what one record means for one session: one copy with the highest QoS
// and all subscription identifiers (MQTT 5.0 3.3.4).
type match struct {
	hit    bool
	qos    byte
	retain bool
	ids    []uint32
}

// add takes one matching subscription in.
func (m *match) add(sub *subscription, qos byte, retain bool) {
	m.hit = true
	m.qos = max(m.qos, min(sub.qos, qos))
	m.retain = m.retain || sub.asIs && retain
	if sub.id != 0 {
		m.ids = append(m.ids, sub.id)
	}
}

// ownUplink reports what is never sent back to a device: what it published under
// its u/, however wide its subscription (design section 4).
func ownUplink(who identity.Principal, topic string) bool {
	if who.Kind != identity.Device {
		return false
	}
	_, rest, ok := identity.DeviceTopic(topic)
	return ok && under(rest, "u")
}

// matchRecord matches a record against the plain subscriptions of one session.
// The caller holds s.mu.
func (s *session) matchRecord(r *msglog.Record) (m match) {
	if ownUplink(s.key.Principal, r.Topic) {
		return m
	}
	for _, sub := range s.subs {
		if sub.group == nil && sub.start <= r.Pos && identity.Match(sub.filter, r.Topic) && !sub.loops(r.From, r.ClientID) {
			m.add(sub, r.QoS, r.Retain)
		}
	}
	return m
}

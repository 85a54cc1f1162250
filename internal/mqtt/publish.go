package mqtt

// Publish is a PUBLISH packet. The same value can be used for packet after packet:
// Decode sets every field and keeps only the room of SubIDs and Scratch.
type Publish struct {
	Dup, Retain bool
	QoS         byte
	PacketID    uint16 // 0 at QoS 0
	Topic       []byte // a view; empty only in 5.0 and with an alias
	Payload     []byte // a view
	Alias       uint16 // 0: none
	HasExpiry   bool
	Expiry      uint32   // message expiry interval, seconds
	SubIDs      []uint32 // subscription identifiers, from a server only

	// Forward is the wire form of the 5.0 properties that a broker passes on unaltered
	// and in order (3.3.2.3): payload format indicator, content type, response topic,
	// correlation data, user properties. A view, unless properties of the connection
	// stand between them: then it lies in Scratch, or in new memory if that is too small.
	Forward []byte
	Scratch []byte // room for Forward, the caller's
}

// Decode reads the body of a PUBLISH as a server does. Subscription identifiers are a
// protocol error there (MQTT 5.0 3.3.4-6).
func (p *Publish) Decode(v Version, flags byte, body []byte) error {
	return p.decode(v, flags, body, true)
}

// DecodeAtClient reads the body of a PUBLISH that a server has sent.
func (p *Publish) DecodeAtClient(v Version, flags byte, body []byte) error {
	return p.decode(v, flags, body, false)
}

func (p *Publish) decode(v Version, flags byte, body []byte, atServer bool) error {
	*p = Publish{Dup: flags&8 != 0, QoS: flags >> 1 & 3, Retain: flags&1 != 0, SubIDs: p.SubIDs[:0], Scratch: p.Scratch}
	if p.QoS == 3 {
		return malformed("QoS 3")
	}
	if p.Dup && p.QoS == 0 {
		return malformed("DUP at QoS 0")
	}
	r := reader{b: body}
	p.Topic = r.topicName()
	if p.QoS > 0 {
		p.PacketID = r.packetID()
	}
	if v == V5 {
		p.decodeProps(&r, atServer)
	}
	if r.err != nil {
		return r.err
	}
	p.Payload = r.b
	if len(p.Topic) == 0 && (v != V5 || p.Alias == 0) {
		return violation("no topic")
	}
	return nil
}

func (p *Publish) decodeProps(r *reader, atServer bool) {
	g := gather{scratch: p.Scratch}
	ps := r.properties(1 << PUBLISH)
	for x, ok := ps.next(r); ok; x, ok = ps.next(r) {
		switch x.id {
		case propTopicAlias:
			if p.Alias = uint16(x.num); p.Alias == 0 {
				r.fail(&Error{TopicAliasInvalid, "topic alias 0"})
			}
		case propMessageExpiry:
			p.HasExpiry, p.Expiry = true, x.num
		case propSubID:
			if atServer {
				r.fail(violation("subscription identifier from a client"))
			}
			p.SubIDs = append(p.SubIDs, x.num)
		default:
			g.add(&ps, x)
		}
	}
	p.Forward = g.out
	if g.copied {
		p.Scratch = g.out
	}
}

// Append appends the whole packet. It is AppendPublish.
func (p *Publish) Append(dst []byte, v Version) []byte { return AppendPublish(dst, v, p) }

// AppendPublish appends the whole packet, without allocating if dst has the room. To a
// 3.1.1 peer all properties are left out.
func AppendPublish(dst []byte, v Version, p *Publish) []byte {
	return append(AppendPublishHead(dst, v, p, len(p.Payload)), p.Payload...)
}

// AppendPublishHead appends everything but the payload, of which payload bytes will
// follow: many subscribers can so be sent one copy of it. p.Payload is not looked at.
func AppendPublishHead(dst []byte, v Version, p *Publish, payload int) []byte {
	flags := p.QoS << 1
	if p.Dup {
		flags |= 8
	}
	if p.Retain {
		flags |= 1
	}
	dst = AppendHeader(dst, PUBLISH, flags, p.headSize(v)+payload)
	dst = appendField(dst, p.Topic)
	if p.QoS > 0 {
		dst = appendUint16(dst, p.PacketID)
	}
	if v == V5 {
		dst = p.appendProps(appendVarint(dst, uint32(p.propsSize())))
	}
	return dst
}

// PublishSize is the length in bytes of what AppendPublish appends: what a peer's
// maximum packet size is compared with.
func PublishSize(v Version, p *Publish) int {
	remaining := p.headSize(v) + len(p.Payload)
	return 1 + varintSize(remaining) + remaining
}

func (p *Publish) headSize(v Version) int {
	n := 2 + len(p.Topic)
	if p.QoS > 0 {
		n += 2
	}
	if v == V5 {
		props := p.propsSize()
		n += varintSize(props) + props
	}
	return n
}

func (p *Publish) propsSize() int {
	n := len(p.Forward)
	if p.Alias != 0 {
		n += 3
	}
	if p.HasExpiry {
		n += 5
	}
	for _, id := range p.SubIDs {
		n += 1 + varintSize(int(id))
	}
	return n
}

func (p *Publish) appendProps(dst []byte) []byte {
	if p.Alias != 0 {
		dst = appendProp16(dst, propTopicAlias, p.Alias)
	}
	if p.HasExpiry {
		dst = appendProp32(dst, propMessageExpiry, p.Expiry)
	}
	for _, id := range p.SubIDs {
		dst = appendVarint(append(dst, propSubID), id)
	}
	return append(dst, p.Forward...)
}

// Ack is PUBACK, PUBREC, PUBREL or PUBCOMP.
type Ack struct {
	Type     Type // set by the caller, also before Decode
	PacketID uint16
	Code     ReasonCode
	Reason   string
	User     []byte // user properties as on the wire
}

// Decode reads the body of a packet of type p.Type.
func (p *Ack) Decode(v Version, flags byte, body []byte) error {
	*p = Ack{Type: p.Type}
	if err := checkFlags(flags, p.flags()); err != nil {
		return err
	}
	r := reader{b: body}
	p.PacketID = r.packetID()
	if v != V5 || len(r.b) == 0 {
		return r.end()
	}
	p.Code = ReasonCode(r.uint8())
	if err := checkCode(p.Code, 1<<p.Type); err != nil {
		return err
	}
	if len(r.b) > 0 {
		p.Reason, p.User = r.reasonAndUser(1 << p.Type)
	}
	return r.end()
}

func (p *Ack) flags() byte {
	if p.Type == PUBREL {
		return 2
	}
	return 0
}

// Append appends the whole packet. 3.1.1 has no codes: only Success can be told there.
func (p *Ack) Append(dst []byte, v Version) []byte {
	dst = append(dst, byte(p.Type)<<4|p.flags())
	dst, mark := openBlock(dst)
	dst = appendUint16(dst, p.PacketID)
	if v == V5 && (p.Code != Success || p.Reason != "" || len(p.User) > 0) {
		dst = append(dst, byte(p.Code))
		dst = appendReasonAndUser(dst, p.Reason, p.User, true)
	}
	return closeBlock(dst, mark)
}

// reasonAndUser reads a property list that holds nothing else.
func (r *reader) reasonAndUser(where packetSet) (reason string, user []byte) {
	var g gather
	ps := r.properties(where)
	for x, ok := ps.next(r); ok; x, ok = ps.next(r) {
		switch x.id {
		case propReasonString:
			reason = string(x.data)
		case propUser:
			g.add(&ps, x)
		}
	}
	return reason, g.out
}

// appendReasonAndUser appends such a list; optional means that an empty one is left out,
// which only the packets allow that end with it.
func appendReasonAndUser(dst []byte, reason string, user []byte, optional bool) []byte {
	if optional && reason == "" && len(user) == 0 {
		return dst
	}
	dst, mark := openBlock(dst)
	dst = append(appendPropField(dst, propReasonString, reason), user...)
	return closeBlock(dst, mark)
}

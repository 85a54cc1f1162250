package mqtt

// The property identifiers of MQTT 5.0 2.2.2.2.
const (
	propPayloadFormat   = 0x01
	propMessageExpiry   = 0x02
	propContentType     = 0x03
	propResponseTopic   = 0x08
	propCorrelationData = 0x09
	propSubID           = 0x0B
	propSessionExpiry   = 0x11
	propAssignedID      = 0x12
	propServerKeepAlive = 0x13
	propAuthMethod      = 0x15
	propAuthData        = 0x16
	propRequestProblem  = 0x17
	propWillDelay       = 0x18
	propRequestResponse = 0x19
	propResponseInfo    = 0x1A
	propServerReference = 0x1C
	propReasonString    = 0x1F
	propReceiveMaximum  = 0x21
	propTopicAliasMax   = 0x22
	propTopicAlias      = 0x23
	propMaximumQoS      = 0x24
	propRetainAvailable = 0x25
	propUser            = 0x26
	propMaxPacketSize   = 0x27
	propWildcardAvail   = 0x28
	propSubIDAvail      = 0x29
	propSharedAvail     = 0x2A
)

// propKind is how the value of a property is written.
type propKind byte

const (
	kindNone propKind = iota
	kindFlag          // one byte, 0 or 1
	kindUint16
	kindNonzero16 // two bytes, 0 is a protocol error
	kindUint32
	kindNonzero32
	kindVarint // never 0
	kindBinary
	kindText
	kindTopic // a topic name: no wildcard, not empty
	kindPair
)

// propUse says how a property is written and in which packets it may stand.
func propUse(id uint32) (propKind, packetSet) {
	switch id {
	case propPayloadFormat:
		return kindFlag, 1<<PUBLISH | inWill
	case propMessageExpiry:
		return kindUint32, 1<<PUBLISH | inWill
	case propContentType:
		return kindText, 1<<PUBLISH | inWill
	case propResponseTopic:
		return kindTopic, 1<<PUBLISH | inWill
	case propCorrelationData:
		return kindBinary, 1<<PUBLISH | inWill
	case propSubID:
		return kindVarint, 1<<PUBLISH | 1<<SUBSCRIBE
	case propSessionExpiry:
		return kindUint32, 1<<CONNECT | 1<<CONNACK | 1<<DISCONNECT
	case propTopicAlias:
		return kindUint16, 1 << PUBLISH
	case propUser:
		const all = 1<<(AUTH+1) - 1<<CONNECT
		return kindPair, all&^(1<<PINGREQ|1<<PINGRESP) | inWill
	case propReasonString:
		return kindText, 1<<CONNACK | 1<<PUBACK | 1<<PUBREC | 1<<PUBREL | 1<<PUBCOMP |
			1<<SUBACK | 1<<UNSUBACK | 1<<DISCONNECT | 1<<AUTH
	}
	return connectionPropUse(id)
}

func connectionPropUse(id uint32) (propKind, packetSet) {
	switch id {
	case propAuthMethod:
		return kindText, 1<<CONNECT | 1<<CONNACK | 1<<AUTH
	case propAuthData:
		return kindBinary, 1<<CONNECT | 1<<CONNACK | 1<<AUTH
	case propWillDelay:
		return kindUint32, inWill
	case propRequestProblem, propRequestResponse:
		return kindFlag, 1 << CONNECT
	case propReceiveMaximum:
		return kindNonzero16, 1<<CONNECT | 1<<CONNACK
	case propTopicAliasMax:
		return kindUint16, 1<<CONNECT | 1<<CONNACK
	case propMaxPacketSize:
		return kindNonzero32, 1<<CONNECT | 1<<CONNACK
	case propAssignedID, propResponseInfo:
		return kindText, 1 << CONNACK
	case propServerKeepAlive:
		return kindUint16, 1 << CONNACK
	case propMaximumQoS, propRetainAvailable, propWildcardAvail, propSubIDAvail, propSharedAvail:
		return kindFlag, 1 << CONNACK
	case propServerReference:
		return kindText, 1<<CONNACK | 1<<DISCONNECT
	}
	return kindNone, 0
}

// property is one decoded property: num or data is its value, start and end where its
// encoding lies in the list.
type property struct {
	id         uint32
	num        uint32
	data       []byte
	start, end int
}

// properties walks over a property list and judges what 2.2.2 demands of every list.
type properties struct {
	list  reader
	whole []byte
	where packetSet
	seen  uint64
}

// properties takes a property list off r. An absent list is the caller's affair.
func (r *reader) properties(where packetSet) properties {
	n := r.varint()
	whole := r.take(int(n))
	return properties{list: reader{b: whole}, whole: whole, where: where}
}

// next gives the following property; ok is false at the end and after an error,
// which it has then handed to r.
func (ps *properties) next(r *reader) (p property, ok bool) {
	if len(ps.list.b) == 0 || r.err != nil {
		return p, false
	}
	p.start = len(ps.whole) - len(ps.list.b)
	p.id = ps.list.varint()
	kind, allowed := propUse(p.id)
	switch {
	case ps.list.err != nil:
	case kind == kindNone:
		ps.list.fail(malformed("unknown property"))
	case allowed&ps.where == 0:
		ps.list.fail(violation("property not allowed in this packet"))
	case ps.seen&(1<<p.id) != 0 && !ps.repeatable(p.id): // ids end at 0x2A
		ps.list.fail(violation("property given twice"))
	default:
		ps.seen |= 1 << p.id
		p.value(&ps.list, kind)
	}
	if ps.list.err != nil {
		r.fail(ps.list.err)
		return property{}, false
	}
	p.end = len(ps.whole) - len(ps.list.b)
	return p, true
}

// repeatable: user properties anywhere, subscription identifiers in PUBLISH only.
func (ps *properties) repeatable(id uint32) bool {
	return id == propUser || (id == propSubID && ps.where&(1<<PUBLISH) != 0)
}

func (p *property) value(r *reader, kind propKind) {
	switch kind {
	case kindFlag:
		if p.num = uint32(r.uint8()); p.num > 1 {
			r.fail(violation("property is neither 0 nor 1"))
		}
	case kindUint16:
		p.num = uint32(r.uint16())
	case kindUint32:
		p.num = r.uint32()
	case kindNonzero16:
		p.num = uint32(r.uint16())
		p.refuseZero(r)
	case kindNonzero32:
		p.num = r.uint32()
		p.refuseZero(r)
	case kindVarint:
		p.num = r.varint()
		p.refuseZero(r)
	case kindBinary:
		p.data = r.binary()
	case kindText:
		p.data = r.text()
	case kindTopic:
		if p.data = r.topicName(); r.err == nil && len(p.data) == 0 {
			r.fail(malformed("response topic is empty"))
		}
	case kindPair:
		r.text()
		r.text()
	}
}

func (p *property) refuseZero(r *reader) {
	if p.num == 0 {
		r.fail(violation("property is 0"))
	}
}

// gather collects the wire form of some properties: a view as long as they lie side by
// side, else a copy appended to scratch.
type gather struct {
	scratch    []byte
	out        []byte
	start, end int // where out lies in the list, while it is a view
	copied     bool
}

func (g *gather) add(ps *properties, p property) {
	switch {
	case g.copied:
		g.out = append(g.out, ps.whole[p.start:p.end]...)
	case g.out == nil || g.end == p.start:
		if g.out == nil {
			g.start = p.start
		}
		g.end = p.end
		g.out = ps.whole[g.start:g.end:g.end]
	default:
		g.out = append(append(g.scratch[:0], g.out...), ps.whole[p.start:p.end]...)
		g.copied = true
	}
}

// AppendUserProperty appends the wire form of a user property: what the User fields and
// Publish.Forward hold.
func AppendUserProperty(dst []byte, name, value string) []byte {
	return appendField(appendField(append(dst, propUser), name), value)
}

func appendProp16(dst []byte, id byte, v uint16) []byte { return appendUint16(append(dst, id), v) }
func appendProp32(dst []byte, id byte, v uint32) []byte { return appendUint32(append(dst, id), v) }

// appendPropField appends a string or binary property, unless it is empty.
func appendPropField[T string | []byte](dst []byte, id byte, v T) []byte {
	if len(v) == 0 {
		return dst
	}
	return appendField(append(dst, id), v)
}

func appendPropFlag(dst []byte, id, v byte, present bool) []byte {
	if !present {
		return dst
	}
	return append(dst, id, v)
}

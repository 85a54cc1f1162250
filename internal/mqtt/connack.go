package mqtt

import "math"

// Connack is a CONNACK packet. Code is a 5.0 code: Append writes the nearest return code
// to a 3.1.1 client, and Decode translates it back.
type Connack struct {
	SessionPresent bool
	Code           ReasonCode
	Props          ConnackProps
}

// ConnackProps are the properties of CONNACK (MQTT 5.0 3.2.2.3). Each is named so that
// its zero value, but for ReceiveMaximum, is what its absence means. Decode fills in the
// defaults, Append leaves them out.
type ConnackProps struct {
	HasSessionExpiry bool // false: as the client asked
	SessionExpiry    uint32
	ReceiveMaximum   uint16 // default 65,535, which 0 stands for in Append
	QoS0Only         bool   // maximum QoS 0
	QoS1Only         bool   // maximum QoS 1
	NoRetain         bool
	MaxPacketSize    uint32 // 0: no limit
	AssignedClientID string
	TopicAliasMax    uint16
	Reason           string
	User             []byte // user properties as on the wire
	NoWildcard       bool
	NoSubIDs         bool
	NoShared         bool
	HasKeepAlive     bool // ServerKeepAlive replaces what the client asked for
	ServerKeepAlive  uint16
	ResponseInfo     string
	ServerReference  string
	AuthMethod       string
	AuthData         []byte
}

// Decode reads the body.
func (p *Connack) Decode(v Version, flags byte, body []byte) error {
	*p = Connack{}
	if err := checkFlags(flags, 0); err != nil {
		return err
	}
	r := reader{b: body}
	ack := r.uint8()
	if ack > 1 {
		r.fail(malformed("reserved flags of CONNACK"))
	}
	p.SessionPresent = ack == 1
	p.decodeCode(&r, v)
	if p.SessionPresent && p.Code != Success {
		r.fail(violation("session present in a refusal"))
	}
	if v == V5 && r.err == nil {
		p.Props.decode(&r)
	}
	return r.end()
}

func (p *Connack) decodeCode(r *reader, v Version) {
	code, err := ReasonCode(r.uint8()), (*Error)(nil)
	if r.err != nil {
		return
	}
	if v == V5 {
		err = checkCode(code, 1<<CONNACK)
	} else {
		code, err = fromReturnCode(byte(code))
	}
	if p.Code = code; err != nil {
		r.fail(err)
	}
}

func (p *ConnackProps) decode(r *reader) {
	p.ReceiveMaximum = math.MaxUint16
	var g gather
	ps := r.properties(1 << CONNACK)
	for x, ok := ps.next(r); ok; x, ok = ps.next(r) {
		switch x.id {
		case propUser:
			g.add(&ps, x)
		case propMaximumQoS, propRetainAvailable, propWildcardAvail, propSubIDAvail, propSharedAvail:
			p.setFeature(x)
		case propAssignedID, propReasonString, propResponseInfo, propServerReference, propAuthMethod, propAuthData:
			p.setText(x)
		default:
			p.setNumber(x)
		}
	}
	p.User = g.out
	if ps.seen&(1<<propAuthData) != 0 && ps.seen&(1<<propAuthMethod) == 0 {
		r.fail(violation("authentication data without a method"))
	}
}

func (p *ConnackProps) setFeature(x property) {
	switch x.id {
	case propMaximumQoS:
		p.QoS0Only, p.QoS1Only = x.num == 0, x.num == 1
	case propRetainAvailable:
		p.NoRetain = x.num == 0
	case propWildcardAvail:
		p.NoWildcard = x.num == 0
	case propSubIDAvail:
		p.NoSubIDs = x.num == 0
	case propSharedAvail:
		p.NoShared = x.num == 0
	}
}

func (p *ConnackProps) setText(x property) {
	switch x.id {
	case propAssignedID:
		p.AssignedClientID = string(x.data)
	case propReasonString:
		p.Reason = string(x.data)
	case propResponseInfo:
		p.ResponseInfo = string(x.data)
	case propServerReference:
		p.ServerReference = string(x.data)
	case propAuthMethod:
		p.AuthMethod = string(x.data)
	case propAuthData:
		p.AuthData = x.data
	}
}

func (p *ConnackProps) setNumber(x property) {
	switch x.id {
	case propSessionExpiry:
		p.HasSessionExpiry, p.SessionExpiry = true, x.num
	case propReceiveMaximum:
		p.ReceiveMaximum = uint16(x.num)
	case propMaxPacketSize:
		p.MaxPacketSize = x.num
	case propTopicAliasMax:
		p.TopicAliasMax = uint16(x.num)
	case propServerKeepAlive:
		p.HasKeepAlive, p.ServerKeepAlive = true, uint16(x.num)
	}
}

// Append appends the whole packet.
func (p *Connack) Append(dst []byte, v Version) []byte {
	dst, mark := openBlock(append(dst, byte(CONNACK)<<4))
	var present byte
	if p.SessionPresent {
		present = 1
	}
	if v != V5 {
		return closeBlock(append(dst, present, p.Code.returnCode()), mark)
	}
	return closeBlock(p.Props.append(append(dst, present, byte(p.Code))), mark)
}

func (p *ConnackProps) append(dst []byte) []byte {
	dst, mark := openBlock(dst)
	if p.HasSessionExpiry {
		dst = appendProp32(dst, propSessionExpiry, p.SessionExpiry)
	}
	if p.ReceiveMaximum != 0 && p.ReceiveMaximum != math.MaxUint16 {
		dst = appendProp16(dst, propReceiveMaximum, p.ReceiveMaximum)
	}
	if p.MaxPacketSize != 0 {
		dst = appendProp32(dst, propMaxPacketSize, p.MaxPacketSize)
	}
	if p.TopicAliasMax != 0 {
		dst = appendProp16(dst, propTopicAliasMax, p.TopicAliasMax)
	}
	if p.HasKeepAlive {
		dst = appendProp16(dst, propServerKeepAlive, p.ServerKeepAlive)
	}
	dst = p.appendFeatures(dst)
	dst = appendPropField(dst, propAssignedID, p.AssignedClientID)
	dst = appendPropField(dst, propReasonString, p.Reason)
	dst = appendPropField(dst, propResponseInfo, p.ResponseInfo)
	dst = appendPropField(dst, propServerReference, p.ServerReference)
	dst = appendPropField(dst, propAuthMethod, p.AuthMethod)
	if p.AuthMethod != "" {
		dst = appendPropField(dst, propAuthData, p.AuthData)
	}
	return closeBlock(append(dst, p.User...), mark)
}

func (p *ConnackProps) appendFeatures(dst []byte) []byte {
	if p.QoS0Only {
		dst = appendPropFlag(dst, propMaximumQoS, 0, true)
	} else {
		dst = appendPropFlag(dst, propMaximumQoS, 1, p.QoS1Only)
	}
	dst = appendPropFlag(dst, propRetainAvailable, 0, p.NoRetain)
	dst = appendPropFlag(dst, propWildcardAvail, 0, p.NoWildcard)
	dst = appendPropFlag(dst, propSubIDAvail, 0, p.NoSubIDs)
	return appendPropFlag(dst, propSharedAvail, 0, p.NoShared)
}

package mqtt

import "math"

// Connect is a CONNECT packet.
type Connect struct {
	Version     Version
	CleanStart  bool   // clean session in 3.1.1
	KeepAlive   uint16 // seconds, 0: none
	ClientID    string
	Will        *Will
	HasUsername bool
	Username    string
	HasPassword bool
	Password    []byte // a view
	Props       ConnectProps
}

// ConnectProps are the properties of CONNECT (MQTT 5.0 3.1.2.11). Decode fills in the
// defaults, Append leaves them out.
type ConnectProps struct {
	SessionExpiry       uint32 // seconds; 0: ends with the connection, 0xFFFFFFFF: never
	ReceiveMaximum      uint16 // default 65,535, which 0 stands for in Append
	MaxPacketSize       uint32 // 0: no limit
	TopicAliasMax       uint16
	RequestResponseInfo bool
	NoProblemInfo       bool // no reason string or user property wanted but in PUBLISH, CONNACK, DISCONNECT
	AuthMethod          string
	AuthData            []byte // a view
	User                []byte // user properties as on the wire, a view
}

// Will is what a server publishes when the connection dies.
type Will struct {
	Topic         string
	Payload       []byte // a view
	QoS           byte
	Retain        bool
	DelayInterval uint32 // seconds
	HasExpiry     bool
	Expiry        uint32 // seconds, from the moment of publication
	Forward       []byte // as Publish.Forward
}

// The flags of CONNECT (MQTT 5.0 3.1.2.3).
const (
	flagCleanStart = 1 << 1
	flagWill       = 1 << 2
	flagWillRetain = 1 << 5
	flagPassword   = 1 << 6
	flagUsername   = 1 << 7
)

// Decode reads the body; the version comes from the packet, and the one given is not
// looked at. For an *Error with UnsupportedProtocolVersion, p.Version holds the level that
// was asked for (0 if even the protocol name was another), for any other one the level
// in which to answer.
func (p *Connect) Decode(_ Version, flags byte, body []byte) error {
	*p = Connect{}
	if err := checkFlags(flags, 0); err != nil {
		return err
	}
	r := reader{b: body}
	p.decodeLevel(&r)
	f := r.uint8()
	if r.err == nil {
		if err := checkConnectFlags(p.Version, f); err != nil {
			r.fail(err)
		}
	}
	p.CleanStart = f&flagCleanStart != 0
	p.KeepAlive = r.uint16()
	if p.Version == V5 && r.err == nil {
		p.Props.decode(&r)
	}
	p.decodePayload(&r, f)
	return r.end()
}

func (p *Connect) decodeLevel(r *reader) {
	name := string(r.binary())
	level := Version(r.uint8())
	switch {
	case r.err != nil:
	case name == "MQIsdp" && level == V31:
		p.Version = level
		r.fail(&Error{UnsupportedProtocolVersion, "MQTT 3.1"})
	case name != "MQTT":
		r.fail(&Error{UnsupportedProtocolVersion, "not the protocol name MQTT"})
	default:
		p.Version = level
		if level != V311 && level != V5 {
			r.fail(&Error{UnsupportedProtocolVersion, "protocol level other than 4 and 5"})
		}
	}
}

func checkConnectFlags(v Version, f byte) *Error {
	switch {
	case f&1 != 0:
		return malformed("reserved flag of CONNECT")
	case f>>3&3 == 3:
		return malformed("Will QoS 3")
	case f&flagWill == 0 && f&(3<<3|flagWillRetain) != 0:
		return malformed("Will QoS or Will retain without a Will")
	case v == V311 && f&flagPassword != 0 && f&flagUsername == 0:
		return malformed("password without a user name")
	}
	return nil
}

func (p *ConnectProps) decode(r *reader) {
	p.ReceiveMaximum = math.MaxUint16
	var g gather
	hasData := false
	ps := r.properties(1 << CONNECT)
	for x, ok := ps.next(r); ok; x, ok = ps.next(r) {
		switch x.id {
		case propSessionExpiry:
			p.SessionExpiry = x.num
		case propReceiveMaximum:
			p.ReceiveMaximum = uint16(x.num)
		case propMaxPacketSize:
			p.MaxPacketSize = x.num
		case propTopicAliasMax:
			p.TopicAliasMax = uint16(x.num)
		case propRequestResponse:
			p.RequestResponseInfo = x.num == 1
		case propRequestProblem:
			p.NoProblemInfo = x.num == 0
		case propAuthMethod:
			p.AuthMethod = string(x.data)
		case propAuthData:
			p.AuthData, hasData = x.data, true
		case propUser:
			g.add(&ps, x)
		}
	}
	p.User = g.out
	if hasData && ps.seen&(1<<propAuthMethod) == 0 {
		r.fail(violation("authentication data without a method"))
	}
}

func (p *Connect) decodePayload(r *reader, f byte) {
	p.ClientID = string(r.text())
	if f&flagWill != 0 && r.err == nil {
		p.Will = &Will{QoS: f >> 3 & 3, Retain: f&flagWillRetain != 0}
		p.Will.decode(r, p.Version)
	}
	if p.HasUsername = f&flagUsername != 0; p.HasUsername {
		p.Username = string(r.text())
	}
	if p.HasPassword = f&flagPassword != 0; p.HasPassword {
		p.Password = r.binary()
	}
	// MQTT 3.1.1 3.1.3.1: without an id the server can keep no session.
	if r.err == nil && p.ClientID == "" && p.Version == V311 && !p.CleanStart {
		r.fail(&Error{ClientIdentifierNotValid, "empty client id without clean session"})
	}
}

func (w *Will) decode(r *reader, v Version) {
	if v == V5 {
		w.decodeProps(r)
	}
	w.Topic = string(r.topicName())
	w.Payload = r.binary()
	if r.err == nil && w.Topic == "" {
		r.fail(malformed("Will without a topic"))
	}
}

func (w *Will) decodeProps(r *reader) {
	var g gather
	ps := r.properties(inWill)
	for x, ok := ps.next(r); ok; x, ok = ps.next(r) {
		switch x.id {
		case propWillDelay:
			w.DelayInterval = x.num
		case propMessageExpiry:
			w.HasExpiry, w.Expiry = true, x.num
		default:
			g.add(&ps, x)
		}
	}
	w.Forward = g.out
}

// Append appends the whole packet in p.Version; the version given is not looked at.
func (p *Connect) Append(dst []byte, _ Version) []byte {
	dst, mark := openBlock(append(dst, byte(CONNECT)<<4))
	dst = append(appendField(dst, "MQTT"), byte(p.Version), p.flags())
	dst = appendUint16(dst, p.KeepAlive)
	if p.Version == V5 {
		dst = p.Props.append(dst)
	}
	dst = appendField(dst, p.ClientID)
	if p.Will != nil {
		dst = p.Will.append(dst, p.Version)
	}
	if p.HasUsername {
		dst = appendField(dst, p.Username)
	}
	if p.HasPassword {
		dst = appendField(dst, p.Password)
	}
	return closeBlock(dst, mark)
}

func (p *Connect) flags() (f byte) {
	if p.CleanStart {
		f |= flagCleanStart
	}
	if p.Will != nil {
		f |= flagWill | p.Will.QoS<<3
		if p.Will.Retain {
			f |= flagWillRetain
		}
	}
	if p.HasUsername {
		f |= flagUsername
	}
	if p.HasPassword {
		f |= flagPassword
	}
	return f
}

func (p *ConnectProps) append(dst []byte) []byte {
	dst, mark := openBlock(dst)
	if p.SessionExpiry != 0 {
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
	dst = appendPropFlag(dst, propRequestResponse, 1, p.RequestResponseInfo)
	dst = appendPropFlag(dst, propRequestProblem, 0, p.NoProblemInfo)
	dst = appendPropField(dst, propAuthMethod, p.AuthMethod)
	if p.AuthMethod != "" {
		dst = appendPropField(dst, propAuthData, p.AuthData)
	}
	return closeBlock(append(dst, p.User...), mark)
}

func (w *Will) append(dst []byte, v Version) []byte {
	if v == V5 {
		var mark int
		dst, mark = openBlock(dst)
		if w.DelayInterval != 0 {
			dst = appendProp32(dst, propWillDelay, w.DelayInterval)
		}
		if w.HasExpiry {
			dst = appendProp32(dst, propMessageExpiry, w.Expiry)
		}
		dst = closeBlock(append(dst, w.Forward...), mark)
	}
	return appendField(appendField(dst, w.Topic), w.Payload)
}

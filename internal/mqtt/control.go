package mqtt

// Ping is PINGREQ or PINGRESP: two bytes.
type Ping struct {
	Type Type // set by the caller, also before Decode
}

// Decode checks that there is nothing to decode.
func (p *Ping) Decode(_ Version, flags byte, body []byte) error {
	if err := checkFlags(flags, 0); err != nil {
		return err
	}
	r := reader{b: body}
	return r.end()
}

// Append appends the whole packet.
func (p *Ping) Append(dst []byte, _ Version) []byte { return append(dst, byte(p.Type)<<4, 0) }

// Disconnect is a DISCONNECT packet. In 3.1.1 it has no body, and only a client sends it.
type Disconnect struct {
	Code             ReasonCode
	HasSessionExpiry bool // from a client only
	SessionExpiry    uint32
	Reason           string
	ServerReference  string // from a server only
	User             []byte // user properties as on the wire, a view
}

// Decode reads the body as a server does. That a session expiry may not be raised from 0
// is the caller's to see, who knows the CONNECT (MQTT 5.0 3.14.2.2.2).
func (p *Disconnect) Decode(v Version, flags byte, body []byte) error {
	return p.decode(v, flags, body, true)
}

// DecodeAtClient reads the body of a DISCONNECT that a server has sent.
func (p *Disconnect) DecodeAtClient(v Version, flags byte, body []byte) error {
	return p.decode(v, flags, body, false)
}

func (p *Disconnect) decode(v Version, flags byte, body []byte, atServer bool) error {
	*p = Disconnect{}
	if err := checkFlags(flags, 0); err != nil {
		return err
	}
	r := reader{b: body}
	if v != V5 || len(body) == 0 {
		return r.end()
	}
	p.Code = ReasonCode(r.uint8())
	allowed := in(DISCONNECT) | serverDisconnect
	if atServer {
		allowed = in(DISCONNECT)
	}
	if err := checkCode(p.Code, allowed); err != nil {
		return err
	}
	if !atServer && p.Code == DisconnectWithWill {
		return violation("a server has no Will")
	}
	if len(r.b) > 0 {
		p.decodeProps(&r, atServer)
	}
	return r.end()
}

func (p *Disconnect) decodeProps(r *reader, atServer bool) {
	var g gather
	ps := r.properties(1 << DISCONNECT)
	for x, ok := ps.next(r); ok; x, ok = ps.next(r) {
		switch x.id {
		case propSessionExpiry:
			p.HasSessionExpiry, p.SessionExpiry = true, x.num
			if !atServer {
				r.fail(violation("session expiry in a DISCONNECT of a server"))
			}
		case propServerReference:
			p.ServerReference = string(x.data)
			if atServer {
				r.fail(violation("server reference in a DISCONNECT of a client"))
			}
		case propReasonString:
			p.Reason = string(x.data)
		case propUser:
			g.add(&ps, x)
		}
	}
	p.User = g.out
}

// Append appends the whole packet.
func (p *Disconnect) Append(dst []byte, v Version) []byte {
	dst, mark := openBlock(append(dst, byte(DISCONNECT)<<4))
	props := p.HasSessionExpiry || p.Reason != "" || p.ServerReference != "" || len(p.User) > 0
	if v != V5 || (p.Code == Success && !props) {
		return closeBlock(dst, mark)
	}
	dst = append(dst, byte(p.Code))
	if props {
		var list int
		dst, list = openBlock(dst)
		if p.HasSessionExpiry {
			dst = appendProp32(dst, propSessionExpiry, p.SessionExpiry)
		}
		dst = appendPropField(dst, propReasonString, p.Reason)
		dst = appendPropField(dst, propServerReference, p.ServerReference)
		dst = closeBlock(append(dst, p.User...), list)
	}
	return closeBlock(dst, mark)
}

// Auth is an AUTH packet (MQTT 5.0 3.15).
type Auth struct {
	Code   ReasonCode
	Method string
	Data   []byte // a view
	Reason string
	User   []byte // user properties as on the wire, a view
}

// Decode reads the body. AUTH does not exist in 3.1.1.
func (p *Auth) Decode(v Version, flags byte, body []byte) error {
	*p = Auth{}
	if v != V5 {
		return malformed("AUTH in 3.1.1")
	}
	if err := checkFlags(flags, 0); err != nil {
		return err
	}
	r := reader{b: body}
	if len(body) == 0 {
		return nil
	}
	p.Code = ReasonCode(r.uint8())
	if err := checkCode(p.Code, 1<<AUTH); err != nil {
		return err
	}
	p.decodeProps(&r)
	return r.end()
}

func (p *Auth) decodeProps(r *reader) {
	var g gather
	ps := r.properties(1 << AUTH)
	for x, ok := ps.next(r); ok; x, ok = ps.next(r) {
		switch x.id {
		case propAuthMethod:
			p.Method = string(x.data)
		case propAuthData:
			p.Data = x.data
		case propReasonString:
			p.Reason = string(x.data)
		case propUser:
			g.add(&ps, x)
		}
	}
	p.User = g.out
	if p.Method == "" && r.err == nil {
		r.fail(violation("AUTH without a method"))
	}
}

// Append appends the whole packet.
func (p *Auth) Append(dst []byte, v Version) []byte {
	dst, mark := openBlock(append(dst, byte(AUTH)<<4))
	if p.Code == Success && p.Method == "" {
		return closeBlock(dst, mark)
	}
	dst, list := openBlock(append(dst, byte(p.Code)))
	dst = appendPropField(dst, propAuthMethod, p.Method)
	dst = appendPropField(dst, propAuthData, p.Data)
	dst = appendPropField(dst, propReasonString, p.Reason)
	return closeBlock(closeBlock(append(dst, p.User...), list), mark)
}

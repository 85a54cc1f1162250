package mqtt

import "strings"

// Subscribe is a SUBSCRIBE packet.
type Subscribe struct {
	PacketID uint16
	SubID    uint32 // subscription identifier, 0: none
	Filters  []Subscription
	User     []byte // user properties as on the wire, a view
}

// Subscription is one filter of a SUBSCRIBE with its options (MQTT 5.0 3.8.3.1). In
// 3.1.1 there is the QoS only. Filter has its "$share/group/" prefix still on it.
type Subscription struct {
	Filter            string
	QoS               byte
	NoLocal           bool
	RetainAsPublished bool
	RetainHandling    byte // 0: send retained, 1: if the subscription is new, 2: never
}

// Decode reads the body.
func (p *Subscribe) Decode(v Version, flags byte, body []byte) error {
	*p = Subscribe{}
	if err := checkFlags(flags, 2); err != nil {
		return err
	}
	r := reader{b: body}
	p.PacketID = r.packetID()
	if v == V5 && r.err == nil {
		p.decodeProps(&r)
	}
	if r.err == nil && len(r.b) == 0 {
		r.fail(violation("SUBSCRIBE without a filter"))
	}
	for r.err == nil && len(r.b) > 0 {
		p.Filters = append(p.Filters, r.subscription(v))
	}
	return r.end()
}

func (p *Subscribe) decodeProps(r *reader) {
	var g gather
	ps := r.properties(1 << SUBSCRIBE)
	for x, ok := ps.next(r); ok; x, ok = ps.next(r) {
		switch x.id {
		case propSubID:
			p.SubID = x.num
		case propUser:
			g.add(&ps, x)
		}
	}
	p.User = g.out
}

func (r *reader) subscription(v Version) (s Subscription) {
	s.Filter = r.filter()
	o := r.uint8()
	s.QoS = o & 3
	if s.QoS == 3 {
		r.fail(malformed("QoS 3 in SUBSCRIBE"))
	}
	if v != V5 {
		if o > 2 {
			r.fail(malformed("reserved bits of the subscription options"))
		}
		return s
	}
	s.NoLocal, s.RetainAsPublished, s.RetainHandling = o&4 != 0, o&8 != 0, o>>4&3
	shared := s.Filter == "$share" || strings.HasPrefix(s.Filter, "$share/")
	switch {
	case r.err != nil:
	case o&0xC0 != 0:
		r.fail(malformed("reserved bits of the subscription options"))
	case s.RetainHandling == 3:
		r.fail(violation("retain handling 3"))
	case shared && !goodShare(s.Filter):
		r.fail(violation("shared subscription without a group name or a filter"))
	case shared && s.NoLocal:
		r.fail(violation("No Local on a shared subscription"))
	}
	return s
}

// goodShare judges "$share/group/filter" (MQTT 5.0 4.8.2).
func goodShare(filter string) bool {
	rest, ok := strings.CutPrefix(filter, "$share/")
	group, inner, found := strings.Cut(rest, "/")
	return ok && found && group != "" && inner != "" && !strings.ContainsAny(group, "+#")
}

// Append appends the whole packet.
func (p *Subscribe) Append(dst []byte, v Version) []byte {
	dst, mark := openBlock(append(dst, byte(SUBSCRIBE)<<4|2))
	dst = appendUint16(dst, p.PacketID)
	if v == V5 {
		var props int
		dst, props = openBlock(dst)
		if p.SubID != 0 {
			dst = appendVarint(append(dst, propSubID), p.SubID)
		}
		dst = closeBlock(append(dst, p.User...), props)
	}
	for i := range p.Filters {
		dst = appendField(dst, p.Filters[i].Filter)
		dst = append(dst, p.Filters[i].options(v))
	}
	return closeBlock(dst, mark)
}

func (s *Subscription) options(v Version) byte {
	o := s.QoS
	if v != V5 {
		return o
	}
	if s.NoLocal {
		o |= 4
	}
	if s.RetainAsPublished {
		o |= 8
	}
	return o | s.RetainHandling<<4
}

// Suback is a SUBACK packet: one code for each filter, in order. To a 3.1.1 client every
// failure is written as 0x80.
type Suback struct {
	PacketID uint16
	Codes    []ReasonCode
	Reason   string
	User     []byte
}

// Decode reads the body. Whether there are as many codes as filters is the caller's to see.
func (p *Suback) Decode(v Version, flags byte, body []byte) error {
	*p = Suback{}
	if err := checkFlags(flags, 0); err != nil {
		return err
	}
	r := reader{b: body}
	p.PacketID = r.packetID()
	if v == V5 && r.err == nil {
		p.Reason, p.User = r.reasonAndUser(1 << SUBACK)
	}
	p.Codes = r.codes(1 << SUBACK)
	for _, c := range p.Codes {
		if v != V5 && c > GrantedQoS2 && c != UnspecifiedError {
			r.fail(malformed("reserved SUBACK return code"))
		}
	}
	return r.end()
}

// codes reads the rest of the packet as reason codes, at least one.
func (r *reader) codes(where packetSet) []ReasonCode {
	if r.err != nil {
		return nil
	}
	if len(r.b) == 0 {
		r.fail(violation("no reason code"))
		return nil
	}
	codes := make([]ReasonCode, len(r.b))
	for i, b := range r.take(len(r.b)) {
		codes[i] = ReasonCode(b)
		if err := checkCode(codes[i], where); err != nil {
			r.fail(err)
		}
	}
	return codes
}

// Append appends the whole packet.
func (p *Suback) Append(dst []byte, v Version) []byte {
	dst, mark := openBlock(append(dst, byte(SUBACK)<<4))
	dst = appendUint16(dst, p.PacketID)
	if v == V5 {
		dst = appendReasonAndUser(dst, p.Reason, p.User, false)
	}
	for _, c := range p.Codes {
		if v != V5 && c.Failed() {
			c = UnspecifiedError
		}
		dst = append(dst, byte(c))
	}
	return closeBlock(dst, mark)
}

// Unsubscribe is an UNSUBSCRIBE packet.
type Unsubscribe struct {
	PacketID uint16
	Filters  []string
	User     []byte // user properties as on the wire, a view
}

// Decode reads the body.
func (p *Unsubscribe) Decode(v Version, flags byte, body []byte) error {
	*p = Unsubscribe{}
	if err := checkFlags(flags, 2); err != nil {
		return err
	}
	r := reader{b: body}
	p.PacketID = r.packetID()
	if v == V5 && r.err == nil {
		_, p.User = r.reasonAndUser(1 << UNSUBSCRIBE)
	}
	if r.err == nil && len(r.b) == 0 {
		r.fail(violation("UNSUBSCRIBE without a filter"))
	}
	for r.err == nil && len(r.b) > 0 {
		p.Filters = append(p.Filters, r.filter())
	}
	return r.end()
}

// Append appends the whole packet.
func (p *Unsubscribe) Append(dst []byte, v Version) []byte {
	dst, mark := openBlock(append(dst, byte(UNSUBSCRIBE)<<4|2))
	dst = appendUint16(dst, p.PacketID)
	if v == V5 {
		dst = appendReasonAndUser(dst, "", p.User, false)
	}
	for _, f := range p.Filters {
		dst = appendField(dst, f)
	}
	return closeBlock(dst, mark)
}

// Unsuback is an UNSUBACK packet. 3.1.1 has the packet identifier only.
type Unsuback struct {
	PacketID uint16
	Codes    []ReasonCode
	Reason   string
	User     []byte
}

// Decode reads the body.
func (p *Unsuback) Decode(v Version, flags byte, body []byte) error {
	*p = Unsuback{}
	if err := checkFlags(flags, 0); err != nil {
		return err
	}
	r := reader{b: body}
	p.PacketID = r.packetID()
	if v == V5 && r.err == nil {
		p.Reason, p.User = r.reasonAndUser(1 << UNSUBACK)
		p.Codes = r.codes(1 << UNSUBACK)
	}
	return r.end()
}

// Append appends the whole packet.
func (p *Unsuback) Append(dst []byte, v Version) []byte {
	dst, mark := openBlock(append(dst, byte(UNSUBACK)<<4))
	dst = appendUint16(dst, p.PacketID)
	if v == V5 {
		dst = appendReasonAndUser(dst, p.Reason, p.User, false)
		for _, c := range p.Codes {
			dst = append(dst, byte(c))
		}
	}
	return closeBlock(dst, mark)
}

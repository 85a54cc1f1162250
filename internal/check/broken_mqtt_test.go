package check

import (
	"errors"
	"io"
	"slices"
	"strings"

	"hawser/internal/mqtt"
)

// The faults of what comes after admission.
const (
	refusesAll      fault = "lets in nobody"
	refusesV5       fault = "refuses MQTT 5.0"
	refusesPart     fault = "grants nothing but a device's whole filter"
	forgetsFlight   fault = "forgets messages that were not acknowledged"
	losesWills      fault = "publishes no Will"
	trustsID        fault = "goes by the client id"
	patternID       fault = "puts the client id into a pattern (CVE-2017-7650)"
	subjectID       fault = "reads . * > in a client id as its own separators and wildcards"
	takesAnyID      fault = "takes any client id, without rights"
	takesEmptyID    fault = "makes up a client id for an empty one"
	takesCase       fault = "compares client ids without case"
	takesPrefix     fault = "compares the beginning of client ids"
	takesOver       fault = "ends the old connection before it judges the new one"
	trustsLengths   fault = "trusts lengths, and waits for what they say"
	waitsForConnect fault = "waits for CONNECT for ever"
	renewsTime      fault = "starts its time-out again with each byte"
	oneLock         fault = "holds one lock while a packet is half here"
	diesOfMalformed fault = "dies of malformed packets"

	grantsAll      fault = "grants every filter, and delivers"
	grantsSilently fault = "grants every filter, and looks at each delivery"
	grantsHash     fault = "grants #"
	forgetsPlus    fault = "takes + for the device's own name"
	prefixAlone    fault = "looks at the first level alone"
	forgetsShare   fault = "does not look at a filter behind $share"
	sharesAll      fault = "delivers everything to a shared subscription"
	grantsSystem   fault = "grants $SYS/#"
	opensSystem    fault = "grants $SYS/#, and tells what is there"
	writesAll      fault = "does not look at who publishes"
	writesQoS0     fault = "does not look at which device publishes at QoS 0"
	writesQoS1     fault = "does not look at which device publishes at QoS 1"
	writesQoS2     fault = "does not look at which device publishes at QoS 2"
	writesV5       fault = "does not look at which device publishes in MQTT 5.0"
	writesRetained fault = "does not look at which device publishes a retained message"
	writesSystem   fault = "takes messages on $SYS/"
	takesAlias     fault = "takes an alias that was never set"

	anyWill         fault = "does not look at the topic of a device's Will"
	anyWillRetained fault = "does not look at the topic of a device's retained Will"
	anyWillV5       fault = "does not look at the topic of a device's Will in MQTT 5.0"
	serviceWrites   fault = "lets a service write where it may not even read"
	serviceWritesV5 fault = "lets a service write where it may not even read, in MQTT 5.0"
	serviceWills    fault = "does not look at the topic of a service's Will"
	serviceTakes    fault = "lets a service take over a device's session"

	diesOfSlashes fault = "dies of 10,000 levels"
	keepsQoS2     fault = "keeps every QoS 2 message, and dies of it"
	diesOfFilters fault = "dies of 1,000 subscriptions"

	keepsOpen     fault = "leaves the connections of the revoked open"
	readmits      fault = "looks at revocations at its start alone"
	keepsWill     fault = "publishes the Will of the revoked"
	keepsRetained fault = "delivers retained messages of the revoked"
	keepsQueued   fault = "delivers queued messages of the revoked"
	keepsFlight   fault = "sends messages of the revoked again"
)

// pardon is what package mqtt says about a packet of that type, with those bytes in it,
// that a broken broker does not take as malformed.
type pardon struct {
	text string
	kind mqtt.Type // 0: the header itself
	with string
}

const (
	saysNUL    = "string holds U+0000"
	saysUTF8   = "string is not UTF-8"
	saysMiddle = "wildcard in the middle of a topic filter"
	saysShare  = "shared subscription without a group name or a filter"
)

// pardons are the faults of parsing.
func pardons() map[fault]pardon {
	return map[fault]pardon{
		"takes a client id with a NUL":                 {saysNUL, mqtt.CONNECT, ""},
		"takes a client id that is not UTF-8":          {saysUTF8, mqtt.CONNECT, ""},
		"takes a filter with # inside":                 {saysMiddle, mqtt.SUBSCRIBE, "#"},
		"takes a filter with + inside a level":         {saysMiddle, mqtt.SUBSCRIBE, "+"},
		"takes an empty filter":                        {"topic filter is empty", mqtt.SUBSCRIBE, ""},
		"takes a shared subscription without a group":  {saysShare, mqtt.SUBSCRIBE, "$share//"},
		"takes a shared subscription without a filter": {saysShare, mqtt.SUBSCRIBE, "$share/g"},
		"takes a filter with a NUL":                    {saysNUL, mqtt.SUBSCRIBE, ""},
		"takes a filter that is not UTF-8":             {saysUTF8, mqtt.SUBSCRIBE, ""},
		"takes a topic with wildcards":                 {"topic name holds a wildcard", mqtt.PUBLISH, ""},
		"takes a length of five bytes":                 {"length of more than four bytes", 0, ""},
		"takes another protocol":                       {"not the protocol name MQTT", mqtt.CONNECT, ""},
		"takes the reserved flag of CONNECT":           {"reserved flag of CONNECT", mqtt.CONNECT, ""},
		"takes a Will of QoS 3":                        {"Will QoS 3", mqtt.CONNECT, ""},
		"takes Will flags without a Will":              {"Will QoS or Will retain without a Will", mqtt.CONNECT, ""},
		"takes a password without a user name":         {"password without a user name", mqtt.CONNECT, ""},
		"passes over packets of type 0":                {"packet type 0", 0, ""},
		"takes QoS 3":                                  {"QoS 3", mqtt.PUBLISH, ""},
		"takes reserved flags of SUBSCRIBE":            {"reserved flags of the fixed header", mqtt.SUBSCRIBE, ""},
		"passes over a topic longer than its packet":   {"packet ends too early", mqtt.PUBLISH, ""},
		"takes a topic that is not UTF-8":              {saysUTF8, mqtt.PUBLISH, ""},
		"takes a topic with a NUL":                     {saysNUL, mqtt.PUBLISH, ""},
		"takes a PUBLISH before CONNECT":               {"PUBLISH before CONNECT", mqtt.PUBLISH, ""},
		"takes a second CONNECT":                       {"second CONNECT", mqtt.CONNECT, ""},
	}
}

func (b *broker) forgives(err error, kind mqtt.Type, body []byte) bool {
	x, ok := pardons()[b.fault]
	var e *mqtt.Error
	return ok && errors.As(err, &e) && e.Text == x.text && kind == x.kind && strings.Contains(string(body), x.with)
}

func wrong(text string) error { return &mqtt.Error{Code: mqtt.ProtocolError, Text: text} }

// handle obeys one packet. An error ends the connection.
func (p *peer) handle(h mqtt.Header, body []byte) (err error) {
	switch {
	case p.id == "" && h.Type != mqtt.CONNECT:
		err = wrong(h.Type.String() + " before CONNECT")
	case p.id != "" && h.Type == mqtt.CONNECT:
		err = wrong("second CONNECT")
	default:
		err = p.obey(h, body)
	}
	if err == nil {
		return nil
	}
	if p.b.forgives(err, h.Type, body) {
		p.pardoned = true
		return p.anyway(h, body)
	}
	if p.b.has(diesOfMalformed) && errors.As(err, new(*mqtt.Error)) {
		p.b.die()
	}
	return err
}

// anyway answers a packet that should have ended the connection as if it were none.
func (p *peer) anyway(h mqtt.Header, body []byte) error {
	id := func(b []byte) uint16 { return uint16(b[0])<<8 | uint16(b[1]) }
	switch h.Type {
	case mqtt.CONNECT:
		if p.id == "" {
			p.v = mqtt.V311
			return p.welcome(&mqtt.Connect{Version: mqtt.V311, CleanStart: true, ClientID: p.name})
		}
		p.say((&mqtt.Connack{}).Append(nil, p.v))
	case mqtt.SUBSCRIBE:
		p.say((&mqtt.Suback{PacketID: id(body), Codes: []mqtt.ReasonCode{mqtt.GrantedQoS1}}).Append(nil, p.v))
	case mqtt.PUBLISH:
		if n := 2 + int(id(body)); h.Flags&6 == 2 && n+2 <= len(body) {
			p.say((&mqtt.Ack{Type: mqtt.PUBACK, PacketID: id(body[n:])}).Append(nil, p.v))
		}
	}
	return nil
}

func (p *peer) obey(h mqtt.Header, body []byte) error {
	switch h.Type {
	case mqtt.CONNECT:
		return p.connect(h, body)
	case mqtt.SUBSCRIBE:
		return p.subscribe(h, body)
	case mqtt.PUBLISH:
		return p.published(h, body)
	case mqtt.PUBREL:
		return p.released(h, body)
	case mqtt.PUBACK:
		return p.acknowledged(h, body)
	case mqtt.PINGREQ:
		p.say((&mqtt.Ping{Type: mqtt.PINGRESP}).Append(nil, p.v))
		return nil
	case mqtt.DISCONNECT:
		p.b.mu.Lock()
		defer p.b.mu.Unlock()
		p.will = nil
		return io.EOF
	}
	return wrong("a packet that no client sends")
}

func (p *peer) connect(h mqtt.Header, body []byte) error {
	var c mqtt.Connect
	if err := c.Decode(0, h.Flags, body); err != nil {
		return err
	}
	p.v = c.Version
	if p.b.has(noCertificate) {
		p.name = c.ClientID
	}
	if p.b.has(takesOver) && p.name != nameService || p.b.has(serviceTakes) && p.name == nameService {
		p.b.mu.Lock()
		if s := p.b.sessions[c.ClientID]; s != nil && s.at != nil {
			s.at.raw.Close()
		}
		p.b.mu.Unlock()
	}
	if code := p.mayConnect(&c); code.Failed() {
		p.say((&mqtt.Connack{Code: code}).Append(nil, p.v))
		return io.EOF
	}
	return p.welcome(&c)
}

// mayConnect judges the client id and the Will.
func (p *peer) mayConnect(c *mqtt.Connect) mqtt.ReasonCode {
	b := p.b
	same := c.ClientID == p.name
	switch {
	case p.name == nameService, b.has(trustsID, patternID, subjectID, takesAnyID):
		same = c.ClientID != "" || b.has(takesAnyID)
	case b.has(takesEmptyID):
		same = same || c.ClientID == ""
	case b.has(takesCase):
		same = strings.EqualFold(c.ClientID, p.name)
	case b.has(takesPrefix):
		same = strings.HasPrefix(c.ClientID, p.name)
	}
	p.id = c.ClientID
	switch {
	case !same, b.has(refusesAll), b.has(refusesV5) && p.v == mqtt.V5:
		return mqtt.ClientIdentifierNotValid
	case c.Will != nil && !p.mayWill(c.Will):
		return mqtt.NotAuthorized
	}
	return mqtt.Success
}

func (p *peer) mayWill(w *mqtt.Will) bool {
	b := p.b
	if p.name == nameService {
		return b.has(serviceWills)
	}
	return p.mayWrite(w.Topic) || b.has(anyWill) && !w.Retain && p.v == mqtt.V311 || b.has(anyWillRetained) && w.Retain || b.has(anyWillV5) && p.v == mqtt.V5
}

// welcome opens the session and sends what waits in it.
func (p *peer) welcome(c *mqtt.Connect) error {
	b := p.b
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.revoked[p.name] && !b.has(b.readmission(p.name)) {
		return io.EOF
	}
	if p.id = c.ClientID; p.id == "" {
		p.id = p.name
	}
	p.will = c.Will
	key := p.id
	if p.name == nameService {
		key = "service " + p.id
	}
	s := b.sessions[key]
	if s != nil && s.at != nil {
		old := s.at
		b.part(old)
		old.raw.Close()
	}
	if s = b.sessions[key]; s == nil || c.CleanStart {
		s = &mailbox{key: key, filters: map[string]bool{}, flight: map[uint16]message{}}
		b.sessions[key] = s
	}
	s.at, s.keep, p.session = p, !c.CleanStart && (p.v == mqtt.V311 || c.Props.SessionExpiry > 0), s
	p.send((&mqtt.Connack{SessionPresent: false}).Append(nil, p.v))
	b.resume(p, s)
	return nil
}

// rights is whose topics the client has: the name in its certificate, as it should be.
func (p *peer) rights() string {
	if p.b.has(trustsID, patternID, subjectID) && p.name != nameService {
		return p.id
	}
	return p.name
}

func (p *peer) mayWrite(topic string) bool {
	if p.name == nameService {
		return p.b.has(serviceWrites) && p.v == mqtt.V311 || p.b.has(serviceWritesV5) && p.v == mqtt.V5
	}
	return strings.HasPrefix(topic, "private/"+p.rights()+"/")
}

// mayRead judges a filter without $share, or a topic.
func (p *peer) mayRead(filter string) bool {
	l := strings.Split(filter, "/")
	if p.name == nameService {
		return len(l) > 3 && l[0] == "private" && l[2] == "u"
	}
	name := p.rights()
	if p.b.has(patternID) && (name == "+" || name == "#") || p.b.has(subjectID) && strings.Contains(name, ">") {
		return true
	}
	return len(l) > 2 && l[0] == "private" && l[1] == name
}

func (p *peer) grants(filter string) bool {
	b := p.b
	l := strings.Split(filter, "/")
	group, inner, shared := cutShare(filter)
	if shared && !b.has(forgetsShare) {
		return p.mayRead(inner) && group != ""
	}
	system := l[0] == "$SYS"
	switch {
	case system:
		return b.has(grantsSystem, opensSystem, grantsAll, grantsSilently)
	case shared, b.has(grantsAll, grantsSilently), b.has(grantsHash) && filter == "#", b.has(prefixAlone) && l[0] == "private":
		return true
	case b.has(forgetsPlus) && len(l) > 2:
		return (l[0] == "private" || l[0] == "+") && (l[1] == p.name || l[1] == "+")
	case b.has(refusesPart) && p.name != nameService:
		return filter == "private/"+p.name+"/#"
	}
	return p.mayRead(filter)
}

func cutShare(filter string) (group, inner string, shared bool) {
	rest, ok := strings.CutPrefix(filter, "$share/")
	if !ok {
		return "", filter, false
	}
	group, inner, _ = strings.Cut(rest, "/")
	return group, inner, true
}

func (p *peer) subscribe(h mqtt.Header, body []byte) error {
	var s mqtt.Subscribe
	if err := s.Decode(p.v, h.Flags, body); err != nil {
		return err
	}
	b := p.b
	b.mu.Lock()
	defer b.mu.Unlock()
	a := mqtt.Suback{PacketID: s.PacketID}
	var granted []string
	for _, f := range s.Filters {
		if p.filters++; p.filters > 1000 && b.has(diesOfFilters) {
			go b.die()
		}
		if !p.grants(f.Filter) || p.filters > 10_000 {
			a.Codes = append(a.Codes, mqtt.NotAuthorized)
			continue
		}
		a.Codes = append(a.Codes, mqtt.GrantedQoS1)
		p.session.filters[f.Filter] = true
		granted = append(granted, f.Filter)
	}
	p.send(a.Append(nil, p.v))
	for _, m := range b.retained {
		if slices.ContainsFunc(granted, func(f string) bool { return covers(f, m.topic) }) && (!b.revoked[m.from] || b.has(keepsRetained) || m.will && b.has(keepsWill)) {
			m.retain = true
			b.deliver(p.session, m)
		}
	}
	if b.has(opensSystem) && slices.Contains(granted, "$SYS/#") {
		p.send(mqtt.AppendPublish(nil, p.v, &mqtt.Publish{Topic: []byte("$SYS/broker/clients"), Payload: []byte("2"), Retain: true}))
	}
	return nil
}

func (p *peer) published(h mqtt.Header, body []byte) error {
	var m mqtt.Publish
	if err := m.Decode(p.v, h.Flags, body); err != nil {
		return err
	}
	topic := string(m.Topic)
	if m.Alias != 0 && topic == "" && !p.b.has(takesAlias) {
		return wrong("an alias that was never set")
	}
	if p.b.has(diesOfSlashes) && strings.Count(topic, "/") > 10_000 {
		p.b.die()
	}
	if !p.mayPublish(topic, &m) {
		if p.v != mqtt.V5 || m.QoS == 0 {
			return io.EOF
		}
		p.answer(&m, mqtt.NotAuthorized)
		return nil
	}
	if m.QoS == 2 {
		p.unacked++
		if p.unacked > 4000 && p.b.has(keepsQoS2) {
			p.b.die()
		} else if p.unacked > 1000 && !p.b.has(keepsQoS2) {
			return io.EOF
		}
	}
	p.b.mu.Lock()
	p.b.publish(message{topic: topic, payload: string(m.Payload), qos: m.QoS, retain: m.Retain, from: p.name})
	p.b.mu.Unlock()
	p.answer(&m, mqtt.Success)
	return nil
}

func (p *peer) mayPublish(topic string, m *mqtt.Publish) bool {
	b := p.b
	switch {
	case strings.HasPrefix(topic, "$"):
		return b.has(writesSystem)
	case p.mayWrite(topic), b.has(writesAll), topic == "" && b.has(takesAlias):
		return true
	case p.name == nameService:
		return false
	case p.v == mqtt.V5:
		return b.has(writesV5)
	case m.Retain:
		return b.has(writesRetained)
	}
	return b.has([]fault{writesQoS0, writesQoS1, writesQoS2}[m.QoS])
}

func (p *peer) answer(m *mqtt.Publish, code mqtt.ReasonCode) {
	a := mqtt.Ack{Type: mqtt.PUBACK, PacketID: m.PacketID, Code: code}
	if m.QoS == 2 {
		a.Type = mqtt.PUBREC
	}
	if m.QoS > 0 {
		p.say(a.Append(nil, p.v))
	}
}

func (p *peer) released(h mqtt.Header, body []byte) error {
	a := mqtt.Ack{Type: mqtt.PUBREL}
	if err := a.Decode(p.v, h.Flags, body); err != nil {
		return err
	}
	p.unacked--
	p.say((&mqtt.Ack{Type: mqtt.PUBCOMP, PacketID: a.PacketID}).Append(nil, p.v))
	return nil
}

func (p *peer) acknowledged(h mqtt.Header, body []byte) error {
	a := mqtt.Ack{Type: mqtt.PUBACK}
	if err := a.Decode(p.v, h.Flags, body); err != nil {
		return err
	}
	p.b.mu.Lock()
	defer p.b.mu.Unlock()
	delete(p.session.flight, a.PacketID)
	return nil
}

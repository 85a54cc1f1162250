package check

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"hawser/internal/mqtt"
)

const (
	isolation    = "ETSI EN 303 645 5.5-5; CRA annex I 2(d); MQTT 3.1.1 5.4.2"
	mayNotDoThat = "refuses it, or ends the connection"
)

// identityCases: a device that says it is somebody else.
func identityCases() []BrokerCase {
	var cases []BrokerCase
	for _, c := range []struct{ id, does, client string }{
		{"other", "the other device's client id with one's own certificate", ""},
		{"plus", "a client id with +", "+"},
		{"hash", "a client id with #", "#"},
		{"slash", "a client id with /", "a/b"},
		{"dots", "a client id with . and *", "*.>"},
		{"lower", "one's own id in lower case", "lower"},
		{"longer", "one's own id with something after it", "longer"},
		{"long", "a client id of 60,000 letters", strings.Repeat("A", 60_000)},
	} {
		cases = append(cases, BrokerCase{Case: Case{ID: "B4." + c.id, Does: c.does, Expect: "refuses, or gives it no rights but its certificate's", Clause: isolation + "; MQTT 3.1.3.1"},
			try: func(p *intruder) error { return p.pretend(p.clientID(c.client)) }})
	}
	return append(cases,
		BrokerCase{Case: Case{ID: "B4.nul", Does: "a client id with a NUL in it", Expect: "refuses", Clause: "MQTT 1.5.4-2"}, try: func(p *intruder) error {
			return p.rawConnect([]byte("A\x00B"))
		}},
		BrokerCase{Case: Case{ID: "B4.not-utf8", Does: "a client id that is not UTF-8", Expect: "refuses", Clause: "MQTT 1.5.4-1"}, try: func(p *intruder) error {
			return p.rawConnect([]byte{0xff, 0xfe, 0xc0})
		}},
		BrokerCase{Case: Case{ID: "B4.empty", Does: "an empty client id", Expect: "refuses, or gives it no rights but its certificate's", Clause: isolation}, try: func(p *intruder) error {
			return p.pretend("")
		}},
		BrokerCase{Case: Case{ID: "B4.takeover", Does: "the other device's client id, while that one is connected", Expect: "the victim stays connected", Clause: isolation + "; MQTT 3.1.4-3"}, try: func(p *intruder) error { return p.takeover(p.o.Device) }})
}

func (p *intruder) clientID(kind string) string {
	switch kind {
	case "":
		return p.o.Other.Name
	case "lower":
		return strings.ToLower(p.o.Device.Name)
	case "longer":
		return p.o.Device.Name + "0"
	}
	return kind
}

// pretend connects as the first device under another client id. To be let in under it
// is a FAIL when it reaches the other device's topics.
func (p *intruder) pretend(id string) error {
	if id == p.o.Other.Name {
		return p.impersonate()
	}
	g, err := p.join(p.o.Device, hello{id: id})
	if errors.Is(err, errRefused) {
		return p.settle(Pass, "%v", err)
	}
	if err != nil {
		return err
	}
	if err := p.spyOn(g, p.filter(p.o.Other)); err != nil {
		return err
	}
	if p.verdict == Fail {
		return p.settle(Fail, "it was let in, and reads the other device's topics")
	}
	return p.settle(Warn, "it was let in under that id, without further rights")
}

// impersonate is pretend with the other device's own id. That device cannot be connected
// at the same time, so it leaves a retained message for the thief.
func (p *intruder) impersonate() error {
	topic := []byte(p.topic(p.o.Other, "u/secret"))
	victim, err := p.join(p.o.Other, hello{id: p.o.Other.Name})
	if err != nil {
		return err
	}
	if _, err := victim.publish(mqtt.Publish{Topic: topic, QoS: 1, Retain: true, Payload: []byte("check")}); err != nil {
		return err
	}
	victim.Raw.Close()
	defer func() {
		if v, err := p.join(p.o.Other, hello{id: p.o.Other.Name}); err == nil {
			_, _ = v.publish(mqtt.Publish{Topic: topic, QoS: 1, Retain: true}) // tidies up, and no more
		}
	}()
	thief, err := p.join(p.o.Device, hello{id: p.o.Other.Name})
	if errors.Is(err, errRefused) {
		return p.settle(Pass, "%v", err)
	}
	if err != nil {
		return err
	}
	defer func() { p.last = thief.Conn }()
	if _, err := thief.subscribe(p.filter(p.o.Other)); err == nil {
		_, _ = thief.ping() // an end of the connection is a refusal as well
	}
	if thief.heard(string(topic)) {
		return p.settle(Fail, "it was let in, and reads the other device's topics")
	}
	return p.settle(Warn, "it was let in under that id, without further rights")
}

// rawConnect sends a CONNECT of 3.1.1 whose client id is any bytes.
func (p *intruder) rawConnect(id []byte) error {
	c, err := p.dial(p.client(p.o.Device))
	if err != nil {
		return err
	}
	body := append([]byte{0, 4, 'M', 'Q', 'T', 'T', 4, 2, 0, 60, byte(len(id) >> 8), byte(len(id))}, id...)
	g := p.guest(c, mqtt.V311)
	if _, err := g.Write(append([]byte{0x10, byte(len(body))}, body...)); err != nil {
		return err
	}
	return p.judgeEntry(g, g.welcomed())
}

func (p *intruder) takeover(who *Credentials) error {
	victim, err := p.join(p.o.Other, hello{id: p.o.Other.Name})
	if err != nil {
		return err
	}
	thief, err := p.join(who, hello{id: p.o.Other.Name})
	if err == nil && thief != nil {
		if ok, _ := victim.ping(); ok {
			return p.settle(Warn, "it was let in under the stolen id, but the victim stayed")
		}
		return p.settle(Fail, "the victim was thrown out")
	}
	if !errors.Is(err, errRefused) {
		return err
	}
	refusal := err
	victim.within(p.o.Step)
	if ok, err := victim.ping(); !ok {
		return p.settle(Fail, "the thief was refused, but the victim was thrown out: %v", err)
	}
	return p.settle(Pass, "the thief was refused (%v), and the victim stayed", refusal)
}

// subscribeCases: filters that reach beyond one's own topics, and those that are none.
func subscribeCases() []BrokerCase {
	var cases []BrokerCase
	for _, c := range []struct{ id, filter string }{
		{"all", "#"}, {"levels", "+/+/#"}, {"own-below-plus", "+/{own}/#"}, {"everybody", "{any}"}, {"other", "{other}"},
		{"system", "$SYS/#"}, {"share-all", "$share/g/#"}, {"share-other", "$share/g/{other}"}, {"share-everybody", "$share/g/{any}"},
	} {
		cases = append(cases, BrokerCase{Case: Case{ID: "B5." + c.id, Does: "a subscription to " + readable(c.filter), Expect: "refuses it: nothing comes", Clause: isolation},
			try: func(p *intruder) error { return p.eavesdrop(p.expand(c.filter), false) }})
	}
	cases = append(cases, BrokerCase{Case: Case{ID: "B5.share-own", Does: "a shared subscription to its own topics", Expect: "grants or refuses it: nothing of others comes", Clause: isolation},
		try: func(p *intruder) error { return p.eavesdrop(p.expand("$share/g/{mine}"), true) }})
	for _, c := range []struct{ id, filter string }{
		{"hash-inside", "a/#/b"}, {"plus-inside", "a+/b"}, {"empty", ""}, {"share-empty", "$share//x"}, {"share-no-filter", "$share/g"}, {"nul", "a\x00b"}, {"not-utf8", "a\xffb"},
	} {
		cases = append(cases, BrokerCase{Case: Case{ID: "B6." + c.id, Does: fmt.Sprintf("the malformed filter %q", c.filter), Expect: mayNotDoThat, Clause: "MQTT 4.7.1, 4.8.2, 1.5.4"},
			try: func(p *intruder) error { return p.malformed(c.filter) }})
	}
	return cases
}

func readable(filter string) string {
	return strings.NewReplacer("{own}", "<own id>", "{other}", "the other's topics", "{any}", "everybody's topics").Replace(filter)
}

func (p *intruder) expand(filter string) string {
	return strings.NewReplacer("{own}", p.o.Device.Name, "{other}", p.filter(p.o.Other), "{mine}", p.filter(p.o.Device),
		"{any}", strings.ReplaceAll(p.o.Topics, "{id}", "+")).Replace(filter)
}

// eavesdrop subscribes to a filter, and has the other device say something. own says that
// to grant the filter is no harm.
func (p *intruder) eavesdrop(filter string, own bool) error {
	spy, err := p.join(p.o.Device, hello{id: p.o.Device.Name, version: mqtt.V5})
	if err != nil {
		return err
	}
	err = p.spyOn(spy, filter)
	if own && p.verdict == Warn {
		p.verdict = Pass
	}
	return err
}

func (p *intruder) spyOn(spy *guest, filter string) error {
	granted, err := spy.subscribe(filter)
	if err != nil {
		return p.judgeEnd(spy, err)
	}
	victim, err := p.join(p.o.Other, hello{id: p.o.Other.Name})
	if err != nil {
		return err
	}
	topic := p.topic(p.o.Other, "u/secret")
	if _, err := victim.publish(mqtt.Publish{Topic: []byte(topic), QoS: 1, Payload: []byte("check")}); err != nil {
		return err
	}
	// What the broker owes the spy has arrived when its own message has come round.
	if _, err := spy.ping(); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	own := p.topic(p.o.Device, "check/fence")
	if ok, err := spy.subscribe(own); err == nil && ok[0] {
		if _, err := spy.publish(mqtt.Publish{Topic: []byte(own), QoS: 1, Payload: []byte("fence")}); err == nil {
			_ = spy.hears(own) // an end of the connection is a refusal as well
		}
	}
	p.last = spy.Conn
	if spy.heard(topic) {
		return p.settle(Fail, "the other device's message came: %s", topic)
	}
	if t := p.foreign(spy); t != "" {
		return p.settle(Fail, "what is not the device's own came: %s", t)
	}
	if granted[0] {
		return p.settle(Warn, "the subscription was granted, but the other's message did not come")
	}
	return p.settle(Pass, "refused, and the other's message did not come")
}

// foreign is a topic outside the first device's own on which a message has come, or "".
func (p *intruder) foreign(g *guest) string {
	for _, m := range g.got {
		if topic, _, _ := strings.Cut(m, " "); !strings.HasPrefix(topic, p.topic(p.o.Device, "")) {
			return topic
		}
	}
	return ""
}

// heard reports whether a message on topic has come.
func (g *guest) heard(topic string) bool {
	for _, m := range g.got {
		if strings.HasPrefix(m, topic+" ") {
			return true
		}
	}
	return false
}

// hears waits for a message on topic.
func (g *guest) hears(topic string) error {
	g.within(g.step)
	for !g.heard(topic) {
		if _, _, err := g.await(mqtt.PUBLISH); err != nil {
			return err
		}
	}
	return nil
}

func (p *intruder) judgeEnd(g *guest, err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return p.settle(Inconclusive, "no answer within %v", p.o.Step)
	}
	return p.settle(Pass, "the connection was ended: %s", g.Seen.EndText())
}

func (p *intruder) malformed(filter string) error {
	h := hello{id: p.o.Device.Name}
	if strings.HasPrefix(filter, "$share") { // 3.1.1 knows no shared subscriptions
		h.version = mqtt.V5
	}
	g, err := p.join(p.o.Device, h)
	if err != nil {
		return err
	}
	granted, err := g.subscribe(filter)
	if err != nil {
		return p.judgeEnd(g, err)
	}
	if granted[0] {
		return p.settle(Fail, "it was granted")
	}
	return p.settle(Pass, "refused in SUBACK")
}

// publishCases: messages on topics that are not one's own, seen by a real second client.
func publishCases() []BrokerCase {
	var cases []BrokerCase
	for _, c := range []struct {
		id, does string
		qos      byte
		retain   bool
		version  mqtt.Version
	}{
		{"qos0", "a message on the other device's topic, QoS 0", 0, false, mqtt.V311},
		{"qos1", "a message on the other device's topic, QoS 1", 1, false, mqtt.V311},
		{"qos2", "a message on the other device's topic, QoS 2", 2, false, mqtt.V311},
		{"v5", "a message on the other device's topic, MQTT 5.0", 1, false, mqtt.V5},
		{"retained", "a retained message on the other device's topic", 1, true, mqtt.V311},
	} {
		cases = append(cases, BrokerCase{Case: Case{ID: "B7." + c.id, Does: c.does, Expect: "refuses it: the other device does not get it", Clause: isolation},
			try: func(p *intruder) error { return p.inject(c.version, mqtt.Publish{QoS: c.qos, Retain: c.retain}) }})
	}
	return append(cases,
		BrokerCase{Case: Case{ID: "B7.alias", Does: "a topic alias that was never set", Expect: "ends the connection", Clause: "MQTT 5.0 3.3.2.3.4"}, try: unknownAlias},
		BrokerCase{Case: Case{ID: "B7.wildcard", Does: "a message on a topic with wildcards", Expect: mayNotDoThat, Clause: "MQTT 3.3.2-2"}, try: func(p *intruder) error {
			return p.refusedPublish(mqtt.V311, mqtt.Publish{Topic: []byte(p.expand("{any}")), QoS: 1})
		}},
		BrokerCase{Case: Case{ID: "B7.system", Does: "a message on $SYS/x", Expect: mayNotDoThat, Clause: "MQTT 4.7.2"}, try: func(p *intruder) error {
			return p.refusedPublish(mqtt.V5, mqtt.Publish{Topic: []byte("$SYS/x"), QoS: 1})
		}})
}

// willCases: the same by a Will, which the broker publishes when the device is gone.
func willCases() []BrokerCase {
	c := func(id, does, expect, clause string, v mqtt.Version, retain bool) BrokerCase {
		return BrokerCase{Case: Case{ID: "B8." + id, Does: does, Expect: expect, Clause: isolation + "; " + clause}, try: func(p *intruder) error {
			return p.lastWill(p.o.Device, v, retain)
		}}
	}
	return []BrokerCase{
		c("will", "a Will on the other device's topic", "refuses it: the other device does not get it", "MQTT 3.1.2.5", mqtt.V311, false),
		c("will-retained", "a retained Will on the other device's topic", "refuses it: nothing stays there", "MQTT 3.1.2.7", mqtt.V311, true),
		c("will-v5", "a Will on the other device's topic, MQTT 5.0", "refuses it: the other device does not get it", "MQTT 5.0 3.1.2.5", mqtt.V5, false),
	}
}

// injected is a topic of the other device that the product may use.
func (p *intruder) injected() string { return p.topic(p.o.Other, "d/cmd") }

// mark is the payload of what this case injects: a retained message that another case
// left behind, on a broker that takes them, is none of its own.
func (p *intruder) mark() string {
	if p.payload == "" {
		p.payload = "injected " + rand.Text()
	}
	return p.payload
}

func (p *intruder) reached(witness *guest) bool {
	return slices.Contains(witness.got, p.injected()+" "+p.mark())
}

// watch connects the other device, subscribed to its topics, as the witness.
func (p *intruder) watch() (*guest, error) {
	w, err := p.join(p.o.Other, hello{id: p.o.Other.Name})
	if err != nil {
		return nil, err
	}
	ok, err := w.subscribe(p.filter(p.o.Other))
	if err == nil && !ok[0] {
		err = errors.New("the other device may not subscribe to its own topics")
	}
	return w, err
}

// fenced waits until the witness has got everything that was sent to it before.
func (p *intruder) fenced(w *guest) error {
	fence := p.topic(p.o.Other, "check/fence")
	w.within(p.o.Step)
	if ok, err := w.publish(mqtt.Publish{Topic: []byte(fence), QoS: 1, Payload: []byte("fence")}); err != nil || !ok {
		return fmt.Errorf("the witness could not publish to itself: %w", err)
	}
	return w.hears(fence)
}

func (p *intruder) inject(v mqtt.Version, m mqtt.Publish) error { return p.injectAs(p.o.Device, v, m) }

func (p *intruder) injectAs(who *Credentials, v mqtt.Version, m mqtt.Publish) error {
	witness, err := p.watch()
	if err != nil {
		return err
	}
	g, err := p.join(who, hello{id: p.clientOf(who), version: v})
	if err != nil {
		return err
	}
	m.Topic, m.Payload = []byte(p.injected()), []byte(p.mark())
	taken, err := g.publish(m)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.note = "the broker neither acknowledged nor refused it"
	}
	if err := p.fenced(witness); err != nil {
		return err
	}
	if m.Retain {
		if again, err := p.watch(); err == nil && p.fenced(again) == nil {
			witness = again
		}
	}
	return p.judgeInjection(g, witness, taken)
}

func (p *intruder) judgeInjection(g, witness *guest, taken bool) error {
	p.last = g.Conn
	switch {
	case p.reached(witness):
		return p.settle(Fail, "the other device got it")
	case taken:
		return p.settle(Pass, "acknowledged, but the other device did not get it")
	case g.Seen.End != nil:
		return p.settle(Pass, "the connection was ended: %s", g.Seen.EndText())
	}
	return p.settle(Pass, "refused, and the other device did not get it")
}

// refusedPublish is a message that must not be taken.
func (p *intruder) refusedPublish(v mqtt.Version, m mqtt.Publish) error {
	g, err := p.join(p.o.Device, hello{id: p.o.Device.Name, version: v})
	if err != nil {
		return err
	}
	m.Payload = []byte("x")
	taken, err := g.publish(m)
	if err != nil {
		return p.judgeEnd(g, err)
	}
	if taken {
		return p.settle(Fail, "it was acknowledged")
	}
	return p.settle(Pass, "refused")
}

func unknownAlias(p *intruder) error {
	g, err := p.join(p.o.Device, hello{id: p.o.Device.Name, version: mqtt.V5})
	if err != nil {
		return err
	}
	m := mqtt.Publish{QoS: 1, PacketID: g.nextID(), Alias: 7, Payload: []byte("x")}
	if _, err := g.Write(mqtt.AppendPublish(nil, mqtt.V5, &m)); err != nil {
		return p.judgeEnd(g, err)
	}
	if g.closed(p.o.Step) {
		return p.settle(Pass, "the connection was ended")
	}
	return p.settle(Fail, "it was taken")
}

// lastWill leaves a Will on the other's topic and dies.
func (p *intruder) lastWill(who *Credentials, v mqtt.Version, retain bool) error {
	witness, err := p.watch()
	if err != nil {
		return err
	}
	g, err := p.join(who, hello{id: p.clientOf(who), version: v,
		will: &mqtt.Will{Topic: p.injected(), Payload: []byte(p.mark()), QoS: 1, Retain: retain}})
	if errors.Is(err, errRefused) {
		return p.settle(Pass, "%v", err)
	}
	if err != nil {
		return err
	}
	g.Raw.Close()
	// The Will leaves when the broker has noticed: its own message on a second connection
	// of the same device comes after that, since a device has one connection.
	again, err := p.join(who, hello{id: p.clientOf(who), version: v})
	if err != nil {
		return err
	}
	if _, err := again.ping(); err != nil {
		return err
	}
	if err := p.fenced(witness); err != nil {
		return err
	}
	if p.reached(witness) {
		return p.settle(Fail, "the other device got it")
	}
	if retain {
		if late, err := p.watch(); err == nil && p.fenced(late) == nil && p.reached(late) {
			return p.settle(Fail, "it stayed behind as a retained message")
		}
	}
	return p.settle(Pass, "the Will was taken, but the other device did not get it")
}

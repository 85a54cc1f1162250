package broker

import (
	"errors"
	"slices"

	"hawser/internal/identity"
	"hawser/internal/mqtt"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// onSubscribe takes a SUBSCRIBE. Where the session is stored, SUBACK waits until
// the subscriptions are.
func (c *conn) onSubscribe(flags byte, body []byte) error {
	var p mqtt.Subscribe
	if err := p.Decode(c.version, flags, body); err != nil {
		return err
	}
	ack := mqtt.Suback{PacketID: p.PacketID}
	var made []*subscription
	var fresh []bool
	for i := range p.Filters {
		f := &p.Filters[i]
		code := c.judgeFilter(f)
		if !code.Failed() {
			sub, isNew, ok := c.b.subscribe(c, f, p.SubID)
			if ok {
				made, fresh = append(made, sub), append(fresh, isNew)
			} else {
				code = mqtt.QuotaExceeded
			}
		}
		ack.Codes = append(ack.Codes, code)
	}
	if err := c.storeSubscriptions(made, fresh); err != nil {
		return err
	}
	c.send(&ack)
	c.b.greetSubscriptions(c, made, fresh)
	return nil
}

// judgeFilter asks the authorizer. 3.1.1 clients see 0x80 for any failure.
func (c *conn) judgeFilter(f *mqtt.Subscription) mqtt.ReasonCode {
	group, inner, err := identity.SplitShare(f.Filter)
	if err != nil || identity.CheckFilter(inner) != nil {
		return mqtt.TopicFilterInvalid
	}
	if !c.m.may(Subscribe, f.Filter) {
		c.m.refused.Add(1)
		c.b.stats.Refused.Add(1)
		c.b.log.Info("subscription refused", "principal", c.m.who.String(), "filter", clip(f.Filter, 200))
		return mqtt.NotAuthorized
	}
	if group != "" && c.m.who.Kind == identity.Device {
		return mqtt.SharedNotSupported
	}
	return mqtt.ReasonCode(f.QoS)
}

// subscribe makes or replaces one subscription; it holds from the next frame
// on. ok is false at the limit.
func (b *Broker) subscribe(c *conn, f *mqtt.Subscription, id uint32) (sub *subscription, isNew, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.c != c {
		return nil, false, false
	}
	for _, old := range s.subs {
		if old.full == f.Filter {
			sub = old
		}
	}
	if isNew = sub == nil; isNew {
		if len(s.subs) >= c.q.Subscriptions {
			return nil, false, false
		}
		sub = &subscription{s: s, full: f.Filter, start: b.next}
		_, sub.filter, _ = identity.SplitShare(f.Filter)
	}
	sub.id, sub.qos, sub.noLocal, sub.asIs, sub.rh = id, f.QoS, f.NoLocal, f.RetainAsPublished, f.RetainHandling
	if isNew {
		s.subs = append(s.subs, sub)
		b.link(sub)
	}
	return sub, isNew, true
}

// link enters a subscription where messages are routed. The caller holds mu.
func (b *Broker) link(sub *subscription) {
	s := sub.s
	if s.isDevice() {
		return
	}
	name, filter, _ := identity.SplitShare(sub.full)
	if name == "" {
		b.tree.add(sub)
		return
	}
	key := groupKey{s.key.Principal, name, filter}
	g := b.groups[key]
	if g == nil {
		g = &group{b: b, key: key, no: b.cfg.Store.NextSession(), next: b.next, out: make(map[msglog.Pos]bool)}
		b.groups[key] = g
		b.tree.add(&subscription{group: g, filter: filter, start: b.next})
	}
	sub.group = g
	g.members = append(g.members, sub)
}

// unlink takes a subscription out again. The caller holds mu.
func (b *Broker) unlink(sub *subscription) {
	g := sub.group
	if g == nil {
		if !sub.s.isDevice() {
			b.tree.remove(sub)
		}
		return
	}
	for i, m := range g.members {
		if m == sub {
			g.members = append(g.members[:i], g.members[i+1:]...)
			break
		}
	}
	if len(g.members) > 0 {
		return
	}
	delete(b.groups, g.key)
	b.tree.removeGroup(g)
	if no := g.no; g.stored {
		b.submit("drop group", func(tx *registry.Tx) error { return tx.DropSession(no) }, nil)
	}
}

// storeSubscriptions writes subscriptions of a stored session and waits.
func (c *conn) storeSubscriptions(subs []*subscription, fresh []bool) error {
	s := c.s
	s.b.mu.Lock()
	s.mu.Lock()
	if !s.persistent() || len(subs) == 0 {
		s.mu.Unlock()
		s.b.mu.Unlock()
		return nil
	}
	rows := make([]registry.Subscription, 0, len(subs))
	var groups []*registry.Session
	for i, sub := range subs {
		sub.ungreeted = sub.wantsRetained(fresh[i]) && sub.qos > 0 && len(s.b.retained.find(sub.filter)) > 0
		rows = append(rows, registry.Subscription{Filter: sub.full, Options: sub.options(), SubID: sub.id, Start: uint64(sub.start)})
		if g := sub.group; g != nil && !g.stored {
			g.stored = true
			groups = append(groups, &registry.Session{No: g.no, Key: g.key.sessionKey(), Generation: 1,
				Expiry: registry.NeverExpires, Created: s.created, Cursor: uint64(g.floor())})
		}
	}
	no, gen := s.no, s.gen
	done := make(chan error, 1)
	s.b.submit("save subscriptions", func(tx *registry.Tx) error {
		for _, g := range groups {
			if err := tx.SaveSession(g); err != nil {
				return err
			}
		}
		return tx.PutSubscriptions(no, gen, rows...)
	}, func(err error) { done <- err })
	s.mu.Unlock()
	s.b.mu.Unlock()
	return c.committed(<-done)
}

// committed turns a failed commit into the end of the connection: the client
// will try again, and nothing was promised.
func (c *conn) committed(err error) error {
	if err != nil {
		return &mqtt.Error{Code: mqtt.ServerBusy, Text: "the registry did not take it"}
	}
	return nil
}

// greetSubscriptions sends what a subscription brings with it: the retained
// messages (MQTT 5.0 3.3.1.3), and what the server has for a device.
func (b *Broker) greetSubscriptions(c *conn, subs []*subscription, fresh []bool) {
	s := c.s
	b.mu.Lock()
	s.mu.Lock()
	for i, sub := range subs {
		if sub.wantsRetained(fresh[i]) {
			s.greet(sub)
		}
	}
	s.pump()
	s.mu.Unlock()
	for _, sub := range subs {
		if sub.group != nil {
			sub.group.feed()
		}
	}
	b.mu.Unlock()
	for _, sub := range subs {
		b.tellSubscribed(c, sub.filter)
	}
}

// wantsRetained applies Retain Handling (MQTT 5.0 3.8.3.1). Nothing retained goes
// to a shared subscription (4.8.2).
func (s *subscription) wantsRetained(fresh bool) bool {
	return s.group == nil && (s.rh == 0 || s.rh == 1 && fresh)
}

// greet puts the retained messages of a subscription on their way. The caller
// holds Broker.mu and mu.
func (s *session) greet(sub *subscription) {
	for _, m := range s.b.retained.find(sub.filter) {
		if ownUplink(s.key.Principal, m.topic) || sub.loops(m.from, m.client) {
			continue
		}
		d := delivery{msg: m, pos: m.pos, qos: min(sub.qos, m.qos), retain: true, kept: true}
		if sub.id != 0 {
			d.ids = []uint32{sub.id}
		}
		if d.qos > 0 {
			d.greets = sub
			sub.greeting++
		}
		s.out.retained = append(s.out.retained, d)
	}
	s.greeted(sub)
}

// greeted notes in the registry that all retained messages of a subscription are
// acknowledged. The caller holds mu.
func (s *session) greeted(sub *subscription) {
	if !sub.ungreeted || sub.greeting > 0 || !slices.Contains(s.subs, sub) {
		return
	}
	sub.ungreeted = false
	no, gen := s.no, s.gen
	row := registry.Subscription{Filter: sub.full, Options: sub.options(), SubID: sub.id, Start: uint64(sub.start)}
	s.b.submit("note greeting", func(tx *registry.Tx) error {
		if err := tx.PutSubscriptions(no, gen, row); !errors.Is(err, registry.ErrFenced) {
			return err
		}
		return nil // taken over: the next connection is greeted again
	}, nil)
}

// regreet sends the retained messages again that a restart has kept from being
// acknowledged. The caller holds Broker.mu and mu.
func (s *session) regreet() {
	for _, sub := range s.subs {
		if sub.ungreeted && sub.greeting == 0 {
			s.greet(sub)
		}
	}
}

// tellSubscribed lets the server send what waits for a device.
func (b *Broker) tellSubscribed(c *conn, filter string) {
	if id, ok := c.m.who.ID(); ok && b.cfg.Subscribed != nil {
		b.cfg.Subscribed(id, filter)
	}
}

// onUnsubscribe takes an UNSUBSCRIBE.
func (c *conn) onUnsubscribe(flags byte, body []byte) error {
	var p mqtt.Unsubscribe
	if err := p.Decode(c.version, flags, body); err != nil {
		return err
	}
	ack := mqtt.Unsuback{PacketID: p.PacketID}
	var gone []string
	for _, f := range p.Filters {
		code := mqtt.NoSubscriptionExisted
		if c.b.unsubscribe(c.s, f) {
			code = mqtt.Success
			gone = append(gone, f)
		}
		ack.Codes = append(ack.Codes, code)
	}
	if err := c.committed(c.s.forgetSubscriptions(gone)); err != nil {
		return err
	}
	c.send(&ack)
	return nil
}

// unsubscribe removes one subscription and tells whether it was there.
func (b *Broker) unsubscribe(s *session, filter string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, sub := range s.subs {
		if sub.full == filter {
			s.subs = append(s.subs[:i], s.subs[i+1:]...)
			b.unlink(sub)
			return true
		}
	}
	return false
}

// forgetSubscriptions deletes rows and waits for the commit.
func (s *session) forgetSubscriptions(filters []string) error {
	s.mu.Lock()
	no, gen, stored := s.no, s.gen, s.stored && s.persistent()
	s.mu.Unlock()
	if !stored || len(filters) == 0 {
		return nil
	}
	done := make(chan error, 1)
	s.b.submit("delete subscriptions", func(tx *registry.Tx) error {
		return tx.DeleteSubscriptions(no, gen, filters...)
	}, func(err error) { done <- err })
	return <-done
}

package check

import (
	"slices"
	"strings"

	"hawser/internal/mqtt"
)

// message is what goes through a broker of these tests.
type message struct {
	topic, payload, from string
	qos                  byte
	retain, will         bool
}

// mailbox is what a broker keeps for a client. The broker's mu guards it.
type mailbox struct {
	key     string
	at      *peer // nil while it is away
	keep    bool
	filters map[string]bool
	queue   []message
	flight  map[uint16]message // sent and not acknowledged
	last    uint16             // packet id
}

// covers reports whether a filter, with $share or without, matches a topic (MQTT 4.7).
func covers(filter, topic string) bool {
	_, filter, _ = cutShare(filter)
	f, t := strings.Split(filter, "/"), strings.Split(topic, "/")
	if strings.HasPrefix(topic, "$") != strings.HasPrefix(filter, "$") {
		return false
	}
	for i, level := range f {
		if level == "#" {
			return true
		}
		if i >= len(t) || level != "+" && level != t[i] {
			return false
		}
	}
	return len(f) == len(t)
}

// publish keeps and delivers a message; b.mu is held.
func (b *broker) publish(m message) {
	if b.revoked[m.from] && !(m.will && b.has(keepsWill)) {
		return
	}
	if m.retain {
		if b.retained[m.topic] = m; m.payload == "" {
			delete(b.retained, m.topic)
		}
	}
	m.retain = false
	for _, s := range b.sessions {
		for f := range s.filters {
			if covers(f, m.topic) || b.has(sharesAll) && strings.HasPrefix(f, "$share/") {
				b.deliver(s, m)
				break
			}
		}
	}
}

// deliver sends a message to a session, or keeps it there; b.mu is held.
func (b *broker) deliver(s *mailbox, m message) {
	if b.has(grantsSilently) && s.at != nil && !s.at.mayRead(m.topic) {
		return
	}
	if s.at == nil {
		if m.qos > 0 {
			s.queue = append(s.queue, m)
		}
		return
	}
	p := mqtt.Publish{Topic: []byte(m.topic), Payload: []byte(m.payload), QoS: min(m.qos, 1), Retain: m.retain}
	if p.QoS > 0 {
		s.last++
		p.PacketID = s.last
		s.flight[s.last] = m
	}
	s.at.send(mqtt.AppendPublish(nil, s.at.v, &p))
}

// resume sends what waits in a session; b.mu is held.
func (b *broker) resume(p *peer, s *mailbox) {
	var ids []uint16
	for id := range s.flight {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	var waiting []message
	for _, id := range ids {
		if m := s.flight[id]; !b.has(forgetsFlight) && (!b.revoked[m.from] || b.has(keepsFlight)) {
			waiting = append(waiting, m)
		}
	}
	for _, m := range s.queue {
		if !b.revoked[m.from] || b.has(keepsQueued) {
			waiting = append(waiting, m)
		}
	}
	s.queue, s.flight = nil, map[uint16]message{}
	for _, m := range waiting {
		b.deliver(s, m)
	}
}

// revoke takes everything away from a device.
func (b *broker) revoke(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.revoked[name] = true
	for _, s := range b.sessions {
		if s.at != nil && s.at.name == name && !b.has(keepsOpen) {
			at := s.at
			b.part(at)
			at.raw.Close()
		}
	}
}

package broker

import (
	"hawser/internal/identity"
	"hawser/internal/msglog"
)

// Bar shuts principals out: their certificates, their connections, and their words
// that wait: Wills, retained and queued messages. All of their connections are told
// before anything slow begins.
func (b *Broker) Bar(who ...identity.Principal) {
	set := make(map[identity.Principal]bool, len(who))
	for _, p := range who {
		set[p] = true
	}
	b.dir.bar(set)
	b.mu.Lock()
	gone := b.sessionsOf(set)
	for _, s := range gone {
		s.mu.Lock()
		s.will = nil
		c := s.c
		s.mu.Unlock()
		if c != nil {
			c.end(fate{code: notAuthorized, err: errRevoked})
		}
		b.forget(s)
	}
	for topic, m := range b.retained.all {
		if set[m.from] {
			b.dropRetained(topic)
		}
	}
	b.mu.Unlock()
	for _, s := range gone {
		b.toldDropped(s.key.Principal.Name, s.erase())
	}
}

// sessionsOf gives the sessions of those in set. The caller holds mu.
func (b *Broker) sessionsOf(set map[identity.Principal]bool) (list []*session) {
	services := false
	for p := range set {
		id, ok := p.ID()
		if !ok {
			services = true
		} else if s := b.devices[id]; s != nil {
			list = append(list, s)
		}
	}
	if !services {
		return list
	}
	for key, s := range b.sessions {
		if set[key.Principal] && !s.isDevice() {
			list = append(list, s)
		}
	}
	return list
}

// Readmit lets a principal in again with its certificates and tells whether it was
// shut out. Then what was queued for it while it was barred goes before it can come.
func (b *Broker) Readmit(who identity.Principal, certs ...Certificate) (wasOut bool) {
	if wasOut = !b.dir.admits(who); wasOut && who.Kind == identity.Device {
		b.dropQueue(who.Name)
	}
	for _, c := range certs {
		b.dir.add(c)
	}
	return wasOut
}

// DropTopics forgets what is retained under private/<id>/, whoever has said it:
// nobody is to hear it any more.
func (b *Broker) DropTopics(ids ...identity.ID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, id := range ids {
		var topics []string
		for topic := range b.retained.byDevice[id] {
			topics = append(topics, topic)
		}
		for _, topic := range topics {
			b.dropRetained(topic)
		}
	}
}

// dropQueue empties the queue of a device that has no session any more, and tells
// how many messages went.
func (b *Broker) dropQueue(name string) (messages int) {
	messages, err := b.cfg.Log.QueueDrop(name)
	if err != nil {
		b.log.Warn("queue of an ended session not emptied", "device", name, "error", err)
	}
	return messages
}

func (b *Broker) toldDropped(name string, messages int) {
	id, err := identity.ParseID(name)
	if err == nil && messages > 0 && b.cfg.QueueDropped != nil {
		b.cfg.QueueDropped(id, messages)
	}
}

// RemoteOf is the address from which a committed record came, "" where no
// connection of this process has sent it: it was replayed, or is the server's own.
func RemoteOf(r *msglog.Record) string {
	if c, ok := r.Owner.(*conn); ok {
		return c.tls.RemoteAddr().String()
	}
	return ""
}

package broker

import (
	"slices"
	"strings"

	"hawser/internal/identity"
)

// tree finds the subscriptions of services that match a topic. Devices are not
// in it: all they can subscribe to lies under their own id, which is looked up
// directly. Guarded by Broker.mu.
type tree struct{ root node }

type node struct {
	children map[string]*node // by level; "+" and "#" are levels here
	subs     []*subscription
}

func (t *tree) add(sub *subscription) {
	n := &t.root
	for rest, more := sub.filter, true; more; {
		var level string
		level, rest, more = strings.Cut(rest, "/")
		next := n.children[level]
		if next == nil {
			if n.children == nil {
				n.children = make(map[string]*node)
			}
			next = &node{}
			n.children[strings.Clone(level)] = next
		}
		n = next
	}
	n.subs = append(n.subs, sub)
}

func (t *tree) remove(sub *subscription) {
	t.root.remove(func(s *subscription) bool { return s == sub }, sub.filter)
}

// removeGroup takes out the one entry that stands for all members of g.
func (t *tree) removeGroup(g *group) {
	t.root.remove(func(s *subscription) bool { return s.group == g }, g.key.filter)
}

// remove takes the entry out that is wanted and tells whether n is empty now.
func (n *node) remove(wanted func(*subscription) bool, filter string) bool {
	level, rest, more := strings.Cut(filter, "/")
	next := n.children[level]
	if next == nil {
		return false
	}
	empty := false
	if more {
		empty = next.remove(wanted, rest)
	} else {
		if i := slices.IndexFunc(next.subs, wanted); i >= 0 {
			next.subs = slices.Delete(next.subs, i, i+1)
		}
		empty = len(next.subs) == 0 && len(next.children) == 0
	}
	if empty {
		delete(n.children, level)
	}
	return len(n.children) == 0 && len(n.subs) == 0
}

// find calls fn for every subscription whose filter matches topic.
func (t *tree) find(topic string, fn func(*subscription)) {
	t.root.find(topic, true, strings.HasPrefix(topic, "$"), fn)
}

func (n *node) find(rest string, more, dollar bool, fn func(*subscription)) {
	if !dollar {
		if h := n.children["#"]; h != nil { // also matches the level above it
			each(h.subs, fn)
		}
	}
	if !more {
		each(n.subs, fn)
		return
	}
	level, rest, more := strings.Cut(rest, "/")
	if next := n.children[level]; next != nil && level != "+" && level != "#" {
		next.find(rest, more, false, fn)
	}
	if next := n.children["+"]; next != nil && !dollar {
		next.find(rest, more, false, fn)
	}
}

func each(subs []*subscription, fn func(*subscription)) {
	for _, s := range subs {
		fn(s)
	}
}

// retainedStore is the retained messages, one per topic. Guarded by Broker.mu.
type retainedStore struct {
	all      map[string]*message
	byDevice map[identity.ID]map[string]*message // the same messages, under private/<id>/
	dirty    map[string]bool                     // changed since the last checkpoint
}

func newRetained() retainedStore {
	return retainedStore{
		all:      make(map[string]*message),
		byDevice: make(map[identity.ID]map[string]*message),
		dirty:    make(map[string]bool),
	}
}

func (r *retainedStore) put(m *message) {
	r.all[m.topic] = m
	r.dirty[m.topic] = true
	if id, _, ok := identity.DeviceTopic(m.topic); ok {
		if r.byDevice[id] == nil {
			r.byDevice[id] = make(map[string]*message)
		}
		r.byDevice[id][m.topic] = m
	}
}

func (r *retainedStore) remove(topic string) (was *message) {
	was = r.all[topic]
	if was == nil {
		return nil
	}
	r.dirty[was.topic] = true
	delete(r.all, topic)
	if id, _, ok := identity.DeviceTopic(topic); ok {
		if delete(r.byDevice[id], topic); len(r.byDevice[id]) == 0 {
			delete(r.byDevice, id)
		}
	}
	return was
}

// find gives the retained messages that filter matches.
func (r *retainedStore) find(filter string) (found []*message) {
	if !strings.ContainsAny(filter, "+#") {
		if m := r.all[filter]; m != nil {
			found = append(found, m)
		}
		return found
	}
	from := r.all
	if id, _, ok := identity.DeviceTopic(filter); ok {
		from = r.byDevice[id]
	}
	for topic, m := range from {
		if identity.Match(filter, topic) {
			found = append(found, m)
		}
	}
	return found
}

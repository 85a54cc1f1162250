package server

import (
	"errors"
	"sync"
	"time"

	"hawser/internal/identity"
	"hawser/internal/registry"
)

// presence keeps when devices were last seen. It writes them in batches: the
// registry would otherwise sync its disk for each connection.
type presence struct {
	reg *registry.Registry

	mu   sync.Mutex
	seen map[identity.ID]time.Time // mu; not written yet
}

func newPresence(r *registry.Registry) *presence {
	return &presence{reg: r, seen: map[identity.ID]time.Time{}}
}

// told is broker.Config.Presence.
func (p *presence) told(who identity.Principal, _ bool) {
	id, ok := who.ID()
	if !ok {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen[id] = time.Now()
}

// flush submits what has gathered. What cannot be written is kept for the next
// time, unless something newer is known by then.
func (p *presence) flush() {
	p.mu.Lock()
	seen := p.seen
	p.seen = map[identity.ID]time.Time{}
	p.mu.Unlock()
	if len(seen) == 0 {
		return
	}
	list := make([]registry.Seen, 0, len(seen))
	for id, at := range seen {
		list = append(list, registry.Seen{ID: id, At: at})
	}
	p.reg.Submit(func(tx *registry.Tx) error { return tx.SaveSeen(list) }, func(err error) {
		if err == nil || errors.Is(err, registry.ErrClosed) {
			return
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		for id, at := range seen {
			if at.After(p.seen[id]) {
				p.seen[id] = at
			}
		}
	})
}

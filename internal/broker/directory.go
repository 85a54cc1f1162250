package broker

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"hawser/internal/identity"
)

// Certificate is one active client certificate. It was verified once, when it
// was imported; at a connect only its fingerprint and its dates are looked at.
type Certificate struct {
	Fingerprint [32]byte // SHA-256 of the DER
	Principal   identity.Principal
	NotBefore   time.Time
	NotAfter    time.Time
}

// Fingerprint is the name under which a certificate is pinned.
func Fingerprint(der []byte) [32]byte { return sha256.Sum256(der) }

// ErrNotPinned: the certificate is not among the active ones.
var ErrNotPinned = errors.New("certificate is not an active one of this fleet")

// notPinned is ErrNotPinned with the certificate it is about.
type notPinned struct{ fingerprint [32]byte }

func (e *notPinned) Error() string { return fmt.Sprintf("%v: sha256 %x", ErrNotPinned, e.fingerprint) }
func (e *notPinned) Unwrap() error { return ErrNotPinned }

// directory is who may come in: the active certificates, and what is known of
// their owners. An empty directory admits nobody.
type directory struct {
	limits Limits

	mu      sync.RWMutex
	pins    map[[32]byte]pin               // guarded by mu
	active  map[identity.Principal]int     // number of pins of each principal; guarded by mu
	members map[identity.Principal]*member // who was seen or granted something; guarded by mu
	grants  map[identity.Principal][]Grant // of services; guarded by mu
}

// pin holds the dates as unix seconds: they are compared at each connect.
type pin struct {
	who       identity.Principal
	notBefore int64
	notAfter  int64
}

// member is one principal as the broker knows it, shared by its connections.
type member struct {
	who    identity.Principal
	grants atomic.Pointer[[]Grant]
	rate   limiter

	retained      int // topics it holds a retained message on; guarded by Broker.mu
	retainedBytes int // their payloads; guarded by Broker.mu

	refused atomic.Uint64 // publishes and subscriptions that the authorizer refused
	dropped atomic.Uint64 // messages not queued at the queue limit
}

func newDirectory(l Limits) *directory {
	return &directory{
		limits:  l,
		pins:    make(map[[32]byte]pin),
		active:  make(map[identity.Principal]int),
		members: make(map[identity.Principal]*member),
		grants:  make(map[identity.Principal][]Grant),
	}
}

func (d *directory) add(c Certificate) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, known := d.pins[c.Fingerprint]; !known {
		d.active[c.Principal]++
	}
	d.pins[c.Fingerprint] = pin{c.Principal, c.NotBefore.Unix(), c.NotAfter.Unix()}
}

// remove takes one certificate out and tells whose it was.
func (d *directory) remove(fp [32]byte) (who identity.Principal, last bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p, known := d.pins[fp]
	if !known {
		return identity.Principal{}, false
	}
	delete(d.pins, fp)
	if d.active[p.who]--; d.active[p.who] > 0 {
		return p.who, false
	}
	delete(d.active, p.who)
	return p.who, true
}

// bar takes every certificate of those in who out.
func (d *directory) bar(who map[identity.Principal]bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for fp, p := range d.pins {
		if who[p.who] {
			delete(d.pins, fp)
		}
	}
	for p := range who {
		delete(d.active, p)
	}
}

// admits reports whether a principal has a certificate that opens the door.
func (d *directory) admits(who identity.Principal) bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.active[who] > 0
}

// lookup is the admission check. It has no effect: Go calls it before the client
// has proved that it holds the key (RFC 9846 4.4.3 comes after 4.4.2).
func (d *directory) lookup(fp [32]byte, now time.Time) (identity.Principal, error) {
	d.mu.RLock()
	p, known := d.pins[fp]
	d.mu.RUnlock()
	switch t := now.Unix(); {
	case !known:
		return identity.Principal{}, &notPinned{fp}
	case t < p.notBefore:
		return identity.Principal{}, fmt.Errorf("certificate of %v is not valid before %v", p.who, time.Unix(p.notBefore, 0).UTC())
	case t > p.notAfter:
		return identity.Principal{}, fmt.Errorf("certificate of %v has expired at %v", p.who, time.Unix(p.notAfter, 0).UTC())
	}
	return p.who, nil
}

// member gives the one member of a principal, made when first asked for.
func (d *directory) member(who identity.Principal) *member {
	d.mu.RLock()
	m := d.members[who]
	d.mu.RUnlock()
	if m != nil {
		return m
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if m = d.members[who]; m == nil {
		m = &member{who: who}
		m.rate.init(d.limits.of(who.Kind))
		g := d.grants[who]
		m.grants.Store(&g)
		d.members[who] = m
	}
	return m
}

// setGrants replaces all grants of a service.
func (d *directory) setGrants(who identity.Principal, grants []Grant) {
	own := append([]Grant(nil), grants...)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.grants[who] = own
	if m := d.members[who]; m != nil {
		m.grants.Store(&own)
	}
}

// stillMayPublish is asked before a message that waited (queued, retained, a
// Will) is delivered: its publisher must still be admitted and allowed.
func (d *directory) stillMayPublish(who identity.Principal, topic string) bool {
	if who.Kind == identity.Server {
		return true
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.active[who] > 0 && Allowed(who, d.grants[who], Publish, topic)
}

// may asks the authorizer for this member with the grants of this moment.
func (m *member) may(a Action, subject string) bool {
	return Allowed(m.who, *m.grants.Load(), a, subject)
}

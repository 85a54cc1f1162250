package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"hawser/internal/fleet"
)

// leaves are the broker's certificates, one for each domain. New files are taken
// up while it runs; connections that stand do not notice.
type leaves struct {
	layout *fleet.Layout
	log    *slog.Logger
	served atomic.Pointer[map[string]*tls.Certificate] // by domain; the map is not changed

	mu    sync.Mutex
	marks map[string]mark // mu; files as they were last looked at
}

// mark tells two versions of a pair of files apart.
type mark struct {
	crtTime, keyTime time.Time
	crtSize, keySize int64
}

// loadLeaves refuses a pair that is missing, damaged or not valid now.
func loadLeaves(l *fleet.Layout, log *slog.Logger) (*leaves, error) {
	v := &leaves{layout: l, log: log, marks: map[string]mark{}}
	now := time.Now()
	all := map[string]*tls.Certificate{}
	for _, d := range l.Config.Fleet.Domains {
		v.marks[d] = v.mark(d)
		cert, err := l.LoadBrokerLeaf(d, now)
		if err != nil {
			return nil, err
		}
		all[d] = cert
	}
	v.served.Store(&all)
	return v, nil
}

func (v *leaves) mark(domain string) (m mark) {
	if i, err := os.Stat(v.layout.BrokerCertPath(domain)); err == nil {
		m.crtTime, m.crtSize = i.ModTime(), i.Size()
	}
	if i, err := os.Stat(v.layout.BrokerKeyPath(domain)); err == nil {
		m.keyTime, m.keySize = i.ModTime(), i.Size()
	}
	return m
}

// pick chooses by server name (design section 4): none means the first domain,
// one that is not ours is refused.
func (v *leaves) pick(name string) (*tls.Certificate, error) {
	all := *v.served.Load()
	if name == "" {
		return all[v.layout.Config.Fleet.Domains[0]], nil
	}
	if c := all[strings.ToLower(strings.TrimSuffix(name, "."))]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("no certificate for the server name %q", name)
}

// reload takes up what has changed on disk. A pair that cannot be served is
// reported and the old one stays.
func (v *leaves) reload() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	old := *v.served.Load()
	next := make(map[string]*tls.Certificate, len(old))
	var errs []error
	for d, cert := range old {
		next[d] = cert
		m := v.mark(d)
		if m == v.marks[d] {
			continue
		}
		v.marks[d] = m
		fresh, err := v.layout.LoadBrokerLeaf(d, time.Now())
		if err != nil {
			errs = append(errs, err)
			continue
		}
		next[d] = fresh
		v.log.Info("broker certificate taken up", "domain", d, "until", fresh.Leaf.NotAfter)
	}
	v.served.Store(&next)
	return errors.Join(errs...)
}

// watch looks at the files each second until ctx ends.
func (v *leaves) watch(ctx context.Context) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if err := v.reload(); err != nil {
			v.log.Error("new broker certificate not taken up, the old one stays", "error", err)
		}
	}
}

// expiries gives when each certificate ends.
func (v *leaves) expiries() map[string]time.Time {
	ends := map[string]time.Time{}
	for d, c := range *v.served.Load() {
		ends[d] = c.Leaf.NotAfter
	}
	return ends
}

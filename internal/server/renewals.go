package server

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"hawser/internal/identity"
	"hawser/internal/registry"
)

// overlapFor is how long the certificate before a service's newest one is still good,
// unless the new one is used sooner.
const overlapFor = 7 * 24 * time.Hour

// renewals ends the certificates of services that have a newer one.
type renewals struct {
	reg  *registry.Registry
	log  *slog.Logger
	work *worker

	mu    sync.Mutex
	newer map[[32]byte]string // mu; by fingerprint: services whose first use of it ends those before
}

// load finds what was renewed before this start.
func (v *renewals) load(ctx context.Context) error {
	list, err := v.reg.Overlaps(ctx)
	if err != nil {
		return err
	}
	for _, o := range list {
		v.renewed(o.Newer, o.Name)
	}
	return nil
}

// renewed notes a certificate that was added to a service.
func (v *renewals) renewed(fingerprint [32]byte, name string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.newer[fingerprint] = name
}

// admitted is told of each connection that gets in. It does not wait.
func (v *renewals) admitted(who identity.Principal, fingerprint [32]byte) {
	if who.Kind != identity.Service {
		return
	}
	v.mu.Lock()
	_, waiting := v.newer[fingerprint]
	delete(v.newer, fingerprint)
	v.mu.Unlock()
	if waiting {
		v.work.do(func() { v.used("server", who.Name, fingerprint) })
	}
}

// used ends what came before a certificate. If that cannot be written down, the next
// connection tries again.
func (v *renewals) used(actor, name string, fingerprint [32]byte) {
	err := v.reg.Update(context.Background(), func(tx *registry.Tx) error { return tx.ServiceUsed(actor, name, fingerprint) })
	if err != nil {
		v.log.Warn("the certificate before the newest one was not ended", "service", name, "error", err)
		v.renewed(fingerprint, name)
	}
}

// endOverlaps ends what was renewed too long ago, used or not.
func (v *renewals) endOverlaps(ctx context.Context, now time.Time) {
	list, err := v.reg.Overlaps(ctx)
	if err != nil {
		v.log.Warn("renewals not read", "error", err)
		return
	}
	for _, o := range list {
		if now.Sub(o.Since) < overlapFor {
			continue
		}
		v.log.Warn("a service has not used its new certificate: the one before ends", "service", o.Name, "renewed", o.Since)
		v.used("server", o.Name, o.Newer)
	}
}

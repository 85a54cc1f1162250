package server

import (
	"net/http"
	"strings"
	"sync"

	"hawser/internal/admin"
	"hawser/internal/config"
	"hawser/internal/identity"
	"hawser/internal/registry"
)

// maxBarred is how many devices one request revokes: they share a transaction, and
// everybody else's changes wait for it.
const maxBarred = 1000

// tally counts the queued messages that went with devices, for whoever barred them.
type tally struct {
	mu sync.Mutex
	of map[identity.ID]uint64 // mu; of those that somebody asks for
}

func (t *tally) expect(ids []identity.ID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.of == nil {
		t.of = map[identity.ID]uint64{}
	}
	for _, id := range ids {
		t.of[id] = 0
	}
}

func (t *tally) add(id identity.ID, messages int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, asked := t.of[id]; asked {
		t.of[id] += uint64(messages)
	}
}

func (t *tally) take(ids []identity.ID) (sum uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, id := range ids {
		sum += t.of[id]
		delete(t.of, id)
	}
	return sum
}

// queueDropped is broker.Config.QueueDropped.
func (s *Server) queueDropped(id identity.ID, messages int) {
	s.dropped.add(id, messages)
	s.reg.Submit(func(tx *registry.Tx) error { return tx.QueueDropped("server", id, messages) }, func(err error) {
		if err != nil {
			s.log.Error("dropped messages not in the audit", "device", id.String(), "messages", messages, "error", err)
		}
	})
}

// onClone is the policy on two holders of one identity.
func (s *Server) onClone() string {
	if s.cfg.OnClone != "" {
		return s.cfg.OnClone
	}
	return s.layout.Config.Devices.OnClone
}

func checkOnClone(v string) error {
	if v != "" && v != config.CloneReport && v != config.CloneQuarantine {
		return admin.Errorf(admin.Invalid, "--on-clone %q is not %s or %s", v, config.CloneReport, config.CloneQuarantine)
	}
	return nil
}

// reasonOf reads the body of a change of state: it needs a reason.
func reasonOf(r *http.Request) (string, error) {
	var in struct {
		Reason string `json:"reason"`
	}
	if err := read(r, &in); err != nil {
		return "", err
	}
	return in.Reason, needReason(in.Reason)
}

func needReason(reason string) error {
	if strings.TrimSpace(reason) == "" {
		return admin.Errorf(admin.Invalid, "a reason is needed, for whoever reads the audit")
	}
	return nil
}

// bar makes a change that shuts devices out, waits until they are, and counts what
// was dropped. apply gives those whom it has shut out.
func (b *backend) bar(r *http.Request, apply func(tx *registry.Tx, actor string) ([]identity.ID, error)) (admin.Barred, error) {
	var out admin.Barred
	var changed []identity.ID
	err := b.update(r, func(tx *registry.Tx, actor string) (err error) {
		if changed, err = apply(tx, actor); err == nil && b.srv != nil {
			b.srv.dropped.expect(changed) // before the commit: the broker follows it at once
		}
		return err
	})
	out.Changed = len(changed)
	if b.srv == nil {
		return out, err
	}
	n := b.srv.dropped.take(changed)
	if out.Dropped = &n; n > 0 && err == nil { // their audit rows are written when a later change is
		err = b.reg.Update(r.Context(), func(*registry.Tx) error { return nil })
	}
	return out, err
}

// setState is the endpoint that bars one device.
func (b *backend) setState(to registry.DeviceState) call {
	return func(r *http.Request) (any, error) {
		id, err := pathID(r)
		if err != nil {
			return nil, err
		}
		reason, err := reasonOf(r)
		if err != nil {
			return nil, err
		}
		return b.bar(r, func(tx *registry.Tx, actor string) ([]identity.ID, error) {
			return []identity.ID{id}, tx.SetDeviceState(actor, id, to, reason)
		})
	}
}

// revokeMany revokes many devices in one change. Those that are revoked already are
// counted, so that a list can be gone through again.
func (b *backend) revokeMany(r *http.Request) (any, error) {
	var in struct {
		IDs    []identity.ID `json:"ids"`
		Reason string        `json:"reason"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	if err := needReason(in.Reason); err != nil {
		return nil, err
	}
	if len(in.IDs) == 0 || len(in.IDs) > maxBarred {
		return nil, admin.Errorf(admin.Invalid, "%d devices: 1 to %d can be revoked at once", len(in.IDs), maxBarred)
	}
	out, err := b.bar(r, func(tx *registry.Tx, actor string) ([]identity.ID, error) {
		return tx.BarDevices(actor, in.IDs, registry.DeviceRevoked, in.Reason)
	})
	out.Already = len(in.IDs) - out.Changed
	return out, err
}

// states tells which of many ids are known, and their states.
func (b *backend) states(r *http.Request) (any, error) {
	var in struct {
		IDs []identity.ID `json:"ids"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	known, err := b.reg.States(r.Context(), in.IDs)
	if err != nil {
		return nil, err
	}
	out := admin.States{Known: make(map[identity.ID]string, len(known))}
	for id, s := range known {
		out.Known[id] = string(s)
	}
	for _, id := range in.IDs {
		if _, ok := known[id]; !ok {
			out.Unknown = append(out.Unknown, id)
		}
	}
	return out, nil
}

func (b *backend) unrevoke(r *http.Request) (any, error) {
	id, err := pathID(r)
	if err != nil {
		return nil, err
	}
	reason, err := reasonOf(r)
	if err != nil {
		return nil, err
	}
	out := admin.Unrevoked{ID: id}
	err = b.update(r, func(tx *registry.Tx, actor string) (err error) {
		out.Certificates, err = tx.Unrevoke(actor, id, reason)
		return err
	})
	return out, err
}

func (b *backend) release(r *http.Request) (any, error) {
	id, err := pathID(r)
	if err != nil {
		return nil, err
	}
	reason, err := reasonOf(r)
	if err != nil {
		return nil, err
	}
	return nil, b.update(r, func(tx *registry.Tx, actor string) error { return tx.Release(actor, id, reason) })
}

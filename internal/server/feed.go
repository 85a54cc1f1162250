package server

import (
	"context"
	"errors"
	"slices"
	"sync"

	"hawser/internal/broker"
	"hawser/internal/identity"
	"hawser/internal/registry"
)

// changes are those that the broker does not follow yet, in order.
type changes struct {
	mu   sync.Mutex
	list []registry.Change // mu
}

// add tells whether c is the first.
func (v *changes) add(c registry.Change) (first bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.list = append(v.list, c)
	return len(v.list) == 1
}

func (v *changes) take() []registry.Change {
	v.mu.Lock()
	defer v.mu.Unlock()
	list := v.list
	v.list = nil
	return list
}

// changed is registry.Options.Changed: it hands on what the running broker has
// to follow. It is called on the registry's writer and may not wait.
func (s *Server) changed(c registry.Change) {
	if s.ahead.add(c) {
		s.feed.do(s.followAll)
	}
}

// followAll applies what has gathered, in order. It runs on the feed's goroutine.
// Those that are barred in a row are barred together: one walk over the sessions, and
// all connections end before the first queue is emptied.
func (s *Server) followAll() {
	list := s.ahead.take()
	if s.br == nil { // before the start: the broker begins with what is there
		return
	}
	for len(list) > 0 {
		n := slices.IndexFunc(list, func(c registry.Change) bool { return !shutsOut(c) })
		switch {
		case n < 0:
			n = len(list)
		case n == 0:
			s.follow(list[0])
			list = list[1:]
			continue
		}
		s.shutOut(list[:n])
		list = list[n:]
	}
}

// shutsOut reports whether c only takes from what is allowed: a row of such changes
// may be applied in any order.
func shutsOut(c registry.Change) bool {
	return c.Kind == registry.DeviceBarred || c.Kind == registry.ServiceBarred || c.Kind == registry.CertificateRemoved
}

func (s *Server) shutOut(list []registry.Change) {
	var who []identity.Principal
	var final []identity.ID
	for _, c := range list {
		if c.Kind == registry.CertificateRemoved {
			continue
		}
		who = append(who, c.Principal)
		if id, ok := c.Principal.ID(); ok && c.Final {
			final = append(final, id)
		}
	}
	if len(who) > 0 {
		s.br.Bar(who...)
		s.br.DropTopics(final...)
	}
	for _, c := range list {
		if id, ok := c.Principal.ID(); ok && c.Kind == registry.DeviceBarred {
			s.cmds.Barred(id)
		}
		if c.Kind == registry.CertificateRemoved {
			s.br.RemoveCertificate(c.Active.Fingerprint)
		}
	}
}

// follow applies one change that takes nothing away.
func (s *Server) follow(c registry.Change) {
	ctx := context.Background()
	switch c.Kind {
	case registry.CertificateAdded:
		s.br.AddCertificate(pinned(c.Active))
	case registry.DeviceChanged:
		s.readmit(ctx, c.Principal)
	case registry.ServiceAdded, registry.GrantsChanged:
		s.unfollowed(s.setGrants(ctx, c.Principal), c)
	case registry.ConfigChanged:
		if id, ok := c.Principal.ID(); ok {
			s.down.publishConfig(id)
		}
	}
}

// unfollowed says that a change could not be followed: then a restart is needed.
func (s *Server) unfollowed(err error, c registry.Change) {
	if err != nil && !errors.Is(err, registry.ErrClosed) {
		s.log.Error("change not followed by the running broker", "who", c.Principal.String(), "error", err)
	}
}

// readmit pins the certificates of a device that is active: it may have been barred
// before. Then what came for it in the very moment when it was barred goes, and it
// gets its configuration anew.
func (s *Server) readmit(ctx context.Context, who identity.Principal) {
	id, ok := who.ID()
	if !ok {
		return
	}
	d, err := s.reg.Device(ctx, id)
	if err != nil || d.State != registry.DeviceActive {
		return
	}
	list, err := s.reg.Certificates(ctx, who)
	if err != nil {
		s.unfollowed(err, registry.Change{Principal: who})
		return
	}
	var pins []broker.Certificate
	for _, c := range list {
		if c.State == registry.CertificateActive {
			pins = append(pins, broker.Certificate{Fingerprint: c.Fingerprint, Principal: who, NotBefore: c.NotBefore, NotAfter: c.NotAfter})
		}
	}
	if s.br.Readmit(who, pins...) {
		s.down.publishConfig(id)
	}
}

func (s *Server) setGrants(ctx context.Context, who identity.Principal) error {
	v, err := s.reg.Service(ctx, who.Name)
	if err != nil {
		return err
	}
	s.br.SetGrants(who, grantsOf(v))
	return nil
}

func grantsOf(v registry.Service) []broker.Grant {
	list := make([]broker.Grant, 0, len(v.Grants))
	for _, g := range v.Grants {
		list = append(list, broker.Grant{Write: g.Mode == registry.GrantWrite, Filter: g.Filter})
	}
	return list
}

func pinned(a registry.ActiveCertificate) broker.Certificate {
	return broker.Certificate{Fingerprint: a.Fingerprint, Principal: a.Principal, NotBefore: a.NotBefore, NotAfter: a.NotAfter}
}

// admitAll gives the broker everybody who may come in, before it starts.
func (s *Server) admitAll(ctx context.Context) error {
	err := s.reg.ActiveCertificates(ctx, func(a registry.ActiveCertificate) error {
		s.br.AddCertificate(pinned(a))
		return nil
	})
	if err != nil {
		return err
	}
	services, err := s.reg.Services(ctx)
	if err != nil {
		return err
	}
	for _, v := range services {
		if v.State != registry.ServiceActive {
			continue
		}
		s.br.SetGrants(identity.Principal{Kind: identity.Service, Name: v.Name}, grantsOf(v))
	}
	return nil
}

// explain says why a certificate is not let in.
func (s *Server) explain(fingerprint [32]byte) string {
	who, state, err := s.reg.CertificateOf(context.Background(), fingerprint)
	switch {
	case errors.Is(err, registry.ErrNotFound):
		return "never imported"
	case err != nil:
		return "the registry cannot say why"
	case state == registry.CertificateActive:
		return "its owner, " + who.String() + ", is barred"
	}
	return string(state) + ", of " + who.String()
}

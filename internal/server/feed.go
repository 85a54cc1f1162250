package server

import (
	"context"
	"errors"

	"hawser/internal/broker"
	"hawser/internal/identity"
	"hawser/internal/registry"
)

// changed is registry.Options.Changed: it hands on what the running broker has
// to follow. It is called on the registry's writer and may not wait.
func (s *Server) changed(c registry.Change) {
	s.feed.do(func() { s.follow(c) })
}

// follow applies one change. It runs on the feed's goroutine, in order.
func (s *Server) follow(c registry.Change) {
	if s.br == nil { // before the start: the broker begins with what is there
		return
	}
	ctx := context.Background()
	switch c.Kind {
	case registry.CertificateAdded:
		if c.Principal.Kind == identity.Service {
			s.renewals.renewed(c.Active.Fingerprint, c.Principal.Name)
		}
		s.br.AddCertificate(pinned(c.Active))
	case registry.CertificateRemoved:
		s.br.RemoveCertificate(c.Active.Fingerprint)
	case registry.DeviceBarred, registry.ServiceBarred:
		s.br.Bar(c.Principal)
		if id, ok := c.Principal.ID(); ok {
			s.cmds.Barred(id)
		}
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

// readmit pins the certificates of a device that is active: it may have been
// quarantined before.
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
	for _, c := range list {
		if c.State == registry.CertificateActive {
			s.br.AddCertificate(broker.Certificate{Fingerprint: c.Fingerprint, Principal: who, NotBefore: c.NotBefore, NotAfter: c.NotAfter})
		}
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

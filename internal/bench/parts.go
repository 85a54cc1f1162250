package bench

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"runtime/pprof"
	"time"

	"hawser/internal/broker"
	"hawser/internal/config"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// Parts serves a fleet with registry, log and broker alone until ctx ends: what
// is measured and profiled below the product. With profile it writes cpu.pprof
// from a POST of /v1/profile on until the next, and heap.pprof at /v1/gc.
func Parts(ctx context.Context, dir, listen, profile string) error {
	l, err := fleet.OpenLayout(dir)
	if err != nil {
		return err
	}
	p := &parts{layout: l, profile: profile}
	if err := p.open(ctx); err != nil {
		return err
	}
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	sock, err := net.Listen("unix", l.AdminSocket())
	if err != nil {
		return err
	}
	go http.Serve(sock, p.handler())
	served := make(chan error, 1)
	go func() { served <- p.broker.Serve(ln) }()
	fmt.Println("ready", ln.Addr())
	<-ctx.Done()
	ln.Close()
	sock.Close()
	end, cancel := context.WithTimeout(context.Background(), 25*time.Second)
	defer cancel()
	return errors.Join(<-served, p.broker.Close(end), p.log.Close(end), p.store.Close())
}

type parts struct {
	layout  *fleet.Layout
	profile string
	store   *registry.Registry
	log     *msglog.Log
	broker  *broker.Broker
	cpu     *os.File // the profile that is being taken
}

func (p *parts) open(ctx context.Context) error {
	logger := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	var err error
	if p.store, err = registry.Open(ctx, p.layout.RegistryPath(), registry.Options{}); err != nil {
		return err
	}
	state, err := p.store.LogState(ctx)
	if err != nil {
		return err
	}
	c := p.layout.Config
	p.log, err = msglog.Open(ctx, msglog.Config{Fleet: c.Fleet.ID.String(), Dir: p.layout.LogDir(), Logger: logger,
		MaxBytes: int64(c.Log.MaxBytes), HistoryMaxBytes: int64(c.Log.HistoryMaxBytes)}, broker.KnownState(state))
	if err != nil {
		return err
	}
	leaf, err := p.layout.LoadBrokerLeaf(domain, time.Now())
	if err != nil {
		return err
	}
	p.broker, err = broker.New(ctx, broker.Config{Log: p.log, Store: p.store, Limits: limitsOf(c),
		Suites: c.TLS.SuiteIDs(), Logger: logger, Leaf: func(string) (*tls.Certificate, error) { return leaf, nil }})
	if err != nil {
		return err
	}
	if err := p.admit(ctx); err != nil {
		return err
	}
	return p.broker.Start(ctx)
}

// limitsOf applies what the bench changes in hawser.toml.
func limitsOf(c *config.Config) broker.Limits {
	l := broker.DefaultLimits()
	for _, v := range []struct {
		q *broker.Quota
		p *config.Principal
	}{{&l.Device, &c.Limits.Device}, {&l.Service, &c.Limits.Service}} {
		v.q.Messages, v.q.Bytes = v.p.MessagesPerSecond, float64(v.p.BytesPerSecond)
		v.q.MessageBurst, v.q.ByteBurst = 10*v.q.Messages, 10*v.q.Bytes
		v.q.LogBytes = float64(c.Log.MaxBytes) * v.p.LogShare / 100
	}
	l.Device.Record = int(c.Limits.MaxWrite)
	return l
}

func (p *parts) admit(ctx context.Context) error {
	err := p.store.ActiveCertificates(ctx, func(a registry.ActiveCertificate) error {
		p.broker.AddCertificate(broker.Certificate{Fingerprint: a.Fingerprint, Principal: a.Principal,
			NotBefore: a.NotBefore, NotAfter: a.NotAfter})
		return nil
	})
	if err != nil {
		return err
	}
	services, err := p.store.Services(ctx)
	if err != nil {
		return err
	}
	for _, s := range services {
		who, err := identity.ServicePrincipal(s.Name)
		if err != nil {
			return err
		}
		var grants []broker.Grant
		for _, g := range s.Grants {
			grants = append(grants, broker.Grant{Write: g.Mode == registry.GrantWrite, Filter: g.Filter})
		}
		p.broker.SetGrants(who, grants)
	}
	return nil
}

// handler is the admin socket, as far as the bench needs it.
func (p *parts) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/gc", func(w http.ResponseWriter, _ *http.Request) {
		debug.FreeOSMemory()
		if p.profile != "" {
			p.write("heap")
			p.write("goroutine")
		}
		w.Write([]byte("{}"))
	})
	mux.HandleFunc("POST /v1/profile/{name}", func(w http.ResponseWriter, q *http.Request) { p.cpuProfile(q.PathValue("name")) })
	return mux
}

func (p *parts) write(what string) {
	f, err := os.Create(filepath.Join(p.profile, what+".pprof"))
	if err != nil {
		slog.Error("profile", "error", err)
		return
	}
	defer f.Close()
	pprof.Lookup(what).WriteTo(f, 0)
}

// cpuProfile ends the profile that is being taken and, with a name, begins one.
func (p *parts) cpuProfile(name string) {
	if p.cpu != nil {
		pprof.StopCPUProfile()
		p.cpu.Close()
		p.cpu = nil
	}
	if name == "off" || p.profile == "" {
		return
	}
	var err error
	if p.cpu, err = os.Create(filepath.Join(p.profile, name+".pprof")); err == nil {
		err = pprof.StartCPUProfile(p.cpu)
	}
	if err != nil {
		slog.Error("profile", "error", err)
	}
}

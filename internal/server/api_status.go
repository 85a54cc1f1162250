package server

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"hawser/internal/admin"
	"hawser/internal/registry"
)

// maxExpiring is how many certificates that end soon status lists.
const maxExpiring = 100

func timeOf(ms int64) time.Time { return time.UnixMilli(ms).UTC() }

func (b *backend) status(r *http.Request) (any, error) {
	ctx := r.Context()
	cfg := &b.layout.Config.Fleet
	out := admin.Status{Fleet: cfg.ID.String(), Trial: cfg.Trial, Domains: cfg.Domains, Devices: map[string]int{}}
	m, err := b.reg.Meta(ctx)
	if err != nil {
		return nil, err
	}
	out.Epoch, out.Starts = m.Epoch, m.Start
	counts, err := b.reg.DeviceCounts(ctx)
	if err != nil {
		return nil, err
	}
	for state, n := range counts {
		out.Devices[string(state)] = n
	}
	if out.Clones, err = b.reg.CloneCount(ctx); err != nil {
		return nil, err
	}
	services, err := b.reg.Services(ctx)
	if err != nil {
		return nil, err
	}
	for _, s := range services {
		if s.State == registry.ServiceActive {
			out.Services++
		}
	}
	requests, err := b.reg.Requests(ctx, registry.RequestPending, maxPage)
	if err != nil {
		return nil, err
	}
	out.Pending = len(requests)
	if out.Certificates, err = b.expiries(ctx); err != nil {
		return nil, err
	}
	if b.srv != nil {
		out.Server = b.srv.status(ctx)
	}
	return out, nil
}

// expiries lists the broker's certificates, and all others that end soon.
func (b *backend) expiries(ctx context.Context) ([]admin.Expiry, error) {
	out := []admin.Expiry{}
	v, err := loadLeafDates(b)
	if err != nil {
		return nil, err
	}
	for domain, at := range v {
		out = append(out, admin.Expiry{Owner: domain, Kind: "broker", NotAfter: admin.UTC(at)})
	}
	slices.SortFunc(out, func(x, y admin.Expiry) int { return x.NotAfter.Compare(y.NotAfter) })
	list, err := b.reg.ExpiringCertificates(ctx, time.Now().Add(expiresSoon), maxExpiring)
	for _, c := range list {
		out = append(out, admin.Expiry{Owner: c.Principal.Name, Kind: c.Principal.Kind.String(), NotAfter: admin.UTC(c.NotAfter)})
	}
	return out, err
}

// loadLeafDates gives the end of each broker certificate: those that are served,
// or those on disk.
func loadLeafDates(b *backend) (map[string]time.Time, error) {
	if b.srv != nil {
		return b.srv.leaves.expiries(), nil
	}
	ends := map[string]time.Time{}
	for _, d := range b.layout.Config.Fleet.Domains {
		end, err := b.layout.BrokerLeafEnd(d)
		if err != nil {
			return nil, err
		}
		ends[d] = end
	}
	return ends, nil
}

func (s *Server) status(ctx context.Context) *admin.ServerStatus {
	st, logs := s.br.Stats(), s.mlog.Stats(ctx)
	out := &admin.ServerStatus{Version: s.cfg.Version, PID: os.Getpid(), Started: admin.UTC(s.started), Listen: s.Addr().String(),
		Online: len(s.br.OnlineDevices()), Connections: st.Connections.Load(), Received: st.Received.Load(),
		PerSecond: s.rates.perSecond(), LogBytes: logs.LogBytes + logs.HistoryBytes, LogRecords: logs.Records,
		LogOldest: admin.UTC(logs.Oldest), NotReady: s.notReady(ctx)}
	if a := s.MetricsAddr(); a != nil {
		out.Metrics = a.String()
	}
	return out
}

// notReady gives the reasons why the server cannot do its work at present.
func (s *Server) notReady(ctx context.Context) (reasons []string) {
	if err := s.mlog.Healthy(); err != nil {
		reasons = append(reasons, "log: "+err.Error())
	}
	if _, err := s.reg.Meta(ctx); err != nil {
		reasons = append(reasons, "registry: "+err.Error())
	}
	select {
	case <-s.ending:
		reasons = append(reasons, "the server stops")
	default:
	}
	return reasons
}

// rates keeps the number of messages received at each of the last seconds.
type rates struct {
	mu   sync.Mutex
	past []rate // mu; oldest first
}

type rate struct {
	at time.Time
	n  uint64
}

// rateOver is the number of seconds over which the rate is taken.
const rateOver = 10

func (v *rates) note(at time.Time, n uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.past = append(v.past, rate{at, n})
	if len(v.past) > rateOver+1 {
		v.past = slices.Delete(v.past, 0, len(v.past)-rateOver-1)
	}
}

func (v *rates) perSecond() float64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.past) < 2 {
		return 0
	}
	first, last := v.past[0], v.past[len(v.past)-1]
	if d := last.at.Sub(first.at).Seconds(); d > 0 {
		return float64(last.n-first.n) / d
	}
	return 0
}

func (b *backend) audit(r *http.Request) (any, error) {
	p := params{r: r}
	f := registry.AuditFilter{Actor: p.text("actor"), Action: p.text("action"), Subject: p.text("subject"),
		Since: p.time("since"), Before: int64(p.number("before")), Limit: min(p.limit(), maxPage)}
	if p.err != nil {
		return nil, p.err
	}
	list, err := b.reg.Audit(r.Context(), f)
	out := make([]admin.AuditEntry, 0, len(list))
	for _, e := range list {
		out = append(out, admin.AuditEntry{No: e.No, At: admin.UTC(e.At), Actor: e.Actor, Action: e.Action,
			Subject: e.Subject, Detail: json.RawMessage(e.Detail)})
	}
	return out, err
}

func (b *backend) reload(*http.Request) (any, error) {
	if b.srv == nil {
		return nil, nil // the next start reads the files anyway
	}
	return nil, b.srv.leaves.reload()
}

func (b *backend) gc(*http.Request) (any, error) {
	if err := b.needServer("giving memory back"); err != nil {
		return nil, err
	}
	debug.FreeOSMemory()
	return nil, nil
}

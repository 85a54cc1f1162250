package server

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"hawser/internal/admin"
	"hawser/internal/registry"
)

const day = 24 * time.Hour

// expiresSoon is when warnings of a certificate's end begin.
const expiresSoon = 60 * day

// maxExpiring is how many certificates that end soon status lists.
const maxExpiring = 100

// warning says how near an end is: "" for more than 60 days.
func warning(left time.Duration) string {
	switch {
	case left <= 0:
		return admin.WarnExpired
	case left <= 7*day:
		return admin.Warn7Days
	case left <= 30*day:
		return admin.Warn30Days
	case left <= expiresSoon:
		return admin.Warn60Days
	}
	return ""
}

// expiries lists the broker's certificates, and all others that end soon, each kind
// in the order of the ends.
func (b *backend) expiries(ctx context.Context, now time.Time) ([]admin.Expiry, error) {
	out := []admin.Expiry{}
	v, err := loadLeafDates(b)
	if err != nil {
		return nil, err
	}
	for domain, at := range v {
		out = append(out, admin.Expiry{Owner: domain, Kind: "broker", NotAfter: admin.UTC(at)})
	}
	slices.SortFunc(out, func(x, y admin.Expiry) int { return x.NotAfter.Compare(y.NotAfter) })
	clients, err := clientExpiries(ctx, b.reg, now)
	if err != nil {
		return nil, err
	}
	stations, err := stationExpiries(ctx, b.reg, now)
	if err != nil {
		return nil, err
	}
	out = slices.Concat(out, clients, stations)
	for i := range out {
		out[i].Warning = warning(out[i].NotAfter.Sub(now))
	}
	return out, nil
}

func clientExpiries(ctx context.Context, reg *registry.Registry, now time.Time) ([]admin.Expiry, error) {
	list, err := reg.ExpiringCertificates(ctx, now.Add(expiresSoon), maxExpiring)
	if err != nil {
		return nil, err
	}
	overlaps, err := reg.Overlaps(ctx)
	if err != nil {
		return nil, err
	}
	var out []admin.Expiry
	for _, c := range list {
		renewed := slices.ContainsFunc(overlaps, func(o registry.Overlap) bool {
			return c.Principal.Name == o.Name && c.Fingerprint != o.Newer
		})
		out = append(out, admin.Expiry{Owner: c.Principal.Name, Kind: c.Principal.Kind.String(), NotAfter: admin.UTC(c.NotAfter), Renewed: renewed})
	}
	return out, nil
}

// warnEvery is how often the log warns.
const warnEvery = day

// warnExpiries writes into the log what ends soon.
func warnExpiries(log *slog.Logger, list []admin.Expiry) {
	for _, e := range list {
		switch {
		case e.Warning == "":
		case e.Warning == admin.WarnExpired || e.Warning == admin.Warn7Days:
			log.Error("certificate ends within days", "kind", e.Kind, "owner", e.Owner, "at", e.NotAfter, "renewed", e.Renewed)
		default:
			log.Warn("certificate ends soon", "kind", e.Kind, "owner", e.Owner, "at", e.NotAfter, "renewed", e.Renewed)
		}
	}
}

// watchExpiries warns at the start and then each day.
func (s *Server) watchExpiries(ctx context.Context) {
	tick := time.NewTicker(warnEvery)
	defer tick.Stop()
	for {
		s.work.do(func() { s.renewals.endOverlaps(ctx, time.Now()) })
		list, err := newBackend(s.layout, s.reg, s).expiries(ctx, time.Now())
		if err != nil && ctx.Err() == nil {
			s.log.Warn("ends of certificates not read", "error", err)
		}
		warnExpiries(s.log, list)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func stationExpiries(ctx context.Context, reg *registry.Registry, now time.Time) ([]admin.Expiry, error) {
	list, err := reg.ExpiringStations(ctx, now.Add(expiresSoon))
	var out []admin.Expiry
	for _, c := range list {
		out = append(out, admin.Expiry{Owner: c.Station, Kind: "station", NotAfter: admin.UTC(c.NotAfter)})
	}
	return out, err
}

package server

import (
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// BenchmarkResign signs stored requests again and imports the certificates, a thousand at
// a time, each part on disk before the next: certificates per second.
func BenchmarkResign(b *testing.B) {
	ctx, now := b.Context(), time.Now()
	must := func(err error) {
		if err != nil {
			b.Helper()
			b.Fatal(err)
		}
	}
	dir := filepath.Join(b.TempDir(), "fleet")
	l, err := Create(ctx, fleet.InitOptions{Dir: dir, Domains: []string{"localhost"}, Trial: true}, "bench", slog.New(slog.DiscardHandler))
	must(err)
	c, done, err := Connect(ctx, dir)
	must(err)
	defer done()
	ca, err := fleet.OpenCA(l.CADir("a"), nil)
	must(err)
	defer ca.Close()
	const part = 1000
	for at := 0; at < b.N; at += part {
		must(benchEnrol(b, c, ca, at, min(part, b.N-at)))
	}
	v, err := c.StartRollover(ctx, admin.What{Generation: true})
	must(err)
	cert, err := ca.MakeGeneration(v.ToGeneration, "", now)
	must(err)
	must(c.RolloverCA(ctx, cert.Raw))
	sign, err := ca.Resigner(v.ToGeneration, fleet.Flashed{}, now)
	must(err)
	b.ResetTimer()
	signed := 0
	for after := identity.ID(0); ; {
		list, err := c.Unsigned(ctx, after, part)
		must(err)
		if len(list) == 0 {
			break
		}
		orders := make([]fleet.Resign, len(list))
		for i, u := range list {
			after, orders[i] = u.ID, fleet.Resign{ID: u.ID, CSR: u.CSR, Old: u.Certificate}
		}
		answers, err := sign(orders)
		must(err)
		out := make([]admin.Resigned, len(answers))
		for i, a := range answers {
			must(a.Refused)
			out[i] = admin.Resigned{ID: a.ID, Certificate: a.Cert.Raw}
		}
		taken, err := c.RolloverCertificates(ctx, out)
		must(err)
		signed += taken.Added
	}
	if signed != b.N {
		b.Fatalf("%d of %d signed", signed, b.N)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "certs/s")
}

func benchEnrol(b *testing.B, c *admin.Client, ca *fleet.CA, at, n int) error {
	list, calls := make([]fleet.NewDevice, n), make([]admin.NamedEnrolment, n)
	for i := range list {
		key, err := pki.GenerateKey()
		if err != nil {
			return err
		}
		list[i] = fleet.NewDevice{ID: identity.ID(at + i + 1), CSR: csrOf(b, key)}
	}
	certs, err := ca.EnrollDevices(list, time.Now())
	if err != nil {
		return err
	}
	for i, cert := range certs {
		calls[i] = admin.NamedEnrolment{ID: list[i].ID, Enrolment: admin.Enrolment{CSR: list[i].CSR.DER, Certificate: cert.Raw}}
	}
	return c.EnrollMany(b.Context(), calls)
}

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/durable"
	"hawser/internal/factory/bench"
	"hawser/internal/factory/keyroom"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// stationRenewal is what factory renew is told.
type stationRenewal struct {
	dir     string // of the bench, or with --station of the fleet
	station string
	csr     string
	out     string
	sign    signer
}

func (a *app) factoryRenew() *cobra.Command {
	var r stationRenewal
	cmd := &cobra.Command{
		Use:   "renew [CERTIFICATE] | renew --station NAME --csr FILE --out FILE",
		Short: "give a bench a new certificate for the key it has",
		Long: `renew is done in three steps, before the station's certificate ends ("hawser status"
warns 60, 30 and 7 days ahead):

  at the bench    without arguments it writes station.csr anew
  on the server   with --station it has the key of that request certified for a year; the
                  request must be of the key that the station is known by
  at the bench    with the certificate as argument it takes that in: from then on it is in
                  force, and in the journal

The server needs the CA for it: a trial fleet has its own, elsewhere --ca names it. Where
the safe is not at hand, a new block does the same: "hawser factory reserve" asks the safe
for one, and it brings a certificate for another year.`,
		Example: `  hawser factory renew --dir bench
  hawser factory renew --dir fleet --station line1 --csr station.csr --out line1.crt
  hawser factory renew --dir bench line1.crt`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case r.station != "":
				return a.renewStation(cmd, &r, args)
			case r.csr != "" || r.out != "" || r.sign.dir != "":
				return usagef(cmd, "--csr, --out and --ca are for the server\nhint: --station NAME")
			case len(args) == 1:
				return a.takeCertificate(&r, args[0])
			}
			return a.freshRequest(&r)
		},
	}
	benchDir(cmd, &r.dir)
	cmd.Flags().Lookup("dir").Usage += "; with --station, of the fleet"
	r.sign.flags(cmd)
	cmd.Flags().StringVar(&r.station, "station", "", "on the server: name of the station")
	// The error is that there is no such flag: there is, one line above.
	_ = cmd.RegisterFlagCompletionFunc("station", a.completeStation)
	cmd.Flags().StringVar(&r.csr, "csr", "", "on the server: the request that the bench wrote; - is standard input")
	cmd.Flags().StringVar(&r.out, "out", "", "on the server: file for the certificate")
	return a.withJSON(cmd)
}

func (a *app) freshRequest(r *stationRenewal) error {
	if err := keyroom.Harden(); err != nil {
		return err
	}
	path, err := bench.Request(r.dir, r.pass)
	if err != nil {
		return err
	}
	v := struct {
		Request string `json:"request"`
	}{path}
	return emitOne(a, v, func() {
		a.say("request written: %s", path)
		a.say("next, on the server: hawser factory renew --station NAME --csr %s --out station.crt", filepath.Base(path))
		a.say("      then, here:    hawser factory renew --dir %s station.crt", shellWord(r.dir))
	})
}

func (r *stationRenewal) pass() ([]byte, error) { return r.sign.pass.known("the key of the station") }

// stationRenewed is what renew says with --json, at the bench and on the server.
type stationRenewed struct {
	Station string    `json:"station"`
	Until   time.Time `json:"until"`
	Out     string    `json:"out,omitempty"`
}

func (a *app) takeCertificate(r *stationRenewal, file string) error {
	text, err := readFile(file)
	if err != nil {
		return err
	}
	cert, err := pki.ParseCert(text)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	b, err := a.openBench(r.dir, &r.sign.pass)
	if err != nil {
		return err
	}
	_, err = b.Renew(cert.Raw, time.Now())
	if err := errors.Join(err, b.Close()); err != nil {
		return err
	}
	v := stationRenewed{Station: b.Settings.Station, Until: admin.UTC(cert.NotAfter)}
	return emitOne(a, v, func() { a.say("station %s is renewed until %s", v.Station, stamp(v.Until)) })
}

func (a *app) renewStation(cmd *cobra.Command, r *stationRenewal, args []string) error {
	if err := identity.CheckName(r.station); err != nil {
		return usagef(cmd, "station %q: %v", r.station, err)
	}
	if r.csr == "" || r.out == "" || len(args) > 0 {
		return usagef(cmd, "on the server: --station NAME --csr FILE --out FILE")
	}
	if _, err := os.Lstat(r.out); err == nil {
		return fmt.Errorf("%s exists already: it is not written over\nhint: choose another --out", r.out)
	}
	if cmd.Flags().Changed("dir") {
		a.dir = r.dir
	}
	text, err := readFile(r.csr)
	if err != nil {
		return err
	}
	csr, err := pki.ParseCSR(text)
	if err != nil {
		return fmt.Errorf("%s: %w", r.csr, err)
	}
	return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.certifyStation(ctx, c, r, csr) })
}

func (a *app) certifyStation(ctx context.Context, c *admin.Client, r *stationRenewal, csr *pki.CSR) error {
	if err := r.known(ctx, c, csr); err != nil {
		return err
	}
	l, err := fleet.OpenLayout(a.dir)
	if err != nil {
		return err
	}
	ca, err := r.sign.open(l, "a")
	if err != nil {
		return err
	}
	if ca == nil {
		return fmt.Errorf("the server has no CA to sign with: nothing was done\nhint: --ca DIR, or hawser factory reserve --station %s, whose block brings a certificate", r.station)
	}
	cert, err := ca.RenewStation(r.station, csr, time.Now())
	if err := errors.Join(err, ca.Close()); err != nil {
		return err
	}
	if _, err := c.RenewStation(ctx, r.station, csr.DER, cert.Raw); err != nil {
		return err
	}
	if err := durable.CreateFile(r.out, pki.EncodeCert(cert.Raw), 0o644); err != nil {
		return fmt.Errorf("signed and known, but not written: %w\nhint: the same command again, with another --out", err)
	}
	v := stationRenewed{Station: r.station, Until: admin.UTC(cert.NotAfter), Out: r.out}
	return emitOne(a, v, func() {
		a.say("station %s is certified until %s: %s", v.Station, stamp(v.Until), v.Out)
		a.say("next, at the bench: hawser factory renew --dir bench %s", shellWord(filepath.Base(v.Out)))
	})
}

// known refuses a key that the station is not known by: whoever brings another one is
// not the bench that was registered.
func (r *stationRenewal) known(ctx context.Context, c *admin.Client, csr *pki.CSR) error {
	list, err := c.Stations(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(list, func(s admin.Station) bool { return s.Name == r.station })
	if i < 0 {
		return admin.Errorf(admin.NotFound, "station %s: not found", r.station)
	}
	if list[i].State != "active" {
		return admin.Errorf(admin.Conflict, "station %s is %s", r.station, list[i].State)
	}
	key, err := pki.KeyFingerprint(csr.Pub)
	if err == nil && !bytes.Equal(list[i].Key, key[:]) {
		err = admin.Errorf(admin.Conflict, "the request is for another key than that of station %s: nothing was signed", r.station)
	}
	return err
}

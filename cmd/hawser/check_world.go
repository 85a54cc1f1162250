package main

import (
	"context"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"hawser/internal/check"
	"hawser/internal/durable"
	"hawser/internal/factory"
)

// worldOptions say where the certificates of "check device" come from.
type worldOptions struct {
	throwaway bool
	dir       string
	domain    string

	field            bool
	upstream, cafile string
}

func (w *worldOptions) flags(f *pflag.FlagSet) {
	f.BoolVar(&w.throwaway, "throwaway", false, "make a world for this run alone (the default)")
	f.StringVar(&w.dir, "world", "", "directory of a world that is kept")
	f.StringVar(&w.domain, "domain", "", "the name that the client believes it talks to (default: localhost)")
	f.StringVar(&w.domain, "sni", "", "the same as --domain")
	f.BoolVar(&w.field, "field", false, "the device keeps its real roots: needs --upstream")
	f.StringVar(&w.upstream, "upstream", "", "HOST:PORT of the real broker, with --field")
	f.StringVar(&w.cafile, "cafile", "", "the roots that the device pins, certificates alone, with --field")
}

// check finds options that do not go together.
func (w *worldOptions) check(cmd *cobra.Command, o *check.DeviceOptions) error {
	switch {
	case w.throwaway && w.dir != "":
		return usagef(cmd, "--throwaway and --world exclude each other")
	case !w.field && (w.upstream != "" || w.cafile != ""):
		return usagef(cmd, "--upstream and --cafile go with --field")
	case !w.field:
		return nil
	case w.upstream == "":
		return usagef(cmd, "--field needs the real broker: --upstream HOST:PORT")
	case w.throwaway || w.dir != "":
		return usagef(cmd, "--field makes no world: the device keeps its own files")
	}
	for _, p := range []string{"{cafile}", "{cert}", "{key}"} {
		if strings.Contains(o.Exec, p) {
			return usagef(cmd, "--field makes no world: put the device's own file in place of %s", p)
		}
	}
	if _, _, err := net.SplitHostPort(w.upstream); err != nil {
		return usagef(cmd, "--upstream %q is not HOST:PORT", w.upstream)
	}
	return nil
}

// open makes, reads or copies the world; done takes away what does not stay.
func (w *worldOptions) open(ctx context.Context, o *check.DeviceOptions) (done func(), err error) {
	if w.field {
		return func() {}, w.openField(ctx, o)
	}
	if w.domain == "" {
		w.domain = "localhost"
	}
	dir, done, err := worldDir(w.dir)
	if err != nil {
		return nil, err
	}
	if o.World, err = check.OpenWorld(dir, w.domain); err != nil {
		done()
		return nil, err
	}
	o.Dir = dir
	return done, nil
}

func (w *worldOptions) openField(ctx context.Context, o *check.DeviceOptions) (err error) {
	if w.domain == "" {
		w.domain, _, _ = net.SplitHostPort(w.upstream)
	}
	var roots []*x509.Certificate
	if w.cafile != "" {
		if roots, err = check.LoadRoots(w.cafile); err != nil {
			return err
		}
	}
	o.World, err = check.OpenField(ctx, w.upstream, w.domain, roots)
	return err
}

func (a *app) runDevice(ctx context.Context, o *check.DeviceOptions, w *worldOptions, out *reports) error {
	done, err := w.open(ctx, o)
	if err != nil {
		return err
	}
	defer done()
	if o.Host == "" {
		o.Host = w.domain
	}
	o.Listening = func(addr string) {
		switch {
		case a.json:
		case w.field:
			a.note("waiting for the device on %s; its real broker is %s", addr, w.upstream)
		default:
			a.note("waiting for the device on %s; its roots are %s", addr, filepath.Join(o.Dir, "ca.crt"))
		}
	}
	o.Told = a.live()
	rep, err := check.Device(ctx, *o)
	if err != nil {
		return err
	}
	if err := rep.AddImage(out.image); err != nil {
		return err
	}
	a.conclude(rep)
	return out.write(a, rep)
}

// worldDir gives the directory of a world: the one that was named, or one that goes
// with the run.
func worldDir(kept string) (dir string, done func(), err error) {
	if kept != "" {
		return kept, func() {}, nil
	}
	tmp, err := os.MkdirTemp("", "hawser-check-*")
	if err != nil {
		return "", nil, err
	}
	return filepath.Join(tmp, "world"), func() { os.RemoveAll(tmp) }, nil
}

func (a *app) checkWorld() *cobra.Command {
	var domain string
	var port uint16
	cmd := &cobra.Command{
		Use:   "world DIR",
		Short: "make a throw-away world to put into a test unit",
		Long: `world writes two roots, a domain and one device's identity into DIR, for "check device
--world DIR": put ca.crt, device.crt and device.key into a test unit, whose shipping
image then runs unchanged. For a unit that is flashed by a bench, identity.bin is the
128-byte identity block (it holds the unit's private key) and trust.bin the trust region:
the unit's certificate, and anchor set 1 over the world's two roots, signed by the second
as the standby root.

These are keys for a desk. Never give them to a unit that goes to a customer.`,
		Example: `  hawser check world desk --domain mqtt.example.com
  hawser check world desk --domain desk.example.com --port 9883`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			w, err := check.NewWorld(domain)
			if err != nil {
				return err
			}
			if err := writeWorld(w, args[0], port); err != nil {
				return err
			}
			v := map[string]string{"dir": args[0], "domain": domain, "device": w.Device.String()}
			return emitOne(a, v, func() {
				a.say("a world for %s, with the device %s, is in %s", domain, w.Device, args[0])
				a.say("  hawser check device --world %s --domain %s --listen 0.0.0.0:%d", args[0], domain, port)
			})
		},
	}
	cmd.Flags().StringVar(&domain, "domain", "localhost", "the name that the unit believes it talks to")
	cmd.Flags().Uint16Var(&port, "port", 8883, "the port at which the unit looks for it")
	return a.withJSON(cmd)
}

// writeWorld makes everything before it writes anything.
func writeWorld(w *check.World, dir string, port uint16) error {
	u, err := w.Unit(port)
	if err != nil {
		return err
	}
	scalar, err := u.Key.Bytes()
	if err != nil {
		return err
	}
	block, err := factory.EncodeIdentity(u.ID, scalar, 0)
	if err != nil {
		return err
	}
	trust, err := factory.EncodeTrust([]factory.Entry{{Tag: factory.TagCertificate, Value: u.Certificate}, {Tag: factory.TagAnchors, Value: u.Anchors}})
	if err != nil {
		return err
	}
	if err := w.Save(dir); err != nil {
		return err
	}
	if err := durable.CreateFile(filepath.Join(dir, "identity.bin"), block[:], 0o600); err != nil {
		return err
	}
	return durable.CreateFile(filepath.Join(dir, "trust.bin"), trust, 0o644)
}

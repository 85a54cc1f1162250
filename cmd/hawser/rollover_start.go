package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// signPart is how many certificates are signed, recorded and imported at a time.
const signPart = 1000

// rollover is one rollover and the keys for it.
type rollover struct {
	what    admin.What
	ca      signer // of the device CAs: ca-a
	rootCA  string // directory of the standby root, "" where there is none here
	newRoot string // directory of the root that becomes the standby
	key     string // URI of the new device CA's key, "" in its directory
}

func (a *app) rolloverStart() *cobra.Command {
	var o rollover
	cmd := &cobra.Command{
		Use:   "start --generation|--roots",
		Short: "sign, import, and begin to offer",
		Long: `start begins a rollover, or goes on with one that was cut off.

--generation makes the next device CA, signs every stored certificate request again and
imports the certificates. A device whose id and key no journal of the CA, and no older
certificate of it, knows together is refused by name; the others are signed.

--roots makes a new root, serves the broker under the standby root, which every device
pins already, and signs the next anchor set with it.

Then each device is offered what it lacks whenever it is there; at most 100 are on their
way at a time. "hawser ca rollover status" follows them. Run start again for devices
that were added meanwhile.

A trial fleet signs at once. Elsewhere --ca (and for roots --ca-b and --new-root) name
directories of the safe, or a request file is written, to be answered with
"hawser ca sign" and "hawser ca import".`,
		Example: `  hawser ca rollover start --generation --dir fleet
  hawser ca rollover start --generation --ca /media/safe/ca-a
  hawser ca rollover start --roots --ca-b /media/safe/ca-b --new-root /media/safe/ca-c`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needWhat(cmd, o.what); err != nil {
				return err
			}
			if (o.rootCA == "") != (o.newRoot == "") {
				return usagef(cmd, "--ca-b and --new-root go together")
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.startRollover(ctx, c, &o) })
		},
	}
	whatFlags(cmd, &o.what)
	o.flags(cmd)
	return a.withJSON(cmd)
}

func (o *rollover) flags(cmd *cobra.Command) {
	o.ca.flags(cmd)
	cmd.Flags().StringVar(&o.rootCA, "ca-b", "", "directory of the standby root; a trial fleet has its own")
	cmd.Flags().StringVar(&o.newRoot, "new-root", "", "directory for the root that becomes the standby; made if need be")
	cmd.Flags().StringVar(&o.key, "key", "", "where the new device CA's key is to be, file:PATH or pkcs11:... (default: beside the others)")
}

// startRollover does all that can be done with the keys at hand.
func (a *app) startRollover(ctx context.Context, c *admin.Client, o *rollover) error {
	l, err := fleet.OpenLayout(a.dir)
	if err != nil {
		return err
	}
	o.ca.pass.prepare()
	r, err := c.StartRollover(ctx, o.what)
	if err != nil {
		return err
	}
	waits := false
	if o.what.Generation {
		if waits, err = a.moveGeneration(ctx, c, l, o, &r); err != nil {
			return err
		}
	}
	if o.what.Roots {
		asked, err := a.moveRoots(ctx, c, l, o, &r)
		if err != nil {
			return err
		}
		waits = waits || asked
	}
	if waits {
		return nil
	}
	if r, err = c.MoveRollover(ctx); err != nil {
		return err
	}
	if r, err = c.RolloverIn(ctx, maxNames, "failed"); err != nil {
		return err
	}
	return emitOne(a, r, func() { a.sayStarted(&r, c.Running()) })
}

func (a *app) sayStarted(r *admin.Rollover, running bool) {
	a.say("rollover %d has begun: %d devices", r.No, r.Devices)
	for _, d := range r.Unproven { // only those that failed
		a.say("  %s failed: %s", d.ID, d.Reason)
	}
	if !running {
		a.note("no server runs: devices are offered what they lack once it does")
	}
	a.note("hint: hawser ca rollover status --dir %s", shellWord(a.dir))
}

// moveGeneration signs for all devices that have no certificate of the new generation.
// waits is true where a request was written instead.
func (a *app) moveGeneration(ctx context.Context, c *admin.Client, l *fleet.Layout, o *rollover, r *admin.Rollover) (waits bool, err error) {
	ca, err := o.ca.open(l, "a")
	if err != nil {
		return false, err
	}
	if ca == nil {
		return a.askGeneration(ctx, c, l, r)
	}
	cert, err := ca.MakeGeneration(r.ToGeneration, o.key, time.Now())
	if err == nil {
		err = c.RolloverCA(ctx, cert.Raw)
	}
	if err == nil {
		err = a.resign(ctx, c, ca, r)
	}
	return false, errors.Join(err, ca.Close())
}

// resign signs and imports in parts; each part is on disk before the next one.
func (a *app) resign(ctx context.Context, c *admin.Client, ca *fleet.CA, r *admin.Rollover) error {
	flashed, err := ca.Flashed()
	if err != nil {
		return err
	}
	sign, err := ca.Resigner(r.ToGeneration, flashed, time.Now())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	parts := make(chan []admin.Resigned, 1) // one is signed while the one before is written down
	go func() {
		defer close(parts)
		if err := signParts(ctx, c, sign, parts); err != nil {
			cancel(err)
		}
	}()
	if err := a.takeParts(ctx, c, parts); err != nil {
		cancel(err)
		for range parts { // lets it end
		}
		return err
	}
	return context.Cause(ctx)
}

// signParts signs for all devices that have no certificate yet.
func signParts(ctx context.Context, c *admin.Client, sign func([]fleet.Resign) ([]fleet.Resigned, error), parts chan<- []admin.Resigned) error {
	for after := identity.ID(0); ; {
		list, err := c.Unsigned(ctx, after, signPart)
		if err != nil || len(list) == 0 {
			return err
		}
		orders := make([]fleet.Resign, len(list))
		for i, u := range list {
			after, orders[i] = u.ID, fleet.Resign{ID: u.ID, CSR: u.CSR, Old: u.Certificate}
		}
		answers, err := sign(orders)
		if err != nil {
			return err
		}
		out := make([]admin.Resigned, len(answers))
		for i, v := range answers {
			out[i] = resigned(v)
		}
		select {
		case parts <- out:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// takeParts imports what was signed.
func (a *app) takeParts(ctx context.Context, c *admin.Client, parts <-chan []admin.Resigned) error {
	p := &progress{app: a, live: terminal(a.err)}
	defer p.end()
	next := time.Now().Add(quietFor)
	var total admin.Taken
	for part := range parts {
		taken, err := c.RolloverCertificates(ctx, part)
		if err != nil {
			return fmt.Errorf("%d certificates are imported, then: %w\nhint: start it again, it goes on there", total.Added, err)
		}
		total.Added += taken.Added
		total.Refused += taken.Refused
		if time.Now().After(next) {
			next = time.Now().Add(p.every())
			p.show("%d certificates signed and imported, %d refused", total.Added, total.Refused)
		}
	}
	return nil
}

func resigned(v fleet.Resigned) admin.Resigned {
	if v.Refused != nil {
		return admin.Resigned{ID: v.ID, Refused: v.Refused.Error()}
	}
	return admin.Resigned{ID: v.ID, Certificate: v.Cert.Raw}
}

// moveRoots makes the new root and the next set, takes it up, and serves every domain
// under the root that its devices accept. waits is true where a request was written instead.
func (a *app) moveRoots(ctx context.Context, c *admin.Client, l *fleet.Layout, o *rollover, r *admin.Rollover) (waits bool, err error) {
	_, set, err := l.Anchors()
	if err != nil {
		return false, err
	}
	if set.Sequence < r.ToAnchors && o.rootCA == "" && !l.Config.Fleet.Trial {
		return true, a.askRoots(l, r)
	}
	roots := rootCAs{o: o, open: map[string]*fleet.CA{}}
	if set.Sequence < r.ToAnchors {
		err = a.moveAnchors(ctx, c, l, &roots, set, r.ToAnchors)
	}
	if err == nil {
		err = a.moveLeaves(ctx, c, &roots, r)
	}
	return false, errors.Join(err, roots.close())
}

// moveAnchors signs {standby, new root} with the standby root, and has the server take it up.
func (a *app) moveAnchors(ctx context.Context, c *admin.Client, l *fleet.Layout, roots *rootCAs, set *pki.AnchorSet, sequence uint64) error {
	label, err := pki.NextRootLabel(pki.RootLabel(set.Standby))
	if err != nil {
		return err
	}
	ca, err := roots.of(l, set.Standby)
	if err != nil {
		return err
	}
	root, err := roots.next(l, label)
	if err != nil {
		return err
	}
	cfg := &l.Config.Fleet
	cose, err := ca.SignAnchors(&pki.AnchorSet{Fleet: l.FleetID(), Sequence: sequence, InUse: set.Standby, Standby: root,
		Port: cfg.Port, Domains: cfg.Domains}, time.Now())
	if err != nil {
		return err
	}
	return c.RolloverAnchors(ctx, cose)
}

// moveLeaves issues what is not served under the right root yet.
func (a *app) moveLeaves(ctx context.Context, c *admin.Client, roots *rootCAs, r *admin.Rollover) error {
	l, err := fleet.OpenLayout(a.dir)
	if err != nil {
		return err
	}
	for _, d := range l.Config.Fleet.Domains {
		want, err := l.WantedRoot(d, r.OldestAnchors)
		if err != nil {
			return err
		}
		have, err := l.LeafRoot(d)
		if err != nil {
			return err
		}
		if have.Equal(want) {
			continue
		}
		ca, err := roots.of(l, want)
		if err == nil {
			_, err = issueLeaf(l, ca, d)
		}
		if err != nil {
			return fmt.Errorf("%s is not served under root %s yet: %w", d, pki.RootLabel(want), err)
		}
	}
	return c.Reload(ctx)
}

// rootCAs are the directories of broker roots that are open: each passphrase is asked for
// once.
type rootCAs struct {
	o    *rollover
	open map[string]*fleet.CA // by directory
}

// of gives the CA of a root: in a trial fleet the one beside it, else the one in --ca-b.
func (v *rootCAs) of(l *fleet.Layout, root *x509.Certificate) (*fleet.CA, error) {
	label := pki.RootLabel(root)
	dir := v.o.rootCA
	if dir == "" && l.Config.Fleet.Trial {
		dir = l.CADir(strings.ToLower(label))
	}
	if dir == "" {
		return nil, fmt.Errorf("its key is not here\nhint: hawser ca issue-broker --root %s", strings.ToLower(label))
	}
	ca := v.open[dir]
	if ca == nil {
		s := signer{dir: dir, pass: v.o.ca.pass}
		var err error
		if ca, err = s.open(l, ""); err != nil {
			return nil, err
		}
		v.open[dir] = ca
	}
	have, err := ca.Root()
	if err == nil && !have.Equal(root) {
		err = fmt.Errorf("%s is root %s, and root %s is needed: nothing was signed\nhint: --ca-b names its directory", dir, pki.RootLabel(have), label)
	}
	return ca, err
}

// next gives the root that becomes the standby.
func (v *rootCAs) next(l *fleet.Layout, label string) (*x509.Certificate, error) {
	dir, pass := v.o.newRoot, func() ([]byte, error) { return v.o.ca.pass.fresh(v.o.newRoot) }
	if dir == "" { // a trial fleet
		dir, pass = l.CADir(strings.ToLower(label)), nil
	}
	cfg := &l.Config.Fleet
	return fleet.MakeRoot(dir, label, pki.Name{Organisation: cfg.Organisation, Country: cfg.Country}, l.FleetID(), pass, time.Now())
}

func (v *rootCAs) close() error {
	var errs []error
	for _, ca := range v.open {
		errs = append(errs, ca.Close())
	}
	return errors.Join(errs...)
}

package main

import (
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
)

func (a *app) caJournal() *cobra.Command {
	return group("journal", "keep copies of the station journals at the safe", `journal keeps the safe's own copies of what the flashing benches have recorded. In a
rollover the safe signs for an id and key that stand together there.`, a.caJournalAdd())
}

func (a *app) caJournalAdd() *cobra.Command {
	var s signer
	cmd := &cobra.Command{
		Use:   "add FILE --ca DIR",
		Short: "keep a copy of a station's journal",
		Long: `add checks a station's journal (its chain, each signature, and that a device CA of --ca
has certified the station) and keeps a copy in --ca. It must continue the copy that was
kept last, and no id and key may stand together otherwise than in any other record.`,
		Example: `  hawser ca journal add line1.journal --ca /media/safe/ca-a`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if s.dir == "" {
				return usagef(cmd, "which CA? --ca DIR names ca-a as init made it")
			}
			ca, err := a.openCA(&s)
			if err != nil {
				return err
			}
			defer a.busy(context.Background(), "checking %s", args[0])()
			v, err := ca.AddJournal(args[0])
			if err := errors.Join(err, ca.Close()); err != nil {
				return err
			}
			return emitOne(a, v, func() {
				a.say("station %s: %d units, %d new lines kept", v.Station, v.Units, v.New)
			})
		},
	}
	cmd.Flags().StringVar(&s.dir, "ca", "", "directory of the device CAs: ca-a")
	s.pass.fd = -1
	return a.withJSON(cmd)
}

func (a *app) caCompromised() *cobra.Command {
	var s signer
	cmd := &cobra.Command{
		Use:   "compromised NAME --ca DIR",
		Short: "note that the key of a device CA may be in other hands",
		Long: `compromised marks a device CA (device-1, device-2, ...) in --ca. From then on its
certificates vouch for nothing: in a rollover the safe signs only for id and key that
stand in its journals. There is no way back.`,
		Example: `  hawser ca compromised device-1 --ca /media/safe/ca-a`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if s.dir == "" {
				return usagef(cmd, "which CA? --ca DIR names ca-a as init made it")
			}
			ca, err := a.openCA(&s)
			if err != nil {
				return err
			}
			if err := errors.Join(ca.MarkCompromised(args[0]), ca.Close()); err != nil {
				return err
			}
			v := struct {
				Compromised string `json:"compromised"`
			}{args[0]}
			return emitOne(a, v, func() { a.say("%s is marked: its certificates vouch for nothing any more", args[0]) })
		},
	}
	cmd.Flags().StringVar(&s.dir, "ca", "", "directory of the device CAs: ca-a")
	s.pass.fd = -1
	return a.withJSON(cmd)
}

func (a *app) caEmergency() *cobra.Command {
	o := rollover{what: admin.What{Roots: true}}
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "emergency",
		Short: "the root in use is stolen or lost: move to the standby root at once",
		Long: `emergency is for the day on which the key of the broker root in use, or of the broker
itself, is in other hands. In one go it makes a new root, serves the broker under the
standby root, which every device pins already, and sends every device the set of the
two. Then it waits, and lists the devices that have not followed: a thief who has the
old root's key can pose as the broker to these, and to no other.

It is "ca rollover start --roots" with the keys at hand; it can be started again at any
time and goes on. A trial fleet has its keys beside it; elsewhere bring the directory of
the standby root to the server for this, or use "ca rollover start --roots" with files.`,
		Example: `  hawser ca emergency --dir fleet --ca-b /media/safe/ca-b --new-root /media/safe/ca-c
  hawser ca emergency --dir trial --wait 5m`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if (o.rootCA == "") != (o.newRoot == "") {
				return usagef(cmd, "--ca-b and --new-root go together")
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error {
				if err := a.startRollover(ctx, c, &o); err != nil {
					return err
				}
				return a.followRollover(ctx, c, wait)
			})
		},
	}
	cmd.Flags().StringVar(&o.rootCA, "ca-b", "", "directory of the standby root; a trial fleet has its own")
	cmd.Flags().StringVar(&o.newRoot, "new-root", "", "directory for the root that becomes the standby; made if need be")
	cmd.Flags().DurationVar(&wait, "wait", time.Minute, "how long to wait for devices to follow")
	o.ca.pass.flag(cmd)
	return a.withJSON(cmd)
}

// followRollover waits until all have arrived or the time is over, then says who has not.
func (a *app) followRollover(ctx context.Context, c *admin.Client, wait time.Duration) error {
	p := &progress{app: a, live: terminal(a.err)}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	next := time.Now().Add(quietFor)
	for end := time.Now().Add(wait); ; {
		r, err := c.Rollover(ctx, maxNames)
		if err != nil {
			return err
		}
		if !r.Open() || r.Counts["proven"] == r.Devices || time.Now().After(end) || !c.Running() {
			p.end()
			return emitOne(a, r, func() { a.sayRollover(&r) })
		}
		if time.Now().After(next) {
			next = time.Now().Add(p.every())
			p.show("%s", bar(r.Counts["proven"], r.Devices, 30))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

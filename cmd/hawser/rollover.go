package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/identity"
)

// statusNames is how many devices that have not arrived status lists.
const statusNames = 20

// maxNames is how many --json and --all list.
const maxNames = 100_000

func (a *app) caRollover() *cobra.Command {
	return group("rollover", "move the fleet to a new device CA or to other broker roots", `rollover moves every device, while it works, to certificates of the next device CA
(--generation), to the next pair of broker roots (--roots), or both. All keys stay: the
new certificates are made from the stored certificate requests.

  plan    what would change
  start   sign, import, and begin to offer; goes on where it was cut off
  status  who has arrived, by name who has not
  retire  shut the old generation out, once all have arrived
  abort   go back, at any time before

A device counts as proven only after it has connected with its new certificate, or says
that it uses the new roots on a connection that they vouch for. It keeps the old ones
until then.`, a.rolloverPlan(), a.rolloverStart(), a.rolloverStatus(), a.rolloverRetire(), a.rolloverAbort())
}

func whatFlags(cmd *cobra.Command, w *admin.What) {
	cmd.Flags().BoolVar(&w.Generation, "generation", false, "to the next device CA")
	cmd.Flags().BoolVar(&w.Roots, "roots", false, "to the next pair of broker roots")
}

func needWhat(cmd *cobra.Command, w admin.What) error {
	if w.Generation || w.Roots {
		return nil
	}
	return usagef(cmd, "what is to move? --generation, --roots, or both")
}

func (a *app) rolloverPlan() *cobra.Command {
	var w admin.What
	cmd := &cobra.Command{
		Use:   "plan --generation|--roots",
		Short: "show what a rollover would change",
		Long: `plan shows from where to where a rollover would go, how many devices it concerns, and
how long it is expected to take. It changes nothing.`,
		Example: `  hawser ca rollover plan --generation --dir fleet`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needWhat(cmd, w); err != nil {
				return err
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error {
				p, err := c.PlanRollover(ctx, w)
				if err != nil {
					return err
				}
				return emitOne(a, p, func() { a.sayPlan(&p) })
			})
		},
	}
	whatFlags(cmd, &w)
	return a.withJSON(cmd)
}

func (a *app) sayPlan(p *admin.RolloverPlan) {
	signing := ""
	if p.ToGeneration != 0 {
		signing = fmt.Sprintf("%d certificates, about %s", p.Unsigned, roughly(p.Signing))
	}
	a.fields("generation", step(p.FromGeneration, p.ToGeneration), "anchor set", step(p.FromAnchors, p.ToAnchors),
		"devices", fmt.Sprintf("%d, %d of them connected", p.Devices, p.Online), "to sign", signing,
		"to move", fmt.Sprintf("about %s for those that are connected; the others when they come", roughly(p.Move)))
}

// step is "1 -> 2", "" where nothing moves.
func step[N uint32 | uint64](from, to N) string {
	if to == 0 {
		return ""
	}
	return fmt.Sprintf("%d -> %d", from, to)
}

// roughly is a duration for people, never less than a second.
func roughly(s float64) string {
	return (time.Duration(max(s, 1)) * time.Second).String()
}

func (a *app) rolloverStatus() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "show how far the rollover has come, and who has not arrived",
		Long: `status counts the devices of the last rollover by state and names those that have not
arrived, twenty of them unless --all is given:

  old        nothing was offered yet
  offered    the offer was sent
  installed  stored beside the old one, not used yet
  proven     it has arrived
  failed     with the reason
  absent     not seen since the devices began to move`,
		Example: `  hawser ca rollover status --dir fleet
  hawser ca rollover status --json | jq .counts`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error {
				names := statusNames
				if all || a.json {
					names = maxNames
				}
				r, err := c.Rollover(ctx, names)
				if err != nil {
					return err
				}
				return emitOne(a, r, func() { a.sayRollover(&r) })
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "name all devices that have not arrived")
	return a.withJSON(cmd)
}

func (a *app) sayRollover(r *admin.Rollover) {
	if r.No == 0 {
		a.say("there was no rollover yet, %d devices", r.Devices)
		return
	}
	unsigned := ""
	if r.Unsigned > 0 && r.Open() {
		unsigned = fmt.Sprintf("%d devices; hawser ca rollover start signs for them", r.Unsigned)
	}
	a.fields("rollover", fmt.Sprintf("%d, %s", r.No, r.State), "generation", step(r.FromGeneration, r.ToGeneration),
		"anchor set", step(r.FromAnchors, r.ToAnchors), "started", stamp(r.Started)+" by "+r.By, "ended", stamp(r.Ended),
		"unsigned", unsigned)
	if !r.Open() {
		return
	}
	if terminal(a.out) {
		a.say("%s", bar(r.Counts["proven"], r.Devices, 40))
	}
	var counts []string
	for _, s := range []string{"proven", "installed", "offered", "old", "absent", "failed"} {
		if n := r.Counts[s]; n > 0 {
			counts = append(counts, fmt.Sprintf("%d %s", n, s))
		}
	}
	a.say("%d devices: %s", r.Devices, strings.Join(counts, ", "))
	if len(r.Unproven) == 0 {
		return
	}
	var rows [][]string
	for _, d := range r.Unproven {
		rows = append(rows, []string{d.ID.String(), d.State, ago(d.LastSeen, time.Now()), d.Reason})
	}
	a.table([]string{"ID", "STATE", "SEEN", "REASON"}, rows)
	if left := r.Devices - r.Counts["proven"] - len(r.Unproven); left > 0 {
		a.say("and %d more; --all names them", left)
	}
}

// bar is a bar of so many cells.
func bar(done, all, cells int) string {
	full := 0
	if all > 0 {
		full = cells * done / all
	}
	return fmt.Sprintf("[%s%s] %d of %d proven", strings.Repeat("#", full), strings.Repeat(".", cells-full), done, all)
}

func (a *app) rolloverRetire() *cobra.Command {
	var waive []string
	cmd := &cobra.Command{
		Use:   "retire [--waive ID,...]",
		Short: "end the rollover: the old generation no longer gets in",
		Long: `retire ends the rollover. From then on certificates of the old generation are refused at
the handshake. It refuses while a device is unproven that is not named in --waive: a
device that is left behind gets in again only with a certificate that is put into it by
hand. There is no way back.`,
		Example: `  hawser ca rollover retire --dir fleet
  hawser ca rollover retire --waive ABCD1234,ABCD1235`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var ids []identity.ID
			for _, s := range waive {
				id, err := deviceArg(cmd, s)
				if err != nil {
					return err
				}
				ids = append(ids, id)
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error {
				r, err := c.RetireRollover(ctx, ids)
				if err != nil {
					return err
				}
				return emitOne(a, r, func() {
					a.say("rollover %d is over: %d devices moved, %d left behind", r.No, r.Devices-len(ids), len(ids))
				})
			})
		},
	}
	cmd.Flags().StringSliceVar(&waive, "waive", nil, "devices to leave behind, by id")
	// The error is that there is no such flag: there is, one line above.
	_ = cmd.RegisterFlagCompletionFunc("waive", a.completeDevice)
	return a.withJSON(cmd)
}

func (a *app) rolloverAbort() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "abort",
		Short: "end the rollover the other way",
		Long: `abort goes back. No device is locked out: one that uses its new certificate keeps both
until it has come back with the old one, which it is offered; of all others the new
certificates are withdrawn. Broker roots that a device has taken cannot be taken back:
it goes on with them, the others with the old ones, and the broker's certificates stay
under the root that both accept. The next start takes up what is there.`,
		Example: `  hawser ca rollover abort --dir fleet`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error {
				r, err := c.AbortRollover(ctx)
				if err != nil {
					return err
				}
				return emitOne(a, r, func() { a.say("rollover %d was aborted", r.No) })
			})
		},
	}
	return a.withJSON(cmd)
}

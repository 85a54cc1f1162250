package main

import (
	"cmp"
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
)

func (a *app) factoryStation() *cobra.Command {
	list := a.withJSON(&cobra.Command{
		Use:   "list",
		Short: "list stations, their blocks and what they have made",
		Long: `list prints each station with the end of its certificate, the ids that it may still
use, and the devices that came from it. With --json it names the blocks too.`,
		Example: `  hawser factory station list
  hawser factory station list --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.with(cmd, a.listStations) },
	})
	return group("station", "the flashing benches of the fleet", `station holds what is known of flashing benches. One becomes known with its first block:
"hawser factory reserve".`, list, a.factoryStationRevoke())
}

func (a *app) listStations(ctx context.Context, c *admin.Client) error {
	list, err := c.Stations(ctx)
	if err != nil {
		return err
	}
	return emitAll(a, list, func() {
		var rows [][]string
		for _, s := range list {
			rows = append(rows, []string{s.Name, s.State, cmp.Or(stamp(s.Until), "waits for the safe"), strconv.Itoa(len(s.Blocks)),
				strconv.Itoa(s.Left), strconv.Itoa(s.Units), strconv.Itoa(s.Burnt), ago(s.Imported, time.Now())})
		}
		a.table([]string{"STATION", "STATUS", "CERTIFICATE UNTIL", "BLOCKS", "IDS LEFT", "DEVICES", "BURNT", "LAST IMPORT"}, rows)
	})
}

func (a *app) factoryStationRevoke() *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "revoke NAME --reason TEXT",
		Short: "shut a flashing bench out",
		Long: `revoke is for a bench that was stolen, or taken out of service. It gets no more blocks,
and a journal of it is imported no more: units that it made and that are not in the fleet
yet never get in. Import the journals that you have before, and then shut out what the
bench may have made in other hands: "hawser device revoke --station NAME --since TIME".
Devices that are in the fleet stay. There is no way back.`,
		Example:           `  hawser factory station revoke line1 --reason "stolen on Tuesday"`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeStation,
		RunE: func(cmd *cobra.Command, args []string) error {
			if strings.TrimSpace(reason) == "" {
				return usagef(cmd, "a revocation needs a reason, for whoever reads the audit\nhint: --reason TEXT")
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error {
				if err := c.RevokeStation(ctx, args[0], reason); err != nil {
					return err
				}
				v := map[string]string{"station": args[0], "state": "revoked"}
				return emitOne(a, v, func() { a.say("station %s revoked", args[0]) })
			})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why; kept in the audit")
	return a.withJSON(cmd)
}

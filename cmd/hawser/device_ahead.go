package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
)

func (a *app) deviceAdopt() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "adopt ID",
		Short: "import the certificate that a device has and a restored registry has not",
		Long: `adopt is for a device that got its certificate after the backup was taken from which
this fleet was restored. It has connected with it and proven its key; a CA of this
fleet signed it, and its key is the one that the registry knows. adopt imports it, and
the device is let in again. It takes the place of the active one of the same CA
generation. "hawser device list --ahead" lists such devices.`,
		Example: `  hawser device list --ahead
  hawser device adopt ABCD1234`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := deviceArg(cmd, args[0])
			if err != nil {
				return err
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error {
				v, err := c.Adopt(ctx, id)
				if err != nil {
					return err
				}
				return emitOne(a, v, func() { a.say("%s adopted, with the certificate %s", id, v.Fingerprint) })
			})
		},
	}
	return a.withJSON(cmd)
}

// listAhead lists what devices know and the registry does not.
func (a *app) listAhead(ctx context.Context, c *admin.Client) error {
	var rows [][]string
	for list, err := c.Ahead(ctx, 0); ; list, err = c.Ahead(ctx, list[len(list)-1].Device) {
		if err != nil {
			return err
		}
		if len(list) == 0 {
			break
		}
		if err := emitAll(a, list, func() {}); err != nil {
			return err
		}
		for _, v := range list {
			rows = append(rows, []string{v.Device.String(), yesNo(v.Known), v.What, v.Detail, ago(v.At, time.Now())})
		}
	}
	if a.json {
		return nil
	}
	a.table([]string{"ID", "KNOWN", "AHEAD BY", "WHICH", "SINCE"}, rows)
	if len(rows) > 0 {
		a.note("this fleet was restored, and these devices know more\nhint: certificate: hawser device adopt ID; command: send it again if it is still wanted; config: hawser config set")
	}
	return nil
}

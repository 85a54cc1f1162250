package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/identity"
)

func (a *app) configCommand() *cobra.Command {
	return group("config", "set and show the configuration of devices", `config holds what a device shall be set to. The desired configuration is one JSON value
with a version that only grows; the device gets it as soon as it is connected, and
reports which version it has applied.`, a.configSet(), a.configShow())
}

func (a *app) configSet() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "set ID JSON",
		Short: "replace a device's desired configuration",
		Long: `set replaces the whole desired configuration of a device. JSON is any JSON value,
@FILE to read it from a file, - for standard input. A device that is away gets it when
it comes back; only the newest version is kept.`,
		Example: `  hawser config set ABCD1234 '{"interval":60}'
  hawser config set ABCD1234 @config.json
  jq .roof configs.json | hawser config set ABCD1234 -`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := deviceArg(cmd, args[0])
			if err != nil {
				return err
			}
			doc, err := document(cmd, args[1])
			if err != nil {
				return err
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.setConfig(ctx, c, id, doc) })
		},
	}
	cmd.ValidArgsFunction = a.completeDevice
	return a.withJSON(cmd)
}

func (a *app) setConfig(ctx context.Context, c *admin.Client, id identity.ID, doc json.RawMessage) error {
	v, err := c.SetConfig(ctx, id, doc)
	if err != nil {
		return err
	}
	return emitOne(a, v, func() { a.say("%s shall have version %d", id, v.Version) })
}

func (a *app) configShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "show a device's desired configuration and what it applied",
		Long: `show prints the version and the document that a device shall have, and what it last
reported: the version it has applied, or the one it refused and why.`,
		Example: `  hawser config show ABCD1234
  hawser config show ABCD1234 --json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := deviceArg(cmd, args[0])
			if err != nil {
				return err
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error {
				v, err := c.Config(ctx, id)
				if err != nil {
					return err
				}
				return emitOne(a, v, func() { a.showConfig(&v) })
			})
		},
	}
	cmd.ValidArgsFunction = a.completeDevice
	return a.withJSON(cmd)
}

func (a *app) showConfig(v *admin.Config) {
	if v.Version == 0 {
		a.fields("device", v.Device.String(), "desired", "nothing yet", "reported", appliedText(v))
		return
	}
	applied := appliedText(v)
	if !v.AppliedAt.IsZero() {
		applied += ", " + stamp(v.AppliedAt)
	}
	a.fields("device", v.Device.String(), "desired", fmt.Sprintf("version %d, %s", v.Version, stamp(v.At)),
		"document", string(v.Document), "reported", applied)
}

package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/identity"
)

// stateChange gives a command that changes the state of one device for a reason.
func (a *app) stateChange(cmd *cobra.Command, change func(ctx context.Context, c *admin.Client, id identity.ID, reason string) error) *cobra.Command {
	var reason string
	cmd.Use += " ID --reason TEXT"
	cmd.Args = cobra.ExactArgs(1)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		id, err := deviceArg(cmd, args[0])
		if err != nil {
			return err
		}
		if strings.TrimSpace(reason) == "" {
			return usagef(cmd, "a reason is needed, for whoever reads the audit\nhint: --reason TEXT")
		}
		return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return change(ctx, c, id, reason) })
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why; kept in the audit")
	return a.withJSON(cmd)
}

// barred is what --json prints of one device that was shut out.
type barred struct {
	ID      identity.ID `json:"id"`
	State   string      `json:"state"`
	Dropped *uint64     `json:"dropped_messages,string,omitempty"`
}

// barOne shuts one device out, as the API calls it.
func (a *app) barOne(ctx context.Context, c *admin.Client, id identity.ID, as, reason string) error {
	out, err := c.Bar(ctx, id, as, reason)
	if err != nil {
		return err
	}
	state := map[string]string{"revoke": "revoked", "retire": "retired", "quarantine": "quarantined"}[as]
	return emitOne(a, barred{id, state, out.Dropped}, func() { a.say("%s %s%s", id, state, a.droppedText(&out)) })
}

func (a *app) deviceRetire() *cobra.Command {
	return a.stateChange(&cobra.Command{
		Use:   "retire",
		Short: "end the life of a device",
		Long: `retire shuts a device out that has come to its end: it was scrapped or replaced. It is
no matter of security, and a retired device counts in no rollover; else it is as with
revoke: its connection closes, its sessions, retained and queued messages go, and the
latter are counted. "hawser device unrevoke" brings it back.`,
		Example: `  hawser device retire ABCD1234 --reason "replaced by ABCD1235"`,
	}, func(ctx context.Context, c *admin.Client, id identity.ID, reason string) error {
		return a.barOne(ctx, c, id, "retire", reason)
	})
}

func (a *app) deviceQuarantine() *cobra.Command {
	return a.stateChange(&cobra.Command{
		Use:   "quarantine",
		Short: "shut a device out until it is looked at",
		Long: `quarantine closes the device's connection and lets it in no more until "hawser device
release". Its certificates and commands stay; its session and what is queued in it go.`,
		Example: `  hawser device quarantine ABCD1234 --reason "sends from two places"`,
	}, func(ctx context.Context, c *admin.Client, id identity.ID, reason string) error {
		return a.barOne(ctx, c, id, "quarantine", reason)
	})
}

func (a *app) deviceRelease() *cobra.Command {
	return a.stateChange(&cobra.Command{
		Use:   "release",
		Short: "let a device in again that was quarantined",
		Long: `release ends a quarantine, and settles what was reported of two holders of the device's
identity, also of a device that is active. If two are still there, the next hellos of
both prove it anew.`,
		Example: `  hawser device release ABCD1234 --reason "the copy was found and erased"`,
	}, func(ctx context.Context, c *admin.Client, id identity.ID, reason string) error {
		if err := c.Release(ctx, id, reason); err != nil {
			return err
		}
		return emitOne(a, barred{ID: id, State: "active"}, func() { a.say("%s released", id) })
	})
}

func (a *app) deviceUnrevoke() *cobra.Command {
	return a.stateChange(&cobra.Command{
		Use:   "unrevoke",
		Short: "bring back a device that was revoked or retired",
		Long: `unrevoke lets a device in again with the certificates that were active when it was
revoked or retired; those of a CA generation that was retired since stay out. Its
commands, sessions and messages of then are gone.`,
		Example: `  hawser device unrevoke ABCD1234 --reason "it was ABCD1243 that was stolen"`,
	}, func(ctx context.Context, c *admin.Client, id identity.ID, reason string) error {
		out, err := c.Unrevoke(ctx, id, reason)
		if err != nil {
			return err
		}
		if out.Certificates == 0 {
			a.note("%s has no certificate that opens the door: it needs a new one\nhint: hawser device enroll --csr FILE --id %s", id, id)
		}
		return emitOne(a, out, func() { a.say("%s is back with %s", id, countText(out.Certificates, "certificate")) })
	})
}

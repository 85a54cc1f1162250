package main

import (
	"context"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
)

// Completion answers while somebody waits at a prompt: it asks a running server
// only, never opens the files, and gives up soon.
const (
	completeWithin = time.Second
	completeMost   = 200 // proposals
)

// proposals asks a running server, and gives none when there is none.
func (a *app) proposals(ask func(ctx context.Context, c *admin.Client) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	l, err := fleet.OpenLayout(a.dir)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(context.Background(), completeWithin)
	defer cancel()
	c := admin.NewClient(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", l.AdminSocket())
	}, true)
	defer c.Close()
	list, err := ask(ctx, c)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return list, cobra.ShellCompDirectiveNoFileComp
}

// completeDevice proposes ids of devices for the first argument.
func (a *app) completeDevice(_ *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.proposals(func(ctx context.Context, c *admin.Client) ([]string, error) {
		p, err := c.Devices(ctx, admin.DeviceFilter{Prefix: strings.ToUpper(typed), Limit: completeMost})
		var list []string
		for _, d := range p.Devices {
			list = append(list, described(d.ID.String(), strings.Join(append([]string{d.State, d.Class}, d.Tags...), " ")))
		}
		return list, err
	})
}

// completeService proposes names of services for the first argument.
func (a *app) completeService(_ *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.proposals(func(ctx context.Context, c *admin.Client) ([]string, error) {
		services, err := c.Services(ctx)
		var list []string
		for _, s := range services {
			if strings.HasPrefix(s.Name, typed) {
				list = append(list, described(s.Name, s.State))
			}
		}
		return list, err
	})
}

// completeQueued proposes a device, then its commands that can be cancelled.
func (a *app) completeQueued(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) != 1 {
		return a.completeDevice(cmd, args, typed)
	}
	id, err := identity.ParseID(args[0])
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.proposals(func(ctx context.Context, c *admin.Client) ([]string, error) {
		commands, err := c.Commands(ctx, admin.CommandFilter{Device: id, State: "queued", Limit: completeMost})
		var list []string
		for _, v := range commands {
			if cid := strconv.FormatUint(v.CID, 10); strings.HasPrefix(cid, typed) {
				list = append(list, described(cid, v.Name))
			}
		}
		return list, err
	})
}

// completeTaken proposes, for service grant --remove, what the service has.
func (a *app) completeTaken(_ *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) != 1 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.proposals(func(ctx context.Context, c *admin.Client) ([]string, error) {
		services, err := c.Services(ctx)
		var list []string
		for _, s := range services {
			for _, g := range s.Grants {
				if s.Name == args[0] && strings.HasPrefix(g.String(), typed) {
					list = append(list, g.String())
				}
			}
		}
		return list, err
	})
}

// described is a proposal with the words that a shell shows beside it.
func described(word, text string) string {
	return word + "\t" + strings.Join(strings.Fields(printable(text)), " ")
}

// completeArguments gives the commands whose arguments are ids or names their
// proposals, where they have none of their own.
func (a *app) completeArguments(root *cobra.Command) {
	for path, fn := range map[string]cobra.CompletionFunc{
		"device show": a.completeDevice, "device unrevoke": a.completeDevice,
		"device retire": a.completeDevice, "device quarantine": a.completeDevice, "device release": a.completeDevice, "device tag": a.completeDevice, "tail": a.completeDevice,
	} {
		if cmd, rest, err := root.Find(strings.Fields(path)); err == nil && len(rest) == 0 && cmd.ValidArgsFunction == nil {
			cmd.ValidArgsFunction = fn
		}
	}
}

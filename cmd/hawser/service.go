package main

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/identity"
)

func (a *app) serviceCommand() *cobra.Command {
	return group("service", "admit backend services and say what they may do", `service holds what is done with services: the programs and people behind the fleet that
connect over MQTT. A service has a name, a certificate from the service CA, and no
rights but its grants. A grant is "read FILTER" or "write FILTER", where FILTER is any
MQTT filter; topics that begin with $ are never granted, and nothing lets a service
write what only the server may (private/<id>/d/ except d/app/#) or only the device
(private/<id>/u/).`,
		a.serviceAdd(), a.serviceRenew(), a.serviceList(), a.serviceShow(), a.serviceGrant(), a.serviceRevoke())
}

// nameArg reads the name of a service on the command line.
func nameArg(cmd *cobra.Command, s string) (string, error) {
	if err := identity.CheckName(s); err != nil {
		return "", usagef(cmd, "%q: %v", s, err)
	}
	return s, nil
}

// parseGrants reads grants as they are written on the command line.
func parseGrants(cmd *cobra.Command, flag string, list []string) ([]admin.Grant, error) {
	var out []admin.Grant
	for _, s := range list {
		mode, filter, ok := strings.Cut(s, " ")
		if !ok || mode != "read" && mode != "write" {
			return nil, usagef(cmd, "%s %q is not \"read FILTER\" or \"write FILTER\"\nhint: %s 'read private/+/u/#'", flag, s, flag)
		}
		if err := identity.CheckFilter(filter); err != nil {
			return nil, usagef(cmd, "%s %q: %v", flag, s, err)
		}
		if filter[0] == '$' {
			return nil, usagef(cmd, "%s %q: topics that begin with $ are never granted", flag, s)
		}
		out = append(out, admin.Grant{Mode: mode, Filter: filter})
	}
	return out, nil
}

func grantsText(list []admin.Grant) string {
	var words []string
	for _, g := range list {
		words = append(words, g.String())
	}
	return strings.Join(words, ", ")
}

// lastDay is when the certificate that a service connects with ends.
func lastDay(s *admin.Service) string {
	var end time.Time
	for _, c := range s.Certificates {
		if c.State == "active" && c.NotAfter.After(end) {
			end = c.NotAfter
		}
	}
	if end.IsZero() {
		return "no certificate"
	}
	return stamp(end) + endsSoon(end)
}

func (a *app) serviceList() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "list services and their grants",
		Long:    `list prints all services, revoked ones too, by name.`,
		Example: `  hawser service list --dir fleet`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error {
				list, err := c.Services(ctx)
				if err != nil {
					return err
				}
				return emitAll(a, list, func() { a.tableServices(list) })
			})
		},
	}
	return a.withJSON(cmd)
}

func (a *app) tableServices(list []admin.Service) {
	var rows [][]string
	for i := range list {
		s := &list[i]
		rows = append(rows, []string{s.Name, s.State, onlineText(s.Online), lastDay(s), grantsText(s.Grants)})
	}
	a.table([]string{"NAME", "STATUS", "ONLINE", "UNTIL", "GRANTS"}, rows)
}

// service finds one by name.
func service(ctx context.Context, c *admin.Client, name string) (admin.Service, error) {
	list, err := c.Services(ctx)
	if err != nil {
		return admin.Service{}, err
	}
	i := slices.IndexFunc(list, func(s admin.Service) bool { return s.Name == name })
	if i < 0 {
		return admin.Service{}, admin.Errorf(admin.NotFound, "service %s: not found\nhint: hawser service list", name)
	}
	return list[i], nil
}

func (a *app) serviceShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "show NAME",
		Short:   "show all that is known of a service",
		Long:    `show prints a service's state, its grants and its certificates.`,
		Example: `  hawser service show dashboard`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := nameArg(cmd, args[0])
			if err != nil {
				return err
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error {
				s, err := service(ctx, c, name)
				if err != nil {
					return err
				}
				return emitOne(a, s, func() { a.showService(&s) })
			})
		},
	}
	cmd.ValidArgsFunction = a.completeService
	return a.withJSON(cmd)
}

func (a *app) showService(s *admin.Service) {
	a.fields("name", s.Name, "status", s.State, "reason", s.Reason, "online", onlineText(s.Online), "created", stamp(s.Created))
	for _, g := range s.Grants {
		a.fields("grant", g.String())
	}
	for _, c := range s.Certificates {
		generation := ""
		if c.Generation != 0 {
			generation = strconv.Itoa(int(c.Generation))
		}
		a.fields("certificate", c.Fingerprint.String(), "  state", c.State, "  generation", generation, "  until", stamp(c.NotAfter))
	}
}

func (a *app) serviceGrant() *cobra.Command {
	var add, remove []string
	cmd := &cobra.Command{
		Use:   "grant NAME [--add GRANT] [--remove GRANT]",
		Short: "give a service rights, or take them away",
		Long: `grant changes what a service may do, all of it in one step. It acts within a second on
connections that stand: one with a subscription that is no longer covered is closed.
Without flags it prints the grants.`,
		Example: `  hawser service grant dashboard --add 'read fleet/#'
  hawser service grant dashboard --add 'read private/+/u/temp' --remove 'read private/+/u/#'`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := nameArg(cmd, args[0])
			if err != nil {
				return err
			}
			give, err := parseGrants(cmd, "--add", add)
			if err != nil {
				return err
			}
			take, err := parseGrants(cmd, "--remove", remove)
			if err != nil {
				return err
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.grant(ctx, c, name, give, take) })
		},
	}
	cmd.Flags().StringArrayVar(&add, "add", nil, "a grant to give: 'read FILTER' or 'write FILTER'; may be given again")
	cmd.Flags().StringArrayVar(&remove, "remove", nil, "a grant to take away, written as it was given; may be given again")
	cmd.ValidArgsFunction = a.completeService
	// The error is that there is no such flag: there is, one line above.
	_ = cmd.RegisterFlagCompletionFunc("remove", a.completeTaken)
	return a.withJSON(cmd)
}

func (a *app) grant(ctx context.Context, c *admin.Client, name string, give, take []admin.Grant) error {
	s, err := service(ctx, c, name)
	if err != nil {
		return err
	}
	if len(give)+len(take) > 0 {
		if s, err = c.ChangeGrants(ctx, name, give, take); err != nil {
			return err
		}
	}
	return emitOne(a, s, func() {
		for _, g := range s.Grants {
			a.say("%s", printable(g.String()))
		}
		if len(s.Grants) == 0 {
			a.note("%s has no grants: it can connect and do nothing", name)
		}
	})
}

func (a *app) serviceRevoke() *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "revoke NAME --reason TEXT",
		Short: "shut a service out for good",
		Long: `revoke ends a service's certificates and grants for good and closes its connections
within a second. It cannot be undone: the name is never used again.`,
		Example: `  hawser service revoke dashboard --reason "key was in a backup"`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := nameArg(cmd, args[0])
			if err != nil {
				return err
			}
			if strings.TrimSpace(reason) == "" {
				return usagef(cmd, "a revocation needs a reason, for whoever reads the audit\nhint: --reason TEXT")
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error {
				if err := c.RevokeService(ctx, name, reason); err != nil {
					return err
				}
				return emitOne(a, map[string]string{"name": name, "state": "revoked"}, func() { a.say("%s revoked", name) })
			})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why; kept in the audit")
	cmd.ValidArgsFunction = a.completeService
	return a.withJSON(cmd)
}

package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
)

// auditPage is how many rows are asked for at a time.
const auditPage = 1000

func (a *app) auditCommand() *cobra.Command {
	return group("audit", "who changed what, and when", `audit reads the record of all changes of state: it is written in the same transaction
as the change itself, and nothing takes rows out of it.`, a.auditList())
}

func (a *app) auditList() *cobra.Command {
	var f admin.AuditFilter
	var since string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list changes, the newest first",
		Long: `list prints changes of state, the newest first: who (a user of this machine, a device
or the server), what was done, and to what (a device, a service, a stream).`,
		Example: `  hawser audit list --since 7d
  hawser audit list --subject ABCD1234 --limit 20
  hawser audit list --action grant.give --limit 0 --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.Limit < 0 {
				return usagef(cmd, "--limit %d is below zero", f.Limit)
			}
			if since != "" {
				d, err := span(since)
				if err != nil {
					return usagef(cmd, "--since: %v", err)
				}
				f.Since = time.Now().Add(-d)
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.listAudit(ctx, c, f) })
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.Actor, "actor", "", `only changes by this one, such as "user root"`)
	fl.StringVar(&f.Action, "action", "", "only this action, such as device.revoked")
	fl.StringVar(&f.Subject, "subject", "", "only changes of this id or name")
	fl.StringVar(&since, "since", "", "only what is younger: 90s, 1h30m, 7d")
	fl.IntVar(&f.Limit, "limit", 100, "at most so many; 0: all")
	return a.withJSON(cmd)
}

// listAudit reads page after page.
func (a *app) listAudit(ctx context.Context, c *admin.Client, f admin.AuditFilter) error {
	var rows [][]string
	limit, seen := f.Limit, 0
	for {
		f.Limit = auditPage
		if limit > 0 {
			f.Limit = min(auditPage, limit-seen)
		}
		page, err := c.Audit(ctx, f)
		if err != nil {
			return err
		}
		for i := range page {
			e := &page[i]
			f.Before = e.No
			if !a.json {
				rows = append(rows, []string{stamp(e.At), e.Actor, e.Action, e.Subject, string(e.Detail)})
			} else if err := a.emit(e); err != nil {
				return err
			}
		}
		if seen += len(page); len(page) < f.Limit || seen == limit {
			break
		}
	}
	if !a.json {
		a.table([]string{"WHEN", "WHO", "WHAT", "WHOM", "DETAIL"}, rows)
	}
	return nil
}

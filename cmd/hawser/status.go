package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
)

func (a *app) statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "the fleet at a glance",
		Long: `status prints how many devices are known and connected, how many messages come, how
large and old the log is, and which certificates end soon. What only a running server
knows is left out when none runs.`,
		Example: `  hawser status --dir fleet
  hawser status --dir fleet --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error {
				s, err := c.Status(ctx)
				if err != nil {
					return err
				}
				return emitOne(a, s, func() { a.showStatus(&s) })
			})
		},
	}
	return a.withJSON(cmd)
}

func (a *app) showStatus(s *admin.Status) {
	fleet := s.Fleet
	if s.Trial {
		fleet += "  TRIAL: every key lies unencrypted beside the server"
	}
	var states []string
	for _, state := range []string{"active", "revoked", "quarantined", "retired"} {
		if n := s.Devices[state]; n > 0 || state == "active" {
			states = append(states, fmt.Sprintf("%d %s", n, state))
		}
	}
	a.fields("fleet", fleet, "domains", strings.Join(s.Domains, " "), "devices", strings.Join(states, ", "),
		"services", fmt.Sprint(s.Services))
	if s.Clones > 0 {
		a.fields("TWO HOLDERS", fmt.Sprintf("of %d identities: hawser audit list --action device.clone", s.Clones))
	}
	if s.Pending > 0 {
		a.fields("requests", fmt.Sprintf("%d wait for the safe", s.Pending))
	}
	if v := s.Server; v != nil {
		a.showServer(v)
	} else {
		a.fields("server", "not running")
	}
	for _, c := range s.Certificates {
		a.fields("certificate", fmt.Sprintf("%s %s until %s%s", c.Kind, c.Owner, stamp(c.NotAfter), endsSoon(c.NotAfter)))
	}
}

func (a *app) showServer(v *admin.ServerStatus) {
	ready := "ready"
	if len(v.NotReady) > 0 {
		ready = "NOT READY: " + strings.Join(v.NotReady, "; ")
	}
	oldest := ""
	if !v.LogOldest.IsZero() {
		oldest = ", since " + stamp(v.LogOldest)
	}
	a.fields("server", fmt.Sprintf("%s, pid %d, %s, started %s", v.Version, v.PID, v.Listen, ago(v.Started, time.Now())),
		"state", ready, "online", fmt.Sprintf("%d devices, %d connections", v.Online, v.Connections),
		"messages", fmt.Sprintf("%.1f/s, %d since the start", v.PerSecond, v.Received),
		"log", bytesText(v.LogBytes)+oldest, "metrics", v.Metrics)
}

func endsSoon(at time.Time) string {
	switch left := time.Until(at); {
	case left < 0:
		return "  EXPIRED"
	case left < 30*24*time.Hour:
		return fmt.Sprintf("  in %d days", int(left.Hours()/24))
	}
	return ""
}

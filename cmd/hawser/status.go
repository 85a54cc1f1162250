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
	a.fields("fleet", fleet, "domains", strings.Join(s.Domains, " "), "devices", deviceCounts(s.Devices),
		"services", fmt.Sprint(s.Services))
	if s.Clones > 0 {
		a.fields("TWO HOLDERS", "of "+countText(s.Clones, "device")+": hawser audit list --action device.clone")
	}
	if s.Pending > 0 {
		a.fields("requests", fmt.Sprintf("%d wait for the safe", s.Pending))
	}
	if !s.Restored.IsZero() {
		a.fields("restored", fmt.Sprintf("%s, from a backup of %s", stamp(s.Restored), stamp(s.BackupOf)))
	}
	if s.Ahead > 0 {
		a.fields("ahead", aheadText(s))
	}
	if v := s.Server; v != nil {
		a.showServer(v)
	} else {
		a.fields("server", "not running")
	}
	a.showExpiries(s.Certificates)
}

// renewHints tell how a certificate of each kind is renewed.
func renewHints() map[string]string {
	return map[string]string{"broker": "hawser ca issue-broker", "service": "hawser service renew NAME --out DIR", "station": "hawser factory renew --dir BENCH"}
}

func (a *app) showExpiries(list []admin.Expiry) {
	said, hints := map[string]bool{}, renewHints()
	for _, c := range list {
		renewed := ""
		if c.Renewed {
			renewed = "  renewed, and the new one not used yet"
		}
		a.fields("certificate", fmt.Sprintf("%s %s until %s%s%s", c.Kind, c.Owner, stamp(c.NotAfter), endsSoon(c.NotAfter), renewed))
	}
	for _, c := range list {
		if hint := hints[c.Kind]; c.Warning != "" && !c.Renewed && hint != "" && !said[c.Kind] {
			said[c.Kind] = true
			a.note("a %s certificate ends soon\nhint: %s", c.Kind, hint)
		}
	}
}

// aheadText names the devices that know more than the registry.
func aheadText(s *admin.Status) string {
	text := fmt.Sprintf("%d know more than the registry:", s.Ahead)
	for _, id := range s.AheadDevices {
		text += " " + id.String()
	}
	if s.Ahead > len(s.AheadDevices) {
		text += " ..."
	}
	return text + "; hawser device list --ahead"
}

// deviceCounts tells how many devices are in which state.
func deviceCounts(devices map[string]int) string {
	var states []string
	for _, state := range []string{"active", "revoked", "quarantined", "retired"} {
		if n := devices[state]; n > 0 || state == "active" {
			states = append(states, fmt.Sprintf("%d %s", n, state))
		}
	}
	return strings.Join(states, ", ")
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
		"log", bytesText(v.LogBytes)+oldest, "metrics", v.Metrics, "api", v.API)
}

// endsSoon warns 60, 30 and 7 days ahead, each time louder.
func endsSoon(at time.Time) string {
	const day = 24 * time.Hour
	left := time.Until(at)
	days := fmt.Sprintf("%d days", int(left/day))
	switch {
	case left <= 0:
		return "  EXPIRED"
	case left <= 7*day:
		return "  ENDS IN " + strings.ToUpper(days)
	case left <= 30*day:
		return "  in " + days + ": renew it"
	case left <= 60*day:
		return "  in " + days
	}
	return ""
}

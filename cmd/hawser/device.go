package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/identity"
)

func (a *app) deviceCommand() *cobra.Command {
	return group("device", "enrol, list and revoke devices", `device holds what is done with devices: each has an id of eight upper-case hex
digits, which is its name in its certificate, its MQTT client id and its part of
every topic: private/<id>/...`,
		a.deviceAdd(), a.deviceEnroll(), a.deviceList(), a.deviceShow(), a.deviceTag(),
		a.deviceRevoke(), a.deviceUnrevoke(), a.deviceRetire(), a.deviceQuarantine(), a.deviceRelease())
}

func (a *app) deviceList() *cobra.Command {
	var f admin.DeviceFilter
	var online, offline bool
	var since, until string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list devices",
		Long:  `list prints the devices of the fleet in the order of their ids. Filters add up.`,
		Example: `  hawser device list
  hawser device list --status active --tag berlin --online
  hawser device list --station line1 --since 2026-11-24 --until 2026-11-25
  hawser device list --prefix AB --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case online && offline:
				return usagef(cmd, "--online and --offline exclude each other")
			case online || offline:
				f.Online = &online
			}
			if f.State != "" && !strings.Contains(" active revoked quarantined retired ", " "+f.State+" ") {
				return usagef(cmd, "status %q is not active, revoked, quarantined or retired", f.State)
			}
			flashed, err := flashedBy(cmd, f.Station, since, until)
			if err != nil {
				return err
			}
			f.FlashedSince, f.FlashedUntil = flashed.FlashedSince, flashed.FlashedUntil
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.listDevices(ctx, c, f) })
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.State, "status", "", "active, revoked, quarantined or retired")
	fl.StringVar(&f.Tag, "tag", "", "only devices with this tag")
	fl.StringVar(&f.Class, "class", "", "only devices of this class")
	fl.StringVar(&f.Station, "station", "", "only devices that this station has flashed")
	fl.StringVar(&since, "since", "", "only devices that were flashed then or later: 2026-11-24, 2026-11-24T08:00 (UTC), 7d")
	fl.StringVar(&until, "until", "", "only devices that were flashed before")
	fl.StringVar(&f.Prefix, "prefix", "", "only ids that begin with these hex digits")
	fl.BoolVar(&online, "online", false, "only devices that are connected; needs a running server")
	fl.BoolVar(&offline, "offline", false, "only devices that are not; needs a running server")
	fl.IntVar(&f.Limit, "limit", 0, "at most so many")
	return a.withJSON(cmd)
}

// listDevices reads page after page.
func (a *app) listDevices(ctx context.Context, c *admin.Client, f admin.DeviceFilter) error {
	var rows [][]string
	for left := f.Limit; ; {
		page, err := c.Devices(ctx, f)
		if err != nil {
			return err
		}
		for _, d := range page.Devices {
			if a.json {
				if err := a.emit(d); err != nil {
					return err
				}
				continue
			}
			rows = append(rows, []string{d.ID.String(), d.State, onlineText(d.Online), d.Class,
				ago(d.LastSeen, time.Now()), strings.Join(d.Tags, " ")})
		}
		if left > 0 {
			if left -= len(page.Devices); left <= 0 {
				break
			}
			f.Limit = left
		}
		if page.More == 0 {
			break
		}
		f.After = page.More
	}
	if !a.json {
		a.table([]string{"ID", "STATUS", "ONLINE", "CLASS", "LAST SEEN", "TAGS"}, rows)
	}
	return nil
}

func onlineText(on *bool) string {
	switch {
	case on == nil:
		return "?"
	case *on:
		return "yes"
	}
	return "no"
}

func (a *app) deviceShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "show ID",
		Short:   "show all that is known of a device",
		Long:    `show prints the device's row, its certificates, what waits for it and what it said.`,
		Example: `  hawser device show ABCD1234`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := deviceArg(cmd, args[0])
			if err != nil {
				return err
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error {
				d, err := c.Device(ctx, id)
				if err != nil {
					return err
				}
				return emitOne(a, d, func() { a.showDevice(&d) })
			})
		},
	}
	return a.withJSON(cmd)
}

func (a *app) showDevice(d *admin.DeviceDetail) {
	queue := "?"
	if d.Queue != nil {
		queue = fmt.Sprintf("%d waiting, %d dropped", d.Queue.Waiting, d.Queue.Dropped)
	}
	a.fields("id", d.ID.String(), "status", d.State, "reason", d.Reason, "online", onlineText(d.Online), "class", d.Class,
		"tags", strings.Join(d.Tags, " "), "note", d.Note, "key", d.Key.String(), "created", stamp(d.Created),
		"enrolled", stamp(d.Enrolled), "last seen", stamp(d.LastSeen), "queue", queue)
	if d.Station != "" {
		hardware := ""
		if d.Hardware != 0 {
			hardware = strconv.Itoa(int(d.Hardware))
		}
		a.fields("station", d.Station, "  hardware", hardware, "  flashed", stamp(d.Flashed), "  block", d.Block.String())
	}
	if h := d.Hello; h != nil {
		a.fields("hello", stamp(h.At), "  class", h.Class, "  firmware", h.Firmware, "  image", h.Image.String(), "  tls", h.TLS,
			"  boot", h.Boot, "  features", strings.Join(h.Features, " "), "  encoding", h.Encoding)
	}
	for _, c := range d.Clones {
		a.fields("TWO HOLDERS", fmt.Sprintf("%s and %s", bootText(&c.Back), bootText(&c.Other)))
	}
	if d.Config.Version != 0 {
		a.fields("config", fmt.Sprintf("version %d, %s", d.Config.Version, appliedText(&d.Config)))
	}
	for _, c := range d.Certificates {
		a.fields("certificate", c.Fingerprint.String(), "  state", c.State, "  generation", strconv.Itoa(int(c.Generation)),
			"  until", stamp(c.NotAfter))
	}
	for _, c := range d.Pending {
		a.fields("command", fmt.Sprintf("%d %s, %s", c.CID, c.Name, c.State))
	}
}

// bootText names one of two that hold an identity.
func bootText(b *admin.Boot) string {
	remote := b.Remote
	if remote == "" {
		remote = "an address not known"
	}
	return fmt.Sprintf("%s (boot %016x, %s)", remote, b.Nonce, stamp(b.At))
}

// appliedText says what a device reports of its configuration.
func appliedText(c *admin.Config) string {
	switch {
	case c.AppliedVersion == 0:
		return "not reported yet"
	case c.AppliedText != "":
		return fmt.Sprintf("version %d %s: %s", c.AppliedVersion, c.AppliedStatus, c.AppliedText)
	}
	return fmt.Sprintf("version %d %s", c.AppliedVersion, c.AppliedStatus)
}

func (a *app) deviceTag() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "tag ID [TAG ...] [-- -TAG ...]",
		Short: "give a device tags, or take them away",
		Long: `tag adds each TAG to the device, and takes away each that is written with a minus
before it; those must come after "--". Without tags it prints those the device has.
A tag is 1 to 64 letters, digits and -_.:/`,
		Example: `  hawser device tag ABCD1234 berlin roof
  hawser device tag ABCD1234 -- -roof cellar`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := deviceArg(cmd, args[0])
			if err != nil {
				return err
			}
			var add, remove []string
			for _, t := range args[1:] {
				if name, ok := strings.CutPrefix(t, "-"); ok {
					remove = append(remove, name)
				} else {
					add = append(add, strings.TrimPrefix(t, "+"))
				}
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.tagDevice(ctx, c, id, add, remove) })
		},
	}
	return a.withJSON(cmd)
}

func (a *app) tagDevice(ctx context.Context, c *admin.Client, id identity.ID, add, remove []string) error {
	d, err := c.Tag(ctx, id, add, remove)
	if err != nil {
		return err
	}
	return emitOne(a, d, func() { a.say("%s %s", id, strings.Join(d.Tags, " ")) })
}

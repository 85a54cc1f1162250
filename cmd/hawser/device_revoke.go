package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/identity"
)

// revokeGroup is how many devices are revoked in one change.
const revokeGroup = 1000

// revocation is what hawser device revoke is asked for.
type revocation struct {
	list, station, since, until string
	reason                      string
	dry, yes                    bool
}

func (a *app) deviceRevoke() *cobra.Command {
	var v revocation
	cmd := &cobra.Command{
		Use:   "revoke {ID ... | --list FILE | --station NAME [--since TIME] [--until TIME]} --reason TEXT",
		Short: "shut devices out",
		Long: `revoke ends the certificates of devices and closes their connections within a second.
Their sessions, last wills, retained and queued messages go for good, and how many queued
messages went is told; commands that wait are cancelled. "hawser device unrevoke" brings
back the device, not those. Its id is never given to another key.

Devices are named by their ids, by a file with one id on each line ("#" begins a comment,
"-" is standard input), or by the station that has flashed them and the time when it did:
from --since to just before --until, each a day (2026-11-24), a time in UTC
(2026-11-24T08:00), or an age (90s, 1h30m, 7d). An id that is not known refuses all.

More than one are shown as a number, which has to be typed, or confirmed by --yes. They
are revoked by the thousand: if that is interrupted, the same command again does the rest.`,
		Example: `  hawser device revoke ABCD1234 --reason "stolen in Lyon"
  hawser device revoke --list stolen.txt --reason "truck 7" --dry-run
  hawser device revoke --station line1 --since 2026-11-24 --until 2026-11-25 --reason "bench stolen"`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ids, filter, err := v.chosen(cmd, args)
			if err != nil {
				return err
			}
			if !v.dry && strings.TrimSpace(v.reason) == "" {
				return usagef(cmd, "a revocation needs a reason, for whoever reads the audit\nhint: --reason TEXT")
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error {
				if len(args) == 1 && v.list == "" && !v.dry {
					return a.barOne(ctx, c, ids[0], "revoke", v.reason)
				}
				return a.revokeMany(ctx, c, &v, ids, filter)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&v.list, "list", "", "a file with one id on each line, - for standard input")
	f.StringVar(&v.station, "station", "", "those that this station has flashed")
	f.StringVar(&v.since, "since", "", "of these, those that it flashed then or later")
	f.StringVar(&v.until, "until", "", "of these, those that it flashed before")
	f.StringVar(&v.reason, "reason", "", "why; kept in the audit")
	f.BoolVar(&v.dry, "dry-run", false, "list the devices, and revoke none")
	f.BoolVarP(&v.yes, "yes", "y", false, "do not ask")
	cmd.ValidArgsFunction = func(_ *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
		return a.completeDevice(nil, nil, typed)
	}
	return a.withJSON(cmd)
}

// chosen reads which devices are meant: ids, or a filter for those of a station.
func (v *revocation) chosen(cmd *cobra.Command, args []string) (ids []identity.ID, f admin.DeviceFilter, err error) {
	named, byStation := len(args) > 0 || v.list != "", v.station != ""
	switch {
	case named == byStation:
		return nil, f, usagef(cmd, "which devices? name ids or --list FILE, or else --station NAME")
	case !byStation && v.since+v.until != "":
		return nil, f, usagef(cmd, "--since and --until choose among the devices of a --station")
	case byStation:
		f, err = flashedBy(cmd, v.station, v.since, v.until)
		return nil, f, err
	}
	for _, s := range args {
		id, err := deviceArg(cmd, s)
		if err != nil {
			return nil, f, err
		}
		ids = append(ids, id)
	}
	if v.list != "" {
		more, err := readIDFile(v.list)
		if err != nil {
			return nil, f, err
		}
		ids = append(ids, more...)
	}
	slices.Sort(ids)
	return slices.Compact(ids), f, nil
}

// flashedBy is the filter for devices of a station, or of all for the name "".
func flashedBy(cmd *cobra.Command, station, since, until string) (f admin.DeviceFilter, err error) {
	f.Station = station
	if f.FlashedSince, err = moment(since, time.Now()); err != nil {
		return f, usagef(cmd, "--since: %v", err)
	}
	if f.FlashedUntil, err = moment(until, time.Now()); err != nil {
		return f, usagef(cmd, "--until: %v", err)
	}
	if !f.FlashedSince.IsZero() && !f.FlashedUntil.IsZero() && !f.FlashedSince.Before(f.FlashedUntil) {
		return f, usagef(cmd, "--since is not before --until")
	}
	return f, nil
}

// moment reads a day, a time in UTC, or an age; "" is the zero time.
func moment(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	for _, layout := range []string{time.DateOnly, "2006-01-02T15:04", "2006-01-02T15:04:05", time.RFC3339} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	age, err := span(s)
	if err != nil {
		return time.Time{}, fmt.Errorf("%q is not a day like 2026-11-24, a time like 2026-11-24T08:00, or an age like 90s or 7d", s)
	}
	return now.Add(-age), nil
}

// maxIDFile bounds a list, in bytes: a million ids fit.
const maxIDFile = 16 << 20

func readIDFile(name string) ([]identity.ID, error) {
	f := os.Stdin
	if name == "-" {
		name = "standard input"
	} else {
		var err error
		if f, err = os.Open(name); err != nil {
			return nil, err
		}
		defer f.Close()
	}
	ids, err := readIDs(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: nothing was revoked", name, err)
	}
	return ids, nil
}

// readIDs reads one id from each line. Empty lines, and what follows "#", are passed
// over; anything else that is no id refuses the whole list.
func readIDs(r io.Reader) (ids []identity.ID, err error) {
	limit := &io.LimitedReader{R: r, N: maxIDFile + 1}
	lines := bufio.NewScanner(limit)
	for n := 1; lines.Scan(); n++ {
		text, _, _ := strings.Cut(lines.Text(), "#")
		if text = strings.TrimSpace(text); text == "" {
			continue
		}
		id, err := identity.ParseID(text)
		if err != nil {
			return nil, fmt.Errorf("line %d: %q: %w", n, clipText(text, 40), err)
		}
		ids = append(ids, id)
	}
	switch {
	case lines.Err() != nil:
		return nil, lines.Err()
	case limit.N == 0:
		return nil, fmt.Errorf("more than %s", bytesText(maxIDFile))
	case len(ids) == 0:
		return nil, errors.New("no id in it")
	}
	return ids, nil
}

func clipText(s string, n int) string {
	if len(s) > n {
		return s[:n] + "..."
	}
	return s
}

// target is one device that was chosen.
type target struct {
	ID    identity.ID `json:"id"`
	State string      `json:"state"`
}

// targets finds out what the chosen ones are; an id that is not known refuses all.
func targets(ctx context.Context, c *admin.Client, ids []identity.ID, f admin.DeviceFilter) (list []target, err error) {
	if len(ids) == 0 {
		return stationTargets(ctx, c, f)
	}
	states, err := c.States(ctx, ids)
	if err != nil {
		return nil, err
	}
	if n := len(states.Unknown); n > 0 {
		return nil, admin.Errorf(admin.NotFound, "%d of %d ids are no devices, %s the first: nothing was revoked", n, len(ids), states.Unknown[0])
	}
	for id, s := range states.Known {
		list = append(list, target{id, s})
	}
	slices.SortFunc(list, func(x, y target) int { return cmp.Compare(x.ID, y.ID) })
	return list, nil
}

// stationTargets reads page after page.
func stationTargets(ctx context.Context, c *admin.Client, f admin.DeviceFilter) (list []target, err error) {
	for {
		page, err := c.Devices(ctx, f)
		if err != nil {
			return nil, err
		}
		for _, d := range page.Devices {
			list = append(list, target{d.ID, d.State})
		}
		if f.After = page.More; f.After == 0 {
			return list, nil
		}
	}
}

func (a *app) revokeMany(ctx context.Context, c *admin.Client, v *revocation, ids []identity.ID, f admin.DeviceFilter) error {
	list, err := targets(ctx, c, ids, f)
	if err != nil {
		return err
	}
	if len(list) == 0 {
		return fmt.Errorf("%s has flashed no device then: nothing was revoked\nhint: hawser device list --station %s", f.Station, f.Station)
	}
	open := make([]identity.ID, 0, len(list))
	for _, t := range list {
		if t.State != "revoked" {
			open = append(open, t.ID)
		}
	}
	already := len(list) - len(open)
	if v.dry {
		a.note("%s: %d to revoke, %d revoked already", countText(len(list), "device"), len(open), already)
		return emitAll(a, list, func() { a.showTargets(list) })
	}
	if len(open) > 0 && !v.yes {
		a.note("%s: %d to revoke, %d revoked already", countText(len(list), "device"), len(open), already)
		if err := confirmOnTerminal(len(open), "revoke"); err != nil {
			return err
		}
	}
	out := admin.Barred{Already: already}
	err = a.revokeGroups(ctx, c, open, v.reason, &out)
	if out.Changed > 0 || err == nil {
		err = errors.Join(emitOne(a, out, func() { a.sayBarred(&out) }), err)
	}
	return err
}

// revokeGroups adds up in out what has been done, also when it ends in an error.
func (a *app) revokeGroups(ctx context.Context, c *admin.Client, open []identity.ID, reason string, out *admin.Barred) error {
	p := progress{app: a, live: terminal(a.err)}
	defer p.end()
	total, told := len(open), time.Now()
	for group := range slices.Chunk(open, revokeGroup) {
		got, err := c.RevokeMany(ctx, group, reason)
		if err != nil {
			return fmt.Errorf("%d of %d revoked: %w\nhint: the same command again does the rest", out.Changed, total, err)
		}
		out.Changed += got.Changed
		out.Already += got.Already
		if got.Dropped != nil {
			n := *got.Dropped
			if out.Dropped != nil {
				n += *out.Dropped
			}
			out.Dropped = &n
		}
		if time.Since(told) > p.every() {
			told = time.Now()
			p.show("%d of %d revoked", out.Changed, total)
		}
	}
	return nil
}

func (a *app) showTargets(list []target) {
	var rows [][]string
	for _, t := range list {
		rows = append(rows, []string{t.ID.String(), t.State})
	}
	a.table([]string{"ID", "STATUS"}, rows)
}

func (a *app) sayBarred(out *admin.Barred) {
	text := countText(out.Changed, "device") + " revoked"
	if out.Already > 0 {
		text += fmt.Sprintf(", %d were already", out.Already)
	}
	a.say("%s%s", text, a.droppedText(out))
}

// droppedText tells what became of queued messages.
func (a *app) droppedText(out *admin.Barred) string {
	if out.Dropped == nil {
		if out.Changed > 0 {
			a.note("no server runs: what is queued for them goes, and is counted in the audit, at its next start")
		}
		return ""
	}
	if *out.Dropped == 0 {
		return ""
	}
	return fmt.Sprintf(", %s dropped", countText(int(*out.Dropped), "queued message"))
}

// countText is a number with its noun.
func countText(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// confirmOnTerminal asks a person to type a number: it shows that they have read it.
func confirmOnTerminal(n int, verb string) error {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return errors.New("there is no terminal to ask on: nothing was done\nhint: --yes")
	}
	defer tty.Close()
	return confirm(tty, n, verb)
}

func confirm(tty io.ReadWriter, n int, verb string) error {
	fmt.Fprintf(tty, "type %d to %s %s: ", n, verb, countText(n, "device"))
	line, err := bufio.NewReader(io.LimitReader(tty, 100)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if strings.TrimSpace(line) != strconv.Itoa(n) {
		return errors.New("not confirmed: nothing was done")
	}
	return nil
}

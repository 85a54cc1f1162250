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

// commandPage is how many commands are asked for at a time.
const commandPage = 1000

const commandStates = "queued, delivered, answered, failed, expired, cancelled or unknown"

func (a *app) commandCommand() *cobra.Command {
	return group("command", "list and cancel commands", `command looks after the commands that "hawser send" has written down. Each has a number
that only grows for its device. A command is queued, then delivered, and ends as

  answered   the device has done it       expired    not answered before its time was over
  failed     the device could not         cancelled  taken back before it was delivered
  unknown    the device has seen it, its answer was lost`, a.commandList(), a.commandCancel())
}

func (a *app) commandList() *cobra.Command {
	var f admin.CommandFilter
	cmd := &cobra.Command{
		Use:   "list [ID]",
		Short: "list commands and their outcomes",
		Long:  `list prints the commands of all devices, or of one, in the order in which they were given.`,
		Example: `  hawser command list ABCD1234
  hawser command list --state queued
  hawser command list --json --limit 100`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if len(args) == 1 {
				if f.Device, err = deviceArg(cmd, args[0]); err != nil {
					return err
				}
			}
			if f.State != "" && !slices.Contains(stateWords(), f.State) {
				return usagef(cmd, "state %q is not %s", f.State, commandStates)
			}
			if f.Limit < 0 {
				return usagef(cmd, "--limit %d is below zero", f.Limit)
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.listCommands(ctx, c, f) })
		},
	}
	cmd.Flags().StringVar(&f.State, "state", "", commandStates)
	cmd.Flags().IntVar(&f.Limit, "limit", 0, "at most so many")
	// The error is that there is no such flag: there is, two lines above.
	_ = cmd.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(stateWords(), cobra.ShellCompDirectiveNoFileComp))
	cmd.ValidArgsFunction = a.completeDevice
	return a.withJSON(cmd)
}

// stateWords lists the states that commandStates names in prose.
func stateWords() []string {
	words := strings.FieldsFunc(commandStates, func(r rune) bool { return r == ' ' || r == ',' })
	return slices.DeleteFunc(words, func(w string) bool { return w == "or" })
}

// listCommands reads page after page.
func (a *app) listCommands(ctx context.Context, c *admin.Client, f admin.CommandFilter) error {
	if f.Device != 0 { // a list of a device that does not exist would be silence
		if _, err := c.Device(ctx, f.Device); err != nil {
			return err
		}
	}
	var rows [][]string
	limit, seen := f.Limit, 0
	for {
		f.Limit = commandPage
		if limit > 0 {
			f.Limit = min(commandPage, limit-seen)
		}
		page, err := c.Commands(ctx, f)
		if err != nil {
			return err
		}
		for i := range page {
			v := &page[i]
			f.AfterDevice, f.AfterCID = v.Device, v.CID
			if !a.json {
				rows = append(rows, commandRow(v))
			} else if err := a.emit(v); err != nil {
				return err
			}
		}
		if seen += len(page); len(page) < f.Limit || seen == limit {
			break
		}
	}
	if !a.json {
		a.table([]string{"DEVICE", "COMMAND", "STATE", "NAME", "GIVEN", "BY", "ANSWER"}, rows)
	}
	return nil
}

func commandRow(v *admin.Command) []string {
	name := v.Name
	if len(v.Args) > 0 {
		name += " " + string(v.Args)
	}
	return []string{v.Device.String(), strconv.FormatUint(v.CID, 10), v.State, name, ago(v.Created, time.Now()), v.By, answerText(v)}
}

func (a *app) commandCancel() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cancel ID COMMAND",
		Short: "take back a command that is still queued",
		Long: `cancel takes a command back. Only a queued one can be: what the device has got may
have been done already. COMMAND is its number, as "hawser command list" shows it.`,
		Example: `  hawser command cancel ABCD1234 4294967297`,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := deviceArg(cmd, args[0])
			if err != nil {
				return err
			}
			cid, err := strconv.ParseUint(args[1], 10, 64)
			if err != nil {
				return usagef(cmd, "%q is not the number of a command\nhint: hawser command list %s", args[1], id)
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.cancelCommand(ctx, c, id, cid) })
		},
	}
	cmd.ValidArgsFunction = a.completeQueued
	return a.withJSON(cmd)
}

func (a *app) cancelCommand(ctx context.Context, c *admin.Client, id identity.ID, cid uint64) error {
	v, err := c.Cancel(ctx, id, cid)
	if err != nil {
		return err
	}
	return emitOne(a, v, func() { a.say("command %d for %s cancelled", v.CID, v.Device) })
}

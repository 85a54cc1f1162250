package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/identity"
)

// Exit codes of send; they tell how far the command came. 0 is answered, 1 and 2
// are those of every command.
const (
	exitDeviceFailed = 3 // the device answered that it failed
	exitQueued       = 4 // written down, not yet with the device
	exitDelivered    = 5 // the device has it and has not answered
	exitExpired      = 6 // not answered before its time was over
	exitUnknown      = 7 // the device has seen it, its answer was lost
)

const (
	waitStep   = 30 * time.Minute // how long one call to the server waits, at most
	lastLook   = 2 * time.Second  // for the state of a command when the waiting was cut off
	quietFor   = 2 * time.Second  // what takes longer says that it works
	maxExpires = 10 * 365 * 24 * time.Hour
)

// order is what send is told.
type order struct {
	id            identity.ID
	name          string
	args          json.RawMessage
	wait, expires string
	waits         time.Duration
}

func (a *app) sendCommand() *cobra.Command {
	var o order
	cmd := &cobra.Command{
		Use:   "send ID NAME [JSON]",
		Short: "send a command to a device",
		Long: `send writes a command down, has it delivered when the device is connected, and prints
the device's answer. JSON is the command's arguments: any JSON value, @FILE to read it
from a file, - for standard input.

A device that is away gets the command when it comes back, unless it has expired by
then; it runs a command at most once. Without a running server the command is queued
for its next start.

Exit codes:
  0  answered         4  still queued
  1  not queued       5  delivered, not answered in time
  2  wrong use        6  expired
  3  it failed on     7  unknown: the device has seen it, but its
     the device          answer was lost`,
		Example: `  hawser send ABCD1234 reboot
  hawser send ABCD1234 set-led '{"on":true}' --wait 30s
  hawser send ABCD1234 measure @args.json --expires 7d --wait 0 --json`,
		Args: cobra.RangeArgs(2, 3),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.read(cmd, args); err != nil {
				return err
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.send(ctx, c, &o) })
		},
	}
	cmd.Flags().StringVar(&o.wait, "wait", "10s", "how long to wait for the answer; 0: not at all")
	cmd.Flags().StringVar(&o.expires, "expires", "1h", "give the command up if it is not answered by then; 0: never")
	cmd.ValidArgsFunction = a.completeDevice
	return a.withJSON(cmd)
}

// read takes the command line; what is wrong with it is found before anything is opened.
func (o *order) read(cmd *cobra.Command, args []string) (err error) {
	if o.id, err = deviceArg(cmd, args[0]); err != nil {
		return err
	}
	o.name = args[1]
	if o.waits, err = span(o.wait); err != nil {
		return usagef(cmd, "--wait: %v", err)
	}
	expires, err := span(o.expires)
	if err == nil && expires > maxExpires {
		err = fmt.Errorf("%s is longer than ten years", o.expires)
	}
	if err != nil {
		return usagef(cmd, "--expires: %v", err)
	}
	if len(args) == 3 {
		o.args, err = document(cmd, args[2])
	}
	return err
}

// document reads JSON from the command line: itself, @FILE or - for standard input.
func document(cmd *cobra.Command, arg string) (json.RawMessage, error) {
	text, from := []byte(arg), "the argument"
	if name, ok := strings.CutPrefix(arg, "@"); ok || arg == "-" {
		if arg == "-" {
			name = "-"
		}
		var err error
		if text, err = readFile(name); err != nil {
			return nil, err
		}
		from = name
		if name == "-" {
			from = "standard input"
		}
	}
	var v json.RawMessage
	if err := json.Unmarshal(text, &v); err != nil {
		return nil, usagef(cmd, "%s is not JSON: %v\nhint: quote it for the shell, '{\"on\":true}', or use @FILE", from, err)
	}
	return v, nil
}

// send queues the command and, where a server runs, waits for its outcome.
func (a *app) send(ctx context.Context, c *admin.Client, o *order) error {
	n := admin.NewCommand{Name: o.name, Args: o.args}
	if d, err := span(o.expires); err == nil && d > 0 {
		n.Expires = time.Now().Add(d)
	}
	sent, err := c.Send(ctx, o.id, n)
	if err != nil {
		return err
	}
	if c.Running() && o.waits > 0 {
		sent = a.await(ctx, c, sent, o.waits)
	}
	if a.json {
		if err := a.emit(sent); err != nil {
			return err
		}
	}
	return a.sayOutcome(ctx, c, &sent, o.waits)
}

// await gives the command when its outcome stands, or as it was last seen: when
// the time is over, the user has interrupted, or the server has gone.
func (a *app) await(ctx context.Context, c *admin.Client, sent admin.Command, wait time.Duration) admin.Command {
	defer a.busy(ctx, "waiting up to %s for the answer of %s", wait, sent.Device)()
	for end := time.Now().Add(wait); sent.Pending(); {
		left := time.Until(end)
		if left <= 0 {
			return sent
		}
		now, err := c.Command(ctx, sent.Device, sent.CID, min(left, waitStep))
		if err != nil {
			return a.lastSeen(ctx, c, sent, err)
		}
		if sent = now; sent.Pending() && !mayAnswer(ctx, c, sent.Device) {
			return sent
		}
	}
	return sent
}

// mayAnswer reports whether the device may still connect: a wait that ends early
// with the command pending means that it was shut out.
func mayAnswer(ctx context.Context, c *admin.Client, id identity.ID) bool {
	d, err := c.Device(ctx, id)
	return err != nil || d.State == "active"
}

// lastSeen asks once more after the waiting was cut off by err.
func (a *app) lastSeen(ctx context.Context, c *admin.Client, sent admin.Command, err error) admin.Command {
	if ctx.Err() == nil {
		a.note("the waiting ended early, the command is written down: %v", err)
	}
	again, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastLook)
	defer cancel()
	if now, err := c.Command(again, sent.Device, sent.CID, 0); err == nil {
		return now
	}
	return sent
}

// busy says what goes on, once it has taken a while. The function it gives ends it.
func (a *app) busy(ctx context.Context, format string, args ...any) (done func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-ctx.Done():
		case <-time.After(quietFor):
			a.note(format, args...)
		}
	}()
	return func() { cancel(); <-ended }
}

// sayOutcome tells how far the command has come: by exit code, and in words
// unless --json has said it.
func (a *app) sayOutcome(ctx context.Context, c *admin.Client, v *admin.Command, waited time.Duration) error {
	later := fmt.Sprintf("hint: hawser command list %s", v.Device)
	switch v.State {
	case "answered":
		if !a.json {
			a.sayResult(v)
		}
		return nil
	case "failed":
		return a.outcome(exitDeviceFailed, "%s could not do %q: %s", v.Device, v.Name, answerText(v))
	case "queued":
		switch {
		case !c.Running():
			return a.outcome(exitQueued, "command %d for %s is queued: no server runs\nhint: hawser serve --dir %s", v.CID, v.Device, a.dir)
		case waited == 0:
			return a.outcome(exitQueued, "command %d for %s is queued\n%s", v.CID, v.Device, later)
		}
		return a.outcome(exitQueued, "command %d for %s is queued: %s\n%s", v.CID, v.Device, whyQueued(ctx, c, v.Device), later)
	case "delivered":
		return a.outcome(exitDelivered, "%s has got command %d and has not answered yet\n%s", v.Device, v.CID, later)
	case "expired":
		return a.outcome(exitExpired, "command %d for %s has expired before it was answered", v.CID, v.Device)
	case "unknown":
		return a.outcome(exitUnknown, "%s has seen command %d, but its answer was lost: it ran once or not at all", v.Device, v.CID)
	}
	if !mayAnswer(ctx, c, v.Device) {
		return a.outcome(admin.ExitFailed, "command %d for %s was %s: the device was shut out\nhint: hawser device show %s", v.CID, v.Device, v.State, v.Device)
	}
	return a.outcome(admin.ExitFailed, "command %d for %s was %s", v.CID, v.Device, v.State)
}

// whyQueued says what a command waits for.
func whyQueued(ctx context.Context, c *admin.Client, id identity.ID) string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastLook)
	defer cancel()
	d, err := c.Device(ctx, id)
	switch {
	case err != nil || d.Online == nil:
		return "the device has not acknowledged it"
	case d.State != "active":
		return "the device is " + d.State + " and will not get it"
	case *d.Online:
		return "the device is connected and has not acknowledged it yet"
	}
	return "the device is not connected"
}

// outcome is an exit code and, unless --json has told everything, the words for it.
func (a *app) outcome(code int, format string, args ...any) error {
	if a.json {
		return exit(code)
	}
	return &exitError{code, fmt.Errorf(format, args...)}
}

// sayResult prints what the device answered, "ok" where it gave no value.
func (a *app) sayResult(v *admin.Command) {
	if len(v.Result) == 0 {
		a.say("ok")
		return
	}
	a.say("%s", printable(string(v.Result)))
}

// answerText is the device's word on a command, on one line; "" before there is one.
func answerText(v *admin.Command) string {
	if len(v.Result) == 0 {
		return v.Status
	}
	return v.Status + " " + string(v.Result)
}

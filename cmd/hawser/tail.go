package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
)

func (a *app) tailCommand() *cobra.Command {
	var t admin.Tail
	var since string
	cmd := &cobra.Command{
		Use:   "tail [ID]",
		Short: "read the log of messages",
		Long: `tail prints the messages in the log, oldest first; of all, or of one device (what it
published and what it was sent) or one service. --limit picks the newest ones; they
still come oldest first. With --follow it goes on with what comes, until interrupted.

Payloads that are JSON or CBOR (an array or a map) are decoded; other bytes are shown
as hex. With --json, "encoding" says which of the three "payload" is.`,
		Example: `  hawser tail --dir fleet ABCD1234
  hawser tail --topic 'private/+/u/temp' --since 1h
  hawser tail --limit 10 --follow
  hawser tail --reverse --limit 1 --json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				t.Name = args[0]
			}
			if t.Reverse && t.Follow {
				return usagef(cmd, "--reverse and --follow exclude each other")
			}
			if t.Limit < 0 {
				return usagef(cmd, "--limit %d is below zero", t.Limit)
			}
			if since != "" {
				d, err := span(since)
				if err != nil {
					return usagef(cmd, "--since: %v", err)
				}
				t.Since = time.Now().Add(-d)
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.tail(ctx, c, t) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&t.Topic, "topic", "", "only topics that this MQTT filter matches")
	f.StringVar(&since, "since", "", "only what is younger: 90s, 1h30m, 7d")
	f.IntVar(&t.Limit, "limit", 0, "only the newest so many")
	f.BoolVar(&t.Reverse, "reverse", false, "newest first")
	f.BoolVar(&t.Follow, "follow", false, "go on with what comes; needs a running server")
	return a.withJSON(cmd)
}

func (a *app) tail(ctx context.Context, c *admin.Client, t admin.Tail) error {
	err := c.Tail(ctx, t, func(m *admin.Message) error {
		if a.json {
			return a.emit(m)
		}
		_, err := fmt.Fprintf(a.out, "%s  %s  %s  %s\n", m.Time.Format("2006-01-02 15:04:05.000Z"), m.From, printable(m.Topic), payloadText(m))
		return err
	})
	if t.Follow && ctx.Err() != nil {
		return nil // interrupted: that is how following ends
	}
	return err
}

// payloadText shows a payload on one line.
func payloadText(m *admin.Message) string {
	text := string(m.Payload)
	if m.Encoding == "hex" && len(text) >= 2 {
		text = text[1 : len(text)-1]
	}
	return printable(text)
}

// maxInput bounds files that are read whole, in bytes.
const maxInput = 1 << 20

// readFile reads a small file, or standard input for "-".
func readFile(name string) ([]byte, error) {
	f := os.Stdin
	if name != "-" {
		var err error
		if f, err = os.Open(name); err != nil {
			return nil, err
		}
		defer f.Close()
	}
	text, err := io.ReadAll(io.LimitReader(f, maxInput+1))
	if err == nil && len(text) > maxInput {
		err = errors.New(name + " is too large")
	}
	return text, err
}

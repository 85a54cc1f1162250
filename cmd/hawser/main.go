// Command hawser runs and administers a fleet of devices: it makes the state
// directory, serves MQTT, enrols devices and reads what they said.
package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
)

// version is set by the linker in releases.
const version = "0.1.0-dev"

func main() { os.Exit(run()) }

// run is the whole program; it gives the exit code.
func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	a := &app{out: os.Stdout, err: os.Stderr}
	root := a.root()
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return admin.ExitDone
	}
	if !a.started {
		err = usage(cmd, err)
	}
	a.fail(err)
	return exitCode(err)
}

// app is what all commands share.
type app struct {
	out, err *os.File
	dir      string // --dir
	json     bool   // --json
	started  bool   // the command line was understood
}

// root puts the commands together.
func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "hawser",
		Short: "connect, command and watch a fleet of devices",
		Long: `hawser runs a fleet of devices: an MQTT server that lets in only what holds a
certificate of the fleet and acknowledges only what is on disk, the registry of
devices, their commands and configuration, and the tools around it.

Every command works on one fleet: its state directory is --dir, else $HAWSER_DIR,
else ./fleet. While "hawser serve" runs, the other commands ask it over a socket in
that directory; otherwise they use the files themselves.

Exit codes: 0 done, 1 failed, 2 wrong use; "hawser help exit-codes" tells those of send.`,
		Example: `  hawser init --dir fleet --domain localhost --trial
  hawser serve --dir fleet
  hawser device add --dir fleet --id ABCD1234 --out ABCD1234
  hawser tail --dir fleet --follow`,
		Version:           version,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		PersistentPreRun:  func(*cobra.Command, []string) { a.started = true },
	}
	root.SetVersionTemplate("hawser {{.Version}}\n")
	dir := os.Getenv("HAWSER_DIR")
	if dir == "" {
		dir = "fleet"
	}
	root.PersistentFlags().StringVar(&a.dir, "dir", dir, "state directory of the fleet; also $HAWSER_DIR")
	root.AddCommand(a.commands()...)
	a.completeArguments(root)
	return root
}

// group is a command that only holds others: called alone it is wrong use.
func group(name, short, long string, children ...*cobra.Command) *cobra.Command {
	g := &cobra.Command{Use: name, Short: short, Long: long, Args: func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return errors.New("unknown command " + quote(args[0]) + " for " + quote(cmd.CommandPath()))
		}
		return errors.New("which one? " + cmd.CommandPath() + " needs a command")
	}, RunE: func(*cobra.Command, []string) error { return nil }}
	g.AddCommand(children...)
	return g
}

// withJSON gives a command the flag --json.
func (a *app) withJSON(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().BoolVar(&a.json, "json", false, "one JSON object per line")
	return cmd
}

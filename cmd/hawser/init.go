package main

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"hawser/internal/fleet"
	"hawser/internal/server"
)

func (a *app) initCommand() *cobra.Command {
	var o fleet.InitOptions
	var pass passphrases
	cmd := &cobra.Command{
		Use:   "init --domain NAME [--domain NAME ...]",
		Short: "make the state directory of a new fleet",
		Long: `init makes the state directory: configuration, registry, log, two broker roots, a
device CA, a service CA, and a broker certificate for each domain. It draws the
fleet's id and signs the first anchor set, with which devices are born. A directory
that holds anything is refused.

--domain is a name under which devices reach the broker. Several are tried by the
devices in the order given; the last one is the rescue domain.

Without --trial, the CA keys in ca-a and ca-b are encrypted, each with a passphrase
of its own. Run it on the machine of the safe, move ca-a and ca-b to two safes, and
carry only hawser.toml and server/ to the server: it refuses to start beside a CA
key. With --trial all keys stay unencrypted beside the server: for trying things
out, never for devices that leave the house.`,
		Example: `  hawser init --dir fleet --domain localhost --trial
  hawser init --dir fleet --domain mqtt.example.com --domain rescue.example.com
  hawser init --dir fleet --domain mqtt.example.com --passphrase-fd 3 3<passphrases
  hawser init --dir fleet --domain mqtt.example.com --nats-url nats://10.0.0.1:4222`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(o.Domains) == 0 {
				return usagef(cmd, "a fleet needs a domain under which devices reach the broker\nhint: --domain localhost to try things out")
			}
			o.Dir, o.Passphrases = a.dir, pass.fresh
			l, err := server.Create(cmd.Context(), o, server.UserName(os.Getuid()), slog.New(slog.DiscardHandler))
			if err != nil {
				return err
			}
			a.sayFleet(l)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&o.Domains, "domain", nil, "a name of the broker; may be given again")
	f.BoolVar(&o.Trial, "trial", false, "leave all keys unencrypted beside the server")
	f.StringVar(&o.Organisation, "organisation", "", "O of the CA certificates (default \"Hawser\")")
	f.StringVar(&o.Country, "country", "", "C of the CA certificates, two letters (default \"ZZ\")")
	f.IntVar(&o.Port, "port", 0, "port that devices are told to connect to (default 8883)")
	f.StringVar(&o.NATSURL, "nats-url", "", "keep the log in this NATS cluster and not in the directory")
	pass.flag(cmd)
	return cmd
}

func (a *app) sayFleet(l *fleet.Layout) {
	a.say("fleet %s made in %s", l.Config.Fleet.ID, l.Dir)
	if l.Config.Fleet.Trial {
		a.say("TRIAL: every key lies unencrypted in it")
		a.say("next: hawser serve --dir %s", a.dir)
		return
	}
	a.say("next: move %s and %s to two safes,", filepath.Join(a.dir, "ca-a"), filepath.Join(a.dir, "ca-b"))
	a.say("      carry hawser.toml and server/ to the server, and there: hawser serve --dir %s", a.dir)
}

// logger writes text on a terminal and JSON elsewhere.
func (a *app) logger(level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("log level %q is not debug, info, warn or error", level)
	}
	o := &slog.HandlerOptions{Level: l}
	if terminal(a.err) {
		return slog.New(slog.NewTextHandler(a.err, o)), nil
	}
	return slog.New(slog.NewJSONHandler(a.err, o)), nil
}

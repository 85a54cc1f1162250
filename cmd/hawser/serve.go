package main

import (
	"fmt"
	"os"
	"runtime/debug"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"hawser/internal/config"
	"hawser/internal/server"
)

func (a *app) serveCommand() *cobra.Command {
	var cfg server.Config
	var readyFD int
	var level string
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "run the server of a fleet",
		Long: `serve runs the MQTT broker, the registry, the log and the administration socket of
a fleet until SIGINT or SIGTERM; then it says goodbye to its clients and writes down
what it holds.

When it accepts connections it prints a line "ready ADDRESS" on standard output, and
on descriptor --ready-fd where that is given. As a systemd service of Type=notify it
reports by itself. Its log goes to standard error, as text on a terminal, else as
JSON. Metrics, /healthz and /readyz are on serve.metrics of hawser.toml.

Two holders of one identity show by the boots that they tell in their hellos: the first
is heard again after the second. --on-clone says what happens then.

Files that are missing, damaged or readable by others are named and refused; nothing
is made anew. Exit codes: 0 stopped as told, 1 failed, 2 wrong use.`,
		Example: `  hawser serve --dir fleet
  hawser serve --dir fleet --listen 127.0.0.1:8883
  hawser serve --dir fleet --listen 127.0.0.1:0 --ready-fd 3 3>address`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if cfg.Logger, err = a.logger(level); err != nil {
				return usage(cmd, err)
			}
			cfg.Dir, cfg.Version = a.dir, version
			cfg.Ready = func(s *server.Server) { a.ready(s, readyFD) }
			relaxCollector()
			cfg.Stopping = func() { a.notify(daemon.SdNotifyStopping) }
			return server.Run(cmd.Context(), cfg)
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.Listen, "listen", "", "HOST:PORT of the broker, in place of serve.listen in hawser.toml")
	f.StringVar(&cfg.Metrics, "metrics", "", "HOST:PORT of the metrics, in place of serve.metrics")
	f.StringVar(&cfg.OnClone, "on-clone", "", "report or quarantine: what is done when two hold one identity, in place of devices.on_clone")
	// The error is that there is no such flag: there is, one line above.
	_ = cmd.RegisterFlagCompletionFunc("on-clone", cobra.FixedCompletions([]string{config.CloneReport, config.CloneQuarantine}, cobra.ShellCompDirectiveNoFileComp))
	f.IntVar(&readyFD, "ready-fd", -1, "write the line \"ready ADDRESS\" to this descriptor, too")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	return cmd
}

// relaxCollector lets the heap grow to three times what is in use before it is
// collected, unless GOGC says otherwise: connections are small and many, and what
// the collector walks over with each storm of them is CPU of every connect.
func relaxCollector() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(200)
	}
}

// ready tells whoever waits that connections are accepted.
func (a *app) ready(s *server.Server, fd int) {
	line := fmt.Sprintf("ready %s", s.Addr())
	a.say("%s", line)
	if fd >= 0 {
		a.readyOn(fd, line)
	}
	a.notify(daemon.SdNotifyReady)
}

func (a *app) readyOn(fd int, line string) {
	f := os.NewFile(uintptr(fd), "ready-fd")
	if f == nil {
		a.note("descriptor %d of --ready-fd is not open", fd)
		return
	}
	defer f.Close()
	if _, err := fmt.Fprintln(f, line); err != nil {
		a.note("descriptor %d of --ready-fd: %v", fd, err)
	}
}

func (a *app) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		a.note("systemd was not told %s: %v", state, err)
	}
}

// Command hawser-bench measures Hawser beside mosquitto: `make bench`.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"

	"hawser/internal/bench"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "hawser-bench:", err)
		os.Exit(1)
	}
}

// run is the bench, or one of the children that it starts.
func run(ctx context.Context, args []string) error {
	if len(args) > 0 {
		switch args[0] {
		case "parts":
			return parts(ctx, args[1:])
		case "write-history":
			return history(ctx, args[1:], bench.WriteHistory)
		case "read-history":
			return history(ctx, args[1:], bench.ReadHistory)
		}
	}
	return measure(ctx, args)
}

func parts(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("parts", flag.ContinueOnError)
	dir := f.String("dir", "", "state directory")
	listen := f.String("listen", "", "host:port")
	profile := f.String("profile", "", "directory for profiles")
	if err := f.Parse(args); err != nil {
		return err
	}
	return bench.Parts(ctx, *dir, *listen, *profile)
}

func history(ctx context.Context, args []string, do func(context.Context, string, int, int) error) error {
	if len(args) != 3 {
		return errors.New("a directory and two numbers are needed")
	}
	a, errA := strconv.Atoi(args[1])
	b, errB := strconv.Atoi(args[2])
	if err := errors.Join(errA, errB); err != nil {
		return err
	}
	return do(ctx, args[0], a, b)
}

func measure(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("hawser-bench", flag.ContinueOnError)
	quick := f.Bool("quick", false, "a fiftieth of the size: shows that it works, measures nothing")
	hawser := f.String("hawser", "", "the hawser binary; without it it is built from ./cmd/hawser")
	parts := f.Bool("parts", false, "measure registry, log and broker in a child of this binary instead of the product")
	cache := f.String("cache", ".cache/bench", "where certificates and the history are kept between runs")
	out := f.String("out", "bench.json", "where the figures go")
	profile := f.String("profile", "", "with -parts: directory for CPU and heap profiles")
	only := f.String("only", "", "one section: load, sessions, history, hostile, rollover, journal")
	rounds := f.Int("rounds", 0, "how often each row of the load section is measured; 0: three times, once with -quick")
	verbose := f.Bool("v", false, "show what the servers say")
	if err := f.Parse(args); err != nil {
		return err
	}
	o := bench.Full()
	if *quick {
		o = bench.Quick()
	}
	if *rounds > 0 {
		o.Rounds = *rounds
	}
	o.Hawser, o.Only, o.Out, o.Log = *hawser, *only, os.Stdout, io.Discard
	if *verbose {
		o.Log = os.Stderr
	}
	var err error
	if o.Self, err = os.Executable(); err != nil {
		return err
	}
	if o.Cache, err = filepath.Abs(*cache); err != nil {
		return err
	}
	if *profile != "" {
		if o.Profile, err = filepath.Abs(*profile); err != nil {
			return err
		}
		if err := os.MkdirAll(o.Profile, 0o700); err != nil {
			return err
		}
	}
	if o.Hawser == "" && !*parts {
		o.Hawser = filepath.Join(o.Cache, "hawser")
		build := exec.CommandContext(ctx, "go", "build", "-o", o.Hawser, "./cmd/hawser")
		build.Stdout, build.Stderr = os.Stderr, os.Stderr
		if err := build.Run(); err != nil {
			return fmt.Errorf("build ./cmd/hawser: %w", err)
		}
	}
	report, err := bench.Run(ctx, o)
	if err != nil {
		return err
	}
	report.Print(os.Stdout)
	return report.Save(*out)
}

// kitclient is Hawser's device kit as a program: it connects, publishes one message at
// QoS 1, listens for commands and stays.
//
//	kitclient HOST PORT CAFILE CERT KEY
package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"time"

	"hawser/device"
)

func main() {
	if len(os.Args) != 6 {
		fmt.Fprintln(os.Stderr, "usage: kitclient HOST PORT CAFILE CERT KEY")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5]); err != nil {
		fmt.Fprintln(os.Stderr, "kitclient:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, host, port, cafile, certFile, keyFile string) error {
	pem, err := os.ReadFile(cafile)
	if err != nil {
		return err
	}
	roots, err := device.ParseRoots(pem)
	if err != nil {
		return err
	}
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return err
	}
	state, err := os.MkdirTemp("", "kitclient-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(state)
	store, err := device.OpenFileStore(state)
	if err != nil {
		return err
	}
	d, err := device.New(device.Config{Servers: []string{host + ":" + port}, Certificate: cert, Roots: roots, Store: store,
		Clock: time.Now, KeepAlive: 5 * time.Second,
		Command: func(context.Context, device.Command) (device.Value, error) { return nil, nil },
		Log:     slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	go func() { _ = d.Publish(ctx, "u/temp", []byte("21.5"), 1) }() // fails when ctx ends, and so does Run
	err = d.Run(ctx)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

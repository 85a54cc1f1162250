package device_test

import (
	"context"
	"log"
	"os/signal"
	"syscall"
	"time"

	"hawser/device"
)

// A device in thirty lines: telemetry every ten seconds, and one command.
func Example() {
	// What `hawser device add --out ABCD1234` has written; the servers are those of its anchor set.
	cfg, err := device.Load("ABCD1234")
	if err != nil {
		log.Fatal(err)
	}
	cfg.Class, cfg.Firmware = "sensor", "1.0.0"
	cfg.Command = func(ctx context.Context, cmd device.Command) (device.Value, error) {
		if cmd.Name != "uptime" {
			return nil, device.ErrUnknownCommand
		}
		return device.ValueOf(map[string]any{"minutes": 42})
	}
	d, err := device.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	go func() {
		for range time.Tick(10 * time.Second) {
			if err := d.Publish(ctx, "u/temperature", []byte("21.5"), 1); err != nil {
				log.Print(err)
			}
		}
	}()
	log.Print(d.Run(ctx))
}

package server

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"hawser/internal/broker"
	"hawser/internal/config"
	"hawser/internal/fleet"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// Create makes a new fleet: o with its Make filled in. actor stands in the audit.
func Create(ctx context.Context, o fleet.InitOptions, actor string, log *slog.Logger) (*fleet.Layout, error) {
	o.Make = func(dir string, id [16]byte, cfg *config.Config) error {
		return makeStores(ctx, dir, id, cfg, actor, log)
	}
	return fleet.Init(o)
}

// makeStores makes the registry first and the streams of the log last: an
// outside cluster is touched only when nothing else can go wrong.
func makeStores(ctx context.Context, dir string, id [16]byte, cfg *config.Config, actor string, log *slog.Logger) error {
	path := filepath.Join(dir, "registry.db")
	if err := registry.Create(ctx, path, registry.Meta{FleetID: id, Created: time.Now()}); err != nil {
		return err
	}
	r, err := registry.Open(ctx, path, registry.Options{})
	if err != nil {
		return err
	}
	err = r.Update(ctx, func(tx *registry.Tx) error {
		for _, name := range []string{broker.StreamLog, broker.StreamQueue, broker.StreamRetained, broker.StreamHistory} {
			if err := tx.AddStream(actor, name); err != nil {
				return err
			}
		}
		return nil
	})
	if closeErr := r.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	credentials := ""
	if cfg.Log.NATSCredentials != "" {
		credentials = config.Path(filepath.Dir(dir), cfg.Log.NATSCredentials)
	}
	m := logConfig(cfg, filepath.Join(dir, "log"), credentials)
	m.Logger = log
	if err := msglog.Create(ctx, m); err != nil {
		return fmt.Errorf("log: %w%s", err, clusterHint(cfg))
	}
	return nil
}

package msglog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// dialOutside connects to a cluster and goes on trying for as long as the log is open.
func dialOutside(cfg *Config, logger *natsLogger, lost nats.ConnErrHandler) (*nats.Conn, error) {
	opts := []nats.Option{
		nats.Name("hawser " + cfg.Holder), nats.MaxReconnects(-1), nats.ReconnectWait(200 * time.Millisecond),
		nats.ReconnectBufSize(-1), // an error now, rather than a frame sent later
		nats.DisconnectErrHandler(func(nc *nats.Conn, err error) {
			if err != nil { // nil: we closed it
				logger.log.Warn("lost the log cluster", "error", err)
			}
			lost(nc, err)
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) { logger.log.Info("connected to the log cluster", "url", nc.ConnectedUrlRedacted()) }),
	}
	if cfg.NATSCreds != "" {
		opts = append(opts, nats.UserCredentials(cfg.NATSCreds))
	}
	nc, err := nats.Connect(cfg.NATSURL, opts...)
	if err != nil {
		return nil, fmt.Errorf("connect to the log cluster %s: %w", cfg.where(), err)
	}
	return nc, nil
}

// outsideReplicas is 3 in a cluster of three servers or more, else 1.
func outsideReplicas(nc *nats.Conn) int {
	if nc.ConnectedClusterName() != "" && len(nc.Servers()) >= 3 {
		return 3
	}
	return 1
}

// settleFor is how long a start waits for an outside cluster to elect leaders.
const settleFor = 30 * time.Second

// settled does one step of the start. In an outside cluster that is without a
// leader for a moment, because one of its servers has just died, it does it again:
// each step reads only, or begins anew.
func (l *Log) settled(ctx context.Context, step func(context.Context) error) error {
	deadline := time.Now().Add(settleFor)
	for {
		err := step(ctx)
		if err == nil || l.cfg.NATSURL == "" || !leaderless(err) || ctx.Err() != nil || time.Now().After(deadline) {
			return err
		}
		if !l.pause(settleFor / 60) {
			return err
		}
	}
}

// leaderless reports the errors of a cluster that is electing: nobody answers, or
// somebody says that he cannot at present.
func leaderless(err error) bool {
	var refusal *apiError
	return errors.Is(err, nats.ErrNoResponders) || errors.Is(err, nats.ErrTimeout) || errors.Is(err, context.DeadlineExceeded) ||
		errors.As(err, &refusal) && refusal.Code == 503
}

// lease keeps a second server away from the log of an outside cluster: one
// message that only its holder may replace and that expires when he is gone.
// The sequence numbers of the frames are what makes it safe; the lease makes
// the refusal early and clear.
type lease struct {
	seq atomic.Uint64 // of our message; renew's goroutine writes it
}

func leaseStream(n names, replicas int, ttl time.Duration) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: n.lease, Subjects: []string{n.holder}, Storage: jetstream.FileStorage, Replicas: replicas,
		MaxMsgsPerSubject: 1, MaxAge: ttl, Duplicates: min(ttl, 2*time.Minute),
	}
}

// takeLease waits for the lease of a holder that died until it expires, and
// refuses when it is renewed.
func (l *Log) takeLease(ctx context.Context) error {
	l.lease = &lease{}
	deadline := time.Now().Add(l.cfg.LeaseFor + 2*time.Second)
	var held stored
	for {
		err := l.putLease(ctx, 0)
		if err == nil {
			l.background(l.lease.renew)
			return nil
		}
		if !wrongLastSeq(err) {
			return fmt.Errorf("lease of stream %s in %s: %w", l.names.log, l.cfg.where(), err)
		}
		m, ok, err := l.store.get(ctx, l.names.lease, 0, l.names.holder)
		if err != nil {
			return fmt.Errorf("lease of stream %s in %s: %w", l.names.log, l.cfg.where(), err)
		}
		if ok && held.seq != 0 && m.seq != held.seq || time.Now().After(deadline) {
			return fmt.Errorf("%w: %s (%s)", ErrLeased, m.data, l.cfg.where())
		}
		if ok {
			held = m
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(l.cfg.LeaseFor / 10):
		}
	}
}

func (l *Log) putLease(ctx context.Context, after uint64) error {
	h := nats.Header{"Nats-Expected-Last-Subject-Sequence": {strconv.FormatUint(after, 10)}}
	seq, err := l.store.putOne(ctx, outMsg{l.names.holder, []byte(l.cfg.Holder)}, h)
	if err == nil {
		l.lease.seq.Store(seq)
	}
	return err
}

// renew replaces our message three times in its life. When somebody else holds
// the lease the log is dead.
func (le *lease) renew(ctx context.Context, l *Log) {
	tick := time.NewTicker(l.cfg.LeaseFor / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		err := l.putLease(ctx, le.seq.Load())
		if err != nil && wrongLastSeq(err) {
			err = l.keepLease(ctx)
		}
		if errors.Is(err, ErrLeased) {
			l.cfg.Logger.Error("lost the lease of the log", "error", err)
			l.setDead(err)
			return
		}
		if err != nil && ctx.Err() == nil {
			l.cfg.Logger.Warn("renew the lease of the log", "error", err)
		}
	}
}

// keepLease tells a lease that expired, or whose renewal was stored without our
// hearing of it, from one that another holds.
func (l *Log) keepLease(ctx context.Context) error {
	m, ok, err := l.store.get(ctx, l.names.lease, 0, l.names.holder)
	switch {
	case err != nil:
		return err
	case ok && string(m.data) != l.cfg.Holder:
		return fmt.Errorf("%w: %s (%s)", ErrLeased, m.data, l.cfg.where())
	case ok:
		return l.putLease(ctx, m.seq)
	}
	return l.putLease(ctx, 0)
}

// dropLease gives the lease back, so that the next server need not wait.
func (l *Log) dropLease() {
	if l.lease == nil {
		return
	}
	seq := l.lease.seq.Swap(0)
	if seq == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
	defer cancel()
	if err := l.store.purge(ctx, l.names.lease, l.names.holder, seq+1); err != nil {
		l.cfg.Logger.Warn("give back the lease of the log", "error", err)
	}
}

// checkSync asks every server of the cluster whether it fsyncs before it
// acknowledges. Only a system account may ask; without one the log says that it
// does not know what an acknowledgement is worth.
func (l *Log) checkSync(ctx context.Context) {
	if err := l.askSync(ctx); err != nil {
		l.cfg.Logger.Warn("unverified: whether the log cluster fsyncs before it acknowledges (sync_interval: always)",
			"cluster", l.cfg.where(), "reason", err)
	}
}

func (l *Log) askSync(ctx context.Context) error {
	if l.cfg.NATSSystemURL == "" {
		return errors.New("no user of the system account is configured")
	}
	nc, err := nats.Connect(l.cfg.NATSSystemURL, nats.Name("hawser check"))
	if err != nil {
		return err
	}
	defer nc.Close()
	own, err := l.store.conn()
	if err != nil {
		return err
	}
	sub, err := nc.SubscribeSync(nats.NewInbox())
	if err != nil {
		return err
	}
	if err := nc.PublishRequest("$SYS.REQ.SERVER.PING.JSZ", sub.Subject, []byte(`{"config":true}`)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	for seen, want := 0, max(len(own.Servers()), 1); seen < want; seen++ {
		m, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			return fmt.Errorf("%d of %d servers answered: %w", seen, want, err)
		}
		if err := syncAlways(m.Data); err != nil {
			return err
		}
	}
	return nil
}

func syncAlways(answer []byte) error {
	var a struct {
		Server struct {
			Name string `json:"name"`
		} `json:"server"`
		Data struct {
			Config struct {
				SyncAlways bool `json:"sync_always"`
			} `json:"config"`
		} `json:"data"`
	}
	if err := json.Unmarshal(answer, &a); err != nil {
		return err
	}
	if !a.Data.Config.SyncAlways {
		return fmt.Errorf("server %s does not", a.Server.Name)
	}
	return nil
}

package bench

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"hawser/internal/broker"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/mqtt"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

const (
	honest      = 99                     // devices beside the hostile one
	honestEvery = 100 * time.Millisecond // between two messages of one
)

// hostile measures what 99 devices notice of one that sends the largest topics
// and payloads as fast as it can. Hawser runs with its default limits.
func (r *runner) hostile(ctx context.Context) error {
	f, err := r.fleet(ctx, "hostile", r.Clients+100)
	if err != nil {
		return err
	}
	servers, err := r.servers(ctx, f, false)
	if err != nil {
		return err
	}
	r.say("hawser: default limits")
	worse, calm, loud := newFigures(servers), newFigures(servers), newFigures(servers)
	var sent []uint64
	for i, s := range servers {
		h, err := r.besideHostile(ctx, s)
		if err != nil {
			stopAll(servers)
			return fmt.Errorf("%s: %w", s.name, err)
		}
		calm[i], loud[i] = h.calm, h.loud
		if worse[i] = []float64{median(h.loud) / median(h.calm)}; i == 0 {
			sent = h.sent
		}
	}
	if err := stopAll(servers); err != nil {
		return err
	}
	lost, err := missing(ctx, f, sent)
	if err != nil {
		return err
	}
	r.report.add("PUBACK p99 of 99 devices alone", "ms", calm.medians(), nil)
	r.report.add("PUBACK p99 of 99 devices beside a hostile one", "ms", loud.medians(), nil)
	r.report.add("that p99 beside the hostile device / alone", "x", worse.medians(), atMost(3))
	r.report.add("acknowledged messages of the 99 that are not in the log", "messages", []float64{lost}, atMost(0))
	return nil
}

// besides is what 99 devices saw: p99 in ms of each round, and how many messages
// of each were acknowledged.
type besides struct {
	calm, loud []float64
	sent       []uint64
}

// besideHostile takes turns between calm and a hostile device, a fresh one each
// time: the bursts that a device is allowed are its worst.
func (r *runner) besideHostile(ctx context.Context, s *server) (out besides, err error) {
	list, err := r.storm(s, s.fleet.devices[:honest], subscribed)
	if err != nil {
		return out, err
	}
	defer leaveAll(list)
	for round := range r.Rounds {
		calm, err := r.honestly(list)
		if err != nil {
			return out, err
		}
		r.startProfile(ctx, s, "hostile")
		var stop atomic.Bool
		var wg sync.WaitGroup
		wg.Go(func() { s.flood(&s.fleet.devices[honest+round], &stop) })
		loud, err := r.honestly(list)
		stop.Store(true)
		wg.Wait()
		r.startProfile(ctx, s, "off")
		if err != nil {
			return out, err
		}
		out.calm, out.loud = append(out.calm, calm), append(out.loud, loud)
	}
	for _, c := range list {
		out.sent = append(out.sent, c.seq)
	}
	return out, nil
}

// honestly has each client publish at its pace and gives the p99 in ms.
func (r *runner) honestly(list []*client) (float64, error) {
	var mu sync.Mutex
	var all []float64
	start := time.Now().Add(100 * time.Millisecond)
	_, err := each(list, func(i int, c *client) (int, error) {
		return c.paced(r.Payload, start.Add(honestEvery*time.Duration(i)/honest), honestEvery, r.HostileTime, func(d time.Duration) {
			mu.Lock()
			all = append(all, d.Seconds()*1e3)
			mu.Unlock()
		})
	})
	if err != nil {
		return 0, err
	}
	return quantile(all, 0.99), nil
}

// flood is the hostile device: when it is thrown out it comes back at once.
func (s *server) flood(d *device, stop *atomic.Bool) {
	topic := "private/" + d.name + "/u/"
	topic += strings.Repeat("x", identity.MaxTopic-len(topic))
	for !stop.Load() {
		c, err := s.fleet.connect(s.addr, d, session{v: mqtt.V311, clean: true})
		if err != nil {
			continue
		}
		c.prepare(topic, 1, 256<<10-len(topic)-16)
		var wg sync.WaitGroup
		wg.Go(func() {
			for err := error(nil); err == nil; {
				_, err = c.acks()
			}
			c.conn.NetConn().Close()
		})
		for err = nil; err == nil && !stop.Load(); {
			c.conn.SetWriteDeadline(time.Now().Add(2 * time.Second)) // a throttled writer must see stop
			err = c.publish()
		}
		c.conn.NetConn().Close()
		wg.Wait()
	}
}

// missing reads the whole log of the stopped server and counts the messages of
// the honest devices that were acknowledged and are not in it.
func missing(ctx context.Context, f *fleetFiles, sent []uint64) (float64, error) {
	l, err := fleet.OpenLayout(f.dir)
	if err != nil {
		return 0, err
	}
	reg, err := registry.Open(ctx, l.RegistryPath(), registry.Options{})
	if err != nil {
		return 0, err
	}
	defer reg.Close()
	state, err := reg.LogState(ctx)
	if err != nil {
		return 0, err
	}
	log, err := msglog.Open(ctx, msglog.Config{Fleet: l.Config.Fleet.ID.String(), Dir: l.LogDir()}, broker.KnownState(state))
	if err != nil {
		return 0, err
	}
	defer log.Close(ctx)
	found := make(map[identity.Principal]uint64)
	err = log.Read(ctx, 0, func(r *msglog.Record) error {
		if r.Kind == msglog.KindPublish {
			found[r.From]++
		}
		return nil
	})
	lost := uint64(0)
	for i, n := range sent {
		who := identity.Principal{Kind: identity.Device, Name: f.devices[i].name}
		lost += n - min(n, found[who])
	}
	return float64(lost), err
}

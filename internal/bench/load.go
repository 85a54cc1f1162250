package bench

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/schollz/progressbar/v3"

	"hawser/internal/mqtt"
)

// connectors is how many clients connect at a time.
const connectors = 32

func (r *runner) progress(n int, what string) *progressbar.ProgressBar {
	return progressbar.NewOptions(n, progressbar.OptionSetWriter(r.Out), progressbar.OptionSetDescription(what),
		progressbar.OptionShowCount(), progressbar.OptionThrottle(200*time.Millisecond), progressbar.OptionClearOnFinish(),
		progressbar.OptionSetVisibility(isTerminal(r.Out)))
}

// storm connects all devices, connectors at a time.
func (r *runner) storm(s *server, devices []device, how func(d *device) session) ([]*client, error) {
	list, errs := make([]*client, len(devices)), make([]error, connectors)
	bar := r.progress(len(devices), s.name+": connect")
	defer bar.Finish()
	var next atomic.Int64
	var wg sync.WaitGroup
	for w := range connectors {
		wg.Go(func() {
			for errs[w] == nil {
				i := int(next.Add(1)) - 1
				if i >= len(devices) {
					return
				}
				list[i], errs[w] = s.fleet.connect(s.addr, &devices[i], how(&devices[i]))
				bar.Add(1)
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			leaveAll(list)
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return list, nil
}

func leaveAll(list []*client) {
	for _, c := range list {
		if c != nil {
			c.leave()
		}
	}
}

// subscribed is a device with the one subscription that the rows are about.
func subscribed(d *device) session {
	return session{v: mqtt.V311, clean: true, filter: "private/" + d.name + "/d/#"}
}

// cpuOf measures a server's CPU during work, and until it is idle afterwards.
func cpuOf(s *server, work func() (n int, err error)) (perOp float64, n int, err error) {
	before, err := cpuTime(s.pid())
	if err != nil {
		return 0, 0, err
	}
	if n, err = work(); err != nil {
		return 0, n, err
	}
	if err := settle(s.pid(), 15*time.Second); err != nil {
		return 0, n, err
	}
	after, err := cpuTime(s.pid())
	return (after - before).Seconds() * 1e6 / float64(n), n, err
}

// figures collects, for each server, the values of one row over the rounds.
type figures [][]float64

func newFigures(servers []*server) figures { return make(figures, len(servers)) }

func (f figures) medians() (m []float64) {
	for _, v := range f {
		m = append(m, median(v))
	}
	return m
}

// load is the rows about connections and publishes.
func (r *runner) load(ctx context.Context) error {
	f, err := r.fleet(ctx, "load", r.Clients+100)
	if err != nil {
		return err
	}
	servers, err := r.servers(ctx, f, true)
	if err != nil {
		return err
	}
	live, err := r.connects(ctx, servers)
	if err == nil {
		err = r.publishes(ctx, servers, live)
	}
	for _, l := range live {
		leaveAll(l)
	}
	if stopped := stopAll(servers); err == nil {
		err = stopped
	}
	return err
}

// connects measures connection storms and idle memory; it leaves the clients of
// the last storm connected.
func (r *runner) connects(ctx context.Context, servers []*server) (live [][]*client, err error) {
	cpu, rss := newFigures(servers), newFigures(servers)
	live = make([][]*client, len(servers))
	for round := range r.Rounds {
		for i, s := range servers {
			leaveAll(live[i])
			live[i] = nil
			if err := settle(s.pid(), 15*time.Second); err != nil {
				return live, err
			}
			base, err := r.warm(ctx, s)
			if err != nil {
				return live, err
			}
			r.startProfile(ctx, s, "connect")
			v, _, err := cpuOf(s, func() (int, error) {
				live[i], err = r.storm(s, s.fleet.devices[:r.Clients], subscribed)
				return r.Clients, err
			})
			if err != nil {
				return live, err
			}
			r.startProfile(ctx, s, "off")
			cpu[i] = append(cpu[i], v)
			if round > 0 {
				continue
			}
			full, err := idleMemory(ctx, s)
			if err != nil {
				return live, err
			}
			rss[i] = append(rss[i], (full-base)/float64(r.Clients)/1024)
		}
	}
	r.report.add("CPU per connect, with one subscription", "µs", cpu.medians(), ratioAtMost(0.42))
	r.report.add("RSS per idle connection with one subscription", "KiB", rss.medians(), ratioAtMost(0.9))
	return live, nil
}

// warm lets a fresh server fault its code in and gives its memory then.
func (r *runner) warm(ctx context.Context, s *server) (float64, error) {
	list, err := r.storm(s, s.fleet.devices[r.Clients:], subscribed)
	if err != nil {
		return 0, err
	}
	leaveAll(list)
	return idleMemory(ctx, s)
}

// idleMemory is the resident memory after a garbage collection.
func idleMemory(ctx context.Context, s *server) (float64, error) {
	if err := settle(s.pid(), 15*time.Second); err != nil {
		return 0, err
	}
	if err := s.collect(ctx); err != nil {
		return 0, err
	}
	return memory(s.pid(), "VmRSS")
}

// publishes measures the rows about messages, the servers taking turns.
func (r *runner) publishes(ctx context.Context, servers []*server, live [][]*client) error {
	rate, flat, steady, qos0 := newFigures(servers), newFigures(servers), newFigures(servers), newFigures(servers)
	for range r.Rounds {
		for i, s := range servers {
			pubs := live[i][:r.Publishers]
			r.startProfile(ctx, s, "flat")
			start := time.Now()
			var took time.Duration
			v, n, err := cpuOf(s, func() (n int, err error) {
				n, err = each(pubs, func(_ int, c *client) (int, error) { return c.flatOut(1, r.Payload, r.Window, r.Flat) })
				took = time.Since(start)
				return n, err
			})
			if err != nil {
				return fmt.Errorf("%s: flat out: %w", s.name, err)
			}
			rate[i], flat[i] = append(rate[i], float64(n)/took.Seconds()), append(flat[i], v)
			r.startProfile(ctx, s, "steady")
			if v, _, err = cpuOf(s, func() (int, error) { return r.steady(pubs) }); err != nil {
				return fmt.Errorf("%s: steady: %w", s.name, err)
			}
			steady[i] = append(steady[i], v)
			r.startProfile(ctx, s, "qos0")
			v, _, err = cpuOf(s, func() (int, error) {
				return each(pubs, func(_ int, c *client) (int, error) { return c.flatOut0(r.Payload, r.Flat) })
			})
			if err != nil {
				return fmt.Errorf("%s: QoS 0: %w", s.name, err)
			}
			qos0[i] = append(qos0[i], v)
			r.startProfile(ctx, s, "off")
		}
	}
	r.report.add("CPU per QoS 1 publish, flat out", "µs", flat.medians(), ratioAtMost(0.7))
	r.report.add(fmt.Sprintf("CPU per QoS 1 publish at a steady %d/s", r.SteadyRate), "µs", steady.medians(), atMost(50))
	r.report.add("CPU per QoS 0 publish, flat out", "µs", qos0.medians(), nil)
	r.report.add(fmt.Sprintf("QoS 1 publishes per second, %d clients", r.Publishers), "1/s", rate.medians(), ratioAtLeast(1.5))
	return r.lone(ctx, servers, live)
}

// lone is the latency of a single client, between two probes of the disk.
func (r *runner) lone(ctx context.Context, servers []*server, live [][]*client) error {
	probe, err := syncLatency(r.dir, 300, 300)
	if err != nil {
		return err
	}
	p50 := newFigures(servers)
	for i, s := range servers {
		r.startProfile(ctx, s, "lone")
		took, err := live[i][0].lone(r.Payload, r.Lone)
		if err != nil {
			return fmt.Errorf("%s: lone client: %w", s.name, err)
		}
		p50[i] = append(p50[i], median(took))
		r.startProfile(ctx, s, "off")
	}
	again, err := syncLatency(r.dir, 300, 300)
	if err != nil {
		return err
	}
	disk := median(append(probe, again...))
	r.report.add("p50 of one fdatasync", "ms", []float64{disk}, nil)
	r.report.add("QoS 1 latency of a lone client, p50", "ms", p50.medians(), atMost(2*disk+0.5))
	return nil
}

// each runs one goroutine per client and adds up what they did.
func each(list []*client, work func(i int, c *client) (int, error)) (int, error) {
	n, errs := make([]int, len(list)), make([]error, len(list))
	var wg sync.WaitGroup
	for i, c := range list {
		wg.Go(func() { n[i], errs[i] = work(i, c) })
	}
	wg.Wait()
	total := 0
	for i := range list {
		if errs[i] != nil {
			return 0, errs[i]
		}
		total += n[i]
	}
	return total, nil
}

// telemetry is where a device publishes.
func (c *client) telemetry() string { return "private/" + c.dev.name + "/u/t" }

// flatOut publishes with a full window for a while and gives the number of
// acknowledged messages.
func (c *client) flatOut(qos byte, payload, window int, d time.Duration) (n int, err error) {
	c.prepare(c.telemetry(), qos, payload)
	end, open := time.Now().Add(d), 0
	c.extend()
	for {
		if time.Now().Before(end) {
			if err := c.burst(window - open); err != nil {
				return n, err
			}
			open = window
		}
		if open == 0 {
			return n, nil
		}
		m, err := c.acks()
		if err != nil {
			return n, err
		}
		n, open = n+m, open-m
	}
}

// burst publishes n messages, a TLS record each, in one write.
func (c *client) burst(n int) error {
	c.raw.hold = true
	for range n {
		if err := c.publish(); err != nil {
			return err
		}
	}
	return c.raw.release()
}

// flatOut0 publishes at QoS 0 for a while; a last message at QoS 1 comes back
// when all are through.
func (c *client) flatOut0(payload int, d time.Duration) (n int, err error) {
	c.prepare(c.telemetry(), 0, payload)
	c.extend()
	const atOnce = 10
	for end := time.Now().Add(d); time.Now().Before(end); n += atOnce {
		if err := c.burst(atOnce); err != nil {
			return n, err
		}
	}
	c.extend()
	last, err := c.flatOut(1, payload, 1, time.Millisecond)
	return n + last, err
}

// steady spreads SteadyRate publishes per second over the clients.
func (r *runner) steady(list []*client) (int, error) {
	every := time.Second * time.Duration(len(list)) / time.Duration(r.SteadyRate)
	start := time.Now()
	return each(list, func(i int, c *client) (int, error) {
		return c.paced(r.Payload, start.Add(every*time.Duration(i)/time.Duration(len(list))), every, r.Steady, nil)
	})
}

// paced publishes one message every so often and waits for its acknowledgement;
// took, which may be nil, is told how long after its time each was acknowledged.
func (c *client) paced(payload int, start time.Time, every, d time.Duration, took func(time.Duration)) (n int, err error) {
	c.prepare(c.telemetry(), 1, payload)
	c.extend()
	for end := start.Add(d); start.Before(end); start = start.Add(every) {
		time.Sleep(time.Until(start))
		if err := c.publish(); err != nil {
			return n, err
		}
		m, err := c.acks()
		if err != nil {
			return n, err
		}
		if n += m; took != nil {
			took(time.Since(start))
		}
	}
	return n, nil
}

// lone publishes one message after the other and gives the times in ms.
func (c *client) lone(payload, n int) (took []float64, err error) {
	c.prepare(c.telemetry(), 1, payload)
	for range n {
		c.extend()
		start := time.Now()
		if err := c.publish(); err != nil {
			return nil, err
		}
		if _, err := c.acks(); err != nil {
			return nil, err
		}
		took = append(took, time.Since(start).Seconds()*1e3)
	}
	return took, nil
}

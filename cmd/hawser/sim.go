package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/spf13/cobra"

	"hawser/device"
	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/sim"
)

// simOptions is what sim is told.
type simOptions struct {
	devices, payload int
	faulty           int
	rate             float64
	span             time.Duration
}

func (a *app) simCommand() *cobra.Command {
	var o simOptions
	cmd := &cobra.Command{
		Use:   "sim --devices N --rate R",
		Short: "run simulated devices against a trial fleet",
		Long: `sim runs N devices in this process against the running server of a trial fleet. Their
ids and keys follow from server/sim.seed, so a second run is the same devices. Those
that the fleet does not know yet are enrolled, with the tag "sim".

Each connects over TLS with its own certificate, publishes R messages a second to
private/<id>/u/sim at QoS 1, and answers every command. A progress line goes to
standard error. At the end, after --for or Ctrl-C, sim waits for what is not
acknowledged yet and prints a summary. It exits with 1 if a message was not
acknowledged.

With --faulty the last devices are faulty, each in its way, in turn: one loses its power
each time it has stored a certificate or an anchor set, one says that it uses what it was
offered and does not, one goes away at the first offer, one takes the next anchor set for
a forgery, one for an old one. "hawser ca rollover status" names those that do not arrive.

A connection is an open file: where the limit is too low sim raises it, or says by how
much the hard limit has to grow.`,
		Example: `  hawser sim --dir fleet --devices 100 --rate 1
  hawser sim --dir fleet --devices 5000 --rate 1 --payload 64 --for 30s --json
  hawser sim --dir fleet --devices 50 --faulty 5`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(cmd); err != nil {
				return err
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.simulate(ctx, c, o) })
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.devices, "devices", 100, "how many devices")
	f.Float64Var(&o.rate, "rate", 1, "messages per second of each device; 0: they only listen")
	f.IntVar(&o.payload, "payload", 64, "bytes of a message")
	f.IntVar(&o.faulty, "faulty", 0, "how many of them are faulty when they are offered something")
	f.DurationVar(&o.span, "for", 0, "stop after this time (default: Ctrl-C)")
	return a.withJSON(cmd)
}

func (o *simOptions) check(cmd *cobra.Command) error {
	switch {
	case o.devices < 1 || o.devices > sim.MaxDevices:
		return usagef(cmd, "--devices is 1 to %d", sim.MaxDevices)
	case !(o.rate >= 0 && o.rate <= 1000):
		return usagef(cmd, "--rate is 0 to 1000")
	case o.payload < 1 || o.payload > device.MaxPayload:
		return usagef(cmd, "--payload is 1 to %d", device.MaxPayload)
	case o.faulty < 0 || o.faulty > o.devices:
		return usagef(cmd, "--faulty is 0 to %d, the number of devices", o.devices)
	case o.span < 0:
		return usagef(cmd, "--for is a time like 30s")
	}
	return nil
}

func (a *app) simulate(ctx context.Context, c *admin.Client, o simOptions) error {
	l, err := fleet.OpenLayout(a.dir)
	if err != nil {
		return err
	}
	if l.Config.Fleet.Trial { // else Enrol says the more important thing
		if err := a.needServer(c, "simulating devices"); err != nil {
			return err
		}
	}
	if _, err := sim.RaiseFiles(o.devices); err != nil {
		return err
	}
	if most := l.Config.Limits.Device.MessagesPerSecond; o.rate > most {
		a.note("the server takes %g messages a second from a device: limits.device.messages_per_second in hawser.toml", most)
	}
	p := &progress{app: a, live: terminal(a.err)}
	defer p.end()
	members, fresh, err := sim.Enrol(ctx, sim.Enrolment{Client: c, Layout: l, Devices: o.devices, Class: "sim",
		Progress: func(n int) { p.show("enrolled %d", n) }})
	if err != nil {
		return err
	}
	cfg, err := a.simConfig(ctx, c, l, members)
	if err != nil {
		return err
	}
	cfg.Rate, cfg.Size, cfg.Topic, cfg.Count = o.rate, o.payload, "u/sim", messages(o.rate, o.span)
	for i := range o.faulty {
		cfg.Faults = append(cfg.Faults, sim.Faults()[i%len(sim.Faults())])
	}
	return a.runSim(ctx, cfg, o, fresh, p)
}

// simConfig says how devices of this machine reach the fleet's server.
func (a *app) simConfig(ctx context.Context, c *admin.Client, l *fleet.Layout, members []*sim.Member) (sim.Config, error) {
	cfg := sim.Config{Members: members, Layout: l, Class: "sim", Firmware: version}
	st, err := c.Status(ctx)
	if err != nil {
		return cfg, err
	}
	if st.Server == nil {
		return cfg, errors.New("the server has stopped")
	}
	host, port, err := net.SplitHostPort(st.Server.Listen)
	if err != nil {
		return cfg, fmt.Errorf("address of the server: %w", err)
	}
	if ip := net.ParseIP(host); host == "" || ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	cfg.Address = net.JoinHostPort(host, port)
	return cfg, nil
}

// runSim runs the devices until the time is over or ctx ends.
func (a *app) runSim(ctx context.Context, cfg sim.Config, o simOptions, fresh int, p *progress) error {
	f, err := sim.Start(ctx, cfg)
	if err != nil {
		return err
	}
	defer f.Close()
	faulty := faultyDevices(f)
	for _, d := range faulty {
		a.note("%s is faulty: it %s", d.ID, d.Fault)
	}
	began := time.Now()
	p.follow(ctx, f, f.Connected(), func(t sim.Totals) string {
		return fmt.Sprintf("%d of %d connected%s", t.Connected, t.Devices, lastTrouble(&t))
	})
	connected := time.Since(began)
	f.Begin(ctx)
	publishing := time.Now()
	over := make(chan struct{})
	if o.span > 0 {
		timer := time.AfterFunc(o.span, func() { close(over) })
		defer timer.Stop()
	}
	var last uint64
	p.follow(ctx, f, over, func(t sim.Totals) string {
		rate := float64(t.Acked-last) / p.every().Seconds()
		last = t.Acked
		return fmt.Sprintf("%d online, %d acknowledged, %.0f/s, p99 %s%s", t.Online, t.Acked, rate, millis(t.P99), lastTrouble(&t))
	})
	lasted := time.Since(publishing)
	drained := a.drain(ctx, f)
	s := a.summary(f.Totals(), fresh, connected, lasted)
	s.Faulty = faulty
	p.end()
	if err := emitOne(a, s, func() { a.saySim(&s) }); err != nil {
		return err
	}
	if s.Published != s.Acknowledged {
		return errors.Join(errors.New("not every message was acknowledged"), drained)
	}
	return nil
}

func faultyDevices(f *sim.Fleet) (all []faultyDevice) {
	for _, u := range f.Units() {
		if u.Fault() != sim.Sound {
			all = append(all, faultyDevice{u.ID(), u.Fault().String()})
		}
	}
	return all
}

// messages is how many a device publishes in a time that is bounded: what fits into it,
// but at least one; 0 has no end.
func messages(rate float64, span time.Duration) uint64 {
	if span <= 0 {
		return 0
	}
	return uint64(max(1, rate*span.Seconds()))
}

// drainTime is how long the end waits for acknowledgements.
const drainTime = 15 * time.Second

// drain goes on after Ctrl-C.
func (a *app) drain(ctx context.Context, f *sim.Fleet) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	return f.Drain(ctx)
}

// lastTrouble is empty while all goes well.
func lastTrouble(t *sim.Totals) string {
	if t.Troubles == 0 {
		return ""
	}
	return fmt.Sprintf(", %d troubles, the last: %.120s", t.Troubles, t.Trouble)
}

// simSummary is what sim did, as --json prints it.
type simSummary struct {
	Devices      int     `json:"devices"`
	Enrolled     int     `json:"enrolled"` // new to the fleet
	Connected    int     `json:"connected"`
	ConnectTime  float64 `json:"connect_seconds"`
	Seconds      float64 `json:"seconds"` // of publishing
	Published    uint64  `json:"published,string"`
	Acknowledged uint64  `json:"acknowledged,string"`
	PerSecond    float64 `json:"per_second"`
	Commands     uint64  `json:"commands,string"` // answered
	Errors       uint64  `json:"errors,string"`
	LastError    string  `json:"last_error,omitempty"`
	Median       float64 `json:"puback_p50_ms"`
	P99          float64 `json:"puback_p99_ms"`
	Longest      float64 `json:"puback_max_ms"`
	Memory       uint64  `json:"memory_bytes,string"` // resident, of this process
	CPU          float64 `json:"cpu_seconds"`         // of this process

	Faulty []faultyDevice `json:"faulty,omitempty"`
}

type faultyDevice struct {
	ID    identity.ID `json:"id"`
	Fault string      `json:"fault"`
}

func (a *app) summary(t sim.Totals, fresh int, connected, lasted time.Duration) simSummary {
	s := simSummary{Devices: t.Devices, Enrolled: fresh, Connected: t.Connected, ConnectTime: seconds(connected),
		Seconds: seconds(lasted), Published: t.Published, Acknowledged: t.Acked, Commands: t.Commands,
		PerSecond: float64(int(float64(t.Acked)/lasted.Seconds()*10)) / 10,
		Errors:    t.Troubles, LastError: t.Trouble,
		Median: seconds(t.Median * 1000), P99: seconds(t.P99 * 1000), Longest: seconds(t.Longest * 1000)}
	s.Memory, s.CPU = ownCost()
	return s
}

// seconds has three decimals.
func seconds(d time.Duration) float64 {
	return float64(d.Round(time.Millisecond)) / float64(time.Second)
}

func (a *app) saySim(s *simSummary) {
	a.say("sim: %d devices, %d messages acknowledged in %.0f s, %.0f/s, %d errors", s.Connected, s.Acknowledged,
		s.Seconds, s.PerSecond, s.Errors)
	if s.LastError != "" {
		a.say("  last error  %s", printable(s.LastError))
	}
	a.say("  connected   in %.1f s, %d of them newly enrolled", s.ConnectTime, s.Enrolled)
	a.say("  PUBACK      p50 %.1f ms, p99 %.1f ms, longest %.0f ms", s.Median, s.P99, s.Longest)
	a.say("  process     %s resident, %.1f s of CPU", bytesText(s.Memory), s.CPU)
}

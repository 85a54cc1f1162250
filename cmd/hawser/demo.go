package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/durable"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/pki"
	"hawser/internal/server"
	"hawser/internal/sim"
)

// What the demo calls things, and how long it waits.
const (
	demoDomain   = "localhost"
	demoService  = "demo"
	demoCommand  = "blink"
	demoFirmware = "demo-1.0"
	demoTopic    = "u/temp"
	answerWait   = 10 * time.Second // for the answer to a command
	stopWait     = 15 * time.Second // for the server's goodbye
)

// demoOptions is what demo is told.
type demoOptions struct {
	devices int
	rate    float64
	span    time.Duration
	move    bool
}

func (a *app) demoCommand() *cobra.Command {
	var o demoOptions
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "a fleet in a temporary directory, at work",
		Long: `demo makes a trial fleet in a temporary directory, serves it, enrols some devices, and
runs them as MQTT clients over TLS, each with its own certificate. They publish what
they measure and answer a command each. On a terminal it shows them in a table.

It prints lines for mosquitto_sub and mosquitto_pub that work as they are: to watch
what the devices say, and to be one more device.

With --for it stops by itself, as after Ctrl-C; then it stops the server, reads the log
from the disk and says how many messages were acknowledged and how many are there, how
many devices and how many answered commands. It exits with 1 where these differ. The
directory is removed at the end.

With --rollover it shows a fleet of 200 devices that moves, while it publishes, from one
device CA to the next and from the broker roots {A, B} to {B, C}. Four devices are
faulty: one loses its power in the middle and arrives all the same, three do not arrive.
Those are named, and retire refuses until they are waived. Then every certificate of the
old device CA is tried once. At the end the log is compared with what was acknowledged.`,
		Example: `  hawser demo
  hawser demo --devices 20 --rate 5
  hawser demo --for 10s
  hawser demo --rollover`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.move && !cmd.Flags().Changed("devices") {
				o.devices = moveDevices
			}
			switch {
			case o.move && (o.span != 0 || o.devices < moveFewest):
				return usagef(cmd, "--rollover takes its own time, and %d devices or more", moveFewest)
			case o.devices < 1 || o.devices > 1000:
				return usagef(cmd, "--devices is 1 to 1000; hawser sim runs more")
			case !(o.rate > 0 && o.rate <= 50):
				return usagef(cmd, "--rate is more than 0, at most 50: what the server takes from one device")
			case o.span < 0:
				return usagef(cmd, "--for is a time like 10s")
			}
			return a.demo(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.devices, "devices", 5, "how many devices; 200 with --rollover")
	f.Float64Var(&o.rate, "rate", 1, "messages per second of each device")
	f.DurationVar(&o.span, "for", 0, "stop after this time (default: Ctrl-C)")
	f.BoolVar(&o.move, "rollover", false, "show a move to another device CA and other broker roots")
	return cmd
}

// demo is one run: what stands is taken down in reverse.
type demo struct {
	*app
	demoOptions
	top    string // the temporary directory
	layout *fleet.Layout
	server *server.Server
	client *admin.Client
	fleet  *sim.Fleet
	table  *demoTable

	members  []*sim.Member
	answered int // commands
}

// demo runs in a directory that is gone afterwards, whatever happens.
func (a *app) demo(ctx context.Context, o demoOptions) (err error) {
	d := &demo{app: a, demoOptions: o}
	if _, err := sim.RaiseFiles(2 * o.devices); err != nil {
		return err
	}
	if d.top, err = os.MkdirTemp("", "hawser-demo-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(d.top)) }()
	a.dir = filepath.Join(d.top, "fleet")
	logFile, err := os.OpenFile(filepath.Join(d.top, "serve.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()
	if err := d.run(ctx, logFile); err != nil {
		return err
	}
	if d.move {
		return d.reckonMove(ctx)
	}
	return d.reckon(ctx)
}

// run is all until the server has stopped.
func (d *demo) run(ctx context.Context, logTo io.Writer) (err error) {
	if d.layout, err = server.Create(ctx, fleet.InitOptions{Dir: d.dir, Domains: []string{demoDomain}, Trial: true},
		server.UserName(os.Getuid()), slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	if d.server, err = d.serve(ctx, slog.New(slog.NewTextHandler(logTo, nil))); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stopServer(ctx)) }()
	client, done, err := d.connect(ctx)
	if err != nil {
		return err
	}
	defer done()
	d.client = client
	if d.move {
		return d.rollover(ctx)
	}
	if err := d.populate(ctx); err != nil {
		return err
	}
	return d.live(ctx)
}

// serve prefers the port that everybody knows. Another program may have it: whatever
// else was wrong shows again on a free one.
func (d *demo) serve(ctx context.Context, log *slog.Logger) (*server.Server, error) {
	cfg := server.Config{Dir: d.dir, Listen: "127.0.0.1:8883", Metrics: "127.0.0.1:0", Version: version, Logger: log}
	s, err := server.Start(ctx, cfg)
	if err == nil || ctx.Err() != nil {
		return s, err
	}
	cfg.Listen = "127.0.0.1:0"
	return server.Start(ctx, cfg)
}

func (d *demo) stopServer(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopWait)
	defer cancel()
	return d.server.Close(ctx)
}

// populate enrols the devices, and what the printed lines need.
func (d *demo) populate(ctx context.Context) (err error) {
	d.members, _, err = sim.Enrol(ctx, sim.Enrolment{Client: d.client, Layout: d.layout, Devices: d.devices, Class: "demo"})
	if err != nil {
		return err
	}
	watch, err := d.addWatcher(ctx)
	if err != nil {
		return err
	}
	publish, err := d.addSixth(ctx)
	if err != nil {
		return err
	}
	d.introduce(ctx, watch, publish)
	return nil
}

// addWatcher makes the service that the user can be, and gives the line to paste.
func (d *demo) addWatcher(ctx context.Context) (line string, err error) {
	n := &newService{name: demoService, out: filepath.Join(d.top, demoService),
		grants: []admin.Grant{{Mode: "read", Filter: "private/+/u/#"}}}
	if _, err := n.prepare(); err != nil {
		return "", err
	}
	cert, _, err := d.certifyService(ctx, d.client, d.layout, n, func(der []byte) error {
		_, err := d.client.AddService(ctx, admin.NewService{Name: n.name, Grants: n.grants, Certificate: der})
		return err
	})
	if err != nil {
		return "", err
	}
	if err := d.writePublic(n.out, "service.crt", cert); err != nil {
		return "", err
	}
	return n.tryLine(d.broker(ctx, d.client, d.layout)), nil
}

// addSixth makes the device that the user can be, and gives the line to paste.
func (d *demo) addSixth(ctx context.Context) (line string, err error) {
	n := newDevice{class: "demo"}
	id, err := n.pick(ctx, d.client)
	if err != nil {
		return "", err
	}
	n.out = filepath.Join(d.top, id.String())
	key, err := makeKey(filepath.Join(n.out, "device.key"))
	if err != nil {
		return "", err
	}
	csr, err := requestFor(key, id.String())
	if err != nil {
		return "", err
	}
	cert, _, err := n.certify(ctx, d.client, d.layout, id, csr)
	if err != nil {
		return "", err
	}
	if err := d.writePublic(n.out, "device.crt", cert); err != nil {
		return "", err
	}
	host, port := d.broker(ctx, d.client, d.layout)
	return publishLine(host, port, n.out, id), nil
}

// writePublic writes what lies beside a key.
func (d *demo) writePublic(dir, name string, cert *x509.Certificate) error {
	if err := writeTrust(dir, d.layout); err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, name), pki.EncodeCert(cert.Raw), 0o644)
}

// introduce tells where everything is.
func (d *demo) introduce(ctx context.Context, watch, publish string) {
	host, port := d.broker(ctx, d.client, d.layout)
	d.say("broker  %s:%s  (MQTT over TLS 1.3 with client certificates)", host, port)
	d.say("files   %s  (removed at the end)", d.top)
	d.say("")
	d.say("watch what the devices say:")
	d.say("  %s", watch)
	d.say("be one more device:")
	d.say("  %s", publish)
	d.say("")
}

// live runs the devices until the time is over or ctx ends.
func (d *demo) live(ctx context.Context) error {
	cfg, err := d.simConfig(ctx, d.client, d.layout, d.members)
	if err != nil {
		return err
	}
	cfg.Topic, cfg.Rate, cfg.Count = demoTopic, d.rate, messages(d.rate, d.span)
	cfg.Firmware, cfg.Class, cfg.JSON = demoFirmware, "demo", true
	if d.fleet, err = sim.Start(ctx, cfg); err != nil {
		return err
	}
	defer d.fleet.Close()
	d.table = newDemoTable(d.app, d.fleet)
	select {
	case <-d.fleet.Connected():
	case <-time.After(answerWait):
		return fmt.Errorf("the devices cannot connect%s", d.why())
	case <-ctx.Done():
		return nil
	}
	d.fleet.Begin(ctx)
	d.show(ctx)
	if err := d.drain(ctx, d.fleet); err != nil {
		d.note("%v%s", err, d.why())
	}
	return nil
}

// why is the devices' last complaint.
func (d *demo) why() string {
	t := d.fleet.Totals()
	return lastTrouble(&t)
}

// show draws the table while the commands go out and the devices publish. The commands'
// answers are waited for, also when the time is over.
func (d *demo) show(ctx context.Context) {
	over := make(chan struct{})
	if d.span > 0 {
		timer := time.AfterFunc(d.span, func() { close(over) })
		defer timer.Stop()
	}
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		d.command(ctx)
	}()
	d.table.follow(ctx, over)
	<-asked
	d.table.last()
}

// command has every device do something, and waits for the answers. After Ctrl-C it
// says no more.
func (d *demo) command(ctx context.Context) {
	for _, m := range d.members {
		state, err := d.commandOne(ctx, m.ID)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			d.table.remark("command for %s: %v", m.ID, err)
		case state == "answered":
			d.answered++
		default:
			d.table.remark("the command for %s is %s", m.ID, state)
		}
	}
}

func (d *demo) commandOne(ctx context.Context, id identity.ID) (state string, err error) {
	cmd, err := d.client.Send(ctx, id, admin.NewCommand{Name: demoCommand, Args: json.RawMessage(`{"times":3}`)})
	if err != nil {
		return "", err
	}
	if cmd, err = d.client.Command(ctx, id, cmd.CID, answerWait); err != nil {
		return "", err
	}
	d.table.answer(id, &cmd)
	return cmd.State, nil
}

// reckon compares what the devices know with what is on disk: it opens the files anew.
func (d *demo) reckon(ctx context.Context) error {
	if d.fleet == nil {
		return nil
	}
	onDisk, err := d.stored(context.WithoutCancel(ctx))
	if err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	var stored uint64
	for _, m := range d.members {
		stored += uint64(len(onDisk[m.ID.String()]))
	}
	acked := d.fleet.Totals().Acked
	d.say("demo: %d devices, %d messages acknowledged, %d on disk, %d commands answered", d.devices, acked, stored, d.answered)
	if ctx.Err() != nil { // Ctrl-C may have come before all were asked
		return differ(acked, stored, d.answered, d.answered)
	}
	return differ(acked, stored, d.devices, d.answered)
}

// differ is an error where one of the pairs is none.
func differ(acked, stored uint64, asked, answered int) (err error) {
	if acked != stored {
		err = fmt.Errorf("%d messages were acknowledged and %d are on disk", acked, stored)
	}
	if asked != answered {
		err = errors.Join(err, fmt.Errorf("%d devices were given a command and %d answered", asked, answered))
	}
	return err
}

// stored gives the messages of each device in the log, each once: a device may send one
// again over a lost connection.
func (d *demo) stored(ctx context.Context) (map[string]map[string]bool, error) {
	c, done, err := d.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	seen := map[string]map[string]bool{}
	err = c.Tail(ctx, admin.Tail{Topic: "private/+/" + demoTopic}, func(m *admin.Message) error {
		if seen[m.From] == nil {
			seen[m.From] = map[string]bool{}
		}
		seen[m.From][string(m.Payload)] = true
		return nil
	})
	return seen, err
}

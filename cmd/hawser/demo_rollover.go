package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/pki"
	"hawser/internal/sim"
)

const (
	moveDevices = 200
	moveFewest  = 5                // the faulty ones, and one more
	moveWait    = 60 * time.Second // for the devices to arrive, at least
	movePoll    = 200 * time.Millisecond
	tryWait     = 10 * time.Second // for one old certificate
)

// moveFaults are planted: the first arrives, the others do not.
func moveFaults() []sim.Fault { return []sim.Fault{sim.PowerLoss, sim.Liar, sim.Away, sim.ForgedSet} }

const moveLost = 3 // of moveFaults

// rollover moves the fleet while it publishes.
func (d *demo) rollover(ctx context.Context) (err error) {
	d.members, _, err = sim.Enrol(ctx, sim.Enrolment{Client: d.client, Layout: d.layout, Devices: d.devices, Class: "demo"})
	if err != nil {
		return err
	}
	if err := d.startMoving(ctx); err != nil {
		return err
	}
	defer d.fleet.Close()
	d.fleet.Begin(ctx)
	left, err := d.moveAll(ctx)
	if err == nil {
		err = d.retire(ctx, left)
	}
	if err == nil {
		err = d.tryOld(ctx)
	}
	if err != nil {
		return err
	}
	for _, u := range d.fleet.Units() {
		if left := slices.IndexFunc(left, func(l admin.RolloverDevice) bool { return l.ID == u.ID() }); left >= 0 {
			u.PowerOff() // what it has still to say, nobody will ever hear
		}
	}
	if err := d.drain(ctx, d.fleet); err != nil {
		return fmt.Errorf("%w%s", err, d.why())
	}
	return nil
}

func (d *demo) startMoving(ctx context.Context) error {
	cfg, err := d.simConfig(ctx, d.client, d.layout, d.members)
	if err != nil {
		return err
	}
	cfg.Topic, cfg.Rate, cfg.Firmware, cfg.Class, cfg.Faults = demoTopic, d.rate, demoFirmware, "demo", moveFaults()
	if d.fleet, err = sim.Start(ctx, cfg); err != nil {
		return err
	}
	select {
	case <-d.fleet.Connected():
		d.say("%d devices are connected and publish, %g messages a second each", d.devices, d.rate)
		for _, u := range faultyDevices(d.fleet) {
			d.say("  %s is faulty: it %s", u.ID, u.Fault)
		}
		return nil
	case <-time.After(moveWait):
		err = fmt.Errorf("the devices cannot connect%s", d.why())
	case <-ctx.Done():
		err = errMoveStopped
	}
	d.fleet.Close()
	return err
}

var errMoveStopped = errors.New("stopped before the fleet had moved")

// moveAll starts the rollover and waits for all that will arrive. It names the others.
func (d *demo) moveAll(ctx context.Context) (left []admin.RolloverDevice, err error) {
	what := admin.What{Generation: true, Roots: true}
	plan, err := d.client.PlanRollover(ctx, what)
	if err != nil {
		return nil, err
	}
	d.say("moving: device CA generation %s, anchor set %s", step(plan.FromGeneration, plan.ToGeneration), step(plan.FromAnchors, plan.ToAnchors))
	if err := d.quietly(func(a *app) error { return a.startRollover(ctx, d.client, &rollover{what: what}) }); err != nil {
		return nil, err
	}
	began := time.Now()
	r, err := d.followMove(ctx)
	if err != nil {
		return nil, err
	}
	d.say("%d of %d devices have arrived after %.1f s; these have not:", r.Counts["proven"], r.Devices, time.Since(began).Seconds())
	var rows [][]string
	for _, u := range r.Unproven {
		rows = append(rows, []string{"  " + u.ID.String(), u.State, u.Reason})
	}
	d.app.table([]string{"  ID", "STATE", "REASON"}, rows)
	return r.Unproven, d.checkNamed(r.Unproven)
}

// quietly runs another command's code without its words.
func (d *demo) quietly(do func(a *app) error) error {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	quiet := *d.app
	quiet.out, quiet.err = null, null
	return do(&quiet)
}

// followMove waits until the devices that can arrive have arrived, and two of the others are
// known to have failed: the third is away.
func (d *demo) followMove(ctx context.Context) (r admin.Rollover, err error) {
	p := &progress{app: d.app, live: terminal(d.err)}
	defer p.end()
	tick := time.NewTicker(movePoll)
	defer tick.Stop()
	told := time.Now()
	deadline := told.Add(moveWait + time.Duration(d.devices)*100*time.Millisecond)
	for {
		if r, err = d.client.Rollover(ctx, maxNames); err != nil {
			return r, err
		}
		if p.live || time.Since(told) > p.every() {
			told = time.Now()
			p.show("%s", bar(r.Counts["proven"], r.Devices, 40))
		}
		if r.Counts["proven"] == d.devices-moveLost && r.Counts["failed"] == moveLost-1 {
			return r, nil
		}
		if time.Now().After(deadline) {
			return r, fmt.Errorf("only %d of %d devices have arrived%s", r.Counts["proven"], r.Devices, d.why())
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return r, errMoveStopped
		}
	}
}

// checkNamed demands that the devices named are the faulty ones.
func (d *demo) checkNamed(left []admin.RolloverDevice) error {
	named := map[identity.ID]bool{}
	for _, l := range left {
		named[l.ID] = true
	}
	for _, u := range d.fleet.Units() {
		if lost := u.Fault() != sim.Sound && u.Fault() != sim.PowerLoss; named[u.ID()] != lost {
			return fmt.Errorf("%s (%s) should %sbe named", u.ID(), u.Fault(), map[bool]string{false: "not "}[lost])
		}
	}
	return nil
}

// retire is refused, and then granted for those that are left.
func (d *demo) retire(ctx context.Context, left []admin.RolloverDevice) error {
	_, err := d.client.RetireRollover(ctx, nil)
	if err == nil {
		return errors.New("the old generation was retired although devices have not arrived")
	}
	text, _, _ := strings.Cut(err.Error(), "\n")
	d.say("retire is refused: %s", printable(text))
	var waive []identity.ID
	for _, l := range left {
		waive = append(waive, l.ID)
	}
	if _, err := d.client.RetireRollover(ctx, waive); err != nil {
		return err
	}
	d.say("retired, %d devices are waived", len(waive))
	return nil
}

// tryOld shows that the old device CA gets nobody in: each of its certificates is tried, and
// the device that was away comes back. The others stay where they are.
func (d *demo) tryOld(ctx context.Context) error {
	l, err := fleet.OpenLayout(d.dir) // as it is now
	if err != nil {
		return err
	}
	_, set, err := l.Anchors()
	if err != nil {
		return err
	}
	var refusal error
	for _, m := range d.members {
		if refusal = d.tryOne(ctx, m, set); !refused(refusal) {
			return fmt.Errorf("%s was not refused with its certificate of the old generation: %v", m.ID, refusal)
		}
	}
	d.say("all %d certificates of the old generation were tried: %v", len(d.members), refusal)
	away := d.unit(sim.Away)
	away.PowerOn()
	if err := d.wait(ctx, func() bool { return strings.Contains(away.View().Trouble, "remote error: tls: ") }); err != nil {
		return fmt.Errorf("%s, which was away, was not refused: %w", away.ID(), err)
	}
	d.say("%s, which was away, is back and is refused", away.ID())
	if err := d.wait(ctx, func() bool { return d.fleet.Totals().Online == d.devices-moveLost }); err != nil {
		return fmt.Errorf("%d devices are online, not %d: %w%s", d.fleet.Totals().Online, d.devices-moveLost, err, d.why())
	}
	return nil
}

func (d *demo) unit(fault sim.Fault) *sim.Unit {
	units := d.fleet.Units()
	return units[slices.IndexFunc(units, func(u *sim.Unit) bool { return u.Fault() == fault })]
}

func (d *demo) wait(ctx context.Context, ok func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, moveWait)
	defer cancel()
	tick := time.NewTicker(movePoll)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// refused reports whether err is an alert of the server: it has judged the certificate.
func refused(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

// tryOne shows the certificate that m was enrolled with. A client of TLS 1.3 learns the
// verdict from its first read; one that is let in waits there in vain.
func (d *demo) tryOne(ctx context.Context, m *sim.Member, set *pki.AnchorSet) error {
	ctx, cancel := context.WithTimeout(ctx, tryWait)
	defer cancel()
	roots := x509.NewCertPool()
	roots.AddCert(set.InUse)
	dialer := tls.Dialer{Config: &tls.Config{Certificates: []tls.Certificate{m.Cert}, RootCAs: roots, ServerName: demoDomain,
		MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.CurveP256}, NextProtos: []string{"mqtt"}}}
	conn, err := dialer.DialContext(ctx, "tcp", d.server.Addr().String())
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	_, err = conn.Read(make([]byte, 1))
	return err
}

// reckonMove compares, device by device, what was acknowledged with what is on disk. A device
// that lost its power has sent what it never heard of.
func (d *demo) reckonMove(ctx context.Context) error {
	onDisk, err := d.stored(context.WithoutCancel(ctx))
	if err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	var acked, lost uint64
	for _, u := range d.fleet.Units() {
		have := u.View().Acked
		acked += have
		lost += have - min(have, uint64(len(onDisk[u.ID().String()])))
	}
	d.say("demo: %d devices, %d moved to generation 2 and root B, %d named and left behind, %d messages acknowledged, %d of them lost",
		d.devices, d.devices-moveLost, moveLost, acked, lost)
	if lost > 0 {
		return fmt.Errorf("%d messages were acknowledged and are not on disk", lost)
	}
	return nil
}

package device

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"hawser/internal/message"
)

// Between two attempts with what is stored and not proven: this many times the waits of a
// reconnect. By default that is half a minute at first, and an hour in the end.
const (
	retryMin = 30
	retryMax = 12
)

var errMoving = errors.New("reconnecting with another certificate or other anchors")

// trial is how the attempts with what is stored and not proven go. Guarded by Device.mu.
type trial struct {
	tries   int    // attempts that have failed
	failure string // of the last one
	told    string // the failure that the server has heard of
}

// standing is what a report of message.PKIInUse tells.
type standing struct {
	some        bool
	fingerprint [32]byte
	anchors     uint64
}

// offered takes what the server offers, stores it beside the old, says so, and reconnects
// with it. It is all taken or nothing.
func (d *Device) offered(j *job) {
	m, err := message.DecodePKI(j.payload)
	if err != nil {
		d.log.Warn("offer not understood", "device", d.id, "error", err)
		return
	}
	fresh, err := d.install(&m)
	d.acknowledge(*j) // before the report, whose acknowledgement may end the connection
	j.packetID = 0
	r := d.report(message.PKIInstalled)
	r.No = m.No
	var stored func()
	switch p := d.pkiNow(); {
	case err != nil:
		d.log.Warn("offer refused", "device", d.id, "offer", m.No, "reason", err)
		r.State, r.Text = message.PKIRefused, shortText(err.Error())
	case !p.unproven():
		r.State = message.PKIInUse // already: there is nothing to try
	case fresh:
		stored = func() { d.leave(j.from) }
	default:
		r.Text = d.trialNow().failure
	}
	d.enqueue(d.reportMessage(r, stored))
}

// install stores what m offers. fresh: it has to be tried now. Without it, the same was
// offered before and is tried again when its time comes.
func (d *Device) install(m *message.PKI) (fresh bool, err error) {
	d.stateMu.Lock()
	defer d.stateMu.Unlock()
	was := d.pkiHeld()
	next := was
	if m.Certificate != nil {
		if err := d.checkOwn(m.Certificate); err != nil {
			return false, err
		}
		next.pending = m.Certificate
		if cert, _ := d.inUse(&next); bytes.Equal(cert, m.Certificate) {
			next.pending = nil // the server is back to what it had
		}
	}
	if m.Anchors != nil {
		if err := d.takeSet(&next, m.Anchors); err != nil {
			return false, err
		}
	}
	fresh = !next.same(&was)
	if next.offer = m.No; !fresh && next.offer == was.offer {
		return false, nil
	}
	if err := d.updatePKI(next); err != nil || !fresh {
		return false, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.trial = trial{}
	return true, nil
}

// takeSet makes an offered set the pending one. The same set again is no replay.
func (d *Device) takeSet(next *pkiState, offered []byte) error {
	held := next.set
	if held == nil {
		held = d.cfg.Anchors
	}
	if bytes.Equal(offered, held) || bytes.Equal(offered, next.newSet) {
		return nil
	}
	sequence, err := d.checkSet(next, offered)
	if err == nil && sequence <= next.newSequence {
		err = fmt.Errorf("anchor set is not newer than the one that waits to be tried: number %d, held %d", sequence, next.newSequence)
	}
	if err != nil {
		return err
	}
	next.newSet, next.newSequence = offered, sequence
	return nil
}

// report is what there is to say of certificate and anchors.
func (d *Device) report(state message.PKIState) message.PKIReport {
	p := d.pkiNow()
	_, sequence := d.inUse(&p)
	r := message.PKIReport{State: state, Fingerprint: d.fingerprint(&p), Anchors: sequence, Pending: p.newSequence}
	if state == message.PKIInstalled || !p.unproven() {
		r.No = p.offer
	}
	return r
}

// reportMessage carries r; stored is called when the server has it. It ends with its
// connection: on the next one it may not be true any more, and reports tells what is.
func (d *Device) reportMessage(r message.PKIReport, stored func()) *outgoing {
	m := d.ownMessage("u/pki", r.Encode(d.encoding()))
	m.passing = true
	m.done = func(err error) {
		if err != nil {
			return
		}
		d.told(r)
		if stored != nil {
			stored()
		}
	}
	return m
}

// reportMessages are reports, ready to be sent.
func (d *Device) reportMessages() (all []*outgoing) {
	for _, r := range d.reports() {
		all = append(all, d.reportMessage(r, nil))
	}
	return all
}

// told notes what the server knows.
func (d *Device) told(r message.PKIReport) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r.State == message.PKIInUse {
		d.known = standing{true, r.Fingerprint, r.Anchors}
	} else if r.Text == d.trial.failure {
		d.trial.told = r.Text
	}
}

// reports are what a new connection has to tell: what it has proved, if the server does not
// know it from this process, and what it could not be made with.
func (d *Device) reports() (all []message.PKIReport) {
	p := d.pkiNow()
	r := d.report(message.PKIInUse)
	trial := d.trialNow()
	d.mu.Lock()
	known := d.known
	d.mu.Unlock()
	if known != (standing{true, r.Fingerprint, r.Anchors}) {
		all = append(all, r)
	}
	if p.unproven() && trial.failure != trial.told {
		r := d.report(message.PKIInstalled)
		r.Text = trial.failure
		all = append(all, r)
	}
	return all
}

func (d *Device) trialNow() trial {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.trial
}

// noteFailure notes an attempt that has reached a server and was in vain.
func (d *Device) noteFailure(c credentials, how stage, err error) {
	p := d.pkiNow()
	if !(p.pending != nil && bytes.Equal(c.cert, p.pending) || p.newSet != nil && bytes.Equal(c.set, p.newSet)) {
		if how == turnedAway {
			d.refused++
		}
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.trial.failure == "" {
		d.log.Warn("what was installed does not work yet", "device", d.id, "error", err)
	}
	d.trial.failure = shortText(err.Error())
}

// leave ends the connection s in order, for one with what was installed. It does not wait.
func (d *Device) leave(s *session) {
	d.mu.Lock()
	if d.conn != s {
		d.mu.Unlock()
		return
	}
	d.moving = true
	d.mu.Unlock()
	d.goodbye(s)
}

// moved reports, once, whether the last connection was left for another one.
func (d *Device) moved() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	moving := d.moving
	d.moving = false
	return moving
}

// retryLater has a connection that was made with what is known to work left after a while,
// for another attempt with what is not proven yet. stop must be called.
func (d *Device) retryLater(s *session) (stop func()) {
	if p := d.pkiNow(); !p.unproven() {
		return func() {}
	}
	d.mu.Lock()
	n := d.trial.tries
	d.trial.tries++
	d.mu.Unlock()
	wait := backoff(n, retryMin*d.cfg.BackoffMin, retryMax*d.cfg.BackoffMax)
	t := time.AfterFunc(wait, func() { d.leave(s) })
	return func() { t.Stop() }
}

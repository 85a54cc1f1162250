package device

import (
	"context"
	"errors"
	"strings"
	"time"
	"unicode"

	"hawser/internal/message"
	"hawser/internal/mqtt"
)

// maxJobs bounds what waits for the handlers. A 5.0 server is held to receiveMaximum.
const maxJobs = 64

// job is one message of the server that a handler has to see. from is acknowledged
// afterwards, unless that connection is gone: then the server sends it again.
type job struct {
	from     *session
	packetID uint16 // 0: QoS 0, or acknowledged already
	topic    string // beginning with "d/"
	payload  []byte
}

// serverTime is the last d/time: what it said and when, by the monotonic clock.
type serverTime struct {
	said, at time.Time
}

func (t serverTime) now() (time.Time, bool) {
	if t.at.IsZero() {
		return time.Time{}, false
	}
	return t.said.Add(time.Since(t.at)), true
}

// report is what u/cfg last said.
type report struct {
	message.ConfigReport
	some bool
}

// receive takes a message of the server. The time is taken at once; all else may need a
// handler and goes to the worker.
func (d *Device) receive(ctx context.Context, s *session, p *mqtt.Publish) error {
	topic, ours := strings.CutPrefix(string(p.Topic), d.id.Topic(""))
	switch {
	case p.Alias != 0:
		return &mqtt.Error{Code: mqtt.TopicAliasInvalid, Text: "topic alias, though none is allowed"}
	case p.QoS > 1 || !ours || !strings.HasPrefix(topic, "d/") && topic != "d":
		return &mqtt.Error{Code: mqtt.ProtocolError, Text: "message that was not subscribed to"}
	case topic == "d/time" && p.QoS == 0:
		d.setTime(s, p.Payload)
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.jobs) >= maxJobs {
		return errors.New("the server sends faster than the handlers work")
	}
	d.jobs = append(d.jobs, job{s, p.PacketID, topic, append([]byte(nil), p.Payload...)})
	if !d.working {
		d.working = true
		d.workers.Add(1)
		go d.work(ctx)
	}
	return nil
}

// work does the jobs there are and ends: an idle device has no goroutine for it.
func (d *Device) work(ctx context.Context) {
	defer d.workers.Done()
	for {
		d.mu.Lock()
		if len(d.jobs) == 0 || ctx.Err() != nil {
			d.working = false
			d.mu.Unlock()
			return
		}
		j := d.jobs[0]
		d.jobs = d.jobs[1:]
		d.mu.Unlock()
		if err := d.do(ctx, &j); err != nil {
			d.abandon(j.from, err)
			continue
		}
		d.acknowledge(j)
	}
}

func (d *Device) do(ctx context.Context, j *job) error {
	switch j.topic {
	case "d/cmd":
		return d.command(ctx, j.payload)
	case "d/cfg":
		d.configure(ctx, j.payload)
	case "d/pki":
		d.offered(j)
	case "d/time":
		d.setTime(j.from, j.payload)
	default:
		if d.cfg.Message != nil {
			d.cfg.Message(ctx, j.topic, j.payload)
		}
	}
	return nil
}

func (d *Device) acknowledge(j job) {
	if j.packetID == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn != j.from || !j.from.closeBy.IsZero() {
		return
	}
	ack := mqtt.Ack{Type: mqtt.PUBACK, PacketID: j.packetID}
	j.from.out = ack.Append(j.from.out, d.version)
	d.flush(j.from)
}

// abandon ends the connection whose message could not be dealt with: the server sends it
// again on the next one.
func (d *Device) abandon(s *session, err error) {
	d.log.Error("message left to be sent again", "device", d.id, "error", err)
	d.mu.Lock()
	defer d.mu.Unlock()
	if s.failed == nil {
		s.failed = err
	}
	s.conn.Close()
}

// setTime takes the server's time if it lies within the validity of the leaf that the
// server has just proved to hold: a clock beyond that would make the leaf itself a lie.
func (d *Device) setTime(s *session, payload []byte) {
	m, err := message.DecodeTime(payload)
	if err != nil || m.Seconds > 1<<40 {
		d.log.Warn("time not understood", "device", d.id, "error", err)
		return
	}
	said := time.Unix(int64(m.Seconds), int64(m.Millis)*1e6)
	if said.Before(s.leaf.NotBefore) || said.After(s.leaf.NotAfter) {
		d.log.Warn("time outside the validity of the server's certificate", "device", d.id, "time", said.UTC())
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.clock = serverTime{said, time.Now()}
}

// command runs a command at most once. The error says that its number could not be
// stored: then nothing was done, and nothing is answered.
func (d *Device) command(ctx context.Context, payload []byte) error {
	cmd, err := message.DecodeCommand(payload)
	if err != nil {
		d.log.Warn("command not understood", "device", d.id, "error", err)
		return nil
	}
	if !d.higher(cmd.CID) {
		d.answer(message.Answer{CID: cmd.CID, Status: message.Duplicate})
		return nil
	}
	if err := d.update(func(s *state) { s.cid = cmd.CID }); err != nil {
		return err
	}
	if now, ok := d.Time(); ok && cmd.Expiry != 0 && now.Unix() >= 0 && uint64(now.Unix()) >= cmd.Expiry {
		d.answer(message.Answer{CID: cmd.CID, Status: message.Expired})
		return nil
	}
	d.answer(d.execute(ctx, cmd))
	return nil
}

func (d *Device) higher(cid uint64) bool {
	d.stateMu.Lock()
	defer d.stateMu.Unlock()
	return cid > d.state.cid
}

func (d *Device) execute(ctx context.Context, cmd Command) message.Answer {
	a := message.Answer{CID: cmd.CID, Status: message.UnknownCommand}
	if d.cfg.Command == nil {
		return a
	}
	result, err := d.cfg.Command(ctx, cmd)
	switch {
	case errors.Is(err, ErrUnknownCommand):
		return a
	case err != nil:
		a.Status = message.Failed
		result, err = message.ValueOf(shortText(err.Error()))
	default:
		a.Status = message.OK
		if result != nil {
			result, err = message.ParseValue(result)
		}
	}
	if err != nil {
		a.Status = message.Failed
		result, _ = message.ValueOf("the handler's result is not one CBOR item")
	}
	a.Result = result
	return a
}

func (d *Device) answer(a message.Answer) {
	d.post("u/cmd", a.Encode(d.encoding()), false)
}

// configure hands a configuration to the application, once per version, and reports.
func (d *Device) configure(ctx context.Context, payload []byte) {
	cfg, err := message.DecodeConfig(payload)
	if err != nil {
		d.log.Warn("configuration not understood", "device", d.id, "error", err)
		return
	}
	d.mu.Lock()
	last := d.applied
	d.mu.Unlock()
	switch {
	case last.some && cfg.Version < last.Version:
		return
	case !last.some || cfg.Version > last.Version:
		last = report{d.apply(ctx, cfg), true}
		d.mu.Lock()
		d.applied = last
		d.mu.Unlock()
	}
	d.post("u/cfg", last.Encode(d.encoding()), true)
}

func (d *Device) apply(ctx context.Context, cfg message.Config) message.ConfigReport {
	r := message.ConfigReport{Version: cfg.Version}
	err := errors.New("this device takes no configuration")
	if d.cfg.Configure != nil {
		err = d.cfg.Configure(ctx, cfg.Version, cfg.Document)
	}
	if err != nil {
		r.Status, r.Text = message.Refused, shortText(err.Error())
	}
	return r
}

// shortText makes an error's text one that a message may carry.
func shortText(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
	if len(s) > message.MaxText {
		s = strings.ToValidUTF8(s[:message.MaxText], "")
	}
	return s
}

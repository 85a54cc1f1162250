package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"hawser/internal/broker"
	"hawser/internal/command"
	"hawser/internal/config"
	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// retryAfter is how long a change that the registry could not write waits.
const retryAfter = time.Second

// uplink takes what devices say on Hawser's own topics to where it belongs. The
// log's checkpoint does not pass a message that is not settled yet, so a crash
// repeats it and loses none.
type uplink struct {
	reg  *registry.Registry
	cmds *command.Service // set before the first message
	down *downlink        // the same
	log  *slog.Logger
	work *worker

	onClone string        // config.CloneReport or config.CloneQuarantine
	clones  atomic.Uint64 // reported since the start

	mu   sync.Mutex
	open []*said // mu; in log order, the first is not settled
}

// said is one message on its way.
type said struct {
	pos     msglog.Pos
	remote  string // of the connection it came over; empty when the log is replayed
	settled bool   // guarded by uplink.mu
}

// take is broker.Config.Uplink. It copies and does not wait.
func (u *uplink) take(id identity.ID, rest string, r *msglog.Record) {
	m := &said{pos: r.Pos, remote: broker.RemoteOf(r)}
	payload, at := bytes.Clone(r.Payload), time.UnixMilli(r.Time)
	u.mu.Lock()
	u.open = append(u.open, m)
	u.mu.Unlock()
	u.work.do(func() { u.handle(id, rest, payload, at, m) })
}

// floor is broker.Config.UplinkFloor.
func (u *uplink) floor() msglog.Pos {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.open) == 0 {
		return 0
	}
	return u.open[0].pos
}

func (u *uplink) settle(m *said) {
	u.mu.Lock()
	defer u.mu.Unlock()
	m.settled = true
	for len(u.open) > 0 && u.open[0].settled {
		u.open[0] = nil
		u.open = u.open[1:]
	}
	if len(u.open) == 0 {
		u.open = nil
	}
}

func (u *uplink) handle(id identity.ID, rest string, payload []byte, at time.Time, m *said) {
	var err error
	switch rest {
	case "u/hello":
		err = u.hello(id, payload, at, m)
	case "u/cfg":
		err = u.config(id, payload, at, m)
	case "u/cmd":
		// The outcome is submitted when Answer returns: the checkpoint, submitted
		// later, covers it.
		err = u.cmds.Answer(id, payload)
		u.settle(m)
	default:
		u.settle(m)
	}
	if err != nil {
		u.log.Warn("message of a device not understood", "topic", id.Topic(rest), "error", err)
		u.settle(m)
	}
}

func (u *uplink) hello(id identity.ID, payload []byte, at time.Time, m *said) error {
	h, err := message.DecodeHello(payload)
	if err != nil {
		return err
	}
	enc, err := message.EncodingOf(payload)
	if err != nil {
		return err
	}
	u.down.speaks(id, enc)
	u.cmds.SetEncoding(id, enc)
	row := registry.Hello{Class: h.Class, Firmware: h.Firmware, Image: h.Image, TLS: h.TLS, Boot: h.Boot,
		Nonce: h.Nonce, Features: h.Features, Encoding: encodingName(enc), At: at, Remote: m.remote, Pos: uint64(m.pos)}
	var clone *registry.Clone
	u.save(m, func(tx *registry.Tx) (err error) {
		if clone, err = tx.SaveHello(id, row); err != nil || clone == nil || u.onClone != config.CloneQuarantine {
			return err
		}
		return quarantine(tx, clone)
	}, func() { u.cloned(clone) })
	return nil
}

// quarantine shuts a device out of which there are two. One that is barred already
// stays as it is.
func quarantine(tx *registry.Tx, c *registry.Clone) error {
	reason := fmt.Sprintf("two holders of one identity: %s and %s", addressText(c.Back.Remote), addressText(c.Other.Remote))
	err := tx.SetDeviceState("server", c.Device, registry.DeviceQuarantined, reason)
	if errors.Is(err, registry.ErrState) {
		return nil
	}
	return err
}

func addressText(remote string) string {
	if remote == "" {
		return "an address not known"
	}
	return remote
}

// cloned says that the boots of a device have proved a second holder.
func (u *uplink) cloned(c *registry.Clone) {
	if c == nil {
		return
	}
	u.clones.Add(1)
	u.log.Warn("two holders of one identity", "device", c.Device.String(), "one", addressText(c.Back.Remote), "other", addressText(c.Other.Remote),
		"policy", u.onClone)
}

func encodingName(e message.Encoding) string {
	if e == message.JSON {
		return "json"
	}
	return "cbor"
}

func (u *uplink) config(id identity.ID, payload []byte, at time.Time, m *said) error {
	c, err := message.DecodeConfigReport(payload)
	if err != nil {
		return err
	}
	u.save(m, func(tx *registry.Tx) error {
		return tx.ConfigApplied(id, c.Version, uint8(c.Status), c.Text, at)
	}, nil)
	return nil
}

// save writes a change, again and again if the registry cannot; then is called once
// when it is written, and may be nil.
func (u *uplink) save(m *said, apply func(*registry.Tx) error, then func()) {
	u.reg.Submit(apply, func(err error) {
		switch {
		case err == nil:
			if then != nil {
				then()
			}
			u.settle(m)
		case errors.Is(err, registry.ErrClosed): // the next start repeats it
		case errors.Is(err, registry.ErrNotFound), errors.Is(err, registry.ErrInvalid):
			u.log.Warn("word of a device not recorded", "error", err)
			u.settle(m)
		default:
			u.log.Error("word of a device not recorded yet", "error", err)
			time.AfterFunc(retryAfter, func() { u.save(m, apply, then) })
		}
	})
}

// downlink is what the server says of its own accord: the time, and the desired
// configuration as a retained message.
type downlink struct {
	s *Server

	mu     sync.Mutex
	json   map[identity.ID]bool // mu; devices whose last hello was in JSON
	behind map[identity.ID]bool // mu; configurations that the log did not take yet
}

func newDownlink(ctx context.Context, s *Server) (*downlink, error) {
	d := &downlink{s: s, json: map[identity.ID]bool{}, behind: map[identity.ID]bool{}}
	return d, s.reg.JSONDevices(ctx, func(id identity.ID) { d.json[id] = true })
}

// encoding is how a device wants to be spoken to.
func (d *downlink) encoding(id identity.ID) message.Encoding {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.json[id] {
		return message.JSON
	}
	return message.CBOR
}

// speaks notes the encoding of a hello. A configuration that stands in the other
// one is published again.
func (d *downlink) speaks(id identity.ID, enc message.Encoding) {
	d.mu.Lock()
	same := d.json[id] == (enc == message.JSON)
	if enc == message.JSON {
		d.json[id] = true
	} else {
		delete(d.json, id)
	}
	d.mu.Unlock()
	if !same {
		d.publishConfig(id)
	}
}

// subscribed is told of each subscription that a device has made or resumed.
func (d *downlink) subscribed(id identity.ID, filter string) {
	enc := d.encoding(id)
	if identity.Match(filter, id.Topic("d/time")) {
		now := time.Now()
		m := message.Time{Seconds: uint64(now.Unix()), Millis: uint16(now.Nanosecond() / 1e6)}
		d.s.br.SendVolatile(id, "d/time", m.Encode(enc))
	}
	if identity.Match(filter, id.Topic("d/cmd")) {
		d.s.cmds.Ready(id, enc)
	}
}

// publishConfig makes the retained d/cfg of a device what the registry desires.
func (d *downlink) publishConfig(id identity.ID) {
	c, err := d.s.reg.DeviceConfig(context.Background(), id)
	if err != nil {
		if !errors.Is(err, registry.ErrClosed) {
			d.s.log.Error("desired configuration not read", "device", id, "error", err)
			d.later(id)
		}
		return
	}
	if c.Version == 0 {
		return
	}
	topic := id.Topic("d/cfg")
	payload := message.Config{Version: c.Version, Document: c.Document}.Encode(d.encoding(id))
	if have, ok := d.s.br.Retained(topic); ok && bytes.Equal(have, payload) {
		return
	}
	d.s.br.PublishServer(topic, payload, 1, true, func(err error) {
		if err != nil && !errors.Is(err, msglog.ErrClosed) {
			d.s.log.Warn("desired configuration not published yet", "device", id, "error", err)
			d.later(id)
		}
	})
}

func (d *downlink) later(id identity.ID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.behind[id] = true
}

// catchUp publishes what could not be published before.
func (d *downlink) catchUp() {
	d.mu.Lock()
	list := d.behind
	d.behind = map[identity.ID]bool{}
	d.mu.Unlock()
	for id := range list {
		d.publishConfig(id)
	}
}

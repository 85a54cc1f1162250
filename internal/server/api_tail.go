package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"time"
	"unicode/utf8"

	"hawser/internal/admin"
	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/msglog"
)

// tail streams messages as lines. The last line says that it is whole, or why not.
func (b *backend) tail(w http.ResponseWriter, r *http.Request) {
	p := params{r: r}
	t := admin.Tail{Name: p.text("name"), Topic: p.text("topic"), Since: p.time("since"), Limit: p.limit(),
		Reverse: p.isSet("reverse"), Follow: p.isSet("follow")}
	err := p.err
	if err == nil {
		err = b.checkTail(r.Context(), &t)
	}
	var l *msglog.Log
	if err == nil {
		l, err = b.openLog(r.Context())
	}
	if err != nil {
		refuse(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := &lines{w: w, enc: json.NewEncoder(w), flush: http.NewResponseController(w)}
	err = b.walk(r.Context(), l, t, out)
	var last *admin.Error
	if err != nil {
		last = apiError(err)
	}
	_ = out.enc.Encode(admin.TailEnd(last)) // a client that has gone hears nothing anyway
}

// checkTail refuses what would be answered with silence.
func (b *backend) checkTail(ctx context.Context, t *admin.Tail) error {
	if t.Topic != "" {
		if err := identity.CheckFilter(t.Topic); err != nil {
			return admin.Errorf(admin.Invalid, "topic filter %q: %v", t.Topic, err)
		}
	}
	if t.Reverse && t.Follow {
		return admin.Errorf(admin.Invalid, "newest first cannot be followed")
	}
	if t.Follow {
		if err := b.needServer("following"); err != nil {
			return err
		}
	}
	if t.Name == "" {
		return nil
	}
	if id, err := identity.ParseID(t.Name); err == nil {
		_, err = b.reg.Device(ctx, id)
		return err
	}
	if err := identity.CheckName(t.Name); err != nil {
		return admin.Errorf(admin.Invalid, "%q is neither a device id nor the name of a service", t.Name)
	}
	_, err := b.reg.Service(ctx, t.Name)
	return err
}

// lines writes messages to a client.
type lines struct {
	w     http.ResponseWriter
	enc   *json.Encoder
	flush *http.ResponseController
	last  msglog.Pos // of the newest message written
}

func (o *lines) put(r *msglog.Record) error {
	o.last = max(o.last, r.Pos)
	return o.enc.Encode(messageOf(r))
}

// walk writes what t selects.
func (b *backend) walk(ctx context.Context, l *msglog.Log, t admin.Tail, out *lines) error {
	from := l.End()
	q := msglog.Query{Name: t.Name, Filter: t.Topic, Since: t.Since, Limit: t.Limit, Reverse: t.Reverse}
	var err error
	if t.Limit > 0 && !t.Reverse {
		err = newest(ctx, l, q, out)
	} else {
		err = l.History(ctx, q, out.put)
	}
	if err != nil || !t.Follow {
		return err
	}
	return b.follow(ctx, l, from, t, out)
}

// errEnough ends a walk that has given all that was wanted.
var errEnough = errors.New("enough")

// newest writes the newest q.Limit messages, oldest first. It walks backwards to
// find where they begin, then forwards: memory does not grow with their number.
func newest(ctx context.Context, l *msglog.Log, q msglog.Query, out *lines) error {
	var count int
	var first msglog.Pos
	since := int64(math.MaxInt64) // the clock may have been set back in between
	q.Reverse = true
	err := l.History(ctx, q, func(r *msglog.Record) error {
		count, first, since = count+1, r.Pos, min(since, r.Time)
		return nil
	})
	if err != nil || count == 0 {
		return err
	}
	q.Reverse, q.Limit, q.Since = false, 0, time.UnixMilli(since)
	err = l.History(ctx, q, func(r *msglog.Record) error {
		if r.Pos < first {
			return nil
		}
		if count == 0 {
			return errEnough
		}
		count--
		return out.put(r)
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

// follow writes what comes from position from on and was not written yet.
func (b *backend) follow(ctx context.Context, l *msglog.Log, from msglog.Pos, t admin.Tail, out *lines) error {
	for {
		if err := out.flush.Flush(); err != nil {
			return err
		}
		changed := l.Changed()
		err := l.Read(ctx, from, func(r *msglog.Record) error {
			from = r.Pos.Next()
			if r.Pos <= out.last || !selects(&t, r) {
				return nil
			}
			return out.put(r)
		})
		if err != nil {
			return err
		}
		if err := out.flush.Flush(); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-b.srv.ending:
			return errors.New("the server stops")
		}
	}
}

// selects is what History does, for a record that was just read.
func selects(t *admin.Tail, r *msglog.Record) bool {
	if r.Kind != msglog.KindPublish {
		return false
	}
	if t.Topic != "" && !identity.Match(t.Topic, r.Topic) {
		return false
	}
	if t.Name == "" || r.From.Name == t.Name && r.From.Kind != identity.Server {
		return true
	}
	id, _, ok := identity.DeviceTopic(r.Topic)
	return ok && r.From.Kind != identity.Device && id.String() == t.Name
}

func messageOf(r *msglog.Record) *admin.Message {
	m := &admin.Message{Pos: uint64(r.Pos), Time: timeOf(r.Time), From: r.From.Name, Client: r.ClientID, Topic: r.Topic,
		QoS: r.QoS, Retain: r.Retain}
	if r.From.Kind == identity.Device {
		m.Client = ""
	}
	m.Encoding, m.Payload = show(r.Payload)
	return m
}

// show decodes a payload for people: JSON as it is, CBOR maps and arrays as
// JSON, all else as hex.
func show(payload []byte) (encoding string, v json.RawMessage) {
	if len(payload) > 0 && utf8.Valid(payload) && json.Valid(payload) {
		var b bytes.Buffer
		if json.Compact(&b, payload) == nil {
			return "json", b.Bytes()
		}
	}
	if len(payload) > 0 && payload[0] >= 0x80 && payload[0] <= 0xBF { // a CBOR array or map (RFC 8949 3.1)
		if v, err := message.ParseValue(payload); err == nil {
			return "cbor", v.JSON()
		}
	}
	return "hex", []byte(`"` + admin.Hex(payload).String() + `"`)
}

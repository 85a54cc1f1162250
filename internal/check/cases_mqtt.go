package check

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"time"

	"hawser/internal/mqtt"
)

const packetClause = "MQTT 3.1.1 4.8; MQTT 5.0 4.13"

// packetCases: a broker with the right certificate that speaks MQTT badly. It stands
// for a bug, or a broker that was taken over: the client must not break.
func packetCases() []Case {
	long := append([]byte{0x30, 0x06, 0xff, 0xff}, "abcd"...)
	malformed := []struct {
		id, does string
		first    []byte // in place of CONNACK
		later    []byte // after CONNACK
	}{
		{id: "type", does: "a packet of the reserved type 0", later: []byte{0x00, 0}},
		{id: "flags", does: "a PINGRESP with reserved flags", later: []byte{0xd5, 0}},
		{id: "qos3", does: "a PUBLISH of QoS 3", later: append([]byte{0x36, 7, 0, 1, 't', 0, 1}, "xx"...)},
		{id: "length5", does: "a remaining length of five bytes", later: []byte{0x30, 0xff, 0xff, 0xff, 0xff, 0x7f}},
		{id: "length-max", does: "a PUBLISH that announces 268,435,455 bytes", later: append([]byte{0x30, 0xff, 0xff, 0xff, 0x7f, 0, 1, 't'}, make([]byte, 4000)...)},
		{id: "topic", does: "a topic longer than its packet", later: long},
		{id: "early", does: "a PUBLISH before CONNACK", first: []byte{0x30, 4, 0, 1, 't', 'x'}},
		{id: "connack-short", does: "a CONNACK of one byte", first: []byte{0x20, 1, 0}},
		{id: "utf8", does: "a topic that is not UTF-8", later: []byte{0x30, 5, 0, 2, 0xff, 0xfe, 'x'}},
		{id: "wildcard", does: "a PUBLISH on a topic with wildcards", later: []byte{0x30, 5, 0, 1, '#', 'x', 'x'}},
	}
	var cases []Case
	for _, m := range malformed {
		c := Case{ID: "M1." + m.id, Does: m.does, kind: survive, Expect: "closes, without a crash, and comes back", Clause: packetClause,
			play: malformedPlay(m.first, m.later)}
		if m.later != nil {
			c.Needs = "stays"
		}
		cases = append(cases, c)
	}
	return cases
}

// malformedPlay sends what no broker sends, and sees what becomes of the client.
func malformedPlay(first, later []byte) func(*stage) error {
	return func(s *stage) error {
		if err := s.shake(s.server()); err != nil {
			return err
		}
		if err := s.hear(); err != nil {
			return err
		}
		if first != nil {
			if _, err := s.Write(first); err != nil {
				return err
			}
			return s.closes(s.limit)
		}
		if err := s.send(&mqtt.Connack{}); err != nil {
			return err
		}
		if _, err := s.Write(later); err != nil {
			return err
		}
		return s.closes(s.limit)
	}
}

// closes judges whether the client ended the connection.
func (s *stage) closes(limit time.Duration) error {
	err := s.attend(limit, nil)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		s.Drain(limit) // it may have gone while it was written to
	}
	switch {
	case s.did.bye:
		return s.settle(Pass, "it said goodbye")
	case errors.Is(err, io.EOF) || s.gave():
		return s.settle(Pass, "it ended the connection: %s", s.Seen.EndText())
	}
	return s.settle(Warn, "it goes on as if nothing were wrong")
}

// sessionCases: a broker that is correct by the letter and no help.
func sessionCases() []Case {
	cases := []Case{
		{ID: "M2.no-codes", Does: "a SUBACK without codes", Needs: "subscribe", kind: survive, Expect: "gives up or subscribes again", play: suback(func(id uint16, _ int) []byte {
			return []byte{0x90, 2, byte(id >> 8), byte(id)}
		})},
		{ID: "M2.other-id", Does: "a SUBACK for another packet id", Needs: "subscribe", kind: survive, Expect: "gives up or subscribes again", play: suback(func(id uint16, n int) []byte {
			return append([]byte{0x90, byte(2 + n), byte((id + 1) >> 8), byte(id + 1)}, make([]byte, n)...)
		})},
		{ID: "M2.refused", Does: "a SUBACK that refuses", Needs: "subscribe", kind: survive, Expect: "reports it, and goes on or tries again", play: suback(func(id uint16, n int) []byte {
			return append([]byte{0x90, byte(2 + n), byte(id >> 8), byte(id)}, bytes.Repeat([]byte{0x80}, n)...)
		})},
		{ID: "M3.foreign-topic", Does: "a message on a topic that was never subscribed to", Needs: "stays", kind: survive, Expect: "ignores it", play: unasked("somewhere/else")},
		{ID: "M3.other-device", Does: "another device's command", Needs: "stays", kind: survive, Expect: "does not obey it", play: unasked("private/0BADCAFE/d/cmd")},
		{ID: "M4.payload", Does: "a message of 200,000 bytes", Needs: "subscribe stays", kind: survive, Expect: "takes it, or reconnects in order", play: payload},
		{ID: "M4.retained", Does: "1,000 retained messages at once", Needs: "subscribe stays", kind: survive, Expect: "takes them, or reconnects in order", play: retained},
		{ID: "M5.duplicate", Does: "a command that is delivered twice", Needs: "subscribe stays", kind: selfJudged, Expect: "acknowledges both and runs it once", play: duplicate},
		{ID: "M5.replay", Does: "the same command again after a reconnect", Needs: "subscribe stays", kind: selfJudged, Expect: "runs it once", play: replay},
		{ID: "M6.present", Does: "a CONNACK that claims a session", kind: survive, Expect: "subscribes again or gives up", Needs: "subscribe stays", play: present},
		{ID: "M6.kicked", Does: "refusals 1 to 5, one after the other", Needs: "stays", kind: selfJudged, Expect: "waits longer each time, with jitter, never under a second", play: backoff(func(s *stage, n int) error {
			_, err := s.Write([]byte{0x20, 2, 0, byte(1 + n%5)})
			return err
		})},
		{ID: "M7.kicked", Does: "a CONNACK, and the connection closed at once, again and again", Needs: "stays", kind: selfJudged, Expect: "waits longer each time, with jitter, never under a second", play: backoff(func(s *stage, _ int) error {
			return s.send(&mqtt.Connack{})
		})},
		{ID: "M7.no-connack", Does: "no CONNACK", kind: silence, Needs: "stays", Expect: "gives up by its own time-out and tries again", play: func(s *stage) error {
			if err := s.shake(s.server()); err != nil {
				return err
			}
			return s.hear()
		}},
		{ID: "M8.no-puback", Does: "no PUBACK", Needs: "qos1 stays", kind: silence, Expect: "sends it again, or reconnects", play: deaf(mqtt.PUBLISH)},
		{ID: "M8.no-suback", Does: "no SUBACK", Needs: "subscribe stays", kind: silence, Expect: "subscribes again, or reconnects", play: deaf(mqtt.SUBSCRIBE)},
		{ID: "M8.no-pingresp", Does: "no PINGRESP", Needs: "stays", kind: silence, Expect: "reconnects", play: deaf(mqtt.PINGREQ)},
	}
	for i := range 5 {
		cases = append(cases, Case{ID: fmt.Sprintf("M6.refused-%d", i+1), Does: fmt.Sprintf("CONNACK with refusal %d", i+1), kind: survive,
			Expect: "gives up this attempt, and tries again later", play: malformedPlay([]byte{0x20, 2, 0, byte(i + 1)}, nil)})
	}
	return withDefaults(cases, "does not break", "MQTT 3.1.1 3.2.2.3, 3.8.4, 4.4; MQTT 5.0 3.2.2.2, 4.4")
}

// present: who asked for a clean session and believes that there is an old one hears
// nothing from now on. Who asked for the old one may believe it.
func present(s *stage) error {
	if err := s.lure(s.server()); err != nil {
		return err
	}
	if err := s.send(&mqtt.Connack{SessionPresent: true}); err != nil {
		return err
	}
	err := s.attend(s.limit/2, func(h mqtt.Header) bool { return h.Type == mqtt.SUBSCRIBE })
	switch {
	case err == nil && s.did.subscribed:
		return s.settle(Pass, "it subscribes all the same")
	case err == nil || s.gave():
		return s.settle(Pass, "it ended the connection: %s", s.Seen.EndText())
	case s.connect.CleanStart:
		return s.settle(Fail, "it asked for a clean session, and does not subscribe: it hears nothing from now on")
	}
	return s.settle(Pass, "it had asked for its old session, and takes it for that one")
}

func (s *stage) closesOrStays() error {
	if err := s.closes(s.limit / 2); err != nil || s.verdict != Warn {
		return err
	}
	return s.settle(Pass, "it goes on")
}

// subscribes waits for the client's SUBSCRIBE and answers what comes before it.
func (s *stage) subscribes() (h mqtt.Header, body []byte, err error) {
	for {
		if h, body, err = s.packet(); err != nil || h.Type == mqtt.SUBSCRIBE {
			return h, body, err
		}
		if err := s.answer(h, body); err != nil {
			return h, nil, err
		}
	}
}

// suback answers the client's SUBSCRIBE with bytes of its own, of 3.1.1 where that differs.
func suback(make func(id uint16, filters int) []byte) func(*stage) error {
	return func(s *stage) error {
		if err := s.welcome(); err != nil {
			return err
		}
		h, body, err := s.subscribes()
		if err != nil {
			return err
		}
		p, err := s.readSubscribe(h, body)
		if err != nil {
			return err
		}
		b := make(p.PacketID, len(p.Filters))
		if s.version == mqtt.V5 { // no properties
			b = append(append(bytes.Clone(b[:4]), 0), b[4:]...)
			b[1]++
		}
		if _, err := s.Write(b); err != nil {
			return err
		}
		return s.closesOrStays()
	}
}

func unasked(topic string) func(*stage) error {
	return func(s *stage) error {
		if err := s.welcome(); err != nil {
			return err
		}
		if err := s.send(&mqtt.Publish{Topic: []byte(topic), Payload: []byte(`{"cid":"1","expiry":"0","name":"check"}`)}); err != nil {
			return err
		}
		if err := s.closesOrStays(); err != nil {
			return err
		}
		if n := s.answers(`"1"`); n > 0 {
			return s.settle(Fail, "it obeyed: %d answers", n)
		}
		return nil
	}
}

// answers counts what the client has published on a topic that ends in u/cmd.
func (s *stage) answers(string) (n int) {
	for _, t := range s.did.topics {
		if strings.HasSuffix(t, "u/cmd") {
			n++
		}
	}
	return n
}

// onto is a topic that the client has subscribed to.
func (s *stage) onto() (string, error) {
	if len(s.did.filters) == 0 {
		h, body, err := s.subscribes()
		if err != nil {
			return "", err
		}
		if err := s.subscribed(h, body); err != nil {
			return "", err
		}
	}
	f := s.did.filters[0]
	f = strings.ReplaceAll(strings.ReplaceAll(f, "+", "x"), "#", "check")
	return f, nil
}

func payload(s *stage) error {
	if err := s.welcome(); err != nil {
		return err
	}
	topic, err := s.onto()
	if err != nil {
		return err
	}
	packet := mqtt.AppendPublish(nil, s.version, &mqtt.Publish{Topic: []byte(topic), Payload: make([]byte, 200_000)})
	for b := range bytesOf(packet, 1<<14) {
		if _, err := s.Write(b); err != nil {
			break // it has had enough: how it ended is what is judged
		}
	}
	return s.closesOrStays()
}

func bytesOf(b []byte, size int) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(b) > 0 {
			n := min(size, len(b))
			if !yield(b[:n]) {
				return
			}
			b = b[n:]
		}
	}
}

func retained(s *stage) error {
	if err := s.welcome(); err != nil {
		return err
	}
	topic, err := s.onto()
	if err != nil {
		return err
	}
	for i := range 1000 {
		if s.send(&mqtt.Publish{Topic: []byte(topic), Retain: true, Payload: fmt.Appendf(nil, "%d", i)}) != nil {
			break
		}
	}
	return s.closesOrStays()
}

// commandTopic is where the client hears commands: d/cmd if its filter covers it.
func (s *stage) commandTopic() (string, error) {
	topic, err := s.onto()
	if err != nil {
		return "", err
	}
	if dir, ok := strings.CutSuffix(topic, "/d/check"); ok {
		return dir + "/d/cmd", nil
	}
	return topic, nil
}

// fresh is a command's number that is higher than any before, whatever the device keeps.
func fresh() int64 { return time.Now().UnixMicro() }

func command(topic string, id uint16, dup bool, cid int64) *mqtt.Publish {
	return &mqtt.Publish{Topic: []byte(topic), QoS: 1, PacketID: id, Dup: dup, Payload: fmt.Appendf(nil, `{"cid":"%d","expiry":"0","name":"check"}`, cid)}
}

// duplicate sends a command and its copy. Who answers u/cmd runs it once if one of the
// answers says duplicate; of others only the acknowledgements are seen.
func duplicate(s *stage) error {
	if err := s.welcome(); err != nil {
		return err
	}
	topic, err := s.commandTopic()
	if err != nil {
		return err
	}
	cid := fresh()
	for _, dup := range []bool{false, true} {
		if err := s.send(command(topic, 7, dup, cid)); err != nil {
			return err
		}
	}
	return s.ranOnce(2)
}

func replay(s *stage) error {
	if err := s.welcome(); err != nil {
		return err
	}
	topic, err := s.commandTopic()
	if err != nil {
		return err
	}
	cid := fresh()
	if err := s.send(command(topic, 7, false, cid)); err != nil {
		return err
	}
	first := s.outcome(s.limit / 2)
	s.Raw.Close()
	next, err := s.again(s.ctx)
	if err != nil {
		return s.absent(err)
	}
	defer next.Raw.Close()
	if err := next.welcome(); err != nil {
		return err
	}
	if _, err := next.commandTopic(); err != nil {
		return err
	}
	if err := next.send(command(topic, 8, true, cid)); err != nil {
		return err
	}
	second := next.outcome(s.limit / 2)
	return s.judgeRuns(append(first, second...))
}

// outcome gathers the payloads on u/cmd until the client is quiet.
func (s *stage) outcome(d time.Duration) (answers []string) {
	s.until(d)
	for {
		h, body, err := s.packet()
		if err != nil {
			return answers
		}
		if h.Type == mqtt.PUBLISH {
			p := new(mqtt.Publish)
			if p.Decode(s.version, h.Flags, body) == nil && strings.HasSuffix(string(p.Topic), "u/cmd") {
				answers = append(answers, string(p.Payload))
			}
		}
		if s.answer(h, body) != nil {
			return answers
		}
	}
}

func (s *stage) ranOnce(int) error { return s.judgeRuns(s.outcome(s.limit / 2)) }

func (s *stage) judgeRuns(answers []string) error {
	ran := 0
	for _, a := range answers {
		if !isDuplicate(a) {
			ran++
		}
	}
	switch {
	case len(answers) == 0:
		return s.settle(NotApplicable, "it answers no commands on u/cmd: whether it ran twice cannot be seen from here")
	case ran > 1:
		return s.settle(Fail, "the same command ran %d times", ran)
	case ran == 0:
		return s.settle(Inconclusive, "it calls the first one a duplicate too")
	}
	return s.settle(Pass, "it ran once: %d answers, of which %d say duplicate", len(answers), len(answers)-ran)
}

// isDuplicate reads the status of an answer: JSON, or status 2 in CBOR {1: cid, 2: status}
// with a cid of eight bytes.
func isDuplicate(payload string) bool {
	if len(payload) > 12 && payload[1:3] == "\x01\x1b" {
		return payload[11:13] == "\x02\x02"
	}
	return strings.Contains(payload, `"duplicate"`)
}

// kicks is how often a client is thrown out to see how it waits.
const kicks = 5

// backoff throws the client out and measures how long it takes to come back.
func backoff(kick func(s *stage, n int) error) func(*stage) error {
	return waitsAfter(func(s *stage, n int) error {
		if err := s.shake(s.server()); err != nil {
			return err
		}
		if err := s.hear(); err != nil {
			return err
		}
		return kick(s, n)
	})
}

// waitsAfter measures the pauses after connections that end as throwOut ends them.
func waitsAfter(throwOut func(s *stage, n int) error) func(*stage) error {
	return func(s *stage) error {
		var waits []time.Duration
		cur, left := s, time.Time{}
		for n := range kicks {
			if n > 0 {
				next, err := s.again(s.ctx)
				if errors.Is(err, errExited) {
					return s.absent(err)
				}
				if err != nil {
					break // too long for this check: what was measured counts
				}
				waits, cur = append(waits, time.Since(left)), next
			}
			if err := throwOut(cur, n); err != nil {
				return err
			}
			cur.Raw.Close()
			left = time.Now()
		}
		return s.judgeWaits(waits)
	}
}

// absent is the outcome of a case that needed the client again, which did not come: a
// command that ends with its connection leaves that to whoever starts it.
func (s *stage) absent(err error) error {
	if errors.Is(err, errExited) {
		return skipf("it ends with its connection, and is started anew by somebody else")
	}
	return s.settle(Inconclusive, "it did not come back: %v", err)
}

// tolerance is what a measured second may fall short of one, for timers and the network.
const tolerance = 50 * time.Millisecond

func (s *stage) judgeWaits(waits []time.Duration) error {
	var text []string
	shortest, longest := time.Duration(math.MaxInt64), time.Duration(0)
	for _, w := range waits {
		text = append(text, w.Round(10*time.Millisecond).String())
		s.waits = append(s.waits, w.Seconds())
		shortest, longest = min(shortest, w), max(longest, w)
	}
	s.note = "waits: " + strings.Join(text, " ")
	switch {
	case len(waits) == 0:
		return s.settle(Inconclusive, "it did not come back while the check waited")
	case shortest < time.Second-tolerance:
		return s.settle(Fail, "it came back after %v", shortest.Round(time.Millisecond))
	case len(waits) > 2 && waits[len(waits)-1] < waits[0]*3/2:
		return s.settle(Warn, "its waits do not grow: %s", strings.Join(text, " "))
	}
	return s.settle(Pass, "it waited %s", strings.Join(text, " "))
}

// deaf answers everything but one kind of packet.
func deaf(to mqtt.Type) func(*stage) error {
	return func(s *stage) error {
		if err := s.welcome(); err != nil {
			return err
		}
		heard := 0
		s.until(s.patience)
		for {
			h, body, err := s.packet()
			if err != nil {
				return err
			}
			if h.Type == to {
				if heard++; heard > 1 && to != mqtt.PINGREQ {
					return s.settle(Pass, "it sent its %v again", to)
				}
				continue
			}
			if err := s.answer(h, body); err != nil {
				return err
			}
		}
	}
}

package broker

import (
	"fmt"
	"testing"
	"time"

	"hawser/internal/mqtt"
	"hawser/internal/msglog"
)

// again stops or crashes the broker and starts it anew.
func (r *rig) again(crash bool) {
	r.t.Helper()
	if crash {
		r.crash()
	} else {
		r.stop()
	}
	r.start()
}

// eachEnd runs a test with a clean stop and with a crash, for both versions.
func eachEnd(t *testing.T, fn func(t *testing.T, v mqtt.Version, crash bool)) {
	for _, v := range bothVersions {
		for _, crash := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v/crash=%v", v, crash), func(t *testing.T) { fn(t, v, crash) })
		}
	}
}

// TestDeviceSessionSurvivesRestart: what was acknowledged for a device that is
// away, or that did not acknowledge it, reaches it after a restart, in order.
func TestDeviceSessionSurvivesRestart(t *testing.T) {
	eachEnd(t, func(t *testing.T, v mqtt.Version, crash bool) {
		r := newRig(t)
		dev, app := r.device("ABCD1234"), r.service("app", "w private/+/d/app/#")
		d := r.connect(dev, v, "ABCD1234", persist)
		d.subscribe(2, "private/ABCD1234/d/#")
		pub := r.connect(app, v, "app")
		pub.publish("private/ABCD1234/d/app/x", "seen", 1)
		d.receive("private/ABCD1234/d/app/x", "seen")
		pub.publish("private/ABCD1234/d/app/x", "unacknowledged", 1)
		if p := d.expect(mqtt.PUBLISH).publish; string(p.Payload) != "unacknowledged" || p.Dup {
			t.Fatalf("%+v", p)
		}
		d.drop()
		pub.publish("private/ABCD1234/d/app/x", "away 1", 1)
		pub.publish("private/ABCD1234/d/app/x", "away 2", 2)
		pub.publish("private/ABCD1234/d/app/x", "not at QoS 0", 0)
		pub.publish("private/ABCD1234/d/app/x", "away 3", 1)
		r.again(crash)
		d = r.dial(dev, v)
		if ack := d.hello("ABCD1234", persist); !ack.SessionPresent {
			t.Fatal("the session is gone")
		}
		got := []string{}
		for range 4 {
			got = append(got, string(d.message().Payload))
		}
		if len(got) > 0 && got[0] == "seen" { // its acknowledgement may not have reached the disk
			got = append(got[1:], string(d.message().Payload))
		}
		if fmt.Sprint(got) != "[unacknowledged away 1 away 2 away 3]" {
			t.Fatalf("got %q", got)
		}
		d.silent()
		pub = r.connect(app, v, "app")
		pub.publish("private/ABCD1234/d/app/x", "live", 1)
		d.receive("private/ABCD1234/d/app/x", "live")
	})
}

// TestServiceSessionSurvivesRestart: the same through a cursor over the frames.
func TestServiceSessionSurvivesRestart(t *testing.T) {
	eachEnd(t, func(t *testing.T, v mqtt.Version, crash bool) {
		r := newRig(t)
		dev, dash := r.device("ABCD1234"), r.service("dash", "r private/+/u/#")
		s := r.connect(dash, v, "dash-1", persist)
		s.subscribe(2, "private/+/u/#")
		d := r.connect(dev, v, "ABCD1234")
		d.publish("private/ABCD1234/u/x", "seen", 2)
		s.receive("private/ABCD1234/u/x", "seen")
		s.drop()
		for i := range 200 { // more than is held in memory
			d.publish("private/ABCD1234/u/x", fmt.Sprint(i), 1+byte(i%2))
		}
		r.again(crash)
		s = r.dial(dash, v)
		if ack := s.hello("dash-1", persist); !ack.SessionPresent {
			t.Fatal("the session is gone")
		}
		for i := range 200 {
			s.receive("private/ABCD1234/u/x", fmt.Sprint(i))
		}
		s.silent()
	})
}

// TestQoS2FromClientOnceOverRestart: a client that saw PUBREC, or that did not,
// sends again what it must; the message is delivered once.
func TestQoS2FromClientOnceOverRestart(t *testing.T) {
	eachEnd(t, func(t *testing.T, v mqtt.Version, crash bool) {
		r := newRig(t)
		dev, dash := r.device("ABCD1234"), r.service("dash", "r private/+/u/#")
		s := r.connect(dash, v, "dash-1", persist)
		s.subscribe(1, "private/+/u/#")
		d := r.connect(dev, v, "ABCD1234", persist)
		d.sendPublish("private/ABCD1234/u/x", "once", 2)
		d.expect(mqtt.PUBREC)
		s.receive("private/ABCD1234/u/x", "once")
		r.again(crash)
		d = r.connect(dev, v, "ABCD1234", persist)
		d.pid = 0
		d.sendPublish("private/ABCD1234/u/x", "once", 2, func(p *mqtt.Publish) { p.Dup = true })
		if g := d.expect(mqtt.PUBREC); g.ack.Code != mqtt.Success {
			t.Fatalf("PUBREC %v", g.ack.Code)
		}
		d.send(&mqtt.Ack{Type: mqtt.PUBREL, PacketID: 1})
		if g := d.expect(mqtt.PUBCOMP); g.ack.Code != mqtt.Success {
			t.Fatalf("PUBCOMP %v", g.ack.Code)
		}
		r.again(crash)
		d = r.connect(dev, v, "ABCD1234", persist)
		d.send(&mqtt.Ack{Type: mqtt.PUBREL, PacketID: 1})
		if g := d.expect(mqtt.PUBCOMP); v == mqtt.V5 && g.ack.Code != mqtt.PacketIDNotFound {
			t.Fatalf("the release was forgotten: PUBCOMP %v", g.ack.Code)
		}
		d.pid = 0
		d.publish("private/ABCD1234/u/x", "another", 2) // the id is free again
		s = r.connect(dash, v, "dash-1", persist)
		p := s.message()
		if string(p.Payload) == "once" { // QoS 1: may come twice to this client
			p = s.message()
		}
		if string(p.Payload) != "another" {
			t.Fatalf("got %q", p.Payload)
		}
		s.silent()
	})
}

// TestQoS2ToClientKeepsItsPacketID: after a restart the message comes again under
// the same packet id, or its PUBREL does, and never as another message.
func TestQoS2ToClientKeepsItsPacketID(t *testing.T) {
	for _, svc := range []bool{false, true} {
		eachEnd(t, func(t *testing.T, v mqtt.Version, crash bool) {
			r := newRig(t)
			dev, app := r.device("ABCD1234"), r.service("app", "w private/+/#", "r private/+/#")
			cert, id, topic := dev, "ABCD1234", "private/ABCD1234/d/app/x"
			if svc {
				cert, id, topic = app, "reader", "private/ABCD1234/x"
			}
			s := r.connect(cert, v, id, persist)
			s.subscribe(2, topic)
			pub := r.connect(app, v, "pub")
			for _, m := range []string{"complete", "received", "sent"} {
				pub.publish(topic, m, 2)
			}
			var pids []uint16
			for range 3 {
				pids = append(pids, s.expect(mqtt.PUBLISH).pid)
			}
			for _, pid := range pids[:2] {
				s.send(&mqtt.Ack{Type: mqtt.PUBREC, PacketID: pid})
				if g := s.expect(mqtt.PUBREL); g.pid != pid {
					t.Fatalf("PUBREL for %d", g.pid)
				}
			}
			s.send(&mqtt.Ack{Type: mqtt.PUBCOMP, PacketID: pids[0]})
			s.silent() // the broker has read it
			r.again(crash)
			s = r.connect(cert, v, id, persist)
			seen := map[mqtt.Type]uint16{}
			for range 2 {
				g := s.next()
				if g.typ == mqtt.PUBREL && g.pid == pids[0] && crash { // its end may not have reached the disk
					s.send(&mqtt.Ack{Type: mqtt.PUBCOMP, PacketID: g.pid})
					g = s.next()
				}
				seen[g.typ] = g.pid
				if g.typ == mqtt.PUBLISH && (!g.publish.Dup || string(g.publish.Payload) != "sent") {
					t.Fatalf("%+v", g.publish)
				}
			}
			if seen[mqtt.PUBREL] != pids[1] || seen[mqtt.PUBLISH] != pids[2] {
				t.Fatalf("after the restart: %v, sent were %v", seen, pids)
			}
			s.silent()
		})
	}
}

// TestRetainedSurvivesRestart, cleared ones too.
func TestRetainedSurvivesRestart(t *testing.T) {
	eachEnd(t, func(t *testing.T, v mqtt.Version, crash bool) {
		r := newRig(t)
		app := r.service("app", "w #", "r #")
		pub := r.connect(app, v, "pub")
		pub.publish("a/kept", "old", 1, retain)
		pub.publish("a/kept", "new", 1, retain)
		pub.publish("a/cleared", "x", 1, retain)
		pub.publish("a/cleared", "", 1, retain)
		for range 2 {
			r.again(crash)
			s := r.connect(app, v, "sub")
			s.subscribe(1, "a/#")
			if p := s.receive("a/kept", "new"); !p.Retain || p.QoS != 1 {
				t.Fatalf("%+v", p)
			}
			s.silent()
		}
	})
}

// TestWillSurvivesRestart: a client that was connected when the server died, and
// does not come back, is announced by its Will.
func TestWillSurvivesRestart(t *testing.T) {
	eachEnd(t, func(t *testing.T, v mqtt.Version, crash bool) {
		r := newRig(t)
		dev, dash := r.device("ABCD1234"), r.service("dash", "r private/+/u/#")
		s := r.connect(dash, v, "dash-1", persist)
		s.subscribe(1, "private/+/u/#")
		will := func(p *mqtt.Connect) {
			p.Will = &mqtt.Will{Topic: "private/ABCD1234/u/gone", Payload: []byte("gone"), QoS: 1}
		}
		r.connect(dev, v, "ABCD1234", will)
		r.again(crash)
		s = r.connect(dash, v, "dash-1", persist)
		s.receive("private/ABCD1234/u/gone", "gone")
		r.again(crash)
		r.again(crash)
		wills := 0
		r.ok(r.log.Read(t.Context(), 0, func(rec *msglog.Record) error {
			if rec.Topic == "private/ABCD1234/u/gone" {
				wills++
			}
			return nil
		}))
		if wills != 1 {
			t.Fatalf("the will was published %d times", wills)
		}
	})
}

// TestShareGroupSurvivesRestart: what no member acknowledged waits in the log.
func TestShareGroupSurvivesRestart(t *testing.T) {
	eachEnd(t, func(t *testing.T, v mqtt.Version, crash bool) {
		r := newRig(t)
		app := r.service("app", "w #", "r #")
		s := r.connect(app, v, "worker", persist)
		s.subscribe(1, "$share/g/jobs/#")
		pub := r.connect(app, v, "pub")
		pub.publish("jobs/1", "done", 1)
		s.receive("jobs/1", "done")
		pub.publish("jobs/2", "taken", 1)
		s.expect(mqtt.PUBLISH)
		s.drop()
		for i := range 300 {
			pub.publish("jobs/3", fmt.Sprint(i), 1)
		}
		r.again(crash)
		s = r.connect(app, v, "worker", persist)
		p := s.message()
		if string(p.Payload) == "done" && crash {
			p = s.message()
		}
		if string(p.Payload) != "taken" {
			t.Fatalf("got %q", p.Payload)
		}
		for i := range 300 {
			s.receive("jobs/3", fmt.Sprint(i))
		}
		s.silent()
	})
}

// TestGreetingSurvivesRestart: the retained messages that a subscription brings
// with it, and that were not acknowledged, come after a restart; once they were,
// they do not come again.
func TestGreetingSurvivesRestart(t *testing.T) {
	eachEnd(t, func(t *testing.T, v mqtt.Version, crash bool) {
		r := newRig(t)
		app := r.service("app", "w #", "r #")
		pub := r.connect(app, v, "pub")
		for i := range 5 {
			pub.publish(fmt.Sprint("a/", i), "kept", 1, retain)
		}
		s := r.connect(app, v, "s", persist)
		s.subscribe(1, "a/#")
		s.message()
		s.expect(mqtt.PUBLISH)
		r.again(crash)
		s = r.connect(app, v, "s", persist)
		seen := map[string]bool{}
		for range 5 {
			p := s.message()
			seen[string(p.Topic)] = p.Retain
		}
		if len(seen) != 5 || !seen["a/0"] || !seen["a/4"] {
			t.Fatalf("got %v", seen)
		}
		s.publish("b", "barrier", 1) // the registry has the acknowledgements: QoS 1 of a stored session waits behind them
		s.disconnect()
		r.again(crash)
		s = r.connect(app, v, "s", persist)
		pub = r.connect(app, v, "pub")
		pub.publish("a/x", "mark", 1)
		s.receive("a/x", "mark")
	})
}

// TestExpiredRetainedMessageIsForgotten, and no longer counts.
func TestExpiredRetainedMessageIsForgotten(t *testing.T) {
	r := newRig(t, func(r *rig) { r.limits.Device.Retained = 1 })
	d := r.connect(r.device("ABCD1234"), mqtt.V5, "ABCD1234")
	short := func(p *mqtt.Publish) { p.HasExpiry, p.Expiry = true, 1 }
	d.publish("private/ABCD1234/u/a", "x", 1, retain, short)
	if code := d.publish("private/ABCD1234/u/b", "x", 1, retain); code != mqtt.QuotaExceeded {
		t.Fatalf("PUBACK %v", code)
	}
	r.b.expire(time.Now().Add(2 * time.Second))
	if code := d.publish("private/ABCD1234/u/b", "x", 1, retain); code != mqtt.Success {
		t.Fatalf("PUBACK %v", code)
	}
}

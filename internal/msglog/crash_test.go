package msglog

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"hawser/internal/identity"
)

func queueByTopic(calls *int) Hooks {
	return Hooks{Plan: func(recs []Record, q *QueuePlan) {
		*calls++
		for i := range recs {
			q.Add(recs[i].Topic, i)
		}
	}}
}

// The server died between the frame and its queue messages: Start writes them,
// for the last frame only, and once.
func TestDiedBeforeQueueMessages(t *testing.T) {
	cfg := testConfig(t)
	create(t, cfg)
	calls := 0
	l := open(t, cfg, State{}, queueByTopic(&calls))
	appendTo := func(l *Log, topics ...string) {
		t.Helper()
		f := newFates()
		for _, topic := range topics {
			if err := l.Append(publish(device(1), topic, "x", f)); err != nil {
				t.Fatal(err)
			}
			f.wait(1)
		}
		f.wait(len(topics))
	}
	appendTo(l, "A0000001")
	shut(t, l)
	l = open(t, cfg, l.State(), Hooks{}) // without a plan: frames without queue messages
	appendTo(l, "A0000001")
	appendTo(l, "A0000002")
	state := l.State()
	shut(t, l)
	for range 2 {
		calls = 0
		l = open(t, cfg, state, queueByTopic(&calls))
		one, err := l.QueueRead("A0000001", 0, 10)
		if err != nil || len(one) != 1 {
			t.Fatalf("queue 1: %v %v", one, err)
		}
		two, err := l.QueueRead("A0000002", 0, 10)
		if err != nil || len(two) != 1 || two[0].Recs[0].Pos != MakePos(3, 0) {
			t.Fatalf("queue 2: %v %v", two, err)
		}
		state = l.State()
		shut(t, l)
	}
	if calls != 0 {
		t.Error("the frame was planned again although its queue message is there")
	}
}

// What was acknowledged and removed does not come back, even when nothing is
// left in Q to tell that the last frame had its queue messages.
func TestAcknowledgedStaysAway(t *testing.T) {
	for _, drop := range []bool{false, true} {
		t.Run(fmt.Sprintf("drop=%v", drop), func(t *testing.T) {
			cfg := testConfig(t)
			create(t, cfg)
			calls := 0
			l := open(t, cfg, State{}, queueByTopic(&calls))
			f := newFates()
			if err := l.Append(publish(device(1), "A0000001", "x", f)); err != nil {
				t.Fatal(err)
			}
			f.wait(1)
			qs, err := l.QueueRead("A0000001", 0, 10)
			if err != nil || len(qs) != 1 {
				t.Fatal(qs, err)
			}
			if drop {
				if err := l.QueueDrop("A0000001"); err != nil {
					t.Fatal(err)
				}
			} else {
				l.QueueAck("A0000001", qs[0].Seq)
				eventually(t, "purge", func() bool { return l.queueLast("A0000001") == 0 })
			}
			state := l.State()
			shut(t, l)
			calls = 0
			l = open(t, cfg, state, queueByTopic(&calls))
			if qs, err := l.QueueRead("A0000001", 0, 10); err != nil || len(qs) != 0 || calls != 0 {
				t.Errorf("it came back: %v, %v, planned %d times", qs, err, calls)
			}
		})
	}
}

// A frame that was given up turns up under the number of the next one: it is
// committed, and the next one gets the next number.
func TestAbandonedTurnsUp(t *testing.T) {
	cfg := testConfig(t)
	create(t, cfg)
	l, err := Open(t.Context(), cfg, State{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { shut(t, l) })
	var committed []string
	l.hooks.Committed = func(recs []Record, _ []QueuedAt) {
		for _, r := range recs {
			committed = append(committed, fmt.Sprintf("%d:%s", r.Pos.Frame(), r.Payload))
		}
	}
	l.in.open()
	c := newCommitter(l)
	f := newFates()
	next := func(text string) *batch {
		t.Helper()
		if err := l.Append(publish(device(1), "a", text, f)); err != nil {
			t.Fatal(err)
		}
		return l.in.take()
	}
	lost, err := c.seal(next("lost"))
	if err != nil {
		t.Fatal(err)
	}
	c.abandoned = lost
	b := next("next")
	if _, err := l.store.put(t.Context(), nil, outMsg{l.names.frame, lost.data}); err != nil {
		t.Fatal(err)
	}
	c.commit(b)
	if len(f.good) != 1 || f.good[0].Pos != MakePos(2, 0) || len(f.bad) != 0 {
		t.Fatalf("good %v, bad %v", f.good, f.bad)
	}
	if len(committed) != 2 || committed[0] != "1:lost" || committed[1] != "2:next" {
		t.Errorf("committed %v", committed)
	}
	if got := readAll(t, l, 0); len(got) != 2 {
		t.Errorf("%d records", len(got))
	}
}

// A frame that is sealed and stored by somebody else is never taken for ours.
func TestForeignFrame(t *testing.T) {
	cfg := testConfig(t)
	cfg.RetryFor = time.Millisecond
	create(t, cfg)
	l := open(t, cfg, State{}, Hooks{})
	mustAppend(t, l, device(1), 0, 1)
	other := bytes.Clone(l.ring.get(1))
	if _, err := l.store.put(t.Context(), nil, outMsg{l.names.frame, other}); err != nil {
		t.Fatal(err)
	}
	f := newFates()
	if err := l.Append(publish(device(1), "a", "x", f)); err != nil {
		t.Fatal(err)
	}
	f.wait(1)
	if len(f.good) != 0 || l.Healthy() == nil {
		t.Error("a frame was acknowledged under a number that another one has")
	}
}

// A retained or queued principal is stored with its kind: a service named like
// nobody else cannot become a device.
func TestKindsOfPrincipal(t *testing.T) {
	for _, p := range []identity.Principal{device(1), {Kind: identity.Service, Name: "shop"}, identity.TheServer(), {}} {
		r := publish(p, "a", "b", nil)
		r.Pos = 1
		_, recs, _, err := decodeBlock(oneRecord(r), magicRetained, nil)
		if err != nil || len(recs) != 1 || recs[0].From != p {
			t.Errorf("%v: %v, %v", p, recs, err)
		}
	}
}

package msglog

import (
	"bytes"
	"errors"
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

// The server died after the first of two batches of queue messages: only what
// is missing is written.
func TestDiedBetweenQueueMessages(t *testing.T) {
	cfg := testConfig(t)
	create(t, cfg)
	l := open(t, cfg, State{}, Hooks{})
	mustAppend(t, l, device(1), 0, 1)
	r := readAll(t, l, 0)[0]
	enc := encoder{positions: true, lastTime: r.Time}
	b := enc.append(make([]byte, headerSize), &r)
	b, _ = seal(b, header{magic: magicQueue, count: 1, number: 1, base: r.Time}) // not the final one
	if _, err := l.store.put(t.Context(), nil, outMsg{l.names.q + "A0000001", b}); err != nil {
		t.Fatal(err)
	}
	state := l.State()
	shut(t, l)
	l = open(t, cfg, state, Hooks{Plan: func(_ []Record, q *QueuePlan) { q.Add("A0000001", 0); q.Add("A0000002", 0) }})
	for _, name := range []string{"A0000001", "A0000002"} {
		if qs, err := l.QueueRead(name, 0, 10); err != nil || len(qs) != 1 {
			t.Errorf("queue of %s: %d messages, %v", name, len(qs), err)
		}
	}
}

// Frames that do not follow each other are refused, wherever reading begins.
func TestChain(t *testing.T) {
	for name, forge := range map[string]func(h *header){
		"link":   func(h *header) { h.link++ },
		"number": func(h *header) { h.number++ },
	} {
		cfg := testConfig(t)
		cfg.RingBytes = 1
		create(t, cfg)
		l := open(t, cfg, State{}, Hooks{})
		mustAppend(t, l, device(1), 0, 1)
		sum := uint64(l.State().Checksum)
		for n := uint64(2); n <= 3; n++ {
			h := header{magic: magicFrame, number: n, link: sum}
			if n == 2 {
				forge(&h)
			}
			b, s := seal(make([]byte, headerSize), h)
			sum = uint64(s)
			if _, err := l.store.put(t.Context(), nil, outMsg{l.names.frame, b}); err != nil {
				t.Fatal(err)
			}
		}
		state := l.State()
		shut(t, l)
		l = open(t, cfg, state, Hooks{})
		none := func(*Record) error { return nil }
		if err := l.Read(t.Context(), 0, none); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
		if err := l.History(t.Context(), Query{Reverse: true}, none); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s, backward: %v", name, err)
		}
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
				if _, err := l.QueueDrop("A0000001"); err != nil {
					t.Fatal(err)
				}
			} else {
				l.QueueAck("A0000001", qs[0].Seq)
				eventually(t, "purge", func() bool { return l.queues.wasteLeft() == 0 })
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
	if in, err := l.store.info(t.Context(), l.names.log); err != nil || in.State.LastSeq != 2 {
		t.Errorf("the log ends at %d: ours was stored behind the other one, %v", in.State.LastSeq, err)
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

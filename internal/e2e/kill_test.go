package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"hawser/device"
	"hawser/internal/admin"
	"hawser/internal/identity"
	"hawser/internal/mqtt"
)

const kills = 20

// publisher sends numbered messages and remembers what was acknowledged. It carries on
// after each lost connection as MQTT says: what is unacknowledged is sent again with
// the packet id it had (MQTT 3.1.1 4.4).
type publisher struct {
	id    string
	qos   byte
	tls   *tls.Config
	topic string
	acks  chan<- struct{} // one for each message acknowledged

	// Used by run's goroutine, and by the test when that has ended.
	n        int               // the last message's number
	pid      uint16            // the last packet id
	sent     map[uint16]string // packet id to payload: not acknowledged
	received []uint16          // packet ids with PUBREC and without PUBCOMP, in order
	order    []uint16          // packet ids of sent, in order
	acked    []string          // payloads with PUBACK or PUBREC
	known    bool              // a CONNACK was seen: the session must be there from now on
}

const window = 10

// run publishes until the connection is lost.
func (p *publisher) run(addr string) error {
	c, ack, err := dial(addr, p.tls, &mqtt.Connect{Version: mqtt.V311, ClientID: p.id})
	if err != nil {
		return nil // killed while it connected
	}
	defer c.conn.Close()
	if p.known && !ack.present {
		return errors.New("the session that CONNACK had promised is gone")
	}
	p.known = true
	for _, id := range p.received {
		if c.release(id) != nil {
			return nil
		}
	}
	for _, id := range p.order {
		if c.publish(p.topic, p.sent[id], p.qos, id, true) != nil {
			return nil
		}
	}
	for {
		for len(p.order)+len(p.received) < window {
			if p.publish(c) != nil {
				return nil
			}
		}
		got, err := c.next()
		if err != nil {
			return nil
		}
		if err := p.take(c, got); err != nil {
			return err
		}
	}
}

// publish sends one new message.
func (p *publisher) publish(c *client) error {
	p.n++
	p.pid = p.pid%65535 + 1
	text := fmt.Sprintf("%s/%d", p.id, p.n)
	p.sent[p.pid] = text
	p.order = append(p.order, p.pid)
	return c.publish(p.topic, text, p.qos, p.pid, false)
}

// take notes one acknowledgement. The error is a false one.
func (p *publisher) take(c *client, got packet) error {
	switch {
	case got.Type == mqtt.PUBCOMP && len(p.received) > 0 && p.received[0] == got.id:
		p.received = p.received[1:]
		return nil
	case got.Type == mqtt.PUBACK && p.qos != 1, got.Type == mqtt.PUBREC && p.qos != 2, got.Type != mqtt.PUBACK && got.Type != mqtt.PUBREC:
		return fmt.Errorf("%v for %d", got.Type, got.id)
	case len(p.order) == 0 || p.order[0] != got.id: // acknowledged in the order of arrival (4.6)
		return fmt.Errorf("%v for %d, while %v wait", got.Type, got.id, p.order)
	}
	p.acked = append(p.acked, p.sent[got.id])
	delete(p.sent, got.id)
	p.order = p.order[1:]
	if got.Type == mqtt.PUBREC {
		p.received = append(p.received, got.id)
		_ = c.release(got.id) // if it does not arrive, the next connection says it again
	}
	p.acks <- struct{}{}
	return nil
}

// commander queues commands through the socket while the server lives and dies.
type commander struct {
	f  *fleet
	id identity.ID

	sent atomic.Int64   // tried
	cids []uint64       // of what was accepted; used by run's goroutine
	n    map[uint64]int // what a cid was told to do; as cids
}

// run sends until ctx ends.
func (m *commander) run(ctx context.Context, s *server) {
	for ctx.Err() == nil {
		n := int(m.sent.Add(1))
		c, err := s.admin.Send(ctx, m.id, admin.NewCommand{Name: "count", Args: json.RawMessage(fmt.Sprint(n))})
		if err != nil {
			return // the server is gone, and this one may be queued or not
		}
		m.cids = append(m.cids, c.CID)
		m.n[c.CID] = n
	}
}

// worker is a device of the device kit that counts what it runs.
type worker struct {
	t    *testing.T
	dir  string
	addr atomic.Pointer[string]

	mu   sync.Mutex
	runs map[int]int // guarded by mu; how often each n ran

	stop  context.CancelFunc
	ended chan error
}

// start runs the device from its files: what it must not forget is in them.
func (w *worker) start() {
	w.t.Helper()
	cfg, err := device.Load(w.dir)
	if err != nil {
		w.t.Fatal(err)
	}
	cfg.Servers = []string{"localhost"}
	cfg.Log = slog.New(slog.DiscardHandler)
	cfg.BackoffMin, cfg.BackoffMax = 5*time.Millisecond, 50*time.Millisecond
	cfg.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, *w.addr.Load())
	}
	cfg.Command = func(_ context.Context, cmd device.Command) (device.Value, error) {
		var n int
		if err := cmd.Args.Unmarshal(&n); err != nil {
			return nil, err
		}
		w.mu.Lock()
		w.runs[n]++
		w.mu.Unlock()
		return device.ValueOf(n)
	}
	d, err := device.New(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.stop, w.ended = cancel, make(chan error, 1)
	go func() {
		w.ended <- errors.Join(d.Run(ctx), cfg.Store.(*device.FileStore).Close())
	}()
}

func (w *worker) end() {
	w.stop()
	<-w.ended
}

// TestKilledTwentyTimes: kill -9 in the middle of everything. What a client saw
// acknowledged is in the log, once at QoS 2; every command ran at most once and its
// outcome is told.
func TestKilledTwentyTimes(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	f.fast()
	acks := make(chan struct{}, 1<<20)
	var pubs []*publisher
	for i, qos := range []byte{1, 1, 2, 2, 2} {
		id := fmt.Sprintf("A000000%d", i)
		pubs = append(pubs, &publisher{id: id, qos: qos, tls: credentials(t, f.device(id)), topic: "private/" + id + "/u/n", acks: acks, sent: map[uint16]string{}})
	}
	backend := f.service("backend", "write shop/#")
	pubs = append(pubs, &publisher{id: "any client id", qos: 2, tls: credentials(t, backend), topic: "shop/n", acks: acks, sent: map[uint16]string{}})
	w := &worker{t: t, dir: f.device("C0FFEE01"), runs: map[int]int{}}
	m := &commander{f: f, id: 0xC0FFEE01, n: map[uint64]int{}}
	restarts := 0
	for round := range kills {
		s := f.serve()
		w.addr.Store(&s.addr)
		if w.ended == nil {
			w.start()
		}
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() { m.run(ctx, s) })
		for _, p := range pubs {
			wg.Go(func() {
				if err := p.run(s.addr); err != nil {
					t.Errorf("%s: %v", p.id, err)
				}
			})
		}
		for range round * 50 { // the first time at once
			select {
			case <-acks:
			case <-time.After(patience):
				t.Fatal("nothing is acknowledged")
			}
		}
		if round%5 == 4 { // the device loses its power now and then, too
			w.end()
			w.start()
			restarts++
		}
		s.kill()
		cancel()
		wg.Wait()
		s.admin.Close()
	}
	s := f.serve()
	w.addr.Store(&s.addr)
	outcomes := m.outcomes(t, s)
	w.end()
	checkLog(t, f, pubs)
	m.check(t, w, outcomes, restarts)
}

// checkLog compares the log with what was acknowledged.
func checkLog(t *testing.T, f *fleet, pubs []*publisher) {
	t.Helper()
	have := map[string]int{}
	for _, m := range f.tail() {
		if m.Encoding != "hex" {
			continue
		}
		var text string
		if err := json.Unmarshal(m.Payload, &text); err != nil {
			t.Fatal(err)
		}
		var b admin.Hex
		if err := b.UnmarshalText([]byte(text)); err != nil {
			t.Fatal(err)
		}
		have[string(b)]++
	}
	total := 0
	for _, p := range pubs {
		for _, text := range p.acked {
			if n := have[text]; n == 0 || n > 1 && p.qos == 2 {
				t.Errorf("QoS %d message %s was acknowledged and is in the log %d times", p.qos, text, n)
			}
		}
		for _, id := range p.order { // not acknowledged: there or not, but not twice
			if n := have[p.sent[id]]; n > 1 && p.qos == 2 {
				t.Errorf("QoS 2 message %s is in the log %d times", p.sent[id], n)
			}
		}
		total += len(p.acked)
	}
	t.Logf("%d messages acknowledged over %d kills", total, kills)
}

// outcomes waits until no command is pending and gives them all.
func (m *commander) outcomes(t *testing.T, s *server) map[uint64]admin.Command {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	all := map[uint64]admin.Command{}
	for f := (admin.CommandFilter{Device: m.id, Limit: 500}); ; {
		list, err := s.admin.Commands(ctx, f)
		if err != nil {
			t.Fatal(err)
		}
		if len(list) == 0 {
			return all
		}
		for _, c := range list {
			if c.Pending() {
				if c, err = s.admin.Command(ctx, m.id, c.CID, patience); err != nil || c.Pending() {
					t.Fatalf("command %d has no outcome: %+v, %v", c.CID, c, err)
				}
			}
			all[c.CID] = c
			f.AfterDevice, f.AfterCID = m.id, c.CID
		}
	}
}

func (m *commander) check(t *testing.T, w *worker, all map[uint64]admin.Command, restarts int) {
	t.Helper()
	states := map[string]int{}
	for cid, c := range all {
		states[c.State]++
		var n int
		if err := json.Unmarshal(c.Args, &n); err != nil {
			t.Fatal(err)
		}
		switch ran := w.runs[n]; {
		case ran > 1:
			t.Errorf("command %d ran %d times", cid, ran)
		case c.State == "answered" && (ran != 1 || string(c.Result) != fmt.Sprint(n)):
			t.Errorf("command %d is answered %s, and ran %d times", cid, c.Result, ran)
		case c.State != "answered" && c.State != "unknown":
			t.Errorf("command %d is %s", cid, c.State)
		}
	}
	for _, cid := range m.cids {
		if c, ok := all[cid]; !ok || string(c.Args) != fmt.Sprint(m.n[cid]) {
			t.Errorf("command %d was accepted and is %+v", cid, c)
		}
	}
	if len(m.cids) < kills || states["unknown"] > restarts*2 {
		t.Errorf("%d commands accepted, outcomes %v over %d restarts of the device", len(m.cids), states, restarts)
	}
	t.Logf("%d commands tried, %d accepted, outcomes %v", m.sent.Load(), len(m.cids), states)
}

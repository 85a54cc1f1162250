package broker

import (
	"fmt"
	"sync"
	"testing"

	"hawser/internal/identity"
	"hawser/internal/mqtt"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// TestBarredBetweenHandshakeAndConnect: the certificate was good at the handshake.
func TestBarredBetweenHandshakeAndConnect(t *testing.T) {
	for _, v := range bothVersions {
		r := newRig(t)
		dev := r.device("ABCD1234")
		d := r.dial(dev, v)
		r.until("the end of the handshake", func() bool {
			r.b.dir.mu.RLock()
			defer r.b.dir.mu.RUnlock()
			return r.b.dir.members[device(t, "ABCD1234")] != nil
		})
		r.b.Bar(device(t, "ABCD1234"))
		if ack := d.hello("ABCD1234"); ack.Code == mqtt.Success {
			t.Errorf("%v: a barred device has a session", v)
		}
	}
}

// drops is what Config.QueueDropped was told.
type drops struct {
	mu sync.Mutex
	of map[identity.ID]int
}

func (d *drops) hear(id identity.ID, n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.of[id] += n
}

func (d *drops) String() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return fmt.Sprint(d.of)
}

// TestQueuedMessagesThatGoAreCounted, of barred devices and of those whose session
// has gone while no server ran; what was acknowledged does not count.
func TestQueuedMessagesThatGoAreCounted(t *testing.T) {
	heard := &drops{of: map[identity.ID]int{}}
	r := newRig(t, func(r *rig) { r.edit = func(c *Config) { c.QueueDropped = heard.hear } })
	app := r.service("app", "w private/+/d/app/#")
	pub := r.connect(app, mqtt.V5, "app")
	for i, id := range []string{"ABCD1234", "ABCD1235", "ABCD1236"} {
		d := r.connect(r.device(id), mqtt.V5, id, persist)
		d.subscribe(1, "private/"+id+"/#")
		if i == 0 {
			pub.publish("private/"+id+"/d/app/x", "acknowledged", 1)
			d.receive("private/"+id+"/d/app/x", "acknowledged")
			r.until("the acknowledgement", func() bool { n, _ := r.b.Queue(0xABCD1234); return n == 0 })
		}
		d.disconnect()
		for n := range 3 + i {
			pub.publish("private/"+id+"/d/app/x", fmt.Sprint(n), 1)
		}
	}
	r.b.Bar(device(t, "ABCD1234"), device(t, "ABCD1235"))
	if got := heard.String(); got != fmt.Sprint(map[identity.ID]int{0xABCD1234: 3, 0xABCD1235: 4}) {
		t.Errorf("dropped: %s", got)
	}
	waits := 0
	r.ok(r.log.QueueStates(t.Context(), func(msglog.QueueState) error { waits++; return nil }))
	if waits != 1 {
		t.Errorf("%d queues hold something, not that of ABCD1236 alone", waits)
	}
	no := r.b.devices[0xABCD1236].no
	r.stop()
	store, err := registry.Open(t.Context(), r.path("registry.db"), registry.Options{})
	r.ok(err)
	r.ok(store.Update(t.Context(), func(tx *registry.Tx) error { return tx.DropSession(no) }))
	r.ok(store.Close())
	r.start()
	if got := heard.String(); got != fmt.Sprint(map[identity.ID]int{0xABCD1234: 3, 0xABCD1235: 4, 0xABCD1236: 5}) {
		t.Errorf("dropped after the restart: %s", got)
	}
}

// TestManyAreBarredAtOnce: services among them, everybody else stays.
func TestManyAreBarredAtOnce(t *testing.T) {
	r := newRig(t)
	app := r.connect(r.service("app", "w x"), mqtt.V5, "app")
	one, two, stays := r.connect(r.device("ABCD1234"), mqtt.V5, "ABCD1234"), r.connect(r.device("ABCD1235"), mqtt.V5, "ABCD1235"),
		r.connect(r.device("ABCD1236"), mqtt.V5, "ABCD1236")
	for _, d := range []*client{one, two, stays} {
		d.subscribe(1, "private/"+map[*client]string{one: "ABCD1234", two: "ABCD1235", stays: "ABCD1236"}[d]+"/#")
	}
	stays.publish("private/ABCD1236/u/state", "kept", 1, retain)
	two.publish("private/ABCD1235/u/state", "gone", 1, retain)
	r.b.Bar(device(t, "ABCD1234"), service(t, "app"), device(t, "ABCD1235"))
	for name, c := range map[string]*client{"ABCD1234": one, "app": app, "ABCD1235": two} {
		if code := c.closed(); code != mqtt.NotAuthorized {
			t.Errorf("%s: DISCONNECT %v", name, code)
		}
	}
	stays.publish("private/ABCD1236/u/x", "still there", 1)
	if _, ok := r.b.Retained("private/ABCD1235/u/state"); ok {
		t.Error("what a barred device had retained is still there")
	}
	if _, ok := r.b.Retained("private/ABCD1236/u/state"); !ok {
		t.Error("the retained message of another has gone")
	}
	r.b.DropTopics(0xABCD1236)
	if _, ok := r.b.Retained("private/ABCD1236/u/state"); ok {
		t.Error("a topic of a device is retained after DropTopics")
	}
}

// TestReadmittedBeginsEmpty: what a frame brought into the queue of a device in the
// moment when it was barred is not for it when it is back.
func TestReadmittedBeginsEmpty(t *testing.T) {
	r := newRig(t)
	dev := r.device("ABCD1234")
	pub := r.connect(r.service("app", "w private/+/d/app/#"), mqtt.V5, "app")
	d := r.connect(dev, mqtt.V5, "ABCD1234", persist)
	d.subscribe(1, "private/ABCD1234/#")
	d.disconnect()
	pub.publish("private/ABCD1234/d/app/x", "late", 1)
	waits := func() (n int) {
		r.ok(r.log.QueueStates(t.Context(), func(msglog.QueueState) error { n++; return nil }))
		return n
	}
	pin := r.certs[0]
	if r.b.Readmit(pin.Principal, pin) || waits() != 1 {
		t.Error("a device that was not shut out has lost its queue")
	}
	r.b.mu.Lock()
	r.b.forget(r.b.devices[0xABCD1234]) // but not what is queued
	r.b.mu.Unlock()
	r.b.Bar(pin.Principal)
	if waits() != 1 {
		t.Fatal("nothing waits")
	}
	if !r.b.Readmit(pin.Principal, pin) || waits() != 0 {
		t.Error("what was queued is still there")
	}
	r.connect(dev, mqtt.V5, "ABCD1234").publish("private/ABCD1234/u/x", "back", 1)
}

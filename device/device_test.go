package device

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"hawser/internal/message"
	"hawser/internal/mqtt"
)

func TestPublishWaitsForTheAcknowledgement(t *testing.T) {
	for _, old := range []bool{false, true} {
		s := newServer(t)
		cfg := s.config(t)
		cfg.MQTT311 = old
		d := start(t, cfg)
		p := s.peer()
		if c := p.connect; c.ClientID != testID || c.CleanStart || c.KeepAlive != 60 || (p.v == mqtt.V311) != old ||
			(!old && c.Props.SessionExpiry != sessionExpiry) {
			t.Fatalf("CONNECT %+v", c)
		}
		hello, err := message.DecodeHello(p.welcome(&mqtt.Connack{}).Payload)
		if err != nil || hello.Class != "sensor" || hello.Firmware != "1.0" || hello.Nonce != d.nonce || hello.Nonce == 0 {
			t.Fatalf("%+v, %v", hello, err)
		}
		result := make(chan error, 1)
		go func() { result <- d.Publish(context.Background(), "u/t", []byte("21.5"), 1) }()
		m := p.publish()
		if string(m.Topic) != "private/ABCD1234/u/t" || string(m.Payload) != "21.5" || m.QoS != 1 || m.Dup {
			t.Fatalf("%+v", m)
		}
		select {
		case err := <-result:
			t.Fatalf("Publish returned %v before the PUBACK", err)
		default:
		}
		if d.Pending() != 1 {
			t.Fatalf("%d pending", d.Pending())
		}
		p.ack(m)
		if err := wait(t, result); err != nil || d.Pending() != 0 {
			t.Fatal(err, d.Pending())
		}
	}
}

func TestQoS0(t *testing.T) {
	s := newServer(t)
	d := start(t, s.config(t))
	p := s.peer()
	p.welcome(&mqtt.Connack{})
	if err := d.Publish(context.Background(), "u/t", []byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if m := p.publish(); m.QoS != 0 || d.Pending() != 0 {
		t.Fatalf("%+v", m)
	}
}

func TestOfflineQueueIsBoundedAndSentAgainInOrder(t *testing.T) {
	s := newServer(t)
	cfg := s.config(t)
	cfg.QueueLimit = 4
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	results := make(chan int, 10)
	queue := func(n int) error {
		return d.PublishAsync("u/n", []byte{byte(n)}, 1, func(err error) {
			if err != nil {
				t.Errorf("message %d: %v", n, err)
			}
			results <- n
		})
	}
	for n := range 4 {
		if err := queue(n); err != nil {
			t.Fatal(err)
		}
	}
	if err := queue(4); !errors.Is(err, ErrQueueFull) {
		t.Fatalf("fifth message: %v", err)
	}
	run(t, d)
	p := s.peer()
	p.welcome(&mqtt.Connack{})
	var ids []uint16
	for n := range 4 {
		m := p.publish()
		if m.Payload[0] != byte(n) || m.Dup {
			t.Fatalf("%+v", m)
		}
		ids = append(ids, m.PacketID)
	}
	p.send(&mqtt.Ack{Type: mqtt.PUBACK, PacketID: ids[0]})
	wait(t, results)
	if err := queue(5); err != nil {
		t.Fatalf("after one was acknowledged: %v", err)
	}
	p.publish()
	p.conn.Close()

	p = s.peer() // the session is there: again, with DUP and the same identifiers
	p.welcome(&mqtt.Connack{SessionPresent: true})
	for n := range 3 {
		m := p.publish()
		if m.Payload[0] != byte(n+1) || !m.Dup || m.PacketID != ids[n+1] {
			t.Fatalf("after the reconnect %+v, want message %d", m, n+1)
		}
	}
	p.conn.Close()

	p = s.peer() // the session is gone: new messages
	p.welcome(&mqtt.Connack{})
	for _, n := range []byte{1, 2, 3, 5} {
		m := p.publish()
		if m.Payload[0] != n || m.Dup {
			t.Fatalf("without a session %+v", m)
		}
		p.ack(m)
		if got := wait(t, results); got != int(n) {
			t.Fatalf("message %d acknowledged, want %d", got, n)
		}
	}
	if d.Pending() != 0 {
		t.Fatalf("%d pending", d.Pending())
	}
}

func TestReceiveMaximumIsKept(t *testing.T) {
	s := newServer(t)
	d, err := New(s.config(t))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 10)
	for range 5 {
		if err := d.PublishAsync("u/t", nil, 1, func(err error) { done <- err }); err != nil {
			t.Fatal(err)
		}
	}
	run(t, d)
	p := s.peer()
	p.send(&mqtt.Connack{Props: mqtt.ConnackProps{ReceiveMaximum: 2}})
	hello, report := p.publish(), p.publish()
	p.expect(mqtt.SUBSCRIBE)
	p.say("d/app/x", 1, nil)
	p.expect(mqtt.PUBACK) // it is awake, and sends no third message
	p.ack(hello)
	first := p.publish() // only the PUBACK made room for it
	p.ack(report)
	p.ack(first)
	if err := wait(t, done); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		p.ack(p.publish())
		if err := wait(t, done); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWhatPublishRefuses(t *testing.T) {
	s := newServer(t)
	d := start(t, s.config(t))
	ctx := context.Background()
	for _, topic := range []string{"d", "d/cmd", "u/+", "u/#", "u/\x00", "u/\xff"} {
		if d.Publish(ctx, topic, nil, 1) == nil {
			t.Errorf("published to %q", topic)
		}
	}
	if d.Publish(ctx, "u/t", nil, 2) == nil {
		t.Error("published at QoS 2")
	}
	if err := d.Publish(ctx, "u/t", make([]byte, MaxPayload+1), 1); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	p := s.peer()
	p.welcome(&mqtt.Connack{Props: mqtt.ConnackProps{MaxPacketSize: 100}})
	if err := d.Publish(ctx, "u/t", make([]byte, 100), 1); !errors.Is(err, ErrTooLarge) {
		t.Errorf("beyond the server's maximum: %v", err)
	}
	result := make(chan error, 1)
	go func() { result <- d.Publish(ctx, "u/t", nil, 1) }()
	m := p.publish()
	p.send(&mqtt.Ack{Type: mqtt.PUBACK, PacketID: m.PacketID, Code: mqtt.NotAuthorized})
	if err := wait(t, result); !errors.Is(err, ErrRefused) {
		t.Errorf("refused: %v", err)
	}
	short, cancel := context.WithCancel(ctx)
	cancel()
	if err := d.Publish(short, "u/late", nil, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("not waited for: %v", err)
	}
	if m := p.publish(); string(m.Topic) != "private/ABCD1234/u/late" {
		t.Errorf("the message nobody waits for was not sent, but %s", m.Topic)
	}
}

func TestStopEndsWhatIsHeld(t *testing.T) {
	s := newServer(t)
	d, err := New(s.config(t))
	if err != nil {
		t.Fatal(err)
	}
	stop := run(t, d)
	p := s.peer()
	p.welcome(&mqtt.Connack{})
	result := make(chan error, 1)
	go func() { result <- d.Publish(context.Background(), "u/t", nil, 1) }()
	p.publish()
	stop()
	if err := wait(t, result); !errors.Is(err, ErrStopped) {
		t.Fatalf("got %v", err)
	}
	p.expect(mqtt.DISCONNECT)
	if err := d.Publish(context.Background(), "u/t", nil, 1); !errors.Is(err, ErrStopped) {
		t.Fatalf("afterwards: %v", err)
	}
	if d.Run(context.Background()) == nil {
		t.Fatal("it ran twice")
	}
}

// TestStopWhileConnecting: a server that takes the connection and says nothing cannot hold
// Run, nor can one that never answers CONNECT.
func TestStopWhileConnecting(t *testing.T) {
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	s := newServer(t)
	cfg := s.config(t)
	dialled := make(chan bool, 10)
	cfg.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
		dialled <- true
		return new(net.Dialer).DialContext(ctx, network, mute.Addr().String())
	}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	stop := run(t, d)
	wait(t, dialled)
	stop()

	if d, err = New(s.config(t)); err != nil {
		t.Fatal(err)
	}
	stop = run(t, d)
	s.peer()
	stop()
}

func TestPingsAndGivesUpASilentServer(t *testing.T) {
	s := newServer(t)
	cfg := s.config(t)
	cfg.KeepAlive = time.Second
	start(t, cfg)
	p := s.peer()
	p.welcome(&mqtt.Connack{})
	for range 2 {
		p.expect(mqtt.PINGREQ)
		p.send(&mqtt.Ping{Type: mqtt.PINGRESP})
	}
	p.expect(mqtt.PINGREQ)
	s.peer() // without an answer it comes again
	p.gone()
}

// TestPingsWhileItOnlyReads: 3.1.2.10 counts what the client sends.
func TestPingsWhileItOnlyReads(t *testing.T) {
	s := newServer(t)
	cfg := s.config(t)
	cfg.KeepAlive = time.Second
	start(t, cfg)
	p := s.peer()
	p.welcome(&mqtt.Connack{})
	stop := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				p.say("d/time", 0, message.Time{}.Encode(message.CBOR))
			case <-stop:
				return
			}
		}
	}()
	p.expect(mqtt.PINGREQ)
	close(stop)
	<-ended
}

func TestServersAreTriedInOrder(t *testing.T) {
	s := newServer(t)
	cfg := s.config(t)
	cfg.Servers = []string{"dead.test:1", testServer, "never.test"}
	tried := make(chan string, 10)
	cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		tried <- addr
		if addr == "dead.test:1" {
			return nil, errors.New("no route")
		}
		return s.dial(ctx, network, addr)
	}
	connected := make(chan string, 10)
	cfg.Connected = func(server string) { connected <- server }
	gone := make(chan error, 10)
	cfg.Disconnected = func(err error) { gone <- err }
	start(t, cfg)
	for range 2 { // each round begins with the first
		p := s.peer()
		p.welcome(&mqtt.Connack{})
		if a, b, c := wait(t, tried), wait(t, tried), wait(t, connected); a != "dead.test:1" || b != testServer+":8883" || c != testServer {
			t.Fatalf("tried %s, %s; connected to %s", a, b, c)
		}
		p.send(&mqtt.Disconnect{Code: mqtt.ServerShuttingDown})
		if err := wait(t, gone); err == nil || !bytes.Contains([]byte(err.Error()), []byte("server shutting down")) {
			t.Fatalf("ended with %v", err)
		}
	}
}

func TestRefusedConnectionIsTriedAgain(t *testing.T) {
	s := newServer(t)
	start(t, s.config(t))
	for range 3 {
		s.peer().send(&mqtt.Connack{Code: mqtt.NotAuthorized})
	}
	s.peer().welcome(&mqtt.Connack{})
}

func TestBackoff(t *testing.T) {
	shortest, longest := time.Second, 5*time.Minute
	for n := range 100 {
		base := longest
		if n < 9 {
			base = min(longest, 2*time.Second<<n)
		}
		seen := map[time.Duration]bool{}
		for range 50 {
			w := backoff(n, shortest, longest)
			if w < base/2 || w > base || w < shortest || w > longest {
				t.Fatalf("round %d waits %v, base %v", n, w, base)
			}
			seen[w] = true
		}
		if len(seen) < 10 {
			t.Fatalf("round %d: no jitter, %d values", n, len(seen))
		}
	}
}

func TestHostileServer(t *testing.T) {
	alias := &mqtt.Publish{Topic: []byte("private/ABCD1234/d/x"), Alias: 1}
	other := &mqtt.Publish{Topic: []byte("private/00000001/d/cmd")}
	up := &mqtt.Publish{Topic: []byte("private/ABCD1234/u/x")}
	qos2 := &mqtt.Publish{Topic: []byte("private/ABCD1234/d/x"), QoS: 2, PacketID: 1}
	cases := map[string][]byte{
		"packet type 0":        {0, 0},
		"length of five bytes": {0x30, 0xFF, 0xFF, 0xFF, 0xFF, 0x01},
		"packet beyond 256KiB": {0x30, 0xFF, 0xFF, 0x7F},
		"a second CONNACK":     (&mqtt.Connack{}).Append(nil, mqtt.V5),
		"a CONNECT":            (&mqtt.Connect{Version: mqtt.V5}).Append(nil, mqtt.V5),
		"PUBACK for nothing":   (&mqtt.Ack{Type: mqtt.PUBACK, PacketID: 999}).Append(nil, mqtt.V5),
		"topic alias":          alias.Append(nil, mqtt.V5),
		"another's command":    other.Append(nil, mqtt.V5),
		"not under d/":         up.Append(nil, mqtt.V5),
		"QoS 2":                qos2.Append(nil, mqtt.V5),
		"SUBACK for nothing":   (&mqtt.Suback{PacketID: 999, Codes: []mqtt.ReasonCode{0}}).Append(nil, mqtt.V5),
	}
	s := newServer(t)
	cfg := s.config(t)
	cfg.Command = func(context.Context, Command) (Value, error) { t.Error("a command ran"); return nil, nil }
	start(t, cfg)
	for name, wire := range cases {
		p := s.peer()
		p.welcome(&mqtt.Connack{})
		if _, err := p.conn.Write(wire); err != nil {
			t.Fatal(err)
		}
		h, body, err := p.packet()
		var bye mqtt.Disconnect
		if err != nil || h.Type != mqtt.DISCONNECT || bye.Decode(mqtt.V5, h.Flags, body) != nil || !bye.Code.Failed() {
			t.Errorf("%s: answered with %v %v %v", name, h.Type, bye.Code, err)
		}
		p.gone()
	}
}

func TestLoad(t *testing.T) {
	if _, err := Load(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("empty directory: %v", err)
	}
	dir := t.TempDir()
	writeCredentials(t, dir)
	cfg, err := Load(dir)
	if err != nil || len(cfg.Roots) != 2 {
		t.Fatalf("%d roots, %v", len(cfg.Roots), err)
	}
	if _, err := Load(dir); err == nil {
		t.Fatal("two processes share one state directory")
	}
	cfg.Store.(*FileStore).Close()
	key := filepath.Join(dir, "device.key")
	if err := os.Chmod(key, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(dir); err == nil || !bytes.Contains([]byte(err.Error()), []byte("chmod 600 "+key)) {
		t.Fatalf("readable key: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	s := newServer(t)
	cases := map[string]func(*Config){
		"no server":    func(c *Config) { c.Servers = nil },
		"no roots":     func(c *Config) { c.Roots = nil },
		"no store":     func(c *Config) { c.Store = nil },
		"leaf as root": func(c *Config) { c.Roots[0] = s.root.serverLeaf(t, nil).Leaf },
		"no id":        func(c *Config) { c.Certificate = deviceCertificate(t, "abcd1234") },
		"short state":  func(c *Config) { c.Store.Save("state", []byte{1}) },
		"damaged state": func(c *Config) {
			store := &MemStore{}
			state{cid: 7}.save(store)
			store.blobs[stateName][8] ^= 1
			c.Store = store
		},
	}
	for name, spoil := range cases {
		cfg := s.config(t)
		spoil(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestCostOfAnIdleDevice counts goroutines: one per device, and one of the fake server.
func TestCostOfAnIdleDevice(t *testing.T) {
	const devices = 50
	s := newServer(t)
	cfg := s.config(t)
	before := runtime.NumGoroutine()
	for range devices {
		cfg.Store = &MemStore{}
		start(t, cfg)
	}
	hold := make(chan struct{})
	defer close(hold)
	for range devices {
		p := s.peer()
		p.welcome(&mqtt.Connack{})
		go func() { // stands for the server's reader, so that the sum is known
			<-hold
			p.conn.Close()
		}()
	}
	most := before + devices*2 + 5
	deadline := time.Now().Add(patience)
	for runtime.NumGoroutine() > most {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<16)
			t.Fatalf("%d goroutines, want at most %d\n%s", runtime.NumGoroutine(), most, buf[:runtime.Stack(buf, true)])
		}
		runtime.Gosched()
	}
}

func FuzzState(f *testing.F) {
	store := &MemStore{}
	if err := (state{cid: 1<<32 | 7, floor: 1790000000}).save(store); err != nil {
		f.Fatal(err)
	}
	f.Add(store.blobs[stateName])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		store := &MemStore{blobs: map[string][]byte{stateName: b}}
		s, err := loadState(store)
		if err != nil {
			return
		}
		if err := s.save(store); err != nil || !bytes.Equal(store.blobs[stateName], b) {
			t.Fatal(fmt.Sprintf("%x came back as %x", b, store.blobs[stateName]), err)
		}
	})
}

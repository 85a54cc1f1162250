package device

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"hawser/internal/message"
	"hawser/internal/mqtt"
)

// stormPeer serves one connection until it has read a random number of packets: it stores
// every PUBLISH, acknowledges most, and then closes without a word.
func stormPeer(p *peer, resumed bool, stored func(*mqtt.Publish)) {
	defer p.conn.Close()
	if _, err := p.conn.Write((&mqtt.Connack{SessionPresent: resumed}).Append(nil, p.v)); err != nil {
		return
	}
	for range 20 + rand.IntN(200) {
		h, body, err := p.packet()
		if err != nil {
			return
		}
		var m mqtt.Publish
		if h.Type != mqtt.PUBLISH || m.Decode(p.v, h.Flags, body) != nil {
			continue
		}
		stored(&m)
		if _, err := p.conn.Write((&mqtt.Ack{Type: mqtt.PUBACK, PacketID: m.PacketID}).Append(nil, p.v)); err != nil {
			return
		}
	}
}

// TestNothingIsLostOverManyConnections: eight publishers, a server that closes again and
// again. Each message that Publish reports as stored was stored, each is reported once,
// and what is stored first comes in the order of its publisher.
func TestNothingIsLostOverManyConnections(t *testing.T) {
	const publishers, each = 8, 250
	s := newServer(t)
	cfg := s.config(t)
	cfg.QueueLimit = 64
	d := start(t, cfg)
	var mu sync.Mutex
	seen := map[uint32]bool{}
	last := map[uint32]uint32{}
	connections := 0
	stored := func(m *mqtt.Publish) {
		if !bytes.HasSuffix(m.Topic, []byte("u/n")) {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		n := binary.BigEndian.Uint32(m.Payload)
		who, count := n>>16, n&0xFFFF
		if !seen[n] && count > 0 && last[who] != count-1 {
			t.Errorf("publisher %d: message %d came after %d", who, count, last[who])
		}
		if seen[n] = true; count > last[who] {
			last[who] = count
		}
	}
	go func() {
		for {
			select {
			case p := <-s.peers:
				mu.Lock()
				connections++
				mu.Unlock()
				stormPeer(p, rand.IntN(2) == 0, stored)
			case <-t.Context().Done():
				return
			}
		}
	}()
	var group sync.WaitGroup
	var reports atomic.Int64
	for who := range uint32(publishers) {
		group.Go(func() { publishAll(t, d, who, each, &reports) })
	}
	group.Wait()
	mu.Lock()
	defer mu.Unlock()
	if len(seen) != publishers*each || reports.Load() != publishers*each || d.Pending() != 0 {
		t.Fatalf("%d stored, %d reported, %d pending", len(seen), reports.Load(), d.Pending())
	}
	if connections < 5 {
		t.Fatalf("only %d connections", connections)
	}
	t.Logf("%d messages over %d connections", len(seen), connections)
}

// publishAll sends numbered messages, four at a time, and waits for their reports.
func publishAll(t *testing.T, d *Device, who uint32, each int, reports *atomic.Int64) {
	slots := make(chan struct{}, 4)
	for n := range uint32(each) {
		slots <- struct{}{}
		payload := binary.BigEndian.AppendUint32(nil, who<<16|n)
		err := d.PublishAsync("u/n", payload, 1, func(err error) {
			if err != nil {
				t.Errorf("message %d of %d: %v", n, who, err)
			}
			reports.Add(1)
			<-slots
		})
		if err != nil {
			t.Error(err)
			return
		}
	}
	for range cap(slots) {
		slots <- struct{}{}
	}
}

// scripted is a connection on which the server has said all there is to say.
type scripted struct {
	net.Conn // nil: what is not overridden is not used
	from     *bytes.Reader
}

func (c scripted) Read(b []byte) (int, error)       { return c.from.Read(b) }
func (c scripted) Write(b []byte) (int, error)      { return len(b), nil }
func (c scripted) Close() error                     { return nil }
func (c scripted) SetReadDeadline(time.Time) error  { return nil }
func (c scripted) SetWriteDeadline(time.Time) error { return nil }

// FuzzServer lets a server say anything after CONNACK. Whatever it is, the device neither
// crashes nor runs a command whose number is not higher than the last.
func FuzzServer(f *testing.F) {
	cmd := mqtt.Publish{Topic: []byte("private/ABCD1234/d/cmd"), QoS: 1, PacketID: 1}
	for cid := uint64(1); cid < 4; cid++ {
		cmd.Payload = message.Command{CID: 3 - cid%2, Name: "x"}.Encode(message.Encoding(cid % 2))
		f.Add(append(cmd.Append(nil, mqtt.V5), cmd.Append(nil, mqtt.V5)...), false)
	}
	f.Add((&mqtt.Publish{Topic: []byte("private/ABCD1234/d/time"), Payload: message.Time{Seconds: 1790000000}.Encode(message.CBOR)}).Append(nil, mqtt.V5), false)
	offer := mqtt.Publish{Topic: []byte("private/ABCD1234/d/pki"), QoS: 1, PacketID: 9, Payload: message.PKI{No: 1, Certificate: []byte{0x30, 0}}.Encode(message.CBOR)}
	f.Add(offer.Append(nil, mqtt.V5), false)
	f.Add((&mqtt.Disconnect{Code: mqtt.ServerBusy}).Append(nil, mqtt.V5), true)
	s := &fakeServer{t: f, root: newAuthority(f, "root A", nil)}
	leaf := s.root.serverLeaf(f, nil).Leaf
	base := s.config(f)
	base.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	f.Fuzz(func(t *testing.T, said []byte, old bool) {
		cfg := base
		cfg.Store, cfg.MQTT311 = &MemStore{}, old
		var highest uint64
		cfg.Command = func(_ context.Context, cmd Command) (Value, error) {
			if cmd.CID <= highest {
				t.Errorf("command %d ran after %d", cmd.CID, highest)
			}
			highest = cmd.CID
			return cmd.Args, nil
		}
		d, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		c := &session{device: d, conn: scripted{from: bytes.NewReader(said)}, leaf: leaf, version: d.version, topics: d.id.Topic("d/#"),
			keepAlive: time.Minute, maxPacket: mqtt.MaxRemaining, window: maxWindow}
		if err := d.serve(context.Background(), c, "fuzz"); err == nil || errors.Is(err, context.Canceled) {
			t.Errorf("a stream of %d bytes ended with %v", len(said), err)
		}
		d.workers.Wait()
	})
}

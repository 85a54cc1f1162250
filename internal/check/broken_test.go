package check

import (
	"bufio"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"hawser/internal/mqtt"
	"hawser/internal/pki"
)

// fault is the one thing that a broken broker gets wrong. "" is a correct broker.
type fault string

// The people of the brokers of these tests.
const (
	nameDevice  = "ABCD1234"
	nameOther   = "0BADCAFE"
	nameRevoked = "DEAD0001"
	nameExpired = "DEAD0002"
	nameServer  = "DEAD0003"
	nameService = "backend"
)

// realm is what all brokers of a test share: a CA, a server's key, people.
type realm struct {
	world  *World
	people map[string]*Credentials
}

func newRealm(t *testing.T) *realm {
	t.Helper()
	w, err := NewWorld("localhost")
	if err != nil {
		t.Fatal(err)
	}
	r := &realm{world: w, people: map[string]*Credentials{}}
	for name, change := range map[string]func(*draft){
		nameDevice: nil, nameOther: nil, nameRevoked: nil, nameService: nil,
		nameExpired: func(d *draft) { d.to = time.Now().Add(-time.Minute) },
		nameServer:  func(d *draft) { d.ext = replaced(d.ext, extUsage(serverAuth)) },
	} {
		key, err := pki.GenerateKey()
		if err != nil {
			t.Fatal(err)
		}
		if r.people[name], err = forgeUnder(w.clientCA, name, key, change); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// broker is a small MQTT broker in memory: certificates by chain and name, the client id
// of a device is its name, its topics are private/<name>/#; a service reads private/+/u/#.
// Without a fault it does what the check wants of a broker.
type broker struct {
	realm *realm
	fault fault
	l     net.Listener
	done  sync.WaitGroup
	crash sync.Once

	admitting sync.Mutex    // held during handshakes by a broker that has one place for them
	places    chan struct{} // a place for each connection that is not admitted yet, where they are few

	mu       sync.Mutex // guards what follows
	open     map[net.Conn]bool
	sessions map[string]*mailbox
	retained map[string]message
	revoked  map[string]bool
}

// connectTime is what a correct broker gives a client for its CONNECT.
const connectTime = 500 * time.Millisecond

func (b *broker) has(f ...fault) bool { return b.fault != "" && slices.Contains(f, b.fault) }

// start serves until stop is called, and gives the options to check it with.
func (r *realm) start(t *testing.T, f fault) (o BrokerOptions, stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &broker{realm: r, fault: f, l: l, open: map[net.Conn]bool{}, sessions: map[string]*mailbox{}, retained: map[string]message{},
		revoked: map[string]bool{nameRevoked: true}, places: make(chan struct{}, 100)}
	b.done.Go(b.accept)
	command, end := b.control(t)
	return BrokerOptions{Target: l.Addr().String(), Name: "localhost", Device: r.people[nameDevice], Other: r.people[nameOther], Revoked: r.people[nameRevoked],
		Service: r.people[nameService], Expired: r.people[nameExpired], Server: r.people[nameServer], Revoke: command,
		Topics: "private/{id}/#", Step: 4 * time.Second, Patience: 2 * time.Second}, func() { b.die(); b.done.Wait(); end() }
}

// control gives the shell command that revokes {id}, by two named pipes.
func (b *broker) control(t *testing.T) (command string, end func()) {
	t.Helper()
	dir := t.TempDir()
	var pipes []*os.File
	for _, name := range []string{"ask", "done"} {
		path := filepath.Join(dir, name)
		if err := syscall.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		pipes = append(pipes, f)
	}
	go func() { // it ends when the pipe is closed
		line, err := bufio.NewReader(pipes[0]).ReadString('\n')
		if err != nil {
			return
		}
		b.revoke(strings.TrimSpace(line))
		_, _ = pipes[1].WriteString("done\n") // without it the command does not end, which is seen
	}()
	return fmt.Sprintf("echo {id} > %[1]s/ask && read line < %[1]s/done", dir), func() { pipes[0].Close(); pipes[1].Close() }
}

func (b *broker) accept() {
	for {
		c, err := b.l.Accept()
		if err != nil {
			return
		}
		if b.has(silentPlaces) && !b.place(true) {
			c.Close()
			continue
		}
		b.mu.Lock()
		b.open[c] = true
		b.mu.Unlock()
		b.done.Go(func() {
			b.serve(c)
			c.Close()
			b.mu.Lock()
			delete(b.open, c)
			b.mu.Unlock()
		})
	}
}

// die is a crash, as far as anybody outside can tell.
func (b *broker) die() {
	b.crash.Do(func() {
		b.l.Close()
		b.mu.Lock()
		defer b.mu.Unlock()
		for c := range b.open {
			c.Close()
		}
	})
}

// serve is one connection from its first byte to its last.
func (b *broker) serve(raw net.Conn) {
	rw, name, err := b.admitted(raw)
	if err != nil {
		if b.has(neverRefuses) {
			io.Copy(io.Discard, raw)
		}
		return
	}
	p := &peer{b: b, raw: raw, rw: rw, name: name, out: make(chan []byte, 1<<14), aliases: map[uint16]string{}}
	written := make(chan struct{})
	go p.write(written)
	p.read()
	p.leave()
	<-written
}

// peer is one client that was admitted.
type peer struct {
	b    *broker
	raw  net.Conn
	rw   io.ReadWriter
	name string // CN of its certificate
	id   string // client id; "" before CONNECT
	v    mqtt.Version
	will *mqtt.Will
	out  chan []byte // closed by leave alone; guarded by b.mu
	gone bool        // guarded by b.mu

	session *mailbox
	aliases map[uint16]string
	data    []byte
	unacked int // QoS 2 messages that were not released
	filters int

	pardoned bool // it has sent what should have ended the connection
}

func (p *peer) write(done chan struct{}) {
	defer close(done)
	for packet := range p.out {
		p.raw.SetWriteDeadline(time.Now().Add(10 * time.Second))
		if _, err := p.rw.Write(packet); err != nil {
			break
		}
	}
	p.raw.Close()
	for range p.out { // what nobody reads any more
	}
}

// send queues a packet; b.mu is held. A client that does not read is thrown out.
func (p *peer) send(packet []byte) {
	if p.gone {
		return
	}
	select {
	case p.out <- packet:
	default:
		p.raw.Close()
	}
}

func (p *peer) say(packet []byte) {
	p.b.mu.Lock()
	defer p.b.mu.Unlock()
	p.send(packet)
}

var errEnd = errors.New("the connection ends")

// read takes packets until one of them, or the client, ends the connection.
func (p *peer) read() {
	until := time.Now().Add(connectTime)
	for p.id == "" || p.session != nil {
		p.raw.SetReadDeadline(p.deadline(until))
		h, body, err := p.packet()
		if err != nil && !p.b.forgives(err, 0, nil) {
			if p.b.has(diesOfMalformed) && errors.As(err, new(*mqtt.Error)) {
				p.b.die()
			}
			return
		}
		if err != nil { // it takes what it could not read for nothing
			p.data = nil
			continue
		}
		if err := p.handle(h, body); err != nil {
			return
		}
	}
}

// deadline is when a client that has not said CONNECT is thrown out.
func (p *peer) deadline(until time.Time) time.Time {
	switch {
	case p.id != "" || p.pardoned || p.b.has(waitsForConnect, oneLock):
		return time.Time{}
	case p.b.has(renewsTime):
		return time.Now().Add(connectTime)
	}
	return until
}

// maxPacket is the longest packet that is taken.
const maxPacket = 70_000

func (p *peer) packet() (h mqtt.Header, body []byte, err error) {
	for {
		h, n, err := mqtt.ParseHeader(p.data)
		if err != nil {
			return h, nil, err
		}
		if h.Remaining > maxPacket && !p.b.has(trustsLengths) {
			return h, nil, errEnd
		}
		if p.b.has(trustsLengths) && h.Remaining > maxPacket {
			p.raw.SetReadDeadline(time.Time{})
		}
		if n > 0 && n+h.Remaining <= len(p.data) {
			body, p.data = p.data[n:n+h.Remaining], p.data[n+h.Remaining:]
			return h, body, nil
		}
		if err := p.more(); err != nil {
			return h, nil, err
		}
	}
}

// more reads on. A broker with one lock for everything holds it while a packet is
// half here.
func (p *peer) more() error {
	if len(p.data) > 0 && p.b.has(oneLock) {
		p.b.mu.Lock()
		defer p.b.mu.Unlock()
	}
	buf := make([]byte, 1<<14)
	n, err := p.rw.Read(buf)
	p.data = append(p.data, buf[:n]...)
	if p.b.has(renewsTime) && p.id == "" {
		p.raw.SetReadDeadline(time.Now().Add(connectTime))
	}
	return err
}

// leave is the end of a connection: its Will goes out, its session stays or not.
func (p *peer) leave() {
	p.b.mu.Lock()
	defer p.b.mu.Unlock()
	p.b.part(p)
}

// part is leave with b.mu held; the second time it does nothing.
func (b *broker) part(p *peer) {
	if p.gone {
		return
	}
	p.gone = true
	close(p.out)
	if p.session != nil && p.session.at == p {
		p.session.at = nil
		if !p.session.keep {
			delete(b.sessions, p.session.key)
		}
	}
	if w := p.will; w != nil && !b.has(losesWills) {
		p.will = nil
		b.publish(message{topic: w.Topic, payload: string(w.Payload), qos: w.QoS, retain: w.Retain, from: p.name, will: true})
	}
}

// serverKey is what a broker proves itself with.
func (b *broker) serverKey() ([][]byte, *ecdsa.PrivateKey) {
	return b.realm.world.broker, b.realm.world.brokerKey
}

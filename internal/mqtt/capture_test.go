package mqtt

import (
	"bytes"
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

var writeCorpus = flag.Bool("corpus", false, "write what the mosquitto programs said to the seed corpus")

// tee is a TCP proxy in front of a broker that keeps what went through it.
type tee struct {
	ln    net.Listener
	to    string
	wait  sync.WaitGroup
	mu    sync.Mutex
	heard *sync.Cond         // of mu: something was kept
	pairs [][2]*bytes.Buffer // guarded by mu, as what they hold: from the client, from the broker
}

func newTee(t *testing.T, broker string) *tee {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &tee{ln: ln, to: broker}
	p.heard = sync.NewCond(&p.mu)
	go p.run()
	return p
}

// keeper is the side of a tee that writes down.
type keeper struct {
	p   *tee
	buf *bytes.Buffer
}

func (k keeper) Write(b []byte) (int, error) {
	k.p.mu.Lock()
	defer k.p.mu.Unlock()
	defer k.p.heard.Broadcast()
	return k.buf.Write(b)
}

// waitForSubacks returns when brokers have sent n of them.
func (p *tee) waitForSubacks(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.subacks() < n {
		p.heard.Wait()
	}
}

func (p *tee) subacks() (n int) {
	for _, pair := range p.pairs {
		b := pair[1].Bytes()
		for {
			h, used, err := ParseHeader(b)
			if err != nil || used == 0 || used+h.Remaining > len(b) {
				break
			}
			if h.Type == SUBACK {
				n++
			}
			b = b[used+h.Remaining:]
		}
	}
	return n
}

func (p *tee) run() {
	for {
		c, err := p.ln.Accept()
		if err != nil {
			return
		}
		b, err := net.Dial("tcp", p.to)
		if err != nil {
			c.Close()
			continue
		}
		pair := [2]*bytes.Buffer{{}, {}}
		p.mu.Lock()
		p.pairs = append(p.pairs, pair)
		p.mu.Unlock()
		p.wait.Add(2)
		go p.copy(b, c, pair[0])
		go p.copy(c, b, pair[1])
	}
}

func (p *tee) copy(dst, src net.Conn, keep *bytes.Buffer) {
	defer p.wait.Done()
	defer dst.Close()
	io.Copy(io.MultiWriter(keeper{p, keep}, dst), src)
}

func freePort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	return port
}

// startMosquitto runs the outside broker on a free port until the test ends.
func startMosquitto(t *testing.T) string {
	t.Helper()
	for _, tool := range []string{"mosquitto", "mosquitto_pub", "mosquitto_sub"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
	port := freePort(t)
	conf := filepath.Join(t.TempDir(), "m.conf")
	if err := os.WriteFile(conf, []byte("listener "+port+" 127.0.0.1\nallow_anonymous true\nmax_topic_alias 10\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("mosquitto", "-c", conf)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	addr := "127.0.0.1:" + port
	for deadline := time.Now().Add(10 * time.Second); ; {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			return addr
		}
		if time.Now().After(deadline) {
			t.Fatalf("mosquitto does not listen: %v", err)
		}
	}
}

// sessions are the command lines: a subscriber that leaves after n messages, and what is
// published while it is there.
func sessions(v string) (subs []string, pubs []string) {
	subs = []string{
		"-i sub1 -q 2 -t a/# -t $share/g/s/+ -C 4",
		"-i sub2 -q 1 -t a/b -R -U x/y -C 1 -k 10 -u user -P secret",
		"-i sub3 -c -q 1 -t s/+ -C 1 --will-topic w/3 --will-payload gone --will-qos 1 --will-retain",
	}
	pubs = []string{
		"-i p0 -q 0 -t a/b -m hello",
		"-i p1 -q 1 -t a/b/c -m {\"n\":1} -r",
		"-i p2 -q 2 -t a -m x --will-topic w/p --will-payload bye",
		"-i p3 -q 1 -t s/1 -m shared",
		"-i p4 -q 1 -t a/b/c -n -r",
	}
	if v == "mqttv5" {
		subs = append(subs, "-i sub4 -c -x 60 -q 1 -t a/b -C 1 -D subscribe subscription-identifier 42 -D subscribe user-property k v "+
			"-D connect receive-maximum 20 -D connect topic-alias-maximum 5 -D connect maximum-packet-size 4096 -D connect request-problem-information 0")
		pubs = append(pubs,
			"-i p5 -q 1 -t a/b -m props -D publish content-type text/plain -D publish response-topic r/1 -D publish correlation-data cd "+
				"-D publish user-property a 1 -D publish message-expiry-interval 30 -D publish user-property b 2 -D publish payload-format-indicator 1",
			"-i p6 -q 2 -t a/b -m alias -D publish topic-alias 3 -D connect session-expiry-interval 5 -D disconnect session-expiry-interval 9 -D connect user-property c d",
			"-i p7 -q 1 -t a/z -m w --will-topic w/7 --will-payload late --will-qos 2 -D will will-delay-interval 3 -D will message-expiry-interval 60 "+
				"-D will content-type text/plain -D will user-property e f -D connect request-response-information 1")
	}
	return subs, pubs
}

func (p *tee) command(t *testing.T, tool, version, args string) *exec.Cmd {
	t.Helper()
	_, port, _ := net.SplitHostPort(p.ln.Addr().String())
	all := append([]string{"-h", "127.0.0.1", "-p", port, "-V", version}, strings.Fields(args)...)
	if tool == "mosquitto_sub" {
		all = append(all, "-W", "20")
	}
	cmd := exec.Command(tool, all...)
	cmd.Stderr = os.Stderr
	return cmd
}

func (p *tee) talk(t *testing.T, version string) {
	subs, pubs := sessions(version)
	var running []*exec.Cmd
	for _, s := range subs {
		cmd := p.command(t, "mosquitto_sub", version, s)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		running = append(running, cmd)
		p.waitForSubacks(len(running))
	}
	for _, s := range pubs {
		if err := p.command(t, "mosquitto_pub", version, s).Run(); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	for _, cmd := range running {
		if err := cmd.Wait(); err != nil {
			t.Fatalf("%v: %v", cmd.Args, err)
		}
	}
}

// TestMosquittoTraffic decodes all that the mosquitto programs say to each other, in both
// versions and directions.
func TestMosquittoTraffic(t *testing.T) {
	broker := startMosquitto(t)
	for _, version := range []string{"mqttv311", "mqttv5"} {
		p := newTee(t, broker)
		p.talk(t, version)
		p.ln.Close()
		p.wait.Wait()
		seen := map[Type]int{}
		for _, pair := range p.pairs {
			checkStream(t, versionOf(version), pair[0].Bytes(), false, seen)
			checkStream(t, versionOf(version), pair[1].Bytes(), true, seen)
		}
		for typ := CONNECT; typ <= DISCONNECT; typ++ {
			if seen[typ] == 0 && typ != PINGREQ && typ != PINGRESP {
				t.Errorf("%s: no %v seen", version, typ)
			}
		}
		t.Logf("%s: %d connections, packets %v", version, len(p.pairs), seen)
	}
}

func versionOf(s string) Version {
	if s == "mqttv5" {
		return V5
	}
	return V311
}

func checkStream(t *testing.T, v Version, b []byte, fromBroker bool, seen map[Type]int) {
	t.Helper()
	for len(b) > 0 {
		h, n, err := ParseHeader(b)
		if err != nil || n == 0 || n+h.Remaining > len(b) {
			t.Fatalf("header of %x: %v", b, err)
		}
		body := b[n : n+h.Remaining]
		p, again := newPacket(h.Type), newPacket(h.Type)
		if fromBroker {
			p, again = atClient{p}, atClient{again}
		}
		if err := p.Decode(v, h.Flags, body); err != nil {
			t.Errorf("%v %x: %v", h.Type, body, err)
		} else {
			roundTrip(t, v, p, again)
		}
		seen[h.Type]++
		if *writeCorpus {
			saveSeed(t, v, h, body)
		}
		b = b[n+h.Remaining:]
	}
}

func saveSeed(t *testing.T, v Version, h Header, body []byte) {
	t.Helper()
	target, which := fuzzTarget(h.Type)
	text := fmt.Sprintf("go test fuzz v1\nbyte(%q)\nbyte(%q)\nbyte(%q)\n[]byte(%q)\n", rune(v), rune(which), rune(h.Flags), body)
	dir := filepath.Join("testdata", "fuzz", target)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("mosquitto-%x", sha256.Sum256([]byte(text)))[:22]
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func fuzzTarget(t Type) (name string, which int) {
	switch t {
	case PUBACK, PUBREC, PUBREL, PUBCOMP:
		return "FuzzAck", int(t - PUBACK)
	case PINGREQ, PINGRESP:
		return "FuzzPing", int(t - PINGREQ)
	}
	name = strings.ToLower(t.String())
	return "Fuzz" + strings.ToUpper(name[:1]) + name[1:], 0
}

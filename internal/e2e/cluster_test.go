package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
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

	natsd "github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// node is what a NATS server of the cluster is told in HAWSER_E2E_NATS.
type node struct {
	Name, Dir     string
	Port, Cluster int
	Routes        []string
}

// natsServer is this binary as one server of the cluster, until its input ends.
func natsServer() error {
	var n node
	if err := json.Unmarshal([]byte(os.Getenv("HAWSER_E2E_NATS")), &n); err != nil {
		return err
	}
	sys, app := natsd.NewAccount("SYS"), natsd.NewAccount("APP")
	s, err := natsd.NewServer(&natsd.Options{
		ServerName: n.Name, Host: "127.0.0.1", Port: n.Port, NoSigs: true, NoLog: true,
		JetStream: true, StoreDir: n.Dir, SyncAlways: true, SyncInterval: time.Minute,
		Cluster:  natsd.ClusterOpts{Name: "e2e", Host: "127.0.0.1", Port: n.Cluster},
		Routes:   natsd.RoutesFromStr(strings.Join(n.Routes, ",")),
		Accounts: []*natsd.Account{sys, app}, SystemAccount: "SYS",
		Users: []*natsd.User{{Username: "sys", Password: "sys", Account: sys}, {Username: "app", Password: "app", Account: app}},
	})
	if err != nil {
		return err
	}
	s.Start()
	account, err := s.LookupAccount("APP")
	if err == nil {
		err = account.EnableJetStream(nil, nil)
	}
	if err != nil {
		return err
	}
	fmt.Println("up")
	_, err = io.Copy(io.Discard, os.Stdin)
	s.Shutdown()
	return err
}

// cluster is three NATS servers, each a process.
type cluster struct {
	t     *testing.T
	nodes [3]node
	procs [3]*exec.Cmd
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{t: t}
	dir := t.TempDir()
	var ports [6]int
	for i := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // only when all six are known: no two are the same
		ports[i] = l.Addr().(*net.TCPAddr).Port
	}
	var routes []string
	for _, p := range ports[3:] {
		routes = append(routes, fmt.Sprintf("nats://127.0.0.1:%d", p))
	}
	for i := range c.nodes {
		c.nodes[i] = node{fmt.Sprintf("n%d", i), filepath.Join(dir, fmt.Sprint(i)), ports[i], ports[3+i], routes}
	}
	return c
}

func (c *cluster) start(i int) {
	c.t.Helper()
	text, err := json.Marshal(c.nodes[i])
	if err != nil {
		c.t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "HAWSER_E2E_NATS="+string(text))
	cmd.Stderr = os.Stderr
	if _, err = cmd.StdinPipe(); err != nil { // ends with us, and the server with it
		c.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		c.t.Fatal(err)
	}
	c.procs[i] = cmd
	c.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait() // it was killed
		}
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "up\n" {
		c.t.Fatalf("NATS server %d does not start: %q, %v", i, line, err)
	}
}

func (c *cluster) kill(i int) {
	c.t.Helper()
	if err := c.procs[i].Process.Kill(); err != nil {
		c.t.Fatal(err)
	}
	_ = c.procs[i].Wait() // it was killed
}

func (c *cluster) url(user string) string {
	var urls []string
	for _, n := range c.nodes {
		urls = append(urls, fmt.Sprintf("nats://%s:%s@127.0.0.1:%d", user, user, n.Port))
	}
	return strings.Join(urls, ",")
}

// leader gives the server that leads the log's stream, once two others follow it.
func (c *cluster) leader(nc *nats.Conn, stream string) (leader int) {
	c.t.Helper()
	until(c.t, "a leader with two replicas", func() bool {
		m, err := nc.Request("$JS.API.STREAM.INFO."+stream, nil, time.Second)
		if err != nil {
			return false
		}
		var in natsd.JSApiStreamInfoResponse
		if json.Unmarshal(m.Data, &in) != nil || in.StreamInfo == nil || in.Cluster == nil {
			return false
		}
		current := 0
		for _, r := range in.Cluster.Replicas {
			if r.Current && !r.Offline {
				current++
			}
		}
		_, err = fmt.Sscanf(in.Cluster.Leader, "n%d", &leader)
		return err == nil && current == 2
	})
	return leader
}

// held waits until the lease is held: while its stream had no leader it could not be
// renewed, and one that ran out is the next server's to take.
func (c *cluster) held(nc *nats.Conn, stream string) {
	c.t.Helper()
	c.leader(nc, stream)
	until(c.t, "the lease to be renewed", func() bool {
		m, err := nc.Request("$JS.API.STREAM.INFO."+stream, nil, time.Second)
		var in natsd.JSApiStreamInfoResponse
		return err == nil && json.Unmarshal(m.Data, &in) == nil && in.StreamInfo != nil && in.State.Msgs == 1
	})
}

// TestThreeNodeLog: the log in a cluster of three, whose leader is killed twelve times
// during ingest. Nothing acknowledged is lost, and a second server is refused.
func TestThreeNodeLog(t *testing.T) {
	t.Parallel() // it mostly waits for elections
	c := newCluster(t)
	for i := range c.nodes {
		c.start(i)
	}
	f := c.fleet()
	f.fast()
	dir := f.device("ABCD1234")
	other := f.copyOf(t) // as if it were on another machine
	s := f.serve()
	nc, err := nats.Connect(c.url("app"), nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	stream := "HW_" + f.id() + "_LOG"
	acks := make(chan struct{}, 1<<20)
	p := &publisher{id: "ABCD1234", qos: 2, tls: credentials(t, dir), topic: "private/ABCD1234/u/n", acks: acks, sent: map[uint16]string{}}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			if err := p.run(s.addr); err != nil {
				t.Error(err)
			}
			select {
			case <-stop:
				return
			default: // hung up on: nothing was acknowledged for ten seconds
			}
		}
	})
	awaitAcks := func(n int) {
		t.Helper()
		for range n {
			select {
			case <-acks:
			case <-time.After(patience):
				t.Fatal("nothing is acknowledged")
			}
		}
	}
	for range 12 {
		awaitAcks(20)
		leader := c.leader(nc, stream)
		c.kill(leader)
		for len(acks) > 0 {
			<-acks
		}
		awaitAcks(20) // the other two go on
		c.start(leader)
	}
	c.leader(nc, stream)
	c.held(nc, "HW_"+f.id()+"_LEASE")
	other.refused("another server uses this fleet's log")
	close(stop)
	checkBeforeStop(t, s, f, p, &wg)
}

// checkBeforeStop ends the publisher by ending the server, and looks at the log again.
func checkBeforeStop(t *testing.T, s *server, f *fleet, p *publisher, wg *sync.WaitGroup) {
	t.Helper()
	s.stop()
	wg.Wait()
	f.serve()
	checkLog(t, f, []*publisher{p})
}

// fleet makes a fleet whose log is in the cluster.
func (c *cluster) fleet() *fleet {
	c.t.Helper()
	f := &fleet{c.t, filepath.Join(c.t.TempDir(), "fleet")}
	var last result
	until(c.t, "the streams in the cluster", func() bool { // it elects its leader first
		last = f.hawser("init", "--domain", "localhost", "--trial", "--nats-url", c.url("app"))
		return last.code == 0
	})
	f.configure(`nats_system_url = ""`, fmt.Sprintf("nats_system_url = %q", c.url("sys")))
	return f
}

// id is the fleet's id, from hawser.toml.
func (f *fleet) id() string {
	f.t.Helper()
	text, err := os.ReadFile(f.path("hawser.toml"))
	if err != nil {
		f.t.Fatal(err)
	}
	for line := range strings.SplitSeq(string(text), "\n") {
		if id, ok := strings.CutPrefix(line, `id = "`); ok {
			return strings.TrimSuffix(id, `"`)
		}
	}
	f.t.Fatal(errors.New("hawser.toml has no id"))
	return ""
}

package check

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"hawser/internal/pki"
)

// peers are two devices and a service of a broker whose CA is in dir/clients.crt.
func peers(t *testing.T, w *World, dir string) (a, b, service *Credentials) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "clients.crt"), pki.EncodeCert(w.clientCA.der), 0o600); err != nil {
		t.Fatal(err)
	}
	var out []*Credentials
	for _, name := range []string{nameDevice, nameOther, nameService} {
		key, err := pki.GenerateKey()
		if err != nil {
			t.Fatal(err)
		}
		c, err := forgeUnder(w.clientCA, name, key, nil)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, c)
	}
	return out[0], out[1], out[2]
}

// mosquittoBroker starts the real thing, with an ACL file or without.
func mosquittoBroker(t *testing.T, acl string) BrokerOptions {
	t.Helper()
	program, err := exec.LookPath("mosquitto")
	if err != nil {
		if program, err = exec.LookPath("/usr/sbin/mosquitto"); err != nil {
			t.Skip("mosquitto is not installed: the broker cases are not shown on it")
		}
	}
	w, err := NewWorld("localhost")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := w.Save(filepath.Join(dir, "world")); err != nil {
		t.Fatal(err)
	}
	a, b, service := peers(t, w, dir)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(addr)
	conf := fmt.Sprintf("listener %s 127.0.0.1\ncafile %[2]s/clients.crt\ncertfile %[2]s/world/broker.crt\nkeyfile %[2]s/world/broker.key\n"+
		"require_certificate true\nuse_identity_as_username true\ntls_version tlsv1.3\nallow_anonymous true\nset_tcp_nodelay true\nuser root\n", port, dir)
	if acl != "" {
		conf += "acl_file " + dir + "/acl\n"
		if err := os.WriteFile(filepath.Join(dir, "acl"), []byte(acl), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-c", filepath.Join(dir, "conf"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for deadline := time.Now().Add(10 * time.Second); ; {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	o := BrokerOptions{Target: addr, Name: "localhost", Device: a, Other: b, Topics: "private/{id}/#", Step: 3 * time.Second, Patience: 1500 * time.Millisecond}
	if acl == aclUsers {
		if err := os.WriteFile(filepath.Join(dir, "after"), []byte(strings.Replace(acl, aclDevice, "", 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		o.Service = service
		o.Revoke = fmt.Sprintf("test {id} = %s && cp %[2]s/after %[2]s/acl && kill -HUP %d", nameDevice, dir, cmd.Process.Pid)
	}
	return o
}

// An ACL for whoever has a certificate, and one that names everybody and can be taken back.
const (
	aclFile   = "pattern readwrite private/%u/#\n"
	aclDevice = "user " + nameDevice + "\ntopic readwrite private/" + nameDevice + "/#\n"
	aclUsers  = aclDevice + "user " + nameOther + "\ntopic readwrite private/" + nameOther + "/#\nuser " + nameService + "\ntopic read private/+/u/#\n"
)

// mosquittoVersion is the one that TestMosquittoBroker knows.
const mosquittoVersion = "2.0.11"

func needMosquitto(t *testing.T) {
	t.Helper()
	program, err := exec.LookPath("mosquitto")
	if err != nil {
		program = "/usr/sbin/mosquitto"
	}
	out, _ := exec.Command(program, "-h").Output() // it ends with 3 after its help
	if len(out) == 0 {
		t.Skip("mosquitto is not installed: the broker cases are not shown on it")
	}
	if !bytes.Contains(out, []byte("mosquitto version "+mosquittoVersion+"\n")) {
		t.Skipf("what is known is known of mosquitto %s, and this is %.30q", mosquittoVersion, out)
	}
}

// knownOf is what mosquitto 2.0.11 with OpenSSL 3 does that is not a pass, whatever its ACL:
// it speaks AES-256, goes by the client id for sessions, grants shared subscriptions that are
// none, and has no time-out for CONNECT within the patience.
func knownOf(acl string) map[string]Verdict {
	known := map[string]Verdict{"B3.aes256": Fail, "B4.takeover": Fail, "B6.share-empty": Fail, "B6.share-no-filter": Fail,
		"B9.partial-connect": Warn, "B9.slow-connect": Warn, "B9.huge-length": Warn}
	odd := []string{"B4.other", "B4.plus", "B4.hash", "B4.slash", "B4.dots", "B4.lower", "B4.longer", "B4.long", "B4.empty"}
	filters := []string{"B5.all", "B5.levels", "B5.everybody", "B5.other", "B5.system", "B5.share-all", "B5.share-other", "B5.share-everybody"}
	for _, id := range slices.Concat(odd, filters) {
		known[id] = Warn // it grants every filter, and looks at each delivery
		if acl == "" {
			known[id] = Fail
		}
	}
	known["B5.own-below-plus"] = Warn
	if acl == aclUsers { // a right that goes from the ACL touches neither connections nor what is kept
		for _, id := range []string{"B10.connected", "B10.again", "B10.retained", "B10.queued", "B10.in-flight", "B11.device-id"} {
			known[id] = Fail
		}
	}
	if acl == "" {
		for _, id := range []string{"B7.qos0", "B7.qos1", "B7.qos2", "B7.v5", "B7.retained", "B8.will", "B8.will-retained", "B8.will-v5"} {
			known[id] = Fail
		}
	}
	return known
}

// TestMosquittoBroker: a real broker that is not ours, with an ACL and without. What it
// does is known to the last case.
func TestMosquittoBroker(t *testing.T) {
	needMosquitto(t)
	t.Parallel()
	for name, acl := range map[string]string{"with an ACL": aclFile, "with an ACL of users": aclUsers, "without": ""} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := mosquittoBroker(t, acl)
			r, err := Broker(context.Background(), o)
			if err != nil {
				t.Fatal(err)
			}
			known := knownOf(acl)
			for i := range r.Results {
				x := &r.Results[i]
				want, ok := known[x.ID]
				if !ok {
					want = Pass
				}
				if g := x.Verdict; g != want && g != NotApplicable {
					t.Errorf("%s: %s, not %s: %s (%s)", x.ID, g, want, x.Why, x.EvidenceText())
				}
				if x.Took > time.Second {
					t.Logf("%s took %v", x.ID, x.Took.Round(time.Millisecond))
				}
			}
			missing := 11 // no service, nobody revoked
			if acl == aclUsers {
				missing = 1
			}
			if n := r.Counts(); n[NotApplicable] != missing {
				t.Errorf("%v", n)
			}
			t.Logf("%v in %v", r.Counts(), r.Ended.Sub(r.Began).Round(time.Millisecond))
		})
	}
}

// TestBrokerInterrupted: a broker that says nothing, steps without end, and Ctrl-C in the
// middle: the run ends, and says so of the case that it was in.
func TestBrokerInterrupted(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		io.ReadFull(c, make([]byte, 5)) // the ClientHello has begun: the check waits for an answer
		cancel()
		<-ctx.Done()
		io.Copy(io.Discard, c)
	}()
	r := newRealm(t)
	rep, err := Broker(ctx, BrokerOptions{Target: l.Addr().String(), Name: "localhost", Device: r.people[nameDevice], Other: r.people[nameOther],
		Topics: "private/{id}/#", Step: time.Hour, Patience: time.Hour})
	if !errors.Is(err, context.Canceled) || len(rep.Results) != 1 || rep.Results[0].Verdict != Inconclusive || rep.Results[0].Why != "interrupted" || rep.OK() {
		t.Errorf("%v, %+v", err, rep.Results)
	}
}

// TestBrokerMute: a broker that takes connections and says nothing is inconclusive, or FAILs
// the honest case, in the time of one step.
func TestBrokerMute(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts for it
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r := newRealm(t)
	o := BrokerOptions{Target: l.Addr().String(), Name: "localhost", Device: r.people[nameDevice], Other: r.people[nameOther],
		Topics: "private/{id}/#", Step: 100 * time.Millisecond, Patience: 100 * time.Millisecond}
	told := 0
	o.Told = func(done, all int, _ *Result) {
		if told++; done != told || all != len(BrokerCases()) {
			t.Errorf("%d of %d after %d", done, all, told)
		}
	}
	rep, err := Broker(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	if n := rep.Counts(); n[Fail] != 1 || n[Inconclusive] != len(rep.Results)-1 || told != len(rep.Results) || rep.OK() {
		t.Errorf("%v, %d told", n, told)
	}
	// Every case by itself, without the honest one before it: none waits longer than it may.
	o.Told = nil
	var all sync.WaitGroup
	for _, c := range BrokerCases() {
		if c.needs != nil && c.needs(&o) != "" {
			continue
		}
		all.Go(func() {
			x := (&siege{o: &o, report: &Report{}}).one(context.Background(), c)
			if x.Verdict == Pass || x.Verdict == "" {
				t.Errorf("%s with a broker that says nothing: %s: %s", x.ID, x.Verdict, x.Why)
			}
		})
	}
	all.Wait()
}

package e2e

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// outside is the arguments with which a mosquitto client connects with the files in dir.
func outside(s *server, dir, id string) []string {
	name := filepath.Join(dir, "device")
	if strings.HasSuffix(dir, "backend") {
		name = filepath.Join(dir, "service")
	}
	return []string{"-h", "localhost", "-p", s.port(), "-i", id, "--cafile", filepath.Join(dir, "ca.crt"),
		"--cert", name + ".crt", "--key", name + ".key", "-V", "mqttv311", "-q", "1"}
}

// mosquittoPub publishes one message.
func mosquittoPub(t *testing.T, s *server, dir, id, topic, payload string, more ...string) result {
	t.Helper()
	return run(t, "mosquitto_pub", append(append(outside(s, dir, id), "-t", topic, "-m", payload), more...)...)
}

func mustPub(t *testing.T, s *server, dir, id, topic, payload string, more ...string) {
	t.Helper()
	if r := mosquittoPub(t, s, dir, id, topic, payload, more...); r.code != 0 {
		t.Fatalf("mosquitto_pub as %s on %s: exit code %d, %s%s", id, topic, r.code, r.stdout, r.stderr)
	}
}

// subscriber is a mosquitto_sub that runs.
type subscriber struct {
	t    *testing.T
	cmd  *exec.Cmd
	said *lines
}

// mosquittoSub subscribes and waits for the SUBACK. It ends after count messages.
func mosquittoSub(t *testing.T, s *server, dir, id string, count int, filters ...string) *subscriber {
	t.Helper()
	// stdbuf: what it says goes into a pipe, and has to come at once.
	args := append([]string{"-oL", "mosquitto_sub"}, append(outside(s, dir, id), "-d", "-C", fmt.Sprint(count), "-F", "GOT %t %p")...)
	for _, f := range filters {
		args = append(args, "-t", f)
	}
	u := &subscriber{t, exec.Command("stdbuf", args...), newLines()}
	u.cmd.Stdout, u.cmd.Stderr = u.said, u.said
	if err := u.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = u.cmd.Process.Kill() // it has ended by itself, if all went well
		_ = u.cmd.Wait()
	})
	u.said.await(t, 0, "Subscribed (mid:")
	return u
}

// messages waits for its end and gives what it received.
func (u *subscriber) messages() (got []string) {
	u.t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- u.cmd.Wait() }()
	select {
	case <-ended:
	case <-time.After(patience):
		u.t.Fatalf("mosquitto_sub does not end:\n%s", u.said)
	}
	for line := range strings.SplitSeq(u.said.String(), "\n") {
		if m, ok := strings.CutPrefix(line, "GOT "); ok {
			got = append(got, m)
		}
	}
	return got
}

// TestMosquittoOneIdentity: the client id is the certificate's name or there is no session.
func TestMosquittoOneIdentity(t *testing.T) {
	needTools(t, "mosquitto_pub")
	f := newFleet(t)
	own, other := f.device("ABCD1234"), f.device("ABCD9999")
	s := f.serve()
	mustPub(t, s, own, "ABCD1234", "private/ABCD1234/u/t", "mine")
	r := mosquittoPub(t, s, other, "ABCD1234", "private/ABCD1234/u/t", "forged")
	if r.code == 0 {
		t.Errorf("ABCD9999 was let in as ABCD1234: %s%s", r.stdout, r.stderr)
	}
	s.logged("ABCD9999", `CONNECT as \"ABCD1234\"`, "client id differs from the certificate's name")
	r = mosquittoPub(t, s, other, "ABCD9999", "private/ABCD1234/u/t", "forged")
	if r.code == 0 {
		t.Errorf("ABCD9999 published under ABCD1234: %s%s", r.stdout, r.stderr)
	}
	mustPub(t, s, own, "ABCD1234", "private/ABCD1234/u/t", "mine too")
	var have []string
	for _, m := range f.tail("--topic", "private/ABCD1234/#") {
		have = append(have, m.From+" "+string(m.Payload))
	}
	if want := `ABCD1234 "6d696e65" ABCD1234 "6d696e6520746f6f"`; strings.Join(have, " ") != want {
		t.Errorf("the log holds %s", have)
	}
}

// TestMosquittoSubscribesInVain: a device gets what is its own and nothing else, whatever
// it asks for, retained or live.
func TestMosquittoSubscribesInVain(t *testing.T) {
	needTools(t, "mosquitto_pub", "mosquitto_sub", "stdbuf")
	f := newFleet(t)
	other, snoop := f.device("ABCD1234"), f.device("5A00F001")
	backend := f.service("backend", "read #", "write #")
	s := f.serve()
	publishAll := func(word string, more ...string) {
		t.Helper()
		mustPub(t, s, other, "ABCD1234", "private/ABCD1234/u/t", word, more...)
		mustPub(t, s, other, "ABCD1234", "private/ABCD1234/state", word, more...)
		mustPub(t, s, backend, "b1", "private/ABCD1234/d/app/x", word, more...)
		mustPub(t, s, backend, "b1", "shop/orders", word, more...)
		mustPub(t, s, backend, "b1", "private/5A00F001/d/app/x", word) // its own comes last
	}
	publishAll("retained", "-r")
	for _, filter := range []string{"#", "+/#", "private/#", "private/+/u/#", "private/+/d/#", "private/ABCD1234/#", "private/ABCD1234/u/t",
		"shop/orders", "$SYS/#", "$share/g/#", "$share/g/private/ABCD1234/#", "$share/g/private/+/u/#", "+/5A00F001/#"} {
		t.Run(strings.ReplaceAll(filter, "/", " "), func(t *testing.T) {
			u := mosquittoSub(t, s, snoop, "5A00F001", 1, filter, "private/5A00F001/d/app/#")
			if line := u.said.find(0, "Subscribed (mid:"); !strings.Contains(line, ": 128, 1") {
				t.Errorf("SUBACK: %s", line)
			}
			publishAll("live")
			if got := u.messages(); len(got) != 1 || got[0] != "private/5A00F001/d/app/x live" {
				t.Errorf("received %q", got)
			}
		})
	}
	u := mosquittoSub(t, s, backend, "b2", 8, "#") // the retained ones, then the live ones
	publishAll("live")
	if got := u.messages(); len(got) != 8 {
		t.Errorf("the backend, which may, received %q", got)
	}
}

// TestMosquittoWill: a Will where its owner may not publish is refused at CONNECT.
func TestMosquittoWill(t *testing.T) {
	needTools(t, "mosquitto_pub")
	f := newFleet(t)
	f.device("ABCD1234")
	dir := f.device("5A00F001")
	s := f.serve()
	for _, topic := range []string{"private/ABCD1234/u/t", "private/ABCD1234/d/cmd", "private/5A00F001/d/cmd", "private/5A00F001/d", "shop/orders", "$SYS/broker"} {
		for _, more := range [][]string{nil, {"--will-retain"}} {
			from := len(s.log.String())
			r := mosquittoPub(t, s, dir, "5A00F001", "private/5A00F001/u/t", "x", append(more, "--will-topic", topic, "--will-payload", "w")...)
			if r.code == 0 {
				t.Errorf("a Will on %s %s was accepted", topic, more)
			}
			s.log.await(t, from, "5A00F001", "will on a topic that is not allowed", topic)
		}
	}
	mustPub(t, s, dir, "5A00F001", "private/5A00F001/u/t", "x", "--will-topic", "private/5A00F001/u/gone", "--will-payload", "w")
	if list := f.tail("--topic", "private/#"); len(list) != 1 || list[0].Topic != "private/5A00F001/u/t" {
		t.Errorf("the log holds %+v", list)
	}
}

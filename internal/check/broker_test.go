package check

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"hawser/internal/pki"
)

// peers are two devices of a broker whose CA is in dir/clients.crt.
func peers(t *testing.T, w *World, dir string) (a, b *Credentials) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "clients.crt"), pki.EncodeCert(w.clientCA.der), 0o600); err != nil {
		t.Fatal(err)
	}
	var out []*Credentials
	for _, name := range []string{"ABCD1234", "0BADCAFE"} {
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
	return out[0], out[1]
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
	a, b := peers(t, w, dir)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(addr)
	conf := fmt.Sprintf("listener %s 127.0.0.1\ncafile %[2]s/clients.crt\ncertfile %[2]s/world/broker.crt\nkeyfile %[2]s/world/broker.key\n"+
		"require_certificate true\nuse_identity_as_username true\ntls_version tlsv1.3\nallow_anonymous true\nuser root\n", port, dir)
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
	return BrokerOptions{Target: addr, Name: "localhost", Device: a, Other: b, Topics: "private/{id}/#", Step: 5 * time.Second, Patience: 3 * time.Second}
}

const aclFile = "pattern readwrite private/%u/#\n"

func TestMosquittoBroker(t *testing.T) {
	for _, acl := range []string{"", aclFile} {
		o := mosquittoBroker(t, acl)
		r, err := Broker(context.Background(), o)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range r.Results {
			t.Logf("%-24s %-12s %5d ms %s | %s | %s", x.ID, x.Verdict, x.Took.Milliseconds(), x.Why, x.Evidence.Ended, x.Evidence.Note)
		}
		t.Logf("%v in %v", r.Counts(), r.Ended.Sub(r.Began))
	}
}

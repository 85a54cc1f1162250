package broker

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// mosquitto is the command line of mosquitto_pub and mosquitto_sub, clients that
// we did not write, for one certificate.
type mosquitto struct {
	r    *rig
	args []string
}

func newMosquitto(t *testing.T, r *rig, cert tls.Certificate) *mosquitto {
	t.Helper()
	for _, tool := range []string{"mosquitto_pub", "mosquitto_sub"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
	key, err := x509.MarshalECPrivateKey(cert.PrivateKey.(*ecdsa.PrivateKey))
	r.ok(err)
	for name, block := range map[string]pem.Block{
		"root.pem": {Type: "CERTIFICATE", Bytes: r.w.root.Cert.Raw},
		"cert.pem": {Type: "CERTIFICATE", Bytes: cert.Certificate[0]},
		"key.pem":  {Type: "EC PRIVATE KEY", Bytes: key},
	} {
		r.ok(os.WriteFile(r.path(name), pem.EncodeToMemory(&block), 0o600))
	}
	_, port, err := net.SplitHostPort(r.l.Addr().String())
	r.ok(err)
	return &mosquitto{r, []string{"-h", "localhost", "-p", port, "--tls-version", "tlsv1.3",
		"--cafile", r.path("root.pem"), "--cert", r.path("cert.pem"), "--key", r.path("key.pem")}}
}

// run runs one of the two to its end and gives its output.
func (m *mosquitto) run(tool, input string, args ...string) string {
	m.r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, tool, append(slices.Clone(m.args), args...)...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		m.r.t.Fatalf("%s %v: %v\n%s", tool, args, err, out)
	}
	return string(out)
}

// listen starts mosquitto_sub, waits until the broker has its subscriptions, and
// gives a function that waits for its end and gives the output.
func (m *mosquitto) listen(id string, args ...string) func() string {
	m.r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	m.r.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, "mosquitto_sub", append(append(slices.Clone(m.args), "-i", id), args...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	m.r.ok(cmd.Start())
	subscriptions := strings.Count(strings.Join(args, " ")+" ", "-t ")
	m.r.until("mosquitto_sub to subscribe", func() bool {
		m.r.b.mu.Lock()
		defer m.r.b.mu.Unlock()
		for key, s := range m.r.b.sessions {
			if key.ClientID == id {
				return len(s.subs) == subscriptions
			}
		}
		return false
	})
	return func() string {
		m.r.t.Helper()
		if err := cmd.Wait(); err != nil {
			m.r.t.Fatalf("mosquitto_sub %v: %v\n%s", args, err, out.String())
		}
		return out.String()
	}
}

func TestConformanceMosquittoClients(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"311", "5"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			r, all := everything(t)
			m := newMosquitto(t, r, all)
			pub := func(input string, args ...string) {
				t.Helper()
				m.run("mosquitto_pub", input, append([]string{"-V", version}, args...)...)
			}
			lines := strings.Join(numbered(300), "\n") + "\n"
			for qos := range 3 {
				q := fmt.Sprint(qos)
				got := m.listen("sub"+q, "-V", version, "-q", q, "-t", "t/x", "-t", "other", "-C", "301", "-F", "%t %q %r %p")
				pub(lines, "-i", "pub", "-q", q, "-t", "t/x", "-l")
				pub("", "-q", q, "-t", "kept/"+q, "-r", "-m", "kept")
				pub("", "-q", q, "-t", "other", "-n")
				var want []string
				for _, p := range numbered(300) {
					want = append(want, fmt.Sprintf("t/x %d 0 %s", qos, p))
				}
				want = append(want, fmt.Sprintf("other %d 0 ", qos), "")
				same(t, "QoS "+q, strings.Split(got(), "\n"), want)
			}
			out := m.run("mosquitto_sub", "", "-V", version, "-t", "kept/#", "-q", "2", "-C", "3", "-F", "%t %q %r %p")
			sorted := strings.Split(strings.TrimSpace(out), "\n")
			slices.Sort(sorted)
			same(t, "retained", sorted, []string{"kept/0 0 1 kept", "kept/1 1 1 kept", "kept/2 2 1 kept"})

			// A session that was away, a Will, and a payload of many TLS records.
			m.run("mosquitto_sub", "", "-V", version, "-i", "away", "-c", "-q", "2", "-t", "away", "-E", "-x", "600")
			pub(lines, "-q", "2", "-t", "away", "-l")
			out = m.run("mosquitto_sub", "", "-V", version, "-i", "away", "-c", "-q", "2", "-t", "away", "-C", "300", "-x", "0")
			same(t, "away", strings.Fields(out), numbered(300))
			got := m.listen("sub", "-V", version, "-q", "1", "-t", "big", "-C", "1", "-N")
			big := strings.Repeat("0123456789abcdef", 12<<10)
			pub(big, "-q", "1", "-t", "big", "-s")
			if got() != big {
				t.Fatal("a payload of 192 KiB came back changed")
			}
		})
	}
}

// The properties of 5.0 as mosquitto writes and reads them.
func TestConformanceMosquittoProperties(t *testing.T) {
	t.Parallel()
	r, all := everything(t)
	m := newMosquitto(t, r, all)
	got := m.listen("sub", "-V", "5", "-q", "1", "-t", "t", "-C", "2", "-D", "subscribe", "subscription-identifier", "7",
		"-F", "%p|%F|%C|%R|%D|%P|%S")
	m.run("mosquitto_pub", "", "-V", "5", "-q", "1", "-t", "t", "-m", "x", "-D", "publish", "payload-format-indicator", "1",
		"-D", "publish", "content-type", "text/plain", "-D", "publish", "response-topic", "reply", "-D", "publish", "correlation-data", "abc",
		"-D", "publish", "user-property", "k", "v", "-D", "publish", "user-property", "a", "b")
	m.run("mosquitto_pub", "", "-V", "5", "-q", "1", "-t", "t", "-m", "plain", "-D", "publish", "topic-alias", "3")
	if out := got(); !strings.HasPrefix(out, "x|1|text/plain|reply|abc|k:v a:b|7\nplain|") {
		t.Fatalf("%q", out)
	}
}

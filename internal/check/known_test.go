package check

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"hawser/device"
)

// known is a real client, with what is known of one version of it. Everything that is
// not named passes or is n/a.
type known struct {
	version  [][]string // command and what its output must begin with, in turns
	exec     string
	features []string // nil: found out
	only     string   // groups
	fail     string
	warn     string
	silent   string // inconclusive
	step     time.Duration
}

const (
	toGeneral = "X12.rsa X12.p384 X12.p384-ca X13.deep H3.tls12 H4.aes256" // legitimate for a general client
	ofTLS     = "X1 X2 X3 X4 X5 X6 X7 X8 X9 X10 X11 X12 X13 H1 H2 H3 H4 H5 H6 H7 H8 H9 R1 R2 R3 R4 R5 R6 C1 C2"
	ofMQTT    = "M1 M2 M3 M4 M5 M6"
	mosquitto = " -h {host} -p {port} --cafile {cafile} --cert {cert} --key {key} -t t"
	// connect is a CONNECT, on the way to a client of TLS that knows no MQTT.
	connect = `{ printf '\020\020\000\004MQTT\004\002\000\074\000\004test'; exec tail -f /dev/null; } | `
)

func openssl3() []string { return []string{"openssl version", "OpenSSL 3.0."} }
func mosquitto2() []string {
	return []string{"mosquitto_pub --help", "mosquitto_pub is a simple mqtt client", "2.0.11"}
}
func knownClients() map[string]known {
	return map[string]known{
		"mosquitto_pub": {version: [][]string{mosquitto2(), openssl3()}, exec: "exec mosquitto_pub" + mosquitto + " -m x", only: ofTLS + " R7 " + ofMQTT, step: 4 * time.Second,
			fail: "X3.nul X4.common-name X5.wildcard-none X7.no-signature H7.hello H7.encrypted", warn: toGeneral,
			silent: "R7.stall-tcp R7.stall-hello R7.stall-certificate R7.stall-finished"},
		"mosquitto_sub": {version: [][]string{mosquitto2(), openssl3()}, exec: "exec mosquitto_sub -q 1" + mosquitto, only: ofMQTT, step: 3 * time.Second,
			warn: "M1.flags M1.length-max M1.wildcard"},
		"openssl s_client": {version: [][]string{openssl3()}, exec: connect + "openssl s_client -quiet -verify_return_error -verify_hostname {host} " +
			"-servername {host} -CAfile {cafile} -cert {cert} -key {key} -connect {host}:{port}", only: ofTLS, features: []string{}, step: 4 * time.Second,
			fail: "X4.common-name X7.no-signature H7.hello H7.encrypted", warn: toGeneral},
		"gnutls-cli": {version: [][]string{{"gnutls-cli --version", "gnutls-cli 3.7.9"}}, exec: connect + "gnutls-cli --x509cafile {cafile} " +
			"--x509certfile {cert} --x509keyfile {key} -p {port} {host}", only: ofTLS, features: []string{}, step: 4 * time.Second,
			fail: "X4.common-name X7.empty-usage H3.tls11 H3.tls10 H5.no-change H7.hello H7.encrypted H7.session H8.across-keys", warn: toGeneral},
	}
}

// missing says why what is known does not hold here, "" when it does.
func (k *known) missing() string {
	for _, v := range k.version {
		words := strings.Fields(v[0])
		out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
		if err != nil && len(out) == 0 {
			return fmt.Sprintf("%s: %v: what is known of it is not checked", v[0], err)
		}
		for _, want := range v[1:] {
			if head := out[:min(len(out), 200)]; !bytes.Contains(head, []byte(want)) {
				return fmt.Sprintf("what is known is of %q; here it is %q", want, head)
			}
		}
	}
	return ""
}

// together runs one function for each name, all at the same time, and then a subtest for
// each with what it gave: they wait more than they work.
func together[T any](t *testing.T, names []string, do func(t *testing.T, name string) T, then func(t *testing.T, name string, got T)) {
	got := make([]T, len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() { got[i] = do(t, name) })
	}
	wg.Wait()
	for i, name := range names {
		t.Run(name, func(t *testing.T) { then(t, name, got[i]) })
	}
}

// worldFiles makes a world and writes its files.
func worldFiles(t *testing.T) (*World, string) {
	t.Helper()
	w, err := NewWorld("localhost")
	if err != nil {
		t.Error(err)
		return nil, ""
	}
	dir := filepath.Join(t.TempDir(), "world")
	if err := w.Save(dir); err != nil {
		t.Error(err)
	}
	return w, dir
}

// TestKnownClients: what real clients pass and fail is what is written down.
func TestKnownClients(t *testing.T) {
	t.Parallel()
	clients := knownClients()
	together(t, slices.Sorted(maps.Keys(clients)), func(t *testing.T, name string) *Report {
		k := clients[name]
		if k.missing() != "" {
			return nil
		}
		w, dir := worldFiles(t)
		rep, err := Device(context.Background(), DeviceOptions{World: w, Dir: dir, Host: "localhost", Profile: General, Wait: 30 * time.Second,
			Step: k.step, Patience: time.Second, Parallel: 8, Exec: k.exec, Features: k.features, Only: strings.Fields(k.only)})
		if err != nil {
			t.Error(err)
		}
		return rep
	}, func(t *testing.T, name string, rep *Report) {
		k := clients[name]
		if rep == nil {
			t.Skip(k.missing())
		}
		t.Logf("%v in %v", rep.Counts(), rep.Ended.Sub(rep.Began).Round(time.Millisecond))
		k.compare(t, rep.Results)
	})
}

// compare reports what is not as it is known.
func (k *known) compare(t *testing.T, results []Result) {
	t.Helper()
	for _, r := range results {
		want := Pass
		for v, list := range map[Verdict]string{Fail: k.fail, Warn: k.warn, Inconclusive: k.silent} {
			if slices.Contains(strings.Fields(list), r.ID) {
				want = v
			}
		}
		if r.Verdict != want && !(want == Pass && r.Verdict == NotApplicable) {
			t.Errorf("%s: %s, known is %s: %s; %s; %s", r.ID, r.Verdict, want, r.Why, r.EvidenceText(), r.Evidence.Output)
		}
	}
}

// TestGo: a client of Go's crypto/tls, under the general profile.
func TestGo(t *testing.T) {
	t.Parallel()
	k := known{fail: "X7.empty-usage X7.no-signature H7.hello H7.encrypted H8.late-ccs", warn: toGeneral}
	if !strings.HasPrefix(runtime.Version(), "go1.26") {
		t.Skipf("what is known is of Go 1.26; here it is %s", runtime.Version())
	}
	w := tableWorld(t)
	var list []trial
	for _, c := range DeviceCases() {
		if strings.Contains(" "+ofTLS+" ", " "+c.Group()+" ") { // its MQTT is the test's own
			list = append(list, trial{c: c, mutant: "go", profile: General})
		}
	}
	holdAll(t, w, list)
	var results []Result
	for _, x := range list {
		results = append(results, *x.result)
	}
	k.compare(t, results)
}

// TestDeviceKit: this project's own client, under the profile of a microcontroller. What
// waits for its time-out of 30 s, and how it backs off, is left out. Its TLS is Go's.
func TestDeviceKit(t *testing.T) {
	t.Parallel()
	k := known{fail: "H7.hello H7.encrypted H8.late-ccs"}
	parts := map[string]string{
		"certificates": "X1 X2 X3 X4 X5 X6 X7 X8 X9 X10 X11 X12 X13", "hello": "H1 H2 H3 H4 H5 H6 H7 H8 H9 C1 C2", "records": "R1 R2 R3 R4 R5 R6",
		"gone": "R7.rst-tcp R7.fin-tcp R7.rst-hello R7.fin-hello R7.rst-certificate R7.fin-certificate R7.rst-finished R7.fin-finished R7.half-open",
		"mqtt": "M1 M2 M3 M4 M5 M6.present", "refused": "M6.refused-1 M6.refused-2 M6.refused-3 M6.refused-4 M6.refused-5 M8.no-pingresp",
	}
	together(t, slices.Sorted(maps.Keys(parts)), func(t *testing.T, name string) *Report {
		return deviceKit(t, strings.Fields(parts[name]))
	}, func(t *testing.T, name string, rep *Report) {
		if rep == nil {
			t.Fatal("no report")
		}
		t.Logf("%v in %v", rep.Counts(), rep.Ended.Sub(rep.Began).Round(time.Millisecond))
		k.compare(t, rep.Results)
	})
}

// deviceKit runs the cases against a device that is made with package device, and comes
// back soon.
func deviceKit(t *testing.T, only []string) *Report {
	t.Helper()
	w, dir := worldFiles(t)
	cfg, err := device.Load(dir)
	if err != nil {
		t.Error(err)
		return nil
	}
	cfg.BackoffMin, cfg.BackoffMax, cfg.KeepAlive = 5*time.Millisecond, 20*time.Millisecond, time.Second
	cfg.Clock, cfg.Log = time.Now, slog.New(slog.DiscardHandler)
	cfg.Command = func(context.Context, device.Command) (device.Value, error) { return device.ValueOf("done") }
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	rep, err := Device(ctx, DeviceOptions{World: w, Listen: "127.0.0.1:0", Profile: MCU, Wait: 30 * time.Second, Step: 4 * time.Second, Patience: 4 * time.Second, Only: only,
		Listening: func(addr string) {
			cfg.Servers = []string{"localhost:8883"}
			cfg.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, addr)
			}
			d, err := device.New(cfg)
			if err != nil {
				t.Error(err)
				return
			}
			wg.Go(func() { _ = d.Run(ctx) }) // ends with ctx
		}})
	if err != nil {
		t.Error(err)
	}
	return rep
}

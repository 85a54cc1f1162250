package device

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"hawser/internal/message"
)

// needTools says which outside program is missing.
func needTools(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
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

// serverFiles writes a server's key and certificate under a new root.
func serverFiles(t *testing.T, dir string) *authority {
	t.Helper()
	root := newAuthority(t, "root A", nil)
	cert := root.serverLeaf(t, nil)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, filepath.Join(dir, "s.crt"), "CERTIFICATE", cert.Certificate[0])
	writePEM(t, filepath.Join(dir, "s.key"), "PRIVATE KEY", key)
	return root
}

// outside is a server program on a port of its own, and the configuration of a device
// that reaches it.
func outside(t *testing.T, root *authority, port string, cmd *exec.Cmd) Config {
	t.Helper()
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	cfg := (&fakeServer{t: t, root: root}).config(t)
	cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	cfg.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, "127.0.0.1:"+port)
	}
	return cfg
}

// TestAgainstMosquitto is the kit with another's broker and tools.
func TestAgainstMosquitto(t *testing.T) {
	needTools(t, "mosquitto", "mosquitto_pub", "mosquitto_sub")
	for _, old := range []bool{false, true} {
		t.Run(fmt.Sprintf("MQTT311=%v", old), func(t *testing.T) {
			dir := t.TempDir()
			root := serverFiles(t, dir)
			port, plain := freePort(t), freePort(t)
			conf := fmt.Sprintf("user root\nper_listener_settings false\nallow_anonymous true\nlistener %s 127.0.0.1\nlistener %s 127.0.0.1\ncertfile %s/s.crt\nkeyfile %s/s.key\ntls_version tlsv1.3\nciphers_tls1.3 TLS_AES_128_GCM_SHA256\n", plain, port, dir, dir)
			if err := os.WriteFile(filepath.Join(dir, "m.conf"), []byte(conf), 0o600); err != nil {
				t.Fatal(err)
			}
			cfg := outside(t, root, port, exec.Command("mosquitto", "-c", filepath.Join(dir, "m.conf")))
			cfg.MQTT311 = old
			cfg.Command = func(context.Context, Command) (Value, error) { return ValueOf("done") }
			ready := make(chan string, 10)
			cfg.Connected = func(server string) { ready <- server }
			d := start(t, cfg)
			wait(t, ready)
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			for n := range 100 {
				if err := d.Publish(ctx, "u/n", []byte{byte(n)}, 1); err != nil {
					t.Fatal(err)
				}
			}
			answer := commandByMosquitto(t, ctx, plain)
			if answer.CID != 7 || answer.Status != message.OK || string(answer.Result.JSON()) != `"done"` {
				t.Fatalf("%+v", answer)
			}
		})
	}
}

// commandByMosquitto sends command 7 as JSON with mosquitto_rr, which waits for the answer.
func commandByMosquitto(t *testing.T, ctx context.Context, port string) message.Answer {
	t.Helper()
	needTools(t, "mosquitto_rr")
	cmd := exec.CommandContext(ctx, "mosquitto_rr", "-h", "127.0.0.1", "-p", port, "-V", "mqttv5", "-q", "1", "-W", "15",
		"-t", "private/"+testID+"/d/cmd", "-e", "private/"+testID+"/u/cmd", "-m", `{"cid":"7","expiry":"0","name":"x"}`, "-F", "%x")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("mosquitto_rr: %v, %s", err, out)
	}
	var payload []byte
	if _, err := fmt.Sscanf(string(out), "%x", &payload); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	a, err := message.DecodeAnswer(payload)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestSuitesOfOpenSSL: crypto/tls cannot be told which TLS 1.3 suites to choose, so another
// implementation has to offer the wrong ones.
func TestSuitesOfOpenSSL(t *testing.T) {
	needTools(t, "openssl")
	for suite, want := range map[string][2]bool{ // without and with AllowChaCha
		"TLS_AES_128_GCM_SHA256":       {true, true},
		"TLS_AES_256_GCM_SHA384":       {false, false},
		"TLS_CHACHA20_POLY1305_SHA256": {false, true},
	} {
		dir := t.TempDir()
		root := serverFiles(t, dir)
		port := freePort(t)
		cfg := outside(t, root, port, exec.Command("openssl", "s_server", "-accept", "127.0.0.1:"+port, "-quiet", "-tls1_3", "-num_tickets", "0",
			"-ciphersuites", suite, "-cert", filepath.Join(dir, "s.crt"), "-key", filepath.Join(dir, "s.key")))
		for i, allow := range []bool{false, true} {
			cfg.AllowChaCha = allow
			if err := dialOutside(t, cfg); (err == nil) != want[i] {
				t.Errorf("%s, AllowChaCha %v: %v", suite, allow, err)
			}
		}
	}
}

// dialOutside makes one handshake, and waits before it for the server to listen.
func dialOutside(t *testing.T, cfg Config) error {
	t.Helper()
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	raw, err := cfg.Dial(ctx, "tcp", "")
	for err != nil && ctx.Err() == nil {
		runtime.Gosched()
		raw, err = cfg.Dial(ctx, "tcp", "")
	}
	if err != nil {
		t.Fatal(err)
	}
	raw.Close()
	conn, _, _, err := d.dial(ctx, testServer, d.cfg.Certificate, d.cfg.Roots)
	if err == nil {
		conn.Close()
	}
	return err
}

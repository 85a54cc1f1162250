package e2e

import (
	"bytes"
	"context"
	"io"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"hawser/internal/mqtt"
)

// sclient connects with openssl s_client, sends a CONNECT for id and gives what the
// server sent back: want bytes, or all until the end of the connection.
func sclient(t *testing.T, s *server, id string, want int, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "openssl", append([]string{"s_client", "-connect", s.addr, "-servername", "localhost", "-quiet", "-no_ign_eof"}, args...)...)
	in, err := cmd.StdinPipe() // left open: its end would end s_client
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	hello := (&mqtt.Connect{Version: mqtt.V311, CleanStart: true, ClientID: id}).Append(nil, mqtt.V311)
	_, _ = in.Write(hello) // a client that was refused is gone already
	got, err := io.ReadAll(io.LimitReader(out, int64(want)))
	if err != nil {
		t.Fatal(err)
	}
	in.Close()
	_ = cmd.Wait() // it says no more than that it was refused
	if ctx.Err() != nil {
		t.Fatalf("s_client got %q and was not hung up on: %s", got, said.String())
	}
	return string(got)
}

// strangers makes a key and a certificate from a CA that is not the fleet's, for
// the name id.
func strangers(t *testing.T, id string) (crt, key string) {
	t.Helper()
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	for _, args := range [][]string{
		{"req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=Other CA", "-days", "2", "-keyout", file("ca.key"), "-out", file("ca.crt")},
		{"req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=" + id, "-keyout", file("d.key"), "-out", file("d.csr")},
		{"x509", "-req", "-in", file("d.csr"), "-CA", file("ca.crt"), "-CAkey", file("ca.key"), "-CAcreateserial", "-days", "2", "-out", file("d.crt")},
	} {
		if r := run(t, "openssl", args...); r.code != 0 {
			t.Fatalf("openssl %q: %s", args, r.stderr)
		}
	}
	return file("d.crt"), file("d.key")
}

// TestOpenSSLIsRefused: with the wrong version, suite or certificate there comes no
// CONNACK, and the log names the reason.
func TestOpenSSLIsRefused(t *testing.T) {
	needTools(t, "openssl")
	f := newFleet(t)
	good, gone := f.device("ABCD1234"), f.device("DEAD0001")
	f.do("device", "revoke", "DEAD0001", "--reason", "stolen")
	s := f.serve()
	later := f.device("DEAD0002")
	f.do("device", "revoke", "DEAD0002", "--reason", "stolen while it runs")
	pair := func(dir string) []string {
		return []string{"-cert", filepath.Join(dir, "device.crt"), "-key", filepath.Join(dir, "device.key")}
	}
	foreignCrt, foreignKey := strangers(t, "ABCD1234")
	control := func() {
		t.Helper()
		if got := sclient(t, s, "ABCD1234", 4, pair(good)...); got != "\x20\x02\x00\x00" {
			t.Fatalf("an honest s_client got %q and no CONNACK", got)
		}
	}
	control()
	for _, c := range []struct {
		name, id string
		args     []string
		words    []string // of the line in the log
	}{
		{"TLS 1.2", "ABCD1234", append(pair(good), "-tls1_2"), []string{"client offered only unsupported versions"}},
		{"suite", "ABCD1234", append(pair(good), "-ciphersuites", "TLS_AES_256_GCM_SHA384"), []string{"no cipher suite of the allow-list", "TLS_AES_256_GCM_SHA384"}},
		{"no certificate", "ABCD1234", nil, []string{"client didn't provide a certificate"}},
		{"another CA", "ABCD1234", []string{"-cert", foreignCrt, "-key", foreignKey}, []string{"never imported"}},
		{"revoked", "DEAD0001", pair(gone), []string{"revoked, of ", "DEAD0001"}},
		{"revoked live", "DEAD0002", pair(later), []string{"revoked, of ", "DEAD0002"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			from := len(s.log.String())
			start := time.Now()
			if got := sclient(t, s, c.id, 1000, c.args...); got != "" {
				t.Errorf("the server answered %q", got)
			}
			t.Logf("%v: %s", time.Since(start).Round(time.Millisecond), s.log.await(t, from, append(c.words, "connection rejected")...))
		})
	}
	control()
}

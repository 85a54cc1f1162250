package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"hawser/internal/admin"
	"hawser/internal/config"
	"hawser/internal/durable"
	"hawser/internal/fleet"
	"hawser/internal/pki"
)

// server is one server process under measurement.
type server struct {
	name  string
	addr  string
	fleet *fleetFiles
	cmd   *exec.Cmd
	admin string // Hawser's admin socket, "" for mosquitto
}

func (s *server) pid() int { return s.cmd.Process.Pid }

// stop ends the process the way a service manager does.
func (s *server) stop() error {
	s.cmd.Process.Signal(syscall.SIGTERM)
	done := make(chan error, 1)
	go func() { done <- s.cmd.Wait() }()
	select {
	case err := <-done:
		return err
	case <-time.After(30 * time.Second):
		s.cmd.Process.Kill()
		return errors.Join(fmt.Errorf("%s did not stop within 30 s", s.name), <-done)
	}
}

func stopAll(list []*server) (err error) {
	for _, s := range list {
		err = errors.Join(err, s.stop())
	}
	return err
}

// collect has Hawser give back what it does not use; mosquitto has nothing of
// the kind.
func (s *server) collect(ctx context.Context) error {
	if s.admin == "" {
		return nil
	}
	c := admin.NewClient(s.dialAdmin, true)
	defer c.Close()
	return errors.Join(c.GC(ctx), c.GC(ctx)) // twice: a sync.Pool survives one
}

func (s *server) dialAdmin(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", s.admin)
}

// startProfile begins a CPU profile of the parts' child under a name; "off" ends
// the last one. It does nothing for other servers.
func (r *runner) startProfile(ctx context.Context, s *server, name string) {
	if r.Profile == "" || s.admin == "" || r.Hawser != "" {
		return
	}
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return s.dialAdmin(ctx) }}
	defer t.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://hawser/v1/profile/"+name, nil)
	if err == nil {
		var resp *http.Response
		if resp, err = t.RoundTrip(req); err == nil {
			resp.Body.Close()
		}
	}
	if err != nil {
		r.say("no profile of %s: %v", name, err)
	}
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// startHawser runs the product, or the parts of it in a child of this binary.
func (r *runner) startHawser(ctx context.Context, f *fleetFiles, raised bool) (*server, error) {
	addr, err := freePort()
	if err != nil {
		return nil, err
	}
	l, err := fleet.OpenLayout(f.dir)
	if err != nil {
		return nil, err
	}
	if err := r.configure(l, raised); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, r.Hawser, "serve", "--dir", f.dir, "--listen", addr)
	if r.Hawser == "" {
		cmd = exec.CommandContext(ctx, r.Self, "parts", "--dir", f.dir, "--listen", addr, "--profile", r.Profile)
	}
	cmd.Stderr = r.Log
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &server{name: "hawser", addr: addr, fleet: f, cmd: cmd, admin: l.AdminSocket()}
	if err := awaitReady(out, r.Log); err != nil {
		s.stop()
		return nil, err
	}
	return s, nil
}

// configure writes hawser.toml for a run: no metrics port, and with raised the
// limits that would otherwise pace the flat-out rows.
func (r *runner) configure(l *fleet.Layout, raised bool) error {
	c := *l.Config
	c.Serve.Metrics = ""
	if raised {
		c.Limits.Device.MessagesPerSecond, c.Limits.Device.BytesPerSecond, c.Limits.Device.LogShare = 1e6, config.GiB, 100
		c.Limits.Service.MessagesPerSecond, c.Limits.Service.BytesPerSecond, c.Limits.Service.LogShare = 1e6, config.GiB, 100
		c.Log.MaxBytes, c.Log.HistoryMaxBytes = config.TiB, config.TiB
		r.say("hawser: raised messages_per_second to 1e6, bytes_per_second to 1 GiB and log_share to 100 %% for devices and services, log.max_bytes to 1 TiB")
	}
	text, err := config.Marshal(&c)
	if err != nil {
		return err
	}
	return durable.WriteFile(l.ConfigPath(), text, 0o644)
}

// awaitReady reads a server's output up to its ready line, and copies the rest.
func awaitReady(out io.Reader, log io.Writer) error {
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		fmt.Fprintln(log, lines.Text())
		if strings.HasPrefix(lines.Text(), "ready") {
			go io.Copy(log, out)
			return nil
		}
	}
	return errors.Join(errors.New("the server ended before it was ready"), lines.Err())
}

// startMosquitto runs mosquitto with a plain configuration: nothing on disk, no
// access rules, which cost it nothing that way, and Hawser's certificates.
func (r *runner) startMosquitto(ctx context.Context, f *fleetFiles) (*server, error) {
	addr, err := freePort()
	if err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	conf, err := r.mosquittoFiles(f, port)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, r.mosquitto, "-c", conf)
	cmd.Stdout, cmd.Stderr = r.Log, r.Log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &server{name: "mosquitto", addr: addr, fleet: f, cmd: cmd}
	for range 100 {
		if c, err := net.Dial("tcp", addr); err == nil {
			return s, c.Close()
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.stop()
	return nil, errors.New("mosquitto does not listen")
}

func (r *runner) mosquittoFiles(f *fleetFiles, port string) (string, error) {
	dir := f.dir + "-mosquitto"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	l, err := fleet.OpenLayout(f.dir)
	if err != nil {
		return "", err
	}
	var cas []byte
	t := l.Trust()
	for _, c := range append(t.DeviceCAs, t.ServiceCAs...) {
		cas = append(cas, pki.EncodeCert(c.Raw)...)
	}
	lines := []string{
		"listener " + port + " 127.0.0.1",
		"cafile " + filepath.Join(dir, "clients.crt"),
		"certfile " + l.BrokerCertPath(domain),
		"keyfile " + l.BrokerKeyPath(domain),
		"require_certificate true",
		"use_identity_as_username true",
		"tls_version tlsv1.3",
		"ciphers_tls1.3 TLS_AES_128_GCM_SHA256",
		"persistence false",
		"set_tcp_nodelay true",
		"max_inflight_messages 20",
		"max_queued_messages 1000",
		"max_connections -1",
		"connection_messages false",
		"log_type error",
		"log_dest stderr",
	}
	if os.Getuid() == 0 {
		lines = append(lines, "user root") // else it could not read the key
	}
	conf := filepath.Join(dir, "mosquitto.conf")
	return conf, errors.Join(durable.WriteFile(filepath.Join(dir, "clients.crt"), cas, 0o644),
		durable.WriteFile(conf, []byte(strings.Join(lines, "\n")+"\n"), 0o644))
}

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"hawser/device"
)

// raceless: a program that ends need not linger a second for races of its last moment, as
// it does under the race detector by default; one that finds a race ends with 66.
const raceless = "halt_on_error=1 exitcode=66 atexit_sleep_ms=0"

func TestMain(m *testing.M) {
	os.Setenv("GORACE", raceless) // for the programs that the tests start
	testscript.Main(m, map[string]func(){"hawser": main})
}

// patience is how long a script waits for what must come.
const patience = 20 * time.Second

// TestScripts runs testdata/script/*.txtar with the test binary itself as hawser. Beside the commands of testscript:
//
//	code N PROGRAM ARG...       must end with exit code N
//	await REGEXP PROGRAM ARG... again until standard output matches
//	serve DIR                   starts a server and sets $PORT and $API
//	halt DIR                    stops it and checks that it ended with 0
//	device start DIR [json]     connects a device with the files in DIR to $PORT
//	device stop DIR
//	forge KIND BENCH OUT         a copy of the bench's journal with a unit that is wrong
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       os.Getenv("UPDATE_SCRIPTS") != "",
		Setup: func(e *testscript.Env) error {
			e.Values["servers"], e.Values["devices"] = map[string]*exec.Cmd{}, map[string]func(){}
			e.Setenv("GORACE", raceless)
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"code": scriptCode, "await": scriptAwait, "serve": scriptServe, "halt": scriptStop, "device": scriptDevice,
			"forge": scriptForge,
		},
	})
}

func scriptCode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N PROGRAM ARG...")
	}
	got := 0
	err := ts.Exec(args[1], args[2:]...)
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		got = exit.ExitCode()
	case err != nil:
		ts.Fatalf("%v", err)
	}
	if strconv.Itoa(got) != args[0] {
		ts.Fatalf("exit code %d, not %s", got, args[0])
	}
}

// scriptAwait has nothing to wait on but the program's own answer, so it asks again.
func scriptAwait(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: await REGEXP PROGRAM ARG...")
	}
	want := regexp.MustCompile(args[0])
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for end := time.Now().Add(patience); ; <-again.C {
		err := ts.Exec(args[1], args[2:]...)
		if err == nil && want.MatchString(ts.ReadFile("stdout")) {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("did not come: %s", args[0])
		}
	}
}

func scriptServe(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: serve DIR")
	}
	var path string
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		if p := filepath.Join(dir, "hawser"); path == "" && executable(p) {
			path = p
		}
	}
	cmd := exec.Command(path, "serve", "--dir", args[0], "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--api", "127.0.0.1:0")
	cmd.Dir, cmd.Env = ts.MkAbs("."), []string{"PATH=" + ts.Getenv("PATH")}
	log, err := os.Create(ts.MkAbs("serve.log"))
	ts.Check(err)
	defer log.Close()
	cmd.Stderr = log
	out, err := cmd.StdoutPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	ts.Value("servers").(map[string]*exec.Cmd)[args[0]] = cmd
	ts.Defer(func() {
		_ = cmd.Process.Kill() // an error says that it has ended, as it should
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		ts.Fatalf("the server did not start: %s", ts.ReadFile("serve.log"))
	}
	_, port, err := net.SplitHostPort(strings.TrimPrefix(strings.TrimSpace(line), "ready "))
	ts.Check(err)
	ts.Setenv("PORT", port)
	ts.Check(ts.Exec(path, "status", "--dir", args[0], "--json"))
	var status struct{ Server struct{ API string } }
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &status))
	_, port, err = net.SplitHostPort(status.Server.API)
	ts.Check(err)
	ts.Setenv("API", "https://localhost:"+port)
}

func executable(path string) bool {
	i, err := os.Stat(path)
	return err == nil && i.Mode()&0o100 != 0
}

func scriptStop(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: stop DIR")
	}
	cmd := ts.Value("servers").(map[string]*exec.Cmd)[args[0]]
	if cmd == nil {
		ts.Fatalf("no server runs on %s", args[0])
	}
	ts.Check(cmd.Process.Signal(os.Interrupt))
	if err := cmd.Wait(); err != nil {
		ts.Fatalf("server: %v\n%s", err, ts.ReadFile("serve.log"))
	}
}

func scriptDevice(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: device start|stop DIR [json]")
	}
	running := ts.Value("devices").(map[string]func())
	if args[0] == "stop" {
		running[args[1]]()
		return
	}
	cfg, err := device.Load(ts.MkAbs(args[1]))
	ts.Check(err)
	cfg.Servers, cfg.Log = []string{net.JoinHostPort("localhost", ts.Getenv("PORT"))}, slog.New(slog.DiscardHandler)
	cfg.Class, cfg.Firmware, cfg.JSON = "sensor", "1.0.0", len(args) > 2 && args[2] == "json"
	cfg.Command, cfg.Configure = obey, configure
	connected := make(chan struct{}, 1)
	cfg.Connected = func(string) {
		select {
		case connected <- struct{}{}:
		default:
		}
	}
	d, err := device.New(cfg)
	ts.Check(err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = d.Run(ctx) // it ends with ctx and for no other reason
	}()
	stop := func() {
		cancel()
		<-ended
		if c, ok := cfg.Store.(io.Closer); ok {
			_ = c.Close() // the second time it is closed already
		}
	}
	running[args[1]] = stop
	ts.Defer(stop)
	select {
	case <-connected:
	case <-time.After(patience):
		ts.Fatalf("the device did not connect")
	}
}

// obey is what the devices of the scripts can do.
func obey(ctx context.Context, c device.Command) (device.Value, error) {
	switch c.Name {
	case "echo":
		return c.Args, nil
	case "nod":
		return nil, nil
	case "break":
		return nil, errors.New("the arm is stuck")
	case "sleep":
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return nil, device.ErrUnknownCommand
}

func configure(_ context.Context, _ uint64, doc device.Value) error {
	var v struct {
		Interval int `json:"interval"`
	}
	if err := json.Unmarshal(doc.JSON(), &v); err != nil || v.Interval < 1 {
		return errors.New("interval is below 1")
	}
	return nil
}

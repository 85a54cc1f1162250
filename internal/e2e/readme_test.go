package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// shellBlocks gives the shell blocks of one section of a document.
func shellBlocks(t *testing.T, path, heading string) []string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## "+heading+"\n")
	section, _, _ = strings.Cut(section, "\n## ")
	if !ok {
		t.Fatalf("%s has no section %q", path, heading)
	}
	var blocks []string
	for _, part := range strings.Split(section, "```sh\n")[1:] {
		block, _, _ := strings.Cut(part, "```")
		blocks = append(blocks, block)
	}
	return blocks
}

// tour runs README commands in a copy of the tree, in an empty HOME, on ports of
// its own: nothing else is changed in what is printed there.
type tour struct {
	t       *testing.T
	dir     string
	port    string
	metrics string
	cache   []string // of the build and of modules: an empty HOME would build all anew
}

func (s *tour) rewrite(block string) string {
	block = strings.ReplaceAll(block, "-p 8883", "-p "+s.port)
	return strings.ReplaceAll(block, "hawser serve --dir fleet", "hawser serve --dir fleet --listen 127.0.0.1:"+s.port)
}

func (s *tour) command(script string) *exec.Cmd {
	cmd := exec.CommandContext(s.t.Context(), "bash", "-euo", "pipefail", "-c", s.rewrite(script))
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "HOME="+filepath.Join(s.dir, "home"), "GOCACHE="+s.cache[0], "GOMODCACHE="+s.cache[1])
	return cmd
}

func (s *tour) run(script string) string {
	s.t.Helper()
	out, err := s.command(script).CombinedOutput()
	if err != nil {
		s.t.Fatalf("%s\n%s%v", script, out, err)
	}
	return string(out)
}

// background starts a block, which ends with the test.
func (s *tour) background(script string) {
	s.t.Helper()
	cmd := s.command("exec " + script)
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		cmd.Wait()
	})
}

// TestReadmeFiveMinutes runs the README's first five minutes as printed there.
func TestReadmeFiveMinutes(t *testing.T) {
	t.Parallel() // it mostly waits for the build
	for _, tool := range []string{"mosquitto_pub", "mosquitto_sub"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	blocks := shellBlocks(t, filepath.Join(root, "README.md"), "A first device in five minutes")
	if len(blocks) != 6 {
		t.Fatalf("the section has %d blocks; this test knows 6", len(blocks))
	}
	s := newTour(t, root)
	s.run(blocks[0])
	s.run(fmt.Sprintf("sed -i 's/127.0.0.1:9883/127.0.0.1:%s/' fleet/hawser.toml", s.metrics))
	s.background(strings.TrimSpace(blocks[1]))
	s.answers()
	if out := s.run(blocks[2]); !strings.Contains(out, "private/ABCD1234/u/temp") || !strings.Contains(out, "21.5") {
		t.Fatalf("tail does not show the message:\n%s", out)
	}
	add, sub, _ := strings.Cut(blocks[3], "\n")
	s.run(add)
	heard := filepath.Join(s.dir, "heard")
	s.background(strings.TrimSpace(sub) + " -C 1 -W 60 > " + heard)
	_, pub, _ := strings.Cut(blocks[2], "\n")
	pub, _, _ = strings.Cut(pub, "./hawser tail")
	s.until("mosquitto_sub to print the message", func() bool {
		s.run(pub)
		out, _ := os.ReadFile(heard)
		return strings.Contains(string(out), "private/ABCD1234/u/temp 21.5")
	})
	send, rest, _ := strings.Cut(blocks[4], "\n")
	if out := s.run(send + " || [ $? -eq 4 ]"); !strings.Contains(out, "queued") {
		t.Fatalf("send: %s", out)
	}
	if out := s.run(rest); !strings.Contains(out, "blink") || !strings.Contains(out, "delivered") {
		t.Fatalf("the command did not reach the device:\n%s", out)
	}
	s.run(blocks[5])
	if out, err := s.command(pub).CombinedOutput(); err == nil {
		t.Fatalf("a revoked device still publishes: %s", out)
	}
}

func newTour(t *testing.T, root string) *tour {
	t.Helper()
	out, err := exec.Command("go", "env", "GOCACHE", "GOMODCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	s := &tour{t: t, dir: t.TempDir(), port: freePort(t), metrics: freePort(t), cache: strings.Fields(string(out))}
	for _, name := range []string{"cmd", "device", "internal"} {
		if err := os.CopyFS(filepath.Join(s.dir, name), os.DirFS(filepath.Join(root, name))); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"go.mod", "go.sum"} {
		text, err := os.ReadFile(filepath.Join(root, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(s.dir, name), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// answers waits until the server does.
func (s *tour) answers() {
	s.t.Helper()
	s.until("the server to be ready", func() bool {
		c, err := net.Dial("tcp", "127.0.0.1:"+s.port)
		if err != nil {
			return false
		}
		c.Close()
		return true
	})
}

func (s *tour) until(what string, ok func() bool) {
	s.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			s.t.Fatalf("waited in vain for %s", what)
		}
		<-tick.C
	}
}

// TestReadmeShowsTheConfiguration compares the README's config reference with the
// file that init writes.
func TestReadmeShowsTheConfiguration(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	manual, err := os.ReadFile("../config/manual.toml")
	if err != nil {
		t.Fatal(err)
	}
	want := "<!-- config -->\n```toml\n" + strings.TrimRight(string(manual), "\n") + "\n```\n<!-- /config -->"
	if !strings.Contains(string(readme), want) {
		t.Error("the README's configuration is not internal/config/manual.toml: copy it between the config marks")
	}
}

// TestSecurityNamesRealTests: a guarantee whose test was renamed or removed is
// not held by what SECURITY.md says.
func TestSecurityNamesRealTests(t *testing.T) {
	text, err := os.ReadFile("../../SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("grep", "-rhoE", "--include=*_test.go", "^func Test[A-Za-z0-9_]+", "../..").Output()
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		there[strings.TrimPrefix(strings.TrimSpace(line), "func ")] = true
	}
	named := regexp.MustCompile("`(Test[A-Za-z0-9_*]+)").FindAllStringSubmatch(string(text), -1)
	if len(named) < 20 {
		t.Fatalf("SECURITY.md names %d tests", len(named))
	}
	for _, m := range named {
		if !there[m[1]] {
			t.Errorf("SECURITY.md names %s, which does not exist", m[1])
		}
	}
}

package main

import (
	"bufio"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// demoRun is a demo in a process of its own.
type demoRun struct {
	t     *testing.T
	cmd   *exec.Cmd
	lines chan string
	tmp   string
}

// startDemo runs this test binary as hawser.
func startDemo(t *testing.T, args ...string) *demoRun {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(t.TempDir(), "hawser") // testscript.Main goes by the name
	if err := os.Symlink(self, bin); err != nil {
		t.Fatal(err)
	}
	r := &demoRun{t: t, lines: make(chan string, 1000), tmp: t.TempDir()}
	r.cmd = exec.CommandContext(t.Context(), bin, append([]string{"demo"}, args...)...)
	r.cmd.Env = append(os.Environ(), "TMPDIR="+r.tmp)
	r.cmd.Stderr = os.Stderr
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go r.read(out)
	return r
}

func (r *demoRun) read(out io.Reader) {
	defer close(r.lines)
	for s := bufio.NewScanner(out); s.Scan(); {
		r.lines <- s.Text()
	}
}

// await gives the next line that matches.
func (r *demoRun) await(pattern string) string {
	r.t.Helper()
	want := regexp.MustCompile(pattern)
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	for {
		select {
		case line, ok := <-r.lines:
			if !ok {
				r.t.Fatalf("the demo ended without %s", pattern)
			}
			if want.MatchString(line) {
				return line
			}
		case <-ctx.Done():
			r.t.Fatalf("did not come: %s", pattern)
		}
	}
}

// end waits for the demo to end with 0 and to leave nothing behind.
func (r *demoRun) end() {
	r.t.Helper()
	if err := r.cmd.Wait(); err != nil {
		r.t.Error("demo:", err)
	}
	if left, err := os.ReadDir(r.tmp); err != nil || len(left) != 0 {
		r.t.Error("left behind:", left, err)
	}
}

// shell runs a line as a user would paste it.
func shell(t *testing.T, line string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, "sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

func demoEnd() *regexp.Regexp {
	return regexp.MustCompile(`^demo: 5 devices, (\d+) messages acknowledged, (\d+) on disk, 5 commands answered$`)
}

// TestDemo: the closing line, with pairs that match; also of a second one beside it,
// which has to take another port.
func TestDemo(t *testing.T) {
	var ports [2]string
	var runs [2]*demoRun
	for i := range runs {
		runs[i] = startDemo(t, "--for", "2s", "--rate", "5")
		ports[i] = runs[i].await("^broker ")
	}
	for _, r := range runs {
		// 5 devices, 5 a second, 2 s; a busy machine begins the last round too late.
		m := demoEnd().FindStringSubmatch(r.await("^demo: "))
		if m == nil || m[1] != m[2] || m[1] < "45" || m[1] > "50" || len(m[1]) != 2 {
			t.Error(m)
		}
		r.end()
	}
	if ports[0] == ports[1] {
		t.Error("both say", ports[0])
	}
}

// TestDemoLines: the printed lines work as they are, and Ctrl-C ends it in order.
func TestDemoLines(t *testing.T) {
	for _, tool := range []string{"mosquitto_sub", "mosquitto_pub"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(tool + " is not installed (apt-get install mosquitto-clients)")
		}
	}
	r := startDemo(t, "--rate", "2")
	sub := strings.TrimSpace(r.await("^  mosquitto_sub "))
	pub := strings.TrimSpace(r.await("^  mosquitto_pub "))
	r.await("acknowledged .* blink answered in")
	id := regexp.MustCompile(` -i ([0-9A-F]{8}) `).FindStringSubmatch(pub)[1]

	got := shell(t, sub+" -C 20 -W 15")
	for _, line := range strings.Split(strings.TrimSpace(got), "\n") {
		if !regexp.MustCompile(`^private/[0-9A-F]{8}/u/(temp|hello|cmd) \{.*\}$`).MatchString(line) {
			t.Errorf("the watcher saw %q", line)
		}
	}
	seen := make(chan string, 1)
	go func() { // its own filter comes last; the watcher's is the same without it
		out, err := exec.CommandContext(t.Context(), "sh", "-c", sub+" -W 15 | grep -m 1 "+id).CombinedOutput()
		seen <- string(out) + errText(err)
	}()
	again := time.NewTicker(300 * time.Millisecond)
	defer again.Stop()
	for done := false; !done; {
		shell(t, pub)
		select {
		case line := <-seen:
			if line != "private/"+id+"/u/temp 21\n" {
				t.Errorf("the sixth device was seen as %q", line)
			}
			done = true
		case <-again.C:
		}
	}
	if err := r.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	m := demoEnd().FindStringSubmatch(r.await("^demo: "))
	if m == nil || m[1] != m[2] || m[1] == "0" {
		t.Error(m)
	}
	r.end()
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// TestDemoDiffers: what does not match is an error, whichever pair it is.
func TestDemoDiffers(t *testing.T) {
	if err := differ(50, 50, 5, 5); err != nil {
		t.Error(err)
	}
	for want, err := range map[string]error{
		"50 messages were acknowledged and 49 are on disk":  differ(50, 49, 5, 5),
		"50 messages were acknowledged and 51 are on disk":  differ(50, 51, 5, 5),
		"5 devices were given a command and 4 answered":     differ(50, 50, 5, 4),
		"1 messages were acknowledged and 0 are on disk\n5": differ(1, 0, 5, 4),
	} {
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v, not %s", err, want)
		}
	}
}

// TestDemoRollover: 200 devices move to another device CA and other roots while they publish.
// Nothing is lost, nobody is locked out, the faulty ones are named and hold the retire up,
// and the old device CA then gets nobody in. The demo exits with 1 where one of it is not so.
func TestDemoRollover(t *testing.T) {
	r := startDemo(t, "--rollover")
	faulty := map[string]string{}
	for _, want := range []string{"it loses power", "it lies", "it goes away", "it takes the next anchor set for a forgery"} {
		line := strings.TrimSpace(r.await("is faulty: " + want + "$"))
		faulty[want] = line[:8]
	}
	r.await("^197 of 200 devices have arrived after ")
	for _, want := range []string{"it lies", "it goes away", "it takes the next anchor set for a forgery"} {
		r.await("^ +" + faulty[want] + " +(failed|offered) ")
	}
	if line := r.await("^retire is refused: "); !strings.Contains(line, "3 unproven: ") || strings.Contains(line, faulty["it loses power"]) {
		t.Error(line)
	}
	r.await("^retired, 3 devices are waived$")
	r.await("^all 200 certificates of the old generation were tried: remote error: tls: bad certificate$")
	r.await("^" + faulty["it goes away"] + ", which was away, is back and is refused$")
	r.await("^demo: 200 devices, 197 moved to generation 2 and root B, 3 named and left behind, [1-9][0-9]+ messages acknowledged, 0 of them lost$")
	r.end()
}

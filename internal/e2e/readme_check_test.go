package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const checkHeading = "## Check your own device in ten minutes"

// checkSection is the section of the README about the check.
func checkSection(t *testing.T, root string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), checkHeading)
	if !ok {
		t.Fatal("the README has no such section")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	return section
}

// TestReadmeCheck runs the blocks of the section as printed there, but for the one that
// waits for a board.
func TestReadmeCheck(t *testing.T) {
	t.Parallel()
	needTools(t, "mosquitto_pub")
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	section := checkSection(t, root)
	var blocks []string
	for _, part := range strings.Split(section, "```sh\n")[1:] {
		block, _, _ := strings.Cut(part, "```")
		blocks = append(blocks, block)
	}
	if len(blocks) != 3 {
		t.Fatalf("the section has %d blocks; this test knows 3", len(blocks))
	}
	s := newTour(t, root)
	build, check, _ := strings.Cut(blocks[0], "\n")
	s.run(build)
	out := s.run(strings.TrimRight(check, "\n") + " || [ $? -eq 1 ]")
	version, _ := exec.Command("mosquitto_pub", "--help").CombinedOutput() // it ends with 1
	for _, line := range regexp.MustCompile(`(?m)^  FAIL .*$`).FindAllString(section, -1) {
		if !strings.Contains(out, line) && strings.Contains(string(version), "version 2.0.11 ") {
			t.Errorf("not printed: %s\n%s", line, out)
		}
	}
	page, err := os.ReadFile(filepath.Join(s.dir, "report.html"))
	if err != nil || !strings.Contains(string(page), `id="X4.common-name"`) {
		t.Errorf("the report: %v, %d bytes", err, len(page))
	}
	if out := s.run(blocks[1]); !strings.Contains(out, "SAN") {
		t.Errorf("explain: %s", out)
	}
	world, _, _ := strings.Cut(strings.TrimSpace(blocks[2]), "\n")
	s.run(world)
	for _, name := range []string{"ca.crt", "device.crt", "device.key", "identity.bin", "trust.bin"} {
		if _, err := os.Stat(filepath.Join(s.dir, "desk", name)); err != nil {
			t.Error(err)
		}
	}
}

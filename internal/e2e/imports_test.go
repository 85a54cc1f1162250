package e2e

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// imports gives what a package needs, itself left out: packages of this module and
// others, without the standard library.
func imports(t *testing.T, pkg string, args ...string) (ours, theirs []string) {
	t.Helper()
	out, err := exec.Command("go", append(append([]string{"list"}, args...), pkg)...).Output()
	if err != nil {
		t.Fatalf("go list %s: %v", pkg, err)
	}
	for _, p := range strings.Fields(string(out)) {
		first, _, _ := strings.Cut(p, "/")
		switch {
		case p == pkg:
		case first == "hawser":
			ours = append(ours, strings.TrimPrefix(p, "hawser/"))
		case strings.Contains(first, "."):
			theirs = append(theirs, p)
		}
	}
	return ours, theirs
}

// TestImports holds design section 10: leaves import the standard library only; broker
// and command never import each other; only server and cmd import everything.
func TestImports(t *testing.T) {
	const leaves = "internal/identity internal/durable internal/mqtt "
	for pkg, may := range map[string]string{ // what each may need, directly or not
		"internal/identity": "",
		"internal/durable":  "",
		"internal/mqtt":     "",
		"internal/message":  "",
		"internal/config":   "",
		"internal/registry": leaves,
		"internal/msglog":   leaves,
		"internal/pki":      leaves,
		"internal/broker":   leaves + "internal/msglog internal/registry",
		"internal/command":  leaves + "internal/message internal/registry",
		"internal/rollover": leaves + "internal/message internal/registry",
		"internal/fleet":    leaves + "internal/config internal/factory internal/pki",
		"internal/factory":  leaves + "internal/pki",
		"internal/admin":    leaves,
		"internal/backup":   "",
		"device":            leaves + "internal/message",

		"internal/factory/keyroom": leaves + "internal/factory internal/factory/probe internal/pki",
		"internal/factory/bench":   leaves + "internal/factory internal/factory/keyroom internal/factory/probe internal/pki",
		"internal/factory/probe":   leaves,
		"internal/check/tls13":     "",
		"internal/check":           leaves + "internal/check/tls13 internal/pki",
	} {
		ours, _ := imports(t, "hawser/"+pkg, "-deps")
		for _, p := range ours {
			if !slices.Contains(strings.Fields(may), p) {
				t.Errorf("%s needs %s", pkg, p)
			}
		}
	}
	for _, pkg := range strings.Fields(leaves) {
		if _, theirs := imports(t, "hawser/"+pkg, "-deps"); len(theirs) > 0 {
			t.Errorf("%s is a leaf and needs %s", pkg, theirs)
		}
	}
	// A device has no business with the server's libraries.
	_, theirs := imports(t, "hawser/device", "-deps")
	for _, p := range theirs {
		if !strings.HasPrefix(p, "github.com/fxamacker/cbor/") && !strings.HasPrefix(p, "github.com/x448/float16") && !strings.HasPrefix(p, "golang.org/x/sys/") {
			t.Errorf("device needs %s", p)
		}
	}
}

// TestWhoImportsEverything: the parts are put together in one place.
func TestWhoImportsEverything(t *testing.T) {
	all, err := exec.Command("go", "list", "hawser/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, pkg := range strings.Fields(string(all)) {
		name := strings.TrimPrefix(pkg, "hawser/")
		if name == "internal/server" || name == "internal/bench" || strings.HasPrefix(name, "cmd/") {
			continue // bench measures the parts one by one
		}
		ours, _ := imports(t, pkg, "-f", `{{join .Imports "\n"}}`)
		for _, p := range ours {
			if p == "internal/server" || p == "internal/broker" || p == "internal/command" || p == "internal/rollover" || p == "internal/bench" || p == "internal/e2e" || strings.HasPrefix(p, "cmd/") {
				t.Errorf("%s imports %s", name, p)
			}
		}
	}
}

package main

import (
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// every gives each command that hawser has of its own.
func every(t *testing.T, fn func(cmd *cobra.Command)) {
	t.Helper()
	a := &app{out: os.Stdout, err: os.Stderr}
	var walk func(cmd *cobra.Command)
	walk = func(cmd *cobra.Command) {
		fn(cmd)
		for _, child := range cmd.Commands() {
			walk(child)
		}
	}
	walk(a.root())
}

func TestEveryCommandIsExplained(t *testing.T) {
	every(t, func(cmd *cobra.Command) {
		path := cmd.CommandPath()
		if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") || cmd.Short[0] >= 'A' && cmd.Short[0] <= 'Z' {
			t.Errorf("%s: short description %q", path, cmd.Short)
		}
		if cmd.Long == "" {
			t.Errorf("%s: no long description", path)
		}
		leaf := cmd.Runnable() && !cmd.HasSubCommands()
		if leaf && !strings.Contains(cmd.Example, path+" ") && !strings.Contains(cmd.Example, path+"\n") {
			t.Errorf("%s: no example", path)
		}
		for _, line := range strings.Split(cmd.Long+"\n"+cmd.Example, "\n") {
			if len(line) > 92 {
				t.Errorf("%s: line of %d characters: %s", path, len(line), line)
			}
		}
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if f.Usage == "" {
				t.Errorf("%s: flag --%s is not explained", path, f.Name)
			}
		})
	})
}

// TestCommandsOfTheContract holds names and flags as they were agreed on.
func TestCommandsOfTheContract(t *testing.T) {
	a := &app{out: os.Stdout, err: os.Stderr}
	root := a.root()
	for path, flags := range map[string]string{
		"init":                  "dir domain trial passphrase-fd nats-url",
		"serve":                 "dir listen ready-fd",
		"device enroll":         "dir csr id out class ca",
		"device add":            "dir id out",
		"device list":           "status tag online prefix json",
		"device show":           "json",
		"device revoke":         "reason json",
		"device tag":            "json",
		"service add":           "dir grant out ca passphrase-fd json",
		"service list":          "json",
		"service revoke":        "reason json",
		"service grant":         "add remove json",
		"ca sign":               "ca passphrase-fd",
		"ca import":             "dir",
		"ca issue-broker":       "dir root ca passphrase-fd",
		"factory reserve":       "dir station count out station-csr expires ca passphrase-fd json",
		"factory import":        "dir json",
		"factory station list":  "dir json",
		"factory journal check": "json",
		"factory journal show":  "json",
		"send":                  "wait expires json",
		"command list":          "state json",
		"command cancel":        "json",
		"config set":            "json",
		"config show":           "json",
		"tail":                  "topic since limit json follow reverse",
		"status":                "dir json",
		"audit list":            "json",
	} {
		cmd, rest, err := root.Find(strings.Fields(path))
		if err != nil || len(rest) > 0 || !cmd.Runnable() {
			t.Errorf("hawser %s: not there", path)
			continue
		}
		cmd.InheritedFlags() // merges those of the commands above
		for _, f := range strings.Fields(flags) {
			if cmd.Flag(f) == nil {
				t.Errorf("hawser %s: no flag --%s", path, f)
			}
		}
	}
}

func TestExampleTopic(t *testing.T) {
	for filter, want := range map[string]string{
		"private/+/d/app/#": "private/ABCD1234/d/app/test", "#": "test", "a/+/c": "a/test/c", "plain": "plain", "+/b": "test/b",
	} {
		if got := exampleTopic(filter); got != want {
			t.Errorf("%s: %s, not %s", filter, got, want)
		}
	}
}

//go:build ignore

// checkresults runs "hawser check device" against real clients and writes what came of it
// between the marks of docs/check-results.md: go run scripts/checkresults.go. It takes
// about six minutes. A client that is not installed is left out, and said so.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

const page = "docs/check-results.md"

// client is one program that is tried.
type client struct {
	name    string
	tool    string   // what must be installed
	version []string // command that prints it
	match   string   // what of the output is the version
	options []string
	exec    string
}

const connect = `printf "\020\024\000\004MQTT\004\002\000\074\000\010goclient"`

func clients(dir string) []client {
	files := " --cafile {cafile} --cert {cert} --key {key} "
	args := " {host} {port} {cafile} {cert} {key}"
	general := []string{"--profile", "general"}
	return []client{
		{"mosquitto_pub", "mosquitto_pub", []string{"mosquitto_pub", "--help"}, `version [0-9.]+`, general, "exec mosquitto_pub -h {host} -p {port}" + files + "-t t -m x"},
		{"mosquitto_sub", "mosquitto_sub", []string{"mosquitto_sub", "--help"}, `version [0-9.]+`, append(general, "--patience", "20s", "--parallel", "8"),
			"exec mosquitto_sub -h {host} -p {port}" + files + "-t t -q 1 -k 5"},
		{"crypto/tls", "go", []string{"go", "version"}, `go[0-9.]+`, general, "exec " + dir + "/goclient" + args},
		{"device kit", "go", []string{"go", "version"}, `go[0-9.]+`, []string{"--profile", "mcu", "--patience", "45s", "--parallel", "8"}, "exec " + dir + "/kitclient" + args},
		{"openssl s_client", "openssl", []string{"openssl", "version"}, `[0-9]+\.[0-9.]+[a-z]?`, append(general, "--parallel", "8", "--features", "none"),
			connect + " | openssl s_client -quiet -connect localhost:{port} -servername {host} -verify_return_error -verify_hostname {host} -CAfile {cafile} -cert {cert} -key {key}"},
		{"gnutls-cli", "gnutls-cli", []string{"gnutls-cli", "--version"}, `[0-9]+\.[0-9.]+`, append(general, "--parallel", "8", "--features", "none"),
			"(" + connect + "; sleep 8) | gnutls-cli --priority NORMAL:-VERS-TLS1.0:-VERS-TLS1.1 --x509cafile {cafile} --x509certfile {cert} --x509keyfile {key} -p {port} {host}"},
	}
}

// outcome is one run: what is read of the JSON lines.
type outcome struct {
	client
	number string
	counts map[string]int
	cases  map[string]string // id to verdict
	order  []string
}

func main() {
	dir, err := os.MkdirTemp("", "checkresults-")
	fail(err)
	defer os.RemoveAll(dir)
	for name, pkg := range map[string]string{"hawser": "./cmd/hawser", "goclient": "./internal/check/testdata/goclient", "kitclient": "./internal/check/testdata/kitclient"} {
		_, err := output("go", "build", "-o", filepath.Join(dir, name), pkg)
		fail(err)
	}
	var all []outcome
	for _, c := range clients(dir) {
		if _, err := exec.LookPath(c.tool); err != nil {
			fmt.Println(c.tool, "is not installed: left out")
			continue
		}
		o := run(dir, c)
		fmt.Println(c.name, o.number, o.counts)
		all = append(all, o)
	}
	fail(write(strings.ReplaceAll(table(all), dir+"/", "")))
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "checkresults:", err)
		os.Exit(1)
	}
}

func output(name string, args ...string) ([]byte, error) {
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		err = fmt.Errorf("%s %q: %w", name, args, err)
	}
	return out, err
}

func run(dir string, c client) outcome {
	o := outcome{client: c, counts: map[string]int{}, cases: map[string]string{}}
	text, _ := exec.Command(c.version[0], c.version[1:]...).CombinedOutput() // mosquitto's --help ends with 1
	o.number = strings.TrimPrefix(regexp.MustCompile(c.match).FindString(string(text)), "version ")
	cmd := exec.Command(filepath.Join(dir, "hawser"), slices.Concat([]string{"check", "device", "--json", "--exec", c.exec}, c.options)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	_ = cmd.Run() // 1 where something FAILs: what is wanted are the lines
	for line := range strings.Lines(out.String()) {
		var r struct{ ID, Verdict string }
		fail(json.Unmarshal([]byte(line), &r))
		if r.ID != "" {
			o.counts[r.Verdict]++
			o.cases[r.ID], o.order = r.Verdict, append(o.order, r.ID)
		}
	}
	if len(o.order) == 0 {
		fail(fmt.Errorf("%s: no results", c.name))
	}
	return o
}

func table(all []outcome) string {
	var b strings.Builder
	b.WriteString("| client | version | profile | pass | FAIL | warn | inconclusive | n/a |\n|---|---|---|---|---|---|---|---|\n")
	for _, o := range all {
		fmt.Fprintf(&b, "| %s | %s | %s | %d | %d | %d | %d | %d |\n", o.name, o.number, o.options[1], o.counts["pass"], o.counts["FAIL"], o.counts["warn"], o.counts["inconclusive"], o.counts["n/a"])
	}
	b.WriteString("\nEvery case in which one of them did not pass; n/a is left empty:\n\n| case |")
	for _, o := range all {
		fmt.Fprintf(&b, " %s |", o.name)
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(all)) + "\n")
	for _, id := range all[0].order {
		row, notable := "", false
		for _, o := range all {
			v := o.cases[id]
			notable = notable || v != "pass" && v != "n/a"
			row += " " + strings.TrimSuffix(v, "n/a") + " |"
		}
		if notable {
			fmt.Fprintf(&b, "| %s |%s\n", id, row)
		}
	}
	b.WriteString("\nThe commands, each after `hawser check device`:\n\n```\n")
	for _, o := range all {
		fmt.Fprintf(&b, "%s --exec '%s'\n", strings.Join(o.options, " "), o.exec)
	}
	return b.String() + "```\n"
}

func write(generated string) error {
	text, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(text), "<!-- results -->\n")
	_, after, ok2 := strings.Cut(rest, "<!-- /results -->")
	if !ok || !ok2 {
		return fmt.Errorf("%s has no result marks", page)
	}
	return os.WriteFile(page, []byte(before+"<!-- results -->\n"+generated+"<!-- /results -->"+after), 0o644)
}

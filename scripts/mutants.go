//go:build ignore

// mutants takes the security checks out, one at a time, and demands that a test
// goes red for each: go run scripts/mutants.go [word...] (make mutants). With -n it only
// looks whether each stands where the list says. The tree
// is not touched: each change is an overlay of one file. A line of
// scripts/mutants.txt is
//
//	package | file | what stands there | what replaces it | tests to run
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

type mutant struct{ pkg, file, old, new, tests string }

func main() {
	all, err := load("scripts/mutants.txt")
	if err != nil {
		fail(err)
	}
	if len(os.Args) == 2 && os.Args[1] == "-n" {
		checkStanding(all)
		return
	}
	alive, dead, broken := 0, 0, 0
	for _, m := range all {
		if !wanted(m) {
			continue
		}
		survived, err := m.run()
		switch {
		case err != nil:
			broken++
			fmt.Printf("BROKEN %s: %s: %v\n", m.file, m.old, err)
		case survived:
			alive++
			fmt.Printf("ALIVE  %s: %s\n", m.file, m.old)
		default:
			dead++
			fmt.Printf("red    %s: %s\n", m.file, m.old)
		}
	}
	fmt.Printf("%d checks taken out, %d went unnoticed, %d could not be taken out\n", alive+dead, alive, broken)
	if alive+broken > 0 {
		os.Exit(1)
	}
}

// checkStanding demands that each check can still be taken out: that its text stands there once.
func checkStanding(all []mutant) {
	for _, m := range all {
		if _, _, err := m.source(); err != nil {
			fail(fmt.Errorf("%s: %s: %v", m.file, m.old, err))
		}
	}
	fmt.Printf("%d checks stand where scripts/mutants.txt says\n", len(all))
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "mutants:", err)
	os.Exit(2)
}

// wanted reports whether the arguments, if any, name this mutant.
func wanted(m mutant) bool {
	for _, w := range os.Args[1:] {
		if strings.Contains(m.file+" "+m.old, w) {
			return true
		}
	}
	return len(os.Args) == 1
}

func load(path string) (all []mutant, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for n, line := range strings.Split(string(text), "\n") {
		if line == "" || line[0] == '#' {
			continue
		}
		f := strings.Split(line, " | ")
		if len(f) != 5 {
			return nil, fmt.Errorf("%s:%d: %d fields, not 5", path, n+1, len(f))
		}
		all = append(all, mutant{f[0], f[1], f[2], f[3], f[4]})
	}
	return all, nil
}

// source reads the file, in which the text must stand once.
func (m mutant) source() (path, text string, err error) {
	if path, err = filepath.Abs(filepath.Join(m.pkg, m.file)); err != nil {
		return "", "", err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", "", err
	}
	if n := strings.Count(string(b), m.old); n != 1 {
		return "", "", fmt.Errorf("stands there %d times", n)
	}
	return path, string(b), nil
}

// run tests with the change in place. A change that does not compile proves
// nothing and is an error, and so is a text that does not stand there once.
func (m mutant) run() (survived bool, err error) {
	path, text, err := m.source()
	if err != nil {
		return false, err
	}
	dir, err := os.MkdirTemp("", "mutant")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	changed, overlay := filepath.Join(dir, "changed.go"), filepath.Join(dir, "overlay.json")
	spec, _ := json.Marshal(map[string]map[string]string{"Replace": {path: changed}})
	if err := os.WriteFile(changed, []byte(strings.Replace(text, m.old, m.new, 1)), 0o600); err != nil {
		return false, err
	}
	if err := os.WriteFile(overlay, spec, 0o600); err != nil {
		return false, err
	}
	if out, err := exec.Command("go", "vet", "-overlay", overlay, "./"+m.pkg).CombinedOutput(); err != nil {
		return false, fmt.Errorf("does not compile: %s", out)
	}
	out, err := exec.Command("go", "test", "-count=1", "-timeout", "120s", "-failfast", "-overlay", overlay, "-run", m.tests, "./"+m.pkg).CombinedOutput()
	if err == nil && strings.Contains(string(out), "no tests to run") {
		return false, fmt.Errorf("no test is called %s", m.tests)
	}
	return err == nil, nil
}

package check

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// The environment of a subject that runs as a process of its own.
const (
	envSubject = "HAWSER_CHECK_SUBJECT" // its flaws, "strict" without
	envPort    = "HAWSER_CHECK_PORT"
	envRoots   = "HAWSER_CHECK_CAFILE"
)

// TestSubjectProcess is no test: it is the client that the others start by --exec.
func TestSubjectProcess(t *testing.T) {
	name := os.Getenv(envSubject)
	if name == "" {
		t.Skip("started by other tests only")
	}
	w, err := LoadWorld(filepath.Dir(os.Getenv(envRoots)))
	if err != nil {
		t.Fatal(err)
	}
	if name == "strict" {
		name = ""
	}
	s := mutant(w, name)
	s.addr, s.dies = "127.0.0.1:"+os.Getenv(envPort), true
	ctx, stop := context.WithTimeout(context.Background(), time.Minute) // should its parent be gone
	defer stop()
	s.run(ctx)
}

// inProcess are the options for a mutant that --exec starts. A panic shows as SIGSEGV, as
// the crash of a client in C does.
func inProcess(t *testing.T, name string, only ...string) DeviceOptions {
	t.Helper()
	w, dir := worldFiles(t)
	command := fmt.Sprintf("%s='%s' %s={port} %s={cafile} '%s' -test.run='^TestSubjectProcess$'; test $? = 2 && kill -SEGV $$",
		envSubject, name, envPort, envRoots, os.Args[0])
	return DeviceOptions{World: w, Dir: dir, Host: "localhost", Profile: MCU, Wait: 20 * time.Second, Step: 5 * time.Second, Patience: 5 * time.Second,
		Parallel: 4, Only: only, Exec: command}
}

// TestProcesses: clients that --exec starts are judged like those that come by
// themselves, and a crash is seen from outside.
func TestProcesses(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]map[string]Verdict{
		"strict":       {"A1.honest": Pass, "A2.name": Pass, "X3.other-host": Pass, "M1.topic": Pass},
		"no-name":      {"A1.honest": Pass, "A2.name": Pass, "X3.other-host": Fail, "X1.unknown-ca": Pass},
		"trusts-topic": {"A1.honest": Pass, "A2.name": Pass, "M1.topic": Fail},
		"root-b-only":  {"A1.honest": Fail, "A2.name": Fail, "X3.other-host": Inconclusive},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var only []string
			for id := range want {
				only = append(only, id)
			}
			rep, err := Device(context.Background(), inProcess(t, name, only...))
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range rep.Results {
				if r.Verdict != want[r.ID] {
					t.Errorf("%s: %s, want %s: %s; %s; %s", r.ID, r.Verdict, want[r.ID], r.Why, r.EvidenceText(), r.Evidence.Output)
				}
				if name == "trusts-topic" && r.Verdict == Fail && r.Why != "it crashed: segmentation fault" {
					t.Errorf("%s: %s", r.ID, r.Why)
				}
			}
			if len(rep.Results) != len(want) || rep.OK() != (name == "strict") {
				t.Errorf("%d results, ok %v", len(rep.Results), rep.OK())
			}
		})
	}
}

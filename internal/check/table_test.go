package check

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

var updateTable = flag.Bool("update-table", false, "write docs/check-table.md anew")

// trial is one client that is held against one case.
type trial struct {
	c       Case
	mutant  string  // "": the strict client
	profile Profile // "": that of a microcontroller
	result  *Result
}

// red reports whether the verdict keeps the exit code from being 0.
func (x *trial) red() bool { return x.result.Verdict == Fail || x.result.Verdict == Inconclusive }

// tableWorld is for a name of four labels: each wildcard says something of it.
func tableWorld(t *testing.T) *World {
	t.Helper()
	w, err := NewWorld("mqtt.fleet.example.org")
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// hold holds one client against one case, as a device that comes by itself.
func hold(t *testing.T, s *subject, c *Case, p Profile) *Result {
	t.Helper()
	o := &DeviceOptions{World: s.w, Listen: "127.0.0.1:0", Profile: cmp.Or(p, MCU), Wait: 6 * time.Second, Step: 4 * time.Second, Patience: 6 * time.Second,
		Features: []string{"subscribe", "qos1", "stays"}}
	if s.slow = strings.HasSuffix(c.ID, ".kicked"); s.slow {
		o.Wait = 20 * time.Second
	}
	src, err := newSource(o)
	if err != nil {
		t.Error(err)
		return blank(c)
	}
	s.addr = src.listen.Addr().String()
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { s.run(ctx) })
	r := &run{o: o, src: src, all: 1, report: &Report{}}
	res := r.one(context.Background(), c)
	stop()
	src.close()
	wg.Wait()
	return res
}

// holdAll plays the whole list, many at the same time: most of them wait.
func holdAll(t *testing.T, w *World, list []trial) {
	t.Helper()
	slots := make(chan struct{}, 40)
	var wg sync.WaitGroup
	for i := range list {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			list[i].result = hold(t, mutant(w, list[i].mutant), &list[i].c, list[i].profile)
		})
	}
	wg.Wait()
}

// trials pairs each case with the strict client and with its own mutants, those that
// take long first.
func trials(t *testing.T) (list []trial) {
	t.Helper()
	named := killers()
	var last []trial
	for _, c := range DeviceCases() {
		if named[c.ID] == "" {
			t.Errorf("%s: no mutant is named that it turns red", c.ID)
		}
		for _, m := range append([]string{""}, strings.Fields(named[c.ID])...) {
			if strings.HasSuffix(c.ID, ".kicked") || c.Group() == "M8" {
				list = append(list, trial{c: c, mutant: m})
			} else {
				last = append(last, trial{c: c, mutant: m})
			}
		}
		delete(named, c.ID)
	}
	for id := range named {
		t.Errorf("%s: there is no such case", id)
	}
	return append(list, last...)
}

// TestTable: every case lets a correct client pass, and turns each of its mutants red.
// docs/check-table.md shows what it found.
func TestTable(t *testing.T) {
	t.Parallel()
	if n := len(DeviceCases()); n < 90 {
		t.Errorf("%d device cases, want 90", n)
	}
	list := trials(t)
	holdAll(t, tableWorld(t), list)
	for i := range list {
		x := &list[i]
		says := fmt.Sprintf("%s: %s: %s; %s", x.c.ID, x.result.Verdict, x.result.Why, x.result.EvidenceText())
		switch {
		case x.mutant == "" && x.result.Verdict != Pass:
			t.Errorf("the strict client: %s", says)
		case x.mutant == "flat-backoff" && x.result.Verdict == Warn: // no clause says how much is enough
		case x.mutant != "" && !x.red():
			t.Errorf("the mutant %s: %s", x.mutant, says)
		}
	}
	if !t.Failed() {
		compareTable(t, tableText(list))
	}
}

func compareTable(t *testing.T, text string) {
	t.Helper()
	path := filepath.Join("..", "..", "docs", "check-table.md")
	if *updateTable {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != text {
		t.Errorf("%s is stale: go test ./internal/check -run TestTable -update-table", path)
	}
}

// tableText is the page: the cases, and the mutants that they turn red.
func tableText(list []trial) string {
	found := map[string][]string{} // verdicts of the mutants, by case
	used := map[string]int{}       // by how many cases a mutant is named
	for _, x := range list {
		if x.mutant != "" {
			found[x.c.ID] = append(found[x.c.ID], x.mutant+": "+string(x.result.Verdict))
			used[x.mutant]++
		}
	}
	var rows strings.Builder
	cases, own := DeviceCases(), 0
	for _, c := range cases {
		fmt.Fprintf(&rows, "| %s | %s | %s |\n", c.ID, c.Does, strings.Join(found[c.ID], "; "))
		if slices.ContainsFunc(strings.Fields(killers()[c.ID]), func(m string) bool { return used[m] == 1 }) {
			own++
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, tableHead, len(cases), len(used), own)
	b.WriteString("\n| case | the false broker shows | mutants, and the verdict on them |\n|---|---|---|\n" + rows.String())
	b.WriteString("\n## The mutants\n\n| mutant | its flaw |\n|---|---|\n")
	for _, m := range slices.Sorted(maps.Keys(used)) {
		fmt.Fprintf(&b, "| %s | %s |\n", m, flawText(m))
	}
	return b.String()
}

const tableHead = `# Which broken client each device case catches

The suite holds each of the %d device cases against a strict client, which passes all of
them, and against broken ones: %d mutants, each the same client with the flaws that its
name lists (joined by "+"), or one of Go's crypto/tls ("go"), held against the profile of
a microcontroller. A case must turn each of the mutants in its row red: FAIL, or
inconclusive where the provocation is silence; "flat-backoff" alone is a warn. %d cases have a mutant that is named for no
other case. It is no full cross product: a mutant is held against the cases that it was
made for, and "no-trust", "no-name", "no-verify", "any-issuer", "go" and "go-insecure"
against more. TestCross plays the cross product when CHECK_CROSS is set, which takes some
minutes, and demands that 90 cases are the only one that turns some mutant red.

This page is written by TestTable in internal/check, which fails when it is stale.
`

// flawText says in words what is wrong with a mutant.
func flawText(name string) string {
	var parts []string
	for f := range strings.SplitSeq(name, "+") {
		parts = append(parts, flawTexts()[f])
	}
	return strings.Join(parts, ", and ")
}

// TestFlawsAreNamed: the page says of each mutant what is wrong with it.
func TestFlawsAreNamed(t *testing.T) {
	texts, used := flawTexts(), map[string]bool{}
	for _, list := range killers() {
		for m := range strings.FieldsSeq(list) {
			for f := range strings.SplitSeq(m, "+") {
				if used[f] = true; texts[f] == "" {
					t.Errorf("%s has no text", f)
				}
			}
		}
	}
	for f := range texts {
		if !used[f] {
			t.Errorf("%s is the flaw of no mutant", f)
		}
	}
}

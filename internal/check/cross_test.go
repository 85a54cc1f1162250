package check

import (
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
)

// TestCross holds every mutant against every case, and says which cases turn a mutant red
// that no other case does. It takes minutes: CHECK_CROSS=1 asks for it.
func TestCross(t *testing.T) {
	if os.Getenv("CHECK_CROSS") == "" {
		t.Skip("CHECK_CROSS is not set: the full cross product is not played")
	}
	mutants := map[string]bool{}
	for _, list := range killers() {
		for m := range strings.FieldsSeq(list) {
			mutants[m] = true
		}
	}
	var list []trial
	for _, m := range slices.Sorted(maps.Keys(mutants)) {
		for _, c := range DeviceCases() {
			if !strings.HasSuffix(c.ID, ".kicked") { // its mutant waits as the others do elsewhere
				list = append(list, trial{c: c, mutant: m})
			}
		}
	}
	holdAll(t, tableWorld(t), list)
	red := map[string][]string{} // cases, by mutant
	for i := range list {
		if x := &list[i]; x.red() {
			red[x.mutant] = append(red[x.mutant], x.c.ID)
		}
	}
	alone := map[string]bool{}
	for _, m := range slices.Sorted(maps.Keys(red)) {
		t.Logf("%-24s %s", m, strings.Join(red[m], " "))
		if len(red[m]) == 1 {
			alone[red[m][0]] = true
		}
	}
	if len(alone) < 90 {
		t.Errorf("only %d cases are the only one that turns some mutant red, want 90", len(alone))
	}
	t.Logf("%d cases are the only one that turns some mutant red", len(alone))
}

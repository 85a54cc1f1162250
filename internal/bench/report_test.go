package bench

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestReport: null where there is no peer or no goal, met by the ratio where the
// goal is one, and a missed goal is shown as such.
func TestReport(t *testing.T) {
	var r Report
	r.add("better", "µs", []float64{4, 10}, ratioAtMost(0.7))
	r.add("worse", "µs", []float64{8, 10}, ratioAtMost(0.7))
	r.add("faster", "1/s", []float64{30, 10}, ratioAtLeast(1.5))
	r.add("no peer", "µs", []float64{4}, ratioAtMost(0.7))
	r.add("no goal", "µs", []float64{4, 10}, nil)
	r.add("own", "s", []float64{0.4}, atMost(0.3))
	path := filepath.Join(t.TempDir(), "bench.json")
	if err := r.Save(path); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Rows []struct {
			Name, Unit       string
			Hawser           float64
			Mosquitto, Ratio *float64
			Goal             *string
			Met              *bool
		}
	}
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	yes, no := true, false
	for i, want := range []*bool{&yes, &no, &yes, nil, nil, &no} {
		row := got.Rows[i]
		if (row.Met == nil) != (want == nil) || want != nil && *row.Met != *want {
			t.Errorf("%s: met %v", row.Name, row.Met)
		}
		if (row.Goal == nil) != (row.Name == "no goal") {
			t.Errorf("%s: goal %v", row.Name, row.Goal)
		}
	}
	if n := strings.Count(string(text), "null"); n != 7 {
		t.Errorf("%d nulls in\n%s", n, text)
	}
	var table bytes.Buffer
	r.Print(&table)
	if s := table.String(); !strings.Contains(s, "NO") || !strings.Contains(s, "<= 0.7 x") || !strings.Contains(s, ">= 1.5 x") {
		t.Errorf("the table is\n%s", s)
	}
}

// TestOwnFigures: what is read from /proc is this process's.
func TestOwnFigures(t *testing.T) {
	before, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; {
		now, err := cpuTime(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if now > before {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("five busy seconds took no CPU")
		}
	}
	if rss, err := memory(os.Getpid(), "VmRSS"); err != nil || rss < 1<<20 {
		t.Fatalf("VmRSS %v, %v", rss, err)
	}
	if _, err := memory(os.Getpid(), "VmNothing"); err == nil {
		t.Fatal("a figure that does not exist was read")
	}
}

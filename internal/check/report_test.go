package check

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func sampleReport() *Report {
	yes := true
	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return &Report{Kind: "device", Target: "a <client>", Profile: "mcu", Began: began, Ended: began.Add(1500 * time.Millisecond), Results: []Result{
		{ID: "X1.a", Does: "one & two", Expect: "gives up", Clause: "RFC 1", Verdict: Pass, Why: "it gave up", Recovers: &yes, Evidence: Evidence{Connected: true, Farthest: "ClientHello", Ended: "closed"}},
		{ID: "X1.b", Does: "]]>", Verdict: Fail, Why: "it sent <bytes> \x01", Evidence: Evidence{Connected: true, Farthest: "application data", Ended: "still open", Sent: 3, First: "101000", Note: "n"}},
		{ID: "R7.c", Verdict: Inconclusive, Why: "silence"}, {ID: "M1.d", Verdict: NotApplicable, Why: "no"}, {ID: "X6.e", Verdict: Warn, Why: "no clock"},
	}}
}

// TestJUnit: the file parses, and says of each verdict what CI systems know of it.
func TestJUnit(t *testing.T) {
	var b bytes.Buffer
	if err := sampleReport().WriteJUnit(&b); err != nil {
		t.Fatal(err)
	}
	var s junitSuite
	if err := xml.Unmarshal(b.Bytes(), &s); err != nil {
		t.Fatalf("%v in %s", err, b.Bytes())
	}
	if s.Tests != 5 || s.Failures != 1 || s.Errors != 1 || s.Skipped != 1 || s.Time != "1.500" || s.Stamp != "2026-01-02T03:04:05" {
		t.Errorf("%+v", s)
	}
	if len(s.Cases) != 5 {
		t.Fatalf("%d cases", len(s.Cases))
	}
	for i, got := range []bool{s.Cases[0].Failure == nil && s.Cases[0].Error == nil, s.Cases[1].Failure != nil, s.Cases[2].Error != nil, s.Cases[3].Skipped != nil,
		s.Cases[4].Failure == nil && strings.HasPrefix(s.Cases[4].Out, "warn: no clock")} {
		if !got {
			t.Errorf("case %d: %+v", i, s.Cases[i])
		}
	}
	if c := s.Cases[1]; c.Class != "hawser.check.device.X1" || !strings.Contains(c.Failure.Text, "3 bytes of application data; first bytes 101000; n") {
		t.Errorf("%+v", c)
	}
}

// TestJSON: one object per line; the last is about the run.
func TestJSON(t *testing.T) {
	var b bytes.Buffer
	if err := sampleReport().WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	if len(lines) != 6 {
		t.Fatalf("%d lines", len(lines))
	}
	for i, l := range lines {
		var v struct {
			ID      string
			Verdict Verdict
			Kind    string
			OK      *bool
			Counts  map[Verdict]int
			Results []any
		}
		if err := json.Unmarshal([]byte(l), &v); err != nil {
			t.Fatalf("%v in %s", err, l)
		}
		if want := sampleReport(); i < 5 && (v.ID != want.Results[i].ID || v.Verdict != want.Results[i].Verdict) {
			t.Errorf("line %d: %s", i, l)
		}
		if i == 5 && (v.OK == nil || *v.OK || v.Kind != "device" || v.Counts[Fail] != 1 || v.Results != nil) {
			t.Errorf("the last line: %s", l)
		}
	}
}

// TestHTML: the page carries nothing that was not escaped.
func TestHTML(t *testing.T) {
	var b bytes.Buffer
	if err := sampleReport().WriteHTML(&b); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"<client>", "<bytes>"} {
		if strings.Contains(b.String(), bad) {
			t.Errorf("%s is not escaped", bad)
		}
	}
	for _, want := range []string{"X1.b", "a &lt;client&gt;", "EN 303 645"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%s is not there", want)
		}
	}
}

func TestImage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := &Report{}
	if err := r.AddImage(path); err != nil || r.Image != "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" {
		t.Errorf("%s, %v", r.Image, err)
	}
	if err := r.AddImage(path + "x"); err == nil {
		t.Error("a file that is not there has a hash")
	}
}

package check

import (
	"bytes"
	"context"
	"encoding/xml"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// fullReport has a result for each case, of every verdict, with a hostile client's
// output in it.
func fullReport() *Report {
	r := &Report{Kind: "device", Target: "client '<b>' & co", Profile: string(MCU), Began: time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC), Image: strings.Repeat("ab", 32)}
	r.Ended = r.Began.Add(83 * time.Second)
	verdicts := []Verdict{Pass, Pass, Pass, Fail, Pass, Warn, Pass, NotApplicable, Pass, Pass, Inconclusive, Pass}
	yes := true
	for i, c := range DeviceCases() {
		x := Result{ID: c.ID, Does: c.Does, Expect: c.Expect, Clause: c.Clause, Verdict: verdicts[i%len(verdicts)], Why: "it did what it did", Began: r.Began,
			Took: time.Duration(i) * time.Millisecond, Recovers: &yes, Evidence: Evidence{Connected: true, Farthest: "ClientHello", Ended: "alert unknown_ca",
				Output: `<script>fetch("/stolen")</script><img src="/stolen"><link rel="stylesheet" href="/stolen">` + "\x1b[31m"}}
		if strings.HasSuffix(c.ID, ".kicked") {
			x.Evidence.Waits = []float64{1.29, 2.95, 5.75, 9.78}
		}
		r.Results = append(r.Results, x)
	}
	return r
}

func pageOf(t *testing.T, r *Report) string {
	t.Helper()
	var b bytes.Buffer
	if err := r.WriteHTML(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// browse opens a page in a real browser, and gives its document as it stands then, what
// was written to the console, and the requests that reached the server.
func browse(t *testing.T, page string) (dom, console string, requests []string) {
	t.Helper()
	browser, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("chromium is not installed: the page is not opened in a browser")
	}
	var mu sync.Mutex
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		requests = append(requests, r.URL.Path)
		w.Header().Set("Content-Type", "text/html")
		w.Write([]byte(page)) // a browser that has gone shows in the document
	}))
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
		"--disable-component-update", "--no-first-run", "--user-data-dir="+t.TempDir(), "--enable-logging=stderr", "--dump-dom", s.URL+"/report.html")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, errs.String())
	}
	for line := range strings.Lines(errs.String()) {
		if strings.Contains(line, "CONSOLE") {
			console += line
		}
	}
	mu.Lock()
	defer mu.Unlock()
	return out.String(), console, requests
}

// TestPageInABrowser: everything is there, nothing of what a client printed runs, and the
// page asks nobody for anything.
func TestPageInABrowser(t *testing.T) {
	t.Parallel()
	r := fullReport()
	dom, console, requests := browse(t, pageOf(t, r))
	if console != "" {
		t.Errorf("console: %s", console)
	}
	if len(requests) != 1 {
		t.Errorf("requests: %q", requests)
	}
	for _, x := range r.Results {
		if !strings.Contains(dom, `<tr class="case" id="`+x.ID+`">`) {
			t.Errorf("no row for %s", x.ID)
		}
	}
	if !regexp.MustCompile(`<p id="outcome" class="fail">\d+ of the \d+ cases that apply FAIL`).MatchString(dom) {
		t.Error("the outcome is not there")
	}
	_, provisions, _ := strings.Cut(dom, `<table id="provisions">`)
	if n := strings.Count(provisions, "<tr>"); n < 8 {
		t.Errorf("%d rows of provisions", n)
	}
	if !strings.Contains(dom, "evidence, no certificate") || strings.Count(dom, `<svg class="timeline"`) != 2 {
		t.Error("a part of the page is not there")
	}
	if strings.Contains(dom, "<script") || strings.Contains(dom, "<img") {
		t.Error("what the client printed became part of the page")
	}
}

// TestPageBeginsWithWhatFails needs no browser.
func TestPageBeginsWithWhatFails(t *testing.T) {
	r := fullReport()
	text := pageOf(t, r)
	last := -1
	for _, title := range []string{`id="outcome"`, "FAIL: to be mended", "Inconclusive: to be tried again", "Warn: to be known", ">Pass (", "Not applicable"} {
		at := strings.Index(text, title)
		if at <= last {
			t.Errorf("%q stands at %d, after %d", title, at, last)
		}
		last = at
	}
	if m := regexp.MustCompile(`(src|href)="(http|//|/)|url\(|@import`).FindString(text); m != "" {
		t.Errorf("the page points elsewhere: %s", m)
	}
	for _, v := range []Verdict{Fail, Inconclusive, Warn, NotApplicable} {
		for i := range r.Results {
			if r.Results[i].Verdict == v {
				r.Results[i].Verdict = Pass
			}
		}
		if got := r.worst(); (got == Pass) != r.OK() {
			t.Errorf("the page says %s, the exit code %t", got, r.OK())
		}
	}
	empty := &Report{Kind: "device"}
	if pageOf(t, empty); empty.worst() == Pass {
		t.Error("a run of nothing is a pass")
	}
}

// TestJUnitOfEveryCase: the file is read back as a CI system reads it, and the numbers at its head
// are those of its cases.
func TestJUnitOfEveryCase(t *testing.T) {
	r := fullReport()
	var b bytes.Buffer
	if err := r.WriteJUnit(&b); err != nil {
		t.Fatal(err)
	}
	var s struct {
		XMLName  xml.Name `xml:"testsuite"`
		Tests    int      `xml:"tests,attr"`
		Failures int      `xml:"failures,attr"`
		Errors   int      `xml:"errors,attr"`
		Skipped  int      `xml:"skipped,attr"`
		Cases    []struct {
			Name    string    `xml:"name,attr"`
			Class   string    `xml:"classname,attr"`
			Failure *struct{} `xml:"failure"`
			Error   *struct{} `xml:"error"`
			Skipped *struct{} `xml:"skipped"`
		} `xml:"testcase"`
	}
	if err := xml.Unmarshal(b.Bytes(), &s); err != nil {
		t.Fatal(err)
	}
	failures, errs, skipped := 0, 0, 0
	for i, c := range s.Cases {
		if c.Name == "" || !strings.HasPrefix(c.Class, "hawser.check.device.") || !strings.HasPrefix(c.Name, r.Results[i].ID+" ") {
			t.Errorf("case %d: %q of %q", i, c.Name, c.Class)
		}
		for n, there := range map[*int]bool{&failures: c.Failure != nil, &errs: c.Error != nil, &skipped: c.Skipped != nil} {
			if there {
				*n++
			}
		}
	}
	n := r.Counts()
	if s.Tests != len(r.Results) || len(s.Cases) != s.Tests || s.Failures != n[Fail] || failures != n[Fail] || s.Errors != n[Inconclusive] || errs != n[Inconclusive] ||
		s.Skipped != n[NotApplicable] || skipped != n[NotApplicable] {
		t.Errorf("%d tests, %d failures, %d errors, %d skipped; counted %d, %d, %d of %v", s.Tests, s.Failures, s.Errors, s.Skipped, failures, errs, skipped, n)
	}
	lint, err := exec.LookPath("xmllint")
	if err != nil {
		t.Skip("xmllint is not installed: the file was parsed by the standard library alone")
	}
	cmd := exec.Command(lint, "--noout", "-")
	cmd.Stdin = &b
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("xmllint: %v: %s", err, out)
	}
}

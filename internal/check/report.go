package check

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"os"
	"strings"
)

// WriteJSON writes one object per line: the results, then a line about the run.
func (r *Report) WriteJSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	for i := range r.Results {
		if err := enc.Encode(&r.Results[i]); err != nil {
			return err
		}
	}
	head := *r
	head.Results = nil
	return enc.Encode(struct {
		Report
		Results []Result        `json:"results,omitempty"` // stand above
		Counts  map[Verdict]int `json:"counts"`
		OK      bool            `json:"ok"`
	}{Report: head, Counts: r.Counts(), OK: r.OK()})
}

// The parts of JUnit's XML that CI systems read.
type (
	junitSuite struct {
		XMLName  xml.Name    `xml:"testsuite"`
		Name     string      `xml:"name,attr"`
		Tests    int         `xml:"tests,attr"`
		Failures int         `xml:"failures,attr"`
		Errors   int         `xml:"errors,attr"`
		Skipped  int         `xml:"skipped,attr"`
		Time     string      `xml:"time,attr"`
		Stamp    string      `xml:"timestamp,attr"`
		Cases    []junitCase `xml:"testcase"`
	}
	junitCase struct {
		Name    string     `xml:"name,attr"`
		Class   string     `xml:"classname,attr"`
		Time    string     `xml:"time,attr"`
		Failure *junitText `xml:"failure,omitempty"`
		Error   *junitText `xml:"error,omitempty"`
		Skipped *junitText `xml:"skipped,omitempty"`
		Out     string     `xml:"system-out,omitempty"`
	}
	junitText struct {
		Message string `xml:"message,attr"`
		Text    string `xml:",chardata"`
	}
)

// WriteJUnit writes the run as JUnit XML: a FAIL is a failure, inconclusive an error,
// n/a is skipped; a warn passes, and says so in its output.
func (r *Report) WriteJUnit(w io.Writer) error {
	n := r.Counts()
	s := junitSuite{Name: "hawser check " + r.Kind, Tests: len(r.Results), Failures: n[Fail], Errors: n[Inconclusive], Skipped: n[NotApplicable],
		Time: seconds(r.Ended.Sub(r.Began).Seconds()), Stamp: r.Began.UTC().Format("2006-01-02T15:04:05")}
	for i := range r.Results {
		s.Cases = append(s.Cases, junitOf(r.Kind, &r.Results[i]))
	}
	if _, err := io.WriteString(w, xml.Header); err != nil {
		return err
	}
	enc := xml.NewEncoder(w)
	enc.Indent("", "  ")
	if err := enc.Encode(&s); err != nil {
		return err
	}
	_, err := io.WriteString(w, "\n")
	return err
}

func junitOf(kind string, x *Result) junitCase {
	group, _, _ := strings.Cut(x.ID, ".")
	c := junitCase{Name: x.ID + " " + x.Does, Class: "hawser.check." + kind + "." + group, Time: seconds(x.Took.Seconds())}
	text := &junitText{Message: x.Why, Text: x.EvidenceText() + "\nexpected: " + x.Expect + "\n" + x.Clause}
	switch x.Verdict {
	case Fail:
		c.Failure = text
	case Inconclusive:
		c.Error = text
	case NotApplicable:
		c.Skipped = &junitText{Message: x.Why}
	default:
		c.Out = string(x.Verdict) + ": " + x.Why + "\n" + x.EvidenceText()
	}
	return c
}

func seconds(s float64) string { return fmt.Sprintf("%.3f", s) }

// EvidenceText is the evidence on one line.
func (x *Result) EvidenceText() string {
	e := &x.Evidence
	if !e.Connected {
		return "no connection"
	}
	var parts []string
	if e.Farthest != "" {
		parts = append(parts, "came as far as "+e.Farthest)
	}
	parts = append(parts, "ended: "+e.Ended)
	if e.Sent > 0 {
		parts = append(parts, fmt.Sprintf("%d bytes of application data", e.Sent))
	}
	if e.First != "" {
		parts = append(parts, "first bytes "+e.First)
	}
	if e.Note != "" {
		parts = append(parts, e.Note)
	}
	if x.Recovers != nil {
		parts = append(parts, map[bool]string{true: "recovers", false: "does not recover"}[*x.Recovers])
	}
	return strings.Join(parts, "; ")
}

// AddImage notes the SHA-256 of the firmware under test; "" notes nothing.
func (r *Report) AddImage(path string) error {
	if path == "" {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	r.Image = hex.EncodeToString(h.Sum(nil))
	return nil
}

package check

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"slices"
	"strings"
	"time"
)

// provision says which requirements the cases of a group speak to.
type provision struct {
	Groups string // separated by spaces
	What   string
	ETSI   string // ETSI EN 303 645
	CRA    string // Regulation (EU) 2024/2847, annex I
	RFC    string
}

// provisions maps groups of cases to ETSI EN 303 645 V3.1.3 clause 5, to Regulation (EU)
// 2024/2847 annex I part I, and to the RFCs. What is named is what a case gives evidence
// for, in part; none is covered whole.
func provisions() []provision {
	return []provision{
		{"A1 A2 X1 X2 X3 X4 X5 X6 X7 X8 X9 X10 X11 X12 X13", "The device knows its broker: chain, name, purpose, dates", "5.5-1, 5.5-4, 5.5-7", "(2)(d), (2)(e)", "RFC 5280 6; RFC 9525 6; RFC 9325 6.1"},
		{"H1 H2", "The broker proves that it holds its key", "5.5-1, 5.5-4", "(2)(d), (2)(f)", "RFC 9846 4.5.2, 4.5.3"},
		{"H3 H4 H5 H6 H7 H8 H9", "No weaker protocol can be forced on the device", "5.5-1", "(2)(e), (2)(f), (2)(j)", "RFC 9846 4.2, 4.3; RFC 9325 3, 4; RFC 8996"},
		{"R1 R2 R3 R4 R5 R6 C2", "Records and keys are handled as written", "5.5-1, 5.13-1", "(2)(e), (2)(f)", "RFC 9846 4.7, 5, 8"},
		{"R7 M6 M7 M8", "The device survives outages, and does not storm the broker", "5.9-1, 5.9-2, 5.9-3", "(2)(h), (2)(i)", "RFC 9846 6.1; MQTT 3.1.1 4.4"},
		{"M1 M2 M3 M4 M5", "What comes over the wire is checked before it is used", "5.13-1", "(2)(f), (2)(h), (2)(j)", "MQTT 3.1.1 4.8; MQTT 5.0 4.13"},
		{"C1", "Trust that was replaced is no longer trusted, and what was pinned for that day is", "5.5-1, 5.5-8", "(2)(d)", "RFC 5280 6"},
		{"B1 B2 B3", "Nobody comes in without a certificate and its key", "5.5-1, 5.5-4", "(2)(d)", "RFC 9846 4.5"},
		{"B4 B5 B6 B7 B8 B10", "A device reaches its own topics alone", "5.5-4, 5.5-5", "(2)(d), (2)(e), (2)(f)", "MQTT 3.1.1 5.4.2"},
		{"B9", "One client costs the others nothing", "5.9-1, 5.13-1", "(2)(h), (2)(i)", "MQTT 3.1.1 5.4.8"},
	}
}

// mapped is a provision with what this run found of it.
type mapped struct {
	provision
	Verdict Verdict
	Count   string
}

func (r *Report) mapped() (list []mapped) {
	for _, p := range provisions() {
		n, all := map[Verdict]int{}, 0
		for i := range r.Results {
			if group, _, _ := strings.Cut(r.Results[i].ID, "."); strings.Contains(" "+p.Groups+" ", " "+group+" ") {
				n[r.Results[i].Verdict]++
				all++
			}
		}
		if all == 0 {
			continue
		}
		m := mapped{provision: p, Verdict: NotApplicable, Count: fmt.Sprintf("%d of %d", n[Pass], all-n[NotApplicable])}
		for _, v := range []Verdict{Pass, Warn, Inconclusive, Fail} { // the worst of them
			if n[v] > 0 {
				m.Verdict = v
			}
		}
		list = append(list, m)
	}
	return list
}

// timeline is the picture of how a device comes back: one dot for each connection, at the
// time at which it came.
type timeline struct {
	ID, Does string
	Verdict  Verdict
	Dots     []dot
	Pauses   []dot // between two dots
	Ticks    []dot // of the axis
	OneIn    int   // how long the least allowed second is
}

type dot struct {
	X    int
	Text string
}

const timelineWidth = 900 // of the picture, without its margins

func (r *Report) timelines() (list []timeline) {
	for i := range r.Results {
		x := &r.Results[i]
		if len(x.Evidence.Waits) > 0 {
			list = append(list, x.timeline())
		}
	}
	return list
}

func (x *Result) timeline() timeline {
	all := 0.0
	for _, w := range x.Evidence.Waits {
		all += w
	}
	all = max(all, 1)
	at := func(s float64) int { return int(s / all * timelineWidth) }
	t := timeline{ID: x.ID, Does: x.Does, Verdict: x.Verdict, Dots: []dot{{0, "1"}}, OneIn: at(1)}
	passed := 0.0
	for n, w := range x.Evidence.Waits {
		t.Pauses = append(t.Pauses, dot{at(passed + w/2), fmt.Sprintf("%.2f s", w)})
		passed += w
		t.Dots = append(t.Dots, dot{at(passed), fmt.Sprint(n + 2)})
	}
	step := 1.0
	for all/step > 12 {
		step *= 2
	}
	for s := 0.0; s <= all; s += step {
		t.Ticks = append(t.Ticks, dot{at(s), fmt.Sprintf("%g s", s)})
	}
	return t
}

// summary is what one reads who reads no more.
func (r *Report) summary() string {
	n := r.Counts()
	tried := len(r.Results) - n[NotApplicable]
	switch {
	case len(r.Results) == 0:
		return "Nothing was tried."
	case n[Fail] > 0:
		return fmt.Sprintf("%d of the %d cases that apply FAIL. Each is listed first below, with what was seen.", n[Fail], tried)
	case n[Inconclusive] > 0:
		return fmt.Sprintf("No FAIL, but %d of the %d cases that apply came to no verdict: the check is not passed before they have one.", n[Inconclusive], tried)
	}
	return fmt.Sprintf("No FAIL, and nothing inconclusive, in the %d cases that apply.", tried)
}

// worst is the verdict on the whole.
func (r *Report) worst() Verdict {
	n := r.Counts()
	for _, v := range []Verdict{Fail, Inconclusive} {
		if n[v] > 0 {
			return v
		}
	}
	if len(r.Results) == 0 {
		return Inconclusive
	}
	return Pass
}

// section is the cases of one verdict.
type section struct {
	Verdict Verdict
	Title   string
	Results []Result
}

// open is what needs attention, closed all else.
func (r *Report) open() []section {
	return r.sections([]section{{Fail, "FAIL: to be mended", nil}, {Inconclusive, "Inconclusive: to be tried again", nil}, {Warn, "Warn: to be known", nil}})
}

func (r *Report) closed() []section {
	return r.sections([]section{{Pass, "Pass", nil}, {NotApplicable, "Not applicable", nil}})
}

func (r *Report) sections(of []section) (list []section) {
	for _, s := range of {
		for _, x := range r.Results {
			if x.Verdict == s.Verdict {
				s.Results = append(s.Results, x)
			}
		}
		list = append(list, s)
	}
	return slices.DeleteFunc(list, func(s section) bool { return len(s.Results) == 0 })
}

//go:embed report.html
var page string

// WriteHTML writes the run as one page that needs nothing else: no script, no font, no
// picture from elsewhere.
func (r *Report) WriteHTML(w io.Writer) error {
	t, err := template.New("report").Funcs(template.FuncMap{
		"ms":    func(d time.Duration) string { return fmt.Sprintf("%d ms", d.Milliseconds()) },
		"took":  func(d time.Duration) string { return d.Round(100 * time.Millisecond).String() },
		"class": func(v Verdict) string { return strings.ReplaceAll(strings.ToLower(string(v)), "/", "") },
		"open":  func(v Verdict) bool { return v == Fail || v == Inconclusive },
	}).Parse(page)
	if err != nil {
		return err
	}
	return t.Execute(w, struct {
		*Report
		Counts    map[Verdict]int
		Worst     Verdict
		Summary   string
		Mapped    []mapped
		Timelines []timeline
		Open      []section
		Closed    []section
		Order     []Verdict
	}{r, r.Counts(), r.worst(), r.summary(), r.mapped(), r.timelines(), r.open(), r.closed(), []Verdict{Fail, Inconclusive, Warn, Pass, NotApplicable}})
}

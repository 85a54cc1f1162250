package check

import (
	"fmt"
	"html/template"
	"io"
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

func provisions() []provision {
	return []provision{
		{"X1 X2 X3 X4 X5 X6 X7 X8 X9 X10 X11 X12 X13", "The device knows its broker: chain, name, purpose, dates", "5.5-1, 5.5-5", "I(2)(d), I(2)(e)", "RFC 5280 6; RFC 9525; RFC 9325 4"},
		{"H1 H2", "The broker proves that it holds its key", "5.5-1", "I(2)(d)", "RFC 9846 4.5.2, 4.5.3"},
		{"H3 H4 H5 H6 H7 H8 H9", "No weaker protocol can be forced on the device", "5.5-1, 5.5-2", "I(2)(e), I(2)(j)", "RFC 9846 4.2, 4.3; RFC 9325 3; RFC 8996"},
		{"R1 R2 R3 R4 R5 R6 C2", "Records and keys are handled as written", "5.5-1, 5.6-1", "I(2)(f), I(2)(j)", "RFC 9846 5, 4.7"},
		{"R7 M6 M7 M8", "The device survives outages, and does not storm the broker", "5.9-1, 5.9-2, 5.9-3", "I(2)(h), I(2)(i)", "RFC 9846 6.1; MQTT 4.4"},
		{"M1 M2 M3 M4 M5", "What comes over the wire is checked before it is used", "5.13-1", "I(2)(f), I(2)(k)", "MQTT 4.8, 4.13"},
		{"C1", "Trust can be replaced in the field", "5.3-1, 5.4-1", "I(2)(c)", "RFC 5280 6"},
		{"B1 B2 B3", "Nobody comes in without a certificate and its key", "5.1-1, 5.5-5", "I(2)(d)", "RFC 9846 4.5"},
		{"B4 B5 B6 B7 B8 B10", "A device reaches its own topics alone", "5.5-5", "I(2)(d), I(2)(g)", "MQTT 5.4"},
		{"B9", "One client costs the others nothing", "5.9-1, 5.13-1", "I(2)(h), I(2)(j)", "MQTT 4.13; RFC 9846 C.1"},
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

// plot is the picture of how a device waits before it comes back: an SVG of bars.
type plot struct {
	ID    string
	Bars  []bar
	Width int
}

type bar struct {
	X, Y, H int
	Text    string
}

const plotHeight = 120

func (r *Report) plots() (list []plot) {
	for i := range r.Results {
		x := &r.Results[i]
		if len(x.Evidence.Waits) == 0 {
			continue
		}
		longest := 0.1
		for _, w := range x.Evidence.Waits {
			longest = max(longest, w)
		}
		p := plot{ID: x.ID, Width: 70*len(x.Evidence.Waits) + 20}
		for n, w := range x.Evidence.Waits {
			h := int(w / longest * (plotHeight - 30))
			p.Bars = append(p.Bars, bar{X: 20 + 70*n, Y: plotHeight - h, H: h, Text: fmt.Sprintf("%.2f s", w)})
		}
		list = append(list, p)
	}
	return list
}

// WriteHTML writes the run as one page that needs nothing else: no script, no font, no
// picture from elsewhere.
func (r *Report) WriteHTML(w io.Writer) error {
	t, err := template.New("report").Funcs(template.FuncMap{
		"ms":    func(d time.Duration) string { return fmt.Sprintf("%d ms", d.Milliseconds()) },
		"class": func(v Verdict) string { return strings.ReplaceAll(strings.ToLower(string(v)), "/", "") },
		"top":   func(y int) int { return y - 6 },
	}).Parse(page)
	if err != nil {
		return err
	}
	return t.Execute(w, struct {
		*Report
		Counts map[Verdict]int
		OK     bool
		Mapped []mapped
		Plots  []plot
		Order  []Verdict
	}{r, r.Counts(), r.OK(), r.mapped(), r.plots(), []Verdict{Pass, Fail, Warn, Inconclusive, NotApplicable}})
}

const page = `<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>hawser check {{.Kind}}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1d2733;background:#fff}
table{border-collapse:collapse;width:100%;margin:1rem 0}th,td{text-align:left;vertical-align:top;padding:.4rem .6rem;border-bottom:1px solid #d8dee6}
th{font-weight:600;background:#f3f6f9}code{font-size:13px;overflow-wrap:anywhere}small{color:#5a6775}
.v{display:inline-block;min-width:6.5rem;text-align:center;border-radius:3px;padding:0 .4rem;font-weight:600;font-size:13px}
.pass{background:#dcf3e3;color:#0d5c2b}.fail{background:#f9d7d7;color:#8e1111}.warn{background:#fdf0cf;color:#6b4c00}
.inconclusive{background:#e8dff7;color:#4b2a86}.na{background:#edf0f3;color:#5a6775}
.sum{display:flex;gap:.6rem;flex-wrap:wrap}details pre{white-space:pre-wrap;background:#f3f6f9;padding:.5rem}
@media print{details{display:block}}
</style></head><body>
<h1>hawser check {{.Kind}}</h1>
<p id="outcome"><strong>{{if .OK}}No FAIL, and nothing inconclusive.{{else}}Not clean: see below.{{end}}</strong></p>
<p class="sum">{{range .Order}}<span class="v {{class .}}">{{index $.Counts .}} {{.}}</span>{{end}}</p>
<table><tr><th>target</th><td><code>{{.Target}}</code></td></tr><tr><th>profile</th><td>{{.Profile}}</td></tr>
<tr><th>begun</th><td>{{.Began.UTC.Format "2006-01-02 15:04:05Z"}}, {{ms (.Ended.Sub .Began)}}</td></tr>
{{if .Image}}<tr><th>firmware, SHA-256</th><td><code>{{.Image}}</code></td></tr>{{end}}</table>
<h2>Requirements</h2>
<p>Which provisions the cases speak to. A passed case is evidence for a provision, not a certificate.</p>
<table id="provisions"><tr><th>what</th><th>ETSI EN 303 645</th><th>CRA annex</th><th>clauses</th><th>passed</th><th>worst</th></tr>
{{range .Mapped}}<tr><td>{{.What}}<br><small>{{.Groups}}</small></td><td>{{.ETSI}}</td><td>{{.CRA}}</td><td>{{.RFC}}</td><td>{{.Count}}</td><td><span class="v {{class .Verdict}}">{{.Verdict}}</span></td></tr>
{{end}}</table>
{{if .Plots}}<h2>How it comes back</h2>{{range .Plots}}<h3>{{.ID}}</h3>
<svg role="img" width="{{.Width}}" height="150" viewBox="0 0 {{.Width}} 150" aria-label="pauses before reconnects"><line x1="0" y1="120" x2="{{.Width}}" y2="120" stroke="#5a6775"/>
{{range .Bars}}<rect x="{{.X}}" y="{{.Y}}" width="40" height="{{.H}}" fill="#3b6ea5"/><text x="{{.X}}" y="{{top .Y}}" font-size="12">{{.Text}}</text>{{end}}</svg>{{end}}{{end}}
<h2>Cases</h2>
<table id="cases"><tr><th>case</th><th>verdict</th><th>what was done, what was seen</th><th>took</th></tr>
{{range .Results}}<tr id="{{.ID}}"><td>{{.ID}}</td><td><span class="v {{class .Verdict}}">{{.Verdict}}</span></td>
<td>{{.Does}}.<br>{{.Why}}.<br><small>Expected: {{.Expect}}. {{.Clause}}.</small>
<details><summary>evidence</summary><pre>{{.EvidenceText}}{{if .Evidence.Output}}
{{.Evidence.Output}}{{end}}</pre></details></td><td>{{ms .Took}}</td></tr>
{{end}}</table>
<p><small>Every certificate was made for this run; no key of a real fleet was used.</small></p>
</body></html>
`

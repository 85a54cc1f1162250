package bench

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"hawser/internal/durable"
)

// Report is the table.
type Report struct {
	Rows  []Row `json:"rows"`
	small bool  // a run of another size than the goals are about: they are left out
}

// Row is one figure. Nil stands for "no peer" or "no goal".
type Row struct {
	Name      string   `json:"name"`
	Unit      string   `json:"unit"`
	Hawser    float64  `json:"hawser"`
	Mosquitto *float64 `json:"mosquitto"`
	Ratio     *float64 `json:"ratio"` // Hawser / mosquitto
	Goal      *string  `json:"goal"`
	Met       *bool    `json:"met"` // nil also when the goal is a ratio and there is no peer
}

// goal is what a row should reach: at most, or at least, limit; of the ratio or
// of Hawser's own value.
type goal struct {
	limit   float64
	ratio   bool
	atLeast bool
}

func atMost(v float64) *goal       { return &goal{limit: v} }
func atLeast(v float64) *goal      { return &goal{limit: v, atLeast: true} }
func ratioAtMost(v float64) *goal  { return &goal{limit: v, ratio: true} }
func ratioAtLeast(v float64) *goal { return &goal{limit: v, ratio: true, atLeast: true} }
func (g *goal) met(v float64) bool { return g.atLeast && v >= g.limit || !g.atLeast && v <= g.limit }
func (g *goal) String() (s string) { return g.sign() + fmt.Sprintf(" %.4g", g.limit) + g.suffix() }
func (g *goal) sign() string       { return map[bool]string{true: ">=", false: "<="}[g.atLeast] }
func (g *goal) suffix() string     { return map[bool]string{true: " x", false: ""}[g.ratio] }
func median(v []float64) float64   { slices.Sort(v); return v[len(v)/2] }
func quantile(v []float64, q float64) float64 {
	slices.Sort(v)
	return v[min(len(v)-1, int(q*float64(len(v))))]
}

// add appends a row. values holds the medians of the servers measured, Hawser
// first; g may be nil.
func (r *Report) add(name, unit string, values []float64, g *goal) {
	row := Row{Name: name, Unit: unit, Hawser: values[0]}
	if len(values) > 1 {
		row.Mosquitto = &values[1]
		if values[1] > 0 { // a short run can be less than a tick
			ratio := values[0] / values[1]
			row.Ratio = &ratio
		}
	}
	if g != nil && !r.small {
		text := g.String()
		row.Goal = &text
		if !g.ratio {
			ok := g.met(row.Hawser)
			row.Met = &ok
		} else if row.Ratio != nil {
			ok := g.met(*row.Ratio)
			row.Met = &ok
		}
	}
	r.Rows = append(r.Rows, row)
}

// Print writes the table for people.
func (r *Report) Print(w io.Writer) {
	fmt.Fprintf(w, "%-58s %-9s %10s %10s %7s  %-10s %s\n", "", "unit", "hawser", "mosquitto", "ratio", "goal", "met")
	for _, row := range r.Rows {
		fmt.Fprintf(w, "%-58s %-9s %10s %10s %7s  %-10s %s\n", row.Name, row.Unit, number(&row.Hawser), number(row.Mosquitto),
			number(row.Ratio), text(row.Goal), yes(row.Met))
	}
}

func number(v *float64) string {
	switch {
	case v == nil:
		return "-"
	case *v >= 1000:
		return fmt.Sprintf("%.0f", *v)
	}
	return fmt.Sprintf("%.3g", *v)
}

func text(s *string) string {
	if s == nil {
		return "-"
	}
	return *s
}

func yes(b *bool) string {
	switch {
	case b == nil:
		return "-"
	case *b:
		return "yes"
	}
	return "NO"
}

// Save writes the report as JSON.
func (r *Report) Save(path string) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false) // goals hold < and >
	if err := enc.Encode(r); err != nil {
		return err
	}
	return durable.WriteFile(path, b.Bytes(), 0o644)
}

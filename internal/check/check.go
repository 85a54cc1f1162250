// Package check plays the man in the middle against any MQTT client over TLS, and the
// intruder against any broker, and says what it saw.
//
// It promises:
//   - One verdict for each case: pass, FAIL, warn, inconclusive or n/a, with the
//     evidence: how far the other side came, its alert, how the connection ended.
//   - "Never connected", and silence where silence was not the provocation, are
//     inconclusive, never a pass.
//   - FAIL whenever the client's certificate, its Finished or any MQTT byte was sent to
//     somebody who must not get it, whatever happened afterwards.
//   - Every certificate comes from a throw-away world made for the run. There is no way
//     to hand it a key of a real fleet.
//   - It misbehaves with its own TLS (package tls13), not with a library that was bent,
//     and imports nothing of Hawser's broker.
package check

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Verdict is what a case came to.
type Verdict string

// The verdicts.
const (
	Pass          Verdict = "pass"
	Fail          Verdict = "FAIL"
	Warn          Verdict = "warn"
	Inconclusive  Verdict = "inconclusive"
	NotApplicable Verdict = "n/a"
)

// Case is one thing that is tried, with what it is for.
type Case struct {
	ID     string // "X1.unknown-ca": the number of the table, and the variant
	Does   string // what is done, one line
	Expect string // what a correct peer does
	Clause string // the clause, or the CVE, that it comes from
	Needs  string // features without which it says nothing: "subscribe qos1 stays"

	kind kind
	play func(s *stage) error
}

// Group is the part of the id before the dot.
func (c *Case) Group() string { g, _, _ := strings.Cut(c.ID, "."); return g }

// kind says how a case is judged.
type kind uint8

const (
	reject      kind = iota // anything but giving up is a FAIL
	rejectMCU               // in the general profile it is legitimate: warn
	rejectDated             // without a clock it cannot be seen: warn
	accept                  // the honest connection must come about
	survive                 // it may go on or end in order; afterwards it must come back
	silence                 // the peer must end it by its own time-out
	selfJudged              // play sets the verdict
	probeOnly               // an honest broker that looks at something; play sets the verdict
)

// Evidence is what was seen of the other side.
type Evidence struct {
	Connected bool   `json:"connected"`
	Farthest  string `json:"farthest"`        // the last thing it sent
	Ended     string `json:"ended"`           // alert, closed, reset, silence
	Sent      int    `json:"sent"`            // plaintext bytes of application data it sent
	First     string `json:"first,omitempty"` // the first of them, hex
	Note      string `json:"note,omitempty"`  // what else a case measured
	Output    string `json:"output,omitempty"`

	// Waits are the pauses before reconnects that a case measured, in seconds.
	Waits []float64 `json:"waits,omitempty"`
}

// Result is the outcome of one case.
type Result struct {
	ID       string        `json:"id"`
	Does     string        `json:"does"`
	Expect   string        `json:"expect"`
	Clause   string        `json:"clause"`
	Verdict  Verdict       `json:"verdict"`
	Why      string        `json:"why"`
	Evidence Evidence      `json:"evidence"`
	Recovers *bool         `json:"recovers,omitempty"` // the honest broker was reached afterwards
	Began    time.Time     `json:"began"`
	Took     time.Duration `json:"took_ns"`
}

// Report is a whole run.
type Report struct {
	Kind     string    `json:"kind"` // device or broker
	Target   string    `json:"target"`
	Profile  string    `json:"profile"`
	Upstream string    `json:"upstream,omitempty"` // in the field: the honest broker
	Began    time.Time `json:"began"`
	Ended    time.Time `json:"ended"`
	Image    string    `json:"image,omitempty"` // SHA-256 of the firmware that was under test
	Results  []Result  `json:"results"`
}

// Counts gives how many results there are of each verdict.
func (r *Report) Counts() map[Verdict]int {
	n := map[Verdict]int{}
	for i := range r.Results {
		n[r.Results[i].Verdict]++
	}
	return n
}

// OK reports whether there is no FAIL and nothing inconclusive.
func (r *Report) OK() bool {
	n := r.Counts()
	return n[Fail] == 0 && n[Inconclusive] == 0 && len(r.Results) > 0
}

// DeviceCases lists what a device is tried with, the honest ones first.
func DeviceCases() []Case {
	return slices.Concat(honestCases(), chainCases(), certificateCases(), handshakeCases(), helloCases(), recordCases(),
		stallCases(), packetCases(), sessionCases(), rolloverCases())
}

// Find gives the cases that a list of ids or groups names, in their own order.
func Find(all []Case, names []string) ([]Case, error) {
	if len(names) == 0 {
		return all, nil
	}
	var out []Case
	used := map[string]bool{}
	for _, c := range all {
		for _, n := range names {
			if strings.EqualFold(n, c.ID) || strings.EqualFold(n, c.Group()) {
				used[n] = true
				out = append(out, c)
				break
			}
		}
	}
	for _, n := range names {
		if !used[n] {
			return nil, fmt.Errorf("there is no case %q\nhint: hawser check list", n)
		}
	}
	return out, nil
}

func firstBytes(b []byte) string { return hex.EncodeToString(b[:min(len(b), 32)]) }

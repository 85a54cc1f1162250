package check

import (
	"cmp"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"hawser/internal/check/tls13"
	"hawser/internal/mqtt"
)

// TestJudge: each verdict follows from what was seen, and nothing that leaked is ever
// forgiven.
func TestJudge(t *testing.T) {
	gone := tls13.Seen{Hello: true, Alert: &tls13.Alert{Level: 2, Code: 48}, End: tls13.ErrAlert}
	quiet := tls13.Seen{Hello: true, End: os.ErrDeadlineExceeded}
	with := func(s tls13.Seen, change func(*tls13.Seen)) tls13.Seen { change(&s); return s }
	certificate := with(gone, func(s *tls13.Seen) { s.Certificate = true })
	for name, c := range map[string]struct {
		kind    kind
		seen    tls13.Seen
		profile Profile
		noClock bool
		joined  bool // CONNECT came
		settled Verdict
		want    Verdict
	}{
		"gave up":                     {seen: gone, want: Pass},
		"closed":                      {seen: tls13.Seen{Hello: true, End: io.EOF}, want: Pass},
		"silent":                      {seen: quiet, want: Inconclusive},
		"no hello":                    {seen: tls13.Seen{End: io.EOF}, want: Inconclusive},
		"open":                        {seen: tls13.Seen{Hello: true}, want: Inconclusive},
		"certificate, then gone":      {seen: certificate, want: Fail},
		"Finished, then gone":         {seen: with(gone, func(s *tls13.Seen) { s.Finished = true }), want: Fail},
		"one byte, then gone":         {seen: with(gone, func(s *tls13.Seen) { s.AppBytes = 1 }), want: Fail},
		"keys of its own":             {seen: with(gone, func(s *tls13.Seen) { s.Foreign = 500 }), want: Fail},
		"general":                     {kind: rejectMCU, seen: certificate, profile: General, want: Warn},
		"general, against a device":   {kind: rejectMCU, seen: certificate, profile: MCU, want: Fail},
		"general, but for nobody":     {kind: reject, seen: certificate, profile: General, want: Fail},
		"no clock":                    {kind: rejectDated, seen: certificate, noClock: true, want: Warn},
		"a clock":                     {kind: rejectDated, seen: certificate, want: Fail},
		"no clock, but no date":       {kind: reject, seen: certificate, noClock: true, want: Fail},
		"no clock, and gave up":       {kind: rejectDated, seen: gone, noClock: true, want: Pass},
		"accepted":                    {kind: accept, seen: tls13.Seen{Hello: true, AppBytes: 20}, joined: true, want: Pass},
		"refused what was honest":     {kind: accept, seen: gone, want: Fail},
		"waited with what was honest": {kind: accept, seen: quiet, want: Inconclusive},
		"survived":                    {kind: survive, seen: gone, want: Pass},
		"went on":                     {kind: survive, seen: tls13.Seen{Hello: true}, want: Pass},
		"nobody to survive":           {kind: survive, seen: tls13.Seen{End: io.EOF}, want: Inconclusive},
		"its own time-out":            {kind: silence, seen: tls13.Seen{Hello: true, End: io.EOF}, want: Pass},
		"no time-out":                 {kind: silence, seen: quiet, want: Inconclusive},
		"its own verdict":             {kind: selfJudged, seen: gone, settled: Warn, want: Warn},
		"no verdict of its own":       {kind: selfJudged, seen: gone, want: Inconclusive},
	} {
		s := &stage{Conn: &tls13.Conn{Seen: c.seen}, verdict: c.settled, version: mqtt.V5}
		if c.joined {
			s.connect = new(mqtt.Connect)
		}
		got, why := judge(&Case{kind: c.kind}, s, &DeviceOptions{Profile: c.profile, NoClock: c.noClock})
		if got != c.want || c.settled == "" && why == "" {
			t.Errorf("%s: %s (%s), want %s", name, got, why, c.want)
		}
	}
}

// TestOK: one FAIL, one inconclusive, or nothing at all, and the run is not ok.
func TestOK(t *testing.T) {
	for list, want := range map[string]bool{"pass": true, "pass warn n/a": true, "pass FAIL": false, "pass inconclusive": false, "": false} {
		r := &Report{}
		for v := range strings.FieldsSeq(list) {
			r.Results = append(r.Results, Result{Verdict: Verdict(v)})
		}
		if r.OK() != want {
			t.Errorf("%q: %v", list, !want)
		}
	}
}

func TestFind(t *testing.T) {
	all := []Case{{ID: "X1.a"}, {ID: "X10.a"}, {ID: "X1.b"}, {ID: "H1.a"}}
	for names, want := range map[string]string{"": "X1.a X10.a X1.b H1.a", "X1": "X1.a X1.b", "h1.A x10": "X10.a H1.a", "X1.b X1": "X1.a X1.b"} {
		got, err := Find(all, strings.Fields(names))
		var ids []string
		for _, c := range got {
			ids = append(ids, c.ID)
		}
		if err != nil || strings.Join(ids, " ") != want {
			t.Errorf("%q: %v, %v", names, ids, err)
		}
	}
	for _, odd := range []string{"X2", "X", "X1.", "X1.c"} {
		if got, err := Find(all, []string{"X1", odd}); err == nil || got != nil {
			t.Errorf("%q was found: %v", odd, got)
		}
	}
}

// TestDeviceCasesAreComplete: every case says what it does, what is expected and where it
// comes from, under an id of its own.
func TestDeviceCasesAreComplete(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range DeviceCases() {
		if c.Does == "" || c.Expect == "" || c.Clause == "" || seen[c.ID] || !strings.Contains(c.ID, ".") {
			t.Errorf("%+v", c)
		}
		seen[c.ID] = true
	}
}

func TestIsDuplicate(t *testing.T) {
	for payload, want := range map[string]bool{
		`{"cid":"1","status":"duplicate"}`: true, `{"cid":"1","status":"done"}`: false, "": false,
		"\xa2\x01\x1b\x00\x06\x02\x02\x00\x00\x00\x01\x02\x02": true, "\xa2\x01\x1b\x00\x06\x02\x02\x00\x00\x00\x01\x02\x00": false,
	} {
		if isDuplicate(payload) != want {
			t.Errorf("%q: %v", payload, !want)
		}
	}
}

// TestUnjudged: a device that does not come is never judged.
func TestUnjudged(t *testing.T) {
	t.Parallel()
	w, dir := worldFiles(t)
	rep, err := Device(t.Context(), DeviceOptions{World: w, Dir: dir, Host: "localhost", Profile: MCU, Wait: 1e9, Step: 1e9, Patience: 1e9, Exec: "exit 3", Only: []string{"X1", "R7"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rep.Results {
		if r.Verdict != Inconclusive || r.Evidence.Connected {
			t.Errorf("%s: %s, %s", r.ID, r.Verdict, r.Why)
		}
	}
	if len(rep.Results) < 10 || rep.OK() {
		t.Errorf("%d results, ok %v", len(rep.Results), rep.OK())
	}
	if _, err := Device(t.Context(), DeviceOptions{World: w, Exec: "true", Only: []string{"nonsense"}}); err == nil || !strings.Contains(err.Error(), "hint: hawser check list") {
		t.Errorf("a case that does not exist: %v", err)
	}
	if _, err := Device(t.Context(), DeviceOptions{World: w, Listen: "256.0.0.1:1"}); err == nil || errors.Is(err, io.EOF) {
		t.Error("an address that does not exist was listened on")
	}
}

// TestOwnKeys: who goes on under keys that are not the agreed ones is a FAIL; what can
// only be an alert is none.
func TestOwnKeys(t *testing.T) {
	t.Parallel()
	w := tableWorld(t)
	c, err := Find(DeviceCases(), []string{"H6.infinity"})
	if err != nil {
		t.Fatal(err)
	}
	for n, want := range map[int]Verdict{300: Fail, 19: Pass} {
		s := mutant(w, "")
		first := true
		s.dial = func(raw net.Conn) (talk, error) {
			x := &wire{w: w, raw: raw}
			if !first {
				return x, x.shake()
			}
			first = false
			if err := x.greet(); err != nil {
				return nil, err
			}
			if _, _, err := x.message(); err != nil {
				return nil, err
			}
			_, err := raw.Write(append([]byte{23, 3, 3, byte(n >> 8), byte(n)}, make([]byte, n)...))
			return nil, cmp.Or(err, io.EOF)
		}
		if r := hold(t, s, &c[0], MCU); r.Verdict != want || want == Fail && !strings.Contains(r.Why, "keys of its own") {
			t.Errorf("%d bytes: %s, %s", n, r.Verdict, r.Why)
		}
	}
}

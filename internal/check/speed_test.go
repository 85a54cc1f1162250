package check

import (
	"context"
	"os"
	"slices"
	"sync"
	"testing"
	"time"
)

// TestSpeed measures a whole run with the command's own default times, against a client
// that reconnects at once: the strict subject by itself, the same started by --exec, and
// the device kit. CHECK_SPEED=1 asks for it; nothing is judged by time.
func TestSpeed(t *testing.T) {
	if os.Getenv("CHECK_SPEED") == "" {
		t.Skip("CHECK_SPEED is not set: a whole run takes minutes")
	}
	runs := map[string]func(t *testing.T) *Report{
		"the strict subject, which comes by itself": func(t *testing.T) *Report {
			w := tableWorld(t)
			ctx, stop := context.WithCancel(context.Background())
			var wg sync.WaitGroup
			defer wg.Wait()
			defer stop()
			o := DeviceOptions{World: w, Listen: "127.0.0.1:0", Listening: func(addr string) {
				s := mutant(w, "")
				s.addr = addr
				wg.Go(func() { s.run(ctx) })
			}}
			return timed(t, o)
		},
		"the strict subject, by --exec, 4 at the same time":  func(t *testing.T) *Report { return timed(t, inProcess(t, "strict")) },
		"the strict subject, by --exec, 16 at the same time": func(t *testing.T) *Report { o := inProcess(t, "strict"); o.Parallel = 16; return timed(t, o) },
		"the device kit, which comes by itself":              func(t *testing.T) *Report { return deviceKit(t, nil) },
	}
	for name, run := range runs {
		t.Run(name, func(t *testing.T) {
			rep := run(t)
			t.Logf("%s: %v in %v", name, rep.Counts(), rep.Ended.Sub(rep.Began).Round(100*time.Millisecond))
			slices.SortFunc(rep.Results, func(a, b Result) int { return int(b.Took - a.Took) })
			for _, r := range rep.Results[:min(25, len(rep.Results))] {
				t.Logf("%-26s %-12s %6d ms %s", r.ID, r.Verdict, r.Took.Milliseconds(), r.Why)
			}
			for _, r := range rep.Results {
				if r.Verdict != Pass {
					t.Logf("%-26s %-12s %s", r.ID, r.Verdict, r.Why)
				}
			}
		})
	}
}

// timed runs every case with the times that the command has by default.
func timed(t *testing.T, o DeviceOptions) *Report {
	t.Helper()
	o.Profile, o.Wait, o.Step, o.Patience, o.Only = MCU, time.Minute, 5*time.Second, 10*time.Second, nil
	rep, err := Device(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

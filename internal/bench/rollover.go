package bench

import (
	"context"
	"fmt"
	"os/exec"
	"time"

	"hawser/internal/fleet"
)

// rollover signs all stored certificate requests again and imports the certificates, with
// the product's own command, on the files of a fleet that no server runs on: one process
// is safe and server at once, and each part is on disk before the next one.
func (r *runner) rollover(ctx context.Context) error {
	if r.Hawser == "" {
		r.say("rollover: left out, it needs the product (--hawser)")
		return nil
	}
	f, err := r.fleet(ctx, "rollover", r.Known)
	if err != nil {
		return err
	}
	r.say("rollover: %d certificates", r.Known)
	cmd := exec.CommandContext(ctx, r.Hawser, "ca", "rollover", "start", "--generation", "--dir", f.dir)
	cmd.Stderr = r.Log
	start := time.Now()
	peak, err := runPeak(cmd)
	if err != nil {
		return fmt.Errorf("ca rollover start: %w", err)
	}
	took := time.Since(start).Seconds()
	l, err := fleet.OpenLayout(f.dir)
	if err != nil {
		return err
	}
	if n := len(l.Trust().DeviceCAs); n != 2 {
		return fmt.Errorf("%d device CAs after the rollover began", n)
	}
	r.report.add(fmt.Sprintf("rollover: sign and import %d CSRs", r.Known), "s", []float64{took}, atMost(60))
	r.report.add("rollover: that per second, durable", "1/s", []float64{float64(r.Known) / took}, atLeast(2000))
	r.report.add("rollover: peak memory of that process", "MiB", []float64{peak / (1 << 20)}, nil)
	return nil
}

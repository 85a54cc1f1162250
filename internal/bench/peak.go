package bench

import (
	"os/exec"
	"time"
)

// runPeak runs cmd and gives the largest resident memory that it had, in bytes: the last
// VmHWM that was seen, which is its own since its exec. The kernel's figure at its end (ru_maxrss) would not do: it counts the memory of
// this process, which the child had for a moment before its exec.
func runPeak(cmd *exec.Cmd) (peak float64, err error) {
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			return peak, err
		case <-tick.C:
			if now, err := memory(cmd.Process.Pid, "VmHWM"); err == nil {
				peak = max(peak, now)
			}
		}
	}
}

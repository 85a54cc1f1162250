package bench

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cpuTime is utime + stime of a process. The kernel counts in ticks of 10 ms.
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // the name may hold anything
	var ticks int64
	for _, i := range []int{11, 12} { // proc(5): fields 14 and 15
		n, err := strconv.ParseInt(f[i], 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil
}

// memory reads one line of /proc/<pid>/status, VmRSS or VmHWM, in bytes.
func memory(pid int, key string) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, key+":"); ok {
			kib, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kib * 1024, err
		}
	}
	return 0, fmt.Errorf("process %d has no %s", pid, key)
}

// settle waits until a process has been idle (less than 3 % of a core) for a
// second: what it still had to do counts as its work.
func settle(pid int, most time.Duration) error {
	deadline := time.Now().Add(most)
	last, err := cpuTime(pid)
	for quiet := 0; err == nil && quiet < 2 && time.Now().Before(deadline); {
		time.Sleep(500 * time.Millisecond)
		var now time.Duration
		now, err = cpuTime(pid)
		if now-last <= 10*time.Millisecond {
			quiet++
		} else {
			quiet = 0
		}
		last = now
	}
	return err
}

// syncLatency gives the times of n fdatasyncs, each after an append of size bytes.
func syncLatency(dir string, n, size int) ([]float64, error) {
	f, err := os.Create(filepath.Join(dir, "probe"))
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	took := make([]float64, n)
	for i := range took {
		if _, err := f.Write(make([]byte, size)); err != nil {
			return nil, err
		}
		start := time.Now()
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return nil, err
		}
		took[i] = time.Since(start).Seconds() * 1e3
	}
	return took, nil
}

// raiseFiles lets this process and its children have as many descriptors as the
// system allows.
func raiseFiles() error {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	l.Cur = l.Max
	return unix.Setrlimit(unix.RLIMIT_NOFILE, &l)
}

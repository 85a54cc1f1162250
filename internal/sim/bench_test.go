package sim_test

import (
	"syscall"
	"testing"
	"time"
)

// BenchmarkEnrol enrols a thousand new devices at a time, server included.
func BenchmarkEnrol(b *testing.B) {
	r := newRig(b)
	n, before := 0, cpuTime(b)
	for b.Loop() {
		n += 1000
		r.enrol(n)
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "devices/s")
	b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/float64(n), "cpu-µs/device")
}

func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

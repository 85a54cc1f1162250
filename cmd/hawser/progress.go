package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"hawser/internal/sim"
)

// progress is one line on standard error: written over on a terminal, else told again
// every few seconds.
type progress struct {
	app  *app
	live bool
	open bool // a line stands on the terminal
}

// every is how often the line is told anew.
func (p *progress) every() time.Duration {
	if p.live {
		return time.Second
	}
	return 5 * time.Second
}

func (p *progress) show(format string, args ...any) {
	text := strings.ReplaceAll(printable(fmt.Sprintf(format, args...)), "\n", " ")
	if !p.live {
		p.app.note("%s", text)
		return
	}
	p.open = true
	fmt.Fprintf(p.app.err, "\r\x1b[2K%s", text)
}

// end leaves the line as it stands.
func (p *progress) end() {
	if p.open {
		p.open = false
		fmt.Fprintln(p.app.err)
	}
}

// follow shows a line now and then until done is closed or ctx ends.
func (p *progress) follow(ctx context.Context, f *sim.Fleet, done <-chan struct{}, line func(sim.Totals) string) {
	tick := time.NewTicker(p.every())
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-done:
			return
		case <-tick.C:
			p.show("%s", line(f.Totals()))
		}
	}
}

// millis is a latency for people.
func millis(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}

// ownCost is this process's resident memory in bytes and its CPU time in seconds. Where
// the system does not tell, it is 0.
func ownCost() (memory uint64, cpu float64) {
	if text, err := os.ReadFile("/proc/self/statm"); err == nil {
		if fields := bytes.Fields(text); len(fields) > 1 {
			pages, _ := strconv.ParseUint(string(fields[1]), 10, 63)
			memory = pages * uint64(os.Getpagesize())
		}
	}
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) == nil {
		cpu = time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
	}
	return memory, cpu
}

package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"hawser/internal/admin"
	"hawser/internal/identity"
	"hawser/internal/sim"
)

// demoTable shows the devices: on a terminal a table that is drawn over, elsewhere plain
// lines.
type demoTable struct {
	app   *app
	fleet *sim.Fleet
	live  bool
	lines int               // of the table that stands on the terminal
	told  map[string]uint64 // without a terminal: messages of each device that were told

	mu      sync.Mutex
	answers map[string]string // guarded by mu: by device, what became of its command
	remarks []string          // guarded by mu: to be printed above the table
}

const tableRows = 20 // devices that are shown one by one

func newDemoTable(a *app, f *sim.Fleet) *demoTable {
	return &demoTable{app: a, fleet: f, live: terminal(a.out), told: map[string]uint64{}, answers: map[string]string{}}
}

// answer notes the outcome of a command. Any goroutine may call it.
func (t *demoTable) answer(id identity.ID, c *admin.Command) {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := c.Name + " " + c.State
	if took := c.Finished.Sub(c.Created); took >= 0 && !c.Finished.IsZero() {
		text += fmt.Sprintf(" in %d ms", took.Milliseconds())
	}
	t.answers[id.String()] = text
}

// remark is something that went wrong. Any goroutine may call it.
func (t *demoTable) remark(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.remarks = append(t.remarks, fmt.Sprintf(format, args...))
}

// follow shows the devices until over is closed or ctx ends.
func (t *demoTable) follow(ctx context.Context, over <-chan struct{}) {
	pace := time.Second
	if t.live {
		pace = 250 * time.Millisecond
	}
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for {
		t.show()
		select {
		case <-ctx.Done():
			return
		case <-over:
			return
		case <-tick.C:
		}
	}
}

// last shows how it ended.
func (t *demoTable) last() { t.show() }

func (t *demoTable) show() {
	t.mu.Lock()
	remarks := t.remarks
	t.remarks = nil
	t.mu.Unlock()
	if t.live {
		t.draw(remarks)
		return
	}
	for _, r := range remarks {
		t.app.note("%s", printable(r))
	}
	t.tell()
}

// cells is one row.
func (t *demoTable) cells(v sim.View) []string {
	t.mu.Lock()
	command := t.answers[v.ID]
	t.mu.Unlock()
	if command == "" {
		command = v.Command
	}
	row := []string{v.ID, demoFirmware, fmt.Sprint(v.Acked), "-", "-", command}
	if v.Acked > 0 {
		row[3], row[4] = fmt.Sprintf("%.2f °C", v.Value), millis(v.Latency)
	}
	if !v.Online {
		row[5] = "offline"
	}
	return row
}

// draw writes the table over the one before.
func (t *demoTable) draw(remarks []string) {
	var b strings.Builder
	if t.lines > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", t.lines)
	}
	line := func(format string, args ...any) { fmt.Fprintf(&b, "\x1b[2K"+format+"\n", args...) }
	for _, r := range remarks {
		line("%s", strings.ReplaceAll(printable(r), "\n", " "))
	}
	const columns = "%-8s  %-9s  %12s  %10s  %8s  %s"
	line(columns, "ID", "FIRMWARE", "ACKNOWLEDGED", "VALUE", "PUBACK", "COMMAND")
	units := t.fleet.Units()
	for _, u := range units[:min(len(units), tableRows)] {
		c := t.cells(u.View())
		line(columns, c[0], c[1], c[2], c[3], c[4], c[5])
	}
	sum := t.fleet.Totals()
	line("%d of %d devices online, %d messages acknowledged, PUBACK p50 %s; Ctrl-C stops", sum.Online, sum.Devices, sum.Acked, millis(sum.Median))
	t.lines = min(len(units), tableRows) + 2
	fmt.Fprint(t.app.out, b.String())
}

// tell prints a line for each device that has something new to say, or one for all
// where there are many.
func (t *demoTable) tell() {
	units := t.fleet.Units()
	if len(units) > tableRows {
		sum := t.fleet.Totals()
		t.app.say("%d of %d devices online, %d messages acknowledged, PUBACK p50 %s", sum.Online, sum.Devices, sum.Acked, millis(sum.Median))
		return
	}
	for _, u := range units {
		v := u.View()
		if v.Acked == t.told[v.ID] {
			continue
		}
		t.told[v.ID] = v.Acked
		c := t.cells(v)
		t.app.say("%s", strings.TrimRight(fmt.Sprintf("%s  %s acknowledged  %s  PUBACK %s  %s", c[0], c[2], c[3], c[4], c[5]), " "))
	}
}

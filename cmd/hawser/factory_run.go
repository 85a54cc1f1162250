package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"hawser/internal/factory/bench"
)

// runOrder is what run is told.
type runOrder struct {
	dir   string
	count int
	again bool
	pass  passphrases
}

func (a *app) factoryRun() *cobra.Command {
	var o runOrder
	cmd := &cobra.Command{
		Use:   "run",
		Short: "turn blank units into devices, one after the other",
		Long: `run waits until a unit answers on the probe and gives it an identity: it takes the next
id, makes a key in a process of its own, certifies it with the station's key, writes
identity block, certificate and anchor set, reads all back, restarts the unit and locks it
where the bench says so. Then it writes the journal and says PASS. It goes on with the next
unit when that one is gone, or another answers, or enter is pressed. With an exec: probe,
which cannot look, each unit after the first waits for enter.

A unit that fails burns its id; the journal tells why. After three that failed at the same
point, and when the ids are used up or expired, it stops. After a loss of power the id that
was being used is burnt at the next start, and the unit is done again.

A unit that has an identity already is left alone, unless the bench has burnt it or --again
is given. It ends with 1 if a unit failed. Interrupt ends it.`,
		Example: `  hawser factory run --dir bench
  hawser factory run --dir bench --count 20 --json
  hawser factory run --dir bench --passphrase-fd 3 3<passphrase`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.count < 0 {
				return usagef(cmd, "--count %d is below 0", o.count)
			}
			return a.runBench(cmd.Context(), &o)
		},
	}
	benchDir(cmd, &o.dir)
	cmd.Flags().IntVar(&o.count, "count", 0, "stop after this many units, passed or failed (default: no end)")
	cmd.Flags().BoolVar(&o.again, "again", false, "give units that have an identity a new one")
	o.pass.flag(cmd)
	return a.withJSON(cmd)
}

func (a *app) runBench(ctx context.Context, o *runOrder) error {
	b, err := a.openBench(o.dir, &o.pass)
	if err != nil {
		return err
	}
	p := a.waiting()
	r := &bench.Runner{Bench: b, Count: o.count, Again: o.again, Wait: p.wait}
	if r.Child, err = childCommand(); err != nil {
		return errors.Join(err, b.Close())
	}
	if !a.json && terminal(os.Stdin) || strings.HasPrefix(b.Settings.Probe, "exec:") {
		r.Next = presses()
	}
	r.Unit = func(u *bench.Result) {
		p.end()
		a.sayUnit(b, u)
	}
	failed, err := r.Run(ctx)
	p.end()
	if err := errors.Join(err, b.Close()); err != nil {
		return err
	}
	if failed > 0 {
		return exit(1)
	}
	return nil
}

// presses tells of each line on standard input; it is closed at its end.
func presses() <-chan struct{} {
	out := make(chan struct{})
	go func() {
		defer close(out)
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			out <- struct{}{}
		}
	}()
	return out
}

// benchWait shows what the bench waits for.
type benchWait struct{ progress }

func (a *app) waiting() *benchWait {
	return &benchWait{progress{app: a, live: terminal(a.err) && !a.json}}
}

func (w *benchWait) wait(text string) { w.show("waiting for a unit: %s", text) }

// unitLine is what run says of each unit with --json.
type unitLine struct {
	Result      string    `json:"result"` // pass, fail, or burnt: what a run that was cut off left
	ID          string    `json:"id"`
	Stage       string    `json:"stage,omitempty"`
	Reason      string    `json:"reason,omitempty"`
	Class       string    `json:"class,omitempty"`
	Hardware    uint32    `json:"hardware,omitempty"`
	Block       string    `json:"block,omitempty"`
	Certificate string    `json:"certificate,omitempty"`
	Key         string    `json:"key,omitempty"`
	ReadBack    bool      `json:"read_back"`
	Locked      bool      `json:"locked"`
	Made        int       `json:"made"`
	Of          int       `json:"of"`
	Left        int       `json:"left"`
	Time        time.Time `json:"time"`
}

func (a *app) sayUnit(b *bench.Bench, u *bench.Result) {
	if a.json {
		_ = a.emit(lineOf(b, u)) // a reader that is gone must not stop a unit's record
		return
	}
	word := "FAIL"
	if u.Pass {
		word = "PASS"
	}
	a.big(word)
	counts := fmt.Sprintf("%d of %d, %d ids left", u.Count.Made, u.Count.Of, u.Count.Left)
	if u.Pass {
		a.say("PASS %s  %s%s", u.ID, counts, asides(u))
		return
	}
	reason, hint, _ := strings.Cut(u.Reason, "\n")
	a.say("FAIL %s  %s: %s; the id is burnt  %s", u.ID, u.Stage, printable(reason), counts)
	if hint != "" {
		fmt.Fprintln(a.err, printable(hint))
	}
}

// asides is what a PASS does not say by itself.
func asides(u *bench.Result) string {
	text := ""
	if !u.ReadBack {
		text = ", not read back: this probe cannot"
	}
	if u.Locked {
		text += ", locked"
	}
	return text
}

func lineOf(b *bench.Bench, u *bench.Result) unitLine {
	l := unitLine{Result: "pass", ID: u.ID.String(), Stage: u.Stage, Class: b.Settings.Class, Hardware: b.Settings.Hardware,
		Block: u.Block.String(), Certificate: u.Certificate, Key: u.Key, ReadBack: u.ReadBack, Locked: u.Locked,
		Made: u.Count.Made, Of: u.Count.Of, Left: u.Count.Left, Time: u.Time.UTC()}
	if !u.Pass {
		l.Result, l.Reason = "fail", strings.ReplaceAll(u.Reason, "\n", "; ")
	}
	return l
}

// The letters of PASS and FAIL; # is a block, and three of them make a column as wide as
// it is high.
func letters() map[rune][7]string {
	return map[rune][7]string{
		'P': {"####.", "#...#", "#...#", "####.", "#....", "#....", "#...."},
		'A': {".###.", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"},
		'S': {".####", "#....", "#....", ".###.", "....#", "....#", "####."},
		'F': {"#####", "#....", "#....", "####.", "#....", "#....", "#...."},
		'I': {"#####", "..#..", "..#..", "..#..", "..#..", "..#..", "#####"},
		'L': {"#....", "#....", "#....", "#....", "#....", "#....", "#####"},
	}
}

// big writes PASS or FAIL over the width of a terminal, to be read from two metres. On
// anything else the line that follows says it.
func (a *app) big(word string) {
	width, _, err := term.GetSize(int(a.out.Fd()))
	if err != nil || !terminal(a.out) {
		return
	}
	scale := min(width/(6*len(word)), 3)
	if scale < 1 {
		return
	}
	color, plain := "\x1b[1;32m", "\x1b[0m"
	if word == "FAIL" {
		color = "\x1b[1;31m"
	}
	if os.Getenv("NO_COLOR") != "" {
		color, plain = "", ""
	}
	fmt.Fprint(a.out, "\n", color, bigText(word, scale), plain, "\n")
}

func bigText(word string, scale int) string {
	var b strings.Builder
	all := letters()
	for row := range 7 {
		for _, l := range word {
			for _, c := range all[l][row] + "." {
				b.WriteString(strings.Repeat(map[rune]string{'#': "█", '.': " "}[c], scale))
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}

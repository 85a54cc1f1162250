// Package bench measures Hawser, and mosquitto where it is installed, side by
// side: the same machine, the same certificates, the same load generator, in
// turns within one run.
//
// It promises that a figure of a server's CPU or memory is the kernel's figure
// for that server's own process (/proc/<pid>/stat and status): the server is a
// child, the load comes from this process. A row that was measured more than
// once shows the median. What has no peer or no goal is null, and nothing that
// failed to be measured is left out silently: it ends the run.
//
// The clients speak MQTT 3.1.1 (5.0 where a session must outlive its
// connection) over TLS 1.3 with P-256 as the only key share, P-256 client
// certificates and AES-128-GCM, each PUBLISH in a TLS record of its own.
package bench

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/term"
)

// Options say what to measure. Zero values are not defaults: see Full and Quick.
type Options struct {
	Cache   string // directory for certificates and the history, kept between runs
	Hawser  string // path of the product binary; "" runs the parts in Self's child
	Self    string // path of this binary, for its children
	Profile string // directory for CPU and heap profiles; "" takes none
	Only    string // one section's name; "" means all
	Out     io.Writer
	Log     io.Writer // what the servers say

	Clients     int           // that connect and idle
	Publishers  int           // of them publish
	Window      int           // unacknowledged publishes of one publisher
	Payload     int           // bytes
	Rounds      int           // of each row that is repeated
	Flat        time.Duration // of one flat-out measurement
	Steady      time.Duration // of one measurement at SteadyRate
	SteadyRate  int           // publishes per second
	Lone        int           // publishes of the lone client
	Returning   int           // persistent sessions that come back
	Known       int           // devices in the registry meanwhile
	History     int           // records
	Writers     int           // devices that wrote them
	Tail        int           // records read back
	HostileTime time.Duration // with, and without, the hostile device
	Small       bool          // the goals do not apply
}

// Full is what the goals are about.
func Full() Options {
	return Options{
		Clients: 4000, Publishers: 100, Window: 10, Payload: 100, Rounds: 3, Flat: 5 * time.Second,
		Steady: 5 * time.Second, SteadyRate: 5000, Lone: 1000, Returning: 5000, Known: 100_000,
		History: 10_000_000, Writers: 1000, Tail: 1000, HostileTime: 5 * time.Second,
	}
}

// Quick is a fiftieth of it: it shows that the bench works, not how fast Hawser is.
func Quick() Options {
	o := Full()
	o.Clients, o.Rounds, o.Flat, o.Steady, o.SteadyRate = 100, 1, time.Second, time.Second, 1000
	o.Lone, o.Returning, o.Known, o.History, o.HostileTime = 50, 100, 2000, 200_000, 2*time.Second
	o.Tail, o.Small = 100, true
	return o
}

// Run measures everything and gives the table.
func Run(ctx context.Context, o Options) (*Report, error) {
	if err := raiseFiles(); err != nil {
		return nil, err
	}
	dir := filepath.Join(o.Cache, "run")
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	r := &runner{Options: o, dir: dir, report: &Report{small: o.Small}}
	r.mosquitto, _ = exec.LookPath("mosquitto")
	for _, s := range []struct {
		name string
		run  func(context.Context) error
	}{{"load", r.load}, {"sessions", r.sessions}, {"history", r.history}, {"hostile", r.hostile}, {"rollover", r.rollover}, {"journal", r.journal}} {
		if o.Only != "" && o.Only != s.name {
			continue
		}
		if err := s.run(ctx); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return r.report, nil
}

// runner is one run.
type runner struct {
	Options
	dir       string // emptied at the end
	mosquitto string // path, "" when it is not installed
	report    *Report
}

// isTerminal reports whether a progress bar makes sense.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

func (r *runner) say(format string, args ...any) { fmt.Fprintf(r.Out, format+"\n", args...) }

// servers starts Hawser and, where it is installed, mosquitto on one fleet.
func (r *runner) servers(ctx context.Context, f *fleetFiles, raised bool) ([]*server, error) {
	h, err := r.startHawser(ctx, f, raised)
	if err != nil {
		return nil, err
	}
	if r.mosquitto == "" {
		return []*server{h}, nil
	}
	m, err := r.startMosquitto(ctx, f)
	if err != nil {
		h.stop()
		return nil, err
	}
	return []*server{h, m}, nil
}

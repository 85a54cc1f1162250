package check

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"hawser/internal/check/tls13"
	"hawser/internal/mqtt"
)

// Profile says what a client is held against.
type Profile string

// The profiles: of a microcontroller that speaks TLS 1.3 with one suite and P-256 and
// nothing else, and of a client that may do more.
const (
	MCU     Profile = "mcu"
	General Profile = "general"
)

// DeviceOptions say how a device is reached and what is known of it.
type DeviceOptions struct {
	World    *World
	Listen   string // where it connects to by itself; "" with Exec
	Exec     string // command that starts it once; placeholders {host} {port} {cafile} {cert} {key}
	Reset    string // command that makes it connect again; may be ""
	Host     string // {host}
	Dir      string // of the world's files, for the placeholders
	Wait     time.Duration
	Step     time.Duration // what one step may take
	Patience time.Duration // how long silence lasts where silence is the provocation
	Profile  Profile
	NoClock  bool
	Features []string // nil: what the honest connections show
	Parallel int      // cases at the same time; only with Exec
	Only     []string // ids or groups; nil: all

	// Listening is told where the device has to connect to. May be nil.
	Listening func(addr string)

	// Told is called after each case, from several goroutines one after the other.
	Told func(done, all int, r *Result)
}

// Device runs the cases against a device. The honest ones come first; if it does not
// pass them, the others are not judged.
func Device(ctx context.Context, o DeviceOptions) (*Report, error) {
	all, honest := DeviceCases(), honestCases()
	if o.World.upstream != "" {
		all = FieldCases()
		honest = all[:2]
	}
	cases, err := Find(all, o.Only)
	if err != nil {
		return nil, err
	}
	cases = slices.Concat(honest, slices.DeleteFunc(slices.Clone(cases), func(c Case) bool { return c.kind == probeOnly }))
	src, err := newSource(&o)
	if err != nil {
		return nil, err
	}
	defer src.close()
	if o.Listening != nil && src.listen != nil {
		o.Listening(src.listen.Addr().String())
	}
	r := &run{o: &o, src: src, all: len(cases), report: &Report{Kind: "device", Target: src.target(), Profile: string(o.Profile), Upstream: o.World.upstream, Began: time.Now()}}
	ok := true
	for i := range honest {
		res := r.one(ctx, &cases[i])
		ok = ok && res.Verdict == Pass
	}
	if o.Features == nil {
		o.Features = r.learnt
	}
	r.rest(ctx, cases[len(honest):], ok)
	r.report.Ended = time.Now()
	return r.report, ctx.Err()
}

// run is one walk through the cases.
type run struct {
	o      *DeviceOptions
	src    *source
	all    int
	learnt []string // features that the honest cases have shown

	mu     sync.Mutex
	report *Report // results guarded by mu
}

func (r *run) rest(ctx context.Context, cases []Case, ok bool) {
	results := make([]*Result, len(cases))
	slots := make(chan struct{}, max(1, r.o.Parallel))
	var wg sync.WaitGroup
	for i := range cases {
		if !ok {
			results[i] = r.unjudged(&cases[i])
			continue
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			results[i] = r.one(ctx, &cases[i])
		})
	}
	wg.Wait()
	order := map[string]int{}
	for i := range cases {
		order[cases[i].ID] = i + 1
	}
	slices.SortStableFunc(r.report.Results, func(a, b Result) int { return order[a.ID] - order[b.ID] })
}

func (r *run) unjudged(c *Case) *Result {
	res := blank(c)
	res.Verdict, res.Why = Inconclusive, "not tried: the device does not pass the honest cases"
	r.tell(res)
	return res
}

func blank(c *Case) *Result {
	return &Result{ID: c.ID, Does: c.Does, Expect: c.Expect, Clause: c.Clause, Began: time.Now()}
}

func (r *run) tell(res *Result) {
	r.mu.Lock()
	defer r.mu.Unlock()
	res.Took = time.Since(res.Began)
	r.report.Results = append(r.report.Results, *res)
	if r.o.Told != nil {
		r.o.Told(len(r.report.Results), r.all, res)
	}
}

// one plays one case and tells of it.
func (r *run) one(ctx context.Context, c *Case) *Result {
	res := blank(c)
	defer r.tell(res)
	if lacking := r.lacks(c); lacking != "" && c.kind != probeOnly {
		res.Verdict, res.Why = NotApplicable, "it does not do what this needs: "+lacking
		return res
	}
	if c.ID == "X6.expired" || c.ID == "X6.not-yet" {
		res.Expect += "; without a clock: warn"
	}
	r.play(ctx, c, res)
	if c.kind != probeOnly && c.kind != accept && res.Verdict != NotApplicable && res.Evidence.Connected {
		r.recover(ctx, res)
	}
	return res
}

func (r *run) lacks(c *Case) string {
	for _, f := range strings.Fields(c.Needs) {
		if !slices.Contains(r.o.Features, f) {
			return f
		}
	}
	return ""
}

func (r *run) play(ctx context.Context, c *Case, res *Result) {
	a, err := r.src.begin(ctx)
	if err != nil {
		res.Verdict, res.Why = Inconclusive, err.Error()
		return
	}
	defer func() { res.Evidence.Output = a.end() }()
	s, err := r.stage(ctx, a)
	if err != nil {
		res.Verdict, res.Why = Inconclusive, "it never connected: "+err.Error()
		return
	}
	defer s.Raw.Close()
	s.until(r.o.Step)
	err = c.play(s)
	var skip *notApplicable
	if errors.As(err, &skip) {
		res.Verdict, res.Why, res.Evidence = NotApplicable, skip.why, s.evidence()
		return
	}
	if s.verdict == "" && !decided(c, s) {
		s.Drain(r.drainFor(c))
	}
	res.Verdict, res.Why = judge(c, s, r.o)
	res.Evidence = s.evidence()
	if s.gave() && res.Verdict != Fail {
		if sig := a.crashed(); sig != "" {
			res.Verdict, res.Why = Fail, "it crashed: "+sig
		}
	}
	if c.kind == probeOnly {
		r.learn(s)
	}
}

// decided reports whether nothing that is still to come can change the verdict.
func decided(c *Case, s *stage) bool {
	switch c.kind {
	case reject, rejectMCU, rejectDated:
		return s.leaked() != "" || s.took
	case accept:
		return s.connect != nil
	}
	return false
}

// drainFor is how long the end of a connection is waited for.
func (r *run) drainFor(c *Case) time.Duration {
	if c.kind == silence {
		return r.o.Patience
	}
	return r.o.Step
}

func (r *run) learn(s *stage) {
	for _, f := range s.features {
		if !slices.Contains(r.learnt, f) {
			r.learnt = append(r.learnt, f)
		}
	}
}

// stage waits for the client's next connection of an attempt.
func (r *run) stage(ctx context.Context, a *attempt) (*stage, error) {
	raw, err := a.accept(ctx)
	if err != nil {
		return nil, err
	}
	s := &stage{Conn: &tls13.Conn{Raw: raw}, w: r.o.World, limit: r.o.Step, patience: r.o.Patience, ctx: ctx, features: r.o.Features, noClock: r.o.NoClock, profile: r.o.Profile}
	s.again = func(ctx context.Context) (*stage, error) {
		next, err := r.stage(ctx, a)
		if err == nil {
			next.until(r.o.Step)
		}
		return next, err
	}
	return s, nil
}

// recover sees that the honest broker is reached after a hostile one.
func (r *run) recover(ctx context.Context, res *Result) {
	ok := false
	defer func() { res.Recovers = &ok }()
	a, err := r.src.begin(ctx)
	if err == nil {
		defer a.end()
		for range 3 { // a client may have begun a connection to the false broker again
			s, e := r.stage(ctx, a)
			if err = e; err != nil {
				break
			}
			s.until(r.o.Step)
			err = s.honest()
			ok = s.connect != nil || s.relayed
			if s.connect != nil {
				_ = s.attend(r.o.Step/20, func(mqtt.Header) bool { return true }) // it is let in, no more is looked at
			}
			s.Raw.Close()
			if ok {
				return
			}
		}
	}
	if res.Verdict == Pass || res.Verdict == Warn {
		res.Verdict = Fail
		res.Why = fmt.Sprintf("%s, but it did not come back to the honest broker afterwards: %v", res.Why, err)
	}
}

// notApplicable is what a case ends with that says nothing about this client.
type notApplicable struct{ why string }

func (e *notApplicable) Error() string { return e.why }

func skipf(format string, args ...any) error { return &notApplicable{fmt.Sprintf(format, args...)} }

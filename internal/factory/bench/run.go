package bench

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"hawser/internal/factory/keyroom"
)

// tooMany is how many units may fail in a row in the same stage before the bench asks for
// a person.
const tooMany = 3

// Runner is one run of the bench.
type Runner struct {
	Bench *Bench
	Child []string          // the program that calls keyroom.Main, with its arguments
	Count int               // units to do, 0 for no end
	Again bool              // units that have an identity are given a new one
	Next  <-chan struct{}   // somebody says that the next unit is on the probe; may be nil
	Wait  func(text string) // is told what is waited for
	Unit  func(*Result)     // is told of each unit, after its record is on disk
}

// errNext reports that somebody said that the next unit is there.
var errNext = errors.New("the next unit is there")

// Run does units until there were Count, ctx ends, there is no id left, or too many failed in
// the same way. failed is how many did not pass.
func (r *Runner) Run(ctx context.Context) (failed int, err error) {
	var last *keyroom.Sight
	inRow, stage := 0, ""
	for n := 0; r.Count == 0 || n < r.Count; n++ {
		res, seen, err := r.one(ctx, last)
		if err != nil || res == nil {
			return failed, err
		}
		r.Unit(res)
		last = seen
		if res.Pass {
			inRow = 0
			continue
		}
		failed++
		if inRow++; res.Stage != stage {
			inRow = 1
		}
		if stage = res.Stage; inRow == tooMany {
			return failed, fmt.Errorf("%w: %d units in a row failed at the same point, %s\nhint: is the probe in order? then start again", ErrStop, tooMany, stage)
		}
	}
	return failed, nil
}

// one waits for a unit and does it; no result means that ctx ended before there was one.
func (r *Runner) one(ctx context.Context, last *keyroom.Sight) (*Result, *keyroom.Sight, error) {
	if _, _, err := r.Bench.next(time.Now()); err != nil {
		return nil, nil, err
	}
	if last != nil && last.Blind && !r.said(ctx) {
		return nil, nil, nil
	}
	for {
		child, found, err := r.find(ctx, last)
		switch {
		case err == nil:
			res, seen, err := r.Bench.unit(ctx, child)
			if found.Blind {
				seen = found
			}
			child.Close()
			return res, seen, err
		case errors.Is(err, errNext):
			last = nil
		case ctx.Err() != nil:
			return nil, nil, nil
		default:
			return nil, nil, err
		}
	}
}

// said waits for the word that the next unit is there.
func (r *Runner) said(ctx context.Context) bool {
	r.Wait("put the next unit on the probe, and press enter")
	select {
	case _, ok := <-r.Next:
		return ok
	case <-ctx.Done():
		return false
	}
}

// find starts the process for a key and lets it wait for a unit that may be written. The
// word that the next unit is there ends the waiting (errNext): then what is on the probe is
// not compared with the last unit.
func (r *Runner) find(ctx context.Context, last *keyroom.Sight) (*keyroom.Child, *keyroom.Sight, error) {
	child, err := keyroom.Start(ctx, r.Child...)
	if err != nil {
		return nil, nil, err
	}
	child.Notice = r.Wait
	var first sync.Once // found or told, whichever comes first
	found := make(chan struct{})
	go func() {
		select {
		case _, ok := <-r.Next:
			if ok {
				first.Do(func() { child.Stop(errNext) })
			}
		case <-found:
		}
	}()
	seen, err := r.acceptable(child, last)
	close(found)
	told := true
	first.Do(func() { told = false })
	if err == nil && told {
		err = errNext
	}
	if err != nil {
		child.Close()
	}
	return child, seen, err
}

// acceptable waits until a unit is there that may be written: one without an identity, or
// with one that this bench has burnt.
func (r *Runner) acceptable(child *keyroom.Child, last *keyroom.Sight) (*keyroom.Sight, error) {
	for {
		seen, err := child.Wait(r.Bench.Settings.Probe, last)
		if err != nil {
			return nil, err
		}
		id, has := seen.ID()
		if !has || r.Again || r.Bench.past.burnt[id] {
			return seen, nil
		}
		r.Wait(fmt.Sprintf("the unit on the probe is %s already: take it off (or start with --again)", id))
		last = seen
	}
}

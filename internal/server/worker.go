package server

import (
	"context"
	"sync"
)

// worker runs jobs one after the other, in the order in which they were given,
// on one goroutine of its own. It stands between those who must not wait (the
// registry's writer, the log's committer, connections) and those who do.
type worker struct {
	wake chan struct{} // one slot
	done chan struct{} // closed when it has ended

	mu     sync.Mutex
	jobs   []func() // mu
	closed bool     // mu
}

func newWorker() *worker {
	w := &worker{wake: make(chan struct{}, 1), done: make(chan struct{})}
	go w.run()
	return w
}

// do hands a job over. It never blocks. After close the job is dropped.
func (w *worker) do(job func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return
	}
	w.jobs = append(w.jobs, job)
	w.poke()
}

func (w *worker) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *worker) run() {
	defer close(w.done)
	for {
		w.mu.Lock()
		jobs, closed := w.jobs, w.closed
		w.jobs = nil
		w.mu.Unlock()
		for _, job := range jobs {
			job()
		}
		if len(jobs) > 0 {
			continue
		}
		if closed {
			return
		}
		<-w.wake
	}
}

// sync waits until everything handed over before is done.
func (w *worker) sync(ctx context.Context) error {
	mark := make(chan struct{})
	w.do(func() { close(mark) })
	select {
	case <-mark:
		return nil
	case <-w.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// close does what was handed over and ends.
func (w *worker) close() {
	w.mu.Lock()
	w.closed = true
	w.poke()
	w.mu.Unlock()
	<-w.done
}

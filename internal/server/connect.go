package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"hawser/internal/admin"
	"hawser/internal/durable"
	"hawser/internal/fleet"
	"hawser/internal/registry"
)

// How long the commands, and a server that starts, wait for a process that holds
// the fleet for a moment.
const (
	connectWait = 10 * time.Second
	serveWait   = 2 * time.Second
	lockPoll    = 20 * time.Millisecond
)

func lockPath(l *fleet.Layout) string { return filepath.Join(l.ServerDir(), "lock") }

// lockForServe takes the fleet for a server. A command that works on the files
// is waited for, another server is not.
func lockForServe(ctx context.Context, l *fleet.Layout) (*durable.FileLock, error) {
	for start := time.Now(); ; {
		lock, err := durable.Lock(lockPath(l))
		if !errors.Is(err, durable.ErrLocked) {
			return lock, err
		}
		conn, dialErr := net.Dial("unix", l.AdminSocket())
		if dialErr == nil {
			conn.Close()
		}
		if dialErr == nil || time.Since(start) > serveWait {
			return nil, fmt.Errorf("another hawser works on %s\nhint: stop it first; hawser status --dir %s asks it", l.Dir, l.Dir)
		}
		if err := pause(ctx, lockPoll); err != nil {
			return nil, err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Connect gives a client of the fleet in dir: of the server that runs on it, or
// of this process, which then holds the files until closeIt.
func Connect(ctx context.Context, dir string) (c *admin.Client, closeIt func() error, err error) {
	l, err := fleet.OpenLayout(dir)
	if err != nil {
		return nil, nil, err
	}
	dial := func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", l.AdminSocket())
	}
	for start := time.Now(); ; {
		if conn, err := dial(ctx); err == nil {
			conn.Close()
			c := admin.NewClient(dial, true)
			return c, func() error { c.Close(); return nil }, nil
		}
		lock, err := durable.Lock(lockPath(l))
		switch {
		case err == nil:
			return offline(ctx, l, lock)
		case !errors.Is(err, durable.ErrLocked):
			return nil, nil, err
		case time.Since(start) > connectWait:
			return nil, nil, fmt.Errorf("a server works on %s but does not answer on %s\nhint: it may still be starting; look at its log", l.Dir, l.AdminSocket())
		}
		if err := pause(ctx, lockPoll); err != nil {
			return nil, nil, err
		}
	}
}

// offline serves the API to this process alone, from the files.
func offline(ctx context.Context, l *fleet.Layout, lock *durable.FileLock) (*admin.Client, func() error, error) {
	r, err := openRegistry(ctx, l, registry.Options{})
	if err != nil {
		return nil, nil, errors.Join(err, lock.Close())
	}
	b := newBackend(l, r, nil)
	pipe := newPipeListener()
	h := &http.Server{Handler: b.handler()}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = h.Serve(pipe) // ends with ErrServerClosed, which is no news
	}()
	c := admin.NewClient(pipe.dial, false)
	return c, func() error {
		c.Close()
		err := h.Close()
		<-ended
		return errors.Join(err, b.close(), r.Close(), lock.Close())
	}, nil
}

// pipeListener connects this process to itself without a socket.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (p *pipeListener) dial(ctx context.Context) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case p.conns <- theirs:
		return ours, nil
	case <-p.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept implements net.Listener.
func (p *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (p *pipeListener) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

// Addr implements net.Listener.
func (p *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "this process", Net: "unix"} }

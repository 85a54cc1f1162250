package check

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"hawser/internal/check/tls13"
)

// link is a client and the real broker, joined byte by byte. All that can be seen of TLS
// 1.3 from between them is the ClientHello, and the kind and length of each record.
type link struct {
	client, broker net.Conn

	mu       sync.Mutex
	head     []byte        // the first that the client sent; guarded by mu, as all below
	sent     int           // bytes of the client
	got      int           // bytes of the broker
	went     bool          // the client sent more under keys than an alert
	answered bool          // and the broker said something to it
	by       string        // who ended it; "" nobody
	reached  chan struct{} // closed with answered
}

const (
	headSize = 16 << 10
	alertLen = 2 + 1 + 16 // ciphertext of an alert without padding (RFC 9846 5.2)
)

// join passes bytes both ways until both ends have ended it, d is over, or so long after
// the broker has answered.
func (l *link) join(ctx context.Context, d, after time.Duration) {
	defer l.broker.Close()
	for _, c := range []net.Conn{l.client, l.broker} {
		c.SetDeadline(time.Now().Add(d)) // fails on a closed connection only, and so will the next read
	}
	both := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { l.pass(l.broker, l.client, "the client", l.up) })
	wg.Go(func() { l.pass(l.client, l.broker, "the broker", l.down) })
	go func() { wg.Wait(); close(both) }()
	reached := l.reached
	if after < 0 {
		reached = nil
	}
	select {
	case <-both:
	case <-ctx.Done():
	case <-reached:
		select {
		case <-both:
		case <-time.After(after):
		}
	}
	for _, c := range []net.Conn{l.client, l.broker} {
		c.SetDeadline(time.Unix(1, 0))
	}
	<-both
}

// pass copies one direction and hands each record's kind and length to seen.
func (l *link) pass(to, from net.Conn, who string, seen func(p []byte, r *records)) {
	var r records
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			l.mu.Lock()
			seen(buf[:n], &r)
			l.mu.Unlock()
			if _, e := to.Write(buf[:n]); e != nil && err == nil {
				err = e
			}
		}
		if err != nil {
			l.end(to, who, err)
			return
		}
	}
}

// end hands the end of one direction on.
func (l *link) end(to net.Conn, who string, err error) {
	l.mu.Lock()
	if l.by == "" && !errors.Is(err, os.ErrDeadlineExceeded) {
		l.by = who
	}
	l.mu.Unlock()
	t, ok := to.(*net.TCPConn)
	if ok && errors.Is(err, io.EOF) {
		t.CloseWrite() // the other end may be gone, which its own direction finds out
		return
	}
	to.SetDeadline(time.Unix(1, 0))
}

func (l *link) up(p []byte, r *records) {
	l.sent += len(p)
	l.head = append(l.head, p[:min(len(p), headSize-len(l.head))]...)
	r.feed(p, func(kind byte, n int) {
		l.went = l.went || kind == tls13.TypeData && n > alertLen
	})
}

func (l *link) down(p []byte, r *records) {
	l.got += len(p)
	r.feed(p, func(kind byte, n int) {
		if l.went && !l.answered && kind == tls13.TypeData && n != alertLen {
			l.answered = true
			close(l.reached)
		}
	})
}

// hello is the client's, as it passed.
func (l *link) hello() (*tls13.Hello, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.head) < 5 || l.head[0] != tls13.TypeHandshake {
		return nil, errors.New("it sent no ClientHello")
	}
	n := 5 + int(l.head[3])<<8 + int(l.head[4])
	return tls13.ParseHello(l.head[5:min(n, len(l.head))])
}

// String implements fmt.Stringer.
func (l *link) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	by := l.by
	if by == "" {
		by = "the check"
	}
	return fmt.Sprintf("relayed %d bytes up and %d down; ended by %s", l.sent, l.got, by)
}

// records follows the record headers of one direction (RFC 9846 5.1).
type records struct {
	head []byte // of a header that has not come whole
	left int    // of the record that is passing
}

func (r *records) feed(p []byte, each func(kind byte, n int)) {
	for len(p) > 0 {
		if r.left > 0 {
			n := min(r.left, len(p))
			p, r.left = p[n:], r.left-n
			continue
		}
		n := min(5-len(r.head), len(p))
		r.head, p = append(r.head, p[:n]...), p[n:]
		if len(r.head) == 5 {
			r.left = int(r.head[3])<<8 + int(r.head[4])
			each(r.head[0], r.left)
			r.head = r.head[:0]
		}
	}
}

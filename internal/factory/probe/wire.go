package probe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
)

// wire is one connection to a debug server: a packet goes out, its answer comes back.
type wire struct {
	conn    net.Conn
	enc     encoder
	dec     decoder
	raw     []byte // what one read call brought
	unread  []byte // the part of raw that no packet has taken yet
	noAck   bool
	limit   int // data bytes that the server takes in a packet
	timeout time.Duration
	console []byte // what the server's console said during the last command, bounded
}

const (
	// leastPacket is the smallest packet size with which anything can be done.
	leastPacket = 64
	// maxConsole bounds what is kept of a console's words.
	maxConsole = 256
	// maxResend is how often a packet is sent again that the other side got damaged.
	maxResend = 3
)

// connect opens a connection. buf is divided: half for the packet that goes out, a quarter
// each for what comes in and for the packet decoded from it.
func connect(ctx context.Context, addr netip.AddrPort, buf []byte, timeout time.Duration) (*wire, error) {
	if !addr.Addr().IsLoopback() {
		return nil, errors.New("the debug server is not on this machine")
	}
	conn, err := (&net.Dialer{Timeout: timeout}).DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrGone, brief(err))
	}
	half, quarter := len(buf)/2, len(buf)/4
	return &wire{
		conn:    conn,
		enc:     encoder{out: buf[:half:half]},
		raw:     buf[half : half+quarter : half+quarter],
		dec:     decoder{out: buf[half+quarter:]},
		timeout: timeout,
		limit:   400, // what GDB takes when a server does not say
	}, nil
}

// brief is a network error without the addresses, which the caller names.
func brief(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// watch lets the end of ctx interrupt whatever waits on the connection. The function that it
// gives ends that.
func (w *wire) watch(ctx context.Context) (stop func() bool) {
	return context.AfterFunc(ctx, func() { w.conn.SetDeadline(time.Unix(1, 0)) })
}

// command sends text as one packet and gives the answer, which is valid until the next.
func (w *wire) command(ctx context.Context, timeout time.Duration, text string) ([]byte, error) {
	w.enc.begin(text)
	return w.ask(ctx, timeout)
}

// ask sends the packet that enc holds and gives the answer.
func (w *wire) ask(ctx context.Context, timeout time.Duration) ([]byte, error) {
	if err := w.send(ctx, timeout); err != nil {
		return nil, err
	}
	return w.answer(ctx, isStop)
}

func (w *wire) send(ctx context.Context, timeout time.Duration) error {
	w.console = w.console[:0]
	if err := w.deadline(ctx, timeout); err != nil {
		return err
	}
	return w.put(ctx, w.enc.end())
}

func (w *wire) deadline(ctx context.Context, timeout time.Duration) error {
	w.conn.SetDeadline(time.Now().Add(timeout))
	return ctx.Err() // after the deadline: else a cancel between the two would be lost
}

func (w *wire) put(ctx context.Context, p []byte) error {
	if _, err := w.conn.Write(p); err != nil {
		return lost(ctx, err)
	}
	return nil
}

// answer waits for the answer to the packet sent last. An answer that comes without an
// acknowledgement stands for it. Packets that skip matches came unasked.
func (w *wire) answer(ctx context.Context, skip func([]byte) bool) ([]byte, error) {
	resent := 0
	again := func(p []byte) error {
		if resent++; resent > maxResend {
			return fmt.Errorf("%w: the line damages every packet", ErrGone)
		}
		return w.put(ctx, p)
	}
	for {
		ev, err := w.next(ctx)
		switch {
		case err != nil:
			return nil, err
		case ev == tooLong:
			return nil, fmt.Errorf("%w: an answer of more than %d bytes", ErrGone, len(w.dec.out))
		case ev == nak && !w.noAck:
			err = again(w.enc.out[:w.enc.n])
		case ev == damaged && w.noAck:
			return nil, fmt.Errorf("%w: a damaged answer", ErrGone)
		case ev == damaged:
			err = again([]byte("-"))
		case ev == reply:
			if !w.noAck {
				err = w.put(ctx, []byte("+"))
			}
			if err == nil && !w.hear(w.dec.data()) && !skip(w.dec.data()) {
				return w.dec.data(), nil
			}
		}
		if err != nil {
			return nil, err
		}
	}
}

// next reads up to the next event.
func (w *wire) next(ctx context.Context) (event, error) {
	for {
		for i, b := range w.unread {
			if ev := w.dec.push(b); ev != none {
				w.unread = w.unread[i+1:]
				return ev, nil
			}
		}
		n, err := w.conn.Read(w.raw)
		w.unread = w.raw[:n]
		if n == 0 && err != nil {
			return none, lost(ctx, err)
		}
	}
}

// hear takes what the server's console says: O and hex digits, or O alone as a sign of life.
func (w *wire) hear(p []byte) bool {
	if len(p) == 0 || p[0] != 'O' || string(p) == "OK" {
		return false
	}
	for i := 1; i+1 < len(p) && len(w.console) < maxConsole; i += 2 {
		hi, ok1 := unhex(p[i])
		lo, ok2 := unhex(p[i+1])
		if !ok1 || !ok2 {
			break
		}
		w.console = append(w.console, hi<<4|lo)
	}
	return true
}

// isStop tells a stop reply, which some servers send unasked.
func isStop(p []byte) bool {
	if len(p) < 3 || p[0] != 'T' && p[0] != 'S' {
		return false
	}
	_, ok1 := unhex(p[1])
	_, ok2 := unhex(p[2])
	return ok1 && ok2
}

func never([]byte) bool { return false }

// lost says why a connection is of no more use. net's errors hold no bytes of what was sent.
func lost(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%w: no answer in time", ErrGone)
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%w: the debug server closed the connection", ErrGone)
	}
	return fmt.Errorf("%w: %w", ErrGone, brief(err))
}

// wipe overwrites everything that packets went through. Bytes that nobody has read yet are
// dropped: between two commands there is nothing in them to wait for.
func (w *wire) wipe() {
	clear(w.enc.out)
	clear(w.raw)
	clear(w.dec.out)
	w.enc.n, w.dec.n, w.unread = 0, 0, nil
	w.dec.sum, w.dec.want = 0, 0
}

// refusal makes an error of an answer that is not what was asked for, nil if it is no
// refusal. quiet leaves the server's own words out.
func refusal(answer []byte, quiet bool) error {
	switch {
	case len(answer) == 0:
		return fmt.Errorf("%w: it does not know this command", ErrTarget)
	case answer[0] == 'W' || answer[0] == 'X' || answer[0] == 'N':
		return fmt.Errorf("%w: there is no target, or it has ended", ErrTarget)
	case answer[0] != 'E':
		return nil
	case len(answer) == 3:
		hi, ok1 := unhex(answer[1])
		lo, ok2 := unhex(answer[2])
		if ok1 && ok2 {
			return fmt.Errorf("%w: error E%02x", ErrTarget, hi<<4|lo)
		}
	case bytes.HasPrefix(answer, []byte("E.")) && !quiet:
		return fmt.Errorf("%w: %s", ErrTarget, printable(answer[2:]))
	case bytes.HasPrefix(answer, []byte("E.")):
		return fmt.Errorf("%w: error E", ErrTarget)
	}
	return nil
}

// done demands the answer OK.
func done(answer []byte, quiet bool) error {
	if string(answer) == "OK" {
		return nil
	}
	if err := refusal(answer, quiet); err != nil {
		return err
	}
	return fmt.Errorf("%w: an answer that is neither OK nor an error", ErrGone)
}

// printable is text from outside on one line, bounded, fit for a terminal.
func printable(p []byte) string {
	if len(p) > maxConsole {
		p = p[:maxConsole]
	}
	return strings.Trim(strconv.QuoteToASCII(strings.TrimSpace(string(p))), `"`)
}

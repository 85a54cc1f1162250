package msglog

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
)

// The committer gathers in steps before the frame that follows another one. An idle
// system answers at once and a busy one in bulk. Between the two, at some thousand
// messages a second, a frame would hold so few that its own cost counts: it waits while
// each step brings company, for enough records or the last step.
const (
	gatherStep  = time.Millisecond
	gatherSteps = 5
	enough      = 32 // records in a frame, above which waiting buys nothing
)

// gatherAfter is for how many steps the committer waits at most after a frame of n records.
func gatherAfter(n int) int {
	switch {
	case n <= 1:
		return 0
	case n < enough:
		return gatherSteps
	}
	return 1
}

// committer is the one goroutine that writes frames. One frame is under way at
// a time: a second one in flight would have to be renumbered when the first fails.
type committer struct {
	l         *Log
	recs      []Record
	plan      QueuePlan
	queued    []QueuedAt
	gather    int // steps before the next frame; 0: not at all
	timer     *time.Timer
	abandoned *frame // outside cluster: failed, may still turn up under its number
}

// frame is a sealed frame.
type frame struct {
	number uint64
	sum    uint32
	data   []byte
}

func newCommitter(l *Log) *committer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return &committer{l: l, timer: t}
}

// run commits until the intake is closed and empty.
func (c *committer) run() {
	in := &c.l.in
	for {
		c.repairIfAsked()
		b := c.next()
		if b != nil {
			c.commit(b)
			continue
		}
		if in.closed() {
			return
		}
		select {
		case <-in.ready:
			c.wait()
		case <-c.l.ctx.Done():
			return
		}
	}
}

// next gives the batch to write now, after gathering if that is called for.
func (c *committer) next() *batch {
	in := &c.l.in
	if c.gather == 0 || in.waiting() {
		return in.take()
	}
	if in.idle() {
		return nil
	}
	c.wait()
	return in.take()
}

// wait gathers: one step, and others while they bring company. Clients that wait for
// PUBACK before they go on have all come after two.
func (c *committer) wait() {
	in := &c.l.in
	if c.gather == 0 || in.waiting() {
		return
	}
	had := 0
	for step := 1; step <= c.gather && !c.fullWithin(gatherStep); step++ {
		have := in.gathered()
		if step > 1 && have == had || have >= enough {
			break
		}
		had = have
	}
	c.gather = 0 // the next call of next takes at once; commit sets it again
}

// fullWithin waits, and reports whether a batch was full (or the intake closed) before.
func (c *committer) fullWithin(d time.Duration) bool {
	c.timer.Reset(d)
	select {
	case <-c.timer.C:
		return false
	case <-c.l.in.full:
		c.timer.Stop()
		return true
	}
}

// gathered is the number of records in the frame under construction.
func (in *intake) gathered() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.fill == nil {
		return 0
	}
	return in.fill.count
}

func (in *intake) idle() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.fill == nil && len(in.queue) == 0
}

// commit brings one batch to disk, or fails it and waits until the log works again.
func (c *committer) commit(b *batch) {
	l := c.l
	start := time.Now()
	f, err := c.seal(b)
	if err != nil { // cannot be: what was encoded decodes
		l.setDead(err)
		c.fail(b.owners, err)
		return
	}
	c.gather = gatherAfter(b.count)
	c.planQueues()
	if f, err = c.write(f); err == nil {
		err = c.writeQueues(f)
	}
	if err != nil {
		c.fail(b.owners, err)
		c.failWaiting(err)
		l.in.recycle(b)
		c.recover(f, err)
		return
	}
	c.finish(f)
	l.stats.frame(len(c.recs), len(f.data), time.Since(start))
	for i, o := range b.owners {
		if o != nil {
			o.Stored(&c.recs[i], nil)
		}
	}
	l.in.recycle(b)
}

// seal makes the frame and decodes its records into c.recs.
func (c *committer) seal(b *batch) (*frame, error) {
	l := c.l
	l.mu.Lock()
	h := header{magic: magicFrame, count: b.count, number: l.end, link: uint64(l.lastSum), base: b.base}
	l.mu.Unlock()
	buf := make([]byte, len(b.buf), len(b.buf)+trailerSize)
	copy(buf, b.buf)
	data, sum := seal(buf, h)
	if err := c.decode(data); err != nil {
		return nil, fmt.Errorf("frame %d as written: %w", h.number, err)
	}
	for i, o := range b.owners {
		c.recs[i].Owner = o
	}
	return &frame{h.number, sum, data}, nil
}

func (c *committer) decode(data []byte) (err error) {
	clear(c.recs)
	_, c.recs, _, err = decodeBlock(data, magicFrame, c.recs[:0])
	return err
}

func (c *committer) planQueues() {
	c.plan.reset()
	if c.l.hooks.Plan != nil {
		c.l.hooks.Plan(c.recs, &c.plan)
	}
}

// finish makes a frame that is on disk visible and tells the broker.
func (c *committer) finish(f *frame) {
	c.l.advance(f.number, f.sum, f.data)
	if c.l.hooks.Committed != nil {
		c.l.hooks.Committed(c.recs, c.queued)
	}
}

// fail tells the owners of the records in c.recs that they are not stored.
func (c *committer) fail(owners []Owner, err error) {
	err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	for i, o := range owners {
		if o != nil && i < len(c.recs) {
			r := c.recs[i]
			r.Pos = 0
			o.Stored(&r, err)
		}
	}
}

// failWaiting refuses further records and fails those that wait for a frame.
func (c *committer) failWaiting(err error) {
	recs := c.recs
	c.recs = nil
	for _, b := range c.l.refuse(err) {
		if _, e := c.seal(b); e == nil {
			c.fail(b.owners, err)
		}
		c.l.in.recycle(b)
	}
	c.recs = recs
}

var errStopping = errors.New("the log is being closed")

// write stores the frame and tries again with the same message id for RetryFor.
// The frame it returns has another number when one that was given up turned up.
func (c *committer) write(f *frame) (*frame, error) {
	deadline := time.Now().Add(c.l.cfg.RetryFor)
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		err := c.attempt(f)
		if err == nil {
			return f, nil
		}
		c.l.stats.failures.Add(1)
		if errors.Is(err, errForeign) {
			if f, err = c.makeWay(f); err == nil {
				continue
			}
			c.l.setDead(err)
			return f, err
		}
		c.l.cfg.Logger.Warn("a frame could not be written; trying again", "frame", f.number, "log", c.l.cfg.where(), "error", err)
		if time.Now().After(deadline) {
			return f, err
		}
		if !c.sleep(pause) {
			return f, errStopping
		}
		c.repair(err)
	}
}

// sleep waits and reports whether the log is still open.
func (c *committer) sleep(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-c.l.ctx.Done():
		return false
	}
}

var errForeign = errors.New("another frame has this number")

// attempt publishes the frame once. JetStream takes it only as the message
// number f.number, so a frame cannot be stored twice: at one replica the server
// compares sequences first, in a cluster it first looks for the message id. In
// both cases what lies under the number decides.
func (c *committer) attempt(f *frame) error {
	h := nats.Header{
		"Nats-Msg-Id":                 {fmt.Sprintf("%d-%08x", f.number, f.sum)},
		"Nats-Expected-Last-Sequence": {strconv.FormatUint(f.number-1, 10)},
	}
	seq, err := c.l.store.putOne(c.l.ctx, outMsg{c.l.names.frame, f.data}, h)
	if err == nil && seq == f.number {
		return nil
	}
	if err != nil && !wrongLastSeq(err) {
		return err
	}
	there, lerr := c.l.lookFor(c.l.ctx, f)
	switch {
	case lerr != nil:
		return lerr
	case there:
		return nil
	case err == nil:
		return fmt.Errorf("frame %d was acknowledged as %d", f.number, seq)
	}
	return err
}

// lookFor reports whether the frame is stored. Another one under its number is
// errForeign.
func (l *Log) lookFor(ctx context.Context, f *frame) (bool, error) {
	m, ok, err := l.store.get(ctx, l.names.log, f.number, "")
	if err != nil || !ok {
		return false, err
	}
	if sum := binary.BigEndian.Uint32(m.data[len(m.data)-trailerSize:]); len(m.data) != len(f.data) || sum != f.sum {
		return false, fmt.Errorf("%w: %d in %s", errForeign, f.number, l.cfg.where())
	}
	return true, nil
}

// makeWay commits a frame that was given up and turned up after all, and
// renumbers f. Any other frame means that somebody else writes to our log.
func (c *committer) makeWay(f *frame) (*frame, error) {
	a := c.abandoned
	if a == nil || a.number != f.number {
		return f, fmt.Errorf("%w: %w", ErrLeased, errForeign)
	}
	if there, err := c.l.lookFor(c.l.ctx, a); err != nil || !there {
		return f, fmt.Errorf("%w: %w", ErrLeased, errForeign)
	}
	c.abandoned = nil
	owners := make([]Owner, len(c.recs))
	for i := range c.recs {
		owners[i] = c.recs[i].Owner
	}
	if err := c.adopt(a); err != nil {
		return f, err
	}
	return c.renumber(f, owners)
}

// adopt finishes a frame that is stored but whose owners were told it is not.
func (c *committer) adopt(a *frame) error {
	if err := c.decode(a.data); err != nil {
		return err
	}
	c.planQueues()
	if err := c.writeQueues(a); err != nil {
		return err
	}
	c.finish(a)
	return nil
}

func (c *committer) renumber(f *frame, owners []Owner) (*frame, error) {
	h, _, _, err := parseHeader(f.data, magicFrame)
	if err != nil {
		return f, err
	}
	c.l.mu.Lock()
	h.number, h.link = c.l.end, uint64(c.l.lastSum)
	c.l.mu.Unlock()
	buf := append(make([]byte, 0, len(f.data)), f.data[:len(f.data)-trailerSize]...)
	data, sum := seal(buf, h)
	if err := c.decode(data); err != nil {
		return f, err
	}
	for i := range c.recs {
		c.recs[i].Owner = owners[i]
	}
	c.planQueues()
	return &frame{h.number, sum, data}, nil
}

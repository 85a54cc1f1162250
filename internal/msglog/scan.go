package msglog

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
)

// Sizes of one request of a scan. Two answers are in memory at a time.
const (
	scanBytes   = 2 << 20
	scanMsgs    = 512
	scanTimeout = 15 * time.Second
)

// scanQuery selects messages of a stream in rising order.
type scanQuery struct {
	stream  string
	from    uint64    // first sequence
	since   time.Time // instead of from: stored at or after
	subject string    // "": all
}

type scanBatch struct {
	msgs []stored
	more bool
	err  error
}

// scan calls fn for the messages that q selects until there are no more. The
// next request is under way while fn works on the answer to the one before.
func (s *store) scan(ctx context.Context, q scanQuery, fn func(stored) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	batches := make(chan scanBatch)
	go s.scanAhead(ctx, q, batches)
	for b := range batches {
		for _, m := range b.msgs {
			if err := fn(m); err != nil {
				return err
			}
		}
		if b.err != nil {
			return b.err
		}
	}
	return ctx.Err()
}

func (s *store) scanSub() (*nats.Subscription, error) {
	nc, err := s.conn()
	if err != nil {
		return nil, err
	}
	return nc.SubscribeSync(nats.NewInbox())
}

// scanAhead requests batch after batch and closes out at the end. It ends with ctx.
func (s *store) scanAhead(ctx context.Context, q scanQuery, out chan<- scanBatch) {
	defer close(out)
	sub, err := s.scanSub()
	if err != nil {
		select {
		case out <- scanBatch{err: err}:
		case <-ctx.Done():
		}
		return
	}
	defer func() { _ = sub.Unsubscribe() }()
	for {
		b := s.scanRequest(ctx, sub, q)
		select {
		case out <- b:
		case <-ctx.Done():
			return
		}
		if b.err != nil || !b.more {
			return
		}
		q.from, q.since = b.msgs[len(b.msgs)-1].seq+1, time.Time{}
	}
}

// scanRequest is one batch request of JetStream's direct get.
func (s *store) scanRequest(ctx context.Context, sub *nats.Subscription, q scanQuery) (b scanBatch) {
	nc, err := s.conn()
	if err != nil {
		return scanBatch{err: err}
	}
	body, err := scanBody(q)
	if err != nil {
		return scanBatch{err: err}
	}
	ctx, cancel := context.WithTimeout(ctx, scanTimeout)
	defer cancel()
	if err := nc.PublishRequest("$JS.API.DIRECT.GET."+q.stream, sub.Subject, body); err != nil {
		return scanBatch{err: err}
	}
	for {
		m, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			return scanBatch{err: fmt.Errorf("read stream %s: %w", q.stream, err)}
		}
		switch status := m.Header.Get("Status"); status {
		case "":
			seq, err := strconv.ParseUint(m.Header.Get("Nats-Sequence"), 10, 64)
			if err != nil {
				return scanBatch{err: fmt.Errorf("read stream %s: %w", q.stream, err)}
			}
			b.msgs = append(b.msgs, stored{m.Header.Get("Nats-Subject"), seq, m.Data})
		case "204": // end of batch
			b.more = len(b.msgs) > 0 && m.Header.Get("Nats-Num-Pending") != "0"
			return b
		case "404": // nothing there
			return b
		default:
			b.err = fmt.Errorf("read stream %s: %s %s", q.stream, status, m.Header.Get("Description"))
			return b
		}
	}
}

func scanBody(q scanQuery) ([]byte, error) {
	req := struct {
		Seq      uint64     `json:"seq,omitempty"`
		Start    *time.Time `json:"start_time,omitempty"`
		Next     string     `json:"next_by_subj,omitempty"`
		Batch    int        `json:"batch"`
		MaxBytes int        `json:"max_bytes"`
	}{Seq: max(q.from, 1), Next: q.subject, Batch: scanMsgs, MaxBytes: scanBytes}
	if !q.since.IsZero() {
		t := q.since.UTC()
		req.Seq, req.Start = 0, &t
	}
	return json.Marshal(req)
}

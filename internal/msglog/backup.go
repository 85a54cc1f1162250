package msglog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/nats-io/nats.go"
)

// StreamSink takes one stream of a backup: r is valid during the call and is to
// be read to its end. An error of r means that the stream is not whole.
type StreamSink func(name string, r io.Reader) error

// Backup gives the four streams to sink, as the store's own snapshots, while
// records go on being taken. What it gives is a log as a crash could have left
// it: the frames are the last to be read, and R, Q and H tell nothing that they
// do not hold. Only of the frames since its beginning queue messages may be
// missing: put the answer into Config.Requeue of the first Open after a restore.
//
// Retention rests meanwhile, and the caller sees to it that nobody calls
// PutRetained or Saved: what the registry was told last must stay true. R and Q
// are first written to spool, an empty file: no QueueDrop waits longer than that
// takes. sink may not keep r waiting for more than five seconds.
func (l *Log) Backup(ctx context.Context, spool *os.File, sink StreamSink) (requeue uint64, err error) {
	l.resting.Lock()
	defer l.resting.Unlock()
	sizes, requeue, err := l.spool(ctx, spool)
	if err != nil {
		return 0, err
	}
	at := int64(0)
	for i, short := range []string{shortRetained, shortQueue} {
		if err := sink(short, io.NewSectionReader(spool, at, sizes[i])); err != nil {
			return 0, err
		}
		at += sizes[i]
	}
	for _, short := range []string{shortHistory, shortLog} { // history may not know of frames that are not there
		if err := l.snapshot(ctx, short, func(r io.Reader) error { return sink(short, r) }); err != nil {
			return 0, err
		}
	}
	return requeue, nil
}

// The streams as a backup names them.
const (
	shortLog      = "LOG"
	shortQueue    = "Q"
	shortRetained = "R"
	shortHistory  = "H"
)

// BackupStreams are the names of the streams of a backup, in its order.
func BackupStreams() []string { return []string{shortRetained, shortQueue, shortHistory, shortLog} }

// stream is the whole name of a stream, "" for none.
func (n names) stream(short string) string {
	switch short {
	case shortLog:
		return n.log
	case shortQueue:
		return n.queue
	case shortRetained:
		return n.retained
	case shortHistory:
		return n.history
	}
	return ""
}

// spool copies R and Q while nothing is removed from Q: of a queue that goes in
// the middle of it, a part without its beginning would be left.
func (l *Log) spool(ctx context.Context, to *os.File) (sizes [2]int64, requeue uint64, err error) {
	l.queues.removing.Lock()
	defer l.queues.removing.Unlock()
	requeue = l.wholeBefore()
	for i, short := range []string{shortRetained, shortQueue} {
		err := l.snapshot(ctx, short, func(r io.Reader) (err error) {
			sizes[i], err = io.Copy(to, r)
			return err
		})
		if err != nil {
			return sizes, 0, err
		}
	}
	return sizes, requeue, nil
}

// wholeBefore is the frame before which every frame has its queue messages.
func (l *Log) wholeBefore() uint64 {
	end := l.End().Frame()
	switch {
	case l.started.Load():
		return end
	case l.cfg.Requeue > 0: // restored and not started since
		return l.cfg.Requeue
	}
	return max(end-1, 1) // a crash may have left the last one without
}

// snapshot lets sink read the store's snapshot of one stream.
func (l *Log) snapshot(ctx context.Context, short string, sink func(io.Reader) error) error {
	stream := l.names.stream(short)
	ctx, cancel := context.WithCancel(ctx)
	pr, pw := io.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		pw.CloseWithError(l.store.snapshot(ctx, stream, pw))
	}()
	err := sink(pr)
	pr.CloseWithError(errUnread)
	cancel()
	<-ended
	if err != nil {
		return fmt.Errorf("copy stream %s of %s: %w", stream, l.cfg.where(), err)
	}
	return nil
}

var errUnread = errors.New("nobody reads the snapshot any more")

// snapshotChunk is how much of a snapshot comes as one message; the store lets
// 8 MiB be on their way.
const (
	snapshotChunk = 128 << 10
	snapshotWait  = 30 * time.Second
)

// snapshot writes the store's own snapshot of a stream, compressed, to w. It ends
// in a mark without which the store refuses to restore it.
func (s *store) snapshot(ctx context.Context, stream string, w io.Writer) error {
	nc, live, err := s.liveConn()
	if err != nil {
		return err
	}
	sub, err := nc.SubscribeSync(nats.NewInbox())
	if err != nil {
		return err
	}
	defer func() { _ = sub.Unsubscribe() }()
	req := struct {
		Deliver     string `json:"deliver_subject"`
		NoConsumers bool   `json:"no_consumers"`
		ChunkSize   int    `json:"chunk_size"`
	}{sub.Subject, true, snapshotChunk}
	var out struct{}
	if err := s.api(ctx, "STREAM.SNAPSHOT."+stream, req, &out); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer context.AfterFunc(live, func() { cancel(context.Cause(live)) })()
	defer cancel(nil)
	for {
		m, err := nextChunk(ctx, sub)
		if err != nil {
			return err
		}
		if len(m.Data) == 0 {
			return snapshotEnd(m)
		}
		if m.Reply != "" {
			if err := m.Respond(nil); err != nil {
				return err
			}
		}
		if _, err := w.Write(m.Data); err != nil {
			return err
		}
	}
}

func nextChunk(ctx context.Context, sub *nats.Subscription) (*nats.Msg, error) {
	wait, cancel := context.WithTimeout(ctx, snapshotWait)
	defer cancel()
	m, err := sub.NextMsgWithContext(wait)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return m, err
}

// snapshotEnd reads the last message: it has no data, and a status where something
// was wrong.
func snapshotEnd(m *nats.Msg) error {
	switch status := m.Header.Get("Status"); status {
	case "", "204":
		return nil
	case "408":
		return errors.New("the copy was not taken for five seconds, so the store gave it up")
	default:
		return fmt.Errorf("the store says %s %s", status, m.Header.Get("Description"))
	}
}

// Restore makes a log out of what Backup gave: next gives stream after stream and
// io.EOF after the last. It is durable when Restore returns nil. A log that is
// there already is ErrExists; after a failure in an outside cluster what was
// made there is removed, a directory is left to the caller.
func Restore(ctx context.Context, cfg Config, next func() (name string, r io.Reader, err error)) error {
	if err := cfg.setDefaults(); err != nil {
		return err
	}
	if cfg.Dir != "" {
		if err := makeDir(cfg.Dir); err != nil {
			return err
		}
	}
	s := &store{cfg: &cfg, logger: &natsLogger{log: cfg.Logger}, lazy: true}
	if err := s.connect(); err != nil {
		return err
	}
	n := namesOf(cfg.Fleet)
	err := s.absent(ctx, append(n.streams(), n.lease))
	if err == nil {
		if err = s.restoreStreams(ctx, n, next); err != nil && cfg.NATSURL != "" {
			s.removeStreams(ctx, append(n.streams(), n.lease))
		}
	}
	s.close()
	if err == nil && cfg.Dir != "" {
		err = syncFiles(cfg.Dir)
	}
	return err
}

// absent refuses streams that are there.
func (s *store) absent(ctx context.Context, streams []string) error {
	for _, name := range streams {
		if _, err := s.info(ctx, name); err == nil {
			return fmt.Errorf("%w in %s: stream %s", ErrExists, s.cfg.where(), name)
		} else if !hasCode(err, codeStreamNotFound) {
			return err
		}
	}
	return nil
}

func (s *store) removeStreams(ctx context.Context, streams []string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*requestTimeout)
	defer cancel()
	for _, name := range streams {
		var out struct{}
		if err := s.api(ctx, "STREAM.DELETE."+name, struct{}{}, &out); err != nil && !hasCode(err, codeStreamNotFound) {
			s.cfg.Logger.Warn("a stream of a restore that failed was not removed", "stream", name, "log", s.cfg.where(), "error", err)
		}
	}
}

func (s *store) restoreStreams(ctx context.Context, n names, next func() (string, io.Reader, error)) error {
	nc, err := s.conn()
	if err != nil {
		return err
	}
	replicas := 1
	if s.cfg.NATSURL != "" {
		replicas = outsideReplicas(nc)
	}
	configs := map[string]any{}
	for _, c := range n.configs(replicas) {
		configs[c.Name] = c
	}
	for {
		short, r, err := next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		stream := n.stream(short)
		c := configs[stream]
		if c == nil {
			return fmt.Errorf("stream %q: not of a log, or there twice", short)
		}
		delete(configs, stream)
		if err := s.restoreStream(ctx, stream, c, r); err != nil {
			return fmt.Errorf("restore stream %s in %s: %w", stream, s.cfg.where(), err)
		}
	}
	if len(configs) > 0 {
		return fmt.Errorf("%d streams of the log are missing", len(configs))
	}
	if s.cfg.NATSURL == "" {
		return nil
	}
	var out struct{}
	c := leaseStream(n, replicas, s.cfg.LeaseFor)
	return s.api(ctx, "STREAM.CREATE."+c.Name, c, &out)
}

// restoreStream sends a snapshot to the store.
func (s *store) restoreStream(ctx context.Context, name string, config any, r io.Reader) error {
	req := struct {
		Config any      `json:"config"`
		State  struct{} `json:"state"`
	}{Config: config}
	var to struct {
		Deliver string `json:"deliver_subject"`
	}
	if err := s.api(ctx, "STREAM.RESTORE."+name, req, &to); err != nil {
		return err
	}
	chunk := make([]byte, snapshotChunk)
	for {
		n, err := io.ReadFull(r, chunk)
		if n > 0 {
			if err := s.sendChunk(ctx, to.Deliver, chunk[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return s.sendChunk(ctx, to.Deliver, nil)
		case err != nil:
			return err
		}
	}
}

// restoreWait bounds one answer; the last one comes when all is stored.
const restoreWait = 2 * time.Minute

// unheardPause is how long a chunk that nobody got waits for its next try.
const unheardPause = 300 * time.Millisecond

// sendChunk waits for the answer: that to the last, empty one tells how it went.
func (s *store) sendChunk(ctx context.Context, subject string, data []byte) error {
	nc, err := s.conn()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, restoreWait)
	defer cancel()
	m, err := nc.RequestWithContext(ctx, subject, data)
	for deadline := time.Now().Add(settleFor); errors.Is(err, nats.ErrNoResponders) && s.cfg.NATSURL != "" && time.Now().Before(deadline); {
		// Nobody got the chunk: our server has not heard yet that another one listens.
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(unheardPause):
		}
		m, err = nc.RequestWithContext(ctx, subject, data)
	}
	if err != nil || len(m.Data) == 0 {
		return err
	}
	var answer struct {
		Error *apiError `json:"error"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return err
	}
	if answer.Error != nil {
		return answer.Error
	}
	return nil
}

// syncFiles makes all that is below dir durable.
func syncFiles(dir string) error {
	return filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		return errors.Join(f.Sync(), f.Close())
	})
}

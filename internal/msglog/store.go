package msglog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// store speaks to JetStream: to the embedded server or to an outside cluster,
// with the same requests. It is safe for concurrent use.
type store struct {
	cfg    *Config
	logger *natsLogger

	lazy bool        // the embedded server need not fsync: a restore does, at its end
	sick atomic.Bool // the embedded server met a write error: restart it

	mu   sync.RWMutex
	ns   *server.Server          // guarded by mu; nil with an outside cluster
	nc   *nats.Conn              // guarded by mu
	live context.Context         // guarded by mu; ends when answers will not come
	lost context.CancelCauseFunc // guarded by mu; ends live

	wrap func(net.Conn) net.Conn // nil but in tests that cut the embedded connection
}

// requestTimeout bounds one request. A frame whose answer does not come is
// looked for and sent again, so it may be short.
const requestTimeout = 5 * time.Second

// apiError is JetStream's answer to a request that it refuses.
type apiError struct {
	Code        int    `json:"code"`
	ErrCode     int    `json:"err_code"`
	Description string `json:"description"`
}

func (e *apiError) Error() string {
	return fmt.Sprintf("jetstream: %s (%d)", e.Description, e.ErrCode)
}

// JetStream error codes that mean something to us.
const (
	codeWrongLastSeq      = 10071
	codeNoMessage         = 10037
	codeStreamNotFound    = 10059
	codeNotClustered      = 10074
	codeNoPeers           = 10005
	codeWrongLastSeqConst = 10164
)

func hasCode(err error, code int) bool {
	var e *apiError
	return errors.As(err, &e) && e.ErrCode == code
}

func wrongLastSeq(err error) bool {
	return hasCode(err, codeWrongLastSeq) || hasCode(err, codeWrongLastSeqConst)
}

func (s *store) conn() (*nats.Conn, error) {
	nc, _, err := s.liveConn()
	return nc, err
}

// liveConn gives the connection and a context that ends when it is lost.
func (s *store) liveConn() (*nats.Conn, context.Context, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.nc == nil {
		return nil, nil, nats.ErrConnectionClosed
	}
	return s.nc, s.live, nil
}

// onLost ends the requests under way: their answers will not come.
func (s *store) onLost(*nats.Conn, error) { s.giveUp(nats.ErrConnectionClosed) }

func (s *store) giveUp(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lost != nil {
		s.lost(cause)
	}
	s.live, s.lost = context.WithCancelCause(context.Background())
}

// onWriteError is called when the embedded server logs that it could not
// write. It does not answer the publisher then, and whether it takes writes
// again when there is room depends on where it failed.
func (s *store) onWriteError() {
	s.sick.Store(true)
	go s.giveUp(errWrite) // the server may hold locks here
}

// connect starts the embedded server, or dials the cluster.
func (s *store) connect() error {
	if s.cfg.NATSURL != "" {
		nc, err := dialOutside(s.cfg, s.logger, s.onLost)
		if err != nil {
			return err
		}
		s.set(nil, nc)
		return nil
	}
	ns, err := startEmbedded(s.cfg.Dir, !s.lazy, s.logger)
	if err != nil {
		return err
	}
	nc, err := dialEmbedded(pipe{ns, s.wrap}, nats.DisconnectErrHandler(s.onLost))
	if err != nil {
		stopEmbedded(ns)
		return fmt.Errorf("connect to the log store in %s: %w", s.cfg.Dir, err)
	}
	s.set(ns, nc)
	return nil
}

func (s *store) set(ns *server.Server, nc *nats.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ns, s.nc = ns, nc
	s.live, s.lost = context.WithCancelCause(context.Background())
}

func (s *store) close() {
	s.mu.Lock()
	ns, nc := s.ns, s.nc
	s.ns, s.nc = nil, nil
	s.mu.Unlock()
	if nc != nil {
		nc.Close()
	}
	stopEmbedded(ns)
}

// request sends one request and waits for its one answer.
func (s *store) request(ctx context.Context, subj string, hdr nats.Header, data []byte) (*nats.Msg, error) {
	nc, live, err := s.liveConn()
	if err != nil {
		return nil, err
	}
	rctx, cancel := context.WithTimeout(live, requestTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	m, err := nc.RequestMsgWithContext(rctx, &nats.Msg{Subject: subj, Header: hdr, Data: data})
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil && live.Err() != nil:
		return nil, context.Cause(live)
	}
	return m, err
}

// api calls a JSON endpoint of JetStream and reads its answer into out.
func (s *store) api(ctx context.Context, endpoint string, req, out any) error {
	body, err := json.Marshal(req)
	if err != nil {
		return err
	}
	m, err := s.request(ctx, "$JS.API."+endpoint, nil, body)
	if err != nil {
		return fmt.Errorf("%s: %w", endpoint, err)
	}
	var failed struct {
		Error *apiError `json:"error"`
	}
	if err := json.Unmarshal(m.Data, &failed); err != nil {
		return fmt.Errorf("%s: %w", endpoint, err)
	}
	if failed.Error != nil {
		return failed.Error
	}
	return json.Unmarshal(m.Data, out)
}

// streamInfo is the part of STREAM.INFO that integrity depends on.
type streamInfo struct {
	State struct {
		Messages   uint64    `json:"messages"`
		Bytes      uint64    `json:"bytes"`
		FirstSeq   uint64    `json:"first_seq"`
		FirstTime  time.Time `json:"first_ts"`
		LastSeq    uint64    `json:"last_seq"`
		NumDeleted int       `json:"num_deleted"`
		Lost       *struct {
			Msgs []uint64 `json:"msgs"`
		} `json:"lost"`
	} `json:"state"`
}

func (s *store) info(ctx context.Context, stream string) (streamInfo, error) {
	var in streamInfo
	err := s.api(ctx, "STREAM.INFO."+stream, struct{}{}, &in)
	return in, err
}

// count tells how many messages of a literal subject a stream holds.
func (s *store) count(ctx context.Context, stream, subject string) (uint64, error) {
	req := struct {
		Filter string `json:"subjects_filter"`
	}{subject}
	var in struct {
		State struct {
			Subjects map[string]uint64 `json:"subjects"`
		} `json:"state"`
	}
	err := s.api(ctx, "STREAM.INFO."+stream, req, &in)
	return in.State.Subjects[subject], err
}

// purge removes the messages of subject filter ("": all) below sequence seq;
// with seq 0 all of them.
func (s *store) purge(ctx context.Context, stream, filter string, seq uint64) error {
	var out struct {
		Success bool `json:"success"`
	}
	req := struct {
		Filter string `json:"filter,omitempty"`
		Seq    uint64 `json:"seq,omitempty"`
	}{filter, seq}
	return s.api(ctx, "STREAM.PURGE."+stream, req, &out)
}

// pubAck is JetStream's answer to a publish.
type pubAck struct {
	Seq       uint64    `json:"seq"`
	Duplicate bool      `json:"duplicate"`
	Error     *apiError `json:"error"`
}

func parseAck(m *nats.Msg) (pubAck, error) {
	var ack pubAck
	if err := json.Unmarshal(m.Data, &ack); err != nil {
		return ack, fmt.Errorf("acknowledgement of the log store: %w", err)
	}
	if ack.Error != nil {
		return ack, ack.Error
	}
	return ack, nil
}

// outMsg is a message to be stored.
type outMsg struct {
	subject string
	data    []byte
}

// put stores msgs as one: all or none, and returns the sequence of the last.
// They follow each other without a gap. expect is the last sequence the stream
// must have before (none: not checked).
func (s *store) put(ctx context.Context, expect *uint64, msgs ...outMsg) (uint64, error) {
	if len(msgs) == 1 {
		return s.putOne(ctx, msgs[0], expectHeader(expect))
	}
	nc, err := s.conn()
	if err != nil {
		return 0, err
	}
	id := nats.NewInbox()[len("_INBOX."):]
	last := len(msgs) - 1
	for i, m := range msgs[:last] {
		h := batchHeader(id, i)
		if i == 0 && expect != nil {
			h.Set("Nats-Expected-Last-Sequence", strconv.FormatUint(*expect, 10))
		}
		if err := nc.PublishMsg(&nats.Msg{Subject: m.subject, Header: h, Data: m.data}); err != nil {
			return 0, err
		}
	}
	h := batchHeader(id, last)
	h.Set("Nats-Batch-Commit", "1")
	return s.putOne(ctx, msgs[last], h)
}

// maxBatch is how many messages JetStream takes at once.
const maxBatch = 1000

func batchHeader(id string, i int) nats.Header {
	return nats.Header{"Nats-Batch-Id": {id}, "Nats-Batch-Sequence": {strconv.Itoa(i + 1)}}
}

func expectHeader(expect *uint64) nats.Header {
	if expect == nil {
		return nil
	}
	return nats.Header{"Nats-Expected-Last-Sequence": {strconv.FormatUint(*expect, 10)}}
}

func (s *store) putOne(ctx context.Context, m outMsg, h nats.Header) (uint64, error) {
	if s.sick.Load() {
		return 0, errWrite // until the restart: the server would not even answer
	}
	answer, err := s.request(ctx, m.subject, h, m.data)
	if err != nil {
		return 0, err
	}
	ack, err := parseAck(answer)
	return ack.Seq, err
}

// stored is a message read back.
type stored struct {
	subject string
	seq     uint64
	data    []byte
}

// get reads one message from the leader of the stream: by sequence, or the last
// one of a subject when seq is 0. ok is false when there is none.
func (s *store) get(ctx context.Context, stream string, seq uint64, last string) (m stored, ok bool, err error) {
	req := struct {
		Seq  uint64 `json:"seq,omitempty"`
		Last string `json:"last_by_subj,omitempty"`
	}{seq, last}
	var out struct {
		Message struct {
			Subject string `json:"subject"`
			Seq     uint64 `json:"seq"`
			Data    []byte `json:"data"`
		} `json:"message"`
	}
	err = s.api(ctx, "STREAM.MSG.GET."+stream, req, &out)
	if hasCode(err, codeNoMessage) {
		return m, false, nil
	}
	return stored{out.Message.Subject, out.Message.Seq, out.Message.Data}, err == nil, err
}

// getDirect reads one message by sequence from any replica. ok is false when
// that one does not have it.
func (s *store) getDirect(ctx context.Context, stream string, seq uint64) (m stored, ok bool, err error) {
	body := append(strconv.AppendUint([]byte(`{"seq":`), seq, 10), '}')
	answer, err := s.request(ctx, "$JS.API.DIRECT.GET."+stream, nil, body)
	if err != nil {
		return m, false, err
	}
	if answer.Header.Get("Status") != "" {
		return m, false, nil
	}
	return stored{answer.Header.Get("Nats-Subject"), seq, answer.Data}, true, nil
}

// bySeq reads one message from any replica, and from the leader when that one
// does not have it.
func (s *store) bySeq(ctx context.Context, stream string, seq uint64) (stored, bool, error) {
	m, ok, err := s.getDirect(ctx, stream, seq)
	if err != nil || ok {
		return m, ok, err
	}
	return s.get(ctx, stream, seq, "")
}

// seqAt gives the sequence of the first message stored at or after t; ok is
// false when there is none.
func (s *store) seqAt(ctx context.Context, stream string, t time.Time) (seq uint64, ok bool, err error) {
	body, err := json.Marshal(struct {
		Start time.Time `json:"start_time"`
	}{t.UTC()})
	if err != nil {
		return 0, false, err
	}
	m, err := s.request(ctx, "$JS.API.DIRECT.GET."+stream, nil, body)
	if err != nil {
		return 0, false, err
	}
	if m.Header.Get("Status") != "" {
		return 0, false, nil
	}
	seq, err = strconv.ParseUint(m.Header.Get("Nats-Sequence"), 10, 64)
	return seq, err == nil, err
}

package registry

import (
	"context"
	"database/sql"
	"errors"

	"hawser/internal/identity"
)

// LoadSessions calls fn for each session, in the order of their numbers, with
// its subscriptions, in-flight messages and packet ids; it holds one session at
// a time. Meant for the start, before there are changes.
func (r *Registry) LoadSessions(ctx context.Context, fn func(*StoredSession) error) error {
	tx, err := r.read.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer tx.Rollback()
	l, err := newLoader(ctx, tx)
	if err != nil {
		return err
	}
	defer l.close()
	for l.sessions.Next() {
		s, err := l.scan()
		if err != nil {
			return err
		}
		if err := l.hang(s); err != nil {
			return err
		}
		if err := fn(s); err != nil {
			return err
		}
	}
	return l.sessions.Err()
}

// loader walks four tables side by side, all ordered by session number.
type loader struct {
	sessions *sql.Rows
	subs     cursor[Subscription]
	inflight cursor[Inflight]
	inbound  cursor[[]uint16]
}

// cursor is one table with one row read ahead.
type cursor[T any] struct {
	rows    *sql.Rows
	scan    func(*sql.Rows) (int64, T, error)
	session int64
	row     T
	held    bool
}

func newLoader(ctx context.Context, tx *sql.Tx) (*loader, error) {
	l := &loader{
		subs:     cursor[Subscription]{scan: scanSubscription},
		inflight: cursor[Inflight]{scan: scanInflight},
		inbound:  cursor[[]uint16]{scan: scanInbound},
	}
	for _, q := range []struct {
		rows **sql.Rows
		text string
	}{
		{&l.sessions, `SELECT no, kind, name, client, generation, version, expiry, created, disconnected, queue_cursor, queue_acked, dropped,
			will_topic, will_payload, will_qos, will_retain, will_delay, will_expiry, will_props, will_due FROM sessions ORDER BY no`},
		{&l.subs.rows, `SELECT session, filter, options, sub_id, start FROM subscriptions ORDER BY session, filter`},
		{&l.inflight.rows, `SELECT session, packet, ref, state FROM inflight ORDER BY session, ref, packet`},
		{&l.inbound.rows, `SELECT session, packets FROM inbound_qos2 ORDER BY session`},
	} {
		rows, err := tx.QueryContext(ctx, q.text)
		if err != nil {
			l.close()
			return nil, err
		}
		*q.rows = rows
	}
	return l, nil
}

func (l *loader) close() {
	for _, rows := range []*sql.Rows{l.sessions, l.subs.rows, l.inflight.rows, l.inbound.rows} {
		if rows != nil {
			rows.Close()
		}
	}
}

// take gives the next row if it belongs to session; done = it does not.
func (c *cursor[T]) take(session int64) (row T, done bool, err error) {
	if !c.held {
		if !c.rows.Next() {
			return row, true, c.rows.Err()
		}
		if c.session, c.row, err = c.scan(c.rows); err != nil {
			return row, true, err
		}
		c.held = true
	}
	if c.session != session {
		return row, true, nil
	}
	c.held = false
	return c.row, false, nil
}

// each hands all rows of session to add.
func (c *cursor[T]) each(session int64, add func(T)) error {
	for {
		row, done, err := c.take(session)
		if done {
			return err
		}
		add(row)
	}
}

// hang adds what belongs to s.
func (l *loader) hang(s *StoredSession) error {
	return errors.Join(
		l.subs.each(s.No, func(v Subscription) { s.Subscriptions = append(s.Subscriptions, v) }),
		l.inflight.each(s.No, func(v Inflight) { s.Inflight = append(s.Inflight, v) }),
		l.inbound.each(s.No, func(v []uint16) { s.InboundQoS2 = v }),
	)
}

func (l *loader) scan() (*StoredSession, error) {
	var s StoredSession
	var w Will
	var topic sql.NullString
	var kind, generation, created, disconnected, pos, acked, dropped, expiry, due int64
	err := l.sessions.Scan(&s.No, &kind, &s.Key.Principal.Name, &s.Key.ClientID, &generation, &s.Version, &s.Expiry,
		&created, &disconnected, &pos, &acked, &dropped,
		&topic, &w.Payload, &w.QoS, &w.Retain, &w.Delay, &expiry, &w.Props, &due)
	if err != nil {
		return nil, err
	}
	s.Key.Principal.Kind = identity.Kind(kind)
	s.Generation, s.Cursor, s.QueueAcked, s.Dropped = uint64(generation), uint64(pos), uint64(acked), uint64(dropped)
	s.Created, s.Disconnected = fromMS(created), fromMS(disconnected)
	if topic.Valid {
		w.Topic, w.Due = topic.String, fromMS(due)
		if expiry >= 0 {
			w.HasExpiry, w.Expiry = true, uint32(expiry)
		}
		s.Will = &w
	}
	return &s, nil
}

func scanSubscription(rows *sql.Rows) (no int64, s Subscription, err error) {
	var start int64
	err = rows.Scan(&no, &s.Filter, &s.Options, &s.SubID, &start)
	s.Start = uint64(start)
	return no, s, err
}

func scanInflight(rows *sql.Rows) (no int64, m Inflight, err error) {
	var ref int64
	err = rows.Scan(&no, &m.PacketID, &ref, &m.State)
	m.Ref = uint64(ref)
	return no, m, err
}

func scanInbound(rows *sql.Rows) (no int64, list []uint16, err error) {
	var b sql.RawBytes
	err = rows.Scan(&no, &b)
	return no, unpackPackets(b), err
}

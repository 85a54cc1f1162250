package registry

import (
	"encoding/binary"
	"fmt"

	"hawser/internal/identity"
)

// SaveSession inserts or replaces the row of s; its subscriptions, in-flight
// messages and packet ids stay as they are. A row with a higher generation is
// left alone, and no row is made for a principal that is barred for good: ErrFenced.
// Another session number under the same key is an error.
func (tx *Tx) SaveSession(s *Session) error {
	w := s.Will
	var topic any // null = no will
	if w == nil {
		w = &Will{}
	} else {
		topic = w.Topic
	}
	expiry := int64(-1)
	if w.HasExpiry {
		expiry = int64(w.Expiry)
	}
	n, err := tx.execN(saveSession, s.No, int(s.Key.Principal.Kind), s.Key.Principal.Name, s.Key.ClientID,
		int64(s.Generation), s.Version, int64(s.Expiry), ms(s.Created), ms(s.Disconnected),
		int64(s.Cursor), int64(s.QueueAcked), int64(s.Dropped),
		topic, w.Payload, w.QoS, w.Retain, int64(w.Delay), expiry, w.Props, ms(w.Due),
		deviceNumber(s.Key.Principal), serviceName(s.Key.Principal))
	if err != nil {
		return fmt.Errorf("session %d of %s: %w", s.No, s.Key.Principal, err)
	}
	if n == 0 {
		return fmt.Errorf("session %d of %s: %w", s.No, s.Key.Principal, ErrFenced)
	}
	return nil
}

const saveSession = `INSERT INTO sessions (no, kind, name, client, generation, version, expiry, created, disconnected,
		queue_cursor, queue_acked, dropped,
		will_topic, will_payload, will_qos, will_retain, will_delay, will_expiry, will_props, will_due)
	SELECT ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?
	WHERE NOT EXISTS (SELECT 1 FROM devices WHERE id = ? AND state IN ('revoked', 'retired'))
	  AND NOT EXISTS (SELECT 1 FROM services WHERE name = ? AND state = 'revoked')
	ON CONFLICT (no) DO UPDATE SET generation = excluded.generation, version = excluded.version,
		expiry = excluded.expiry, disconnected = excluded.disconnected,
		queue_cursor = excluded.queue_cursor, queue_acked = excluded.queue_acked, dropped = excluded.dropped,
		will_topic = excluded.will_topic, will_payload = excluded.will_payload, will_qos = excluded.will_qos,
		will_retain = excluded.will_retain, will_delay = excluded.will_delay, will_expiry = excluded.will_expiry,
		will_props = excluded.will_props, will_due = excluded.will_due
	WHERE excluded.generation >= sessions.generation`

// deviceNumber is the number of a device, 0 for every other principal.
func deviceNumber(p identity.Principal) int64 {
	id, _ := p.ID()
	return int64(id)
}

// serviceName is the name of a service, empty for every other principal.
func serviceName(p identity.Principal) string {
	if p.Kind == identity.Service {
		return p.Name
	}
	return ""
}

// DropSession deletes a session and all that hangs on it; one that is not there
// is no error.
func (tx *Tx) DropSession(no int64) error {
	return tx.exec(`DELETE FROM sessions WHERE no = ?`, no)
}

// PutSubscriptions adds or replaces subscriptions of a session. A generation
// that is not that of the row, or a missing row, is ErrFenced.
func (tx *Tx) PutSubscriptions(no int64, generation uint64, subs ...Subscription) error {
	if err := tx.fence(no, generation); err != nil {
		return err
	}
	for _, s := range subs {
		err := tx.exec(`INSERT INTO subscriptions (session, filter, options, sub_id, start) VALUES (?, ?, ?, ?, ?)
			ON CONFLICT (session, filter) DO UPDATE SET options = excluded.options, sub_id = excluded.sub_id, start = excluded.start`,
			no, s.Filter, s.Options, int64(s.SubID), int64(s.Start))
		if err != nil {
			return err
		}
	}
	return nil
}

// DeleteSubscriptions removes subscriptions, under the rule of PutSubscriptions.
func (tx *Tx) DeleteSubscriptions(no int64, generation uint64, filters ...string) error {
	if err := tx.fence(no, generation); err != nil {
		return err
	}
	for _, f := range filters {
		if err := tx.exec(`DELETE FROM subscriptions WHERE session = ? AND filter = ?`, no, f); err != nil {
			return err
		}
	}
	return nil
}

func (tx *Tx) fence(no int64, generation uint64) error {
	var one int
	err := tx.row(`SELECT COUNT(*) FROM sessions WHERE no = ? AND generation = ?`, []any{no, int64(generation)}, &one)
	if err == nil && one == 0 {
		err = fmt.Errorf("session %d: %w", no, ErrFenced)
	}
	return err
}

// SaveCursors moves sessions forward, never back; those that are gone are passed
// over.
func (tx *Tx) SaveCursors(list []Cursor) error {
	for _, c := range list {
		err := tx.exec(`UPDATE sessions SET queue_cursor = MAX(queue_cursor, ?), queue_acked = MAX(queue_acked, ?),
			dropped = MAX(dropped, ?) WHERE no = ?`, int64(c.Cursor), int64(c.QueueAcked), int64(c.Dropped), c.Session)
		if err != nil {
			return err
		}
	}
	return nil
}

// PutInflight adds or replaces in-flight messages of a session; a session that
// is gone is ErrFenced.
func (tx *Tx) PutInflight(no int64, list ...Inflight) error {
	for _, m := range list {
		n, err := tx.execN(`INSERT INTO inflight (session, packet, ref, state) SELECT no, ?, ?, ? FROM sessions WHERE no = ?
			ON CONFLICT (session, packet) DO UPDATE SET ref = excluded.ref, state = excluded.state`,
			m.PacketID, int64(m.Ref), m.State, no)
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("session %d: %w", no, ErrFenced)
		}
	}
	return nil
}

// DeleteInflight removes in-flight messages of a session.
func (tx *Tx) DeleteInflight(no int64, packets ...uint16) error {
	for _, p := range packets {
		if err := tx.exec(`DELETE FROM inflight WHERE session = ? AND packet = ?`, no, p); err != nil {
			return err
		}
	}
	return nil
}

// ReplaceInboundQoS2 replaces the received, unreleased packet ids of the
// sessions in m, and of those only; sessions that are gone are passed over. It
// belongs into the change that saves the checkpoint.
func (tx *Tx) ReplaceInboundQoS2(m map[int64][]uint16) error {
	for no, packets := range m {
		var err error
		if len(packets) == 0 {
			err = tx.exec(`DELETE FROM inbound_qos2 WHERE session = ?`, no)
		} else {
			err = tx.exec(`INSERT INTO inbound_qos2 (session, packets) SELECT no, ? FROM sessions WHERE no = ?
				ON CONFLICT (session) DO UPDATE SET packets = excluded.packets`, packPackets(packets), no)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func packPackets(list []uint16) []byte {
	b := make([]byte, 0, 2*len(list))
	for _, p := range list {
		b = binary.BigEndian.AppendUint16(b, p)
	}
	return b
}

func unpackPackets(b []byte) []uint16 {
	list := make([]uint16, 0, len(b)/2)
	for ; len(b) >= 2; b = b[2:] {
		list = append(list, binary.BigEndian.Uint16(b))
	}
	return list
}

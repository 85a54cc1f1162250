package registry

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"

	"hawser/internal/identity"
)

const rolloverColumns = `no, from_generation, to_generation, from_anchors, to_anchors, state, started, moving, ended, actor`

func scanRollover(scan func(...any) error) (r Rollover, err error) {
	var started, moving, ended, fromAnchors, toAnchors int64
	err = scan(&r.No, &r.FromGeneration, &r.ToGeneration, &fromAnchors, &toAnchors, &r.State, &started, &moving, &ended, &r.Actor)
	r.FromAnchors, r.ToAnchors = uint64(fromAnchors), uint64(toAnchors)
	r.Started, r.MovingSince, r.Ended = fromMS(started), fromMS(moving), fromMS(ended)
	return r, err
}

// LastRollover reads the rollover that began last, the zero Rollover if there was none.
func (r *Registry) LastRollover(ctx context.Context) (Rollover, error) {
	v, err := scanRollover(r.read.QueryRowContext(ctx, `SELECT `+rolloverColumns+` FROM rollovers ORDER BY no DESC LIMIT 1`).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return Rollover{}, nil
	}
	return v, err
}

// StartRollover begins the move to what is not 0 in r. Only one can be open: ErrState.
func (tx *Tx) StartRollover(actor string, r Rollover) (int64, error) {
	if r.ToGeneration == 0 && r.ToAnchors == 0 {
		return 0, fmt.Errorf("rollover: %w: nothing would change", ErrInvalid)
	}
	var no int64
	err := tx.row(`SELECT no FROM rollovers WHERE open = 1`, nil, &no)
	if err == nil {
		return 0, fmt.Errorf("%w: rollover %d is not over", ErrState, no)
	}
	if !errors.Is(err, ErrNotFound) {
		return 0, err
	}
	if err := tx.row(`SELECT COALESCE(MAX(no), 0) + 1 FROM rollovers`, nil, &no); err != nil {
		return 0, err
	}
	err = tx.exec(`INSERT INTO rollovers (open, `+rolloverColumns+`) VALUES (1, ?, ?, ?, ?, ?, 'planned', ?, 0, 0, ?)`, no,
		int64(r.FromGeneration), int64(r.ToGeneration), int64(r.FromAnchors), int64(r.ToAnchors), ms(tx.now), actor)
	if err != nil {
		return 0, err
	}
	tx.tell(Change{Kind: RolloverChanged})
	return no, tx.audit(actor, "rollover.start", fmt.Sprint(no), detail{"generation": fmt.Sprint(r.ToGeneration), "anchors": fmt.Sprint(r.ToAnchors)})
}

// openRollover reads the open rollover; none is ErrState.
func (tx *Tx) openRollover() (Rollover, error) {
	s, err := tx.w.stmt(`SELECT ` + rolloverColumns + ` FROM rollovers WHERE open = 1`)
	if err != nil {
		return Rollover{}, err
	}
	r, err := scanRollover(s.QueryRow().Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return Rollover{}, fmt.Errorf("%w: no rollover is open", ErrState)
	}
	return r, err
}

// RolloverStep moves the open rollover one state on: planned, signing, signed, moving.
// To where it stands already changes nothing.
func (tx *Tx) RolloverStep(actor string, to RolloverState) error {
	r, err := tx.openRollover()
	if err != nil || r.State == to {
		return err
	}
	rank := func(s RolloverState) int {
		return strings.Index("planned signing signed moving", string(s))
	}
	if rank(to) < rank(r.State) {
		return fmt.Errorf("rollover %d: %w: it is %s", r.No, ErrState, r.State)
	}
	if to == RolloverMoving {
		if err := tx.mayMove(r); err != nil {
			return err
		}
		if err := tx.exec(`UPDATE rollovers SET moving = ? WHERE no = ?`, ms(tx.now), r.No); err != nil {
			return err
		}
	}
	if err := tx.exec(`UPDATE rollovers SET state = ? WHERE no = ?`, string(to), r.No); err != nil {
		return err
	}
	tx.tell(Change{Kind: RolloverChanged})
	return tx.audit(actor, "rollover."+string(to), fmt.Sprint(r.No), nil)
}

// mayMove: what the devices are to move to must be here.
func (tx *Tx) mayMove(r Rollover) error {
	var n int
	if r.ToGeneration != 0 {
		if err := tx.row(`SELECT COUNT(*) FROM generations WHERE number = ? AND state = 'active'`, []any{int64(r.ToGeneration)}, &n); err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("rollover %d: %w: the CA of generation %d is not here yet", r.No, ErrState, r.ToGeneration)
		}
	}
	if r.ToAnchors != 0 {
		n, err := tx.execN(`UPDATE anchor_sets SET offered = 1 WHERE sequence = ?`, int64(r.ToAnchors))
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("rollover %d: %w: anchor set %d is not here yet", r.No, ErrState, r.ToAnchors)
		}
	}
	return nil
}

// unproven selects the members of a rollover that have not arrived: they hold a
// certificate of an older generation and did not connect last with one of the new, or
// use an older anchor set. Parameters: to_generation twice, to_anchors.
const unproven = `
	(EXISTS (SELECT 1 FROM certificates c WHERE c.kind = 'device' AND c.name = printf('%08X', d.id) AND c.state = 'active' AND c.generation < ?)
	  AND NOT EXISTS (SELECT 1 FROM certificates c WHERE c.fingerprint = p.fingerprint AND c.state = 'active' AND c.generation = ?)
	 OR COALESCE(p.anchors, 0) < ?)`

// membersFrom: whoever may connect, now or again later, is a member.
const membersFrom = ` FROM devices d LEFT JOIN device_pki p ON p.device = d.id WHERE d.state IN ('active', 'quarantined') `

func unprovenArgs(r Rollover) []any {
	return []any{int64(r.ToGeneration), int64(r.ToGeneration), int64(r.ToAnchors)}
}

// RetireRollover ends the open rollover: certificates of older generations no longer
// open the door. While a device is unproven that is not in waive, it is ErrState.
func (tx *Tx) RetireRollover(actor string, waive []identity.ID) error {
	r, err := tx.openRollover()
	if err != nil {
		return err
	}
	if r.State != RolloverMoving {
		return fmt.Errorf("rollover %d: %w: it is %s, its devices have not moved", r.No, ErrState, r.State)
	}
	left, err := tx.unprovenDevices(r)
	if err != nil {
		return err
	}
	named := map[identity.ID]bool{}
	for _, id := range waive {
		named[id] = true
	}
	var waived, open []string
	for _, id := range left {
		if named[id] {
			waived = append(waived, id.String())
		} else {
			open = append(open, id.String())
		}
	}
	if len(open) > 0 {
		return fmt.Errorf("rollover %d: %w: %d unproven: %s", r.No, ErrState, len(open), some(open, 10))
	}
	if r.ToGeneration != 0 {
		if err := tx.retireGenerations(r.ToGeneration); err != nil {
			return err
		}
	}
	return tx.endRollover(actor, r, RolloverRetired, detail{"waived": strings.Join(waived, " ")})
}

// some names the first few of a list.
func some(list []string, n int) string {
	if len(list) > n {
		return strings.Join(list[:n], ", ") + ", ..."
	}
	return strings.Join(list, ", ")
}

func (tx *Tx) unprovenDevices(r Rollover) (ids []identity.ID, err error) {
	s, err := tx.w.stmt(`SELECT d.id` + membersFrom + `AND ` + unproven + ` ORDER BY d.id`)
	if err != nil {
		return nil, err
	}
	rows, err := s.Query(unprovenArgs(r)...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var id int64
		if err := rows.Scan(&id); err != nil {
			return nil, err
		}
		ids = append(ids, identity.ID(id))
	}
	return ids, rows.Err()
}

// retireGenerations shuts out every device certificate older than generation to.
func (tx *Tx) retireGenerations(to uint32) error {
	if err := tx.supersedeAll(`generation < ?`, int64(to)); err != nil {
		return err
	}
	return tx.exec(`UPDATE generations SET state = 'retired' WHERE number < ?`, int64(to))
}

// supersedeAll ends all active device certificates that meet a condition on
// certificates.
func (tx *Tx) supersedeAll(where string, args ...any) error {
	s, err := tx.w.stmt(`SELECT fingerprint, name FROM certificates WHERE kind = 'device' AND state = 'active' AND ` + where)
	if err != nil {
		return err
	}
	rows, err := s.Query(args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var f sql.RawBytes
		p := identity.Principal{Kind: identity.Device}
		if err := rows.Scan(&f, &p.Name); err != nil {
			return err
		}
		if len(f) != 32 {
			return fmt.Errorf("certificate of %s: a fingerprint of %d bytes", p.Name, len(f))
		}
		tx.tell(Change{Kind: CertificateRemoved, Principal: p, Active: ActiveCertificate{Fingerprint: [32]byte(f), Principal: p}})
	}
	if err := errors.Join(rows.Err(), rows.Close()); err != nil {
		return err
	}
	return tx.exec(`UPDATE certificates SET state = 'superseded' WHERE kind = 'device' AND state = 'active' AND `+where, args...)
}

func (tx *Tx) endRollover(actor string, r Rollover, to RolloverState, d detail) error {
	err := tx.exec(`UPDATE rollovers SET state = ?, open = NULL, ended = ? WHERE no = ?`, string(to), ms(tx.now), r.No)
	if err != nil {
		return err
	}
	tx.tell(Change{Kind: RolloverChanged})
	return tx.audit(actor, "rollover."+string(to), fmt.Sprint(r.No), d)
}

// AbortRollover ends the open rollover the other way. A device that connected last with
// its new certificate keeps both until it has come back with the old one; of all others
// the new certificates are withdrawn. A set of anchors that was not taken yet is kept
// back; a device that has taken it keeps it: it can never be taken back.
func (tx *Tx) AbortRollover(actor string) error {
	r, err := tx.openRollover()
	if err != nil {
		return err
	}
	if r.ToGeneration != 0 {
		err := tx.supersedeAll(`generation = ? AND NOT EXISTS (SELECT 1 FROM device_pki p WHERE p.fingerprint = certificates.fingerprint)
			AND EXISTS (SELECT 1 FROM certificates o WHERE o.kind = 'device' AND o.name = certificates.name AND o.state = 'active' AND o.generation < ?)`,
			int64(r.ToGeneration), int64(r.ToGeneration))
		if err != nil {
			return err
		}
	}
	if r.ToAnchors != 0 {
		if err := tx.exec(`UPDATE anchor_sets SET offered = 0 WHERE sequence = ?`, int64(r.ToAnchors)); err != nil {
			return err
		}
	}
	return tx.endRollover(actor, r, RolloverAborted, nil)
}

// RolloverProgress notes a step of a device in the open rollover; without one it does
// nothing. Installed needs an offer before; failed keeps its reason until the next offer.
func (tx *Tx) RolloverProgress(id identity.ID, to Progress, reason string) error {
	var no int64
	switch err := tx.row(`SELECT no FROM rollovers WHERE open = 1`, nil, &no); {
	case errors.Is(err, ErrNotFound):
		return nil
	case err != nil:
		return err
	}
	if to == ProgressInstalled {
		return tx.exec(`UPDATE rollover_devices SET state = 'installed', reason = '', at = ? WHERE rollover = ? AND device = ?`,
			ms(tx.now), no, int64(id))
	}
	if err := tx.deviceKnown(id); err != nil {
		return err
	}
	return tx.exec(`INSERT INTO rollover_devices (rollover, device, state, reason, at) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (rollover, device) DO UPDATE SET state = excluded.state, reason = excluded.reason, at = excluded.at`,
		no, int64(id), string(to), reason, ms(tx.now))
}

// Members calls fn for each device in the rollover v, by id. Whether one that is old is
// absent the caller decides who knows which devices are connected.
func (r *Registry) Members(ctx context.Context, v Rollover, fn func(Member) error) error {
	args := append(unprovenArgs(v), v.No)
	rows, err := r.read.QueryContext(ctx, `SELECT d.id, d.last_seen, COALESCE(p.anchors, 0), COALESCE(p.pending, 0), `+unproven+`,
		COALESCE(v.state, ''), COALESCE(v.reason, ''), COALESCE(v.at, 0)
		FROM devices d LEFT JOIN device_pki p ON p.device = d.id LEFT JOIN rollover_devices v ON v.rollover = ? AND v.device = d.id
		WHERE d.state IN ('active', 'quarantined') ORDER BY d.id`, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		m, err := scanMember(rows, v)
		if err != nil {
			return err
		}
		if err := fn(m); err != nil {
			return err
		}
	}
	return rows.Err()
}

func scanMember(rows *sql.Rows, v Rollover) (m Member, err error) {
	var id, seen, at, anchors, pending int64
	var open bool
	if err := rows.Scan(&id, &seen, &anchors, &pending, &open, &m.Progress, &m.Reason, &at); err != nil {
		return m, err
	}
	m.ID, m.LastSeen, m.At = identity.ID(id), fromMS(seen), fromMS(at)
	m.Anchors, m.Pending = uint64(anchors), uint64(pending)
	switch {
	case !open:
		m.Progress, m.Reason = ProgressProven, ""
	case m.Progress == "" && !v.MovingSince.IsZero() && m.LastSeen.Before(v.MovingSince):
		m.Progress = ProgressAbsent
	case m.Progress == "":
		m.Progress = ProgressOld
	}
	return m, nil
}

// Unsigned lists devices above after that have no certificate of a generation, by id.
func (r *Registry) Unsigned(ctx context.Context, generation uint32, after identity.ID, limit int) ([]Unsigned, error) {
	rows, err := r.read.QueryContext(ctx, `SELECT d.id, s.der,
		(SELECT c.der FROM certificates c WHERE c.kind = 'device' AND c.name = printf('%08X', d.id) AND c.state = 'active'
		  AND c.generation < ? ORDER BY c.generation DESC LIMIT 1)
		FROM devices d JOIN csrs s ON s.device = d.id
		WHERE d.id > ? AND d.state IN ('active', 'quarantined') AND NOT EXISTS (SELECT 1 FROM certificates c
		  WHERE c.kind = 'device' AND c.name = printf('%08X', d.id) AND c.state = 'active' AND c.generation = ?)
		ORDER BY d.id LIMIT ?`, int64(generation), int64(after), int64(generation), limitOr(limit))
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []Unsigned
	for rows.Next() {
		var u Unsigned
		var id int64
		if err := rows.Scan(&id, &u.CSR, &u.Certificate); err != nil {
			return nil, err
		}
		u.ID = identity.ID(id)
		list = append(list, u)
	}
	return list, rows.Err()
}

// CountUnsigned tells how many devices Unsigned would list.
func (r *Registry) CountUnsigned(ctx context.Context, generation uint32) (n int, err error) {
	err = r.read.QueryRowContext(ctx, `SELECT COUNT(*) FROM devices d JOIN csrs s ON s.device = d.id
		WHERE d.state IN ('active', 'quarantined') AND NOT EXISTS (SELECT 1 FROM certificates c
		  WHERE c.kind = 'device' AND c.name = printf('%08X', d.id) AND c.state = 'active' AND c.generation = ?)`,
		int64(generation)).Scan(&n)
	return n, err
}

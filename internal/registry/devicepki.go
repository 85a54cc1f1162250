package registry

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"hawser/internal/identity"
)

// AddGeneration makes a device CA known. One that is known already must be the same.
func (tx *Tx) AddGeneration(actor string, number uint32, ca []byte) error {
	var have []byte
	err := tx.row(`SELECT ca FROM generations WHERE number = ?`, []any{int64(number)}, &have)
	if err == nil && string(have) == string(ca) {
		return nil
	}
	if err == nil {
		return fmt.Errorf("generation %d has another device CA: %w", number, ErrExists)
	}
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	if err := tx.exec(`INSERT INTO generations (number, ca, state, at) VALUES (?, ?, 'active', ?)`, int64(number), ca, ms(tx.now)); err != nil {
		return err
	}
	return tx.audit(actor, "generation.add", fmt.Sprint(number), nil)
}

// Generations lists the device CAs, the oldest first.
func (r *Registry) Generations(ctx context.Context) ([]Generation, error) {
	rows, err := r.read.QueryContext(ctx, `SELECT number, ca, state = 'active', at FROM generations ORDER BY number`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []Generation
	for rows.Next() {
		var g Generation
		var at int64
		if err := rows.Scan(&g.Number, &g.CA, &g.Active, &at); err != nil {
			return nil, err
		}
		g.At = fromMS(at)
		list = append(list, g)
	}
	return list, rows.Err()
}

// AddAnchorSet makes a signed set known. One that is known already must be the same.
func (tx *Tx) AddAnchorSet(actor string, sequence uint64, cose []byte, offered bool) error {
	var have []byte
	err := tx.row(`SELECT cose FROM anchor_sets WHERE sequence = ?`, []any{int64(sequence)}, &have)
	if err == nil && string(have) == string(cose) {
		return nil
	}
	if err == nil {
		return fmt.Errorf("another anchor set has the number %d: %w", sequence, ErrExists)
	}
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	flag := 0
	if offered {
		flag = 1
	}
	if err := tx.exec(`INSERT INTO anchor_sets (sequence, cose, offered, at) VALUES (?, ?, ?, ?)`, int64(sequence), cose, flag, ms(tx.now)); err != nil {
		return err
	}
	return tx.audit(actor, "anchors.add", fmt.Sprint(sequence), nil)
}

// AnchorSets lists the signed sets, the oldest first.
func (r *Registry) AnchorSets(ctx context.Context) ([]AnchorSet, error) {
	rows, err := r.read.QueryContext(ctx, `SELECT sequence, cose, offered, at FROM anchor_sets ORDER BY sequence`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []AnchorSet
	for rows.Next() {
		var s AnchorSet
		var sequence, at int64
		if err := rows.Scan(&sequence, &s.COSE, &s.Offered, &at); err != nil {
			return nil, err
		}
		s.Sequence, s.At = uint64(sequence), fromMS(at)
		list = append(list, s)
	}
	return list, rows.Err()
}

// OldestAnchors is the lowest sequence of a set that a device which may connect, now or
// again, still uses; 0 where there is no device.
func (r *Registry) OldestAnchors(ctx context.Context) (uint64, error) {
	var n int64
	err := r.read.QueryRowContext(ctx, `SELECT COALESCE(MIN(p.anchors), 0) FROM device_pki p JOIN devices d ON d.id = p.device
		WHERE d.state IN ('active', 'quarantined')`).Scan(&n)
	return uint64(n), err
}

// SaveFingerprint notes which certificate a device was admitted with. After an abort, one
// that has come back with an older certificate loses the new one. No audit row for the
// fingerprint: the log tells who connected.
func (tx *Tx) SaveFingerprint(id identity.ID, fingerprint [32]byte) error {
	n, err := tx.execN(`UPDATE device_pki SET fingerprint = ?, at = ? WHERE device = ?`, fingerprint[:], ms(tx.now), int64(id))
	if err != nil {
		return err
	}
	if n == 0 {
		return fmt.Errorf("device %s: %w", id, ErrNotFound)
	}
	var aborted int64
	err = tx.row(`SELECT to_generation FROM rollovers WHERE state = 'aborted' AND no = (SELECT MAX(no) FROM rollovers)`, nil, &aborted)
	if errors.Is(err, ErrNotFound) || err == nil && aborted == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	var used int64
	err = tx.row(`SELECT generation FROM certificates WHERE fingerprint = ? AND state = 'active'`, []any{fingerprint[:]}, &used)
	if errors.Is(err, ErrNotFound) || err == nil && used >= aborted {
		return nil
	}
	if err != nil {
		return err
	}
	return tx.endCertificates(identity.DevicePrincipal(id), CertificateSuperseded,
		`SELECT fingerprint FROM certificates WHERE kind = 'device' AND name = ? AND state = 'active' AND generation = ?`, id.String(), aborted)
}

// SaveAnchors notes which set a device uses and which it stores unproven. No audit row:
// its report is in the log.
func (tx *Tx) SaveAnchors(id identity.ID, sequence, pending uint64) error {
	n, err := tx.execN(`UPDATE device_pki SET anchors = ?, pending = ?, at = ? WHERE device = ?`, int64(sequence), int64(pending), ms(tx.now), int64(id))
	if err == nil && n == 0 {
		err = fmt.Errorf("device %s: %w", id, ErrNotFound)
	}
	return err
}

// bornPKI notes the set that a new device pins: the newest one.
func (tx *Tx) bornPKI(id identity.ID) error {
	return tx.exec(`INSERT INTO device_pki (device, anchors, pending, at)
		VALUES (?, (SELECT COALESCE(MAX(sequence), 1) FROM anchor_sets), 0, 0) ON CONFLICT (device) DO NOTHING`, int64(id))
}

// Fingerprints calls fn with the certificate that each device was last admitted with.
func (r *Registry) Fingerprints(ctx context.Context, fn func(id identity.ID, fingerprint [32]byte)) error {
	rows, err := r.read.QueryContext(ctx, `SELECT device, fingerprint FROM device_pki WHERE fingerprint IS NOT NULL`)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var id int64
		var f sql.RawBytes
		if err := rows.Scan(&id, &f); err != nil {
			return err
		}
		if len(f) != 32 {
			return fmt.Errorf("device %s: a fingerprint of %d bytes", identity.ID(id), len(f))
		}
		fn(identity.ID(id), [32]byte(f))
	}
	return rows.Err()
}

// Due tells what a device is to be offered while v is the last rollover: the certificate
// of the generation it should use, and the next anchor set after the one it uses.
func (r *Registry) Due(ctx context.Context, v Rollover, id identity.ID) (Due, error) {
	var d Due
	var state string
	var anchors, used int64
	err := r.read.QueryRowContext(ctx, `SELECT d.state, COALESCE(p.anchors, 0),
		COALESCE((SELECT c.generation FROM certificates c WHERE c.fingerprint = p.fingerprint AND c.state = 'active'), 0)
		FROM devices d LEFT JOIN device_pki p ON p.device = d.id WHERE d.id = ?`, int64(id)).Scan(&state, &anchors, &used)
	if errors.Is(err, sql.ErrNoRows) || err == nil && DeviceState(state) != DeviceActive {
		return d, nil
	}
	if err != nil {
		return d, err
	}
	if want := v.wanted(uint32(used)); want != 0 {
		err = r.read.QueryRowContext(ctx, `SELECT der, generation FROM certificates WHERE kind = 'device' AND name = ? AND state = 'active'
			AND generation = ?`, id.String(), int64(want)).Scan(&d.Certificate, &d.Generation)
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return d, err
		}
	}
	var sequence int64
	err = r.read.QueryRowContext(ctx, `SELECT cose, sequence FROM anchor_sets WHERE sequence > ? AND offered = 1 ORDER BY sequence LIMIT 1`, anchors).
		Scan(&d.Anchors, &sequence)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return d, err
	}
	d.Sequence = uint64(sequence)
	return d, nil
}

// wanted is the generation that a device which uses one should be offered, 0 for none:
// the new one while the fleet moves, the old one after an abort.
func (r *Rollover) wanted(used uint32) uint32 {
	switch {
	case r.ToGeneration == 0:
	case r.State == RolloverMoving && used != r.ToGeneration:
		return r.ToGeneration
	case r.State == RolloverAborted && used == r.ToGeneration:
		return r.FromGeneration
	}
	return 0
}

package registry

import (
	"context"
	"errors"
	"fmt"

	"hawser/internal/identity"
)

// SetDeviceState revokes, quarantines or retires a device, or takes it out of
// quarantine. Of a revoked and of a retired one the certificates are revoked, the
// sessions, with Will and subscriptions, are deleted, and the pending commands end as
// cancelled or, if they were delivered, as unknown; only Unrevoke brings it back.
func (tx *Tx) SetDeviceState(actor string, id identity.ID, to DeviceState, reason string) error {
	from, err := tx.deviceState(id)
	if err != nil {
		return err
	}
	if !deviceMay(from, to) {
		return fmt.Errorf("device %s: %w: it is %s", id, ErrState, from)
	}
	if err := tx.writeState(actor, "device."+string(to), id, to, detail{"from": string(from), "reason": reason}); err != nil {
		return err
	}
	p := identity.DevicePrincipal(id)
	if to == DeviceActive {
		tx.tell(Change{Kind: DeviceChanged, Principal: p})
		return nil
	}
	tx.tell(Change{Kind: DeviceBarred, Principal: p, Final: to != DeviceQuarantined})
	if to == DeviceQuarantined {
		return nil
	}
	if err := tx.endCommands(actor, id); err != nil {
		return err
	}
	return tx.expel(p)
}

func (tx *Tx) deviceState(id identity.ID) (s DeviceState, err error) {
	if err = tx.row(`SELECT state FROM devices WHERE id = ?`, []any{int64(id)}, &s); err != nil {
		err = fmt.Errorf("device %s: %w", id, err)
	}
	return s, err
}

// writeState changes the row of a device and writes the audit row. Why a device is
// active again stands in the audit alone.
func (tx *Tx) writeState(actor, action string, id identity.ID, to DeviceState, d detail) error {
	reason := d["reason"]
	if to == DeviceActive {
		reason = ""
	}
	if err := tx.exec(`UPDATE devices SET state = ?, reason = ? WHERE id = ?`, string(to), reason, int64(id)); err != nil {
		return err
	}
	return tx.audit(actor, action, id.String(), d)
}

func deviceMay(from, to DeviceState) bool {
	switch from {
	case DeviceActive:
		return to == DeviceRevoked || to == DeviceQuarantined || to == DeviceRetired
	case DeviceQuarantined:
		return to == DeviceRevoked || to == DeviceActive || to == DeviceRetired
	case DeviceRetired:
		return to == DeviceRevoked
	}
	return false
}

// expel revokes the certificates of p and deletes its sessions.
func (tx *Tx) expel(p identity.Principal) error {
	if err := tx.revokeCertificates(p); err != nil {
		return err
	}
	return tx.exec(`DELETE FROM sessions WHERE kind = ? AND name = ?`, int(p.Kind), p.Name)
}

// BarDevices sets many devices to revoked or retired. Those that are it already are
// passed over; changed are the others. An id that is not known, or may not go into
// that state, is an error: then none is changed.
func (tx *Tx) BarDevices(actor string, ids []identity.ID, to DeviceState, reason string) (changed []identity.ID, err error) {
	if to != DeviceRevoked && to != DeviceRetired {
		return nil, fmt.Errorf("bar devices as %q: %w", to, ErrInvalid)
	}
	for _, id := range ids {
		have, err := tx.deviceState(id)
		switch {
		case err != nil:
			return nil, err
		case have == to:
			continue
		}
		if err := tx.SetDeviceState(actor, id, to, reason); err != nil {
			return nil, err
		}
		changed = append(changed, id)
	}
	return changed, nil
}

// Unrevoke brings a revoked or retired device back, with the certificates that it
// had; n of them open the door again: those of a generation that was retired meanwhile
// do not. What was deleted with it (sessions, queued and retained messages, commands)
// stays gone.
func (tx *Tx) Unrevoke(actor string, id identity.ID, reason string) (n int, err error) {
	from, err := tx.deviceState(id)
	if err != nil {
		return 0, err
	}
	if from != DeviceRevoked && from != DeviceRetired {
		return 0, fmt.Errorf("device %s: %w: it is %s", id, ErrState, from)
	}
	p := identity.DevicePrincipal(id)
	err = tx.exec(`UPDATE certificates SET was = '', state = CASE WHEN was = 'active' AND EXISTS (SELECT 1 FROM generations g
		WHERE g.number = certificates.generation AND g.state = 'retired') THEN 'superseded' ELSE was END
		WHERE kind = ? AND name = ? AND state = 'revoked' AND was <> ''`, p.Kind.String(), p.Name)
	if err != nil {
		return 0, err
	}
	err = tx.row(`SELECT COUNT(*) FROM certificates WHERE kind = ? AND name = ? AND state = 'active'`, []any{p.Kind.String(), p.Name}, &n)
	if err != nil {
		return 0, err
	}
	d := detail{"from": string(from), "reason": reason, "certificates": fmt.Sprint(n)}
	if err := tx.writeState(actor, "device.unrevoked", id, DeviceActive, d); err != nil {
		return 0, err
	}
	tx.tell(Change{Kind: DeviceChanged, Principal: p})
	return n, tx.forgetBoots(id)
}

// Release takes a device out of quarantine and settles what was reported of two
// holders of its identity; an active one with such a report may be released, too.
func (tx *Tx) Release(actor string, id identity.ID, reason string) error {
	from, err := tx.deviceState(id)
	if err != nil {
		return err
	}
	var clones int
	if err := tx.row(`SELECT COUNT(*) FROM clones WHERE device = ?`, []any{int64(id)}, &clones); err != nil {
		return err
	}
	switch {
	case from == DeviceQuarantined:
		err = tx.SetDeviceState(actor, id, DeviceActive, reason)
	case from == DeviceActive && clones > 0:
		err = tx.audit(actor, "device.settled", id.String(), detail{"reason": reason})
	default:
		err = fmt.Errorf("device %s: %w: it is %s", id, ErrState, from)
	}
	if err != nil {
		return err
	}
	return tx.forgetBoots(id)
}

// QueueDropped writes into the audit how many queued messages went with a device
// that may not connect; of any other one it writes nothing.
func (tx *Tx) QueueDropped(actor string, id identity.ID, messages int) error {
	from, err := tx.deviceState(id)
	if errors.Is(err, ErrNotFound) || err == nil && from == DeviceActive {
		return nil
	}
	if err != nil {
		return err
	}
	return tx.audit(actor, "device.queue-dropped", id.String(), detail{"messages": fmt.Sprint(messages)})
}

// States gives the states of the devices in ids that are known.
func (r *Registry) States(ctx context.Context, ids []identity.ID) (map[identity.ID]DeviceState, error) {
	stmt, err := r.read.PrepareContext(ctx, `SELECT state FROM devices WHERE id = ?`)
	if err != nil {
		return nil, err
	}
	defer stmt.Close()
	known := make(map[identity.ID]DeviceState, len(ids))
	for _, id := range ids {
		var s DeviceState
		err := orNotFound(stmt.QueryRowContext(ctx, int64(id)).Scan(&s), "device "+id.String())
		switch {
		case err == nil:
			known[id] = s
		case !errors.Is(err, ErrNotFound):
			return nil, err
		}
	}
	return known, nil
}

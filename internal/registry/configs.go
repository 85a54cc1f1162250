package registry

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"hawser/internal/identity"
)

// SetConfig replaces the desired configuration of a device and gives its new
// version, which is higher than any before and than any the device has reported.
func (tx *Tx) SetConfig(actor string, id identity.ID, document []byte) (version uint64, err error) {
	var last, epoch int64
	err = tx.row(`SELECT COALESCE(MAX(c.version, c.applied_version), 0), m.epoch
		FROM devices d JOIN meta m ON m.one = 1 LEFT JOIN configs c ON c.device = d.id WHERE d.id = ?`,
		[]any{int64(id)}, &last, &epoch)
	if err != nil {
		return 0, fmt.Errorf("device %s: %w", id, err)
	}
	version = nextInEpoch(uint64(last), uint64(epoch))
	err = tx.exec(`INSERT INTO configs (device, version, document, at, applied_version, applied_status, applied_text, applied_at)
		VALUES (?, ?, ?, ?, 0, 0, '', 0)
		ON CONFLICT (device) DO UPDATE SET version = excluded.version, document = excluded.document, at = excluded.at`,
		int64(id), int64(version), document, ms(tx.now))
	if err != nil {
		return 0, err
	}
	if err := tx.caughtUp(id, AheadConfig, ""); err != nil {
		return 0, err
	}
	tx.tell(Change{Kind: ConfigChanged, Principal: identity.DevicePrincipal(id)})
	return version, tx.audit(actor, "config.set", id.String(), detail{"version": fmt.Sprint(version)})
}

// ConfigApplied notes what a device says about its configuration. Versions at
// or above 1<<63 are ErrInvalid.
func (tx *Tx) ConfigApplied(id identity.ID, version uint64, status uint8, text string, at time.Time) error {
	if int64(version) < 0 {
		return fmt.Errorf("configuration version %d of %s: %w", version, id, ErrInvalid)
	}
	if err := tx.deviceKnown(id); err != nil {
		return err
	}
	err := tx.exec(`INSERT INTO configs (device, version, document, at, applied_version, applied_status, applied_text, applied_at)
		VALUES (?, 0, NULL, 0, ?, ?, ?, ?)
		ON CONFLICT (device) DO UPDATE SET applied_version = excluded.applied_version,
			applied_status = excluded.applied_status, applied_text = excluded.applied_text, applied_at = excluded.applied_at`,
		int64(id), int64(version), status, text, ms(at))
	if err != nil {
		return err
	}
	var desired int64
	if err := tx.row(`SELECT version FROM configs WHERE device = ?`, []any{int64(id)}, &desired); err != nil {
		return err
	}
	if int64(version) > desired {
		if err := tx.noteIfRestored(Ahead{Device: id, Kind: AheadConfig, Detail: fmt.Sprint(version), At: at}); err != nil {
			return err
		}
	}
	return tx.audit("device "+id.String(), "config.applied", id.String(),
		detail{"version": fmt.Sprint(version), "status": fmt.Sprint(status)})
}

// DeviceConfig reads the configuration of a device; none yet is the zero
// DeviceConfig with the id.
func (r *Registry) DeviceConfig(ctx context.Context, id identity.ID) (DeviceConfig, error) {
	c := DeviceConfig{Device: id}
	var version, at, applied, appliedAt int64
	err := r.read.QueryRowContext(ctx, `SELECT version, document, at, applied_version, applied_status, applied_text, applied_at
		FROM configs WHERE device = ?`, int64(id)).
		Scan(&version, &c.Document, &at, &applied, &c.AppliedStatus, &c.AppliedText, &appliedAt)
	if errors.Is(err, sql.ErrNoRows) {
		return c, nil
	}
	c.Version, c.At = uint64(version), fromMS(at)
	c.AppliedVersion, c.AppliedAt = uint64(applied), fromMS(appliedAt)
	return c, err
}

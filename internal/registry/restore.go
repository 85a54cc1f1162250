package registry

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"hawser/internal/identity"
)

// Snapshot writes a copy of the registry, as of one moment, to path, which must not
// exist. Changes go on meanwhile. The copy is not fsynced.
func (r *Registry) Snapshot(ctx context.Context, path string) error {
	db, err := openDB(r.path, "rw")
	if err != nil {
		return fmt.Errorf("copy registry %s: %w", r.path, err)
	}
	defer db.Close()
	if _, err := db.ExecContext(ctx, `VACUUM INTO ?`, path); err != nil {
		return fmt.Errorf("copy registry %s: %w", r.path, err)
	}
	return nil
}

// MarkRestored says that this registry comes out of a backup taken at taken. The
// next RecordStart begins a new epoch. requeue is what the log's Backup gave.
func (tx *Tx) MarkRestored(actor string, taken time.Time, requeue uint64) error {
	err := tx.exec(`UPDATE meta SET backup_of = ?, restored = ?, restore_due = 1, requeue = ?`, ms(taken), ms(tx.now), int64(requeue))
	if err != nil {
		return err
	}
	return tx.audit(actor, "restore", "server", detail{"backup": taken.UTC().Format(time.RFC3339)})
}

// Requeued says that the queues are whole: MarkRestored's requeue is done with.
func (tx *Tx) Requeued() error { return tx.exec(`UPDATE meta SET requeue = 0`) }

// epochOf is the epoch of a first start after a restore. It comes from the clock:
// what was restored twice from one backup must not begin the same epoch twice, and
// no file of a restored fleet tells of the time between. A clock that goes wrong
// still leaves an epoch above have.
func epochOf(have uint32, at time.Time) uint32 {
	since := at.Unix() - epochZero
	if since > int64(have) && since <= maxEpoch {
		return uint32(since)
	}
	return have + 1
}

// epochZero is the start of 2026 in unix seconds: epochs of restores count the
// seconds since then, and last until 2094.
const epochZero = 1767225600

// AheadKind says of what a device knows more than the registry.
type AheadKind string

// The kinds of Ahead.
const (
	AheadCertificate AheadKind = "certificate" // it holds one that was never imported here
	AheadCommand     AheadKind = "command"     // it has seen a command of which no answer is here
	AheadConfig      AheadKind = "config"      // it has a configuration that was never set here
	AheadAnchors     AheadKind = "anchors"     // it uses an anchor set that is not here
)

// Ahead is one thing that a device knows and the registry does not: what was
// restored is older than the device.
type Ahead struct {
	Device identity.ID
	Kind   AheadKind
	Detail string // fingerprint in hex, command id, version, sequence
	DER    []byte // of a certificate
	At     time.Time
}

// maxAheadDER bounds what is kept of a stranger's certificate, in bytes.
const maxAheadDER = 4096

// maxStrangers is how many devices are kept that are not in the registry.
const maxStrangers = 10_000

// NoteAhead keeps a, in place of what was known of the same device and kind. A
// device that is not known is ErrNotFound, but with a certificate: it was added
// after the backup was taken. Of those so many are kept, the others are ErrInvalid.
func (tx *Tx) NoteAhead(a Ahead) error {
	if len(a.DER) > maxAheadDER {
		return fmt.Errorf("certificate of %d bytes: %w", len(a.DER), ErrInvalid)
	}
	err := tx.deviceKnown(a.Device)
	if errors.Is(err, ErrNotFound) && a.Kind == AheadCertificate {
		err = tx.roomForStranger(a.Device)
	}
	if err != nil {
		return err
	}
	return tx.exec(`INSERT INTO ahead (device, kind, detail, der, at) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (device, kind) DO UPDATE SET detail = excluded.detail, der = excluded.der, at = excluded.at`,
		int64(a.Device), string(a.Kind), a.Detail, a.DER, ms(a.At))
}

func (tx *Tx) roomForStranger(id identity.ID) error {
	var n int
	err := tx.row(`SELECT COUNT(*) FROM ahead WHERE device <> ? AND device NOT IN (SELECT id FROM devices)`, []any{int64(id)}, &n)
	if err == nil && n >= maxStrangers {
		err = fmt.Errorf("%d devices that are not in the registry are noted already: %w", n, ErrInvalid)
	}
	return err
}

// noteIfRestored is NoteAhead in a registry that was restored; in any other what a
// says has another cause.
func (tx *Tx) noteIfRestored(a Ahead) error {
	var restored int64
	if err := tx.row(`SELECT restored FROM meta`, nil, &restored); err != nil || restored == 0 {
		return err
	}
	return tx.NoteAhead(a)
}

// AnchorsAhead notes that a device says that it uses an anchor set that is not here: in a
// registry that was restored, for in any other it is a lie.
func (tx *Tx) AnchorsAhead(id identity.ID, sequence uint64, at time.Time) error {
	return tx.noteIfRestored(Ahead{Device: id, Kind: AheadAnchors, Detail: strconv.FormatUint(sequence, 10), At: at})
}

// caughtUp forgets that a device knows more of a kind. detail "" is any.
func (tx *Tx) caughtUp(id identity.ID, kind AheadKind, detail string) error {
	return tx.exec(`DELETE FROM ahead WHERE device = ? AND kind = ? AND (? = '' OR detail = ?)`, int64(id), string(kind), detail, detail)
}

// Of a device that is barred nobody needs to know.
const aheadQuery = `SELECT a.device, a.kind, a.detail, a.der, a.at FROM ahead a LEFT JOIN devices d ON d.id = a.device WHERE COALESCE(d.state, 'active') = 'active'`

// Ahead lists what devices know and this registry does not, by device, after id
// (0: from the first).
func (r *Registry) Ahead(ctx context.Context, after identity.ID, limit int) ([]Ahead, error) {
	return r.ahead(ctx, aheadQuery+` AND a.device > ? ORDER BY a.device, a.kind LIMIT ?`, int64(after), limitOr(limit))
}

// AheadOf is Ahead for one device.
func (r *Registry) AheadOf(ctx context.Context, id identity.ID) ([]Ahead, error) {
	return r.ahead(ctx, aheadQuery+` AND a.device = ? ORDER BY a.kind`, int64(id))
}

// AheadCount is the number of devices that know more.
func (r *Registry) AheadCount(ctx context.Context) (n int, err error) {
	err = r.read.QueryRowContext(ctx, `SELECT COUNT(DISTINCT a.device) FROM ahead a LEFT JOIN devices d ON d.id = a.device WHERE COALESCE(d.state, 'active') = 'active'`).Scan(&n)
	return n, err
}

func (r *Registry) ahead(ctx context.Context, query string, args ...any) ([]Ahead, error) {
	rows, err := r.read.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []Ahead
	for rows.Next() {
		var a Ahead
		var id, at int64
		if err := rows.Scan(&id, &a.Kind, &a.Detail, &a.DER, &at); err != nil {
			return nil, err
		}
		a.Device, a.At = identity.ID(id), fromMS(at)
		list = append(list, a)
	}
	return list, rows.Err()
}

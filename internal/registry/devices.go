package registry

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"sort"
	"strconv"
	"strings"
	"time"

	"hawser/internal/identity"
)

// Enrol records a device's key and CSR and, where e has one, its certificate. A
// device that is known is enrolled again only with the same key: another key for
// this id, or this key under another id, is ErrKey. A device that may not
// connect is ErrState.
func (tx *Tx) Enrol(actor string, e Enrolment) error {
	if !e.ID.Issuable() || e.KeyHash == [32]byte{} || len(e.CSR) == 0 {
		return fmt.Errorf("enrol %s: %w: id, key and CSR are needed", e.ID, ErrInvalid)
	}
	if err := tx.checkKey(e.ID, e.KeyHash); err != nil {
		return fmt.Errorf("enrol %s: %w", e.ID, err)
	}
	if err := tx.enrolRow(e); err != nil {
		return fmt.Errorf("enrol %s: %w", e.ID, err)
	}
	d := detail{"key": fmt.Sprintf("%x", e.KeyHash)}
	if err := tx.audit(actor, "device.enrol", e.ID.String(), d); err != nil {
		return err
	}
	if err := tx.TagDevice(actor, e.ID, e.Tags, nil); err != nil {
		return err
	}
	if e.Certificate == nil {
		return nil
	}
	return tx.AddCertificate(actor, *e.Certificate)
}

// checkKey holds the rule that id and key belong together for life.
func (tx *Tx) checkKey(id identity.ID, hash [32]byte) error {
	var other int64
	err := tx.row(`SELECT id FROM devices WHERE key_hash = ?`, []any{hash[:]}, &other)
	if err == nil && identity.ID(other) != id {
		return fmt.Errorf("%w: this key is that of %s", ErrKey, identity.ID(other))
	}
	if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	var state string
	var have []byte
	err = tx.row(`SELECT state, key_hash FROM devices WHERE id = ?`, []any{int64(id)}, &state, &have)
	switch {
	case errors.Is(err, ErrNotFound):
		return tx.checkReserved(id)
	case err != nil:
		return err
	case have != nil && !bytes.Equal(have, hash[:]):
		return fmt.Errorf("%w: this id has another key", ErrKey)
	case DeviceState(state) != DeviceActive:
		return fmt.Errorf("%w: it is %s", ErrState, state)
	}
	return nil
}

func (tx *Tx) enrolRow(e Enrolment) error {
	at := ms(e.At)
	n, err := tx.execN(`UPDATE devices SET key_hash = ?, class = CASE WHEN ? = '' THEN class ELSE ? END WHERE id = ?`,
		e.KeyHash[:], e.Class, e.Class, int64(e.ID))
	if err != nil {
		return err
	}
	kind := DeviceChanged
	if n == 0 {
		kind = DeviceAdded
		err = tx.exec(`INSERT INTO devices (id, class, state, key_hash, created, enrolled, last_seen, reason, note, last_cid)
			VALUES (?, ?, 'active', ?, ?, 0, 0, '', '', 0)`, int64(e.ID), e.Class, e.KeyHash[:], at)
		if err != nil {
			return err
		}
	}
	if err := tx.bornPKI(e.ID); err != nil {
		return err
	}
	tx.tell(Change{Kind: kind, Principal: identity.DevicePrincipal(e.ID)})
	return tx.exec(`INSERT INTO csrs (device, der, at) VALUES (?, ?, ?)
		ON CONFLICT (device) DO NOTHING`, int64(e.ID), e.CSR, at)
}

// TagDevice adds and removes tags. A tag is 1 to 64 letters, digits and `-_.:/`.
func (tx *Tx) TagDevice(actor string, id identity.ID, add, remove []string) error {
	if len(add)+len(remove) == 0 {
		return nil
	}
	if err := tx.deviceKnown(id); err != nil {
		return err
	}
	for _, tag := range add {
		if !validTag(tag) {
			return fmt.Errorf("tag %q: %w: 1 to 64 letters, digits and -_.:/", tag, ErrInvalid)
		}
		err := tx.exec(`INSERT INTO device_tags (device, tag) VALUES (?, ?) ON CONFLICT (tag, device) DO NOTHING`, int64(id), tag)
		if err != nil {
			return err
		}
	}
	for _, tag := range remove {
		if err := tx.exec(`DELETE FROM device_tags WHERE device = ? AND tag = ?`, int64(id), tag); err != nil {
			return err
		}
	}
	tx.tell(Change{Kind: DeviceChanged, Principal: identity.DevicePrincipal(id)})
	return tx.audit(actor, "device.tag", id.String(), detail{"add": strings.Join(add, " "), "remove": strings.Join(remove, " ")})
}

func validTag(s string) bool {
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("-_.:/", c) >= 0:
		default:
			return false
		}
	}
	return len(s) > 0 && len(s) <= 64
}

// NoteDevice replaces the note and, unless it is empty, the class of a device.
func (tx *Tx) NoteDevice(actor string, id identity.ID, class, note string) error {
	n, err := tx.execN(`UPDATE devices SET note = ?, class = CASE WHEN ? = '' THEN class ELSE ? END WHERE id = ?`,
		note, class, class, int64(id))
	if err != nil {
		return err
	}
	if n == 0 {
		return fmt.Errorf("device %s: %w", id, ErrNotFound)
	}
	tx.tell(Change{Kind: DeviceChanged, Principal: identity.DevicePrincipal(id)})
	return tx.audit(actor, "device.note", id.String(), detail{"class": class, "note": note})
}

func (tx *Tx) deviceKnown(id identity.ID) error {
	var one int
	if err := tx.row(`SELECT 1 FROM devices WHERE id = ?`, []any{int64(id)}, &one); err != nil {
		return fmt.Errorf("device %s: %w", id, err)
	}
	return nil
}

// Seen is when a device was last connected.
type Seen struct {
	ID identity.ID
	At time.Time
}

// SaveSeen moves last-seen times forward; unknown ids are passed over.
func (tx *Tx) SaveSeen(list []Seen) error {
	for _, s := range list {
		err := tx.exec(`UPDATE devices SET last_seen = ? WHERE id = ? AND last_seen < ?`, ms(s.At), int64(s.ID), ms(s.At))
		if err != nil {
			return err
		}
	}
	return nil
}

// DeviceFilter selects devices; its zero value selects the first page of all.
type DeviceFilter struct {
	State   DeviceState // empty = any
	Class   string      // empty = any
	Tag     string      // empty = any
	Station string      // empty = any, or none
	Prefix  string      // up to eight upper-case hex digits
	After   identity.ID // ids above this one
	Limit   int         // 0 = 100

	FlashedSince time.Time // zero = any time
	FlashedUntil time.Time // before it; zero = any time
}

const deviceColumns = `d.id, d.class, d.state, d.key_hash, d.created, d.enrolled, d.last_seen, d.reason, d.note, d.last_cid,
	d.hello_at, d.hello_class, d.hello_firmware, d.hello_image, d.hello_tls, d.hello_boot, d.hello_nonce, d.hello_features, d.hello_encoding,
	d.station, d.hardware, d.flashed, d.block,
	COALESCE((SELECT GROUP_CONCAT(g.tag, ' ') FROM device_tags g WHERE g.device = d.id), '')`

// Devices lists devices in the order of their ids.
func (r *Registry) Devices(ctx context.Context, f DeviceFilter) ([]Device, error) {
	query, args, err := deviceQuery(f)
	if err != nil {
		return nil, err
	}
	rows, err := r.read.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []Device
	for rows.Next() {
		d, err := scanDevice(rows)
		if err != nil {
			return nil, err
		}
		list = append(list, d)
	}
	return list, rows.Err()
}

// deviceQuery writes the query of f. The unary plus keeps SQLite from choosing
// an index that would have to be sorted: rows come by id and a page is short.
func deviceQuery(f DeviceFilter) (string, []any, error) {
	low, high, err := prefixRange(f.Prefix)
	if err != nil {
		return "", nil, err
	}
	if f.After != 0 && int64(f.After)+1 > low {
		low = int64(f.After) + 1
	}
	q := `SELECT ` + deviceColumns + ` FROM devices d WHERE d.id BETWEEN ? AND ?`
	args := []any{low, high}
	if f.Tag != "" {
		q = `SELECT ` + deviceColumns + ` FROM device_tags t JOIN devices d ON d.id = t.device WHERE t.device BETWEEN ? AND ? AND t.tag = ?`
		args = append(args, f.Tag)
	}
	if f.State != "" {
		q += ` AND d.state = ?`
		args = append(args, string(f.State))
	}
	if f.Class != "" {
		q += ` AND d.class = ?`
		args = append(args, f.Class)
	}
	flashed, more := f.flashedBy()
	q, args = q+flashed, append(args, more...)
	order := ` ORDER BY d.id LIMIT ?`
	if f.Tag != "" {
		order = ` ORDER BY t.device LIMIT ?`
	}
	return q + order, append(args, limitOr(f.Limit)), nil
}

// flashedBy is the condition on where and when a device was flashed. One that never
// was meets none.
func (f *DeviceFilter) flashedBy() (q string, args []any) {
	if f.Station != "" {
		q, args = q+` AND +d.station = ?`, append(args, f.Station)
	}
	if !f.FlashedSince.IsZero() {
		q, args = q+` AND d.flashed >= ?`, append(args, ms(f.FlashedSince))
	}
	if !f.FlashedUntil.IsZero() {
		q, args = q+` AND d.flashed > 0 AND d.flashed < ?`, append(args, ms(f.FlashedUntil))
	}
	return q, args
}

func limitOr(n int) int {
	if n <= 0 {
		return 100
	}
	return n
}

// prefixRange gives the ids that begin with the digits of s.
func prefixRange(s string) (low, high int64, err error) {
	if len(s) > 8 || strings.ToUpper(s) != s {
		return 0, 0, fmt.Errorf("id prefix %q: %w: up to eight upper-case hex digits", s, ErrInvalid)
	}
	shift := uint(32 - 4*len(s))
	v := uint64(0)
	if s != "" {
		if v, err = strconv.ParseUint(s, 16, 32); err != nil {
			return 0, 0, fmt.Errorf("id prefix %q: %w: up to eight upper-case hex digits", s, ErrInvalid)
		}
	}
	return int64(v << shift), int64((v+1)<<shift) - 1, nil
}

// Device reads one device.
func (r *Registry) Device(ctx context.Context, id identity.ID) (Device, error) {
	rows, err := r.read.QueryContext(ctx, `SELECT `+deviceColumns+` FROM devices d WHERE d.id = ?`, int64(id))
	if err != nil {
		return Device{}, err
	}
	defer rows.Close()
	if !rows.Next() {
		if err := rows.Err(); err != nil {
			return Device{}, err
		}
		return Device{}, fmt.Errorf("device %s: %w", id, ErrNotFound)
	}
	return scanDevice(rows)
}

func scanDevice(rows *sql.Rows) (Device, error) {
	var d Device
	var h Hello
	var id, created, enrolled, seen, cid, helloAt, nonce, flashed int64
	var key, block []byte
	var features, tags string
	err := rows.Scan(&id, &d.Class, &d.State, &key, &created, &enrolled, &seen, &d.Reason, &d.Note, &cid,
		&helloAt, &h.Class, &h.Firmware, &h.Image, &h.TLS, &h.Boot, &nonce, &features, &h.Encoding,
		&d.Station, &d.Hardware, &flashed, &block, &tags)
	if err != nil {
		return Device{}, err
	}
	d.ID, d.LastCID = identity.ID(id), uint64(cid)
	d.Created, d.Enrolled, d.LastSeen = fromMS(created), fromMS(enrolled), fromMS(seen)
	copy(d.KeyHash[:], key)
	copy(d.Block[:], block)
	d.Flashed = fromMS(flashed)
	d.Tags = strings.Fields(tags)
	sort.Strings(d.Tags)
	if helloAt != 0 {
		h.At, h.Nonce = fromMS(helloAt), uint64(nonce)
		if err := json.Unmarshal([]byte(features), &h.Features); err != nil {
			return Device{}, fmt.Errorf("device %s: features: %w", d.ID, err)
		}
		d.Hello = &h
	}
	return d, nil
}

// DeviceCounts counts the devices of each state.
func (r *Registry) DeviceCounts(ctx context.Context) (map[DeviceState]int, error) {
	rows, err := r.read.QueryContext(ctx, `SELECT state, COUNT(*) FROM devices GROUP BY state`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	counts := map[DeviceState]int{}
	for rows.Next() {
		var s DeviceState
		var n int
		if err := rows.Scan(&s, &n); err != nil {
			return nil, err
		}
		counts[s] = n
	}
	return counts, rows.Err()
}

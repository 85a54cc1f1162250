package registry

import (
	"errors"
	"fmt"
	"time"

	"hawser/internal/identity"
)

// ErrNotFree reports an id that a station may not use.
var ErrNotFree = errors.New("not one of the station's free ids")

// Unit is one device out of a station's journal; the caller has verified it.
type Unit struct {
	Line        uint64 // of the journal
	ID          identity.ID
	Class       string
	Hardware    uint32
	KeyHash     [32]byte
	CSR         []byte // DER
	Block       [16]byte
	Flashed     time.Time
	Certificate Certificate
}

// BurntID is an id that will never be a device.
type BurntID struct {
	Line   uint64
	ID     identity.ID
	Reason string
}

// JournalPart is what a journal has beyond what was imported of it before.
type JournalPart struct {
	Station   string
	FromLines uint64   // how much was imported when it was read
	FromHead  [32]byte // and the hash of the last line of that
	Lines     uint64   // of the whole journal
	Head      [32]byte
	Units     []Unit
	Burnt     []BurntID
}

// ImportJournal takes in what a station has made: all of it or, with the line that is
// wrong, nothing. An id that is not one of the station's free ones, and an id or key that
// another device has, is refused. If the journal was imported by another meanwhile the error
// is ErrState.
func (tx *Tx) ImportJournal(actor string, j *JournalPart) error {
	var state StationState
	err := tx.row(`SELECT state FROM stations WHERE name = ?`, []any{j.Station}, &state)
	if err != nil {
		return fmt.Errorf("station %s: %w", j.Station, err)
	}
	if state != StationActive && len(j.Units) > 0 {
		return fmt.Errorf("station %s: %w: it is %s, and its units that were not imported before are refused", j.Station, ErrState, state)
	}
	n, err := tx.execN(`UPDATE stations SET lines = ?, head = ?, imported = ? WHERE name = ? AND lines = ? AND head = ?`,
		int64(j.Lines), j.Head[:], ms(tx.now), j.Station, int64(j.FromLines), j.FromHead[:])
	if err != nil {
		return err
	}
	if n == 0 {
		return fmt.Errorf("station %s: %w: its journal was imported by another at the same time", j.Station, ErrState)
	}
	for i := range j.Units {
		if err := tx.importUnit(actor, j.Station, &j.Units[i]); err != nil {
			return fmt.Errorf("line %d: %s: %w", j.Units[i].Line, j.Units[i].ID, err)
		}
	}
	for _, b := range j.Burnt {
		if err := tx.useID(j.Station, b.ID, nil, "burnt"); err != nil {
			return fmt.Errorf("line %d: %s: %w", b.Line, b.ID, err)
		}
	}
	return tx.audit(actor, "station.import", j.Station, detail{"lines": fmt.Sprint(j.Lines), "head": fmt.Sprintf("%x", j.Head),
		"units": fmt.Sprint(len(j.Units)), "burnt": fmt.Sprint(len(j.Burnt))})
}

// importUnit is Enrol, TagDevice and AddCertificate in one for a device that must be new.
func (tx *Tx) importUnit(actor, station string, u *Unit) error {
	if err := tx.useID(station, u.ID, u.Block[:], "used"); err != nil {
		return err
	}
	n, err := tx.execN(`INSERT INTO devices (id, class, state, key_hash, created, enrolled, last_seen, reason, note, last_cid, station, hardware, flashed, block)
		VALUES (?, ?, 'active', ?, ?, ?, 0, '', '', 0, ?, ?, ?, ?) ON CONFLICT DO NOTHING`, int64(u.ID), u.Class, u.KeyHash[:], ms(tx.now), ms(tx.now),
		station, int64(u.Hardware), ms(u.Flashed), u.Block[:])
	if err != nil {
		return err
	}
	if n == 0 {
		return tx.whyKnown(u)
	}
	if err := tx.exec(`INSERT INTO csrs (device, der, at) VALUES (?, ?, ?)`, int64(u.ID), u.CSR, ms(tx.now)); err != nil {
		return err
	}
	if err := tx.exec(`INSERT INTO device_pki (device, anchors, pending, at)
		VALUES (?, (SELECT anchors FROM station_blocks WHERE id = ?), 0, 0)`, int64(u.ID), u.Block[:]); err != nil {
		return err
	}
	if err := tx.unitCertificate(&u.Certificate); err != nil {
		return err
	}
	tx.tell(Change{Kind: DeviceAdded, Principal: u.Certificate.Principal})
	c := &u.Certificate
	tx.tell(Change{Kind: CertificateAdded, Principal: c.Principal, Active: ActiveCertificate{c.Fingerprint, c.Principal, c.Generation, c.NotBefore, c.NotAfter}})
	return tx.audit(actor, "device.import", u.ID.String(), detail{"station": station, "key": fmt.Sprintf("%x", u.KeyHash),
		"fingerprint": fmt.Sprintf("%x", c.Fingerprint), "line": fmt.Sprint(u.Line)})
}

func (tx *Tx) unitCertificate(c *Certificate) error {
	n, err := tx.execN(`INSERT INTO certificates (fingerprint, kind, name, generation, der, not_before, not_after, state, at)
		VALUES (?, 'device', ?, ?, ?, ?, ?, 'active', ?) ON CONFLICT DO NOTHING`, c.Fingerprint[:], c.Principal.Name,
		int64(c.Generation), c.DER, ms(c.NotBefore), ms(c.NotAfter), ms(tx.now))
	if err == nil && n == 0 {
		err = fmt.Errorf("its certificate: %w", ErrExists)
	}
	return err
}

// useID marks a free id of the station. block is nil where the line names none.
func (tx *Tx) useID(station string, id identity.ID, block []byte, to string) error {
	// The unary pluses keep SQLite from walking all free ids of the block.
	n, err := tx.execN(`UPDATE reserved_ids SET state = ? WHERE id = ? AND +state = 'free' AND +block IN
		(SELECT id FROM station_blocks WHERE station = ? AND signed > 0 AND (? IS NULL OR id = ?))`, to, int64(id), station, block, block)
	if err != nil || n == 1 {
		return err
	}
	var owner, state string
	var signed int64
	err = tx.row(`SELECT b.station, r.state, b.signed FROM reserved_ids r JOIN station_blocks b ON b.id = r.block WHERE r.id = ?`, []any{int64(id)}, &owner, &state, &signed)
	switch {
	case errors.Is(err, ErrNotFound):
		return fmt.Errorf("%w: it was never reserved", ErrNotFree)
	case err != nil:
		return err
	case owner != station:
		return fmt.Errorf("%w: it was reserved for station %s", ErrNotFree, owner)
	case state != "free":
		return fmt.Errorf("%w: it is %s already", ErrNotFree, state)
	case signed == 0:
		return fmt.Errorf("%w: its block was never signed", ErrNotFree)
	}
	return fmt.Errorf("%w: it is not in the block that the line names", ErrNotFree)
}

// whyKnown says what stands in the way of a new device.
func (tx *Tx) whyKnown(u *Unit) error {
	var other int64
	if err := tx.row(`SELECT id FROM devices WHERE key_hash = ?`, []any{u.KeyHash[:]}, &other); err == nil && identity.ID(other) != u.ID {
		return fmt.Errorf("%w: this key is that of %s", ErrKey, identity.ID(other))
	} else if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	return fmt.Errorf("device: %w, and did not come from this journal", ErrExists)
}

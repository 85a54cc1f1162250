package registry

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"hawser/internal/identity"
)

// ErrReserved reports an id that was given to a flashing bench.
var ErrReserved = errors.New("this id is reserved for a flashing bench")

// StationState says whether what a station makes is taken in.
type StationState string

// The states of a station.
const (
	StationActive  StationState = "active"
	StationRevoked StationState = "revoked"
)

// Station is one flashing bench.
type Station struct {
	Name     string
	State    StationState
	Reason   string   // why it is revoked
	KeyHash  [32]byte // SHA-256 of the SubjectPublicKeyInfo of the key in force
	CSR      []byte   // DER
	Created  time.Time
	Lines    uint64   // of its journal that were imported
	Head     [32]byte // SHA-256 of the last of them
	Imported time.Time
}

// StationCertificate is one certificate of a station; the caller has verified it.
type StationCertificate struct {
	Fingerprint [32]byte // SHA-256 of DER
	Station     string
	KeyHash     [32]byte
	Generation  uint32 // of the device CA above it
	DER         []byte
	NotBefore   time.Time
	NotAfter    time.Time
	At          time.Time
}

// Block is a number of ids that one station may use.
type Block struct {
	ID      [16]byte
	Station string
	IDs     []identity.ID // ascending
	Anchors uint64        // number of the anchor set that its units are born with
	Created time.Time
	Expires time.Time
	Signed  time.Time // zero = it waits for the safe
}

// RegisterStation makes a station known by its key, or changes nothing if it is known
// with the same. Another key is ErrKey, once the station was certified: it is renewed, not
// registered anew.
func (tx *Tx) RegisterStation(actor, name string, csr []byte, key [32]byte) error {
	var have []byte
	var state StationState
	err := tx.row(`SELECT key_hash, state FROM stations WHERE name = ?`, []any{name}, &have, &state)
	switch {
	case errors.Is(err, ErrNotFound):
		err := tx.exec(`INSERT INTO stations (name, state, reason, key_hash, csr, created, lines, head, imported)
			VALUES (?, 'active', '', ?, ?, ?, 0, zeroblob(32), 0)`, name, key[:], csr, ms(tx.now))
		if err != nil {
			return err
		}
		return tx.audit(actor, "station.add", name, detail{"key": fmt.Sprintf("%x", key)})
	case err != nil:
		return err
	case state != StationActive:
		return fmt.Errorf("station %s: %w: it is %s", name, ErrState, state)
	case string(have) == string(key[:]):
		return nil
	}
	var n int
	if err := tx.row(`SELECT COUNT(*) FROM station_certificates WHERE station = ?`, []any{name}, &n); err != nil {
		return err
	}
	if n > 0 {
		return fmt.Errorf("station %s: %w: it has another key", name, ErrKey)
	}
	return tx.stationKey(actor, name, csr, key)
}

// stationKey puts another key in force.
func (tx *Tx) stationKey(actor, name string, csr []byte, key [32]byte) error {
	if err := tx.exec(`UPDATE stations SET key_hash = ?, csr = ? WHERE name = ?`, key[:], csr, name); err != nil {
		return err
	}
	return tx.audit(actor, "station.key", name, detail{"key": fmt.Sprintf("%x", key)})
}

// ReserveBlock draws count free ids for a station and keeps them for it for ever. Ids in
// avoid are passed over. b names all but the ids, which it gets.
func (tx *Tx) ReserveBlock(actor string, b *Block, count int, avoid map[identity.ID]bool) error {
	return tx.reserveBlock(actor, b, count, avoid, func() (identity.ID, error) { return identity.RandomID(rand.Reader) })
}

func (tx *Tx) reserveBlock(actor string, b *Block, count int, avoid map[identity.ID]bool, draw func() (identity.ID, error)) error {
	var state StationState
	if err := tx.row(`SELECT state FROM stations WHERE name = ?`, []any{b.Station}, &state); err != nil {
		return fmt.Errorf("station %s: %w", b.Station, err)
	}
	if state != StationActive {
		return fmt.Errorf("station %s: %w: it is %s", b.Station, ErrState, state)
	}
	b.Created = tx.now
	err := tx.exec(`INSERT INTO station_blocks (id, station, count, anchors, created, expires, signed) VALUES (?, ?, ?, ?, ?, ?, 0)`,
		b.ID[:], b.Station, count, int64(b.Anchors), ms(b.Created), ms(b.Expires))
	if err != nil {
		return err
	}
	for n := 0; n < count; {
		id, err := draw()
		if err != nil {
			return err
		}
		if avoid[id] {
			continue
		}
		got, err := tx.reserve(id, b)
		if err != nil {
			return err
		}
		n += int(got)
	}
	if b.IDs, err = tx.blockIDs(b.ID); err != nil {
		return err
	}
	return tx.audit(actor, "station.reserve", b.Station, detail{"block": fmt.Sprintf("%x", b.ID), "ids": fmt.Sprint(count)})
}

const selectBlockIDs = `SELECT id FROM reserved_ids WHERE block = ? ORDER BY id`

func (tx *Tx) blockIDs(block [16]byte) ([]identity.ID, error) {
	s, err := tx.w.stmt(selectBlockIDs)
	if err != nil {
		return nil, err
	}
	rows, err := s.Query(block[:])
	if err != nil {
		return nil, err
	}
	return scanIDs(rows)
}

func scanIDs(rows *sql.Rows) (list []identity.ID, err error) {
	defer rows.Close()
	for rows.Next() {
		var id int64
		if err := rows.Scan(&id); err != nil {
			return nil, err
		}
		list = append(list, identity.ID(id))
	}
	return list, rows.Err()
}

// SignedBlock notes that a block was signed for the station's certificate c. A block that
// is noted already stays as it is.
func (tx *Tx) SignedBlock(actor string, block [16]byte, c StationCertificate) error {
	n, err := tx.execN(`UPDATE station_blocks SET signed = ? WHERE id = ? AND station = ? AND signed = 0`, ms(tx.now), block[:], c.Station)
	if err != nil {
		return err
	}
	if n == 0 {
		return fmt.Errorf("block %x of station %s that waits for a signature: %w", block, c.Station, ErrNotFound)
	}
	if err := tx.audit(actor, "station.block", c.Station, detail{"block": fmt.Sprintf("%x", block)}); err != nil {
		return err
	}
	return tx.AddStationCertificate(actor, c)
}

// AdoptBlock makes a block known again that this registry has forgotten, since it was
// restored from before the block was reserved; c is the station's certificate in it. The
// station is known. An id that a device or another block has is ErrExists.
func (tx *Tx) AdoptBlock(actor string, b *Block, c StationCertificate) error {
	n, err := tx.execN(`INSERT INTO station_blocks (id, station, count, anchors, created, expires, signed) VALUES (?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (id) DO NOTHING`, b.ID[:], b.Station, len(b.IDs), int64(b.Anchors), ms(tx.now), ms(b.Expires), ms(tx.now))
	if err != nil {
		return err
	}
	if n == 0 {
		return fmt.Errorf("block %x: %w", b.ID, ErrExists)
	}
	for _, id := range b.IDs {
		n, err := tx.reserve(id, b)
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("id %s, of a device or another block: %w", id, ErrExists)
		}
	}
	if err := tx.audit(actor, "station.adopt", b.Station, detail{"block": fmt.Sprintf("%x", b.ID), "ids": fmt.Sprint(len(b.IDs))}); err != nil {
		return err
	}
	return tx.AddStationCertificate(actor, c)
}

// AddStationCertificate adds a certificate for the key that is in force. One that is
// known changes nothing; another key is ErrKey.
func (tx *Tx) AddStationCertificate(actor string, c StationCertificate) error {
	var key []byte
	var state StationState
	if err := tx.row(`SELECT key_hash, state FROM stations WHERE name = ?`, []any{c.Station}, &key, &state); err != nil {
		return fmt.Errorf("station %s: %w", c.Station, err)
	}
	switch {
	case state != StationActive:
		return fmt.Errorf("station %s: %w: it is %s", c.Station, ErrState, state)
	case string(key) != string(c.KeyHash[:]):
		return fmt.Errorf("station %s: %w: it has another key", c.Station, ErrKey)
	}
	n, err := tx.execN(`INSERT INTO station_certificates (fingerprint, station, key_hash, generation, der, not_before, not_after, at)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (fingerprint) DO NOTHING`, c.Fingerprint[:], c.Station, c.KeyHash[:],
		int64(c.Generation), c.DER, ms(c.NotBefore), ms(c.NotAfter), ms(tx.now))
	if err != nil || n == 0 {
		return err
	}
	return tx.audit(actor, "station.certificate", c.Station, detail{"fingerprint": fmt.Sprintf("%x", c.Fingerprint), "generation": fmt.Sprint(c.Generation)})
}

// RenewStation adds a certificate for a new key (or the same) and puts that key in force.
func (tx *Tx) RenewStation(actor string, csr []byte, c StationCertificate) error {
	var key []byte
	if err := tx.row(`SELECT key_hash FROM stations WHERE name = ?`, []any{c.Station}, &key); err != nil {
		return fmt.Errorf("station %s: %w", c.Station, err)
	}
	if string(key) != string(c.KeyHash[:]) {
		if err := tx.stationKey(actor, c.Station, csr, c.KeyHash); err != nil {
			return err
		}
	}
	return tx.AddStationCertificate(actor, c)
}

// RevokeStation ends a station for good: it gets no more ids, and units that were not
// imported yet are refused. Devices that it made stay what they are.
func (tx *Tx) RevokeStation(actor, name, reason string) error {
	n, err := tx.execN(`UPDATE stations SET state = 'revoked', reason = ? WHERE name = ? AND state = 'active'`, reason, name)
	if err != nil {
		return err
	}
	if n == 0 {
		return fmt.Errorf("active station %s: %w", name, ErrNotFound)
	}
	return tx.audit(actor, "station.revoke", name, detail{"reason": reason})
}

// checkReserved refuses an id that a bench was given.
func (tx *Tx) checkReserved(id identity.ID) error {
	var station string
	err := tx.row(`SELECT b.station FROM reserved_ids r JOIN station_blocks b ON b.id = r.block WHERE r.id = ?`, []any{int64(id)}, &station)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("%w: %s", ErrReserved, station)
}

// Reserved gives the station that an id was given to, "" for none.
func (r *Registry) Reserved(ctx context.Context, id identity.ID) (station string, err error) {
	err = r.read.QueryRowContext(ctx, `SELECT b.station FROM reserved_ids r JOIN station_blocks b ON b.id = r.block
		WHERE r.id = ?`, int64(id)).Scan(&station)
	if errors.Is(err, sql.ErrNoRows) {
		return "", nil
	}
	return station, err
}

// reserve gives an id to a block, and 0 if it is a device's or reserved already.
func (tx *Tx) reserve(id identity.ID, b *Block) (n int64, err error) {
	return tx.execN(`INSERT INTO reserved_ids (id, block, state) SELECT ?, ?, 'free'
		WHERE NOT EXISTS (SELECT 1 FROM devices WHERE id = ?) ON CONFLICT (id) DO NOTHING`, int64(id), b.ID[:], int64(id))
}

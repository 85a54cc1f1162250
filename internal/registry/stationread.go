package registry

import (
	"context"
	"fmt"
	"time"
)

const stationColumns = `name, state, reason, key_hash, csr, created, lines, head, imported`

// Station reads one station.
func (r *Registry) Station(ctx context.Context, name string) (Station, error) {
	s, err := scanStation(r.read.QueryRowContext(ctx, `SELECT `+stationColumns+` FROM stations WHERE name = ?`, name))
	return s, orNotFound(err, "station "+name)
}

// Stations lists all stations by name.
func (r *Registry) Stations(ctx context.Context) ([]Station, error) {
	rows, err := r.read.QueryContext(ctx, `SELECT `+stationColumns+` FROM stations ORDER BY name`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []Station
	for rows.Next() {
		s, err := scanStation(rows)
		if err != nil {
			return nil, err
		}
		list = append(list, s)
	}
	return list, rows.Err()
}

func scanStation(row interface{ Scan(...any) error }) (s Station, err error) {
	var key, head []byte
	var created, lines, imported int64
	err = row.Scan(&s.Name, &s.State, &s.Reason, &key, &s.CSR, &created, &lines, &head, &imported)
	copy(s.KeyHash[:], key)
	copy(s.Head[:], head)
	s.Created, s.Lines, s.Imported = fromMS(created), uint64(lines), fromMS(imported)
	return s, err
}

// StationCertificates lists all certificates of a station, the one that ends last first.
func (r *Registry) StationCertificates(ctx context.Context, station string) ([]StationCertificate, error) {
	return r.stationCertificates(ctx, `SELECT fingerprint, station, key_hash, generation, der, not_before, not_after, at
		FROM station_certificates WHERE station = ? ORDER BY not_after DESC, at DESC`, station)
}

// ExpiringStations lists, for each active station, its last certificate if that ends
// before t, the first to end first.
func (r *Registry) ExpiringStations(ctx context.Context, t time.Time) ([]StationCertificate, error) {
	return r.stationCertificates(ctx, `SELECT c.fingerprint, c.station, c.key_hash, c.generation, c.der, c.not_before, c.not_after, c.at
		FROM station_certificates c JOIN stations s ON s.name = c.station WHERE s.state = 'active' AND c.not_after < ?
		AND NOT EXISTS (SELECT 1 FROM station_certificates o WHERE o.station = c.station AND o.not_after > c.not_after)
		ORDER BY c.not_after, c.station`, ms(t))
}

func (r *Registry) stationCertificates(ctx context.Context, query string, args ...any) ([]StationCertificate, error) {
	rows, err := r.read.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []StationCertificate
	for rows.Next() {
		var c StationCertificate
		var f, key []byte
		var before, after, at int64
		if err := rows.Scan(&f, &c.Station, &key, &c.Generation, &c.DER, &before, &after, &at); err != nil {
			return nil, err
		}
		copy(c.Fingerprint[:], f)
		copy(c.KeyHash[:], key)
		c.NotBefore, c.NotAfter, c.At = fromMS(before), fromMS(after), fromMS(at)
		list = append(list, c)
	}
	return list, rows.Err()
}

// Block reads one block with its ids.
func (r *Registry) Block(ctx context.Context, id [16]byte) (Block, error) {
	b := Block{ID: id}
	var anchors, created, expires, signed int64
	err := r.read.QueryRowContext(ctx, `SELECT station, anchors, created, expires, signed FROM station_blocks WHERE id = ?`, id[:]).
		Scan(&b.Station, &anchors, &created, &expires, &signed)
	if err != nil {
		return b, orNotFound(err, fmt.Sprintf("block %x", id))
	}
	b.Anchors, b.Created, b.Expires, b.Signed = uint64(anchors), fromMS(created), fromMS(expires), fromMS(signed)
	rows, err := r.read.QueryContext(ctx, selectBlockIDs, id[:])
	if err != nil {
		return b, err
	}
	b.IDs, err = scanIDs(rows)
	return b, err
}

// BlockUse is a block with the number of its ids in each state.
type BlockUse struct {
	Block // without its ids
	Free  int
	Used  int
	Burnt int
}

// Blocks lists the blocks of a station, the oldest first.
func (r *Registry) Blocks(ctx context.Context, station string) ([]BlockUse, error) {
	rows, err := r.read.QueryContext(ctx, `SELECT b.id, b.station, b.anchors, b.created, b.expires, b.signed,
		SUM(r.state = 'free'), SUM(r.state = 'used'), SUM(r.state = 'burnt')
		FROM station_blocks b JOIN reserved_ids r ON r.block = b.id WHERE b.station = ? GROUP BY b.id ORDER BY b.created, b.id`, station)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []BlockUse
	for rows.Next() {
		var b BlockUse
		var id []byte
		var anchors, created, expires, signed int64
		if err := rows.Scan(&id, &b.Station, &anchors, &created, &expires, &signed, &b.Free, &b.Used, &b.Burnt); err != nil {
			return nil, err
		}
		copy(b.ID[:], id)
		b.Anchors, b.Created, b.Expires, b.Signed = uint64(anchors), fromMS(created), fromMS(expires), fromMS(signed)
		list = append(list, b)
	}
	return list, rows.Err()
}

package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"time"

	"hawser/internal/identity"
)

// What is kept of one device, whatever it says: a holder of its key could draw
// nonces for ever.
const (
	maxBoots  = 8
	maxClones = 8
)

// Boot is one boot of a device, as its hello tells it apart.
type Boot struct {
	Nonce  uint64
	Remote string // address and port; empty = not known
	At     time.Time
	pos    uint64
}

// Clone is the proof that two hold one identity: Back was heard, then Other, then
// Back again. A boot that has ended does not come back.
type Clone struct {
	Device identity.ID
	Back   Boot
	Other  Boot
}

// SaveHello replaces what a device last said about itself, and gives a Clone when
// that proves a second holder for the first time. No audit row of the hello: it is in
// the log.
func (tx *Tx) SaveHello(id identity.ID, h Hello) (*Clone, error) {
	features, err := json.Marshal(append([]string{}, h.Features...))
	if err != nil {
		return nil, err
	}
	n, err := tx.execN(`UPDATE devices SET hello_at = ?, hello_class = ?, hello_firmware = ?, hello_image = ?, hello_tls = ?,
		hello_boot = ?, hello_nonce = ?, hello_features = ?, hello_encoding = ? WHERE id = ?`,
		ms(h.At), h.Class, h.Firmware, h.Image, h.TLS, h.Boot, int64(h.Nonce), string(features), h.Encoding, int64(id))
	if err == nil && n == 0 {
		err = fmt.Errorf("device %s: %w", id, ErrNotFound)
	}
	if err != nil || h.Nonce == 0 { // 0: the device draws none
		return nil, err
	}
	return tx.noteBoot(id, Boot{Nonce: h.Nonce, Remote: h.Remote, At: h.At, pos: h.Pos})
}

// noteBoot judges the sequence of boots. Nothing is written while a device says the
// nonce that it said last, and nothing is judged twice: a hello that is not beyond
// the newest boot was read again from the log.
func (tx *Tx) noteBoot(id identity.ID, now Boot) (*Clone, error) {
	boots, err := tx.boots(id)
	if err != nil {
		return nil, err
	}
	var newest Boot
	if len(boots) > 0 {
		newest = boots[0]
		if now.pos <= newest.pos {
			return nil, nil
		}
		if now.Nonce == newest.Nonce {
			return nil, tx.movedBoot(id, newest, now)
		}
	}
	back := false
	for _, b := range boots {
		back = back || b.Nonce == now.Nonce
		if b.Nonce == now.Nonce && now.Remote == "" {
			now.Remote = b.Remote
		}
	}
	if err := tx.putBoot(id, now); err != nil || !back {
		return nil, err
	}
	return tx.noteClone(&Clone{Device: id, Back: now, Other: newest})
}

// boots lists the boots of a device, the newest first.
func (tx *Tx) boots(id identity.ID) ([]Boot, error) {
	s, err := tx.w.stmt(`SELECT nonce, remote, at, pos FROM boots WHERE device = ? ORDER BY pos DESC`)
	if err != nil {
		return nil, err
	}
	rows, err := s.Query(int64(id))
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []Boot
	for rows.Next() {
		var b Boot
		var nonce, at, pos int64
		if err := rows.Scan(&nonce, &b.Remote, &at, &pos); err != nil {
			return nil, err
		}
		b.Nonce, b.At, b.pos = uint64(nonce), fromMS(at), uint64(pos)
		list = append(list, b)
	}
	return list, rows.Err()
}

// movedBoot notes that a device has connected again from another host.
func (tx *Tx) movedBoot(id identity.ID, was, now Boot) error {
	if now.Remote == "" || hostOf(was.Remote) == hostOf(now.Remote) {
		return nil
	}
	return tx.exec(`UPDATE boots SET remote = ?, at = ? WHERE device = ? AND nonce = ?`, now.Remote, ms(now.At), int64(id), int64(now.Nonce))
}

func hostOf(remote string) string {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		return remote
	}
	return host
}

// putBoot makes b the newest boot; what is too old goes.
func (tx *Tx) putBoot(id identity.ID, b Boot) error {
	err := tx.exec(`INSERT INTO boots (device, nonce, remote, at, pos) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (device, nonce) DO UPDATE SET remote = excluded.remote, at = excluded.at, pos = excluded.pos`,
		int64(id), int64(b.Nonce), b.Remote, ms(b.At), int64(b.pos))
	if err != nil {
		return err
	}
	return tx.exec(`DELETE FROM boots WHERE device = ? AND pos < (SELECT MIN(pos) FROM
		(SELECT pos FROM boots WHERE device = ? ORDER BY pos DESC LIMIT ?))`, int64(id), int64(id), maxBoots)
}

// noteClone records a pair of boots that is not known yet.
func (tx *Tx) noteClone(c *Clone) (*Clone, error) {
	id, back, other := int64(c.Device), int64(c.Back.Nonce), int64(c.Other.Nonce)
	n, err := tx.execN(`INSERT INTO clones (device, nonce, remote, other, other_remote, other_at, at) SELECT ?, ?, ?, ?, ?, ?, ?
		WHERE NOT EXISTS (SELECT 1 FROM clones WHERE device = ? AND (nonce = ? AND other = ? OR nonce = ? AND other = ?))
		AND (SELECT COUNT(*) FROM clones WHERE device = ?) < ?`,
		id, back, c.Back.Remote, other, c.Other.Remote, ms(c.Other.At), ms(c.Back.At),
		id, back, other, other, back, id, maxClones)
	if err != nil || n == 0 {
		return nil, err
	}
	tx.tell(Change{Kind: DeviceChanged, Principal: identity.DevicePrincipal(c.Device)})
	return c, tx.audit("server", "device.clone", c.Device.String(), detail{
		"nonce": nonceText(c.Back.Nonce), "remote": c.Back.Remote,
		"other": nonceText(c.Other.Nonce), "other_remote": c.Other.Remote})
}

func nonceText(n uint64) string { return fmt.Sprintf("%016x", n) }

// forgetBoots settles the clone reports of a device. The newest boot stays, so that a
// hello that is read again from the log is known as such.
func (tx *Tx) forgetBoots(id identity.ID) error {
	if err := tx.exec(`DELETE FROM clones WHERE device = ?`, int64(id)); err != nil {
		return err
	}
	return tx.exec(`DELETE FROM boots WHERE device = ? AND pos < (SELECT MAX(pos) FROM boots WHERE device = ?)`, int64(id), int64(id))
}

// Clones lists the open clone reports of a device, or of all for id 0, the newest first.
func (r *Registry) Clones(ctx context.Context, id identity.ID, limit int) ([]Clone, error) {
	rows, err := r.read.QueryContext(ctx, `SELECT device, nonce, remote, at, other, other_remote, other_at FROM clones
		WHERE ? = 0 OR device = ? ORDER BY at DESC, device, nonce LIMIT ?`, int64(id), int64(id), limitOr(limit))
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []Clone
	for rows.Next() {
		var c Clone
		var device, back, other, at, otherAt int64
		if err := rows.Scan(&device, &back, &c.Back.Remote, &at, &other, &c.Other.Remote, &otherAt); err != nil {
			return nil, err
		}
		c.Device, c.Back.Nonce, c.Other.Nonce = identity.ID(device), uint64(back), uint64(other)
		c.Back.At, c.Other.At = fromMS(at), fromMS(otherAt)
		list = append(list, c)
	}
	return list, rows.Err()
}

// CloneCount is the number of devices with an open clone report.
func (r *Registry) CloneCount(ctx context.Context) (n int, err error) {
	return n, r.read.QueryRowContext(ctx, `SELECT COUNT(DISTINCT device) FROM clones`).Scan(&n)
}

package registry

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"hawser/internal/identity"
)

// AddCertificate makes c the active certificate of its principal and generation;
// the one before is superseded. The principal must be known and active. A
// fingerprint that is known already is ErrExists.
func (tx *Tx) AddCertificate(actor string, c Certificate) error {
	if err := tx.mayHaveCertificate(c.Principal); err != nil {
		return err
	}
	var n int
	if err := tx.row(`SELECT COUNT(*) FROM certificates WHERE fingerprint = ?`, []any{c.Fingerprint[:]}, &n); err != nil {
		return err
	}
	if n != 0 {
		return fmt.Errorf("certificate %x: %w", c.Fingerprint, ErrExists)
	}
	if err := tx.supersede(c); err != nil {
		return err
	}
	err := tx.exec(`INSERT INTO certificates (fingerprint, kind, name, generation, der, not_before, not_after, state, at)
		VALUES (?, ?, ?, ?, ?, ?, ?, 'active', ?)`, c.Fingerprint[:], c.Principal.Kind.String(), c.Principal.Name,
		int64(c.Generation), c.DER, ms(c.NotBefore), ms(c.NotAfter), ms(tx.now))
	if err != nil {
		return err
	}
	if id, ok := c.Principal.ID(); ok {
		if err := tx.exec(`UPDATE devices SET enrolled = ? WHERE id = ? AND enrolled = 0`, ms(tx.now), int64(id)); err != nil {
			return err
		}
	}
	tx.tell(Change{Kind: CertificateAdded, Principal: c.Principal,
		Active: ActiveCertificate{c.Fingerprint, c.Principal, c.Generation, c.NotBefore, c.NotAfter}})
	return tx.audit(actor, "certificate.add", c.Principal.Name,
		detail{"fingerprint": fmt.Sprintf("%x", c.Fingerprint), "generation": fmt.Sprint(c.Generation)})
}

func (tx *Tx) mayHaveCertificate(p identity.Principal) error {
	var state string
	var err error
	switch id, ok := p.ID(); {
	case ok:
		err = tx.row(`SELECT state FROM devices WHERE id = ?`, []any{int64(id)}, &state)
	case p.Kind == identity.Service:
		err = tx.row(`SELECT state FROM services WHERE name = ?`, []any{p.Name}, &state)
	default:
		return fmt.Errorf("certificate of %s: %w", p, ErrInvalid)
	}
	if err == nil && state != "active" {
		err = fmt.Errorf("%w: it is %s", ErrState, state)
	}
	if err != nil {
		return fmt.Errorf("certificate of %s: %w", p, err)
	}
	return nil
}

// supersede retires the certificate that c replaces.
func (tx *Tx) supersede(c Certificate) error {
	return tx.endCertificates(c.Principal, CertificateSuperseded,
		`SELECT fingerprint FROM certificates WHERE kind = ? AND name = ? AND state = 'active' AND generation = ?`,
		c.Principal.Kind.String(), c.Principal.Name, int64(c.Generation))
}

// revokeCertificates revokes all certificates of p, superseded ones too, and notes
// what each was before.
func (tx *Tx) revokeCertificates(p identity.Principal) error {
	err := tx.exec(`UPDATE certificates SET was = state WHERE kind = ? AND name = ? AND state <> 'revoked'`, p.Kind.String(), p.Name)
	if err != nil {
		return err
	}
	return tx.endCertificates(p, CertificateRevoked,
		`SELECT fingerprint FROM certificates WHERE kind = ? AND name = ? AND state <> 'revoked'`,
		p.Kind.String(), p.Name)
}

func (tx *Tx) endCertificates(p identity.Principal, to CertificateState, query string, args ...any) error {
	prints, err := tx.fingerprints(query, args)
	if err != nil {
		return err
	}
	for _, f := range prints {
		if err := tx.exec(`UPDATE certificates SET state = ? WHERE fingerprint = ?`, string(to), f[:]); err != nil {
			return err
		}
		tx.tell(Change{Kind: CertificateRemoved, Principal: p, Active: ActiveCertificate{Fingerprint: f, Principal: p}})
	}
	return nil
}

func (tx *Tx) fingerprints(query string, args []any) ([][32]byte, error) {
	s, err := tx.w.stmt(query)
	if err != nil {
		return nil, err
	}
	rows, err := s.Query(args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list [][32]byte
	for rows.Next() {
		var b []byte
		if err := rows.Scan(&b); err != nil {
			return nil, err
		}
		list = append(list, [32]byte(b))
	}
	return list, rows.Err()
}

// ActiveCertificates calls fn for each certificate that opens the door: active,
// of an active device or service. It reads one snapshot, in no order.
func (r *Registry) ActiveCertificates(ctx context.Context, fn func(ActiveCertificate) error) error {
	tx, err := r.read.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer tx.Rollback()
	barred, err := barredPrincipals(ctx, tx)
	if err != nil {
		return err
	}
	rows, err := tx.QueryContext(ctx, `SELECT fingerprint, kind, name, generation, not_before, not_after
		FROM certificates WHERE state = 'active'`)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		a, err := scanActive(rows)
		if err != nil {
			return err
		}
		if barred[a.Principal] {
			continue
		}
		if err := fn(a); err != nil {
			return err
		}
	}
	return rows.Err()
}

func scanActive(rows *sql.Rows) (ActiveCertificate, error) {
	var a ActiveCertificate
	var f sql.RawBytes
	var kind string
	var before, after int64
	if err := rows.Scan(&f, &kind, &a.Principal.Name, &a.Generation, &before, &after); err != nil {
		return a, err
	}
	if len(f) != len(a.Fingerprint) {
		return a, fmt.Errorf("certificate of %s: a fingerprint of %d bytes", a.Principal.Name, len(f))
	}
	copy(a.Fingerprint[:], f)
	a.Principal.Kind = kindOf(kind)
	a.NotBefore, a.NotAfter = fromMS(before), fromMS(after)
	return a, nil
}

func kindOf(s string) identity.Kind {
	switch s {
	case identity.Device.String():
		return identity.Device
	case identity.Service.String():
		return identity.Service
	}
	return identity.Nobody
}

// barredPrincipals gives the principals that may not connect.
func barredPrincipals(ctx context.Context, tx *sql.Tx) (map[identity.Principal]bool, error) {
	set := map[identity.Principal]bool{}
	rows, err := tx.QueryContext(ctx, `SELECT id, '' FROM devices WHERE state IN ('revoked', 'quarantined', 'retired')
		UNION ALL SELECT 0, name FROM services WHERE state <> 'active'`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var id int64
		var name string
		if err := rows.Scan(&id, &name); err != nil {
			return nil, err
		}
		if id != 0 {
			set[identity.DevicePrincipal(identity.ID(id))] = true
		} else {
			set[identity.Principal{Kind: identity.Service, Name: name}] = true
		}
	}
	return set, rows.Err()
}

const certificateColumns = `fingerprint, kind, name, generation, der, not_before, not_after, state, at`

// Certificates lists all certificates of p, the newest first.
func (r *Registry) Certificates(ctx context.Context, p identity.Principal) ([]Certificate, error) {
	return r.certificates(ctx, `SELECT `+certificateColumns+` FROM certificates
		WHERE kind = ? AND name = ? ORDER BY at DESC, fingerprint`, p.Kind.String(), p.Name)
}

// ExpiringCertificates lists active certificates that end before t, the first
// to end first.
func (r *Registry) ExpiringCertificates(ctx context.Context, t time.Time, limit int) ([]Certificate, error) {
	return r.certificates(ctx, `SELECT `+certificateColumns+` FROM certificates
		WHERE state = 'active' AND not_after < ? ORDER BY not_after, fingerprint LIMIT ?`, ms(t), limitOr(limit))
}

func (r *Registry) certificates(ctx context.Context, query string, args ...any) ([]Certificate, error) {
	rows, err := r.read.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []Certificate
	for rows.Next() {
		var c Certificate
		var f []byte
		var kind string
		var before, after, at int64
		err := rows.Scan(&f, &kind, &c.Principal.Name, &c.Generation, &c.DER, &before, &after, &c.State, &at)
		if err != nil {
			return nil, err
		}
		copy(c.Fingerprint[:], f)
		c.Principal.Kind = kindOf(kind)
		c.NotBefore, c.NotAfter, c.At = fromMS(before), fromMS(after), fromMS(at)
		list = append(list, c)
	}
	return list, rows.Err()
}

// CSR reads the CSR of a device, DER.
func (r *Registry) CSR(ctx context.Context, id identity.ID) ([]byte, error) {
	var der []byte
	err := r.read.QueryRowContext(ctx, `SELECT der FROM csrs WHERE device = ?`, int64(id)).Scan(&der)
	return der, orNotFound(err, "CSR of "+id.String())
}

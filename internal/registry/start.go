package registry

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"hawser/internal/identity"
)

// JSONDevices calls fn for each device whose last hello was in JSON.
func (r *Registry) JSONDevices(ctx context.Context, fn func(identity.ID)) error {
	rows, err := r.read.QueryContext(ctx, `SELECT id FROM devices WHERE hello_at <> 0 AND hello_encoding = 'json'`)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var id int64
		if err := rows.Scan(&id); err != nil {
			return err
		}
		fn(identity.ID(id))
	}
	return rows.Err()
}

// Configured calls fn for each active device that has a desired configuration.
func (r *Registry) Configured(ctx context.Context, fn func(identity.ID)) error {
	rows, err := r.read.QueryContext(ctx, `SELECT c.device FROM configs c JOIN devices d ON d.id = c.device
		WHERE c.version <> 0 AND d.state = 'active'`)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var id int64
		if err := rows.Scan(&id); err != nil {
			return err
		}
		fn(identity.ID(id))
	}
	return rows.Err()
}

// CertificateOf tells whose certificate has a fingerprint and in what state it
// is. One that was never imported is ErrNotFound.
func (r *Registry) CertificateOf(ctx context.Context, fingerprint [32]byte) (identity.Principal, CertificateState, error) {
	var p identity.Principal
	var kind string
	var state CertificateState
	err := r.read.QueryRowContext(ctx, `SELECT kind, name, state FROM certificates WHERE fingerprint = ?`, fingerprint[:]).
		Scan(&kind, &p.Name, &state)
	if errors.Is(err, sql.ErrNoRows) {
		return p, "", fmt.Errorf("certificate %x: %w", fingerprint, ErrNotFound)
	}
	p.Kind = kindOf(kind)
	return p, state, err
}

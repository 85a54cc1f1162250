package registry

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"hawser/internal/identity"
)

// AddService makes a service with its grants.
func (tx *Tx) AddService(actor, name string, grants []Grant) error {
	p, err := identity.ServicePrincipal(name)
	if err != nil {
		return fmt.Errorf("service %q: %w: %w", name, ErrInvalid, err)
	}
	n, err := tx.execN(`INSERT INTO services (name, state, reason, created) VALUES (?, 'active', '', ?)
		ON CONFLICT (name) DO NOTHING`, name, ms(tx.now))
	if err != nil {
		return err
	}
	if n == 0 {
		return fmt.Errorf("service %s: %w", name, ErrExists)
	}
	if err := tx.audit(actor, "service.add", name, nil); err != nil {
		return err
	}
	tx.tell(Change{Kind: ServiceAdded, Principal: p})
	return tx.ChangeGrants(actor, name, grants, nil)
}

// ChangeGrants gives and takes grants. Taking one that is not there is
// ErrNotFound.
func (tx *Tx) ChangeGrants(actor, name string, give, take []Grant) error {
	if len(give)+len(take) == 0 {
		return nil
	}
	if err := tx.mayHaveCertificate(identity.Principal{Kind: identity.Service, Name: name}); err != nil {
		return err
	}
	for _, g := range take {
		if err := tx.takeGrant(actor, name, g); err != nil {
			return err
		}
	}
	for _, g := range give {
		if err := tx.giveGrant(actor, name, g); err != nil {
			return err
		}
	}
	tx.tell(Change{Kind: GrantsChanged, Principal: identity.Principal{Kind: identity.Service, Name: name}})
	return nil
}

func (tx *Tx) takeGrant(actor, name string, g Grant) error {
	n, err := tx.execN(`DELETE FROM grants WHERE service = ? AND mode = ? AND filter = ?`, name, string(g.Mode), g.Filter)
	if err != nil {
		return err
	}
	if n == 0 {
		return fmt.Errorf("grant %s %s of %s: %w", g.Mode, g.Filter, name, ErrNotFound)
	}
	return tx.audit(actor, "grant.take", name, detail{"mode": string(g.Mode), "filter": g.Filter})
}

func (tx *Tx) giveGrant(actor, name string, g Grant) error {
	if g.Mode != GrantRead && g.Mode != GrantWrite {
		return fmt.Errorf("grant %q: %w: read or write", g.Mode, ErrInvalid)
	}
	if err := identity.CheckFilter(g.Filter); err != nil {
		return fmt.Errorf("grant %s %s: %w: %w", g.Mode, g.Filter, ErrInvalid, err)
	}
	if g.Filter[0] == '$' {
		return fmt.Errorf("grant %s %s: %w: topics that begin with $ are never granted", g.Mode, g.Filter, ErrInvalid)
	}
	err := tx.exec(`INSERT INTO grants (service, mode, filter) VALUES (?, ?, ?) ON CONFLICT (service, mode, filter) DO NOTHING`,
		name, string(g.Mode), g.Filter)
	if err != nil {
		return err
	}
	return tx.audit(actor, "grant.give", name, detail{"mode": string(g.Mode), "filter": g.Filter})
}

// RevokeService bars a service for good: certificates, sessions and grants go.
func (tx *Tx) RevokeService(actor, name, reason string) error {
	p := identity.Principal{Kind: identity.Service, Name: name}
	if err := tx.mayHaveCertificate(p); err != nil {
		return err
	}
	if err := tx.exec(`UPDATE services SET state = 'revoked', reason = ? WHERE name = ?`, reason, name); err != nil {
		return err
	}
	if err := tx.exec(`DELETE FROM grants WHERE service = ?`, name); err != nil {
		return err
	}
	if err := tx.audit(actor, "service.revoked", name, detail{"reason": reason}); err != nil {
		return err
	}
	tx.tell(Change{Kind: ServiceBarred, Principal: p})
	return tx.expel(p)
}

// Services lists all services by name, with their grants.
func (r *Registry) Services(ctx context.Context) ([]Service, error) {
	rows, err := r.read.QueryContext(ctx, `SELECT s.name, s.state, s.reason, s.created, g.mode, g.filter
		FROM services s LEFT JOIN grants g ON g.service = s.name ORDER BY s.name, g.mode, g.filter`)
	if err != nil {
		return nil, err
	}
	return collectServices(rows)
}

// Service reads one service with its grants.
func (r *Registry) Service(ctx context.Context, name string) (Service, error) {
	rows, err := r.read.QueryContext(ctx, `SELECT s.name, s.state, s.reason, s.created, g.mode, g.filter
		FROM services s LEFT JOIN grants g ON g.service = s.name WHERE s.name = ? ORDER BY g.mode, g.filter`, name)
	if err != nil {
		return Service{}, err
	}
	list, err := collectServices(rows)
	if err == nil && len(list) == 0 {
		err = fmt.Errorf("service %s: %w", name, ErrNotFound)
	}
	if err != nil {
		return Service{}, err
	}
	return list[0], nil
}

// collectServices folds one row for each grant into one Service for each name.
func collectServices(rows *sql.Rows) ([]Service, error) {
	defer rows.Close()
	var list []Service
	for rows.Next() {
		var s Service
		var created int64
		var mode, filter sql.NullString
		if err := rows.Scan(&s.Name, &s.State, &s.Reason, &created, &mode, &filter); err != nil {
			return nil, err
		}
		s.Created = fromMS(created)
		if len(list) == 0 || list[len(list)-1].Name != s.Name {
			list = append(list, s)
		}
		if mode.Valid {
			last := &list[len(list)-1]
			last.Grants = append(last.Grants, Grant{GrantMode(mode.String), filter.String})
		}
	}
	return list, rows.Err()
}

// orNotFound puts a name to the error of a single row.
func orNotFound(err error, what string) error {
	if errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("%s: %w", what, ErrNotFound)
	}
	return err
}

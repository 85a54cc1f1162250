package registry

import (
	"context"
	"fmt"
	"time"

	"hawser/internal/identity"
)

// A service has at most two active certificates: the one it uses and a newer one
// that has not been used yet. So a renewal cuts nobody off before the new files are
// where they belong. The older one ends when the newer one was used (ServiceUsed), or
// when the overlap is over (EndOverlaps).

// ReplaceCertificate is AddCertificate for a service whose key may be in other hands:
// all certificates before c end at once, and with them its connections.
func (tx *Tx) ReplaceCertificate(actor string, c Certificate) error {
	return tx.renewService(actor, c, false)
}

func (tx *Tx) renewService(actor string, c Certificate, overlap bool) error {
	var last int64
	err := tx.row(`SELECT COALESCE(MAX(generation), 0) FROM certificates WHERE kind = ? AND name = ?`,
		[]any{c.Principal.Kind.String(), c.Principal.Name}, &last)
	if err != nil {
		return err
	}
	c.Generation = uint32(last) + 1
	return tx.addCertificate(actor, c, func(c Certificate) error { return tx.endServiceCertificates(c.Principal, overlap) })
}

// endServiceCertificates supersedes all certificates of a service but, if keep is
// set, the oldest that is valid: a newer one would have ended it by its first use.
func (tx *Tx) endServiceCertificates(p identity.Principal, keep bool) error {
	kept := int64(-1)
	if keep {
		err := tx.row(`SELECT COALESCE(MIN(generation), -1) FROM certificates WHERE kind = ? AND name = ? AND state = 'active' AND not_after >= ?`,
			[]any{p.Kind.String(), p.Name, ms(tx.now)}, &kept)
		if err != nil {
			return err
		}
	}
	return tx.endCertificates(p, CertificateSuperseded,
		`SELECT fingerprint FROM certificates WHERE kind = ? AND name = ? AND state = 'active' AND generation <> ?`,
		p.Kind.String(), p.Name, kept)
}

// ServiceUsed notes that a service has connected with a certificate: those before it
// are superseded. Connections that stand go on. Without such there is no change.
func (tx *Tx) ServiceUsed(actor, name string, fingerprint [32]byte) error {
	p := identity.Principal{Kind: identity.Service, Name: name}
	var generation int64
	err := tx.row(`SELECT generation FROM certificates WHERE fingerprint = ? AND kind = ? AND name = ? AND state = 'active'`,
		[]any{fingerprint[:], p.Kind.String(), name}, &generation)
	if err != nil {
		return fmt.Errorf("certificate %x of %s: %w", fingerprint, name, err)
	}
	return tx.endBefore(actor, p, generation, fmt.Sprintf("%x", fingerprint))
}

func (tx *Tx) endBefore(actor string, p identity.Principal, generation int64, by string) error {
	const older = ` FROM certificates WHERE kind = ? AND name = ? AND state = 'active' AND generation < ?`
	args := []any{p.Kind.String(), p.Name, generation}
	var n int
	if err := tx.row(`SELECT COUNT(*)`+older, args, &n); err != nil || n == 0 {
		return err
	}
	if err := tx.endCertificates(p, CertificateSuperseded, `SELECT fingerprint`+older, args...); err != nil {
		return err
	}
	return tx.audit(actor, "certificate.supersede", p.Name, detail{"by": by})
}

// Overlap is a service with two active certificates.
type Overlap struct {
	Name  string
	Newer [32]byte  // fingerprint of the newer one
	Since time.Time // when that was imported
}

// Overlaps lists the services that have a newer certificate they have not used yet.
func (r *Registry) Overlaps(ctx context.Context) ([]Overlap, error) {
	rows, err := r.read.QueryContext(ctx, `SELECT c.name, c.fingerprint, c.at FROM certificates c
		WHERE c.kind = 'service' AND c.state = 'active' AND EXISTS (SELECT 1 FROM certificates o
			WHERE o.kind = c.kind AND o.name = c.name AND o.state = 'active' AND o.generation < c.generation) ORDER BY c.name`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []Overlap
	for rows.Next() {
		var o Overlap
		var print []byte
		var at int64
		if err := rows.Scan(&o.Name, &print, &at); err != nil {
			return nil, err
		}
		copy(o.Newer[:], print)
		o.Since = fromMS(at)
		list = append(list, o)
	}
	return list, rows.Err()
}

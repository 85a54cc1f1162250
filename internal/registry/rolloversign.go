package registry

import (
	"errors"
	"fmt"

	"hawser/internal/identity"
)

// RolloverCertificate adds a certificate of the open rollover's new generation. The device
// must have exactly this key. It gives false, and does nothing, where the certificate is
// known or the device may not come back. A quarantined device gets it too, and is let in
// only once it is released.
func (tx *Tx) RolloverCertificate(actor string, c Certificate, key [32]byte) (bool, error) {
	r, err := tx.openRollover()
	if err != nil {
		return false, err
	}
	if r.ToGeneration == 0 || c.Generation != r.ToGeneration {
		return false, fmt.Errorf("certificate of %s: %w: generation %d is not where rollover %d goes", c.Principal, ErrInvalid, c.Generation, r.No)
	}
	state, err := tx.rolloverDevice(c.Principal, key)
	if err != nil || state != DeviceActive && state != DeviceQuarantined {
		return false, err
	}
	var n int
	err = tx.row(`SELECT COUNT(*) FROM certificates WHERE fingerprint = ? OR kind = 'device' AND name = ? AND state = 'active' AND generation = ?`,
		[]any{c.Fingerprint[:], c.Principal.Name, int64(c.Generation)}, &n)
	if err != nil || n != 0 {
		return false, err // the first that came stays: a device may have it already
	}
	err = tx.exec(`INSERT INTO certificates (fingerprint, kind, name, generation, der, not_before, not_after, state, at)
		VALUES (?, 'device', ?, ?, ?, ?, ?, 'active', ?)`, c.Fingerprint[:], c.Principal.Name,
		int64(c.Generation), c.DER, ms(c.NotBefore), ms(c.NotAfter), ms(tx.now))
	if err != nil {
		return false, err
	}
	if state == DeviceActive {
		tx.tell(Change{Kind: CertificateAdded, Principal: c.Principal,
			Active: ActiveCertificate{c.Fingerprint, c.Principal, c.Generation, c.NotBefore, c.NotAfter}})
	}
	return true, tx.audit(actor, "certificate.add", c.Principal.Name,
		detail{"fingerprint": fmt.Sprintf("%x", c.Fingerprint), "generation": fmt.Sprint(c.Generation), "rollover": fmt.Sprint(r.No)})
}

// rolloverDevice gives the state of a device, which must have this key.
func (tx *Tx) rolloverDevice(p identity.Principal, key [32]byte) (state DeviceState, err error) {
	id, ok := p.ID()
	if !ok {
		return "", fmt.Errorf("certificate of %s: %w: not a device", p, ErrInvalid)
	}
	var have []byte
	err = tx.row(`SELECT state, key_hash FROM devices WHERE id = ?`, []any{int64(id)}, &state, &have)
	if err == nil && string(have) != string(key[:]) {
		err = ErrKey
	}
	if err != nil {
		return "", fmt.Errorf("certificate of %s: %w", p, err)
	}
	return state, nil
}

// RefuseRollover notes that the safe did not sign for a device, and why. A device that
// is not known is passed over.
func (tx *Tx) RefuseRollover(actor string, id identity.ID, reason string) error {
	if _, err := tx.openRollover(); err != nil {
		return err
	}
	err := tx.RolloverProgress(id, ProgressFailed, reason)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return tx.audit(actor, "rollover.refused", id.String(), detail{"reason": reason})
}

package server

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"

	"hawser/internal/fleet"
	"hawser/internal/pki"
	"hawser/internal/registry"
)

// bySystem is the actor of what follows from the fleet's files.
const bySystem = "hawser"

// matchTrust makes registry and files agree on device CAs and anchor sets. They are
// changed one after the other, so a crash leaves one ahead: what one of them has and the
// other does not know yet is taken over, what contradicts is refused by name: an older
// registry would let a retired generation in again. A generation that the registry retired is taken out of device-cas.crt.
func matchTrust(ctx context.Context, l *fleet.Layout, r *registry.Registry) error {
	return errors.Join(matchGenerations(ctx, l, r), matchAnchors(ctx, l, r))
}

func matchGenerations(ctx context.Context, l *fleet.Layout, r *registry.Registry) error {
	known, err := r.Generations(ctx)
	if err != nil {
		return err
	}
	byNumber := map[uint32]registry.Generation{}
	for _, g := range known {
		byNumber[g.Number] = g
	}
	changed, inFile, newest := false, map[uint32]bool{}, uint32(0)
	for _, ca := range l.Trust().DeviceCAs {
		n, err := pki.Generation(ca)
		if err != nil {
			return err
		}
		number := uint32(n)
		inFile[number], newest = true, max(newest, number)
		g, ok := byNumber[number]
		switch {
		case !ok:
			err := r.Update(ctx, func(tx *registry.Tx) error { return tx.AddGeneration(bySystem, number, ca.Raw) })
			if err != nil {
				return err
			}
		case string(g.CA) != string(ca.Raw):
			return fmt.Errorf("device-cas.crt has another device CA %d than the registry\n%s", number, restore)
		case !g.Active:
			changed = true
		}
	}
	for _, g := range known {
		if !g.Active || inFile[g.Number] {
			continue
		}
		if g.Number < newest { // a retired one goes out of the registry first
			return fmt.Errorf("device-cas.crt has no device CA %d, whose certificates the registry accepts: one of the two is older\n"+
				"hint: restore both from the same backup", g.Number)
		}
		changed = true
	}
	if !changed {
		return nil
	}
	return writeDeviceCAs(ctx, l, r)
}

// writeDeviceCAs makes device-cas.crt the generations that the registry accepts.
func writeDeviceCAs(ctx context.Context, l *fleet.Layout, r *registry.Registry) error {
	known, err := r.Generations(ctx)
	if err != nil {
		return err
	}
	var cas []*x509.Certificate
	for _, g := range known {
		if !g.Active {
			continue
		}
		ca, err := x509.ParseCertificate(g.CA)
		if err != nil {
			return fmt.Errorf("device CA %d in the registry: %w", g.Number, err)
		}
		cas = append(cas, ca)
	}
	return l.SetDeviceCAs(cas)
}

func matchAnchors(ctx context.Context, l *fleet.Layout, r *registry.Registry) error {
	known, err := r.AnchorSets(ctx)
	if err != nil {
		return err
	}
	for _, a := range known {
		sign1, _, ok := l.AnchorSet(a.Sequence)
		if !ok || string(sign1) != string(a.COSE) {
			return fmt.Errorf("anchor set %d of the registry is not in the fleet's files\n%s", a.Sequence, restore)
		}
	}
	for n := uint64(len(known)) + 1; ; n++ {
		sign1, _, ok := l.AnchorSet(n)
		if !ok {
			return nil
		}
		// The first set is what devices are born with; another one waits for its rollover.
		err := r.Update(ctx, func(tx *registry.Tx) error { return tx.AddAnchorSet(bySystem, n, sign1, n == 1) })
		if err != nil {
			return err
		}
	}
}

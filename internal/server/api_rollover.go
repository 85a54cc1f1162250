package server

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"hawser/internal/admin"
	"hawser/internal/identity"
	"hawser/internal/pki"
	"hawser/internal/registry"
)

const (
	rolloverPart  = 1000 // certificates in one transaction
	signPerSecond = 2000 // what a safe reaches at least
	movePerSecond = 50   // devices that reconnect, with rollover.InFlight on their way
	defaultNames  = 100
)

// rollover tells how far the last one has come.
func (b *backend) rollover(r *http.Request) (any, error) {
	p := params{r: r}
	names := int(min(p.number("names"), 1<<20))
	if p.err != nil {
		return nil, p.err
	}
	v, err := b.reg.LastRollover(r.Context())
	if err != nil {
		return nil, err
	}
	return b.rolloverOf(r.Context(), v, names, p.text("state"))
}

// rolloverOf names devices that have not arrived, in one state if it is not "".
func (b *backend) rolloverOf(ctx context.Context, v registry.Rollover, names int, state string) (admin.Rollover, error) {
	out := admin.Rollover{No: v.No, FromGeneration: v.FromGeneration, ToGeneration: v.ToGeneration, FromAnchors: v.FromAnchors, ToAnchors: v.ToAnchors,
		State: string(v.State), Started: admin.UTC(v.Started), Moving: admin.UTC(v.MovingSince), Ended: admin.UTC(v.Ended), By: v.Actor,
		Counts: map[string]int{}, Unproven: []admin.RolloverDevice{}}
	if out.State == "" {
		out.State = "none"
	}
	online := map[identity.ID]bool{}
	if b.srv != nil {
		for _, id := range b.srv.br.OnlineDevices() {
			online[id] = true
		}
	}
	err := b.reg.Members(ctx, v, func(m registry.Member) error {
		if m.Progress == registry.ProgressAbsent && online[m.ID] {
			m.Progress = registry.ProgressOld
		}
		out.Devices++
		out.Counts[string(m.Progress)]++
		if m.Progress != registry.ProgressProven && len(out.Unproven) < names && (state == "" || state == string(m.Progress)) {
			out.Unproven = append(out.Unproven, admin.RolloverDevice{ID: m.ID, State: string(m.Progress), Reason: m.Reason,
				LastSeen: admin.UTC(m.LastSeen), Anchors: m.Anchors})
		}
		return nil
	})
	if err == nil {
		out.OldestAnchors, err = b.reg.OldestAnchors(ctx)
	}
	if err == nil && v.ToGeneration != 0 {
		out.Unsigned, err = b.reg.CountUnsigned(ctx, v.ToGeneration)
	}
	return out, err
}

// nextRollover says where a rollover would go. One that was aborted is taken up again: its
// generation and its anchor set are there, and some devices use them.
func (b *backend) nextRollover(ctx context.Context, w admin.What) (v registry.Rollover, err error) {
	if !w.Generation && !w.Roots {
		return v, admin.Errorf(admin.Invalid, "nothing would change\nhint: --generation, --roots, or both")
	}
	if w.Generation {
		known, err := b.reg.Generations(ctx)
		if err != nil {
			return v, err
		}
		for _, g := range known {
			if g.Active {
				v.FromGeneration, v.ToGeneration = v.ToGeneration, g.Number
			}
		}
		if v.FromGeneration == 0 {
			v.FromGeneration, v.ToGeneration = v.ToGeneration, v.ToGeneration+1
		}
	}
	if w.Roots {
		sets, err := b.reg.AnchorSets(ctx)
		if err != nil {
			return v, err
		}
		if len(sets) == 0 {
			return v, errors.New("the registry has no anchor set\n" + restore)
		}
		v.ToAnchors = sets[len(sets)-1].Sequence
		if sets[len(sets)-1].Offered {
			v.ToAnchors++
		}
		v.FromAnchors = v.ToAnchors - 1
	}
	return v, nil
}

func (b *backend) planRollover(r *http.Request) (any, error) {
	p := params{r: r}
	w := admin.What{Generation: p.isSet("generation"), Roots: p.isSet("roots")}
	if p.err != nil {
		return nil, p.err
	}
	v, err := b.nextRollover(r.Context(), w)
	if err != nil {
		return nil, err
	}
	out := admin.RolloverPlan{}
	if out.Rollover, err = b.rolloverOf(r.Context(), v, 0, ""); err != nil {
		return nil, err
	}
	if b.srv != nil {
		out.Online = len(b.srv.br.OnlineDevices())
	}
	out.Signing = float64(out.Unsigned) / signPerSecond
	out.Move = float64(out.Online) / movePerSecond
	return out, nil
}

func (b *backend) startRollover(r *http.Request) (any, error) {
	var w admin.What
	if err := read(r, &w); err != nil {
		return nil, err
	}
	last, err := b.reg.LastRollover(r.Context())
	if err != nil {
		return nil, err
	}
	if last.Open() && (last.ToGeneration != 0 || !w.Generation) && (last.ToAnchors != 0 || !w.Roots) {
		return b.rolloverOf(r.Context(), last, 0, "") // goes on
	}
	next, err := b.nextRollover(r.Context(), w)
	if err != nil {
		return nil, err
	}
	err = b.update(r, func(tx *registry.Tx, actor string) error {
		if last.Open() {
			return tx.ExtendRollover(actor, next)
		}
		_, err := tx.StartRollover(actor, next)
		return err
	})
	if err != nil {
		return nil, err
	}
	return b.rollover(r)
}

// openRollover gives the rollover under way.
func (b *backend) openRollover(ctx context.Context) (registry.Rollover, error) {
	v, err := b.reg.LastRollover(ctx)
	if err == nil && !v.Open() {
		err = admin.Errorf(admin.Conflict, "no rollover is under way\nhint: hawser ca rollover start --generation")
	}
	return v, err
}

func (b *backend) unsigned(r *http.Request) (any, error) {
	p := params{r: r}
	after, limit := p.id("after"), min(p.limit(), maxPage)
	if p.err != nil {
		return nil, p.err
	}
	v, err := b.openRollover(r.Context())
	if err != nil {
		return nil, err
	}
	list, err := b.reg.Unsigned(r.Context(), v.ToGeneration, after, limit)
	out := make([]admin.Unsigned, 0, len(list))
	for _, u := range list {
		out = append(out, admin.Unsigned{ID: u.ID, CSR: u.CSR, Certificate: u.Certificate})
	}
	return out, err
}

// rolloverCA takes the new device CA up: from then on its certificates can be imported.
func (b *backend) rolloverCA(r *http.Request) (any, error) {
	var in struct {
		Certificate admin.Hex `json:"certificate"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	v, err := b.openRollover(r.Context())
	if err != nil {
		return nil, err
	}
	ca, err := x509.ParseCertificate(in.Certificate)
	if err == nil {
		err = pki.CheckCA(ca, pki.DeviceCA)
	}
	if err != nil {
		return nil, admin.Errorf(admin.Invalid, "%v", err)
	}
	if n, err := pki.Generation(ca); err != nil || uint32(n) != v.ToGeneration {
		return nil, admin.Errorf(admin.Invalid, "%s is not the device CA of generation %d", ca.Subject.CommonName, v.ToGeneration)
	}
	err = b.update(r, func(tx *registry.Tx, actor string) error {
		if err := tx.AddGeneration(actor, v.ToGeneration, ca.Raw); err != nil || v.State != registry.RolloverPlanned {
			return err
		}
		return tx.RolloverStep(actor, registry.RolloverSigning)
	})
	if err != nil {
		return nil, err
	}
	return nil, writeDeviceCAs(r.Context(), b.layout, b.reg)
}

// rolloverCertificates imports a part of the safe's answers: all of it or nothing.
func (b *backend) rolloverCertificates(r *http.Request) (any, error) {
	var in []admin.Resigned
	if err := read(r, &in); err != nil {
		return nil, err
	}
	if len(in) > rolloverPart {
		return nil, admin.Errorf(admin.Invalid, "%d certificates are more than %d", len(in), rolloverPart)
	}
	v, err := b.openRollover(r.Context())
	if err != nil {
		return nil, err
	}
	rows, keys, err := b.verifyResigned(in, v.ToGeneration)
	if err != nil {
		return nil, err
	}
	var out admin.Taken
	return &out, b.update(r, func(tx *registry.Tx, actor string) error {
		out = admin.Taken{}
		for i, v := range in {
			if v.Refused != "" {
				out.Refused++
				if err := tx.RefuseRollover(actor, v.ID, v.Refused); err != nil {
					return err
				}
				continue
			}
			added, err := tx.RolloverCertificate(actor, rows[i], keys[i])
			if err != nil {
				return err
			}
			if added {
				out.Added++
			} else {
				out.Known++
			}
		}
		return nil
	})
}

// verifyResigned holds each certificate against the new CA and its device's name, on all
// cores. Its key the registry compares with the one it has stored.
func (b *backend) verifyResigned(in []admin.Resigned, generation uint32) ([]registry.Certificate, [][32]byte, error) {
	cas, err := pki.CheckDeviceCAs(b.layout.Trust().DeviceCAs)
	if err != nil {
		return nil, nil, err
	}
	rows, keys := make([]registry.Certificate, len(in)), make([][32]byte, len(in))
	err = onAllCores(len(in), func(i int) error {
		if in[i].Refused != "" {
			return nil
		}
		id, n, cert, err := cas.Verify(in[i].Certificate)
		switch {
		case err != nil:
			return admin.Errorf(admin.Invalid, "%s: %v", in[i].ID, err)
		case id != in[i].ID:
			return admin.Errorf(admin.Invalid, "the certificate for %s is that of %s", in[i].ID, id)
		case uint32(n) != generation:
			return admin.Errorf(admin.Invalid, "the certificate for %s is of generation %d, not %d", id, n, generation)
		}
		pub, err := pki.PublicKey(cert)
		if err != nil {
			return err
		}
		rows[i] = registryCertificate(identity.DevicePrincipal(id), generation, cert)
		keys[i], err = pki.KeyFingerprint(pub)
		return err
	})
	return rows, keys, err
}

// rolloverAnchors takes the next anchor set up. Devices get it once the fleet moves.
func (b *backend) rolloverAnchors(r *http.Request) (any, error) {
	var in struct {
		Anchors admin.Hex `json:"anchors"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	v, err := b.openRollover(r.Context())
	if err != nil {
		return nil, err
	}
	_, last, err := b.layout.Anchors()
	if err != nil {
		return nil, err
	}
	if v.ToAnchors == 0 || v.ToAnchors != last.Sequence+1 && v.ToAnchors != last.Sequence {
		return nil, admin.Errorf(admin.Conflict, "rollover %d does not lead to an anchor set after number %d", v.No, last.Sequence)
	}
	set, err := b.layout.InstallAnchors(in.Anchors)
	if err != nil {
		return nil, admin.Errorf(admin.Invalid, "%v", err)
	}
	return nil, b.update(r, func(tx *registry.Tx, actor string) error {
		return tx.AddAnchorSet(actor, set.Sequence, in.Anchors, false)
	})
}

// rolloverLeaves installs broker certificates and serves them.
func (b *backend) rolloverLeaves(r *http.Request) (any, error) {
	var in struct {
		Certificates []admin.Hex `json:"certificates"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	for _, der := range in.Certificates {
		if _, err := b.layout.InstallBrokerLeaf(der); err != nil {
			return nil, admin.Errorf(admin.Invalid, "%v", err)
		}
	}
	return nil, b.serveLeaves()
}

func (b *backend) serveLeaves() error {
	if b.srv == nil {
		return nil
	}
	return b.srv.leaves.reload()
}

// moveRollover begins to send offers. For new roots, what is served must be such that
// both those who have moved and those who have not accept it.
func (b *backend) moveRollover(r *http.Request) (any, error) {
	v, err := b.openRollover(r.Context())
	if err != nil {
		return nil, err
	}
	if v.ToAnchors != 0 {
		if err := b.serveLeaves(); err != nil {
			return nil, err
		}
		if err := b.leavesFit(r.Context()); err != nil {
			return nil, err
		}
	}
	if err := b.update(r, func(tx *registry.Tx, actor string) error { return tx.RolloverStep(actor, registry.RolloverMoving) }); err != nil {
		return nil, err
	}
	return b.rollover(r)
}

func (b *backend) leavesFit(ctx context.Context) error {
	oldest, err := b.reg.OldestAnchors(ctx)
	if err != nil {
		return err
	}
	for _, d := range b.layout.Config.Fleet.Domains {
		want, err := b.layout.WantedRoot(d, oldest)
		if err != nil {
			return err
		}
		have, err := b.layout.LeafRoot(d)
		if err != nil {
			return err
		}
		if !have.Equal(want) {
			label := strings.ToLower(pki.RootLabel(want))
			return admin.Errorf(admin.Conflict, "%s is served under root %s, its devices need root %s\nhint: hawser ca issue-broker --root %s --domain %s",
				d, pki.RootLabel(have), pki.RootLabel(want), label, d)
		}
	}
	return nil
}

func (b *backend) retireRollover(r *http.Request) (any, error) {
	var in struct {
		Waive []identity.ID `json:"waive"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	if _, err := b.openRollover(r.Context()); err != nil {
		return nil, err
	}
	err := b.update(r, func(tx *registry.Tx, actor string) error { return tx.RetireRollover(actor, in.Waive) })
	if errors.Is(err, registry.ErrState) {
		return nil, admin.Errorf(admin.Conflict, "%v\nhint: hawser ca rollover status names them; --waive ID,... leaves them behind", err)
	}
	if err != nil {
		return nil, err
	}
	if b.srv != nil { // their certificate is gone, their connection is not yet
		for _, id := range in.Waive {
			b.srv.br.Disconnect(identity.DevicePrincipal(id))
		}
	}
	oldest, err := b.reg.OldestAnchors(r.Context())
	if err != nil {
		return nil, err
	}
	if oldest > 0 {
		err = b.layout.ForgetRoots(oldest)
	}
	if err := errors.Join(err, writeDeviceCAs(r.Context(), b.layout, b.reg)); err != nil {
		return nil, fmt.Errorf("retired, but the trust bundles were not written: %w\nhint: the next start writes them", err)
	}
	return b.rollover(r)
}

func (b *backend) abortRollover(r *http.Request) (any, error) {
	_, err := b.openRollover(r.Context())
	if err == nil {
		err = b.update(r, func(tx *registry.Tx, actor string) error { return tx.AbortRollover(actor) })
	}
	if err != nil {
		return nil, err
	}
	return b.rollover(r)
}

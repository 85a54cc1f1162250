package server

import (
	"crypto/rand"
	"crypto/x509"
	"errors"
	"net/http"
	"runtime"
	"sync"
	"time"

	"hawser/internal/admin"
	"hawser/internal/identity"
	"hawser/internal/pki"
	"hawser/internal/registry"
)

const (
	pageSize   = 1000 // devices on one page when nothing is asked for
	maxPage    = 10_000
	maxPending = 100 // commands shown with a device
	keepID     = time.Hour
)

func (b *backend) online(id identity.ID) *bool {
	if b.srv == nil {
		return nil
	}
	on := b.srv.br.Online(identity.DevicePrincipal(id))
	return &on
}

func (b *backend) deviceOf(d registry.Device) admin.Device {
	out := admin.Device{ID: d.ID, Class: d.Class, State: string(d.State), Online: b.online(d.ID), Tags: d.Tags,
		Reason: d.Reason, Note: d.Note, Created: admin.UTC(d.Created), Enrolled: admin.UTC(d.Enrolled), LastSeen: admin.UTC(d.LastSeen)}
	if d.KeyHash != [32]byte{} {
		out.Key = d.KeyHash[:]
	}
	if d.Station != "" {
		out.Station, out.Hardware, out.Flashed, out.Block = d.Station, d.Hardware, admin.UTC(d.Flashed), d.Block[:]
	}
	if h := d.Hello; h != nil {
		out.Hello = &admin.Hello{At: admin.UTC(h.At), Class: h.Class, Firmware: h.Firmware, Image: h.Image, TLS: h.TLS,
			Boot: h.Boot, Nonce: h.Nonce, Features: h.Features, Encoding: h.Encoding}
	}
	return out
}

func cloneOf(c registry.Clone) admin.Clone {
	boot := func(v registry.Boot) admin.Boot {
		return admin.Boot{Nonce: v.Nonce, Remote: v.Remote, At: admin.UTC(v.At)}
	}
	return admin.Clone{Back: boot(c.Back), Other: boot(c.Other)}
}

func certificateOf(c registry.Certificate) admin.Certificate {
	return admin.Certificate{Fingerprint: c.Fingerprint[:], Owner: c.Principal.Name, State: string(c.State),
		Generation: c.Generation, NotBefore: admin.UTC(c.NotBefore), NotAfter: admin.UTC(c.NotAfter), DER: c.DER}
}

func (b *backend) certificates(r *http.Request, who identity.Principal) ([]admin.Certificate, error) {
	list, err := b.reg.Certificates(r.Context(), who)
	out := make([]admin.Certificate, 0, len(list))
	for _, c := range list {
		out = append(out, certificateOf(c))
	}
	return out, err
}

// devices lists a page. Who is online is no column of the registry: pages are
// read until enough is found.
func (b *backend) devices(r *http.Request) (any, error) {
	p := params{r: r}
	online := p.flag("online")
	f := registry.DeviceFilter{State: registry.DeviceState(p.text("state")), Class: p.text("class"), Tag: p.text("tag"),
		Prefix: p.text("prefix"), After: p.id("after"), Limit: p.limit(),
		Station: p.text("station"), FlashedSince: p.time("flashed_since"), FlashedUntil: p.time("flashed_until")}
	if p.err != nil {
		return nil, p.err
	}
	if online != nil {
		if err := b.needServer("who is online"); err != nil {
			return nil, err
		}
	}
	if f.Limit == 0 {
		f.Limit = pageSize
	}
	f.Limit = min(f.Limit, maxPage)
	page, want := admin.DevicePage{Devices: []admin.Device{}}, f.Limit
	for {
		list, err := b.reg.Devices(r.Context(), f)
		if err != nil {
			return nil, err
		}
		for _, d := range list {
			f.After = d.ID
			v := b.deviceOf(d)
			if online == nil || *v.Online == *online {
				page.Devices = append(page.Devices, v)
			}
			if len(page.Devices) == want {
				page.More = d.ID
				return page, nil
			}
		}
		if len(list) < f.Limit {
			return page, nil
		}
	}
}

func (b *backend) device(r *http.Request) (any, error) {
	id, err := pathID(r)
	if err != nil {
		return nil, err
	}
	d, err := b.reg.Device(r.Context(), id)
	if err != nil {
		return nil, err
	}
	out := admin.DeviceDetail{Device: b.deviceOf(d), LastCID: d.LastCID}
	if out.Certificates, err = b.certificates(r, identity.DevicePrincipal(id)); err != nil {
		return nil, err
	}
	if out.Config, err = b.configOf(r, id); err != nil {
		return nil, err
	}
	pending, err := b.reg.PendingCommands(r.Context(), id, 0, maxPending)
	if err != nil {
		return nil, err
	}
	for _, c := range pending {
		out.Pending = append(out.Pending, commandOf(c))
	}
	clones, err := b.reg.Clones(r.Context(), id, 0)
	if err != nil {
		return nil, err
	}
	for _, c := range clones {
		out.Clones = append(out.Clones, cloneOf(c))
	}
	if b.srv != nil {
		waiting, dropped := b.srv.br.Queue(id)
		out.Queue = &admin.Queue{Waiting: waiting, Dropped: dropped}
	}
	return out, nil
}

// reserve draws a free id and keeps it for an hour.
func (b *backend) reserve(r *http.Request) (any, error) {
	requests, err := b.reg.Requests(r.Context(), registry.RequestPending, maxPage)
	if err != nil {
		return nil, err
	}
	asked := map[string]bool{}
	for _, q := range requests {
		asked[q.Subject] = true
	}
	for {
		id, err := identity.RandomID(rand.Reader)
		if err != nil {
			return nil, err
		}
		_, err = b.reg.Device(r.Context(), id)
		if err == nil || asked[id.String()] {
			continue
		}
		if b.notReserved(r, id) != nil {
			continue
		}
		if !errors.Is(err, registry.ErrNotFound) {
			return nil, err
		}
		if b.keep(id) {
			return struct {
				ID identity.ID `json:"id"`
			}{id}, nil
		}
	}
}

// checkReserved refuses an id that a bench was given and that no device has yet.
func (b *backend) checkReserved(r *http.Request) (any, error) {
	id, err := pathID(r)
	if err != nil {
		return nil, err
	}
	_, err = b.reg.Device(r.Context(), id)
	if errors.Is(err, registry.ErrNotFound) {
		err = b.notReserved(r, id)
	}
	return nil, err
}

// notReserved refuses an id that was given to a flashing bench.
func (b *backend) notReserved(r *http.Request, id identity.ID) error {
	station, err := b.reg.Reserved(r.Context(), id)
	if err == nil && station != "" {
		err = admin.Errorf(admin.Conflict, "%s is reserved for the flashing bench %s\nhint: leave --id away for a free one", id, station)
	}
	return err
}

func (b *backend) keep(id identity.ID) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	for old, until := range b.reserved {
		if now.After(until) {
			delete(b.reserved, old)
		}
	}
	if _, taken := b.reserved[id]; taken {
		return false
	}
	b.reserved[id] = now.Add(keepID)
	return true
}

// enrolment verifies what the registry will believe for ever: chain, profile,
// name, and that CSR and certificate are of one key.
func (b *backend) enrolment(id identity.ID, e admin.Enrolment) (registry.Enrolment, error) {
	var none registry.Enrolment
	csr, err := pki.ParseCSR(e.CSR)
	if err != nil {
		return none, admin.Errorf(admin.Invalid, "%v", err)
	}
	if e.Class != "" {
		if err := pki.CheckClass(e.Class); err != nil {
			return none, admin.Errorf(admin.Invalid, "%v", err)
		}
	}
	name, generation, cert, err := pki.VerifyDeviceLeaf(e.Certificate, b.layout.Trust().DeviceCAs)
	switch {
	case err != nil:
		return none, admin.Errorf(admin.Invalid, "%v", err)
	case name != id:
		return none, admin.Errorf(admin.Invalid, "the certificate is that of %s, not of %s", name, id)
	case !csr.Pub.Equal(cert.PublicKey):
		return none, admin.Errorf(admin.Invalid, "the certificate is for another key than the request")
	}
	key, err := pki.KeyFingerprint(csr.Pub)
	if err != nil {
		return none, err
	}
	c := registryCertificate(identity.DevicePrincipal(id), uint32(generation), cert)
	return registry.Enrolment{ID: id, Class: e.Class, KeyHash: key, CSR: csr.DER, Certificate: &c, Tags: e.Tags, At: time.Now()}, nil
}

func registryCertificate(who identity.Principal, generation uint32, c *x509.Certificate) registry.Certificate {
	return registry.Certificate{Fingerprint: pki.Fingerprint(c.Raw), Principal: who, Generation: generation, DER: c.Raw,
		NotBefore: c.NotBefore, NotAfter: c.NotAfter}
}

func (b *backend) enroll(r *http.Request) (any, error) {
	id, err := pathID(r)
	if err != nil {
		return nil, err
	}
	var e admin.Enrolment
	if err := read(r, &e); err != nil {
		return nil, err
	}
	row, err := b.enrolment(id, e)
	if err != nil {
		return nil, err
	}
	if err := b.update(r, func(tx *registry.Tx, actor string) error { return tx.Enrol(actor, row) }); err != nil {
		return nil, err
	}
	d, err := b.reg.Device(r.Context(), id)
	return b.deviceOf(d), err
}

// enrollMany enrols in one commit: all or none.
func (b *backend) enrollMany(r *http.Request) (any, error) {
	var list []admin.NamedEnrolment
	if err := read(r, &list); err != nil {
		return nil, err
	}
	rows, err := b.enrolments(list)
	if err != nil {
		return nil, err
	}
	return nil, b.update(r, func(tx *registry.Tx, actor string) error {
		for _, row := range rows {
			if err := tx.Enrol(actor, row); err != nil {
				return err
			}
		}
		return nil
	})
}

// enrolments verifies on all cores: the signatures cost more than the rows do.
func (b *backend) enrolments(list []admin.NamedEnrolment) ([]registry.Enrolment, error) {
	rows, errs := make([]registry.Enrolment, len(list)), make([]error, len(list))
	workers := runtime.GOMAXPROCS(0)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < len(list); i += workers {
				rows[i], errs[i] = b.enrolment(list[i].ID, list[i].Enrolment)
			}
		})
	}
	wg.Wait()
	return rows, errors.Join(errs...)
}

func (b *backend) tag(r *http.Request) (any, error) {
	id, err := pathID(r)
	if err != nil {
		return nil, err
	}
	var in struct {
		Add    []string `json:"add"`
		Remove []string `json:"remove"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	err = b.update(r, func(tx *registry.Tx, actor string) error { return tx.TagDevice(actor, id, in.Add, in.Remove) })
	if err != nil {
		return nil, err
	}
	d, err := b.reg.Device(r.Context(), id)
	return b.deviceOf(d), err
}

package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"hawser/internal/admin"
	"hawser/internal/backup"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// stalledAfter is how long a client of a backup may take nothing before it is
// given up: the checkpoints wait for it.
const stalledAfter = time.Minute

// backup streams a backup, in clear: who is asking encrypts it, so a passphrase
// never comes here. What goes wrong in the middle is told in a trailer.
func (b *backend) backup(w http.ResponseWriter, r *http.Request) {
	if !b.copying.TryLock() {
		refuse(w, admin.Errorf(admin.Conflict, "another backup of this fleet is being taken"))
		return
	}
	defer b.copying.Unlock()
	c, err := b.beginBackup(r.Context())
	if err != nil {
		refuse(w, err)
		return
	}
	defer c.end()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Trailer", admin.BackupTrailer)
	ctrl := http.NewResponseController(w)
	err = c.write(r.Context(), &patient{w, ctrl})
	_ = ctrl.SetWriteDeadline(time.Time{}) // where it is not supported it was not set
	if err != nil {
		w.Header().Set(admin.BackupTrailer, admin.TrailerText(apiError(err)))
	}
}

// patient ends a write that nobody takes.
type patient struct {
	w    io.Writer
	ctrl *http.ResponseController
}

func (p *patient) Write(b []byte) (int, error) {
	if err := p.ctrl.SetWriteDeadline(time.Now().Add(stalledAfter)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return 0, err
	}
	return p.w.Write(b)
}

// taking is a backup on its way. The registry was copied first: all that it says
// of the log is true of the log as it is copied later.
type taking struct {
	b        *backend
	log      *msglog.Log
	release  func() // lets the checkpoints go on
	tmp      string
	registry *os.File
	spool    *os.File
	manifest backup.Manifest
}

// copyPrefix begins the names of the directories in which a backup keeps what it
// copies first. One that is left was left by a process that was killed.
const copyPrefix = ".tmp-backup-"

func (b *backend) beginBackup(ctx context.Context) (*taking, error) {
	l, err := b.openLog(ctx)
	if err != nil {
		return nil, err
	}
	left, err := filepath.Glob(filepath.Join(b.layout.ServerDir(), copyPrefix+"*"))
	if err != nil {
		return nil, err
	}
	for _, dir := range left {
		if err := os.RemoveAll(dir); err != nil {
			return nil, fmt.Errorf("take a backup: %w", err)
		}
	}
	c := &taking{b: b, log: l, release: func() {}}
	if c.tmp, err = os.MkdirTemp(b.layout.ServerDir(), copyPrefix+"*"); err != nil {
		return nil, fmt.Errorf("take a backup: %w", err)
	}
	if b.srv != nil {
		c.release = b.srv.br.HoldCheckpoints()
	}
	if err := c.copyRegistry(ctx); err != nil {
		c.end()
		return nil, fmt.Errorf("take a backup: %w", err)
	}
	return c, nil
}

func (c *taking) copyRegistry(ctx context.Context) (err error) {
	c.manifest.Taken = time.Now().UTC().Truncate(time.Millisecond)
	path := filepath.Join(c.tmp, backup.RegistryName)
	if err := c.b.reg.Snapshot(ctx, path); err != nil {
		return err
	}
	if c.registry, err = os.Open(path); err != nil {
		return err
	}
	if c.spool, err = os.Create(filepath.Join(c.tmp, "spool")); err != nil {
		return err
	}
	// Both live on as descriptors, and go with this process whatever happens to it.
	return os.RemoveAll(c.tmp)
}

// end gives everything back.
func (c *taking) end() {
	c.release()
	for _, f := range []*os.File{c.registry, c.spool} {
		if f != nil {
			f.Close()
		}
	}
	os.RemoveAll(c.tmp)
}

// write writes the whole of it.
func (c *taking) write(ctx context.Context, to io.Writer) error {
	w := backup.NewWriter(to)
	if err := c.describe(ctx); err != nil {
		return err
	}
	if err := c.files(w); err != nil {
		return err
	}
	if err := w.Member(backup.RegistryName, 0o600, c.registry); err != nil {
		return err
	}
	var err error
	c.manifest.Requeue, err = c.log.Backup(ctx, c.spool, func(name string, r io.Reader) error {
		return w.Member(backup.LogPrefix+name, 0o600, r)
	})
	if err != nil {
		return err
	}
	text, err := c.manifest.Encode()
	if err != nil {
		return err
	}
	return errors.Join(w.Member(backup.ManifestName, 0o600, bytes.NewReader(text)), w.Close())
}

func (c *taking) files(w *backup.Writer) error {
	list, err := c.b.layout.BackupFiles()
	if err != nil {
		return err
	}
	for _, name := range list {
		path := filepath.Join(c.b.layout.Dir, name)
		info, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // an answered request: it went since it was listed
		}
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := w.Member(filepath.ToSlash(name), info.Mode(), bytes.NewReader(text)); err != nil {
			return err
		}
	}
	return nil
}

// describe fills the manifest in.
func (c *taking) describe(ctx context.Context) error {
	m, cfg := &c.manifest, c.b.layout.Config
	m.Fleet, m.Trial, m.Outside = cfg.Fleet.ID.String(), cfg.Fleet.Trial, cfg.Log.NATSURL != ""
	m.Version = c.b.version
	m.First, m.End = c.log.First().Frame(), c.log.End().Frame()
	meta, err := c.b.reg.Meta(ctx)
	if err != nil {
		return err
	}
	m.Epoch, m.Starts = meta.Epoch, meta.Start
	m.Devices, m.Services, err = countsOf(ctx, c.b.reg)
	return err
}

// countsOf gives the devices by state and the active services.
func countsOf(ctx context.Context, r *registry.Registry) (devices map[string]int, services int, err error) {
	devices = map[string]int{}
	counts, err := r.DeviceCounts(ctx)
	if err != nil {
		return nil, 0, err
	}
	for state, n := range counts {
		devices[string(state)] = n
	}
	list, err := r.Services(ctx)
	for _, s := range list {
		if s.State == registry.ServiceActive {
			services++
		}
	}
	return devices, services, err
}

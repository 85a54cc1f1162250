package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"hawser/internal/backup"
	"hawser/internal/durable"
	"hawser/internal/fleet"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// RestoreConfig says what to restore. Logger and Progress may be nil.
type RestoreConfig struct {
	File       io.ReadSeeker // the backup; it is read twice
	Dir        string        // of the fleet to be; does not exist or is empty
	Passphrase func() ([]byte, error)
	Actor      string // for the audit
	Logger     *slog.Logger
	// Progress is told what is done at present, and how far it is: bytes of the
	// file, or records of the log.
	Progress func(stage Stage, n uint64)
}

// Stage is a part of a restore.
type Stage string

// The stages, in their order.
const (
	StageCheck  Stage = "checking the backup"
	StageWrite  Stage = "writing"
	StageVerify Stage = "reading the restored log"
)

// Restored is what a restore has made.
type Restored struct {
	backup.Manifest
	Dir     string `json:"dir"`
	Records uint64 `json:"records,string"` // in the log
}

// Restore makes the state directory of a fleet out of a backup. The whole file is
// checked before anything is written; then the fleet is built beside its final
// place, opened and read as a start would, and renamed when all of it is on disk.
// So a failure, or a kill at any moment, leaves no fleet (of a log in an outside
// cluster its streams may stay). Its next start begins a new epoch of command ids
// and configuration versions: devices may have seen more than the backup knows.
func Restore(ctx context.Context, cfg RestoreConfig) (*Restored, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Progress == nil {
		cfg.Progress = func(Stage, uint64) {}
	}
	dir, err := fleet.FreeDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	r := &restoring{cfg: cfg}
	if err := r.check(ctx); err != nil {
		return nil, err
	}
	if err := r.makeRoom(dir); err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	defer os.RemoveAll(r.tmp) // after the rename there is nothing left of that name
	if err := r.build(ctx); err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	defer r.lock.Close()
	if err := os.Rename(r.tmp, dir); err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	r.out.Dir = dir
	return &r.out, durable.SyncDir(filepath.Dir(dir))
}

// restoring is a restore on its way.
type restoring struct {
	cfg  RestoreConfig
	pass []byte // asked once
	tmp  string // the fleet directory, before it has its name
	lock *durable.FileLock
	out  Restored
}

// open begins to read the backup from its beginning.
func (r *restoring) open(ctx context.Context, stage Stage) (*backup.Reader, error) {
	if _, err := r.cfg.File.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return backup.Open(&counted{ctx: ctx, r: r.cfg.File, stage: stage, tell: r.cfg.Progress}, func() (_ []byte, err error) {
		if r.pass == nil {
			r.pass, err = r.cfg.Passphrase()
		}
		return r.pass, err
	})
}

// counted tells how far a file is read, and ends with ctx.
type counted struct {
	ctx   context.Context
	r     io.Reader
	n     uint64
	stage Stage
	tell  func(Stage, uint64)
}

func (c *counted) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(p)
	c.n += uint64(n)
	c.tell(c.stage, c.n)
	return n, err
}

// check reads the whole backup once and writes nothing.
func (r *restoring) check(ctx context.Context) error {
	m, err := CheckBackup(ctx, func() (*backup.Reader, error) { return r.open(ctx, StageCheck) })
	r.out.Manifest = m
	return err
}

// CheckBackup reads a backup to its end and gives its manifest. All members that a
// restore needs must be there.
func CheckBackup(ctx context.Context, open func() (*backup.Reader, error)) (m backup.Manifest, err error) {
	b, err := open()
	if err != nil {
		return m, err
	}
	need := map[string]bool{"hawser.toml": true, backup.RegistryName: true, backup.ManifestName: true}
	for _, s := range msglog.BackupStreams() {
		need[backup.LogPrefix+s] = true
	}
	for {
		member, data, err := b.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return m, err
		}
		delete(need, member.Name)
		if member.Name == backup.ManifestName {
			if m, err = backup.ReadManifest(data); err != nil {
				return m, err
			}
		}
	}
	for name := range need {
		return m, fmt.Errorf("%w: there is no %s in it", backup.ErrDamaged, name)
	}
	return m, ctx.Err()
}

// makeRoom makes the directory beside dir. What a killed restore left there goes.
func (r *restoring) makeRoom(dir string) error {
	prefix := filepath.Join(filepath.Dir(dir), ".tmp-restore-"+filepath.Base(dir)+"-")
	left, err := filepath.Glob(prefix + "*")
	if err != nil {
		return err
	}
	for _, old := range left {
		lock, err := durable.Lock(filepath.Join(old, "server", "lock"))
		if errors.Is(err, durable.ErrLocked) {
			return fmt.Errorf("another process restores to %s", dir)
		}
		if err == nil {
			defer lock.Close()
		}
		if err := os.RemoveAll(old); err != nil {
			return err
		}
	}
	if r.tmp, err = os.MkdirTemp(filepath.Dir(dir), filepath.Base(prefix)+"*"); err != nil {
		return err
	}
	server := filepath.Join(r.tmp, "server")
	if err := os.MkdirAll(filepath.Join(server, "requests"), 0o700); err != nil {
		return err
	}
	r.lock, err = durable.Lock(filepath.Join(server, "lock"))
	return err
}

// build writes everything and opens it once.
func (r *restoring) build(ctx context.Context) error {
	b, err := r.open(ctx, StageWrite)
	if err != nil {
		return err
	}
	for {
		m, data, err := b.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		switch {
		case m.Name == backup.ManifestName:
		case m.Name == backup.RegistryName:
			err = writeNew(filepath.Join(r.tmp, "server", "registry.db"), 0o600, data)
		case strings.HasPrefix(m.Name, backup.LogPrefix):
			err = r.log(ctx, b, m.Name, data)
		default:
			err = writeNew(filepath.Join(r.tmp, filepath.FromSlash(m.Name)), m.Mode&0o755, data)
		}
		if err != nil {
			return err
		}
	}
	if err := r.verify(ctx); err != nil {
		return err
	}
	return syncAll(r.tmp)
}

// writeNew makes a file that must not be there.
func writeNew(path string, mode fs.FileMode, data io.Reader) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, data)
	return errors.Join(err, f.Close())
}

// log hands the streams, of which the first is at hand, to the log. The files and
// the registry stand before them.
func (r *restoring) log(ctx context.Context, b *backup.Reader, name string, data io.Reader) error {
	l, err := r.mark(ctx)
	if err != nil {
		return err
	}
	cfg := logConfig(l.Config, l.LogDir(), l.NATSCredentials())
	cfg.Logger = r.cfg.Logger
	left := len(msglog.BackupStreams())
	err = msglog.Restore(ctx, cfg, func() (string, io.Reader, error) {
		if left--; left < 0 {
			return "", nil, io.EOF
		}
		if data == nil {
			m, d, err := b.Next()
			if err != nil {
				return "", nil, noEnd(err)
			}
			name, data = m.Name, d
		}
		d := data
		data = nil
		return strings.TrimPrefix(name, backup.LogPrefix), d, nil
	})
	if errors.Is(err, msglog.ErrExists) {
		return fmt.Errorf("%w: nothing was written there\nhint: a log in an outside cluster is restored to a cluster that has none of this fleet", err)
	}
	return err
}

// noEnd is for where the file must not end yet.
func noEnd(err error) error {
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: its members are in another order", backup.ErrDamaged)
	}
	return err
}

// mark opens the restored files and writes into the registry where it comes from.
func (r *restoring) mark(ctx context.Context) (*fleet.Layout, error) {
	l, err := fleet.OpenLayout(r.tmp)
	if err != nil {
		return nil, err
	}
	if have := l.Config.Fleet.ID.String(); have != r.out.Fleet {
		return nil, fmt.Errorf("%w: its manifest is of the fleet %s, its hawser.toml of %s", backup.ErrDamaged, r.out.Fleet, have)
	}
	reg, err := openRegistry(ctx, l, registry.Options{})
	if err != nil {
		return nil, err
	}
	err = reg.Update(ctx, func(tx *registry.Tx) error { return tx.MarkRestored(r.cfg.Actor, r.out.Taken, r.out.Requeue) })
	return l, errors.Join(err, reg.Close())
}

// verify opens registry and log as a start does and reads every frame.
func (r *restoring) verify(ctx context.Context) error {
	l, err := fleet.OpenLayout(r.tmp)
	if err != nil {
		return err
	}
	reg, err := openRegistry(ctx, l, registry.Options{})
	if err != nil {
		return err
	}
	defer reg.Close()
	log, err := openLog(ctx, l, reg, r.cfg.Logger)
	if err != nil {
		return err
	}
	err = log.Read(ctx, 0, func(*msglog.Record) error {
		if r.out.Records++; r.out.Records%4096 == 0 {
			r.cfg.Progress(StageVerify, r.out.Records)
		}
		return nil
	})
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainFor)
	defer cancel()
	return errors.Join(err, log.Close(end), reg.Close())
}

// syncAll makes all that is below dir durable.
func syncAll(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() && !d.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		return errors.Join(f.Sync(), f.Close())
	})
}

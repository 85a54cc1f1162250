package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/backup"
	"hawser/internal/durable"
	"hawser/internal/server"
)

func (a *app) backupCommand() *cobra.Command {
	var out string
	var encrypt bool
	pass := passphrases{fd: -1}
	cmd := &cobra.Command{
		Use:   "backup --out FILE",
		Short: "write all of the fleet's state to one file",
		Long: `backup writes registry and log, hawser.toml, the trust bundles, the anchor sets, the
broker's keys and certificates and the requests that wait for the safe to one file.
A running server goes on serving: it copies what it has, and all that it acknowledged
before the backup began is in it. Without a server the files are copied.

The file is written beside its place, read back, and then given its name; a failure
leaves no file. It is never written over another.

With --encrypt, or --passphrase-fd, it is encrypted with a passphrase. Without, the file
is the server's identity in clear: who reads it can pose as the broker. Its mode is
0600; keep it like a key.

No CA key is ever in a backup, not even a trial fleet's: those lie in ca-a and ca-b,
change rarely, and are to be copied apart. "hawser restore" makes a fleet of the file.`,
		Example: `  hawser backup --dir fleet --out fleet.backup --encrypt
  hawser backup --dir fleet --out /mnt/backups/$(date +%F) --passphrase-fd 3 3<passphrase`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == "" {
				return usagef(cmd, "where to?\nhint: --out FILE")
			}
			if _, err := os.Lstat(out); err == nil {
				return fmt.Errorf("%s is there already: nothing was written\nhint: choose another --out", out)
			}
			var text []byte
			if encrypt || pass.fd >= 0 {
				var err error
				if text, err = freshBackupPassphrase(&pass); err != nil {
					return err
				}
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.takeBackup(ctx, c, out, text) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&out, "out", "", "the file to write; it must not exist")
	f.BoolVar(&encrypt, "encrypt", false, "encrypt it with a passphrase that is asked for")
	pass.flag(cmd)
	return a.withJSON(cmd)
}

// minBackupPassphrase is in bytes.
const minBackupPassphrase = 8

func freshBackupPassphrase(p *passphrases) ([]byte, error) {
	text, err := p.fresh("the backup")
	if err == nil && len(text) < minBackupPassphrase {
		err = fmt.Errorf("the passphrase for the backup is shorter than %d bytes", minBackupPassphrase)
	}
	return text, err
}

// takeBackup writes the file and says what is in it.
func (a *app) takeBackup(ctx context.Context, c *admin.Client, out string, passphrase []byte) error {
	w := &told{}
	done := a.watch(ctx, func() string { return fmt.Sprintf("backup: %s", bytesText(w.n.Load())) })
	var m backup.Manifest
	err := durable.CreateStream(out, 0o600, func(f *os.File) error {
		w.w = f
		if err := fillBackup(ctx, c, w, passphrase); err != nil {
			return err
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		var err error
		m, err = server.CheckBackup(ctx, func() (*backup.Reader, error) {
			return backup.Open(f, func() ([]byte, error) { return passphrase, nil })
		})
		return err
	})
	done()
	switch {
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%s is there already: nothing was written\nhint: choose another --out", out)
	case err != nil:
		return fmt.Errorf("no backup was taken: %w", err)
	}
	v := struct {
		File      string `json:"file"`
		Size      uint64 `json:"size,string"`
		Encrypted bool   `json:"encrypted"`
		backup.Manifest
	}{out, w.n.Load(), passphrase != nil, m}
	return emitOne(a, v, func() {
		a.fields("backup", out, "size", bytesText(v.Size), "taken", stamp(m.Taken), "devices", deviceCounts(m.Devices), "encrypted", yesNo(v.Encrypted))
		if !v.Encrypted {
			a.note("the file is the server's identity in clear: keep it like a key, or use --encrypt")
		}
	})
}

func fillBackup(ctx context.Context, c *admin.Client, w io.Writer, passphrase []byte) error {
	if passphrase == nil {
		return c.Backup(ctx, w)
	}
	e, err := backup.Encrypt(w, passphrase)
	if err != nil {
		return err
	}
	if err := c.Backup(ctx, e); err != nil {
		return err
	}
	return e.Close()
}

// told counts what is written.
type told struct {
	w io.Writer
	n atomic.Uint64
}

func (t *told) Write(p []byte) (int, error) {
	n, err := t.w.Write(p)
	t.n.Add(uint64(n))
	return n, err
}

// watch shows a line now and then, from two seconds on, until done is called.
func (a *app) watch(ctx context.Context, line func() string) (done func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		p := &progress{app: a, live: terminal(a.err)}
		defer p.end()
		for wait := quietFor; ; wait = p.every() {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
				p.show("%s", line())
			}
		}
	}()
	return func() { cancel(); <-ended }
}

func yesNo(v bool) string {
	if v {
		return "yes"
	}
	return "no"
}

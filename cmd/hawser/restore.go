package main

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/backup"
	"hawser/internal/server"
)

func (a *app) restoreCommand() *cobra.Command {
	pass := passphrases{fd: -1}
	cmd := &cobra.Command{
		Use:   "restore FILE --dir NEW",
		Short: "make a fleet of a backup",
		Long: `restore makes the state directory NEW, which must not exist, of what "hawser backup"
wrote. The whole file is checked first: one that was changed or cut off is refused and
nothing is written. The fleet is built beside NEW, opened and read once as a start
would, and gets its name when all of it is on disk.

What happened after the backup was taken is lost to the server, not to the devices.
So the first start begins a new epoch: command ids and configuration versions go on
above every one that a device can have seen, and no command runs twice. A command that
was open at the backup is sent again; a device that has done it answers so, and it ends
as "unknown". Devices that know more than the backup are listed by "hawser status" and
"hawser device list --ahead"; "hawser device adopt" takes a certificate that they got
since.

See that the old server is gone before the new one is started: both have the same
identity. CA keys are in no backup; a trial fleet can enrol devices again when its old
ca-a and ca-b are copied into NEW. A log in an outside NATS cluster is restored to the
cluster that hawser.toml names, which must not have it.`,
		Example: `  hawser restore fleet.backup --dir fleet
  hawser restore fleet.backup --dir fleet --passphrase-fd 3 3<passphrase`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return a.restore(cmd, args[0], &pass) },
	}
	pass.flag(cmd)
	return a.withJSON(cmd)
}

func (a *app) restore(cmd *cobra.Command, name string, pass *passphrases) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	var at atomic.Value
	at.Store("")
	done := a.watch(cmd.Context(), func() string { return at.Load().(string) })
	r, err := server.Restore(cmd.Context(), server.RestoreConfig{
		File: f, Dir: a.dir, Actor: server.UserName(os.Getuid()),
		Passphrase: func() ([]byte, error) { return pass.known(name) },
		Progress: func(stage server.Stage, n uint64) {
			amount := bytesText(n)
			if stage == server.StageVerify {
				amount = fmt.Sprintf("%d records", n)
			}
			at.Store(fmt.Sprintf("%s: %s", stage, amount))
		},
	})
	done()
	switch {
	case errors.Is(err, backup.ErrPassphrase), errors.Is(err, backup.ErrDamaged):
		return fmt.Errorf("%s: %w: nothing was restored", name, err)
	case err != nil:
		return err
	}
	return emitOne(a, r, func() { a.showRestored(r) })
}

func (a *app) showRestored(r *server.Restored) {
	a.fields("fleet", r.Fleet, "dir", r.Dir, "state of", fmt.Sprintf("%s, %s", stamp(r.Taken), ago(r.Taken, time.Now())),
		"devices", deviceCounts(r.Devices), "services", fmt.Sprint(r.Services), "messages", fmt.Sprint(r.Records),
		"epoch", fmt.Sprintf("%d; the first start begins a new one", r.Epoch))
	if r.Trial {
		a.note("the CA keys of a trial fleet are in no backup: to enrol devices, copy the old ca-a and ca-b into %s", r.Dir)
	}
	a.note("revocations, and whatever else was changed after that, are forgotten: repeat them")
	a.note("see that the old server is gone, then start this one\nhint: hawser serve --dir %s", r.Dir)
}

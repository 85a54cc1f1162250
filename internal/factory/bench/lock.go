package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"hawser/internal/factory/probe"
	"hawser/internal/identity"
)

const (
	lockFor   = time.Minute      // the command
	lockedFor = 10 * time.Second // until the probe gives an answer afterwards
	retry     = 200 * time.Millisecond
	maxSaid   = 500 // bytes of what a command said that are shown
)

// lockUnit runs the command that locks units, if there is one, and demands that the unit's
// memory can then not be read. It is true if that was seen.
func (b *Bench) lockUnit(ctx context.Context, id identity.ID) (bool, error) {
	if b.Settings.Lock == "" {
		return false, nil
	}
	if err := runLock(ctx, b.Settings.Lock, id); err != nil {
		return false, err
	}
	spec, err := b.Settings.spec()
	if err != nil {
		return false, err
	}
	if err := mustRefuse(ctx, spec); err != nil {
		return false, err
	}
	return true, nil
}

func runLock(ctx context.Context, command string, id identity.ID) error {
	ctx, cancel := context.WithTimeout(ctx, lockFor)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", command)
	cmd.Env = append(os.Environ(), "HAWSER_UNIT="+id.String())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	said, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	text := string(bytes.TrimSpace(said))
	text = strings.Join(strings.Fields(text[max(0, len(text)-maxSaid):]), " ")
	return fmt.Errorf("the lock command failed: %w: %s", err, text)
}

// mustRefuse reads the magic of the identity block, four bytes that are no secret, and
// wants a refusal. A probe that does not answer shows nothing and is asked again.
func mustRefuse(ctx context.Context, spec probe.Spec) error {
	ctx, cancel := context.WithTimeout(ctx, lockedFor)
	defer cancel()
	p, err := spec.Open(ctx)
	if err != nil {
		return err
	}
	defer p.Close()
	again := time.NewTicker(retry)
	defer again.Stop()
	for {
		_, err := p.Read(ctx, spec.Identity, 4)
		switch {
		case err == nil:
			return errors.New("the unit is not locked: its memory can still be read\nhint: what does the lock command need to take effect, a power cycle?")
		case errors.Is(err, probe.ErrTarget):
			return nil
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return fmt.Errorf("whether the unit is locked is not known: %w", err)
		}
	}
}

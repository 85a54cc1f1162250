package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/server"
)

// connect gives a client of the fleet's administration: the running server, or
// this process with the files open and locked. Call done when finished.
func (a *app) connect(ctx context.Context) (c *admin.Client, done func(), err error) {
	ready := a.busy(ctx, "waiting for another process that works on %s", a.dir)
	c, closeIt, err := server.Connect(ctx, a.dir)
	ready()
	if err != nil {
		return nil, nil, err
	}
	return c, func() {
		if err := closeIt(); err != nil {
			a.note("closing the fleet's files: %v", err)
		}
	}, nil
}

// with runs fn with a client.
func (a *app) with(cmd *cobra.Command, fn func(ctx context.Context, c *admin.Client) error) error {
	c, done, err := a.connect(cmd.Context())
	if err != nil {
		return err
	}
	defer done()
	return fn(cmd.Context(), c)
}

// needServer refuses what only a running server can do.
func (a *app) needServer(c *admin.Client, what string) error {
	if c.Running() {
		return nil
	}
	return admin.Errorf(admin.NoServer, "%s needs a running server, and none runs on %s\nhint: hawser serve --dir %s", what, a.dir, a.dir)
}

// deviceArg reads the id on the command line.
func deviceArg(cmd *cobra.Command, s string) (identity.ID, error) {
	id, err := identity.ParseID(s)
	if err != nil {
		return 0, usagef(cmd, "%q: %v", s, err)
	}
	return id, nil
}

// signer is how a command comes to a signature: --ca DIR, the CA beside a trial
// fleet, or not at all.
type signer struct {
	dir  string // --ca
	pass passphrases
}

// flags gives a command --ca and --passphrase-fd.
func (s *signer) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.dir, "ca", "", "directory of the CA that signs; a trial fleet has its own")
	s.pass.flag(cmd)
}

// open gives the CA, nil where there is none here and a request has to be
// written. root is "a" or "b": the trial fleet's directory to take.
func (s *signer) open(l *fleet.Layout, root string) (*fleet.CA, error) {
	dir := s.dir
	if dir == "" {
		if !l.Config.Fleet.Trial {
			return nil, nil
		}
		dir = l.CADir(root)
	}
	ca, err := s.openDir(dir)
	if err != nil {
		return nil, err
	}
	if ca.Fleet() != l.FleetID() {
		return nil, errors.Join(fmt.Errorf("%s is the CA of another fleet: nothing was signed", dir), ca.Close())
	}
	return ca, nil
}

// openDir opens a CA directory that asks for passphrases and PINs as s says.
func (s *signer) openDir(dir string) (*fleet.CA, error) {
	ca, err := fleet.OpenCA(dir, func() ([]byte, error) { return s.pass.known(dir) })
	if err == nil {
		ca.PIN = s.pass.pin
	}
	return ca, err
}

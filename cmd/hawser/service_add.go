package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/durable"
	"hawser/internal/fleet"
	"hawser/internal/pki"
)

// newService is what add and renew are told.
type newService struct {
	name   string
	grants []admin.Grant
	out    string
	atOnce bool     // renew: the certificate before ends now
	csr    *pki.CSR // renew: the key to certify; nil: make one
	sign   signer
}

func (n *newService) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&n.out, "out", "", "directory for the service's files; made if need be")
	n.sign.flags(cmd)
}

func (n *newService) file(name string) string { return filepath.Join(n.out, name) }

const serviceFiles = `  service.key  private key, PKCS#8
  service.crt  its certificate, for a year
  ca.crt       both broker roots

A trial fleet signs at once. Elsewhere --ca names the CA directory, or a request file
is written, to be answered with "hawser ca sign" and "hawser ca import --out".`

func (a *app) serviceAdd() *cobra.Command {
	var n newService
	var grants []string
	cmd := &cobra.Command{
		Use:   "add NAME [--grant GRANT ...] --out DIR",
		Short: "admit a service: key, certificate and grants",
		Long: `add makes a service known, makes its key here, has it certified, and writes into --out:

` + serviceFiles + `

It prints a line for the mosquitto clients that works with them. A service without
grants can connect and do nothing; "hawser service grant" changes them later.`,
		Example: `  hawser service add dashboard --dir fleet --grant 'read private/+/u/#' --out dashboard
  hawser service add app --grant 'read a/#' --grant 'write private/+/d/app/#' --out app`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if err := n.read(cmd, args[0]); err != nil {
				return err
			}
			if n.grants, err = parseGrants(cmd, "--grant", grants); err != nil {
				return err
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.addService(ctx, c, &n) })
		},
	}
	cmd.Flags().StringArrayVar(&grants, "grant", nil, "what it may do: 'read FILTER' or 'write FILTER'; may be given again")
	n.flags(cmd)
	return a.withJSON(cmd)
}

func (n *newService) read(cmd *cobra.Command, name string) (err error) {
	if n.name, err = nameArg(cmd, name); err != nil {
		return err
	}
	if n.out == "" {
		return usagef(cmd, "where to? --out DIR gets the key and the certificates")
	}
	return nil
}

// addService signs before it makes the service known: what fails leaves nothing.
func (a *app) addService(ctx context.Context, c *admin.Client, n *newService) error {
	switch _, err := service(ctx, c, n.name); {
	case err == nil:
		return admin.Errorf(admin.Conflict, "service %s exists already\nhint: hawser service grant %s changes its rights, hawser service renew %s its certificate",
			n.name, n.name, n.name)
	case !admin.IsKind(err, admin.NotFound):
		return err
	}
	return a.issueService(ctx, c, n, func(der []byte) error {
		_, err := c.AddService(ctx, admin.NewService{Name: n.name, Grants: n.grants, Certificate: der})
		return err
	})
}

// issueService makes key, certificate or request, and files. admit is given the
// certificate, nil where the safe has to sign it first.
func (a *app) issueService(ctx context.Context, c *admin.Client, n *newService, admit func(der []byte) error) error {
	l, err := fleet.OpenLayout(a.dir)
	if err != nil {
		return err
	}
	undo, err := n.prepare()
	if err != nil {
		return err
	}
	if err := copyRoots(l, n.file("ca.crt")); err != nil {
		return errors.Join(err, undo())
	}
	cert, asked, err := a.certifyService(ctx, c, l, n, admit)
	if err != nil {
		return errors.Join(err, undo())
	}
	if cert == nil {
		return a.sayRequest(asked, "ca-a", n.file("service.crt"))
	}
	if err := durable.WriteFile(n.file("service.crt"), pki.EncodeCert(cert.Raw), 0o644); err != nil {
		return fmt.Errorf("%s is admitted, but its certificate was not written: %w\nhint: hawser service renew %s --out DIR", n.name, err, n.name)
	}
	return a.sayService(ctx, c, l, n)
}

// prepare makes the key, unless a CSR says which one is to be certified. undo takes
// away what it made.
func (n *newService) prepare() (undo func() error, err error) {
	if n.csr != nil {
		return func() error { return nil }, os.MkdirAll(n.out, 0o700)
	}
	path := n.file("service.key")
	key, err := makeKey(path)
	if err != nil {
		return nil, err
	}
	undo = func() error { return durable.Remove(path) }
	if n.csr, err = requestFor(key, n.name); err != nil {
		return nil, errors.Join(err, undo())
	}
	return undo, nil
}

// copyRoots writes what a client pins.
func copyRoots(l *fleet.Layout, path string) error {
	roots, err := l.DeviceRoots()
	if err != nil {
		return err
	}
	return durable.WriteFile(path, roots, 0o644)
}

// certifyService signs the key of n, or asks for it where no CA is at hand.
func (a *app) certifyService(ctx context.Context, c *admin.Client, l *fleet.Layout, n *newService,
	admit func(der []byte) error) (*x509.Certificate, *admin.Request, error) {
	ca, err := n.sign.open(l, "a")
	if err != nil {
		return nil, nil, err
	}
	if ca == nil {
		asked, err := n.request(ctx, c, l, admit)
		return nil, asked, err
	}
	cert, err := ca.IssueService(n.name, n.csr.Pub, time.Now())
	if err := errors.Join(err, ca.Close()); err != nil {
		return nil, nil, err
	}
	return cert, nil, admit(cert.Raw)
}

// request makes the service known first: a request names one that is.
func (n *newService) request(ctx context.Context, c *admin.Client, l *fleet.Layout, admit func(der []byte) error) (*admin.Request, error) {
	q, err := pki.NewRequest(l.FleetID(), pki.KindService, n.name, n.csr)
	if err != nil {
		return nil, err
	}
	file, err := q.Encode()
	if err != nil {
		return nil, err
	}
	if err := admit(nil); err != nil {
		return nil, err
	}
	asked, err := c.NewRequest(ctx, file)
	if err != nil {
		err = fmt.Errorf("%w\nhint: service %s is known and has no certificate: hawser service renew %s --out DIR", err, n.name, n.name)
	}
	return &asked, err
}

// serviceAdded is what add and renew say with --json.
type serviceAdded struct {
	Name   string        `json:"name"`
	Out    string        `json:"out"`
	Grants []admin.Grant `json:"grants"`
	Try    string        `json:"try,omitempty"` // a line for the mosquitto clients
}

func (a *app) sayService(ctx context.Context, c *admin.Client, l *fleet.Layout, n *newService) error {
	host, port := a.broker(ctx, c, l)
	v := serviceAdded{Name: n.name, Out: n.out, Grants: append([]admin.Grant{}, n.grants...), Try: n.tryLine(host, port)}
	return emitOne(a, v, func() {
		a.say("%s may connect, its files are in %s", n.name, n.out)
		if v.Try == "" {
			a.note("%s has no grants: it can connect and do nothing\nhint: hawser service grant %s --add 'read private/+/u/#'", n.name, n.name)
			return
		}
		a.say("")
		a.say("  %s", v.Try)
		a.say("")
	})
}

// tryLine shows the first grant at work: reading if it may read anything.
func (n *newService) tryLine(host, port string) string {
	word := func(name string) string { return shellWord(n.file(name)) }
	client := fmt.Sprintf("-h %s -p %s --cafile %s --cert %s --key %s -q 1", shellWord(host), port, word("ca.crt"), word("service.crt"), word("service.key"))
	for _, g := range n.grants {
		if g.Mode == "read" {
			return fmt.Sprintf("mosquitto_sub %s -v -t %s", client, shellWord(g.Filter))
		}
	}
	if len(n.grants) == 0 {
		return ""
	}
	return fmt.Sprintf("mosquitto_pub %s -m hello -t %s", client, shellWord(exampleTopic(n.grants[0].Filter)))
}

// exampleTopic is a topic that filter matches.
func exampleTopic(filter string) string {
	levels := strings.Split(filter, "/")
	for i, v := range levels {
		switch {
		case v == "+" && i == 1 && levels[0] == "private":
			levels[i] = "ABCD1234"
		case v == "+" || v == "#":
			levels[i] = "test"
		}
	}
	return strings.Join(levels, "/")
}

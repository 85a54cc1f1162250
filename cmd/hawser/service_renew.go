package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/pki"
)

func (a *app) serviceRenew() *cobra.Command {
	var n newService
	var self selfRenewal
	var csr string
	cmd := &cobra.Command{
		Use:   "renew NAME --out DIR | renew --self --cert FILE --key FILE --ca FILE --url URL --out DIR",
		Short: "give a service a new certificate, with a new key or the one it has",
		Long: `renew has a service certified for another year, and writes into --out, where none of
them may be yet:

` + serviceFiles + `

With --csr the key stays where it is: the request, PEM or DER, names it, and no key file
is written.

The certificate in use is good until the service has connected with the new one, for 7
days at most: bring the new files to the service, restart it, done. One that was never
used gives way to the next renewal. --at-once ends all certificates before and closes
the service's connections: for a key that may be in other hands.

With --self a service renews by itself, with the certificate it has and no fleet
directory: --cert, --key (a file or a key URI) and --ca are what it connects with, --url
is the server's API (serve.api in hawser.toml). A trial fleet signs at once. Elsewhere
the safe has to: then the same command again fetches the answer, or --wait waits for it.`,
		Example: `  hawser service renew dashboard --dir fleet --out dashboard-2
  hawser service renew dashboard --dir fleet --csr dashboard.csr --out dashboard-2
  hawser service renew --self --cert service.crt --key service.key --ca ca.crt \
    --url https://mqtt.example.com:8884 --out next`,
		Args: func(cmd *cobra.Command, args []string) error {
			if self.on {
				return cobra.NoArgs(cmd, args)
			}
			return cobra.ExactArgs(1)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if self.on {
				return a.renewSelf(cmd, &self, &n)
			}
			if err := n.readRenewal(cmd, args[0], csr); err != nil {
				return err
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.renewService(ctx, c, &n) })
		},
	}
	n.flags(cmd)
	cmd.Flags().StringVar(&csr, "csr", "", "certify the key of this certificate request; - is standard input")
	cmd.Flags().BoolVar(&n.atOnce, "at-once", false, "end the certificates before at once, and close the service's connections")
	self.flags(cmd)
	cmd.Flags().Lookup("ca").Usage = "directory of the CA that signs; with --self: the file of what the service pins"
	cmd.ValidArgsFunction = a.completeService
	return a.withJSON(cmd)
}

func (n *newService) readRenewal(cmd *cobra.Command, name, csr string) error {
	if err := n.read(cmd, name); err != nil || csr == "" {
		return err
	}
	text, err := readFile(csr)
	if err != nil {
		return err
	}
	if n.csr, err = pki.ParseCSR(text); err != nil {
		return fmt.Errorf("%s: %w", csr, err)
	}
	if _, err := os.Lstat(n.file("service.crt")); err == nil {
		return fmt.Errorf("%s exists already: it is not written over\nhint: choose another --out", n.file("service.crt"))
	}
	return nil
}

func (a *app) renewService(ctx context.Context, c *admin.Client, n *newService) error {
	s, err := service(ctx, c, n.name)
	if err != nil {
		return err
	}
	if s.State != "active" {
		return admin.Errorf(admin.Conflict, "service %s is %s", n.name, s.State)
	}
	n.grants = s.Grants
	err = a.issueService(ctx, c, n, func(der []byte) error {
		switch {
		case der != nil:
		case n.atOnce:
			return fmt.Errorf("--at-once needs the CA at hand: nothing was asked for\nhint: --ca DIR, or hawser service revoke %s", n.name)
		default:
			return nil // the request brings it
		}
		return c.ServiceCertificate(ctx, n.name, der, n.atOnce)
	})
	if err == nil && !n.atOnce {
		a.sayOverlap()
	}
	return err
}

func (a *app) sayOverlap() {
	a.note("the certificate before ends when the new one is used, in 7 days at the latest")
}

package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/durable"
	"hawser/internal/fleet"
	"hawser/internal/pki"
)

func (a *app) caCommand() *cobra.Command {
	return group("ca", "sign at the safe, and bring the results to the server", `ca is the production way to a signature. The server has no CA key: what needs one
becomes a request file in server/requests. Carry it to the safe, "hawser ca sign" it
there, carry the result back, and "hawser ca import" it. Each result fits one request
and is imported once. In a trial fleet nothing of this is needed.`, a.caSign(), a.caImport(), a.caIssueBroker())
}

func (a *app) caSign() *cobra.Command {
	var s signer
	var out string
	cmd := &cobra.Command{
		Use:   "sign REQUEST --ca DIR",
		Short: "answer a request file at the safe",
		Long: `sign shows what a request asks for and, once its subject was typed letter for letter,
signs it with the CA in --ca (ca-a or ca-b as init made it). What this CA has certified
before, the same id with the same key, needs no typing. It works without a fleet
directory and without a network. The result goes to --out, by default beside the
request. Broker certificates are signed by the root that the request names.`,
		Example: `  hawser ca sign 5f0c.json --ca /media/safe/ca-a
  hawser ca sign 5f0c.json --ca ca-a --passphrase-fd 3 3<passphrase`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if s.dir == "" {
				return usagef(cmd, "which CA? --ca DIR names ca-a or ca-b as init made it")
			}
			if out == "" {
				out = strings.TrimSuffix(args[0], ".json") + ".result.json"
			}
			return a.signRequest(args[0], out, &s)
		},
	}
	s.flags(cmd)
	cmd.Flags().Lookup("ca").Usage = "directory of the CA that signs: ca-a or ca-b"
	cmd.Flags().StringVar(&out, "out", "", "file for the result (default: REQUEST with .result.json)")
	return a.withJSON(cmd)
}

func (a *app) signRequest(name, out string, s *signer) error {
	if _, err := os.Lstat(out); err == nil {
		return fmt.Errorf("%s exists already: it is not written over, and nothing was signed\nhint: --out FILE", out)
	}
	file, err := readFile(name)
	if err != nil {
		return err
	}
	ca, err := a.openCA(s)
	if err != nil {
		return err
	}
	result, err := ca.SignRequest(file, a.confirm, time.Now())
	if err := errors.Join(err, ca.Close()); err != nil {
		return err
	}
	if err := durable.CreateFile(out, result, 0o644); err != nil {
		return fmt.Errorf("signed, but the result was not written: %w\nhint: sign the request again, it does no harm", err)
	}
	v := struct {
		Result string `json:"result"`
	}{out}
	return emitOne(a, v, func() {
		a.say("signed: %s", out)
		a.say("  on the server:  hawser ca import %s", filepath.Base(out))
	})
}

// openCA waits while another process signs, and says so.
func (a *app) openCA(s *signer) (*fleet.CA, error) {
	defer a.busy(context.Background(), "waiting for another process that signs with %s", s.dir)()
	return fleet.OpenCA(s.dir, func() ([]byte, error) { return s.pass.known(s.dir) })
}

// confirm is fleet.Confirm: it shows the request and reads a line from standard input.
func (a *app) confirm(summary, want string) (string, error) {
	fmt.Fprintf(a.err, "%s\nto sign this, type its subject: ", printable(summary))
	line, err := bufio.NewReader(io.LimitReader(os.Stdin, 1<<10)).ReadString('\n')
	if !terminal(os.Stdin) {
		fmt.Fprintln(a.err)
	}
	if errors.Is(err, io.EOF) && line != "" {
		err = nil
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("standard input ended")
	}
	return strings.TrimRight(line, "\r\n"), err
}

func (a *app) caImport() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "import RESULT",
		Short: "bring what the safe has signed to the server",
		Long: `import holds a result against the request that was kept here (chain, profile, name and
key) and puts what was signed in its place: a device or service is admitted, a broker
certificate is served from then on, without a connection being dropped. --out writes
the certificate to a file for whoever holds the key, or the block of a flashing bench.`,
		Example: `  hawser ca import 5f0c.result.json --dir fleet
  hawser ca import 5f0c.result.json --out dashboard/service.crt`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.importResult(ctx, c, args[0], out) })
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "file for the certificate")
	return a.withJSON(cmd)
}

func (a *app) importResult(ctx context.Context, c *admin.Client, name, out string) error {
	file, err := readFile(name)
	if err != nil {
		return err
	}
	block, err := pki.ResultBlock(file)
	if err != nil {
		return admin.Errorf(admin.Invalid, "%v", err)
	}
	if block != nil {
		return a.importBlock(ctx, c, file, block, out)
	}
	v, err := c.ImportResult(ctx, file)
	if err != nil {
		return err
	}
	if out != "" {
		if err := writeCertificates(file, out); err != nil {
			return fmt.Errorf("imported, but the certificate was not written: %w", err)
		}
	}
	return emitOne(a, v, func() {
		switch v.Kind {
		case pki.KindBroker:
			a.say("broker %s has a new certificate", v.Subject)
		default:
			a.say("%s %s may connect", v.Kind, v.Subject)
		}
	})
}

// importBlock imports the answer to a flashing bench's request. The block is in no other
// file, so it must be said where it goes.
func (a *app) importBlock(ctx context.Context, c *admin.Client, file, block []byte, out string) error {
	if out == "" {
		return errors.New("the result holds the block of a flashing bench: nothing was imported\nhint: --out FILE, for the block")
	}
	if _, err := os.Lstat(out); err == nil {
		return fmt.Errorf("%s exists already: it is not written over, and nothing was imported\nhint: --out FILE", out)
	}
	if _, err := c.ImportResult(ctx, file); err != nil {
		return err
	}
	if err := durable.CreateFile(out, block, 0o644); err != nil {
		return fmt.Errorf("imported, but the block was not written: %w\nhint: reserve again", err)
	}
	return a.sayBlock(block, out)
}

// writeCertificates takes the certificates out of a result that was imported,
// which means that it was verified.
func writeCertificates(result []byte, out string) error {
	var r pki.Result
	if err := json.Unmarshal(result, &r); err != nil {
		return err
	}
	return durable.WriteFile(out, []byte(strings.Join(r.Certificates, "")), 0o644)
}

// brokerOrder is what issue-broker is told.
type brokerOrder struct {
	root    string // a or b, "" is the one in use
	domains []string
	sign    signer
}

func (a *app) caIssueBroker() *cobra.Command {
	var o brokerOrder
	cmd := &cobra.Command{
		Use:   "issue-broker [--root a|b]",
		Short: "make new certificates for the broker",
		Long: `issue-broker makes a new key and certificate for each domain of the fleet, under root A
or B; devices know both. A running server takes them up without dropping a connection.
They last a year.

A trial fleet signs at once. Elsewhere --ca names the CA directory of that root, or
request files are written, to be answered with "hawser ca sign" and "hawser ca import".`,
		Example: `  hawser ca issue-broker --dir fleet
  hawser ca issue-broker --root b --ca /media/safe/ca-b
  hawser ca issue-broker --domain mqtt.example.com`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.root != "" && o.root != "a" && o.root != "b" {
				return usagef(cmd, "root %q is not a or b", o.root)
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.issueBroker(ctx, c, &o) })
		},
	}
	cmd.Flags().StringVar(&o.root, "root", "", "the root that signs, a or b (default: the one in use)")
	// The error is that there is no such flag: there is, one line above.
	_ = cmd.RegisterFlagCompletionFunc("root", cobra.FixedCompletions([]string{"a", "b"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.Flags().StringArrayVar(&o.domains, "domain", nil, "only this domain of the fleet; may be given again")
	o.sign.flags(cmd)
	return a.withJSON(cmd)
}

// issuedLeaf is what issue-broker says of each domain with --json.
type issuedLeaf struct {
	Domain  string         `json:"domain"`
	Root    string         `json:"root"`
	Until   time.Time      `json:"until,omitzero"`
	Request *admin.Request `json:"request,omitempty"`
}

func (a *app) issueBroker(ctx context.Context, c *admin.Client, o *brokerOrder) error {
	l, err := fleet.OpenLayout(a.dir)
	if err != nil {
		return err
	}
	if err := o.complete(l); err != nil {
		return err
	}
	ca, err := o.sign.open(l, o.root)
	if err != nil {
		return err
	}
	if ca == nil {
		return a.askBroker(ctx, c, l, o)
	}
	list, err := o.issue(l, ca)
	if err := errors.Join(err, ca.Close()); err != nil {
		return err
	}
	if err := c.Reload(ctx); err != nil {
		return fmt.Errorf("the new certificates are on disk, but the server did not take them up: %w", err)
	}
	return emitAll(a, list, func() {
		for _, v := range list {
			a.say("broker %s has a new certificate under root %s, until %s", v.Domain, v.Root, stamp(v.Until))
		}
		if !c.Running() {
			a.note("no server runs: the next start takes them up")
		}
	})
}

// complete fills in what was not said, and refuses what does not fit the fleet
// before a key is made.
func (o *brokerOrder) complete(l *fleet.Layout) error {
	for _, d := range o.domains {
		if !slices.Contains(l.Config.Fleet.Domains, d) {
			return fmt.Errorf("%q is not a domain of this fleet: %s", d, strings.Join(l.Config.Fleet.Domains, ", "))
		}
	}
	if len(o.domains) == 0 {
		o.domains = l.Config.Fleet.Domains
	}
	if o.root == "" {
		_, set, err := l.Anchors()
		if err != nil {
			return err
		}
		o.root = strings.ToLower(pki.RootLabel(set.InUse))
	}
	return o.checkRoot()
}

// checkRoot refuses a --ca that is not the root that was asked for.
func (o *brokerOrder) checkRoot() error {
	if o.sign.dir == "" {
		return nil
	}
	text, err := os.ReadFile(filepath.Join(o.sign.dir, "root.crt"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // OpenCA says it better
	}
	if err != nil {
		return err
	}
	root, err := pki.ParseCert(text)
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(o.sign.dir, "root.crt"), err)
	}
	if have := strings.ToLower(pki.RootLabel(root)); have != o.root {
		return fmt.Errorf("%s is root %s, not root %s: nothing was signed\nhint: --root %s", o.sign.dir, have, o.root, have)
	}
	return nil
}

// issue makes key and certificate of each domain and installs them.
func (o *brokerOrder) issue(l *fleet.Layout, ca *fleet.CA) ([]issuedLeaf, error) {
	var list []issuedLeaf
	for _, d := range o.domains {
		cert, err := issueLeaf(l, ca, d)
		if err != nil {
			return nil, err
		}
		list = append(list, issuedLeaf{Domain: d, Root: o.root, Until: admin.UTC(cert.NotAfter)})
	}
	return list, nil
}

func issueLeaf(l *fleet.Layout, ca *fleet.CA, domain string) (*x509.Certificate, error) {
	key, err := l.NewBrokerKey(domain)
	if err != nil {
		return nil, err
	}
	cert, err := ca.IssueBroker(domain, &key.PublicKey, time.Now())
	if err != nil {
		return nil, err
	}
	_, err = l.InstallBrokerLeaf(cert.Raw)
	return cert, err
}

// askBroker writes a request for each domain.
func (a *app) askBroker(ctx context.Context, c *admin.Client, l *fleet.Layout, o *brokerOrder) error {
	for _, d := range o.domains {
		key, err := l.NewBrokerKey(d)
		if err != nil {
			return err
		}
		asked, err := o.request(ctx, c, l, d, key)
		if err != nil {
			return err
		}
		if a.json {
			err = a.emit(issuedLeaf{Domain: d, Root: o.root, Request: &asked})
		} else {
			err = a.sayRequest(&asked, "ca-"+o.root, "")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (o *brokerOrder) request(ctx context.Context, c *admin.Client, l *fleet.Layout, domain string, key *ecdsa.PrivateKey) (admin.Request, error) {
	csr, err := requestFor(key, domain)
	if err != nil {
		return admin.Request{}, err
	}
	q, err := pki.NewRequest(l.FleetID(), pki.KindBroker, domain, csr)
	if err != nil {
		return admin.Request{}, err
	}
	q.Root = o.root
	file, err := q.Encode()
	if err != nil {
		return admin.Request{}, err
	}
	return c.NewRequest(ctx, file)
}

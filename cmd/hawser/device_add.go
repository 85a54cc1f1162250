package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/durable"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// newDevice is what add and enroll are told.
type newDevice struct {
	id    string // --id, "" draws one
	class string
	tags  []string
	out   string
	sign  signer
}

func (n *newDevice) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&n.id, "id", "", "id of the device, eight upper-case hex digits (default: a free random one)")
	f.StringVar(&n.class, "class", "", "class of the device: [a-z0-9][a-z0-9-]{0,30}")
	f.StringArrayVar(&n.tags, "tag", nil, "a tag; may be given again")
	n.sign.flags(cmd)
}

// check refuses what can be told before anything is opened.
func (n *newDevice) check(cmd *cobra.Command) error {
	if n.id != "" {
		if _, err := deviceArg(cmd, n.id); err != nil {
			return err
		}
	}
	if n.class != "" {
		if err := pki.CheckClass(n.class); err != nil {
			return usagef(cmd, "%q: %v", n.class, err)
		}
	}
	return nil
}

// pick gives the id asked for, or draws one.
func (n *newDevice) pick(ctx context.Context, c *admin.Client) (identity.ID, error) {
	if n.id == "" {
		return c.ReserveID(ctx)
	}
	id, err := identity.ParseID(n.id)
	if err != nil {
		return 0, err
	}
	return id, c.CheckReserved(ctx, id)
}

// certify has the key of csr certified for id and imports it. Without a CA at
// hand it writes a request and gives no certificate but the request.
func (n *newDevice) certify(ctx context.Context, c *admin.Client, l *fleet.Layout, id identity.ID, csr *pki.CSR) (cert *x509.Certificate, asked *admin.Request, err error) {
	ca, err := n.sign.open(l, "a")
	if err != nil {
		return nil, nil, err
	}
	if ca == nil {
		asked, err = n.request(ctx, c, l, id, csr)
		return nil, asked, err
	}
	cert, err = ca.EnrollDevice(id, csr, n.class, time.Now())
	if err := errors.Join(err, ca.Close()); err != nil {
		return nil, nil, err
	}
	_, err = c.Enroll(ctx, id, admin.Enrolment{CSR: csr.DER, Certificate: cert.Raw, Class: n.class, Tags: n.tags})
	return cert, nil, err
}

func (n *newDevice) request(ctx context.Context, c *admin.Client, l *fleet.Layout, id identity.ID, csr *pki.CSR) (*admin.Request, error) {
	q, err := pki.NewRequest(l.FleetID(), pki.KindDevice, id.String(), csr)
	if err != nil {
		return nil, err
	}
	q.Class = n.class
	file, err := q.Encode()
	if err != nil {
		return nil, err
	}
	asked, err := c.NewRequest(ctx, file)
	return &asked, err
}

// sayRequest tells how a request gets its answer. caDir is the directory that
// signs it, out the file that waits for the certificate or "".
func (a *app) sayRequest(q *admin.Request, caDir, out string) error {
	result := strings.TrimSuffix(filepath.Base(q.File), ".json") + ".result.json"
	bring := fmt.Sprintf("hawser ca import %s --dir %s", result, shellWord(a.dir))
	if out != "" {
		bring += " --out " + shellWord(out)
	}
	return emitOne(a, *q, func() {
		a.say("%s %s waits for a signature", q.Kind, q.Subject)
		a.say("  request         %s", q.File)
		a.say("  at the safe:    hawser ca sign %s --ca %s", filepath.Base(q.File), caDir)
		a.say("  on the server:  %s", bring)
	})
}

// askedDevice is sayRequest for a device. A request carries the class and no tags.
func (a *app) askedDevice(q *admin.Request, n *newDevice, out string) error {
	if len(n.tags) > 0 {
		a.note("tags do not travel with a request\nhint: after the import, hawser device tag %s %s", q.Subject, strings.Join(n.tags, " "))
	}
	return a.sayRequest(q, "ca-a", out)
}

func (a *app) deviceAdd() *cobra.Command {
	var n newDevice
	cmd := &cobra.Command{
		Use:   "add [--id ID] --out DIR",
		Short: "make a key and a certificate for a Linux-class device",
		Long: `add makes a device's key here, has it certified, and writes into --out:

  device.key    private key, PKCS#8
  device.crt    its certificate
  ca.crt        both broker roots
  anchors.cose  the fleet's newest anchor set

It prints a mosquitto_pub line that works with them. This is for gateways and trials:
a microcontroller gets its key on the flashing bench, where it never is in a file.

A trial fleet signs at once. Elsewhere --ca names the CA directory, or a request file
is written, to be answered with "hawser ca sign" and "hawser ca import".`,
		Example: `  hawser device add --dir fleet --id ABCD1234 --out ABCD1234
  hawser device add --dir fleet --class gateway --tag berlin --out gw1 --ca /media/safe/ca-a`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := n.check(cmd); err != nil {
				return err
			}
			if n.out == "" {
				return usagef(cmd, "where to? --out DIR gets the key and the certificates")
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.addDevice(ctx, c, &n) })
		},
	}
	cmd.Flags().StringVar(&n.out, "out", "", "directory for the device's files; made if need be")
	n.flags(cmd)
	return a.withJSON(cmd)
}

func (a *app) addDevice(ctx context.Context, c *admin.Client, n *newDevice) error {
	l, err := fleet.OpenLayout(a.dir)
	if err != nil {
		return err
	}
	id, err := n.pick(ctx, c)
	if err != nil {
		return err
	}
	if err := c.CheckFree(ctx, id); err != nil {
		return err
	}
	key, err := makeKey(filepath.Join(n.out, "device.key"))
	if err != nil {
		return err
	}
	csr, err := requestFor(key, id.String())
	if err != nil {
		return err
	}
	cert, asked, err := n.certify(ctx, c, l, id, csr)
	if err != nil {
		return errors.Join(err, durable.Remove(filepath.Join(n.out, "device.key")))
	}
	if err := writeTrust(n.out, l); err != nil {
		return err
	}
	if cert == nil {
		return a.askedDevice(asked, n, filepath.Join(n.out, "device.crt"))
	}
	if err := durable.WriteFile(filepath.Join(n.out, "device.crt"), pki.EncodeCert(cert.Raw), 0o644); err != nil {
		return err
	}
	return a.sayDevice(ctx, c, l, id, n.out)
}

// makeKey makes a key in a file that must not exist.
func makeKey(path string) (*ecdsa.PrivateKey, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	key, err := pki.GenerateKey()
	if err != nil {
		return nil, err
	}
	err = pki.WriteKey(path, key, nil)
	if errors.Is(err, fs.ErrExist) {
		err = fmt.Errorf("%s exists already: it is not written over\nhint: choose another --out", path)
	}
	return key, err
}

// requestFor is a PKCS#10 request for name by key.
func requestFor(key *ecdsa.PrivateKey, name string) (*pki.CSR, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, key)
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	return pki.ParseCSR(der)
}

// writeTrust writes what a device pins.
func writeTrust(dir string, l *fleet.Layout) error {
	roots, err := os.ReadFile(l.BrokerRootsPath())
	if err != nil {
		return err
	}
	anchors, _, err := l.Anchors()
	if err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(dir, "ca.crt"), roots, 0o644); err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, "anchors.cose"), anchors, 0o644)
}

// added is what add says with --json.
type added struct {
	ID      identity.ID `json:"id"`
	Out     string      `json:"out"`
	Publish string      `json:"publish"` // the mosquitto_pub line
}

func (a *app) sayDevice(ctx context.Context, c *admin.Client, l *fleet.Layout, id identity.ID, out string) error {
	host, port := a.broker(ctx, c, l)
	v := added{ID: id, Out: out, Publish: publishLine(host, port, out, id)}
	return emitOne(a, v, func() {
		a.say("%s added, its files are in %s", id, out)
		a.say("")
		a.say("  %s", v.Publish)
		a.say("")
		a.note("a key on disk is not how a microcontroller is provisioned: its key is made on the bench and never is in a file")
	})
}

// broker is where clients of this machine reach the broker.
func (a *app) broker(ctx context.Context, c *admin.Client, l *fleet.Layout) (host, port string) {
	host, port = l.Config.Fleet.Domains[0], fmt.Sprint(l.Config.Fleet.Port)
	if st, err := c.Status(ctx); err == nil && st.Server != nil {
		if _, p, err := net.SplitHostPort(st.Server.Listen); err == nil {
			port = p
		}
	}
	return host, port
}

// publishLine is a mosquitto_pub line ready to paste.
func publishLine(host, port, dir string, id identity.ID) string {
	file := func(name string) string { return shellWord(filepath.Join(dir, name)) }
	return fmt.Sprintf("mosquitto_pub -h %s -p %s -i %s --cafile %s --cert %s --key %s -q 1 -t %s -m 21",
		shellWord(host), port, id, file("ca.crt"), file("device.crt"), file("device.key"), id.Topic("u/temp"))
}

// shellWord quotes s for a POSIX shell where it must be.
func shellWord(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./:@%+=,", r)
	}
	if s != "" && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

func (a *app) deviceEnroll() *cobra.Command {
	var n newDevice
	var file string
	cmd := &cobra.Command{
		Use:   "enroll --csr FILE [--id ID]",
		Short: "certify a device that made its own key",
		Long: `enroll makes a certificate from a certificate request, PEM or DER. The request proves
that the device holds the key; of what else it asks for nothing is taken.

The same key may be enrolled again under its own id, for a new certificate. Another
key for an id, or a key under another id, is refused.`,
		Example: `  hawser device enroll --dir fleet --csr device.csr --id ABCD1234 --out device.crt
  openssl req -new -key device.key -subj /CN=x | hawser device enroll --dir fleet --csr -`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := n.check(cmd); err != nil {
				return err
			}
			if file == "" {
				return usagef(cmd, "--csr FILE is missing: the certificate request of the device")
			}
			text, err := readFile(file)
			if err != nil {
				return err
			}
			csr, err := pki.ParseCSR(text)
			if err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.enrollDevice(ctx, c, &n, csr) })
		},
	}
	cmd.Flags().StringVar(&file, "csr", "", "certificate request, PEM or DER; - is standard input")
	cmd.Flags().StringVar(&n.out, "out", "", "file for the certificate (default: standard output)")
	n.flags(cmd)
	return a.withJSON(cmd)
}

func (a *app) enrollDevice(ctx context.Context, c *admin.Client, n *newDevice, csr *pki.CSR) error {
	l, err := fleet.OpenLayout(a.dir)
	if err != nil {
		return err
	}
	id, err := n.pick(ctx, c)
	if err != nil {
		return err
	}
	cert, asked, err := n.certify(ctx, c, l, id, csr)
	if err != nil {
		return err
	}
	if cert == nil {
		return a.askedDevice(asked, n, n.out)
	}
	text := pki.EncodeCert(cert.Raw)
	if n.out != "" {
		if err := durable.WriteFile(n.out, text, 0o644); err != nil {
			return err
		}
	}
	v := struct {
		ID          identity.ID `json:"id"`
		Fingerprint admin.Hex   `json:"fingerprint"`
		Certificate string      `json:"certificate"`
	}{id, fingerprint(cert), string(text)}
	return emitOne(a, v, func() {
		if n.out == "" {
			fmt.Fprint(a.out, string(text))
		}
		a.note("%s enrolled", id)
	})
}

func fingerprint(c *x509.Certificate) admin.Hex {
	f := pki.Fingerprint(c.Raw)
	return f[:]
}

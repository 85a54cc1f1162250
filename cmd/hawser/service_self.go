package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/durable"
	"hawser/internal/pki"
)

// askAgain is how often --wait asks, and callFor bounds one call.
const (
	askAgain = 5 * time.Second
	callFor  = 30 * time.Second
)

// selfRenewal is what a service that renews by itself is told.
type selfRenewal struct {
	on, wait           bool
	cert, key, ca, url string
	client             http.Client
}

func (s *selfRenewal) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVar(&s.on, "self", false, "renew with the certificate that the service has, over the server's API")
	f.StringVar(&s.cert, "cert", "", "with --self: the service's certificate")
	f.StringVar(&s.key, "key", "", "with --self: its key, a file or a key URI")
	f.StringVar(&s.url, "url", "", "with --self: the API, https://HOST:PORT")
	f.BoolVar(&s.wait, "wait", false, "with --self: wait until the safe has signed")
}

// renewSelf asks for a certificate for the key in --out, which it makes if need be. As
// the key stays there, the same command again goes on where it was.
func (a *app) renewSelf(cmd *cobra.Command, s *selfRenewal, n *newService) error {
	s.ca = n.sign.dir
	if s.cert == "" || s.key == "" || s.ca == "" || s.url == "" || n.out == "" {
		return usagef(cmd, "--self needs --cert, --key, --ca, --url and --out")
	}
	if u, err := url.Parse(s.url); err != nil || u.Scheme != "https" || u.Host == "" {
		return usagef(cmd, "%q is no https:// URL", s.url)
	}
	if _, err := os.Lstat(n.file("service.crt")); err == nil {
		return fmt.Errorf("%s exists already: it is not written over\nhint: choose another --out", n.file("service.crt"))
	}
	done, err := s.connect(&n.sign.pass)
	if err != nil {
		return err
	}
	v, err := a.renewalFor(cmd.Context(), s, n)
	if err := errors.Join(err, done()); err != nil {
		return err
	}
	return a.finishSelf(v, n)
}

// connect reads what the service connects with. done gives its key up.
func (s *selfRenewal) connect(pass *passphrases) (done func() error, err error) {
	certs, err := readCerts(s.cert)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	trusted, err := readCerts(s.ca)
	if err != nil {
		return nil, err
	}
	for _, c := range trusted {
		roots.AddCert(c)
	}
	uri := s.key
	if !strings.HasPrefix(uri, "pkcs11:") && !strings.HasPrefix(uri, "file:") {
		uri = "file:" + uri
	}
	key, err := pki.OpenKey(uri, func() ([]byte, error) { return pass.known(s.key) })
	if err != nil {
		return nil, err
	}
	own := &tls.Certificate{Certificate: [][]byte{certs[0].Raw}, PrivateKey: key, Leaf: certs[0]}
	s.client = http.Client{Timeout: callFor, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{
		MinVersion: tls.VersionTLS13, RootCAs: roots,
		// Whatever the server says of its CAs: it pins this one.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return own, nil },
	}}}
	return func() error { return pki.CloseKey(key) }, nil
}

func readCerts(path string) ([]*x509.Certificate, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	certs, err := pki.ParseCerts(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return certs, nil
}

// renewalFor asks, and with --wait asks again until there is a certificate.
func (a *app) renewalFor(ctx context.Context, s *selfRenewal, n *newService) (*admin.Renewal, error) {
	key, err := pki.ReadKey(n.file("service.key"), nil)
	if errors.Is(err, fs.ErrNotExist) {
		key, err = makeKey(n.file("service.key"))
	}
	if err != nil {
		return nil, err
	}
	csr, err := requestFor(key, "renewal")
	if err != nil {
		return nil, err
	}
	v, err := s.call(ctx, "POST", pki.EncodeCSR(csr.DER))
	for err == nil && s.wait && v.State == admin.RenewalPending {
		a.note("the safe has not signed yet: asking again in %s", askAgain)
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(askAgain):
		}
		v, err = s.call(ctx, "GET", nil)
	}
	if err != nil || v.State == admin.RenewalPending {
		return v, err
	}
	cert, err := pki.ParseCert([]byte(v.Certificate))
	if err == nil && !key.PublicKey.Equal(cert.PublicKey) {
		err = errors.New("it is for another key")
	}
	if err != nil {
		return nil, fmt.Errorf("the server's answer is no certificate for %s: %w", n.file("service.key"), err)
	}
	return v, nil
}

// call asks the API once.
func (s *selfRenewal) call(ctx context.Context, method string, body []byte) (*admin.Renewal, error) {
	r, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(s.url, "/")+"/v1/renew", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := s.client.Do(r)
	if err != nil {
		return nil, fmt.Errorf("ask the server: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("ask the server: %w", err)
	}
	switch resp.StatusCode {
	case http.StatusOK, http.StatusAccepted:
		v := new(admin.Renewal)
		return v, json.Unmarshal(text, v)
	case http.StatusTooManyRequests:
		return nil, errors.New("the server was asked too often\nhint: the same command again, in ten minutes")
	}
	e := new(admin.Error)
	if json.Unmarshal(text, e) != nil || e.Text == "" {
		return nil, fmt.Errorf("the server answered %s", resp.Status)
	}
	return nil, e
}

// selfRenewed is what renew --self says with --json.
type selfRenewed struct {
	State   string    `json:"state"`
	Out     string    `json:"out"`
	Until   time.Time `json:"until,omitzero"`
	Request string    `json:"request,omitempty"`
}

func (a *app) finishSelf(v *admin.Renewal, n *newService) error {
	out := selfRenewed{State: v.State, Out: n.out, Until: v.Until, Request: v.Request}
	if v.State == admin.RenewalPending {
		return emitOne(a, out, func() {
			a.say("the request waits for the safe: %s", printable(v.Request))
			a.note("the key is in %s; the same command again fetches the certificate", n.file("service.key"))
		})
	}
	// ca.crt first: with service.crt all is there.
	if err := durable.WriteFile(n.file("ca.crt"), []byte(v.Roots), 0o644); err != nil {
		return err
	}
	if err := durable.WriteFile(n.file("service.crt"), []byte(v.Certificate), 0o644); err != nil {
		return err
	}
	return emitOne(a, out, func() {
		a.say("renewed until %s, the new files are in %s", stamp(v.Until), n.out)
		a.sayOverlap()
	})
}

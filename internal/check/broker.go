package check

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"hawser/internal/check/tls13"
	"hawser/internal/pki"
)

// Credentials are a certificate with its key: what one client shows.
type Credentials struct {
	DER  []byte
	Key  *ecdsa.PrivateKey
	Name string // CN
	cert *x509.Certificate
}

// LoadCredentials reads "CERT,KEY": two PEM files.
func LoadCredentials(pair string) (*Credentials, error) {
	cert, key, ok := strings.Cut(pair, ",")
	if !ok {
		return nil, fmt.Errorf("%q is not CERT,KEY", pair)
	}
	der, err := readDER(cert)
	if err != nil {
		return nil, err
	}
	k, err := pki.ReadKey(key, nil)
	if err != nil {
		return nil, err
	}
	return newCredentials(der, k)
}

func newCredentials(der []byte, key *ecdsa.PrivateKey) (*Credentials, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, fmt.Errorf("the key does not belong to the certificate of %q", cert.Subject.CommonName)
	}
	return &Credentials{DER: der, Key: key, Name: cert.Subject.CommonName, cert: cert}, nil
}

// BrokerOptions say which broker is tried, and with whose certificates. Two devices of
// the broker are needed; cases that need what is not given are n/a.
type BrokerOptions struct {
	Target  string // host:port
	Name    string // SNI; "" takes the host
	Device  *Credentials
	Other   *Credentials
	Revoked *Credentials // may be nil
	Service *Credentials // may be nil
	// Revoke is a command that takes away the rights of {id} in mid-test; Device is lost
	// to it. May be "".
	Revoke string
	Topics string // "private/{id}/#": where a device may publish and subscribe
	// Profile General makes what is legitimate outside the microcontroller's profile a warn.
	Profile  Profile
	Step     time.Duration
	Patience time.Duration // how long a broker may keep a connection that says nothing useful
	Only     []string
	Told     func(done, all int, r *Result)
}

// BrokerCase is one thing that is tried with a broker.
type BrokerCase struct {
	Case
	needs func(o *BrokerOptions) string // what is missing for it, "" for nothing
	try   func(p *intruder) error
}

// BrokerCases lists what a broker is tried with. Those that take a right away come last.
func BrokerCases() []BrokerCase {
	return slices.Concat(strangerCases(), identityCases(), subscribeCases(), publishCases(), abuseCases(), revokeCases())
}

// Broker runs the cases against a broker. If two honest devices cannot use it, the
// others are not judged.
func Broker(ctx context.Context, o BrokerOptions) (*Report, error) {
	all := BrokerCases()
	plain := make([]Case, len(all))
	for i := range all {
		plain[i] = all[i].Case
	}
	wanted, err := Find(plain, o.Only)
	if err != nil {
		return nil, err
	}
	if o.Name == "" {
		if o.Name, _, err = net.SplitHostPort(o.Target); err != nil {
			return nil, fmt.Errorf("%q is not HOST:PORT: %w", o.Target, err)
		}
	}
	if o.Profile == "" {
		o.Profile = MCU
	}
	rep := &Report{Kind: "broker", Target: o.Target, Profile: string(o.Profile), Began: time.Now()}
	r := &siege{o: &o, report: rep, all: len(wanted) + 1}
	ok := r.one(ctx, honestBroker()).Verdict == Pass
	for _, c := range all {
		if !slices.ContainsFunc(wanted, func(w Case) bool { return w.ID == c.ID }) {
			continue
		}
		if !ok {
			res := blank(&c.Case)
			res.Verdict, res.Why = Inconclusive, "not tried: honest devices cannot use this broker"
			r.tell(res)
			continue
		}
		r.one(ctx, c)
	}
	rep.Ended = time.Now()
	return rep, ctx.Err()
}

// siege is one walk through the cases against a broker.
type siege struct {
	o      *BrokerOptions
	all    int
	report *Report
}

func (r *siege) tell(res *Result) {
	res.Took = time.Since(res.Began)
	r.report.Results = append(r.report.Results, *res)
	if r.o.Told != nil {
		r.o.Told(len(r.report.Results), r.all, res)
	}
}

func (r *siege) one(ctx context.Context, c BrokerCase) *Result {
	res := blank(&c.Case)
	defer r.tell(res)
	if c.needs != nil {
		if missing := c.needs(r.o); missing != "" {
			res.Verdict, res.Why = NotApplicable, missing
			return res
		}
	}
	p := &intruder{ctx: ctx, o: r.o}
	defer p.close()
	err := c.try(p)
	var skip *notApplicable
	switch {
	case errors.As(err, &skip):
		res.Verdict, res.Why = NotApplicable, skip.why
	case p.verdict != "":
		res.Verdict, res.Why = p.verdict, p.why
	case err != nil:
		res.Verdict, res.Why = Inconclusive, "the case came to no end: "+err.Error()
	default:
		res.Verdict, res.Why = Inconclusive, "the case came to no end"
	}
	res.Evidence = p.evidence()
	return res
}

// intruder is the hostile client of one case, with its connections.
type intruder struct {
	ctx     context.Context
	o       *BrokerOptions
	verdict Verdict
	why     string
	note    string
	last    *tls13.Conn // whose end is the evidence
	open    []net.Conn
}

func (p *intruder) settle(v Verdict, format string, args ...any) error {
	p.verdict, p.why = v, fmt.Sprintf(format, args...)
	return nil
}

func (p *intruder) close() {
	for _, c := range p.open {
		c.Close()
	}
}

func (p *intruder) evidence() Evidence {
	e := Evidence{Connected: p.last != nil, Note: p.note}
	if p.last != nil {
		e.Ended, e.Sent = p.last.Seen.EndText(), p.last.Seen.AppBytes
	}
	return e
}

// tcp opens a connection that ends with the case.
func (p *intruder) tcp() (net.Conn, error) {
	d := net.Dialer{Timeout: p.o.Step}
	c, err := d.DialContext(p.ctx, "tcp", p.o.Target)
	if err != nil {
		return nil, err
	}
	p.open = append(p.open, c)
	return c, c.SetDeadline(time.Now().Add(p.o.Step))
}

// client is a correct TLS client with those credentials; nil shows none.
func (p *intruder) client(who *Credentials) *tls13.Client {
	k := &tls13.Client{Name: p.o.Name, ALPN: "mqtt"}
	if net.ParseIP(p.o.Name) != nil {
		k.Name = ""
	}
	if who != nil {
		k.Chain, k.Key = [][]byte{who.DER}, who.Key
	}
	return k
}

// dial makes a TLS connection; a refusal by the broker shows at the first read.
func (p *intruder) dial(k *tls13.Client) (*tls13.Conn, error) {
	raw, err := p.tcp()
	if err != nil {
		return nil, err
	}
	c := &tls13.Conn{Raw: raw}
	p.last = c
	_, err = k.Handshake(c)
	return c, err
}

// topic is a topic of that device: what its filter covers, with leaf in place of "#".
func (p *intruder) topic(who *Credentials, leaf string) string {
	return strings.Replace(strings.ReplaceAll(p.o.Topics, "{id}", who.Name), "#", leaf, 1)
}

func (p *intruder) filter(who *Credentials) string { return p.topic(who, "#") }

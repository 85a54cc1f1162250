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
	"sync"
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
	if err := checkName(cert.Subject.CommonName); err != nil {
		return nil, err
	}
	return &Credentials{DER: der, Key: key, Name: cert.Subject.CommonName, cert: cert}, nil
}

// checkName refuses what a certificate may be called and a shell or a topic would read as
// more than a name: it goes into both.
func checkName(cn string) error {
	ok := func(r rune) bool {
		return r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' || r == '-' || r == '_' || r == '.' || r == ':'
	}
	if cn == "" || len(cn) > 64 || cn[0] == '-' || strings.ContainsFunc(cn, func(r rune) bool { return !ok(r) }) {
		return fmt.Errorf("the certificate is called %q: a name is 1 to 64 of letters, digits, - _ . and colons", cn)
	}
	return nil
}

// BrokerOptions say which broker is tried, and with whose certificates. Two devices of
// the broker are needed; cases that need what is not given are n/a.
type BrokerOptions struct {
	Target  string // host:port
	Name    string // SNI; "" takes the host
	Device  *Credentials
	Other   *Credentials
	Revoked *Credentials // may be nil
	Service *Credentials // may read the devices' u/ topics and nothing else; may be nil
	Expired *Credentials // of the devices' CA, but over; nil takes a forged one
	Server  *Credentials // of the devices' CA, for serverAuth alone; nil takes a forged one
	// Revoke is a command that takes away the rights of {id} in mid-test. May be "". Device
	// is lost to it: what is seen afterwards is gathered at once, for all cases of B10.
	Revoke string
	Topics string // "private/{id}/#": where a device may publish and subscribe
	// Profile General makes what is legitimate outside the microcontroller's profile a warn.
	Profile  Profile
	Step     time.Duration
	Patience time.Duration // how long a broker may keep a connection that says nothing useful
	Only     []string
	Begun    func(c *Case) // may be nil
	Told     func(done, all int, r *Result)
}

// BrokerCase is one thing that is tried with a broker.
type BrokerCase struct {
	Case
	needs func(o *BrokerOptions) string // what is missing for it, "" for nothing
	try   func(p *intruder) error
}

// BrokerCases lists what a broker is tried with: the honest case first, those that take a
// right away last.
func BrokerCases() []BrokerCase {
	return slices.Concat(servingCases(), strangerCases(), suiteCases(), identityCases(), subscribeCases(), publishCases(), willCases(),
		serviceCases(), abuseCases(), floodCases(), revokeCases())
}

// Broker runs the cases against a broker. If two honest devices cannot use it, the
// others are not judged. When ctx ends, the report holds what was judged by then.
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
	if err := o.complete(); err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(c BrokerCase) bool {
		return c.ID != plain[0].ID && !slices.ContainsFunc(wanted, func(w Case) bool { return w.ID == c.ID })
	})
	r := &siege{o: &o, all: len(all), report: &Report{Kind: "broker", Target: o.Target, Profile: string(o.Profile), Began: time.Now()}}
	r.walk(ctx, all)
	r.report.Ended = time.Now()
	return r.report, ctx.Err()
}

// Check tells what is wrong with the target or the topics.
func (o *BrokerOptions) Check() error {
	if _, _, err := net.SplitHostPort(o.Target); err != nil {
		return fmt.Errorf("%q is not HOST:PORT", o.Target)
	}
	if !strings.Contains(o.Topics, "{id}") || !strings.HasSuffix(o.Topics, "/#") {
		return fmt.Errorf("topics %q do not hold {id} and end with /#", o.Topics)
	}
	return nil
}

// complete fills in what was left out.
func (o *BrokerOptions) complete() error {
	if err := o.Check(); err != nil {
		return err
	}
	if o.Name == "" {
		o.Name, _, _ = net.SplitHostPort(o.Target) // Check has tried it
	}
	if o.Profile == "" {
		o.Profile = MCU
	}
	return nil
}

// walk runs the cases, the honest one first.
func (r *siege) walk(ctx context.Context, all []BrokerCase) {
	ok := true
	for i, c := range all {
		if ctx.Err() != nil {
			return
		}
		if !ok {
			res := blank(&c.Case)
			res.Verdict, res.Why = Inconclusive, "not tried: honest devices cannot use this broker"
			r.tell(res)
			continue
		}
		if v := r.one(ctx, c).Verdict; i == 0 {
			ok = v == Pass
		}
	}
}

// siege is one walk through the cases against a broker.
type siege struct {
	o      *BrokerOptions
	all    int
	report *Report
	after  *aftermath // of the revocation; nil until the first case that wants it
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
	if r.o.Begun != nil {
		r.o.Begun(&c.Case)
	}
	if c.needs != nil {
		if missing := c.needs(r.o); missing != "" {
			res.Verdict, res.Why = NotApplicable, missing
			return res
		}
	}
	p := &intruder{ctx: ctx, o: r.o, siege: r}
	p.extend()
	defer context.AfterFunc(ctx, p.close)()
	defer p.close()
	err := c.try(p)
	var skip *notApplicable
	switch {
	case ctx.Err() != nil:
		res.Verdict, res.Why = Inconclusive, "interrupted"
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
	p.close()
	if res.Verdict == Pass || res.Verdict == Warn {
		r.recover(ctx, res)
	}
	return res
}

// recover looks whether the second device is still served after a case. A broker that
// died of it refused it as well, but that is no pass.
func (r *siege) recover(ctx context.Context, res *Result) {
	p := &intruder{ctx: ctx, o: r.o, siege: r}
	p.extend()
	defer context.AfterFunc(ctx, p.close)()
	defer p.close()
	g, err := p.join(p.o.Other, hello{id: p.o.Other.Name})
	if err == nil {
		_, err = g.ping()
	}
	if ctx.Err() != nil {
		return
	}
	ok := err == nil
	if res.Recovers = &ok; !ok {
		res.Verdict, res.Why = Fail, fmt.Sprintf("afterwards an honest device is not served: %v; before that: %s", err, res.Why)
	}
}

// intruder is the hostile client of one case, with its connections.
type intruder struct {
	ctx     context.Context
	o       *BrokerOptions
	verdict Verdict
	why     string
	note    string
	last    *tls13.Conn // whose end is the evidence
	as      string      // the client id to log in with; "" is that of the first device
	payload string      // of what it injects; "" until the first
	siege   *siege
	limit   time.Time // no wait of the case goes beyond it

	mu   sync.Mutex
	open []net.Conn // guarded by mu
}

// extend gives the case its time, from now on.
func (p *intruder) extend() { p.limit = time.Now().Add(p.o.Step + p.o.Patience) }

// left is d, or less when the case has less time left.
func (p *intruder) left(d time.Duration) time.Duration { return max(0, min(d, time.Until(p.limit))) }

func (p *intruder) settle(v Verdict, format string, args ...any) error {
	p.verdict, p.why = v, fmt.Sprintf(format, args...)
	return nil
}

func (p *intruder) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
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
	d := net.Dialer{Deadline: time.Now().Add(p.left(p.o.Step))}
	c, err := d.DialContext(p.ctx, "tcp", p.o.Target)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ctx.Err(); err != nil { // close will not come again
		c.Close()
		return nil, err
	}
	p.open = append(p.open, c)
	return c, c.SetDeadline(time.Now().Add(p.left(p.o.Step)))
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

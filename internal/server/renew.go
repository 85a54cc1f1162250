package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	limit "golang.org/x/time/rate"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/pki"
	"hawser/internal/registry"
)

// What the services' API lets one client cost. Who is over a bound is refused and asks
// again later: nothing here is urgent.
const (
	apiConnections = 64               // at a time, all together
	apiTimeout     = 15 * time.Second // handshake, request and answer, each
	apiHeader      = 8 << 10          // bytes
	apiBody        = 8 << 10          // bytes; a CSR has about 500
	renewEvery     = 10 * time.Minute // POST, for one service, on average
	renewBurst     = 5
	askEvery       = time.Second // GET, the same
	askBurst       = 20
)

// renewAPI lets a service have a new certificate with the one it has:
//
//	POST /v1/renew   the body is a CSR, PEM or DER, of any P-256 key
//	GET  /v1/renew   how far that has come
//
// Both answer 200 with the certificate or 202 while the safe has to sign. Who asks is
// told by the pin of the certificate alone, as in the broker.
type renewAPI struct {
	b   *backend
	log *slog.Logger

	one   sync.Mutex                 // held while a certificate is asked for: the same key is certified once
	mu    sync.Mutex                 // guards rates
	rates map[string]*serviceLimiter // mu; by service
}

type serviceLimiter struct{ renew, ask *limit.Limiter }

// serveServices opens the API that was listened for.
func (s *Server) serveServices() {
	v := &renewAPI{b: newBackend(s.layout, s.reg, s), log: s.log, rates: map[string]*serviceLimiter{}}
	s.serveHTTP(tls.NewListener(&fewConns{Listener: s.api, slots: make(chan struct{}, apiConnections)}, s.apiTLS()), &http.Server{
		Handler: v.handler(), ReadHeaderTimeout: apiTimeout, ReadTimeout: apiTimeout, WriteTimeout: 2 * apiTimeout,
		IdleTimeout: apiTimeout, MaxHeaderBytes: apiHeader, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	})
}

// apiTLS demands what the broker demands: TLS 1.3, P-256, and a pinned certificate. No
// tickets: a resumption would bypass the pin.
func (s *Server) apiTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.CurveP256}, NextProtos: []string{"http/1.1"},
		ClientAuth: tls.RequireAnyClientCert, SessionTicketsDisabled: true,
		GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) { return s.leaves.pick(h.ServerName) },
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			if len(raw) == 0 {
				return errors.New("client gave no certificate")
			}
			_, err := s.service(pki.Fingerprint(raw[0]))
			return err
		},
		VerifyConnection: func(c tls.ConnectionState) error {
			if !slices.Contains(s.layout.Config.TLS.SuiteIDs(), c.CipherSuite) {
				return fmt.Errorf("%s is not on the allow-list", tls.CipherSuiteName(c.CipherSuite))
			}
			return nil
		},
	}
}

// service gives the service that may come in with a certificate.
func (s *Server) service(fingerprint [32]byte) (identity.Principal, error) {
	who, err := s.br.Holder(fingerprint, time.Now())
	if err == nil && who.Kind != identity.Service {
		err = fmt.Errorf("%s is no service: a device gets its certificates over MQTT", who)
	}
	return who, err
}

// fewConns is a listener that turns away what is too much.
type fewConns struct {
	net.Listener
	slots chan struct{}
}

func (l *fewConns) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.slots <- struct{}{}:
			return &slotConn{Conn: c, free: sync.OnceFunc(func() { <-l.slots })}, nil
		default:
			c.Close()
		}
	}
}

type slotConn struct {
	net.Conn
	free func()
}

func (c *slotConn) Close() error {
	c.free()
	return c.Conn.Close()
}

// renewCall is one endpoint: pending is the answer's status 202.
type renewCall func(r *http.Request, who identity.Principal, used [32]byte) (*admin.Renewal, error)

func (v *renewAPI) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/renew", func(w http.ResponseWriter, r *http.Request) {
		v.answer(w, r, func(l *serviceLimiter) *limit.Limiter { return l.renew }, v.renew)
	})
	mux.HandleFunc("GET /v1/renew", func(w http.ResponseWriter, r *http.Request) {
		v.answer(w, r, func(l *serviceLimiter) *limit.Limiter { return l.ask }, v.ask)
	})
	return mux
}

func (v *renewAPI) answer(w http.ResponseWriter, r *http.Request, which func(*serviceLimiter) *limit.Limiter, fn renewCall) {
	// Looked up again: only now has the client proved that the certificate is its own,
	// and a connection that stands may have been revoked since.
	used := pki.Fingerprint(r.TLS.PeerCertificates[0].Raw)
	who, err := v.b.srv.service(used)
	if err != nil {
		refuse(w, admin.Errorf(admin.Conflict, "%v", err))
		return
	}
	if !which(v.limiter(who.Name)).Allow() {
		w.WriteHeader(http.StatusTooManyRequests)
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, apiBody)
	answer(w, r, func(r *http.Request) (any, error) {
		out, err := fn(r, who, used)
		if err != nil {
			v.log.Warn("renewal refused", "service", who.Name, "from", r.RemoteAddr, "error", err)
			return nil, err
		}
		if out.State == admin.RenewalPending {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusAccepted)
		}
		return out, nil
	})
}

func (v *renewAPI) limiter(name string) *serviceLimiter {
	v.mu.Lock()
	defer v.mu.Unlock()
	l := v.rates[name]
	if l == nil {
		l = &serviceLimiter{limit.NewLimiter(limit.Every(renewEvery), renewBurst), limit.NewLimiter(limit.Every(askEvery), askBurst)}
		v.rates[name] = l
	}
	return l
}

// renew certifies a key. The same key again gives the same answer: the first one may
// have been lost.
func (v *renewAPI) renew(r *http.Request, who identity.Principal, used [32]byte) (*admin.Renewal, error) {
	text, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, admin.Errorf(admin.Invalid, "request not understood: %v", err)
	}
	csr, err := pki.ParseCSR(text)
	if err != nil {
		return nil, admin.Errorf(admin.Invalid, "%v", err)
	}
	v.one.Lock()
	defer v.one.Unlock()
	newest, err := v.newest(r.Context(), who, used)
	if err != nil {
		return nil, err
	}
	if newest != nil && csr.Pub.Equal(newest.PublicKey) {
		return v.issued(newest)
	}
	cert, err := v.sign(who.Name, csr)
	if err != nil {
		return nil, err
	}
	if cert == nil {
		return v.request(r.Context(), who.Name, csr)
	}
	row := registryCertificate(who, 0, cert)
	if err := v.update(r.Context(), func(tx *registry.Tx) error { return tx.AddCertificate(who.String(), row) }); err != nil {
		return nil, err
	}
	return v.issued(cert)
}

// sign signs where the CA lies open beside the server, which is a trial fleet's way;
// nil where the safe has to.
func (v *renewAPI) sign(name string, csr *pki.CSR) (*x509.Certificate, error) {
	if !v.b.layout.Config.Fleet.Trial {
		return nil, nil
	}
	ca, err := fleet.OpenCA(v.b.layout.CADir("a"), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	cert, err := ca.IssueService(name, csr.Pub, time.Now())
	if errors.Is(err, pki.ErrNoPassphrase) || errors.Is(err, fs.ErrNotExist) {
		return nil, ca.Close()
	}
	return cert, errors.Join(err, ca.Close())
}

// request writes what the safe has to answer. One waits for each service at most.
func (v *renewAPI) request(ctx context.Context, name string, csr *pki.CSR) (*admin.Renewal, error) {
	waiting, err := v.waiting(ctx, name)
	if err != nil {
		return nil, err
	}
	if waiting != nil {
		if !csr.Pub.Equal(waiting.ParsedCSR().Pub) {
			return nil, admin.Errorf(admin.Conflict, "a request of %s with another key waits for the safe\nhint: renew with that key, or have it answered first", name)
		}
		return pending(waiting), nil
	}
	q, err := pki.NewRequest(v.b.layout.FleetID(), pki.KindService, name, csr)
	if err != nil {
		return nil, err
	}
	file, err := q.Encode()
	if err != nil {
		return nil, err
	}
	who := identity.Principal{Kind: identity.Service, Name: name}
	_, err = v.b.keepRequest(q, file, func(apply func(*registry.Tx, string) error) error {
		return v.update(ctx, func(tx *registry.Tx) error { return apply(tx, who.String()) })
	})
	if err != nil {
		return nil, err
	}
	v.log.Info("a service asks for a new certificate: the request waits for the safe", "service", name, "request", requestID(q))
	return pending(q), nil
}

func requestID(q *pki.Request) string {
	hash := q.Hash()
	return hex.EncodeToString(hash[:])
}

func pending(q *pki.Request) *admin.Renewal {
	return &admin.Renewal{State: admin.RenewalPending, Request: requestID(q)}
}

// waiting gives the request of a service that the safe has not answered yet, or nil.
func (v *renewAPI) waiting(ctx context.Context, name string) (*pki.Request, error) {
	list, err := v.b.reg.Requests(ctx, registry.RequestPending, maxPage)
	if err != nil {
		return nil, err
	}
	for _, q := range list {
		if q.Kind == pki.KindService && q.Subject == name {
			return pki.ParseRequest(q.Body)
		}
	}
	return nil, nil
}

// ask tells how far a renewal has come.
func (v *renewAPI) ask(r *http.Request, who identity.Principal, used [32]byte) (*admin.Renewal, error) {
	newest, err := v.newest(r.Context(), who, used)
	if err != nil {
		return nil, err
	}
	if newest != nil {
		return v.issued(newest)
	}
	waiting, err := v.waiting(r.Context(), who.Name)
	if err != nil {
		return nil, err
	}
	if waiting == nil {
		return nil, admin.Errorf(admin.NotFound, "no renewal of %s waits\nhint: POST /v1/renew with a CSR", who.Name)
	}
	return pending(waiting), nil
}

// newest gives the active certificate of a service that is newer than the one it
// uses, or nil.
func (v *renewAPI) newest(ctx context.Context, who identity.Principal, used [32]byte) (*x509.Certificate, error) {
	list, err := v.b.reg.Certificates(ctx, who)
	if err != nil {
		return nil, err
	}
	var best, mine registry.Certificate
	for _, c := range list {
		if c.Fingerprint == used {
			mine = c
		}
		if c.State == registry.CertificateActive && c.Generation >= best.Generation {
			best = c
		}
	}
	if best.DER == nil || best.Generation <= mine.Generation {
		return nil, nil
	}
	return x509.ParseCertificate(best.DER)
}

func (v *renewAPI) issued(cert *x509.Certificate) (*admin.Renewal, error) {
	var roots strings.Builder
	for _, c := range v.b.layout.Trust().BrokerRoots {
		roots.Write(pki.EncodeCert(c.Raw))
	}
	return &admin.Renewal{State: admin.RenewalIssued, Certificate: string(pki.EncodeCert(cert.Raw)), Until: admin.UTC(cert.NotAfter), Roots: roots.String()}, nil
}

// update makes a change in the name of a service, which no context carries.
func (v *renewAPI) update(ctx context.Context, apply func(*registry.Tx) error) error {
	if err := v.b.reg.Update(ctx, apply); err != nil {
		return err
	}
	return v.b.followed(ctx)
}

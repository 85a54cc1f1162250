package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/user"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"hawser/internal/admin"
	"hawser/internal/command"
	"hawser/internal/durable"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/msglog"
	"hawser/internal/registry"
)

// maxBody bounds a request, in bytes: 10,000 enrolments fit.
const maxBody = 32 << 20

// backend answers the administration API. With a server it is the server's, with
// none it works on the files, which its owner has locked.
type backend struct {
	layout *fleet.Layout
	reg    *registry.Registry
	srv    *Server // nil: no server runs

	mu       sync.Mutex
	log      *msglog.Log               // mu; opened when first needed, without a server
	reserved map[identity.ID]time.Time // mu; ids handed out, and until when
}

func newBackend(l *fleet.Layout, r *registry.Registry, s *Server) *backend {
	b := &backend{layout: l, reg: r, srv: s, reserved: map[identity.ID]time.Time{}}
	if s != nil {
		b.log = s.mlog
	}
	return b
}

// close closes what the backend opened itself.
func (b *backend) close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.srv != nil || b.log == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), drainFor)
	defer cancel()
	return b.log.Close(ctx)
}

// openLog gives the log; without a server it is read only.
func (b *backend) openLog(ctx context.Context) (*msglog.Log, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.log != nil {
		return b.log, nil
	}
	l, err := openLog(ctx, b.layout, b.reg, nil)
	b.log = l
	return l, err
}

// needServer refuses what only a running server can do.
func (b *backend) needServer(what string) error {
	if b.srv != nil {
		return nil
	}
	return admin.Errorf(admin.NoServer, "%s needs a running server, and none runs on %s\nhint: hawser serve --dir %s", what, b.layout.Dir, b.layout.Dir)
}

// followed waits until the running broker knows of every change made so far.
func (b *backend) followed(ctx context.Context) error {
	if b.srv == nil {
		return nil
	}
	return b.srv.feed.sync(ctx)
}

// update makes a change and waits until the broker follows it.
func (b *backend) update(r *http.Request, apply func(tx *registry.Tx, actor string) error) error {
	actor := actorOf(r)
	if err := b.reg.Update(r.Context(), func(tx *registry.Tx) error { return apply(tx, actor) }); err != nil {
		return err
	}
	return b.followed(r.Context())
}

// call is one endpoint: it gives what is to be answered, or nil for nothing.
type call func(r *http.Request) (any, error)

func (b *backend) handler() http.Handler {
	mux := http.NewServeMux()
	for pattern, fn := range map[string]call{
		"GET /v1/status":                              b.status,
		"GET /v1/devices":                             b.devices,
		"GET /v1/devices/{id}":                        b.device,
		"GET /v1/devices/{id}/reserved":               b.checkReserved,
		"POST /v1/reserve":                            b.reserve,
		"POST /v1/devices/{id}/enroll":                b.enroll,
		"POST /v1/enroll":                             b.enrollMany,
		"POST /v1/devices/{id}/revoke":                b.setState(registry.DeviceRevoked),
		"POST /v1/devices/{id}/retire":                b.setState(registry.DeviceRetired),
		"POST /v1/devices/{id}/quarantine":            b.setState(registry.DeviceQuarantined),
		"POST /v1/devices/{id}/unrevoke":              b.unrevoke,
		"POST /v1/devices/{id}/release":               b.release,
		"POST /v1/revoke":                             b.revokeMany,
		"POST /v1/states":                             b.states,
		"POST /v1/devices/{id}/tag":                   b.tag,
		"GET /v1/services":                            b.services,
		"POST /v1/services":                           b.addService,
		"POST /v1/services/{name}/certificate":        b.serviceCertificate,
		"POST /v1/services/{name}/revoke":             b.revokeService,
		"POST /v1/services/{name}/grants":             b.changeGrants,
		"GET /v1/stations":                            b.stations,
		"POST /v1/stations/{name}/blocks":             b.reserveBlock,
		"POST /v1/stations/{name}/certificate":        b.renewStation,
		"POST /v1/stations/{name}/revoke":             b.revokeStation,
		"POST /v1/blocks":                             b.blockSigned,
		"GET /v1/requests":                            b.requests,
		"POST /v1/requests":                           b.newRequest,
		"POST /v1/results":                            b.importResult,
		"GET /v1/commands":                            b.commands,
		"POST /v1/devices/{id}/commands":              b.send,
		"GET /v1/devices/{id}/commands/{cid}":         b.command,
		"POST /v1/devices/{id}/commands/{cid}/cancel": b.cancel,
		"GET /v1/devices/{id}/config":                 b.config,
		"POST /v1/devices/{id}/config":                b.setConfig,
		"GET /v1/audit":                               b.audit,
		"POST /v1/reload":                             b.reload,
		"POST /v1/gc":                                 b.gc,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { answer(w, r, fn) })
	}
	mux.HandleFunc("GET /v1/tail", b.tail)
	mux.HandleFunc("POST /v1/journal", b.importJournal)
	return mux
}

func answer(w http.ResponseWriter, r *http.Request, fn call) {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	out, err := fn(r)
	if err != nil {
		refuse(w, err)
		return
	}
	if out == nil {
		out = struct{}{}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(out) // a client that has gone hears nothing anyway
}

func refuse(w http.ResponseWriter, err error) {
	e := apiError(err)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(e.Kind.Status())
	_ = json.NewEncoder(w).Encode(e)
}

// apiError is the one place that sorts errors into kinds.
func apiError(err error) *admin.Error {
	var e *admin.Error
	if errors.As(err, &e) {
		return e
	}
	kind := admin.Failed
	for _, k := range []struct {
		is   error
		kind admin.Kind
	}{
		{registry.ErrNotFound, admin.NotFound}, {registry.ErrExists, admin.Conflict}, {registry.ErrKey, admin.Conflict},
		{registry.ErrState, admin.Conflict}, {registry.ErrReserved, admin.Conflict}, {registry.ErrNotFree, admin.Conflict}, {registry.ErrInvalid, admin.Invalid}, {registry.ErrClosed, admin.Unavailable},
		{command.ErrInvalid, admin.Invalid}, {message.ErrMessage, admin.Invalid}, {identity.ErrID, admin.Invalid},
		{identity.ErrName, admin.Invalid}, {msglog.ErrUnavailable, admin.Unavailable}, {msglog.ErrClosed, admin.Unavailable},
		{durable.ErrLocked, admin.Unavailable}, {fs.ErrExist, admin.Conflict},
	} {
		if errors.Is(err, k.is) {
			kind = k.kind
			break
		}
	}
	return &admin.Error{Kind: kind, Text: err.Error()}
}

// read decodes the body of a request. What is unknown or left over is refused.
func read(r *http.Request, into any) error {
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return admin.Errorf(admin.Invalid, "request not understood: %v", err)
	}
	if dec.More() {
		return admin.Errorf(admin.Invalid, "request not understood: something follows it")
	}
	return nil
}

func pathID(r *http.Request) (identity.ID, error) {
	id, err := identity.ParseID(r.PathValue("id"))
	if err != nil {
		return 0, admin.Errorf(admin.Invalid, "%q: %v", r.PathValue("id"), err)
	}
	return id, nil
}

// params reads the query of a request; the first thing wrong is kept.
type params struct {
	r   *http.Request
	err error
}

func (p *params) text(name string) string { return p.r.URL.Query().Get(name) }

func (p *params) wrong(name string) {
	if p.err == nil {
		p.err = admin.Errorf(admin.Invalid, "%s %q is not understood", name, p.text(name))
	}
}

func (p *params) number(name string) (v uint64) {
	if s := p.text(name); s != "" {
		var err error
		if v, err = strconv.ParseUint(s, 10, 63); err != nil {
			p.wrong(name)
		}
	}
	return v
}

func (p *params) limit() int { return int(min(p.number("limit"), 1<<30)) }

func (p *params) id(name string) (v identity.ID) {
	if s := p.text(name); s != "" {
		var err error
		if v, err = identity.ParseID(s); err != nil {
			p.wrong(name)
		}
	}
	return v
}

func (p *params) flag(name string) *bool {
	s := p.text(name)
	if s == "" {
		return nil
	}
	v, err := strconv.ParseBool(s)
	if err != nil {
		p.wrong(name)
	}
	return &v
}

func (p *params) isSet(name string) bool { v := p.flag(name); return v != nil && *v }

func (p *params) time(name string) (t time.Time) {
	if s := p.text(name); s != "" {
		var err error
		if t, err = time.Parse(time.RFC3339Nano, s); err != nil {
			p.wrong(name)
		}
	}
	return t
}

func (p *params) duration(name string) (d time.Duration) {
	if s := p.text(name); s != "" {
		var err error
		if d, err = time.ParseDuration(s); err != nil || d < 0 {
			p.wrong(name)
		}
	}
	return d
}

// actorKey is the context key of who is at the other end of a connection.
type actorKey struct{}

// withActor is http.Server.ConnContext: the kernel says who has connected.
func withActor(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, actorKey{}, peerName(c))
}

// actorOf names who makes a change: a user of this machine.
func actorOf(r *http.Request) string {
	if name, ok := r.Context().Value(actorKey{}).(string); ok {
		return name
	}
	return UserName(os.Getuid())
}

func peerName(c net.Conn) string {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return "unknown"
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return "unknown"
	}
	name := "unknown"
	err = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			name = UserName(int(cred.Uid))
		}
	})
	if err != nil {
		return "unknown"
	}
	return name
}

// UserName is how the audit calls a user of this machine.
func UserName(uid int) string {
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return "user " + u.Username
	}
	return fmt.Sprintf("user id %d", uid)
}

// serveAdmin opens the socket. A socket file that is there is a dead one: this
// process holds the lock.
func (s *Server) serveAdmin() error {
	path := s.layout.AdminSocket()
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("admin socket: %w", err)
	}
	private := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		// Before bind, so that the file is 0600 from its first moment.
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }), err)
	}}
	l, err := private.Listen(context.Background(), "unix", path)
	if err != nil {
		return fmt.Errorf("admin socket: %w\nhint: a path of more than 107 bytes is too long; set serve.admin_socket in hawser.toml", err)
	}
	s.serveHTTP(l, &http.Server{Handler: newBackend(s.layout, s.reg, s).handler(), ConnContext: withActor})
	if s.metrics != nil {
		s.serveHTTP(s.metrics, &http.Server{Handler: s.metricsHandler(), ReadHeaderTimeout: 10 * time.Second})
	}
	return nil
}

func (s *Server) serveHTTP(l net.Listener, h *http.Server) {
	s.servers = append(s.servers, h)
	s.goTask(func() {
		if err := h.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			s.fail(fmt.Errorf("serve %s: %w", l.Addr(), err))
		}
	})
}

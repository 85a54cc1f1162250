package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"hawser/internal/identity"
)

// maxError bounds what is read of an error's body, in bytes.
const maxError = 64 << 10

// Client calls the API. Its methods may be called by many goroutines. Errors of
// the server are *Error.
type Client struct {
	http    http.Client
	running bool
}

// NewClient makes a client that reaches the handler through dial. running says
// whether a server answers, and not this process itself from the files.
func NewClient(dial func(ctx context.Context) (net.Conn, error), running bool) *Client {
	t := &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		DisableCompression: true,
		MaxIdleConns:       8,
	}
	return &Client{http: http.Client{Transport: t}, running: running}
}

// Running reports whether a server runs.
func (c *Client) Running() bool { return c.running }

// Close gives idle connections up.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// call sends in, if it is not nil, and decodes the answer into out, if that is not nil.
func (c *Client) call(ctx context.Context, method, path string, q url.Values, in, out any) error {
	body, err := c.open(ctx, method, path, q, in)
	if err != nil {
		return err
	}
	return decode(body, out)
}

// send is call with a body that is sent as it stands.
func (c *Client) send(ctx context.Context, path string, in io.Reader, out any) error {
	body, err := c.do(ctx, "POST", path, nil, in)
	if err != nil {
		return err
	}
	return decode(body, out)
}

func decode(body io.ReadCloser, out any) error {
	defer body.Close()
	if out == nil {
		_, err := io.Copy(io.Discard, body)
		return err
	}
	if err := json.NewDecoder(body).Decode(out); err != nil {
		return fmt.Errorf("answer of the server: %w", err)
	}
	_, err := io.Copy(io.Discard, body)
	return err
}

// open gives the body of a good answer.
func (c *Client) open(ctx context.Context, method, path string, q url.Values, in any) (io.ReadCloser, error) {
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(text)
	}
	return c.do(ctx, method, path, q, body)
}

func (c *Client) do(ctx context.Context, method, path string, q url.Values, body io.Reader) (io.ReadCloser, error) {
	u := url.URL{Scheme: "http", Host: "hawser", Path: "/v1/" + path, RawQuery: q.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask the server: %w", err)
	}
	if resp.StatusCode/100 == 2 {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxError))
	if err != nil {
		return nil, fmt.Errorf("ask the server: %w", err)
	}
	e := new(Error)
	if json.Unmarshal(text, e) != nil || e.Text == "" {
		return nil, fmt.Errorf("the server answered %s", resp.Status)
	}
	return nil, e
}

// query collects the parameters that are set.
type query url.Values

func (q query) set(name, value string) {
	if value != "" {
		url.Values(q).Set(name, value)
	}
}

func (q query) number(name string, v uint64) {
	if v != 0 {
		q.set(name, strconv.FormatUint(v, 10))
	}
}

func (q query) id(name string, v identity.ID) {
	if v != 0 {
		q.set(name, v.String())
	}
}

func (q query) flag(name string, v bool) {
	if v {
		q.set(name, "true")
	}
}

func (q query) time(name string, t time.Time) {
	if !t.IsZero() {
		q.set(name, t.UTC().Format(time.RFC3339Nano))
	}
}

// Status tells the fleet at a glance.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.call(ctx, "GET", "status", nil, nil, &s)
}

// Devices lists one page of devices, ordered by id.
func (c *Client) Devices(ctx context.Context, f DeviceFilter) (p DevicePage, err error) {
	q := query{}
	q.set("state", f.State)
	q.set("class", f.Class)
	q.set("tag", f.Tag)
	q.set("prefix", f.Prefix)
	q.set("station", f.Station)
	q.time("flashed_since", f.FlashedSince)
	q.time("flashed_until", f.FlashedUntil)
	q.id("after", f.After)
	q.number("limit", uint64(f.Limit))
	if f.Online != nil {
		q.set("online", strconv.FormatBool(*f.Online))
	}
	return p, c.call(ctx, "GET", "devices", url.Values(q), nil, &p)
}

// Device tells all about one device.
func (c *Client) Device(ctx context.Context, id identity.ID) (d DeviceDetail, err error) {
	return d, c.call(ctx, "GET", "devices/"+id.String(), nil, nil, &d)
}

// ReserveID draws a free id and keeps it for its caller for an hour.
func (c *Client) ReserveID(ctx context.Context) (identity.ID, error) {
	var out struct{ ID identity.ID }
	return out.ID, c.call(ctx, "POST", "reserve", nil, struct{}{}, &out)
}

// CheckFree refuses with Conflict an id that a device has already.
func (c *Client) CheckFree(ctx context.Context, id identity.ID) error {
	_, err := c.Device(ctx, id)
	switch {
	case err == nil:
		return Errorf(Conflict, "device %s exists already\nhint: hawser device show %s", id, id)
	case IsKind(err, NotFound):
		return nil
	}
	return err
}

// CheckReserved refuses with Conflict an id that was given to a flashing bench, before a
// certificate is made for it that could not be imported.
func (c *Client) CheckReserved(ctx context.Context, id identity.ID) error {
	return c.call(ctx, "GET", "devices/"+id.String()+"/reserved", nil, nil, nil)
}

// Enroll imports a device's certificate after its chain, name and key were verified.
func (c *Client) Enroll(ctx context.Context, id identity.ID, e Enrolment) (d Device, err error) {
	return d, c.call(ctx, "POST", "devices/"+id.String()+"/enroll", nil, e, &d)
}

// EnrollMany is Enroll for many devices at once; the first error ends it, with
// some of them imported.
func (c *Client) EnrollMany(ctx context.Context, list []NamedEnrolment) error {
	return c.call(ctx, "POST", "enroll", nil, list, nil)
}

// reason is the body of a change of state.
type reason struct {
	Reason string `json:"reason"`
}

// Revoke shuts a device out.
func (c *Client) Revoke(ctx context.Context, id identity.ID, why string) error {
	_, err := c.Bar(ctx, id, "revoke", why)
	return err
}

// Bar shuts a device out: as is revoke, retire or quarantine. One that is in that
// state already is a Conflict.
func (c *Client) Bar(ctx context.Context, id identity.ID, as, why string) (out Barred, err error) {
	return out, c.call(ctx, "POST", "devices/"+id.String()+"/"+as, nil, reason{why}, &out)
}

// RevokeMany revokes up to 1000 devices in one change; those that are revoked already
// are counted. If one is not known, none is revoked.
func (c *Client) RevokeMany(ctx context.Context, ids []identity.ID, why string) (out Barred, err error) {
	return out, c.call(ctx, "POST", "revoke", nil, struct {
		IDs []identity.ID `json:"ids"`
		reason
	}{ids, reason{why}}, &out)
}

// States tells which of ids are devices, and their states.
func (c *Client) States(ctx context.Context, ids []identity.ID) (out States, err error) {
	return out, c.call(ctx, "POST", "states", nil, struct {
		IDs []identity.ID `json:"ids"`
	}{ids}, &out)
}

// Unrevoke brings a revoked or retired device back.
func (c *Client) Unrevoke(ctx context.Context, id identity.ID, why string) (out Unrevoked, err error) {
	return out, c.call(ctx, "POST", "devices/"+id.String()+"/unrevoke", nil, reason{why}, &out)
}

// Release takes a device out of quarantine, and settles what was reported of clones.
func (c *Client) Release(ctx context.Context, id identity.ID, why string) error {
	return c.call(ctx, "POST", "devices/"+id.String()+"/release", nil, reason{why}, nil)
}

// Tag adds and removes tags of a device.
func (c *Client) Tag(ctx context.Context, id identity.ID, add, remove []string) (d Device, err error) {
	return d, c.call(ctx, "POST", "devices/"+id.String()+"/tag", nil, struct {
		Add    []string `json:"add,omitempty"`
		Remove []string `json:"remove,omitempty"`
	}{add, remove}, &d)
}

// Services lists all services.
func (c *Client) Services(ctx context.Context) (list []Service, err error) {
	return list, c.call(ctx, "GET", "services", nil, nil, &list)
}

// AddService makes a service known, with its certificate if it has one yet.
func (c *Client) AddService(ctx context.Context, s NewService) (out Service, err error) {
	return out, c.call(ctx, "POST", "services", nil, s, &out)
}

// ServiceCertificate imports a new certificate of a service.
func (c *Client) ServiceCertificate(ctx context.Context, name string, der []byte) error {
	return c.call(ctx, "POST", "services/"+name+"/certificate", nil, struct {
		Certificate Hex `json:"certificate"`
	}{der}, nil)
}

// RevokeService shuts a service out for good.
func (c *Client) RevokeService(ctx context.Context, name, reason string) error {
	return c.call(ctx, "POST", "services/"+name+"/revoke", nil, struct {
		Reason string `json:"reason"`
	}{reason}, nil)
}

// ChangeGrants gives and takes grants of a service in one change.
func (c *Client) ChangeGrants(ctx context.Context, name string, give, take []Grant) (out Service, err error) {
	return out, c.call(ctx, "POST", "services/"+name+"/grants", nil, struct {
		Give []Grant `json:"give,omitempty"`
		Take []Grant `json:"take,omitempty"`
	}{give, take}, &out)
}

// Requests lists the requests that wait for the safe's answer.
func (c *Client) Requests(ctx context.Context) (list []Request, err error) {
	return list, c.call(ctx, "GET", "requests", nil, nil, &list)
}

// NewRequest has the server keep a request, made by pki.NewRequest and encoded,
// until its result is imported. The answer names the file to carry to the safe.
func (c *Client) NewRequest(ctx context.Context, file []byte) (out Request, err error) {
	return out, c.call(ctx, "POST", "requests", nil, File{string(file)}, &out)
}

// ImportResult brings what the safe has signed.
func (c *Client) ImportResult(ctx context.Context, file []byte) (out Imported, err error) {
	return out, c.call(ctx, "POST", "results", nil, File{string(file)}, &out)
}

// Send queues a command.
func (c *Client) Send(ctx context.Context, id identity.ID, n NewCommand) (out Command, err error) {
	return out, c.call(ctx, "POST", "devices/"+id.String()+"/commands", nil, n, &out)
}

// Command reads one command. With wait it is given when its outcome stands, or
// as it is when wait is over; that needs a running server.
func (c *Client) Command(ctx context.Context, id identity.ID, cid uint64, wait time.Duration) (out Command, err error) {
	q := query{}
	if wait > 0 {
		q.set("wait", wait.String())
	}
	path := fmt.Sprintf("devices/%s/commands/%d", id, cid)
	return out, c.call(ctx, "GET", path, url.Values(q), nil, &out)
}

// Commands lists commands.
func (c *Client) Commands(ctx context.Context, f CommandFilter) (list []Command, err error) {
	q := query{}
	q.id("device", f.Device)
	q.set("state", f.State)
	q.id("after_device", f.AfterDevice)
	q.number("after_cid", f.AfterCID)
	q.number("limit", uint64(f.Limit))
	return list, c.call(ctx, "GET", "commands", url.Values(q), nil, &list)
}

// Cancel ends a command that no device has acknowledged.
func (c *Client) Cancel(ctx context.Context, id identity.ID, cid uint64) (out Command, err error) {
	path := fmt.Sprintf("devices/%s/commands/%d/cancel", id, cid)
	return out, c.call(ctx, "POST", path, nil, struct{}{}, &out)
}

// Config reads the desired configuration of a device and what it applied.
func (c *Client) Config(ctx context.Context, id identity.ID) (out Config, err error) {
	return out, c.call(ctx, "GET", "devices/"+id.String()+"/config", nil, nil, &out)
}

// SetConfig replaces the desired configuration; document is JSON.
func (c *Client) SetConfig(ctx context.Context, id identity.ID, document json.RawMessage) (out Config, err error) {
	return out, c.call(ctx, "POST", "devices/"+id.String()+"/config", nil, struct {
		Document json.RawMessage `json:"document"`
	}{document}, &out)
}

// Tail calls fn for each message that t selects, until fn fails, ctx ends or,
// without Follow, there are no more.
func (c *Client) Tail(ctx context.Context, t Tail, fn func(*Message) error) error {
	q := query{}
	q.set("name", t.Name)
	q.set("topic", t.Topic)
	q.time("since", t.Since)
	q.number("limit", uint64(t.Limit))
	q.flag("reverse", t.Reverse)
	q.flag("follow", t.Follow)
	body, err := c.open(ctx, "GET", "tail", url.Values(q), nil)
	if err != nil {
		return err
	}
	defer body.Close()
	dec := json.NewDecoder(body)
	for {
		var line struct {
			Message
			Error
		}
		switch err := dec.Decode(&line); {
		case err == io.EOF:
			return fmt.Errorf("the server ended in the middle: %w", io.ErrUnexpectedEOF)
		case err != nil:
			return err
		case line.Kind == endOfTail:
			return nil
		case line.Kind != "":
			return &line.Error
		}
		if err := fn(&line.Message); err != nil {
			return err
		}
	}
}

// endOfTail is the kind of the last line of a tail that is whole.
const endOfTail Kind = "end"

// TailEnd is the last line of a tail: err, or that it is whole.
func TailEnd(err *Error) *Error {
	if err == nil {
		return &Error{Kind: endOfTail, Text: "end"}
	}
	return err
}

// Audit lists changes of state, the newest first.
func (c *Client) Audit(ctx context.Context, f AuditFilter) (list []AuditEntry, err error) {
	q := query{}
	q.set("actor", f.Actor)
	q.set("action", f.Action)
	q.set("subject", f.Subject)
	q.time("since", f.Since)
	q.number("before", uint64(f.Before))
	q.number("limit", uint64(f.Limit))
	return list, c.call(ctx, "GET", "audit", url.Values(q), nil, &list)
}

// Reload has a running server look at its certificates at once.
func (c *Client) Reload(ctx context.Context) error {
	return c.call(ctx, "POST", "reload", nil, struct{}{}, nil)
}

// GC has a running server give memory back to the system, for measurements.
func (c *Client) GC(ctx context.Context) error {
	return c.call(ctx, "POST", "gc", nil, struct{}{}, nil)
}

package admin

import (
	"encoding/json"
	"time"

	"hawser/internal/identity"
)

// Device is one device of the registry. Online is nil when no server runs.
type Device struct {
	ID       identity.ID `json:"id"`
	Class    string      `json:"class,omitempty"`
	State    string      `json:"state"` // active, revoked, quarantined, retired
	Online   *bool       `json:"online,omitempty"`
	Tags     []string    `json:"tags,omitempty"`
	Reason   string      `json:"reason,omitempty"` // why it is not active
	Note     string      `json:"note,omitempty"`
	Key      Hex         `json:"key,omitempty"` // SHA-256 of its public key
	Created  time.Time   `json:"created,omitzero"`
	Enrolled time.Time   `json:"enrolled,omitzero"`
	LastSeen time.Time   `json:"last_seen,omitzero"`
	Station  string      `json:"station,omitempty"`  // the bench that made it
	Hardware uint32      `json:"hardware,omitempty"` // revision
	Flashed  time.Time   `json:"flashed,omitzero"`   // by the bench's clock
	Block    Hex         `json:"block,omitempty"`    // that its id came from
	Hello    *Hello      `json:"hello,omitempty"`
}

// Hello is what a device last said of itself.
type Hello struct {
	At       time.Time `json:"at"`
	Class    string    `json:"class,omitempty"`
	Firmware string    `json:"firmware,omitempty"`
	Image    Hex       `json:"image,omitempty"`
	TLS      string    `json:"tls,omitempty"`
	Boot     string    `json:"boot,omitempty"`
	Nonce    uint64    `json:"nonce,string"`
	Features []string  `json:"features,omitempty"`
	Encoding string    `json:"encoding"` // cbor or json
}

// DeviceDetail is a device with all that hangs on it. Queue is nil when no
// server runs.
type DeviceDetail struct {
	Device
	LastCID      uint64        `json:"last_cid,string"`
	Certificates []Certificate `json:"certificates"`
	Queue        *Queue        `json:"queue,omitempty"`
	Config       Config        `json:"config"`
	Clones       []Clone       `json:"clones,omitempty"`  // not released yet
	Pending      []Command     `json:"pending,omitempty"` // commands, at most 100
}

// Clone is the proof that two hold the identity of a device: it was heard under the
// nonce of one boot, then of another, then of the first again.
type Clone struct {
	Back  Boot `json:"back"`
	Other Boot `json:"other"`
}

// Boot is one boot of a device as its hello tells it apart.
type Boot struct {
	Nonce  uint64    `json:"nonce,string"`
	Remote string    `json:"remote,omitempty"` // address and port, empty = not known
	At     time.Time `json:"at"`
}

// Barred tells what became of devices that were revoked, retired or quarantined.
type Barred struct {
	Changed int     `json:"changed"`
	Already int     `json:"already"`                           // were it before
	Dropped *uint64 `json:"dropped_messages,string,omitempty"` // that were queued; nil: no server runs, they go at its next start
}

// States tells which ids are devices, and the state of each.
type States struct {
	Known   map[identity.ID]string `json:"known"`
	Unknown []identity.ID          `json:"unknown,omitempty"`
}

// Unrevoked is a device that is back with the certificates that it had.
type Unrevoked struct {
	ID           identity.ID `json:"id"`
	Certificates int         `json:"certificates"` // that open the door again
}

// Queue is what waits for a device.
type Queue struct {
	Waiting int    `json:"waiting"`
	Dropped uint64 `json:"dropped,string"` // messages not queued because it was full
}

// Certificate is one certificate of a device or a service.
type Certificate struct {
	Fingerprint Hex       `json:"fingerprint"` // SHA-256 of the DER
	Owner       string    `json:"owner"`       // id or name
	State       string    `json:"state"`       // active, superseded, revoked
	Generation  uint32    `json:"generation,omitempty"`
	NotBefore   time.Time `json:"not_before"`
	NotAfter    time.Time `json:"not_after"`
	DER         Hex       `json:"der,omitempty"`
}

// DeviceFilter selects devices; the zero value selects the first page of all.
type DeviceFilter struct {
	State  string // empty = any
	Class  string
	Tag    string
	Online *bool // nil = any; needs a running server
	Prefix string
	After  identity.ID
	Limit  int // 0 = 1000

	Station      string // that has flashed it
	FlashedSince time.Time
	FlashedUntil time.Time // not at or after it; zero = no end
}

// DevicePage is one page of devices. More is the id after which to go on, 0 at
// the end.
type DevicePage struct {
	Devices []Device    `json:"devices"`
	More    identity.ID `json:"more,omitempty"`
}

// Enrolment is a device's key, proved by its CSR, with the certificate for it.
type Enrolment struct {
	CSR         Hex      `json:"csr"` // DER
	Certificate Hex      `json:"certificate"`
	Class       string   `json:"class,omitempty"`
	Tags        []string `json:"tags,omitempty"`
}

// NamedEnrolment is one of many; the id is the certificate's.
type NamedEnrolment struct {
	ID identity.ID `json:"id"`
	Enrolment
}

// Grant lets a service read or write under a filter.
type Grant struct {
	Mode   string `json:"mode"` // read or write
	Filter string `json:"filter"`
}

func (g Grant) String() string { return g.Mode + " " + g.Filter }

// Service is one backend principal. Online is nil when no server runs.
type Service struct {
	Name         string        `json:"name"`
	State        string        `json:"state"` // active, revoked
	Reason       string        `json:"reason,omitempty"`
	Online       *bool         `json:"online,omitempty"`
	Created      time.Time     `json:"created"`
	Grants       []Grant       `json:"grants"`
	Certificates []Certificate `json:"certificates,omitempty"`
}

// NewService is a service to add. Certificate may be empty: it is imported later.
type NewService struct {
	Name        string  `json:"name"`
	Grants      []Grant `json:"grants"`
	Certificate Hex     `json:"certificate,omitempty"`
}

// Request is a request for a signature that waits for the safe's answer.
type Request struct {
	ID      string    `json:"id"` // SHA-256 of its file
	Kind    string    `json:"kind"`
	Subject string    `json:"subject"`
	State   string    `json:"state"`
	At      time.Time `json:"at"`
	File    string    `json:"file,omitempty"` // path on the server
}

// File is a request or a result file: every byte of it counts.
type File struct {
	Text string `json:"text"`
}

// Imported tells what a result file has brought.
type Imported struct {
	Kind    string `json:"kind"`
	Subject string `json:"subject"`
}

// NewCommand is a command to queue. Args is JSON or nil. Expires is zero for never.
type NewCommand struct {
	Name    string          `json:"name"`
	Args    json.RawMessage `json:"args,omitempty"`
	Expires time.Time       `json:"expires,omitzero"`
}

// Command is one command and how far it has come.
type Command struct {
	Device    identity.ID     `json:"device"`
	CID       uint64          `json:"cid,string"`
	Name      string          `json:"name"`
	Args      json.RawMessage `json:"args,omitempty"`
	State     string          `json:"state"` // queued, delivered, answered, failed, expired, cancelled, unknown
	By        string          `json:"by,omitempty"`
	Created   time.Time       `json:"created"`
	Expires   time.Time       `json:"expires,omitzero"`
	Delivered time.Time       `json:"delivered,omitzero"`
	Finished  time.Time       `json:"finished,omitzero"`
	Status    string          `json:"status,omitempty"` // of the device's answer
	Result    json.RawMessage `json:"result,omitempty"`
}

// Pending reports whether the outcome is still open.
func (c *Command) Pending() bool { return c.State == "queued" || c.State == "delivered" }

// CommandFilter selects commands, ordered by device and cid.
type CommandFilter struct {
	Device      identity.ID // 0 = all
	State       string
	AfterDevice identity.ID // go on after this command
	AfterCID    uint64
	Limit       int // 0 = 100
}

// Config is the desired configuration of a device and what it says it applied.
// Version 0: nothing is desired yet.
type Config struct {
	Device         identity.ID     `json:"device"`
	Version        uint64          `json:"version,string"`
	Document       json.RawMessage `json:"document,omitempty"`
	At             time.Time       `json:"at,omitzero"`
	AppliedVersion uint64          `json:"applied_version,string"`
	AppliedStatus  string          `json:"applied_status,omitempty"` // applied, refused
	AppliedText    string          `json:"applied_text,omitempty"`
	AppliedAt      time.Time       `json:"applied_at,omitzero"`
}

// Tail selects messages of the log. Limit picks the newest ones; they come
// oldest first unless Reverse is set. Follow goes on with what comes.
type Tail struct {
	Name    string // device id or service name, empty = all
	Topic   string // filter, empty = all
	Since   time.Time
	Limit   int // 0 = all
	Reverse bool
	Follow  bool
}

// Message is one message of the log. Payload is the decoded value when Encoding
// is json or cbor, else the bytes as a hex string.
type Message struct {
	Pos      uint64          `json:"pos,string"`
	Time     time.Time       `json:"time"`
	From     string          `json:"from"` // id, service name, or hawser
	Client   string          `json:"client,omitempty"`
	Topic    string          `json:"topic"`
	QoS      byte            `json:"qos"`
	Retain   bool            `json:"retain,omitempty"`
	Encoding string          `json:"encoding"` // json, cbor, hex
	Payload  json.RawMessage `json:"payload"`
}

// AuditFilter selects audit rows, the newest first.
type AuditFilter struct {
	Actor, Action, Subject string
	Since                  time.Time
	Before                 int64 // rows with a lower number
	Limit                  int   // 0 = 100
}

// AuditEntry is one change of state.
type AuditEntry struct {
	No      int64           `json:"no,string"`
	At      time.Time       `json:"at"`
	Actor   string          `json:"actor"`
	Action  string          `json:"action"`
	Subject string          `json:"subject"`
	Detail  json.RawMessage `json:"detail,omitempty"`
}

// Status is the fleet at a glance. What only a running server knows is in Server.
type Status struct {
	Fleet        string         `json:"fleet"`
	Trial        bool           `json:"trial"`
	Domains      []string       `json:"domains"`
	Devices      map[string]int `json:"devices"` // by state
	Services     int            `json:"services"`
	Clones       int            `json:"clones,omitempty"` // devices of which two were seen
	Pending      int            `json:"pending_requests"`
	Epoch        uint32         `json:"epoch"`
	Starts       uint64         `json:"starts,string"`
	Certificates []Expiry       `json:"certificates"` // the broker's, and others that end within 30 days
	Server       *ServerStatus  `json:"server,omitempty"`
}

// Expiry tells when a certificate ends.
type Expiry struct {
	Owner    string    `json:"owner"`
	Kind     string    `json:"kind"` // broker, device, service
	NotAfter time.Time `json:"not_after"`
}

// ServerStatus is what a running server says of itself.
type ServerStatus struct {
	Version     string    `json:"version"`
	PID         int       `json:"pid"`
	Started     time.Time `json:"started"`
	Listen      string    `json:"listen"`            // address of the broker
	Metrics     string    `json:"metrics,omitempty"` // address of the metrics
	Online      int       `json:"online"`            // devices
	Connections int64     `json:"connections"`
	Received    uint64    `json:"received,string"` // messages since the start
	PerSecond   float64   `json:"per_second"`      // messages in the last ten seconds
	LogBytes    uint64    `json:"log_bytes,string"`
	LogRecords  uint64    `json:"log_records,string"` // written since the start
	LogOldest   time.Time `json:"log_oldest,omitzero"`
	NotReady    []string  `json:"not_ready,omitempty"` // reasons; empty: ready
}

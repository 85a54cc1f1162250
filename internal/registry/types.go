package registry

import (
	"time"

	"hawser/internal/identity"
)

// Meta is what the registry knows about the fleet and the server.
type Meta struct {
	FleetID    [16]byte
	Created    time.Time
	Epoch      uint32    // high half of command ids and configuration versions; below 1<<31
	Start      uint64    // number of the last start of the server; 0 = never
	Started    time.Time // when that was
	Checkpoint uint64    // log position up to which everything derived from the log is persisted
}

// DeviceState says whether a device may connect.
type DeviceState string

// The states of a device. Only an active one may connect.
const (
	DeviceActive      DeviceState = "active"
	DeviceRevoked     DeviceState = "revoked"
	DeviceQuarantined DeviceState = "quarantined"
	DeviceRetired     DeviceState = "retired"
)

// Device is one device with what it last said about itself.
type Device struct {
	ID       identity.ID
	Class    string
	State    DeviceState
	KeyHash  [32]byte // SHA-256 of the SubjectPublicKeyInfo; zero = no key known yet
	Created  time.Time
	Enrolled time.Time // first certificate; zero = none yet
	LastSeen time.Time
	Reason   string // why it is revoked, quarantined or retired
	Note     string
	Tags     []string // sorted
	LastCID  uint64   // highest command id ever given out
	Station  string   // where it was made; "" = not at a bench
	Hardware uint32   // revision, 0 = not told
	Flashed  time.Time
	Block    [16]byte // the block that its id came from
	Hello    *Hello   // nil = never said hello
}

// Hello is the last u/hello of a device.
type Hello struct {
	Class    string
	Firmware string
	Image    []byte // hash of the running image
	TLS      string
	Boot     string
	Nonce    uint64
	Features []string
	Encoding string // "cbor" or "json": how it wants to be spoken to
	At       time.Time

	Remote string // of the connection, address and port; empty = not known; kept with the boot
	Pos    uint64 // where it stands in the log; the same
}

// CertificateState says whether a certificate opens the door.
type CertificateState string

// The states of a certificate.
const (
	CertificateActive     CertificateState = "active"
	CertificateSuperseded CertificateState = "superseded"
	CertificateRevoked    CertificateState = "revoked"
)

// Certificate is one issued certificate. The caller has verified it: the
// registry stores what it is told.
type Certificate struct {
	Fingerprint [32]byte // SHA-256 of DER
	Principal   identity.Principal
	Generation  uint32
	DER         []byte
	NotBefore   time.Time
	NotAfter    time.Time
	State       CertificateState
	At          time.Time // when it was imported
}

// ActiveCertificate is what admission needs of a certificate.
type ActiveCertificate struct {
	Fingerprint [32]byte
	Principal   identity.Principal
	Generation  uint32
	NotBefore   time.Time
	NotAfter    time.Time
}

// Enrolment is a device with its key and, where it is already signed, its
// certificate.
type Enrolment struct {
	ID          identity.ID
	Class       string
	KeyHash     [32]byte
	CSR         []byte // DER; kept for life
	Certificate *Certificate
	Tags        []string
	At          time.Time
}

// ServiceState says whether a service may connect.
type ServiceState string

// The states of a service.
const (
	ServiceActive  ServiceState = "active"
	ServiceRevoked ServiceState = "revoked"
)

// Service is a backend principal with its grants.
type Service struct {
	Name    string
	State   ServiceState
	Reason  string
	Created time.Time
	Grants  []Grant // ordered by mode, filter
}

// GrantMode is read or write.
type GrantMode string

// The modes of a grant.
const (
	GrantRead  GrantMode = "read"
	GrantWrite GrantMode = "write"
)

// Grant lets a service read or write what Filter matches.
type Grant struct {
	Mode   GrantMode
	Filter string
}

// CommandState is how far a command has come.
type CommandState string

// The states of a command. Queued and delivered ones are pending: they are sent
// again until they are answered or expire.
const (
	CommandQueued    CommandState = "queued"
	CommandDelivered CommandState = "delivered" // the device's PUBACK was seen
	CommandAnswered  CommandState = "answered"
	CommandFailed    CommandState = "failed"
	CommandExpired   CommandState = "expired"
	CommandCancelled CommandState = "cancelled"
	CommandUnknown   CommandState = "unknown" // the device has seen it, its answer was lost
)

// Pending reports whether a command in state s is still to be sent.
func (s CommandState) Pending() bool { return s == CommandQueued || s == CommandDelivered }

// Answered reports whether the device has told the outcome.
func (s CommandState) Answered() bool { return s == CommandAnswered || s == CommandFailed }

// Command is one command for one device.
type Command struct {
	Device    identity.ID
	CID       uint64 // epoch<<32 | counter, growing per device
	Name      string
	Args      []byte // CBOR, nil = none
	CreatedBy string
	Created   time.Time
	Expires   time.Time // zero = never
	State     CommandState
	Delivered time.Time
	Finished  time.Time
	Status    uint8  // of the answer, where there is one
	Result    []byte // CBOR, nil = none
}

// CommandRef names one command.
type CommandRef struct {
	Device identity.ID
	CID    uint64
}

// Outcome ends a command.
type Outcome struct {
	State  CommandState
	Status uint8
	Result []byte
	At     time.Time
}

// DeviceConfig is the desired configuration of a device and what it applied.
type DeviceConfig struct {
	Device         identity.ID
	Version        uint64 // epoch<<32 | counter; 0 = nothing desired yet
	Document       []byte // CBOR
	At             time.Time
	AppliedVersion uint64 // 0 = no report yet
	AppliedStatus  uint8
	AppliedText    string
	AppliedAt      time.Time
}

// SessionKey is what an MQTT session belongs to. A device's client id is its name.
type SessionKey struct {
	Principal identity.Principal
	ClientID  string
}

// NeverExpires is the session expiry of a session that stays.
const NeverExpires = 0xFFFFFFFF

// Session is one persistent MQTT session.
type Session struct {
	No           int64 // from NextSession
	Key          SessionKey
	Generation   uint64 // raised at takeover; a save with a lower one is ErrFenced
	Version      uint8  // MQTT protocol level
	Expiry       uint32 // seconds after the disconnection; NeverExpires
	Created      time.Time
	Disconnected time.Time // zero = connected
	Cursor       uint64    // log position up to which all is acknowledged (services)
	QueueAcked   uint64    // queue sequence up to which all is acknowledged (devices)
	Dropped      uint64    // messages logged but not queued at the limit
	Will         *Will
}

// Will is a last will as it is kept.
type Will struct {
	Topic     string
	Payload   []byte
	QoS       uint8
	Retain    bool
	Delay     uint32 // seconds
	HasExpiry bool
	Expiry    uint32    // seconds, counted from when it fires
	Props     []byte    // MQTT 5.0 wire form of what is forwarded
	Due       time.Time // when it fires; zero = the connection still stands
}

// Subscription is one subscription of a session.
type Subscription struct {
	Filter  string // $share prefix included
	Options uint8  // the byte on the wire, MQTT 5.0 3.8.3.1 (QoS in bits 0 and 1)
	SubID   uint32 // 0 = none
	Start   uint64 // log position from which it holds
}

// Inflight is one unacknowledged message on its way to a client.
type Inflight struct {
	PacketID uint16
	Ref      uint64 // log position (services) or queue sequence (devices)
	State    uint8  // the broker's
}

// Cursor moves a session forward.
type Cursor struct {
	Session    int64
	Cursor     uint64
	QueueAcked uint64
	Dropped    uint64
}

// StoredSession is a session with all that hangs on it, as LoadSessions gives it.
type StoredSession struct {
	Session
	Subscriptions []Subscription
	Inflight      []Inflight
	InboundQoS2   []uint16 // packet ids received and not yet released
}

// StreamState is what the registry remembers of one stream of the log.
type StreamState struct {
	Name     string
	First    uint64 // sequence
	Last     uint64 // sequence last acknowledged
	Frame    uint64 // number of the last frame
	Checksum uint32 // of the last frame
}

// LogState is what the registry remembers of the whole log.
type LogState struct {
	Checkpoint uint64
	Streams    []StreamState // ordered by name
}

// RequestState says whether a request for a signature has been answered.
type RequestState string

// The states of a request.
const (
	RequestPending RequestState = "pending"
	RequestDone    RequestState = "done"
	RequestRefused RequestState = "refused"
)

// Request is a request for a signature by a key that is not here.
type Request struct {
	ID      string
	Kind    string // device, service, broker
	Subject string
	Body    []byte
	At      time.Time
	State   RequestState
}

// AuditEntry is one row of the audit trail.
type AuditEntry struct {
	No      int64
	At      time.Time
	Actor   string
	Action  string
	Subject string
	Detail  string // JSON object
}

// ChangeKind names what a Change tells.
type ChangeKind uint8

// What Options.Changed is told.
const (
	CertificateAdded   ChangeKind = iota + 1 // Change.Active is the new one
	CertificateRemoved                       // Change.Active.Fingerprint no longer opens the door
	DeviceAdded
	DeviceChanged // state back to active, class, note, tags
	DeviceBarred  // revoked, quarantined or retired: close its session
	ServiceAdded
	ServiceBarred
	GrantsChanged
	ConfigChanged   // a new desired configuration
	RolloverChanged // another state of the rollover, no Principal
)

// Change tells, after the commit, what has changed.
type Change struct {
	Kind      ChangeKind
	Principal identity.Principal
	Active    ActiveCertificate
	Final     bool // DeviceBarred: revoked or retired, not quarantined
}

// Generation is one device CA of the fleet.
type Generation struct {
	Number uint32
	CA     []byte // DER
	Active bool   // false: retired, nobody gets in with a certificate of it
	At     time.Time
}

// AnchorSet is one signed set of broker roots.
type AnchorSet struct {
	Sequence uint64
	COSE     []byte
	Offered  bool // false: kept back by an abort
	At       time.Time
}

// RolloverState is how far a rollover has come.
type RolloverState string

// The states of a rollover. Retired and aborted are its ends.
const (
	RolloverPlanned RolloverState = "planned" // the new CA is not there yet
	RolloverSigning RolloverState = "signing" // certificates are being signed and imported
	RolloverSigned  RolloverState = "signed"  // all that the safe signs is here
	RolloverMoving  RolloverState = "moving"  // devices get their offers
	RolloverRetired RolloverState = "retired"
	RolloverAborted RolloverState = "aborted"
)

// Rollover is one move of the fleet. What stays has the number 0 on both sides.
type Rollover struct {
	No                           int64
	FromGeneration, ToGeneration uint32
	FromAnchors, ToAnchors       uint64
	State                        RolloverState
	Started, MovingSince, Ended  time.Time
	Actor                        string
}

// Open reports whether the rollover has not ended.
func (r *Rollover) Open() bool {
	return r.No != 0 && r.State != RolloverRetired && r.State != RolloverAborted
}

// Progress is how far a device has come in a rollover.
type Progress string

// The steps of a device. A rollover's row holds offered, installed and failed; old,
// absent and proven follow from what the device uses.
const (
	ProgressOld       Progress = "old"
	ProgressOffered   Progress = "offered"
	ProgressInstalled Progress = "installed"
	ProgressProven    Progress = "proven"
	ProgressFailed    Progress = "failed"
	ProgressAbsent    Progress = "absent" // not seen since the devices began to move
)

// Member is one device in a rollover.
type Member struct {
	ID       identity.ID
	Progress Progress
	Reason   string // why it failed
	At       time.Time
	LastSeen time.Time
	Anchors  uint64 // the set it uses, as far as is known
	Pending  uint64
}

// Unsigned is a device that has no certificate of a generation yet.
type Unsigned struct {
	ID          identity.ID
	CSR         []byte // DER
	Certificate []byte // of the newest older generation, DER; nil = none
}

// Due is what a device is to be offered now. Certificate and Anchors are nil when it
// has what it should have.
type Due struct {
	Certificate []byte // DER
	Generation  uint32
	Anchors     []byte // COSE_Sign1
	Sequence    uint64
}

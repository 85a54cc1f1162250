// Package msglog is the durable log of a fleet: what happened, in one order.
//
// It promises: a record whose Owner heard Stored without an error is on disk
// (fsynced) and will be read back, at its position, until retention removes it;
// records are committed in the order in which Append returned to one caller;
// whatever is missing, damaged or out of order in what was stored is an error
// that names the stream, the frame and the directory, and is never passed over.
//
// Records are packed into frames. A frame is one message of the JetStream
// stream HW_<fleet>_LOG, its number is its sequence there. Three more streams
// are derived from the frames: the queues of devices with a persistent session
// (Q), the retained messages (R) and the history by principal (H). NATS runs in
// this process without a listening port, or is an outside cluster.
//
// History: a record belongs to the history of the device or the service that
// published it. What the server or a service publishes under private/<id>/
// belongs to the history of device <id> as well, so that reading one device
// shows the commands it was sent. The server itself has no history.
package msglog

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"hawser/internal/identity"
)

// Limits of the format.
const (
	MaxFrame        = 512 << 10 // bytes of a whole frame
	MaxFrameRecords = 1<<16 - 1 // records of one frame
)

// Pos is the place of a record: frame number << 16 | index in the frame. The
// first frame has number 1, so 0 is before everything.
type Pos uint64

// MakePos puts a position together. index is below MaxFrameRecords.
func MakePos(frame uint64, index int) Pos { return Pos(frame<<16 | uint64(index)&0xFFFF) }

// Frame is the number of the frame, which is its sequence in the stream.
func (p Pos) Frame() uint64 { return uint64(p) >> 16 }

// Index is the place in the frame, from 0.
func (p Pos) Index() int { return int(p & 0xFFFF) }

// Next is the lowest position after p. It need not hold a record: reading from
// it goes on with the next frame where p was the last of its own.
func (p Pos) Next() Pos { return p + 1 }

// Kind says what a record is.
type Kind uint8

// The kinds of record. Values are part of the stored format.
const (
	KindPublish Kind = 1 // an application message
	KindRelease Kind = 2 // a PUBREL: From, ClientID and PacketID name what is released
	KindStart   Kind = 3 // a start of the server, appended by it after every Open
)

// Record is one thing that happened. In a record handed out by this package
// strings and slices are views of an immutable buffer: keep them as long as you
// like, and never write to them.
type Record struct {
	Pos       Pos
	Kind      Kind
	Time      int64 // unix milliseconds; set by Append
	From      identity.Principal
	ClientID  string // services only: for a device it is From.Name
	Topic     string
	Payload   []byte
	QoS       byte
	Retain    bool
	Direct    bool   // from the server to one device, never queued
	PacketID  uint16 // QoS 2 publishes and releases, else 0
	HasExpiry bool
	Expiry    uint32 // seconds from Time
	Props     []byte // MQTT 5.0 properties to forward, as on the wire

	Owner     Owner // not stored; nil: nobody waits for it
	QueueFull bool  // not stored; set by Hooks.Plan for the Owner to read
}

// Owner is told the fate of the records it appended.
type Owner interface {
	// Stored is called on the committer's goroutine in log order and must not
	// block. r is valid during the call. err is nil when r is on disk;
	// otherwise r was not committed as far as the log could find out, and r.Pos
	// is 0: the publisher must be left to send it again.
	Stored(r *Record, err error)
}

// QueuedAt tells that a frame put one message into the queue of a device.
type QueuedAt struct {
	Name    string // the device
	Seq     uint64 // of the queue message
	Records int    // how many records it holds
}

// Hooks are called on the committer's goroutine, one frame at a time. The
// slices they get are reused: copy what is kept (records may be copied by value).
type Hooks struct {
	// Plan is called before a frame is written. It adds to q which device
	// queues its records belong to and may set QueueFull of a record.
	Plan func(recs []Record, q *QueuePlan)
	// Committed is called after the frame and its queue messages are on disk
	// and before the Stored calls.
	Committed func(recs []Record, queued []QueuedAt)
}

// Errors of the log, to be tested with errors.Is.
var (
	// ErrClosed: the log was closed.
	ErrClosed = errors.New("the log is closed")
	// ErrTooLarge: the record fits in no frame, or one of its fields in no record.
	ErrTooLarge = errors.New("the record is too large for the log")
	// ErrUnavailable: the log cannot write at present; nothing was taken.
	ErrUnavailable = errors.New("the log cannot write at present")
	// ErrDamaged: stored data is missing, changed or out of order.
	ErrDamaged = errors.New("the log is damaged")
	// ErrLeased: another server holds the lease of this fleet's log.
	ErrLeased = errors.New("another server uses this fleet's log")
	// ErrExists: Create found streams of this fleet.
	ErrExists = errors.New("the log exists already")
)

// Config says where the log is and what it may use. Zero values of everything
// but Fleet and Dir or NATSURL mean the default that the comment gives.
type Config struct {
	Fleet  string       // fleet id, 32 lower-case hex digits
	Dir    string       // directory of the embedded store
	Logger *slog.Logger // default: discards

	NATSURL       string // an outside cluster instead of Dir
	NATSCreds     string // credentials file for NATSURL
	NATSSystemURL string // the cluster with a user of its system account, to check sync_interval
	Holder        string // who holds the lease, for the message another server gets; default: host name and pid
	LeaseFor      time.Duration

	Requeue uint64 // first start after a restore: the first frame of which Q may lack something; see Backup

	RetryFor     time.Duration // how long a failing frame is tried again: 10 s
	MinFree      int64         // free bytes in Dir before a failed store is restarted: 16 MiB
	IntakeBytes  int           // waiting for a frame before Append blocks: 2 MiB
	RingBytes    int           // newest frames kept in memory: 4 MiB
	ChunkBytes   int           // size at which a principal's chunk is written: 16 KiB
	ChunkAge     time.Duration // age at which it is written: 15 min
	ChunkMemory  int           // bytes of all open chunks together: 32 MiB
	RetainEvery  time.Duration // how often retention looks: 1 min
	PurgesPerSec float64       // queue messages purged in the background: 500 requests a second

	MaxAge          time.Duration // of frames; 0: no limit
	MaxBytes        int64         // of the frames together; 0: no limit
	HistoryMaxAge   time.Duration // of chunks; 0: no limit
	HistoryMaxBytes int64         // of the chunks together; 0: no limit
}

// StreamState is what the registry remembers about one stream. First is the
// lowest sequence that must still be there (in R, whose sequences have holes: the
// lowest number of messages), Last the highest one acknowledged.
type StreamState struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
}

// State is the log as the registry must find it again at the next start. Frame
// is the number of the last frame and Checksum its checksum.
type State struct {
	Log      StreamState `json:"log"`
	Queue    StreamState `json:"queue"`
	Retained StreamState `json:"retained"`
	History  StreamState `json:"history"`
	Frame    uint64      `json:"frame"`
	Checksum uint32      `json:"checksum"`
}

// Queued is one message of a device's queue: the records of one frame that are
// for this device.
type Queued struct {
	Seq  uint64
	Recs []Record // Pos set; Owner nil
}

// QueueState is what a device's queue holds. Count is in queue messages.
type QueueState struct {
	Name        string
	First, Last uint64
	Count       uint64
	LastPos     Pos // of the last record in it
}

// Query selects records of the history. The zero value of a field does not limit.
type Query struct {
	Name         string    // device id or service name; "": all principals, from the frames
	Filter       string    // MQTT topic filter
	Since, Until time.Time // Since <= time < Until
	Limit        int
	Reverse      bool // newest first
}

// Stats is a snapshot of counters since Open and of present amounts.
type Stats struct {
	Frames, Records, Bytes uint64        // committed
	Failures               uint64        // attempts to write that failed
	Refused                uint64        // Appends refused with ErrUnavailable
	Restarts               uint64        // of the embedded server
	Overtaken              uint64        // times that retention passed a cursor
	StoreWarnings          uint64        // that NATS gave about its storage
	CommitTime             time.Duration // sum over frames, from the first send to the last acknowledgement
	CommitMax              time.Duration // the longest
	Retained               uint64        // messages in R
	Queued                 uint64        // messages in Q
	LogBytes, HistoryBytes uint64        // stored
	Oldest                 time.Time     // of the first frame; zero when there is none
}

// Read calls fn for every committed record from position from to the present
// end, in order; it stops at the first error, its own or fn's. What it reads is
// verified: the checksum of each frame and the chain of numbers and checksums.
// from below First begins at First.
func (l *Log) Read(ctx context.Context, from Pos, fn func(*Record) error) error {
	return l.read(ctx, from, fn)
}

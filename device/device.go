// Package device connects a Linux-class device, a gateway or a simulated device to Hawser.
//
// It promises:
//   - It talks to nobody but a server whose leaf is signed directly by one of the pinned
//     roots and carries the server's name: every check is made here, explicitly.
//   - A message that Publish has accepted is sent, in order and again after each
//     reconnect, until the server has acknowledged it as stored; or its error says that
//     it was not. A full queue refuses (ErrQueueFull) and never drops.
//   - A command runs at most once in the life of the device: its number is on disk
//     before the handler starts.
//   - A new certificate or anchor set is stored beside the old, and in use once a server has
//     let the device in with it. The last certificate that worked is never given up.
//   - Run never gives up, and a server that comes back is not stormed.
//
// One device costs one goroutine while it is idle: thousands fit into one process.
package device

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"hawser/internal/durable"
	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/mqtt"
)

// MaxPayload is the longest payload in bytes: with its topic it fits into the 256 KiB
// that a packet may have.
const MaxPayload = 256<<10 - 2<<10

// What Publish and Run can fail with.
var (
	ErrQueueFull = errors.New("the queue of unacknowledged messages is full")
	ErrStopped   = errors.New("the device was stopped before the message was acknowledged")
	ErrNotSent   = errors.New("the connection was lost before the QoS 0 message was written")
	ErrTooLarge  = errors.New("the message is larger than the server takes")
	ErrRefused   = errors.New("the server refused the message")
)

// ErrUnknownCommand is what a command handler returns for a name it does not know.
var ErrUnknownCommand = errors.New("unknown command")

// Command is what the server asks for: CID, Expiry (Unix seconds, 0: never), Name, Args.
type Command = message.Command

// Value is application data: one CBOR item, nil for none. ValueOf makes one, its
// Unmarshal method reads it.
type Value = message.Value

// ValueOf encodes v, which is anything that fxamacker/cbor can marshal.
func ValueOf(v any) (Value, error) { return message.ValueOf(v) }

// Config is what a device is made of. Certificate, Store, and Anchors or both Servers and
// Roots are required; Load fills in all but Servers.
type Config struct {
	// Servers are tried in this order at each attempt: "name" or "name:port", port 8883 by
	// default. The name is looked up and must be a dNSName in the server's certificate.
	// None: the domains of the anchor set in use.
	Servers []string

	// Certificate is the device's own, with its P-256 key. Its CN is the device id.
	Certificate tls.Certificate

	// Anchors is the signed anchor set that the device was provisioned with. Its two roots
	// are pinned, until the server has sent a later set; see Store.
	Anchors []byte

	// Roots are the pinned broker roots, one or two; with Anchors, those of the set, or none.
	// Without Anchors they are pinned for ever.
	Roots []*x509.Certificate

	// Store keeps across restarts the highest command number and the time floor, and what the
	// server has sent: certificates and anchor sets, in use and still to be proven.
	Store Store

	// What u/hello says, each at most 256 bytes: product class, firmware version, hash of
	// the running image (at most 64 bytes), reason of the boot, features.
	Class    string
	Firmware string
	Image    []byte
	Boot     string
	Features []string

	// Command runs on one goroutine, one command after the other, in the order of their
	// numbers. An error answers "failed" with its text, ErrUnknownCommand "unknown-command".
	// ctx ends with Run. nil: every command is unknown.
	Command func(ctx context.Context, cmd Command) (Value, error)

	// Configure applies a configuration; version only grows. An error answers "refused" with
	// its text. It is called once per version and process. nil: every one is refused.
	Configure func(ctx context.Context, version uint64, document Value) error

	// Message gets what arrives under d/ and is none of Hawser's own messages; topic begins
	// with "d/". nil: it is ignored.
	Message func(ctx context.Context, topic string, payload []byte)

	// Connected and Disconnected tell of the connection; err says why it ended. Both are
	// called by Run's goroutine and should return soon.
	Connected    func(server string)
	Disconnected func(err error)

	// Clock is a clock that was set since this boot by something trusted. nil: there is none,
	// and certificates are judged against the time floor only.
	Clock func() time.Time

	// BuildTime is when the firmware was built: the first floor. Zero: none.
	BuildTime time.Time

	KeepAlive   time.Duration // default 60 s
	QueueLimit  int           // messages that Publish may have unacknowledged, default 256
	BackoffMin  time.Duration // shortest wait before a reconnect, default 1 s
	BackoffMax  time.Duration // longest, default 5 min
	MQTT311     bool          // speak 3.1.1 instead of 5.0
	JSON        bool          // send Hawser's own messages as JSON instead of CBOR
	AllowChaCha bool          // accept TLS_CHACHA20_POLY1305_SHA256 too: for CPUs without AES instructions

	// Dial opens the TCP connection; nil: net.Dialer. addr is one of Servers, with its port.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)

	Log *slog.Logger // nil: slog.Default
}

// Load reads device.crt, device.key, ca.crt and, if it is there, anchors.cose from dir, and
// opens the store dir/state. The caller sets what else the device needs: Servers, if there
// are no anchors or a server is to be reached under other names. A key file that others may
// read is refused.
func Load(dir string) (Config, error) {
	keyFile := filepath.Join(dir, "device.key")
	if err := durable.CheckPrivate(keyFile); err != nil {
		return Config{}, err
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "device.crt"), keyFile)
	if err != nil {
		return Config{}, fmt.Errorf("credentials in %s: %w", dir, err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		return Config{}, err
	}
	roots, err := ParseRoots(data)
	if err != nil {
		return Config{}, fmt.Errorf("%s: %w", filepath.Join(dir, "ca.crt"), err)
	}
	anchors, err := os.ReadFile(filepath.Join(dir, "anchors.cose"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Config{}, err
	}
	store, err := OpenFileStore(filepath.Join(dir, "state"))
	if err != nil {
		return Config{}, err
	}
	return Config{Certificate: cert, Roots: roots, Anchors: anchors, Store: store}, nil
}

// ParseRoots reads one or two PEM certificates, and nothing else.
func ParseRoots(data []byte) (roots []*x509.Certificate, err error) {
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a %s, not only certificates", block.Type)
		}
		root, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		roots = append(roots, root)
	}
	return roots, checkRoots(roots)
}

func checkRoots(roots []*x509.Certificate) error {
	if len(roots) == 0 || len(roots) > 2 {
		return fmt.Errorf("%d pinned roots, want one or two", len(roots))
	}
	for _, r := range roots {
		if !r.IsCA || !r.BasicConstraintsValid || !isP256(r.PublicKey) {
			return fmt.Errorf("%q is not a P-256 CA certificate", r.Subject)
		}
	}
	return nil
}

func isP256(key any) bool {
	k, ok := key.(*ecdsa.PublicKey)
	return ok && k.Curve == elliptic.P256()
}

// Device is one device. Its methods may be called from any goroutine.
type Device struct {
	cfg     Config
	id      identity.ID
	log     *slog.Logger
	nonce   uint64
	version mqtt.Version
	workers sync.WaitGroup

	born    birth
	refused int // attempts in a row that were turned away with the certificate in use; the connecting goroutine's

	stateMu sync.Mutex // held while the store writes; taken before mu
	state   state      // guarded by stateMu, as in cfg.Store
	pki     *pkiState  // guarded by stateMu, as in cfg.Store

	mu       sync.Mutex
	conn     *session    // guarded by mu; nil while offline
	queue    []*outgoing // guarded by mu: not sent in this connection
	inflight []*outgoing // guarded by mu: sent, in this order, and not acknowledged
	held     int         // guarded by mu: messages of Publish in queue and inflight
	lastID   uint16      // guarded by mu: packet identifier
	jobs     []job       // guarded by mu: what the worker has to do
	working  bool        // guarded by mu: the worker runs
	clock    serverTime  // guarded by mu
	applied  report      // guarded by mu
	trial    trial       // guarded by mu
	known    standing    // guarded by mu: what the server knows
	moving   bool        // guarded by mu: the connection is left for another one
	started  bool        // guarded by mu
	stopped  bool        // guarded by mu
}

// New checks cfg and loads the stored state. It does not connect: that is Run.
func New(cfg Config) (*Device, error) {
	if len(cfg.Servers) == 0 && cfg.Anchors == nil {
		return nil, errors.New("no server to connect to")
	}
	d := &Device{log: cfg.Log, version: mqtt.V5}
	if d.log == nil {
		d.log = slog.Default()
	}
	if err := d.takeAnchors(&cfg); err != nil {
		return nil, err
	}
	if err := d.identify(&cfg); err != nil {
		return nil, err
	}
	d.cfg = withDefaults(cfg)
	var err error
	if d.state, err = loadState(cfg.Store); err != nil {
		return nil, err
	}
	if err := d.loadPKI(); err != nil {
		return nil, err
	}
	var nonce [8]byte
	rand.Read(nonce[:])
	d.nonce = binary.BigEndian.Uint64(nonce[:])
	if cfg.MQTT311 {
		d.version = mqtt.V311
	}
	return d, nil
}

func (d *Device) identify(cfg *Config) error {
	if len(cfg.Certificate.Certificate) == 0 || cfg.Store == nil {
		return errors.New("no certificate or no store for the device")
	}
	leaf, err := x509.ParseCertificate(cfg.Certificate.Certificate[0])
	if err != nil {
		return fmt.Errorf("the device's certificate: %w", err)
	}
	if len(leaf.Raw) > message.MaxCertificate {
		return fmt.Errorf("the device's certificate of %d bytes is larger than %d", len(leaf.Raw), message.MaxCertificate)
	}
	if !isP256(leaf.PublicKey) {
		return errors.New("the device's certificate has no P-256 key")
	}
	if d.id, err = identity.ParseID(leaf.Subject.CommonName); err != nil {
		return fmt.Errorf("the device's certificate: %w", err)
	}
	cfg.Certificate.Leaf = leaf
	return nil
}

func withDefaults(cfg Config) Config {
	if cfg.KeepAlive <= 0 {
		cfg.KeepAlive = time.Minute
	}
	cfg.KeepAlive = min(max(cfg.KeepAlive.Round(time.Second), time.Second), 65535*time.Second)
	if cfg.QueueLimit <= 0 {
		cfg.QueueLimit = 256
	}
	if cfg.BackoffMin <= 0 {
		cfg.BackoffMin = time.Second
	}
	if cfg.BackoffMax < cfg.BackoffMin {
		cfg.BackoffMax = max(5*time.Minute, cfg.BackoffMin)
	}
	if cfg.Dial == nil {
		cfg.Dial = new(net.Dialer).DialContext
	}
	return cfg
}

// ID is the device's id in its only spelling.
func (d *Device) ID() string { return d.id.String() }

// Time is the best clock there is: Config.Clock, else the server's word of this
// connection or an earlier one since the start. ok is false if there is none.
func (d *Device) Time() (now time.Time, ok bool) {
	if d.cfg.Clock != nil {
		return d.cfg.Clock(), true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.clock.now()
}

func (d *Device) encoding() message.Encoding {
	if d.cfg.JSON {
		return message.JSON
	}
	return message.CBOR
}

func (d *Device) hello() []byte {
	return message.Hello{Class: d.cfg.Class, Firmware: d.cfg.Firmware, Image: d.cfg.Image,
		TLS: "Go crypto/tls " + runtime.Version(), Boot: d.cfg.Boot, Nonce: d.nonce,
		Features: d.cfg.Features}.Encode(d.encoding())
}

// Package config is hawser.toml: one file, one struct, and the comments on the
// struct are the manual.
//
// It promises that a Config that Load returned is complete and within bounds:
// an unknown key, a value out of range or a missing fleet id is an error that
// names the line or the key, never a silent default. The annotated file that
// Marshal writes carries the comments below word for word (a test compares).
// It imports the standard library and the TOML library only.
package config

// Config is the whole of hawser.toml. Paths in it that are relative are
// relative to the fleet's state directory.
type Config struct {
	// Who this fleet is. Written by `hawser init`; only domains may change later,
	// and then a new anchor set must tell the devices.
	Fleet Fleet `toml:"fleet"`
	// Where `hawser serve` listens.
	Serve Serve `toml:"serve"`
	// TLS 1.3 with a client certificate is not negotiable; this narrows it further.
	TLS TLS `toml:"tls"`
	// What the server does with devices of its own accord.
	Devices Devices `toml:"devices"`
	// What one connection or one principal may cost. Who is over a rate is read from
	// more slowly; nothing that was sent is dropped.
	Limits Limits `toml:"limits"`
	// The log: every message, on disk before it is acknowledged.
	Log Log `toml:"log"`
}

// Fleet says who the fleet is.
type Fleet struct {
	// 128 random bits drawn by init, as 32 lower-case hex digits. The streams of the
	// log, the anchor sets and the CA journals all carry it.
	ID FleetID `toml:"id"`
	// true: the CA keys lie unencrypted beside the server. For trying things out.
	Trial bool `toml:"trial"`
	// The names under which devices reach the broker, in the order in which they try
	// them; the last of several is the rescue domain. One certificate for each.
	Domains []string `toml:"domains"`
	// O and C in the subjects of the CA certificates.
	Organisation string `toml:"organisation"`
	// Two upper-case letters.
	Country string `toml:"country"`
	// The TCP port that devices are told to connect to (in the anchor set).
	Port uint16 `toml:"port"`
}

// Serve says where the server listens.
type Serve struct {
	// MQTT over TLS: "host:port"; an empty host means every address of the machine.
	Listen string `toml:"listen"`
	// Prometheus metrics, /healthz and /readyz, in the clear: keep it on loopback.
	// "" turns it off.
	Metrics string `toml:"metrics"`
	// The socket that the other commands talk to. Who can open it is an administrator.
	AdminSocket string `toml:"admin_socket"`
}

// TLS narrows what a handshake may agree on.
type TLS struct {
	// Cipher suites that are accepted. Leave out the second to force AES; add
	// "TLS_AES_256_GCM_SHA384" only for a client that knows nothing else.
	Suites []string `toml:"suites"`
}

// What the server does when two hold one identity.
const (
	CloneReport     = "report"
	CloneQuarantine = "quarantine"
)

// Devices says what the server does with devices without being asked.
type Devices struct {
	// When the boots of a device prove that two hold its identity. "report": `hawser
	// status` and the audit say so. "quarantine": neither gets in until `hawser device
	// release`, the real one included.
	OnClone string `toml:"on_clone"`
}

// Limits are the costs that are bounded. Sizes are in bytes.
type Limits struct {
	// The largest MQTT packet accepted, header included; 1 KiB to 256 KiB.
	MaxPacket Size `toml:"max_packet"`
	// The largest TLS record sent. A device with a 4 KiB input buffer dies on a larger
	// one; 512 B to 16 KiB.
	MaxWrite Size `toml:"max_write"`
	// QoS 1 and 2 messages that may be on their way to one client, and from it,
	// without an acknowledgement (5.0: Receive Maximum); 1 to 65535.
	Inflight int `toml:"inflight"`
	// How long a persistent session is kept after its client has gone, at most.
	SessionExpiry Duration `toml:"session_expiry"`
	// Messages stored for one device that is away. At the limit the newest is logged but
	// not queued, and counted.
	QueueMessages int `toml:"queue_messages"`
	// The same in bytes.
	QueueBytes Size `toml:"queue_bytes"`
	// TLS handshakes at a time. A connection that has not sent its ClientHello holds no slot.
	HandshakeSlots int `toml:"handshake_slots"`
	// Connections that are not admitted yet, all together; a silent one costs about 6 KiB.
	Unadmitted int `toml:"unadmitted"`
	// How long a connection may take from the first byte to CONNACK.
	PreAdmission Duration `toml:"pre_admission"`
	// How many bytes it may send until then.
	PreAdmissionBytes Size `toml:"pre_admission_bytes"`
	// New connections per second from one address (IPv6: one /64). Loopback is exempt.
	AddressRate float64 `toml:"address_rate"`
	// How many of them at once.
	AddressBurst int `toml:"address_burst"`
	// What one device may do.
	Device Principal `toml:"device"`
	// What one service may do, all its connections together.
	Service Principal `toml:"service"`
}

// Principal bounds what one device or one service may do.
type Principal struct {
	// Messages published per second, on average; a burst of ten seconds' worth is let through.
	MessagesPerSecond float64 `toml:"messages_per_second"`
	// Bytes published per second, topics included; the same burst.
	BytesPerSecond Size `toml:"bytes_per_second"`
	// Topics on which it may have a retained message.
	RetainedTopics int `toml:"retained_topics"`
	// Bytes of all its retained messages.
	RetainedBytes Size `toml:"retained_bytes"`
	// The part of log.max_bytes that it may write in a day, in per cent. Beyond it, it is read
	// from at the pace that keeps to this.
	LogShare float64 `toml:"log_share"`
	// Subscriptions it may hold.
	Subscriptions int `toml:"subscriptions"`
}

// Log bounds the log and says where it is.
type Log struct {
	// Messages older than this go, from the log and from the histories.
	MaxAge Duration `toml:"max_age"`
	// The log's size on disk; the oldest goes first.
	MaxBytes Size `toml:"max_bytes"`
	// The size of the histories by device and by service; the oldest goes first.
	HistoryMaxBytes Size `toml:"history_max_bytes"`
	// "" means the log lies in server/log. "nats://host:4222,nats://host2:4222" means an
	// outside NATS cluster, whose servers must run with sync_interval: always.
	NATSURL string `toml:"nats_url"`
	// The file with the credentials for it, or "".
	NATSCredentials string `toml:"nats_credentials"`
	// The same cluster with a user of its system account, "nats://user:password@host:4222":
	// the start then checks sync_interval. "" means every start says that it is unverified.
	NATSSystemURL string `toml:"nats_system_url"`
}

// Default gives every value that init does not fill in.
func Default() Config {
	return Config{
		Fleet:   Fleet{Domains: []string{}, Organisation: "Hawser", Country: "ZZ", Port: 8883},
		Serve:   Serve{Listen: ":8883", Metrics: "127.0.0.1:9883", AdminSocket: "server/admin.sock"},
		TLS:     TLS{Suites: []string{"TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256"}},
		Devices: Devices{OnClone: CloneReport},
		Limits: Limits{
			MaxPacket: 256 * KiB, MaxWrite: 2 * KiB, Inflight: 32, SessionExpiry: 30 * Day,
			QueueMessages: 1000, QueueBytes: 1 * MiB,
			HandshakeSlots: 256, Unadmitted: 20000, PreAdmission: 10 * Second, PreAdmissionBytes: 16 * KiB,
			AddressRate: 20, AddressBurst: 100,
			Device: Principal{MessagesPerSecond: 50, BytesPerSecond: 64 * KiB, RetainedTopics: 100,
				RetainedBytes: 256 * KiB, LogShare: 5, Subscriptions: 32},
			Service: Principal{MessagesPerSecond: 5000, BytesPerSecond: 16 * MiB, RetainedTopics: 10000,
				RetainedBytes: 64 * MiB, LogShare: 100, Subscriptions: 1000},
		},
		Log: Log{MaxAge: 30 * Day, MaxBytes: 8 * GiB, HistoryMaxBytes: 8 * GiB},
	}
}

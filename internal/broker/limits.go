package broker

import (
	"sync/atomic"
	"time"

	"hawser/internal/identity"
)

// Limits is what one principal and one connection may cost. Every field has a
// default, DefaultLimits; zero means none is set and is refused by New.
type Limits struct {
	Device, Service Quota

	PreAdmission      time.Duration // from accept to CONNECT
	PreAdmissionBytes int           // that an unadmitted client may send
	Unadmitted        int           // connections that are not admitted yet
	Handshakes        int           // TLS handshakes at a time
	AddressRate       float64       // new connections per second and address; loopback is exempt
	AddressBurst      int

	MaxPacket    int           // bytes of one MQTT packet
	MaxExpiry    uint32        // seconds a session is kept without a connection
	WriteTimeout time.Duration // a client that takes nothing for so long, or up to a quarter more, is closed
	ConnIntake   int           // publishes of one connection that wait for the log
	TopicAliases uint16        // a client may set
}

// Quota is the part of the limits that differs between devices and services.
type Quota struct {
	Messages      float64 // published per second
	MessageBurst  float64
	Bytes         float64 // published per second
	ByteBurst     float64
	Queue         int     // QoS 1 and 2 messages waiting for a session
	QueueBytes    int     // their payloads and topics together
	Retained      int     // topics
	RetainedBytes int     // payloads on them
	LogBytes      float64 // of the log it may fill in a day
	Inflight      int     // QoS 1 and 2 messages sent and not acknowledged
	ReceiveMax    uint16  // told to 5.0 clients
	Subscriptions int     // per session
	Sessions      int     // per principal
	Record        int     // bytes of plaintext in one TLS record to the client
	OutBytes      int     // waiting for the socket before QoS 0 is dropped
}

// DefaultLimits are generous for an honest client and tight for a hostile one.
func DefaultLimits() Limits {
	return Limits{
		Device: Quota{
			Messages: 500, MessageBurst: 1000, Bytes: 256 << 10, ByteBurst: 1 << 20,
			Queue: 1000, QueueBytes: 4 << 20, Retained: 64, RetainedBytes: 256 << 10, LogBytes: 2 << 30, Inflight: 16, ReceiveMax: 32,
			Subscriptions: 64, Sessions: 1, Record: 2048, OutBytes: 64 << 10,
		},
		Service: Quota{
			Messages: 10_000, MessageBurst: 20_000, Bytes: 16 << 20, ByteBurst: 32 << 20,
			Queue: 1000, QueueBytes: 4 << 20, Retained: 200_000, RetainedBytes: 256 << 20, LogBytes: 1 << 50, Inflight: 100, ReceiveMax: 100,
			Subscriptions: 10_000, Sessions: 1000, Record: 16 << 10, OutBytes: 4 << 20,
		},
		PreAdmission: 10 * time.Second, PreAdmissionBytes: 16 << 10, Unadmitted: 20_000, Handshakes: 256,
		AddressRate: 50, AddressBurst: 500,
		MaxPacket: 256 << 10, MaxExpiry: 90 * 24 * 3600, WriteTimeout: 20 * time.Second,
		ConnIntake: 256, TopicAliases: 16,
	}
}

func (l *Limits) of(k identity.Kind) *Quota {
	if k == identity.Service {
		return &l.Service
	}
	return &l.Device
}

// limiter is three leaky buckets, shared by the connections of one principal:
// messages and bytes by the second, and bytes of the log by the day. Each holds
// the time at which it will be empty; a caller that finds it further ahead than
// the burst waits, so nothing is ever dropped.
type limiter struct {
	messages, bytes, day leaky
}

// leaky is one bucket. Its unit is nanoseconds.
type leaky struct {
	per   float64 // one unit's worth
	slack int64   // how far level may be ahead of the clock
	level atomic.Int64
}

func (l *leaky) init(rate, burst float64) {
	l.per = 1e9 / rate
	l.slack = int64(burst * l.per)
}

func (l *limiter) init(q *Quota) {
	const daySeconds = 24 * 3600
	l.messages.init(q.Messages, q.MessageBurst)
	l.bytes.init(q.Bytes, q.ByteBurst)
	l.day.init(q.LogBytes/daySeconds, q.LogBytes/4)
}

// take accounts for n messages with size bytes and tells how long their
// publisher is not to be read from.
func (l *limiter) take(n, size int, now time.Time) time.Duration {
	t := now.UnixNano()
	wait := max(l.messages.take(n, t), l.bytes.take(size, t), l.day.take(size, t), 0)
	return time.Duration(wait)
}

// take adds n units and tells by how much the bucket is too full.
func (l *leaky) take(n int, now int64) (over int64) {
	cost := int64(float64(n) * l.per)
	for {
		old := l.level.Load()
		next := max(old, now) + cost
		if l.level.CompareAndSwap(old, next) {
			return next - now - l.slack
		}
	}
}

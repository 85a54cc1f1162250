package server

import (
	"time"

	"hawser/internal/broker"
	"hawser/internal/config"
)

// burst is how much of a rate may come at once: ten seconds' worth (hawser.toml).
const burst = 10

// brokerLimits is hawser.toml in the broker's words. What hawser.toml does not
// name keeps the broker's default.
func brokerLimits(c *config.Config) broker.Limits {
	l := broker.DefaultLimits()
	l.PreAdmission, l.PreAdmissionBytes = c.Limits.PreAdmission.Std(), int(c.Limits.PreAdmissionBytes)
	l.Unadmitted, l.Handshakes = c.Limits.Unadmitted, c.Limits.HandshakeSlots
	l.AddressRate, l.AddressBurst = c.Limits.AddressRate, c.Limits.AddressBurst
	l.MaxPacket = int(c.Limits.MaxPacket)
	l.MaxExpiry = uint32(min(c.Limits.SessionExpiry.Std()/time.Second, 0xFFFFFFFE))
	principalLimits(&l.Device, &c.Limits, &c.Limits.Device, c.Log.MaxBytes)
	principalLimits(&l.Service, &c.Limits, &c.Limits.Service, c.Log.MaxBytes)
	l.Device.Record = int(c.Limits.MaxWrite)
	return l
}

func principalLimits(q *broker.Quota, all *config.Limits, p *config.Principal, logBytes config.Size) {
	q.Messages, q.MessageBurst = p.MessagesPerSecond, p.MessagesPerSecond*burst
	q.Bytes, q.ByteBurst = float64(p.BytesPerSecond), float64(p.BytesPerSecond)*burst
	q.Retained, q.RetainedBytes = p.RetainedTopics, int(p.RetainedBytes)
	q.Subscriptions = p.Subscriptions
	q.Queue, q.QueueBytes = all.QueueMessages, int(all.QueueBytes)
	q.Inflight, q.ReceiveMax = all.Inflight, uint16(all.Inflight)
	if logBytes > 0 { // 0: the log has no limit, so a share of it is none either
		q.LogBytes = float64(logBytes) * p.LogShare / 100
	}
}

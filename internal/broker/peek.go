package broker

import "bytes"

// Retained gives a copy of the payload that is retained on a topic.
func (b *Broker) Retained(topic string) (payload []byte, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	m := b.retained.all[topic]
	if m == nil {
		return nil, false
	}
	return bytes.Clone(m.payload), true
}

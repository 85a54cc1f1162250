// Package message is what Hawser and its devices say to each other under
// private/<id>/: hello, time, commands and their answers, configuration and its report,
// offers of certificates and anchor sets and the reports on them.
//
// Each message has two encodings: a CBOR map with small integer keys, and JSON with
// names. A payload that begins with '{' is JSON, one that begins with a CBOR map head
// (0xA0 to 0xBF) is CBOR, and nothing else is a message. PROTOCOL.md has the numbers and
// names; testdata/vectors/messages.json has examples of both.
//
// It promises that Decode accepts one well-formed message and nothing after it, within
// the limits below, without duplicate keys and with every required field; unknown keys
// are ignored, so that a later version may add some. 64-bit numbers are strings in JSON
// (a number is understood, too); byte strings are lower-case hex there.
package message

import (
	"errors"
	"fmt"
)

// The limits of a message. Lengths in bytes.
const (
	MaxSize     = 128 << 10 // the whole message
	MaxValue    = 127 << 10 // args, a result or a document, in CBOR
	MaxText     = 256       // each text: class, version, command name, reason...
	MaxImage    = 64        // an image hash
	MaxFeatures = 64        // entries in Hello.Features
	MaxDepth    = 16        // nesting within args, results and documents
)

// ErrMessage is what every error of this package is.
var ErrMessage = errors.New("not a valid message")

func bad(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMessage, fmt.Sprintf(format, args...))
}

// Encoding is how a message is written. The zero value is CBOR.
type Encoding byte

// The encodings.
const (
	CBOR Encoding = iota
	JSON
)

// EncodingOf tells the encoding of a payload by its first byte.
func EncodingOf(payload []byte) (Encoding, error) {
	switch {
	case len(payload) == 0:
		return CBOR, bad("empty")
	case payload[0] == '{':
		return JSON, nil
	case payload[0] >= 0xA0 && payload[0] <= 0xBF:
		return CBOR, nil
	}
	return CBOR, bad("begins with neither { nor a CBOR map")
}

// Hello is what a device says of itself after each connect (u/hello).
type Hello struct {
	Class    string // the product's name for this kind of device
	Firmware string // its version
	Image    []byte // hash of the running image
	TLS      string // library and version
	Boot     string // reason of the last boot
	Nonce    uint64 // drawn once per boot: two holders of one identity show by it
	Features []string
}

// Encode gives the message in enc.
func (m Hello) Encode(enc Encoding) []byte {
	w := newWriter(enc)
	w.text(1, "class", m.Class)
	w.text(2, "firmware", m.Firmware)
	w.bytes(3, "image", m.Image)
	w.text(4, "tls", m.TLS)
	w.text(5, "boot", m.Boot)
	w.number64(6, "nonce", m.Nonce)
	w.texts(7, "features", m.Features)
	return w.end()
}

// DecodeHello reads a Hello in either encoding.
func DecodeHello(payload []byte) (m Hello, err error) {
	r := newReader(payload)
	m.Class = r.text(1, "class")
	m.Firmware = r.text(2, "firmware")
	m.Image = r.bytes(3, "image", MaxImage)
	m.TLS = r.text(4, "tls")
	m.Boot = r.text(5, "boot")
	m.Nonce = r.number(6, "nonce")
	m.Features = r.texts(7, "features")
	if r.err != nil {
		return Hello{}, r.err
	}
	return m, nil
}

// Time is the server's clock (d/time).
type Time struct {
	Seconds uint64 // since 1970-01-01 UTC, without leap seconds
	Millis  uint16 // 0 to 999
}

// Encode gives the message in enc.
func (m Time) Encode(enc Encoding) []byte {
	w := newWriter(enc)
	w.number64(1, "time", m.Seconds)
	w.number(2, "ms", uint64(m.Millis))
	return w.end()
}

// DecodeTime reads a Time in either encoding.
func DecodeTime(payload []byte) (m Time, err error) {
	r := newReader(payload)
	m.Seconds = r.number(1, "time")
	m.Millis = uint16(r.upTo(2, "ms", 999))
	if r.err != nil {
		return Time{}, r.err
	}
	return m, nil
}

// Command is what a device is told to do (d/cmd).
type Command struct {
	CID    uint64 // grows per device, never 0: epoch in the upper 32 bits, counter below
	Expiry uint64 // Unix seconds; 0: never
	Name   string // not empty
	Args   Value  // nil: none
}

// Encode gives the message in enc.
func (m Command) Encode(enc Encoding) []byte {
	w := newWriter(enc)
	w.number64(1, "cid", m.CID)
	w.number64(2, "expiry", m.Expiry)
	w.text(3, "name", m.Name)
	w.value(4, "args", m.Args)
	return w.end()
}

// DecodeCommand reads a Command in either encoding.
func DecodeCommand(payload []byte) (m Command, err error) {
	r := newReader(payload)
	m.CID = r.nonzero(1, "cid")
	m.Expiry = r.number(2, "expiry")
	m.Name = r.text(3, "name")
	m.Args = r.value(4, "args", false)
	if r.err == nil && m.Name == "" {
		r.err = bad("command without a name")
	}
	if r.err != nil {
		return Command{}, r.err
	}
	return m, nil
}

// Status is the outcome of a command.
type Status byte

// The outcomes. Duplicate: the id is not higher than one that was acted on before.
const (
	OK Status = iota
	Failed
	Duplicate
	Expired
	UnknownCommand
)

func statusNames() []string {
	return []string{"ok", "failed", "duplicate", "expired", "unknown-command"}
}

func (s Status) String() string { return nameOf(statusNames(), byte(s)) }

// Answer is a device's word on a command (u/cmd).
type Answer struct {
	CID    uint64
	Status Status
	Result Value // nil: none
}

// Encode gives the message in enc.
func (m Answer) Encode(enc Encoding) []byte {
	w := newWriter(enc)
	w.number64(1, "cid", m.CID)
	w.choice(2, "status", byte(m.Status), statusNames())
	w.value(3, "result", m.Result)
	return w.end()
}

// DecodeAnswer reads an Answer in either encoding.
func DecodeAnswer(payload []byte) (m Answer, err error) {
	r := newReader(payload)
	m.CID = r.nonzero(1, "cid")
	m.Status = Status(r.choice(2, "status", statusNames()))
	m.Result = r.value(3, "result", false)
	if r.err != nil {
		return Answer{}, r.err
	}
	return m, nil
}

// Config is the configuration that a device shall have (d/cfg).
type Config struct {
	Version  uint64 // grows per device, never 0
	Document Value
}

// Encode gives the message in enc.
func (m Config) Encode(enc Encoding) []byte {
	w := newWriter(enc)
	w.number64(1, "version", m.Version)
	w.value(2, "document", m.Document)
	return w.end()
}

// DecodeConfig reads a Config in either encoding.
func DecodeConfig(payload []byte) (m Config, err error) {
	r := newReader(payload)
	m.Version = r.nonzero(1, "version")
	m.Document = r.value(2, "document", true)
	if r.err != nil {
		return Config{}, r.err
	}
	return m, nil
}

// ConfigStatus is what became of a configuration.
type ConfigStatus byte

// The outcomes of a configuration.
const (
	Applied ConfigStatus = iota
	Refused
)

func configStatusNames() []string { return []string{"applied", "refused"} }

func (s ConfigStatus) String() string { return nameOf(configStatusNames(), byte(s)) }

// ConfigReport is what a device says of its configuration (u/cfg).
type ConfigReport struct {
	Version uint64
	Status  ConfigStatus
	Text    string // why it was refused; "": nothing to say
}

// Encode gives the message in enc.
func (m ConfigReport) Encode(enc Encoding) []byte {
	w := newWriter(enc)
	w.number64(1, "version", m.Version)
	w.choice(2, "status", byte(m.Status), configStatusNames())
	if m.Text != "" {
		w.text(3, "text", m.Text)
	}
	return w.end()
}

// DecodeConfigReport reads a ConfigReport in either encoding.
func DecodeConfigReport(payload []byte) (m ConfigReport, err error) {
	r := newReader(payload)
	m.Version = r.nonzero(1, "version")
	m.Status = ConfigStatus(r.choice(2, "status", configStatusNames()))
	if r.has(3, "text") {
		m.Text = r.text(3, "text")
	}
	if r.err != nil {
		return ConfigReport{}, r.err
	}
	return m, nil
}

func nameOf(names []string, i byte) string {
	if int(i) < len(names) {
		return names[i]
	}
	return fmt.Sprintf("status %d", i)
}

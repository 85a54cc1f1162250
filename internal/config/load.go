package config

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

const maxFile = 1 << 20 // bytes; the annotated file has about 8 KiB

// Load reads and validates hawser.toml. Keys that are left out keep their
// defaults, except the fleet's own. Errors name the file and the line or key.
func Load(path string) (*Config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	c, err := Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// Parse is Load for a text in memory.
func Parse(text []byte) (*Config, error) {
	if len(text) > maxFile {
		return nil, fmt.Errorf("%d bytes are more than %d", len(text), maxFile)
	}
	c := Default()
	d := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return nil, explain(err)
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return &c, nil
}

// explain puts the line of a decoding error first.
func explain(err error) error {
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) && len(unknown.Errors) > 0 {
		var msgs []string
		for i := range unknown.Errors {
			line, _ := unknown.Errors[i].Position()
			msgs = append(msgs, fmt.Sprintf("line %d: unknown key %q", line, strings.Join(unknown.Errors[i].Key(), ".")))
		}
		return errors.New(strings.Join(msgs, "; "))
	}
	var de *toml.DecodeError
	if errors.As(err, &de) {
		line, _ := de.Position()
		return fmt.Errorf("line %d: %s", line, strings.TrimPrefix(de.Error(), "toml: "))
	}
	return fmt.Errorf("parse: %w", err)
}

// Validate reports the first value that is missing or out of bounds, by key.
func (c *Config) Validate() error {
	for _, err := range []error{c.Fleet.validate(), c.Serve.validate(), c.TLS.validate(), c.Devices.validate(),
		c.Limits.validate(), c.Log.validate()} {
		if err != nil {
			return err
		}
	}
	return nil
}

func (f *Fleet) validate() error {
	if f.ID == (FleetID{}) {
		return errors.New("fleet.id is missing")
	}
	if len(f.Domains) == 0 {
		return errors.New("fleet.domains is empty")
	}
	seen := map[string]bool{}
	for _, d := range f.Domains {
		if d == "" || d != strings.ToLower(d) || strings.ContainsAny(d, "/\\ *") || seen[d] {
			return fmt.Errorf("fleet.domains: %q is not a lower-case DNS name, or stands there twice", d)
		}
		seen[d] = true
	}
	if f.Port == 0 {
		return errors.New("fleet.port is 0")
	}
	return nil
}

func (s *Serve) validate() error {
	if _, _, err := net.SplitHostPort(s.Listen); err != nil {
		return fmt.Errorf("serve.listen: %q is not host:port", s.Listen)
	}
	if s.Metrics != "" {
		if _, _, err := net.SplitHostPort(s.Metrics); err != nil {
			return fmt.Errorf("serve.metrics: %q is not host:port", s.Metrics)
		}
	}
	if s.AdminSocket == "" {
		return errors.New("serve.admin_socket is empty")
	}
	return nil
}

func (t *TLS) validate() error {
	if len(t.Suites) == 0 {
		return errors.New("tls.suites is empty: no client could connect")
	}
	for _, s := range t.Suites {
		if suiteID(s) == 0 {
			return fmt.Errorf("tls.suites: %q is not a TLS 1.3 suite known here", s)
		}
	}
	return nil
}

func (d *Devices) validate() error {
	if d.OnClone != CloneReport && d.OnClone != CloneQuarantine {
		return fmt.Errorf("devices.on_clone: %q is not %q or %q", d.OnClone, CloneReport, CloneQuarantine)
	}
	return nil
}

// SuiteIDs gives the accepted suites as crypto/tls numbers them.
func (t *TLS) SuiteIDs() []uint16 {
	out := make([]uint16, 0, len(t.Suites))
	for _, s := range t.Suites {
		out = append(out, suiteID(s))
	}
	return out
}

// suiteID is 0 for a suite that TLS 1.3 in Go does not have.
func suiteID(name string) uint16 {
	for _, id := range []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_CHACHA20_POLY1305_SHA256, tls.TLS_AES_256_GCM_SHA384} {
		if tls.CipherSuiteName(id) == name {
			return id
		}
	}
	return 0
}

// bound is a number with the key it stands under and the range it must keep to.
type bound struct {
	key       string
	v, lo, hi float64
}

func checkBounds(prefix string, bs []bound) error {
	for _, b := range bs {
		if !(b.v >= b.lo && b.v <= b.hi) { // written so that NaN fails
			return fmt.Errorf("%s.%s: %v is not within %v and %v", prefix, b.key, b.v, b.lo, b.hi)
		}
	}
	return nil
}

func (l *Limits) validate() error {
	err := checkBounds("limits", []bound{
		{"max_packet", float64(l.MaxPacket), float64(KiB), float64(256 * KiB)},
		{"max_write", float64(l.MaxWrite), 512, float64(16 * KiB)},
		{"inflight", float64(l.Inflight), 1, 65535},
		{"session_expiry (s)", l.SessionExpiry.Std().Seconds(), 0, 1<<32 - 1},
		{"queue_messages", float64(l.QueueMessages), 1, 1e7},
		{"queue_bytes", float64(l.QueueBytes), float64(KiB), float64(TiB)},
		{"handshake_slots", float64(l.HandshakeSlots), 1, 1e6},
		{"unadmitted", float64(l.Unadmitted), 1, 1e6},
		{"pre_admission (s)", l.PreAdmission.Std().Seconds(), 0.1, 600},
		{"pre_admission_bytes", float64(l.PreAdmissionBytes), float64(4 * KiB), float64(MiB)},
		{"address_rate", l.AddressRate, 0.01, 1e6},
		{"address_burst", float64(l.AddressBurst), 1, 1e6},
	})
	if err != nil {
		return err
	}
	if err := l.Device.validate("limits.device"); err != nil {
		return err
	}
	return l.Service.validate("limits.service")
}

func (p *Principal) validate(prefix string) error {
	return checkBounds(prefix, []bound{
		{"messages_per_second", p.MessagesPerSecond, 0.001, 1e9},
		{"bytes_per_second", float64(p.BytesPerSecond), 1, float64(TiB)},
		{"retained_topics", float64(p.RetainedTopics), 0, 1e7},
		{"retained_bytes", float64(p.RetainedBytes), 0, float64(TiB)},
		{"log_share", p.LogShare, 0.0001, 100},
		{"subscriptions", float64(p.Subscriptions), 1, 1e6},
	})
}

func (l *Log) validate() error {
	err := checkBounds("log", []bound{
		{"max_age (s)", l.MaxAge.Std().Seconds(), 60, 100 * 366 * 86400},
		{"max_bytes", float64(l.MaxBytes), float64(16 * MiB), float64(1024 * TiB)},
		{"history_max_bytes", float64(l.HistoryMaxBytes), float64(16 * MiB), float64(1024 * TiB)},
	})
	if err != nil {
		return err
	}
	if l.NATSCredentials != "" && l.NATSURL == "" {
		return errors.New("log.nats_credentials without log.nats_url")
	}
	if l.NATSSystemURL != "" && l.NATSURL == "" {
		return errors.New("log.nats_system_url without log.nats_url")
	}
	return nil
}

// Path resolves a path of the config against the fleet's state directory.
func Path(fleetDir, p string) string {
	if filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(fleetDir, p)
}

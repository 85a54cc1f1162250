package bench

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"hawser/internal/durable"
	"hawser/internal/factory/probe"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// The files of a bench directory.
const (
	fileSettings = "bench.toml"
	fileCSR      = "station.csr"
	fileReserved = "reserved"
	fileLock     = "lock"
	dirBlocks    = "blocks"
	suffixBlock  = ".block"
)

// KeyFile is the key of a station that was given none: a file in the bench directory.
const KeyFile = "file:station.key"

const maxSettings = 64 << 10 // bytes

// Settings is bench.toml.
type Settings struct {
	Station  string `toml:"station" comment:"Name of the station: it is the subject of its certificate."`
	Key      string `toml:"key" comment:"URI of the station's key. A file: path that is not absolute lies in this directory."`
	Trial    bool   `toml:"trial" comment:"The key file has no passphrase: for trying things out."`
	Probe    string `toml:"probe" comment:"How units are reached: gdb:127.0.0.1:PORT,identity=0x...,trust=0x... or exec:identity=0x...,trust=0x...:COMMAND"`
	Class    string `toml:"class" comment:"Class and hardware revision (0 for none) of what is made here; both go into the journal."`
	Hardware uint32 `toml:"hardware"`
	Lock     string `toml:"lock" comment:"Command that locks a unit's debug port, for /bin/sh; HAWSER_UNIT is the id. Afterwards a debug read must fail."`
	Fleet    string `toml:"fleet" comment:"Pinned by the first \"hawser factory load\": fleet id, and SHA-256 of the device CA's certificate."`
	DeviceCA string `toml:"device_ca"`
}

// check reports the first setting that cannot be.
func (s *Settings) check() error {
	if err := identity.CheckName(s.Station); err != nil {
		return fmt.Errorf("station %q: %w", s.Station, err)
	}
	if scheme, rest, _ := strings.Cut(s.Key, ":"); rest == "" || scheme != "file" && scheme != "pkcs11" {
		return fmt.Errorf("key %q is neither a file: nor a pkcs11: URI", s.Key)
	}
	if s.Trial && !strings.HasPrefix(s.Key, "file:") {
		return errors.New("trial is for a key in a file: a token is protected by its PIN")
	}
	if s.Class != "" {
		if err := pki.CheckClass(s.Class); err != nil {
			return fmt.Errorf("class %q: %w", s.Class, err)
		}
	}
	if !hexOrEmpty(s.Fleet, 16) || !hexOrEmpty(s.DeviceCA, 32) || (s.Fleet == "") != (s.DeviceCA == "") {
		return errors.New("fleet and device_ca are not as \"hawser factory load\" wrote them")
	}
	_, err := s.spec()
	return err
}

func hexOrEmpty(s string, n int) bool {
	raw, err := hex.DecodeString(s)
	return s == "" || err == nil && len(raw) == n && s == strings.ToLower(s)
}

// spec is the probe, with both addresses.
func (s *Settings) spec() (probe.Spec, error) {
	p, err := probe.Parse(s.Probe)
	switch {
	case err != nil:
		return p, err
	case !p.HasIdentity || !p.HasTrust:
		return p, fmt.Errorf("probe %q: it does not say where identity block and trust region go\nhint: add identity=ADDRESS,trust=ADDRESS", s.Probe)
	case p.Kind == "exec" && s.Lock != "":
		return p, errors.New("an exec: probe cannot read, so it cannot show that a unit is locked\nhint: use a gdb: probe, or lock in the command itself")
	}
	return p, nil
}

// keyURI is the key with a path that holds wherever the process runs.
func (s *Settings) keyURI(dir string) string {
	path, ok := strings.CutPrefix(s.Key, "file:")
	if !ok || filepath.IsAbs(path) {
		return s.Key
	}
	return "file:" + filepath.Join(dir, path)
}

func readSettings(dir string) (*Settings, error) {
	text, err := os.ReadFile(filepath.Join(dir, fileSettings))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is no bench directory: it has no %s\nhint: hawser factory init --dir %s", dir, fileSettings, dir)
	}
	if err != nil {
		return nil, err
	}
	s, err := parseSettings(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, fileSettings), err)
	}
	return s, nil
}

// parseSettings reads bench.toml; unknown keys are errors.
func parseSettings(text []byte) (*Settings, error) {
	if len(text) > maxSettings {
		return nil, fmt.Errorf("%d bytes are more than %d", len(text), maxSettings)
	}
	var s Settings
	if err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&s); err != nil {
		return nil, errors.New(strings.TrimPrefix(err.Error(), "toml: "))
	}
	return &s, s.check()
}

func (s *Settings) write(dir string) error {
	text, err := toml.Marshal(s)
	if err != nil {
		return fmt.Errorf("encode settings: %w", err)
	}
	return durable.WriteFile(filepath.Join(dir, fileSettings), text, 0o600)
}

package backup

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// ManifestName is the last member: what the others are.
const ManifestName = "manifest.json"

// Names of the members that are not files of the fleet's directory.
const (
	RegistryName = "registry.db"
	LogPrefix    = "log/" // the streams of the log
)

// manifestFormat is the layout of the members that this program writes and reads.
const manifestFormat = 1

// maxManifest is in bytes.
const maxManifest = 64 << 10

// Manifest says what a backup is of. It is what --json prints of one.
type Manifest struct {
	Format   int            `json:"format"`
	Fleet    string         `json:"fleet"`
	Trial    bool           `json:"trial"`
	Version  string         `json:"version"` // of the program that took it
	Taken    time.Time      `json:"taken"`   // all that was acknowledged before is in it
	Epoch    uint32         `json:"epoch"`
	Starts   uint64         `json:"starts,string"`
	Devices  map[string]int `json:"devices"` // by state
	Services int            `json:"services"`
	First    uint64         `json:"first_frame,string"`
	End      uint64         `json:"end_frame,string"` // when it was taken; there may be more
	Outside  bool           `json:"outside_log"`
	Requeue  uint64         `json:"requeue,string"` // see msglog.Config
}

// Encode gives the member's text.
func (m Manifest) Encode() ([]byte, error) {
	m.Format = manifestFormat
	return json.MarshalIndent(m, "", "  ")
}

// ReadManifest reads that member.
func ReadManifest(r io.Reader) (m Manifest, err error) {
	text, err := io.ReadAll(io.LimitReader(r, maxManifest+1))
	if err != nil {
		return m, err
	}
	if len(text) > maxManifest {
		return m, fmt.Errorf("%w: %s is too long", ErrDamaged, ManifestName)
	}
	var format struct{ Format int }
	if err := json.Unmarshal(text, &format); err != nil {
		return m, fmt.Errorf("%w: %s: %w", ErrDamaged, ManifestName, err)
	}
	if format.Format != manifestFormat {
		return m, fmt.Errorf("the backup has format %d, this program knows %d: it was taken by another version", format.Format, manifestFormat)
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&m); err != nil {
		return m, fmt.Errorf("%w: %s: %w", ErrDamaged, ManifestName, err)
	}
	return m, nil
}

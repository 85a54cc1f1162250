package config

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Size is a number of bytes, written with the largest binary unit that divides
// it: "512B", "16KiB", "8GiB".
type Size int64

// Units of Size.
const (
	KiB Size = 1 << (10 * (iota + 1))
	MiB
	GiB
	TiB
)

// Duration is a time.Duration, written as Go writes it without zero parts
// ("15m", "1h30m"), or as whole days ("30d").
type Duration time.Duration

// Units of Duration.
const (
	Second = Duration(time.Second)
	Day    = Duration(24 * time.Hour)
)

// FleetID is the fleet's 128 random bits, written as 32 lower-case hex digits.
type FleetID [16]byte

// Std gives the duration as the standard library has it.
func (d Duration) Std() time.Duration { return time.Duration(d) }

// MarshalText implements encoding.TextMarshaler.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// String gives the size with its largest whole unit.
func (s Size) String() string {
	for _, u := range sizeUnits() {
		if s != 0 && s%u.size == 0 {
			return strconv.FormatInt(int64(s/u.size), 10) + u.name
		}
	}
	return strconv.FormatInt(int64(s), 10) + "B"
}

type sizeUnit struct {
	name string
	size Size
}

// sizeUnits is ordered so that no name is a suffix of an earlier one's match.
func sizeUnits() []sizeUnit {
	return []sizeUnit{{"TiB", TiB}, {"GiB", GiB}, {"MiB", MiB}, {"KiB", KiB}, {"B", 1}}
}

// UnmarshalText implements encoding.TextUnmarshaler: a whole number and a unit.
func (s *Size) UnmarshalText(b []byte) error {
	for _, u := range sizeUnits() {
		digits, ok := strings.CutSuffix(string(b), u.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 63)
		if err != nil || Size(n) > math.MaxInt64/u.size {
			break
		}
		*s = Size(n) * u.size
		return nil
	}
	return fmt.Errorf("size %q is not a whole number with B, KiB, MiB, GiB or TiB", b)
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// String gives whole days as days and leaves zero parts out.
func (d Duration) String() string {
	if d != 0 && d%Day == 0 {
		return strconv.FormatInt(int64(d/Day), 10) + "d"
	}
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// UnmarshalText implements encoding.TextUnmarshaler; negative ones are refused.
func (d *Duration) UnmarshalText(b []byte) error {
	text := string(b)
	if days, ok := strings.CutSuffix(text, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 32)
		if err != nil || n > uint64(math.MaxInt64/Day) {
			return fmt.Errorf("duration %q is not a number of days", text)
		}
		*d = Duration(n) * Day
		return nil
	}
	v, err := time.ParseDuration(text)
	if err != nil || v < 0 {
		return fmt.Errorf("duration %q is not like \"10s\", \"15m\", \"1h30m\" or \"30d\"", text)
	}
	*d = Duration(v)
	return nil
}

// String gives the 32 hex digits.
func (f FleetID) String() string { return hex.EncodeToString(f[:]) }

// MarshalText implements encoding.TextMarshaler.
func (f FleetID) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (f *FleetID) UnmarshalText(b []byte) error {
	v, err := hex.DecodeString(string(b))
	if err != nil || len(v) != len(f) || hex.EncodeToString(v) != string(b) {
		return errors.New("a fleet id is 32 lower-case hex digits")
	}
	copy(f[:], v)
	return nil
}

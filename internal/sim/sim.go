// Package sim runs simulated devices, on the public device kit, against the server of a
// trial fleet.
//
// It promises:
//   - The same seed gives the same devices: id and key of each follow from it, so a
//     second run is the same fleet.
//   - They are devices like any other to the server: enrolled through its API, admitted
//     by their certificates, speaking MQTT over TLS.
//   - Every message is accounted for: acknowledged, failed, or still open.
//   - Thousands fit into one process: one goroutine each, and a few that publish for all.
package sim

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"hawser/internal/durable"
	"hawser/internal/identity"
)

// Tag is on every simulated device.
const Tag = "sim"

const (
	seedSize = 32
	slotBits = 20 // ids of one fleet's simulated devices: 12 bits of the seed, then the number
)

// MaxDevices is how many simulated devices one fleet can have; some of their ids may be
// taken by others.
const MaxDevices = 1<<slotBits - 1<<10

// Seed is what all keys of the simulated devices follow from.
type Seed struct{ secret [seedSize]byte }

// ReadSeed reads the seed that init drew. A missing one is not drawn again: the devices
// in the registry would be lost.
func ReadSeed(path string) (*Seed, error) {
	err := durable.CheckPrivate(path)
	if err == nil {
		var text []byte
		if text, err = os.ReadFile(path); err == nil {
			return parseSeed(path, text)
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is missing: the keys of the simulated devices follow from it\nhint: restore it from a backup; hawser makes no state anew", path)
	}
	return nil, err
}

func parseSeed(path string, text []byte) (*Seed, error) {
	if len(text) != seedSize {
		return nil, fmt.Errorf("%s is damaged: %d bytes, not %d\nhint: restore it from a backup", path, len(text), seedSize)
	}
	s := new(Seed)
	copy(s.secret[:], text)
	return s, nil
}

// expand gives n bytes that follow from the seed and info.
func (s *Seed) expand(info string, n int) ([]byte, error) {
	return hkdf.Key(sha256.New, s.secret[:], nil, "hawser sim "+info, n)
}

// base is the first id of the simulated devices; its low slotBits bits are 0.
func (s *Seed) base() (identity.ID, error) {
	b, err := s.expand("ids", 4)
	if err != nil {
		return 0, err
	}
	return identity.ID(binary.BigEndian.Uint32(b) >> slotBits << slotBits), nil
}

// prefix is what all ids from base on begin with.
func prefix(base identity.ID) string { return base.String()[:8-slotBits/4] }

// key is the P-256 key of id. A candidate that is no scalar (one in 2^32) is passed over.
func (s *Seed) key(id identity.ID) (*ecdsa.PrivateKey, error) {
	for try := range 8 {
		b, err := s.expand(fmt.Sprintf("key %s %d", id, try), 32)
		if err != nil {
			return nil, err
		}
		if key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), b); err == nil {
			return key, nil
		}
	}
	return nil, fmt.Errorf("no key for %s follows from the seed", id)
}

// spareFiles is what a process needs beside its connections.
const spareFiles = 64

// RaiseFiles makes room for n connections, as far as the hard limit goes. It gives the
// limit that holds.
func RaiseFiles(n int) (limit uint64, err error) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 0, fmt.Errorf("limit of open files: %w", err)
	}
	need := uint64(n) + spareFiles
	if l.Cur < need {
		l.Cur = min(need, l.Max)
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
			return 0, fmt.Errorf("limit of open files: %w", err)
		}
	}
	if l.Cur < need {
		return l.Cur, fmt.Errorf("%d open files are allowed, and %d devices need %d\nhint: ulimit -n %d as root, or fewer --devices",
			l.Cur, n, need, need)
	}
	return l.Cur, nil
}

package device

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"hawser/internal/durable"
)

// Store keeps small named blobs across restarts. Save returns after the blob is durable:
// that a command runs at most once rests on it, and that a device is never without a
// certificate that works. Load gives nil and no error for a name that was never saved.
// Names are lower-case letters: "state" (21 bytes), "pki" (a few KiB).
type Store interface {
	Load(name string) ([]byte, error)
	Save(name string, data []byte) error
}

// FileStore is a Store in a directory, which it locks: two processes with one identity
// would run commands twice.
type FileStore struct {
	dir  string
	lock *durable.FileLock
}

// OpenFileStore opens the store in dir. The directory is made if it is missing, as it is
// before the first start; the one above it is not.
func OpenFileStore(dir string) (*FileStore, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("device state: %w", err)
	}
	lock, err := durable.Lock(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("device state: %w", err)
	}
	if err := durable.SyncDir(filepath.Dir(dir)); err != nil {
		lock.Close()
		return nil, err
	}
	return &FileStore{dir, lock}, nil
}

// Close gives the directory up to others.
func (s *FileStore) Close() error { return s.lock.Close() }

// Load implements Store.
func (s *FileStore) Load(name string) ([]byte, error) {
	data, err := os.ReadFile(filepath.Join(s.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return data, err
}

// Save implements Store.
func (s *FileStore) Save(name string, data []byte) error {
	return durable.WriteFile(filepath.Join(s.dir, name), data, 0o600)
}

// MemStore is a Store that ends with the process: for tests and simulated devices, which
// have no hardware that a command could move twice.
type MemStore struct {
	mu    sync.Mutex
	blobs map[string][]byte // guarded by mu
}

// Load implements Store.
func (s *MemStore) Load(name string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.blobs[name], nil
}

// Save implements Store.
func (s *MemStore) Save(name string, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.blobs == nil {
		s.blobs = map[string][]byte{}
	}
	s.blobs[name] = append([]byte(nil), data...)
	return nil
}

// state is what a device must not forget: the highest command number acted on, and the
// time before which no certificate can have ended (design section 3).
type state struct {
	cid   uint64
	floor int64 // Unix seconds
}

const stateName = "state"

// loadState reads the blob: layout version 1, cid and floor big-endian, CRC-32 (IEEE) over
// the 17 bytes before. No blob is a device that never ran; a damaged one is refused, since
// beginning at 0 again would let old commands run.
func loadState(store Store) (state, error) {
	data, err := store.Load(stateName)
	if err != nil || data == nil {
		return state{}, err
	}
	if len(data) != 21 || data[0] != 1 || crc32.ChecksumIEEE(data[:17]) != binary.BigEndian.Uint32(data[17:]) {
		return state{}, errors.New("the stored device state is damaged\n" +
			"hint: restore it; removing it makes the device forget which commands it has run")
	}
	return state{binary.BigEndian.Uint64(data[1:]), int64(binary.BigEndian.Uint64(data[9:]))}, nil
}

func (s state) save(store Store) error {
	b := binary.BigEndian.AppendUint64([]byte{1}, s.cid)
	b = binary.BigEndian.AppendUint64(b, uint64(s.floor))
	return store.Save(stateName, binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b)))
}

// update changes the stored state: memory follows only what is durable.
func (d *Device) update(change func(*state)) error {
	d.stateMu.Lock()
	defer d.stateMu.Unlock()
	next := d.state
	change(&next)
	if err := next.save(d.cfg.Store); err != nil {
		return fmt.Errorf("save the device state: %w", err)
	}
	d.state = next
	return nil
}

// floor is what notAfter is judged against.
func (d *Device) floor() time.Time {
	d.stateMu.Lock()
	defer d.stateMu.Unlock()
	floor := d.cfg.BuildTime
	if stored := time.Unix(d.state.floor, 0); d.state.floor != 0 && stored.After(floor) {
		floor = stored
	}
	return floor
}

// raiseFloor remembers the notBefore of a leaf whose handshake has succeeded.
func (d *Device) raiseFloor(notBefore time.Time) error {
	if !notBefore.After(d.floor()) {
		return nil
	}
	return d.update(func(s *state) { s.floor = notBefore.Unix() })
}

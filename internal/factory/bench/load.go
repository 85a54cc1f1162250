package bench

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"hawser/internal/durable"
	"hawser/internal/factory"
	"hawser/internal/pki"
)

// Loaded is what Load took in.
type Loaded struct {
	Block *factory.Block
	First bool // it was the first: fleet and device CA are pinned now
	Again bool // it was there already
}

// Load takes a block in. The first one pins the fleet and the device CA; ca, if not "", is
// the fingerprint (SHA-256 of the certificate, hex) of the device CA that the block must come
// from, and replaces the pin. A block that is refused changes nothing.
func Load(dir string, file []byte, ca string) (*Loaded, error) {
	s, err := readSettings(dir)
	if err != nil {
		return nil, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	v, err := load(dir, s, file, strings.ToLower(ca))
	return v, errors.Join(err, lock.Close())
}

func load(dir string, s *Settings, file []byte, ca string) (*Loaded, error) {
	l, err := factory.OpenBlock(file)
	if err != nil {
		return nil, err
	}
	v := &Loaded{Block: l, First: s.Fleet == ""}
	if err := checkStation(dir, s, l); err != nil {
		return nil, err
	}
	pinned := *s
	pinned.Fleet = hex.EncodeToString(l.Fleet[:])
	pinned.DeviceCA = Fingerprint(l)
	if err := checkPins(s, &pinned, ca); err != nil {
		return nil, err
	}
	if v.Again, err = keep(dir, l, file); err != nil {
		return nil, err
	}
	if pinned == *s {
		return v, nil
	}
	return v, pinned.write(dir)
}

// Fingerprint names the device CA of a block.
func Fingerprint(l *factory.Block) string {
	sum := pki.Fingerprint(l.DeviceCA.Raw)
	return hex.EncodeToString(sum[:])
}

// checkStation refuses a block for another station or another key.
func checkStation(dir string, s *Settings, l *factory.Block) error {
	text, err := os.ReadFile(filepath.Join(dir, fileCSR))
	if err != nil {
		return err
	}
	csr, err := pki.ParseCSR(text)
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(dir, fileCSR), err)
	}
	if l.Station != s.Station {
		return fmt.Errorf("the block is for station %q, not for %q: nothing was loaded", l.Station, s.Station)
	}
	if !csr.Pub.Equal(l.StationCert.PublicKey) {
		return fmt.Errorf("the block is for another key of station %q: nothing was loaded\n"+
			"hint: hawser factory reserve --station-csr with the %s of this bench", s.Station, fileCSR)
	}
	return nil
}

// checkPins refuses another fleet always, and another device CA unless ca says so.
func checkPins(s, now *Settings, ca string) error {
	switch {
	case s.Fleet != "" && now.Fleet != s.Fleet:
		return fmt.Errorf("the block is of fleet %s, and this bench belongs to %s: nothing was loaded", now.Fleet, s.Fleet)
	case ca != "" && ca != now.DeviceCA:
		return fmt.Errorf("the block comes from the device CA %s, not from the one that was named: nothing was loaded", now.DeviceCA)
	case ca == "" && s.DeviceCA != "" && now.DeviceCA != s.DeviceCA:
		return fmt.Errorf("the block comes from another device CA, %s: nothing was loaded\n"+
			"hint: if the fleet has a new one, compare the fingerprint and repeat with --device-ca FINGERPRINT", now.DeviceCA)
	}
	return nil
}

// keep puts the file in its place; again reports that it was there.
func keep(dir string, l *factory.Block, file []byte) (again bool, err error) {
	path := blockPath(dir, l.ID.String())
	err = durable.CreateFile(path, file, 0o600)
	if !errors.Is(err, fs.ErrExist) {
		return false, err
	}
	have, err := os.ReadFile(path)
	if err == nil && !bytes.Equal(have, file) {
		err = fmt.Errorf("there is another block of this name, %s: nothing was loaded", path)
	}
	return true, err
}

func blockPath(dir, id string) string { return filepath.Join(dir, dirBlocks, id+suffixBlock) }

// readBlocks reads all blocks, those that end first first.
func readBlocks(dir string, s *Settings) (all []*factory.Block, err error) {
	entries, err := os.ReadDir(filepath.Join(dir, dirBlocks))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), suffixBlock) {
			continue
		}
		path := filepath.Join(dir, dirBlocks, e.Name())
		l, err := readBlock(path, s)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		all = append(all, l)
	}
	slices.SortStableFunc(all, func(a, b *factory.Block) int { return a.Expires.Compare(b.Expires) })
	return all, nil
}

// readBlock reads one of ours: it was checked when it came, and is checked again.
func readBlock(path string, s *Settings) (*factory.Block, error) {
	file, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	l, err := factory.OpenBlock(file)
	if err != nil {
		return nil, err
	}
	if l.Station != s.Station || s.Fleet != "" && hex.EncodeToString(l.Fleet[:]) != s.Fleet {
		return nil, errors.New("it is not for this bench")
	}
	return l, nil
}

package bench

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"hawser/internal/durable"
	"hawser/internal/identity"
)

// reserved is the file of that name: the id that was taken last, written before the id is
// used, and how far the journal was then. So an id that was taken is never free again, even
// if the bench dies before the journal tells of it, and a journal that was put back to an
// older state is noticed.
type reserved struct {
	ID      identity.ID `json:"id,omitzero"`    // none before the first unit
	Records uint64      `json:"records"`        // of the journal
	Head    string      `json:"head,omitempty"` // SHA-256 of the last of them, hex
}

func readReserved(dir string) (*reserved, error) {
	path := filepath.Join(dir, fileReserved)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is missing: which id was taken last is not known, and none is given out\n"+
			"hint: put the file back from where it went, or set up a new bench directory with a new block", path)
	}
	if err != nil {
		return nil, err
	}
	r, err := parseReserved(text)
	if err != nil {
		return nil, fmt.Errorf("%s is damaged: %w: which id was taken last is not known, and none is given out\n"+
			"hint: set up a new bench directory with a new block", path, err)
	}
	return r, nil
}

func parseReserved(text []byte) (*reserved, error) {
	var r reserved
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return nil, err
	}
	if rest := bytes.TrimSpace(text[d.InputOffset():]); len(rest) > 0 {
		return nil, errors.New("text after its end")
	}
	if (r.Records == 0) != (r.Head == "") || !hexOrEmpty(r.Head, 32) || r.ID != 0 && r.Records == 0 {
		return nil, errors.New("its fields do not fit together")
	}
	return &r, nil
}

func (r *reserved) write(dir string) error {
	text, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode reserved id: %w", err)
	}
	return durable.WriteFile(filepath.Join(dir, fileReserved), append(text, '\n'), 0o600)
}

package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"hawser/internal/identity"
)

// BackupTrailer names the HTTP trailer in which the server says why a backup has
// no end.
const BackupTrailer = "Hawser-Error"

// TrailerText is e on one line.
func TrailerText(e *Error) string {
	text, err := json.Marshal(e)
	if err != nil {
		return string(Failed)
	}
	return string(text)
}

// Backup writes a backup of the fleet, in clear and in the format of
// internal/backup, to w. The server holds its checkpoints until all of it was
// taken: w should not be slow.
func (c *Client) Backup(ctx context.Context, w io.Writer) error {
	resp, err := c.do(ctx, http.MethodGet, "backup", nil, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(w, resp.Body)
	if err != nil {
		return fmt.Errorf("take the backup: %w", err)
	}
	text := resp.Trailer.Get(BackupTrailer)
	if text == "" {
		return nil
	}
	e := new(Error)
	if json.Unmarshal([]byte(text), e) != nil || e.Text == "" {
		return fmt.Errorf("the server ended the backup: %s", text)
	}
	return e
}

// Ahead is one thing that a device knows and the registry does not, because the
// registry was restored.
type Ahead struct {
	Device identity.ID `json:"device"`
	Known  bool        `json:"known"` // the device is in the registry
	What   string      `json:"what"`  // certificate, command, config or anchors
	Detail string      `json:"detail"`
	At     time.Time   `json:"at"`
}

// Ahead lists what devices know and the registry does not, at most a page after id.
func (c *Client) Ahead(ctx context.Context, after identity.ID) (list []Ahead, err error) {
	q := query{}
	q.id("after", after)
	return list, c.call(ctx, "GET", "ahead", url.Values(q), nil, &list)
}

// Adopt imports the certificate that a device has shown and proven since the
// registry was restored.
func (c *Client) Adopt(ctx context.Context, id identity.ID) (v Certificate, err error) {
	return v, c.call(ctx, "POST", "devices/"+id.String()+"/adopt", nil, nil, &v)
}

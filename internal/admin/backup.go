package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
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

// Package admin is the administration API of a fleet: what the commands and a
// server say to each other over the unix socket in the state directory.
//
// It promises that one set of types describes every answer, in the form in which
// --json prints it: ids in upper case, other bytes in lower-case hex, 64-bit
// numbers as strings, times in RFC 3339 and UTC; and that every error has one
// Kind, which is mapped to an HTTP status and to an exit code here and nowhere
// else. The handler is in internal/server: it answers from the running server,
// or from the files when none runs.
package admin

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// Kind says what sort of failure an error is.
type Kind string

// The kinds of error.
const (
	Failed      Kind = "failed"      // anything else
	Invalid     Kind = "invalid"     // the request itself is wrong
	NotFound    Kind = "not found"   // what it names does not exist
	Conflict    Kind = "conflict"    // what it names is there already, or in another state
	NoServer    Kind = "no server"   // only a running server can do it
	Unavailable Kind = "unavailable" // the server cannot at present
)

// Status is the HTTP status that carries an error of kind k.
func (k Kind) Status() int {
	switch k {
	case Invalid:
		return http.StatusBadRequest
	case NotFound:
		return http.StatusNotFound
	case Conflict:
		return http.StatusConflict
	case NoServer, Unavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// Exit codes of the commands. Those of send are its own.
const (
	ExitDone   = 0
	ExitFailed = 1
	ExitUsage  = 2
)

// ExitCode is what a command that failed with err ends with.
func ExitCode(err error) int {
	var e *Error
	switch {
	case err == nil:
		return ExitDone
	case errors.As(err, &e) && e.Kind == Invalid:
		return ExitUsage
	}
	return ExitFailed
}

// Error is a failure as it crosses the socket. Text is lower case, says what
// happened, and ends in a line "hint: ..." where there is something to do.
type Error struct {
	Kind Kind   `json:"kind"`
	Text string `json:"error"`
}

func (e *Error) Error() string { return e.Text }

// Errorf makes an error of kind k.
func Errorf(k Kind, format string, args ...any) error {
	return &Error{Kind: k, Text: fmt.Sprintf(format, args...)}
}

// IsKind reports whether err is of kind k.
func IsKind(err error, k Kind) bool {
	var e *Error
	return errors.As(err, &e) && e.Kind == k
}

// Hex is bytes that JSON shows as lower-case hex.
type Hex []byte

// MarshalText implements encoding.TextMarshaler.
func (h Hex) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *Hex) UnmarshalText(b []byte) error {
	v, err := hex.DecodeString(string(b))
	*h = v
	return err
}

func (h Hex) String() string { return hex.EncodeToString(h) }

// UTC gives t as it is shown: whole milliseconds, UTC; the zero time stays.
func UTC(t time.Time) time.Time {
	if t.IsZero() {
		return time.Time{}
	}
	return t.UTC().Truncate(time.Millisecond)
}

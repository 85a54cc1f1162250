package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestKindsAndExitCodes(t *testing.T) {
	for kind, want := range map[Kind][2]int{
		Failed: {500, 1}, Invalid: {400, 2}, NotFound: {404, 1}, Conflict: {409, 1}, NoServer: {503, 1}, Unavailable: {503, 1},
	} {
		err := fmt.Errorf("outside: %w", Errorf(kind, "x"))
		if kind.Status() != want[0] || ExitCode(err) != want[1] || !IsKind(err, kind) {
			t.Errorf("%s: status %d, exit %d", kind, kind.Status(), ExitCode(err))
		}
	}
	if ExitCode(nil) != 0 || ExitCode(errors.New("x")) != 1 {
		t.Error("exit codes of other errors")
	}
}

// The spelling of --json: ids upper case, bytes hex, 64-bit numbers as strings,
// times in UTC, nothing for what is not there.
func TestJSONSpelling(t *testing.T) {
	at := UTC(time.Date(2026, 11, 23, 8, 0, 0, 123456789, time.FixedZone("x", 3600)))
	b, err := json.Marshal(Device{ID: 0xABCD1234, State: "active", Key: []byte{0xAB, 1}, Created: at, Hello: &Hello{At: at, Nonce: 1 << 63}})
	want := `{"id":"ABCD1234","state":"active","key":"ab01","created":"2026-11-23T07:00:00.123Z",` +
		`"hello":{"at":"2026-11-23T07:00:00.123Z","nonce":"9223372036854775808","encoding":""}}`
	if err != nil || string(b) != want {
		t.Errorf("%s, %v", b, err)
	}
}

// against makes a client of a handler.
func against(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	c := NewClient(func(context.Context) (net.Conn, error) { return net.Dial("tcp", s.Listener.Addr().String()) }, true)
	t.Cleanup(c.Close)
	return c
}

// A tail that breaks off in the middle is an error, never a short log.
func TestTailIsWholeOrAnError(t *testing.T) {
	const message = `{"pos":"1","topic":"a","payload":1}` + "\n"
	for body, want := range map[string]string{
		message + `{"kind":"end","error":"end"}` + "\n": "",
		message: "ended in the middle",
		"":      "ended in the middle",
		message + `{"kind":"failed","error":"damaged"}` + "\n": "damaged",
		message + `{"pos":`: "unexpected EOF",
	} {
		c := against(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, body) })
		err := c.Tail(t.Context(), Tail{}, func(*Message) error { return nil })
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v", body, err)
		}
	}
}

func TestErrorsCross(t *testing.T) {
	c := against(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusConflict)
		fmt.Fprint(w, `{"kind":"conflict","error":"it is there\nhint: look"}`)
	})
	if err := c.Reload(t.Context()); !IsKind(err, Conflict) || err.Error() != "it is there\nhint: look" {
		t.Errorf("%v", err)
	}
	c = against(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "plain", http.StatusBadGateway) })
	if err := c.Reload(t.Context()); err == nil || !strings.Contains(err.Error(), "502") {
		t.Errorf("%v", err)
	}
}

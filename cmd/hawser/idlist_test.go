package main

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestIDList(t *testing.T) {
	ids, err := readIDs(strings.NewReader("# list\r\n ABCD0001 \n\nABCD0002#x\nABCD0001"))
	if err != nil || fmt.Sprint(ids) != "[ABCD0001 ABCD0002 ABCD0001]" {
		t.Errorf("%v, %v", ids, err)
	}
	for _, c := range []struct{ text, want string }{
		{"", "no id in it"},
		{"ABCD0001 ABCD0002", `line 1: "ABCD0001 ABCD0002"`},
		{"ABCD0001\n" + strings.Repeat("x", 50), `line 2: "` + strings.Repeat("x", 40) + `..."`},
		{strings.Repeat("#\n", maxIDFile/2+1), "more than 16.0 MiB"},
		{strings.Repeat("A", 1<<17), "too long"},
	} {
		if ids, err := readIDs(strings.NewReader(c.text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.20q: %d ids, %v, want %q", c.text, len(ids), err, c.want)
		}
	}
}

// FuzzIDList: a list that is accepted holds ids, each of which stands in it.
func FuzzIDList(f *testing.F) {
	for _, seed := range []string{"ABCD0001\n# x\nABCD0002", "abcd0001", "\x00", "ABCD0001,ABCD0002"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		ids, err := readIDs(bytes.NewReader(text))
		if err == nil && len(ids) == 0 {
			t.Error("an empty list was accepted")
		}
		for _, id := range ids {
			if err != nil || !bytes.Contains(text, []byte(id.String())) {
				t.Errorf("%v: %v", id, err)
			}
		}
	})
}

func TestMoment(t *testing.T) {
	now := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]string{
		"2026-11-24": "2026-11-24T00:00:00Z", "2026-11-24T08:30": "2026-11-24T08:30:00Z", "2026-11-24T08:30:05": "2026-11-24T08:30:05Z",
		"2026-11-24T08:30:00+02:00": "2026-11-24T06:30:00Z", "90m": "2026-11-27T10:30:00Z", "2d": "2026-11-25T12:00:00Z",
	} {
		if got, err := moment(text, now); err != nil || got.UTC().Format(time.RFC3339) != want {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"2026-02-30", "24.11.2026", "-1h", "tuesday"} {
		if got, err := moment(text, now); err == nil {
			t.Errorf("%s: %v", text, got)
		}
	}
	if got, err := moment("", now); err != nil || !got.IsZero() {
		t.Errorf("%v, %v", got, err)
	}
}

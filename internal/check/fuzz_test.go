package check

import (
	"testing"

	"hawser/internal/check/tls13"
)

// FuzzRecorder: what a client of an older TLS has sent is taken apart whatever it is.
func FuzzRecorder(f *testing.F) {
	f.Add([]byte{22, 3, 1, 0, 8, 11, 0, 0, 4, 0, 0, 1, 0, 20, 3, 1, 0, 1, 1, 22, 3, 1, 0, 1, 0})
	f.Add([]byte{22, 3, 1, 0xff, 0xff, 1})
	f.Add([]byte{22, 3, 1, 0, 4, 11, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		var seen tls13.Seen
		r := &recorder{b: b}
		r.tell(&seen)
		if _, err := r.hello(); err == nil && len(b) < 40 {
			t.Error("a ClientHello in less than 40 bytes")
		}
		if seen.Finished && !seen.Hello {
			t.Errorf("seen %+v of nothing", seen)
		}
	})
}

// TestRecorder: the certificate is seen, and what follows ChangeCipherSpec.
func TestRecorder(t *testing.T) {
	for name, c := range map[string]struct {
		b                     []byte
		certificate, finished bool
	}{
		"empty certificate": {[]byte{22, 3, 1, 0, 7, 11, 0, 0, 3, 0, 0, 0}, false, false},
		"certificate":       {[]byte{22, 3, 1, 0, 8, 11, 0, 0, 4, 0, 0, 1, 0}, true, false},
		"in two records":    {[]byte{22, 3, 1, 0, 2, 11, 0, 22, 3, 1, 0, 6, 0, 4, 0, 0, 1, 0}, true, false},
		"Finished":          {[]byte{20, 3, 1, 0, 1, 1, 22, 3, 1, 0, 1, 9}, false, true},
		"alert after":       {[]byte{20, 3, 1, 0, 1, 1, 21, 3, 1, 0, 1, 9}, false, false},
	} {
		var seen tls13.Seen
		(&recorder{b: c.b}).tell(&seen)
		if seen.Certificate != c.certificate || seen.Finished != c.finished {
			t.Errorf("%s: %+v", name, seen)
		}
	}
}

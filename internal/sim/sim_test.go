package sim

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hawser/internal/durable"
)

func seedFile(t *testing.T, text []byte, perm os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sim.seed")
	if err := os.WriteFile(path, text, perm); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestSeed: everything follows from the seed, and from nothing else.
func TestSeed(t *testing.T) {
	text := bytes.Repeat([]byte{7}, seedSize)
	a, err := ReadSeed(seedFile(t, text, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	b, err := ReadSeed(seedFile(t, text, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	text[31]++
	other, err := ReadSeed(seedFile(t, text, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	base, err := a.base()
	if err != nil || base%(1<<slotBits) != 0 || prefix(base) != base.String()[:3] {
		t.Fatal(base, err)
	}
	// Pinned: a release that derives otherwise would lose everybody's simulated devices.
	if base.String() != "AF800000" {
		t.Errorf("ids from %s", base)
	}
	k1, err1 := a.key(base)
	k2, err2 := b.key(base)
	k3, err3 := other.key(base)
	k4, err4 := a.key(base + 1)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		t.Fatal(err)
	}
	if !k1.Equal(k2) || k1.Equal(k3) || k1.Equal(k4) {
		t.Error("a key does not follow from seed and id alone")
	}
}

func TestSeedRefused(t *testing.T) {
	whole := make([]byte, seedSize)
	if _, err := ReadSeed(seedFile(t, whole, 0o644)); !errors.Is(err, durable.ErrExposed) {
		t.Error("readable by others:", err)
	}
	if _, err := ReadSeed(seedFile(t, whole[1:], 0o600)); err == nil || !strings.Contains(err.Error(), "damaged: 31 bytes") {
		t.Error("short:", err)
	}
	path := filepath.Join(t.TempDir(), "sim.seed")
	if _, err := ReadSeed(path); err == nil || !strings.Contains(err.Error(), path+" is missing") {
		t.Error("missing:", err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("a missing seed was made anew")
	}
}

// TestMeter: a quantile is never below the truth and at most an eighth above it.
func TestMeter(t *testing.T) {
	for d := time.Microsecond; d < time.Minute; d += d/7 + time.Microsecond {
		b := bucket(d)
		if up := upper(b); up < d || up > d+d/7+time.Microsecond {
			t.Fatalf("%v is in a bucket up to %v", d, up)
		}
		if b > 0 && upper(b-1) > d {
			t.Fatalf("%v is beyond the bucket before, up to %v", d, upper(b-1))
		}
	}
	var m meter
	if m.quantile(0.5) != 0 {
		t.Error("a median of nothing")
	}
	for i := range 1000 {
		m.note(time.Duration(i+1) * time.Millisecond)
	}
	for q, want := range map[float64]time.Duration{0.5: 501, 0.99: 991} {
		want *= time.Millisecond
		if got := m.quantile(q); got < want || got > want+want/8 {
			t.Errorf("quantile %g is %v, not %v", q, got, want)
		}
	}
	if got := m.quantile(1); got != time.Second {
		t.Error("the longest is", got)
	}
}

func TestPayload(t *testing.T) {
	if got := string(payload(12, 21.5, 0)); got != `{"n":12,"celsius":21.50}` {
		t.Error(got)
	}
	for size := 1; size < 200; size++ {
		got := payload(12, 21.5, size)
		if len(got) != size {
			t.Fatalf("%d bytes in place of %d: %q", len(got), size, got)
		}
		if size >= 24 && (got[0] != '{' || got[size-1] != '}') {
			t.Fatalf("%q", got)
		}
	}
}

// TestRaiseFiles: the soft limit goes up to the hard one and no further. It changes this
// process's limit, and puts it back.
func TestRaiseFiles(t *testing.T) {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
	low := old
	low.Cur = 200
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	if got, err := RaiseFiles(300); err != nil || got != 364 {
		t.Error(got, err)
	}
	if _, err := RaiseFiles(int(old.Max)); err == nil || !strings.Contains(err.Error(), "hint: ulimit -n") {
		t.Error("beyond the hard limit:", err)
	}
}

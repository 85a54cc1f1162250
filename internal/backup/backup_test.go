package backup

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
)

// sample makes a backup of two members, the second of several chunks.
func sample(t testing.TB, passphrase string) []byte {
	t.Helper()
	var out bytes.Buffer
	w, closeIt := io.Writer(&out), func() error { return nil }
	if passphrase != "" {
		s, err := encrypt(&out, []byte(passphrase), scryptMinLogN)
		if err != nil {
			t.Fatal(err)
		}
		w, closeIt = s, s.Close
	}
	b := NewWriter(w)
	for name, text := range map[string]string{"hawser.toml": "x = 1", "log/LOG": strings.Repeat("frame ", 60_000)} {
		if err := b.Member(name, 0o640, strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(b.Close(), closeIt()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// readAll gives the members, or the first error.
func readAll(data []byte, passphrase string) (map[string]string, error) {
	r, err := Open(bytes.NewReader(data), func() ([]byte, error) { return []byte(passphrase), nil })
	if err != nil {
		return nil, err
	}
	got := map[string]string{}
	for {
		m, f, err := r.Next()
		if errors.Is(err, io.EOF) {
			return got, nil
		}
		if err != nil {
			return nil, err
		}
		text, err := io.ReadAll(f)
		if err != nil {
			return nil, err
		}
		got[m.Name] = fmt.Sprintf("%o %s", m.Mode, text)
	}
}

func TestRoundTrip(t *testing.T) {
	for _, pass := range []string{"", "correct horse"} {
		got, err := readAll(sample(t, pass), pass)
		if err != nil || got["hawser.toml"] != "640 x = 1" || len(got["log/LOG"]) != 4+360_000 || len(got) != 2 {
			t.Errorf("passphrase %q: %d members, %v", pass, len(got), err)
		}
	}
	secret := sample(t, "correct horse")
	if bytes.Contains(secret, []byte("hawser.toml")) || bytes.Contains(secret, []byte("frame frame")) {
		t.Error("an encrypted backup shows what is in it")
	}
	if _, err := readAll(secret, "correct hors"); !errors.Is(err, ErrPassphrase) {
		t.Errorf("a wrong passphrase: %v", err)
	}
	if _, err := Encrypt(io.Discard, nil); err == nil {
		t.Error("an empty passphrase was taken")
	}
}

// A pieces's edge is where a last piece is easily taken for another.
func TestPieces(t *testing.T) {
	for _, size := range []int{0, 1, pieceSize - 1, pieceSize, pieceSize + 1, 2 * pieceSize} {
		var out bytes.Buffer
		s, err := encrypt(&out, []byte("p"), scryptMinLogN)
		if err != nil {
			t.Fatal(err)
		}
		want := bytes.Repeat([]byte{7}, size)
		if _, err := s.Write(want); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		got, err := openPieces(out.Bytes())
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes come back as %d: %v", size, len(got), err)
		}
		for _, cut := range []int{out.Len() - 1, out.Len() - 16, sealedHead + pieceSize + 16, sealedHead} {
			if cut < out.Len() && cut >= sealedHead {
				if _, err := openPieces(out.Bytes()[:cut]); err == nil {
					t.Errorf("%d bytes cut to %d are taken", out.Len(), cut)
				}
			}
		}
	}
}

// Two pieces that change places are refused though both are genuine, and so is a
// last one that is left out.
func TestPiecesChangePlaces(t *testing.T) {
	var out bytes.Buffer
	s, err := encrypt(&out, []byte("p"), scryptMinLogN)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Write(make([]byte, 3*pieceSize)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	const piece = pieceSize + 16
	data := out.Bytes()
	head, a, b, c := data[:sealedHead], data[sealedHead:sealedHead+piece], data[sealedHead+piece:sealedHead+2*piece], data[sealedHead+2*piece:]
	if _, err := openPieces(data); err != nil {
		t.Fatal(err)
	}
	for name, parts := range map[string][][]byte{"another order": {head, b, a, c}, "one left out": {head, a, c}, "one twice": {head, a, a, b, c}, "no last one": {head, a, b}} {
		if _, err := openPieces(bytes.Join(parts, nil)); err == nil {
			t.Errorf("pieces are taken with %s", name)
		}
	}
}

// One bit flipped, one byte less, one more: refused, wherever it is.
func TestDamage(t *testing.T) {
	for _, pass := range []string{"", "p"} {
		data := sample(t, pass)
		for at := 0; at < len(data); at += 1 + at/7 {
			bad := bytes.Clone(data)
			bad[at] ^= 0x10
			if got, err := readAll(bad, "p"); err == nil {
				t.Errorf("passphrase %q: byte %d flipped: %d members are taken", pass, at, len(got))
			}
			if got, err := readAll(data[:at], "p"); err == nil {
				t.Errorf("passphrase %q: cut to %d: %d members are taken", pass, at, len(got))
			}
		}
		if _, err := readAll(append(bytes.Clone(data), 0), "p"); err == nil {
			t.Errorf("passphrase %q: a byte more is taken", pass)
		}
	}
}

// What would cost memory, or lead out of the directory, is refused.
func TestHostile(t *testing.T) {
	costly := []byte(sealedMagic + "\x3f\x08\x01" + strings.Repeat("s", saltSize))
	if _, err := readAll(costly, "p"); !errors.Is(err, ErrDamaged) {
		t.Errorf("scrypt with N = 2^63: %v", err)
	}
	for _, name := range []string{"", "/etc/passwd", "../x", "a/../b", "a//b", ".", "a\x00b", "a\nb", `a\b`} {
		var out bytes.Buffer
		if err := NewWriter(&out).Member(name, 0o600, strings.NewReader("")); err == nil {
			t.Errorf("%q was written", name)
		}
		raw := magic + "\x01\x01\x80" + string(rune(len(name))) + name + "\x00\x00\x00\x00"
		if _, err := readAll([]byte(raw), ""); !errors.Is(err, ErrDamaged) {
			t.Errorf("%q was read: %v", name, err)
		}
	}
	huge := magic + "\x01\x01\x80\x01a\xff\xff\xff\xff"
	if _, err := readAll([]byte(huge), ""); !errors.Is(err, ErrDamaged) {
		t.Errorf("a chunk of 4 GiB: %v", err)
	}
}

// FuzzBackup: any bytes are read to an end, and only what a Writer wrote is whole.
func FuzzBackup(f *testing.F) {
	var small bytes.Buffer
	w := NewWriter(&small)
	if err := errors.Join(w.Member("a", 0o600, strings.NewReader("text")), w.Close()); err != nil {
		f.Fatal(err)
	}
	f.Add(small.Bytes())
	f.Add([]byte(magic + "\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if Sealed(data) {
			return // scrypt is slow, and its reader is below the same one
		}
		if got, err := readAll(data, ""); err == nil && len(data) < len(magic)+5+32 {
			t.Errorf("%d bytes gave %d members", len(data), len(got))
		}
	})
}

func openPieces(data []byte) ([]byte, error) {
	r, err := decrypt(bufio.NewReader(bytes.NewReader(data)), []byte("p"))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

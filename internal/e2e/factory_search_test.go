package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// keyWindow is how many bytes of a key in a row count as a find: a record of Intel HEX, or an
// escape, may break the rest off.
const keyWindow = 8

// needles are the spellings of a key's pieces: as it is and byte-reversed, each in binary,
// hex, Go's and C's lists of numbers, and base64.
func needles(key []byte) (list [][]byte) {
	back := bytes.Clone(key)
	slices.Reverse(back)
	for _, k := range [][]byte{key, back} {
		for i := 0; i+keyWindow <= len(k); i++ {
			w := k[i : i+keyWindow]
			list = append(list, w, []byte(hex.EncodeToString(w)), []byte(strings.ToUpper(hex.EncodeToString(w))),
				[]byte(strings.Trim(fmt.Sprint(w), "[]")), []byte(strings.Trim(strings.ReplaceAll(fmt.Sprint(w), " ", ", "), "[]")))
		}
		for i := 0; i+9 <= len(k); i++ { // any nine bytes that begin a group
			list = append(list, []byte(base64.StdEncoding.EncodeToString(k[i:i+9])), []byte(base64.URLEncoding.EncodeToString(k[i:i+9])))
		}
	}
	return list
}

// digits leaves of a text its hex digits alone, in lower case, and drops what marks them: so
// bytes that are written with escapes or separators stand in a row.
func digits(text []byte) []byte {
	text = bytes.ToLower(text)
	for _, mark := range []string{`\x`, "0x", `\u00`} {
		text = bytes.ReplaceAll(text, []byte(mark), nil)
	}
	return bytes.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'a' && r <= 'f' {
			return r
		}
		return -1
	}, text)
}

// holds reports whether any piece of key stands in text, in any spelling.
func holds(text, key []byte) bool {
	bare := digits(text)
	for _, n := range needles(key) {
		if bytes.Contains(text, n) || len(n) == 2*keyWindow && bytes.Contains(bare, n) {
			return true
		}
	}
	return false
}

// holdsRaw is holds for the memory of a process, which is large: whole words of the key, in
// binary and hex.
func holdsRaw(text, key []byte) bool {
	back := bytes.Clone(key)
	slices.Reverse(back)
	for _, k := range [][]byte{key, back} {
		for i := 0; i+keyWindow <= len(k); i += keyWindow {
			w := k[i : i+keyWindow]
			h := hex.EncodeToString(w)
			if bytes.Contains(text, w) || bytes.Contains(text, []byte(h)) || bytes.Contains(text, []byte(strings.ToUpper(h))) {
				return true
			}
		}
	}
	return false
}

// TestSearch: the search finds what it is there to find.
func TestSearch(t *testing.T) {
	key := make([]byte, 32)
	for i := range key {
		key[i] = byte(i*37 + 11)
	}
	back := bytes.Clone(key)
	slices.Reverse(back)
	escaped := ""
	for _, b := range key {
		escaped += fmt.Sprintf(`\x%02X`, b)
	}
	for name, text := range map[string]string{
		"raw": "ab" + string(key) + "cd", "reversed": string(back), "hex": hex.EncodeToString(key), "HEX": strings.ToUpper(hex.EncodeToString(key)),
		"escaped": escaped, "spaced": fmt.Sprintf("% x", key), "colons": strings.ReplaceAll(fmt.Sprintf("% X", key), " ", ":"), "Go": fmt.Sprint(key),
		"Go syntax": fmt.Sprintf("%#v", key), "a number": fmt.Sprintf("%d", key[:]), "Intel HEX": fmt.Sprintf(":100010000102030%X\n:10002000%XAB", key[:8], key[8:24]),
		"base64": base64.StdEncoding.EncodeToString(key), "base64 from 1": base64.StdEncoding.EncodeToString(append([]byte("x"), key...)),
		"base64 from 2": base64.URLEncoding.EncodeToString(append([]byte("xy"), key...)), "a third of it": string(key[12:23]),
	} {
		if !holds([]byte(text), key) {
			t.Errorf("%s: not found", name)
		}
	}
	if holds([]byte("nothing of the kind "+hex.EncodeToString(key[:5])), key) {
		t.Error("found what is not there")
	}
}

// searchFiles looks for keys in every file below dir, names included.
func searchFiles(t *testing.T, dir string, keys [][]byte) (files int) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		files++
		for _, k := range keys {
			if holds(append(text, path...), k) {
				t.Errorf("%s holds a unit's key", path)
			}
		}
		return err
	})
	fatal(t, err)
	return files
}

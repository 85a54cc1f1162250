package fleet

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// BackupFiles lists what a backup holds beside registry and log, relative to the
// fleet directory: hawser.toml and what lies in server/, the broker's keys
// included. A CA key is never among them, wherever it lies: a backup is made often
// and lies about, and the server can be brought back without.
func (l *Layout) BackupFiles() ([]string, error) {
	list := []string{configFile}
	err := filepath.WalkDir(l.ServerDir(), func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && path != l.ServerDir() {
			return nil // it went while we looked
		}
		if err != nil {
			return err
		}
		name := filepath.Base(path)
		if path == l.LogDir() || strings.HasPrefix(name, ".tmp-") && path != l.ServerDir() {
			return skip(path)
		}
		info, err := os.Stat(path)
		if err != nil || !info.Mode().IsRegular() || name == "lock" || strings.HasPrefix(path, l.RegistryPath()) {
			return nil // a socket; what a running server alone needs; what is copied apart
		}
		list = append(list, l.rel(path))
		return nil
	})
	if err != nil {
		return nil, err
	}
	if c := l.NATSCredentials(); c != "" && filepath.IsLocal(l.rel(c)) && !slices.Contains(list, l.rel(c)) {
		list = append(list, l.rel(c))
	}
	keys := l.CAKeysPresent()
	return slices.DeleteFunc(list, func(f string) bool { return slices.Contains(keys, f) }), nil
}

func (l *Layout) rel(path string) string {
	rel, err := filepath.Rel(l.Dir, path)
	if err != nil {
		return ".." // not below it
	}
	return rel
}

// skip leaves out a directory, or a file alone.
func skip(path string) error {
	if info, err := os.Lstat(path); err == nil && info.IsDir() {
		return fs.SkipDir
	}
	return nil
}

// FreeDir gives the absolute path of dir if a fleet may be put there: it does not
// exist, or is empty.
func FreeDir(dir string) (string, error) { return freeDir(dir) }

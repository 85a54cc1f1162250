// Package durable replaces files so that a crash at any moment leaves a whole one.
//
// It promises that after WriteFile or CreateFile has returned nil the new content
// survives a power cut, and that at every moment before that a reader finds either the
// old content, whole, or the new one, whole; a failure changes nothing of that, and leaves
// no temporary file behind (a process killed in the middle may leave a ".tmp-" file,
// which nothing reads).
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// ErrLocked reports that another process holds the lock.
var ErrLocked = errors.New("locked by another process")

// ErrExposed reports a key file that others than its owner may read.
var ErrExposed = errors.New("key file is readable by others")

// WriteFile makes data the content of path, with exactly the permissions perm.
func WriteFile(path string, data []byte, perm os.FileMode) error {
	return write(path, data, perm, os.Rename)
}

// CreateFile is WriteFile for a path that must not exist yet: if it does, the error is
// fs.ErrExist, even if two processes try at the same moment.
func CreateFile(path string, data []byte, perm os.FileMode) error {
	return write(path, data, perm, os.Link)
}

// CreateStream is CreateFile for what is written piece by piece: fill writes to f,
// which is empty and also open for reading. If fill fails nothing is left.
func CreateStream(path string, perm os.FileMode, fill func(f *os.File) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(f.Name())
	err = fill(f)
	if err == nil {
		err = f.Chmod(perm)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := nameNew(f.Name(), path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return SyncDir(filepath.Dir(path))
}

// nameNew gives tmp the name path, which must be free. On a file system without
// hard links (a memory stick, some network drives) two processes that try at the
// same moment are not told apart.
func nameNew(tmp, path string) error {
	err := os.Link(tmp, path)
	if !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.ENOTSUP) && !errors.Is(err, syscall.ENOSYS) {
		return err
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(err, fs.ErrExist)
	}
	return os.Rename(tmp, path)
}

func write(path string, data []byte, perm os.FileMode, place func(tmp, path string) error) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".tmp-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(f.Name()) // after a rename there is nothing left to remove, after a link there is
	err = fill(f, data, perm)
	if err == nil {
		err = place(f.Name(), path)
	}
	if err == nil {
		err = SyncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

func fill(f *os.File, data []byte, perm os.FileMode) error {
	_, err := f.Write(data)
	if err == nil {
		err = f.Chmod(perm)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// SyncDir makes the names in dir durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}

// Remove deletes path for good. A path that is not there is fs.ErrNotExist.
func Remove(path string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// FileLock is held until Close, or until the process dies.
type FileLock struct{ f *os.File }

// Lock takes the lock that the file at path stands for, and makes the file if need
// be. It does not wait: if another holds the lock the error is ErrLocked.
func Lock(path string) (*FileLock, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return &FileLock{f}, nil
	}
	f.Close()
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, fmt.Errorf("%s: %w", path, ErrLocked)
	}
	return nil, fmt.Errorf("lock %s: %w", path, err)
}

// Close gives the lock up. The file stays: removing it would let two hold "the" lock.
func (l *FileLock) Close() error { return l.f.Close() }

// CheckPrivate refuses a key file that its group or the world may read. The error is
// ErrExposed and names the command that cures it.
func CheckPrivate(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return &fs.PathError{Op: "check", Path: path, Err: errors.New("not a regular file")}
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s: %w (mode %04o)\nhint: chmod 600 %s", path, ErrExposed, info.Mode().Perm(), path)
	}
	return nil
}

package durable

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestMain is also the child of the tests that need a process to kill or to starve.
func TestMain(m *testing.M) {
	if path := os.Getenv("DURABLE_CHILD_WRITE"); path != "" {
		childWrite(path)
	}
	if path := os.Getenv("DURABLE_CHILD_LOCK"); path != "" {
		childLock(path)
	}
	if path := os.Getenv("DURABLE_CHILD_FSIZE"); path != "" {
		childFull(path)
	}
	os.Exit(m.Run())
}

// version is a content that tells whether it is whole: one byte value, 64 KiB of it.
func version(n int) []byte { return bytes.Repeat([]byte{byte(n)}, 64<<10) }

func childWrite(path string) {
	os.Stdout.WriteString("ready\n")
	for n := 0; ; n++ {
		if err := WriteFile(path, version(n), 0o600); err != nil {
			os.Stderr.WriteString(err.Error())
			os.Exit(1)
		}
		os.Stdout.WriteString("w")
	}
}

func childLock(path string) {
	l, err := Lock(path)
	if err != nil {
		os.Exit(1)
	}
	os.Stdout.WriteString("locked\n")
	<-make(chan struct{})
	runtime.KeepAlive(l) // else the collector closes it
}

// childFull runs out of room in the middle of the data: the limit on the file size stands
// in for the full disk, since write(2) fails after a part in both cases.
func childFull(path string) {
	lim := syscall.Rlimit{Cur: 4096, Max: 4096}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &lim); err != nil {
		os.Exit(3)
	}
	err := WriteFile(path, version(2), 0o600)
	if errors.Is(err, syscall.EFBIG) {
		os.Exit(7)
	}
	os.Exit(1)
}

func child(t *testing.T, key, value string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), key+"="+value)
	return cmd
}

func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestWriteFileReplaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for _, want := range []string{"one", "", "three"} {
		if err := WriteFile(path, []byte(want), 0o640); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != want {
			t.Fatalf("read %q, %v", got, err)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o640 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	if got := names(t, filepath.Dir(path)); len(got) != 1 {
		t.Fatalf("left behind: %q", got)
	}
}

func TestCreateFileRefusesWhatExists(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := CreateFile(path, []byte("first"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := CreateFile(path, []byte("second"), 0o600); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("got %v, want fs.ErrExist", err)
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != "first" {
		t.Fatalf("read %q, %v", got, err)
	}
	if got := names(t, filepath.Dir(path)); len(got) != 1 {
		t.Fatalf("left behind: %q", got)
	}
}

func TestFailureInPlacingLeavesOldFileAndNoTemp(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(path, []byte("x"), 0o600); err == nil {
		t.Fatal("replaced a directory")
	}
	if got := names(t, dir); len(got) != 1 || got[0] != "f" {
		t.Fatalf("directory holds %q", got)
	}
	if err := WriteFile(filepath.Join(dir, "none", "f"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("missing directory: %v", err)
	}
}

func TestNoRoomLeavesOldFileAndNoTemp(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := WriteFile(path, version(1), 0o600); err != nil {
		t.Fatal(err)
	}
	err := child(t, "DURABLE_CHILD_FSIZE", path).Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Fatalf("child: %v, want a write that ran out of room", err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, version(1)) {
		t.Fatalf("old file: %d bytes, %v", len(got), err)
	}
	if got := names(t, dir); len(got) != 1 {
		t.Fatalf("left behind: %q", got)
	}
}

func TestKillLeavesAWholeVersion(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for round := range 20 {
		cmd := child(t, "DURABLE_CHILD_WRITE", path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Each round dies a few bytes further on in the writer's progress reports.
		if _, err := out.Read(make([]byte, 7+round)); err != nil {
			t.Fatal(err)
		}
		out.Read(make([]byte, 1))
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		got, err := os.ReadFile(path)
		if err != nil || len(got) != 64<<10 || !bytes.Equal(got, version(int(got[0]))) {
			t.Fatalf("round %d: %d bytes, %v: not a whole version", round, len(got), err)
		}
	}
}

func TestRemove(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := Remove(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("second Remove: %v", err)
	}
	if err := SyncDir(path); err == nil {
		t.Fatal("synced a directory that is not there")
	}
}

func TestLockExcludesAndDiesWithItsHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	cmd := child(t, "DURABLE_CHILD_LOCK", path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(path); !errors.Is(err, ErrLocked) {
		t.Fatalf("while a process holds it: %v", err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	l, err := Lock(path)
	if err != nil {
		t.Fatalf("after its death: %v", err)
	}
	if _, err := Lock(path); !errors.Is(err, ErrLocked) {
		t.Fatalf("within one process: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Lock(path)
	if err != nil {
		t.Fatalf("after Close: %v", err)
	}
	again.Close()
}

func TestCheckPrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "k.key")
	for _, mode := range []os.FileMode{0o600, 0o400, 0o640, 0o604, 0o620, 0o666} {
		if err := WriteFile(path, nil, mode); err != nil {
			t.Fatal(err)
		}
		err := CheckPrivate(path)
		if mode&0o077 == 0 {
			if err != nil {
				t.Errorf("mode %o: %v", mode, err)
			}
			continue
		}
		if !errors.Is(err, ErrExposed) || !strings.Contains(err.Error(), "chmod 600 "+path) ||
			!strings.Contains(err.Error(), strconv.FormatUint(uint64(mode), 8)) {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
	if err := CheckPrivate(filepath.Dir(path)); err == nil {
		t.Error("a directory passed for a key")
	}
	if err := CheckPrivate(path + "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

// What is written piece by piece gets its name when it is whole, or leaves nothing.
func TestCreateStream(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	fill := func(text string, err error) func(*os.File) error {
		return func(f *os.File) error {
			if _, e := f.WriteString(text); e != nil {
				return e
			}
			if _, e := os.Lstat(path); text == "first" && e == nil {
				t.Error("the file has its name before it is whole")
			}
			return err
		}
	}
	broken := errors.New("broken")
	if err := CreateStream(path, 0o600, fill("half", broken)); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) > 0 {
		t.Errorf("%v is left: %v", list, err)
	}
	if err := CreateStream(path, 0o640, fill("first", nil)); err != nil {
		t.Fatal(err)
	}
	if err := CreateStream(path, 0o600, fill("second", nil)); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over another: %v", err)
	}
	text, err := os.ReadFile(path)
	info, serr := os.Stat(path)
	if err != nil || serr != nil || string(text) != "first" || info.Mode().Perm() != 0o640 {
		t.Errorf("%q, mode %v: %v, %v", text, info.Mode(), err, serr)
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 1 {
		t.Errorf("%v is left: %v", list, err)
	}
}

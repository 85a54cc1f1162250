package fleet

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/internal/durable"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

const (
	softModule = "/usr/lib/softhsm/libsofthsm2.so"
	softPIN    = "12345678"
)

// softToken makes a token called "safe" and gives the URI of a key on it.
func softToken(t *testing.T) func(object string) string {
	t.Helper()
	if _, err := exec.LookPath("softhsm2-util"); err != nil {
		t.Skip("the program softhsm2-util is missing")
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "directories.tokendir = %s\n", dir), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", "safe", "--pin", softPIN, "--so-pin", "87654321").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return func(object string) string {
		return "pkcs11:token=safe;object=" + object + "?module-path=" + softModule
	}
}

// mustIssue lets every CA of a directory sign once.
func mustIssue(t *testing.T, dir, pass, pin string) {
	t.Helper()
	ca, err := OpenCA(dir, ask(pass))
	if err != nil {
		t.Fatal(err)
	}
	ca.PIN = func(string) ([]byte, error) { return []byte(pin), nil }
	id, errID := identity.RandomID(rand.Reader) // an id keeps its key for life
	_, errDevice := ca.EnrollDevice(id, csrOf(t, newKey(t)), "", time.Now())
	_, errService := ca.IssueService("dashboard", &newKey(t).PublicKey, time.Now())
	_, errBroker := ca.IssueBroker("mqtt.example.com", &newKey(t).PublicKey, time.Now())
	if err := errors.Join(errID, errDevice, errService, errBroker, ca.Close()); err != nil {
		t.Fatal(err)
	}
}

// A key goes to another file and from there to a token, where it ends. The CA signs
// with it at each place, and the place before is empty.
func TestMoveKeys(t *testing.T) {
	uri, l := softToken(t), mustInit(t, true) // in the clear: scrypt is slow under the race detector
	dir, stick := l.CADir("a"), t.TempDir()
	first := filepath.Join(stick, "device.key")
	m := Move{Dir: dir, Base: "device-1", To: "file:" + first, New: ask("another passphrase")}
	got, err := m.Do()
	if err != nil || got.Cleared != filepath.Join(dir, "device-1.key") {
		t.Fatal(got, err)
	}
	if _, err := os.Stat(got.Cleared); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the old file is still there:", err)
	}
	ca := mustCA(t, dir, "another passphrase")
	if _, err := ca.EnrollDevice(1, csrOf(t, newKey(t)), "", time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := ca.Close(); err != nil {
		t.Fatal(err)
	}
	for base, old := range map[string]string{"device-1": "another passphrase", "root": "", "service": ""} {
		m := Move{Dir: dir, Base: base, To: uri(base), Old: ask(old), New: ask(softPIN)}
		if _, err := m.Do(); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Do(); err == nil || !strings.Contains(err.Error(), "there already") {
			t.Error(err)
		}
		if _, err := (&Move{Dir: dir, Base: base, To: "file:" + filepath.Join(stick, "back"), Old: ask(softPIN), New: ask(passA)}).Do(); !errors.Is(err, ErrOnToken) {
			t.Error(err)
		}
	}
	mustIssue(t, dir, "nobody asks for this one", softPIN)
	left, err := filepath.Glob(filepath.Join(dir, "*.key"))
	if err != nil || len(left) > 0 {
		t.Error(left, err)
	}
	if _, err := os.Stat(first); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// A place under another name is the same place: clearing it would lose the key.
func TestMoveToTheSamePlace(t *testing.T) {
	l := mustInit(t, true)
	dir := l.CADir("a")
	link := filepath.Join(t.TempDir(), "ca")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	hard := filepath.Join(t.TempDir(), "hard.key")
	if err := os.Link(filepath.Join(dir, "root.key"), hard); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{filepath.Join(dir, "root.key"), dir + "/../ca-a/root.key", filepath.Join(link, "root.key"), hard} {
		if _, err := (&Move{Dir: dir, Base: "root", To: "file:" + to, New: ask("long enough")}).Do(); err == nil || !strings.Contains(err.Error(), "there already") {
			t.Errorf("%s: %v", to, err)
		}
	}
	mustIssue(t, dir, "", "")
}

func TestMoveRefuses(t *testing.T) {
	uri, l := softToken(t), mustInit(t, true)
	dir, other := l.CADir("a"), filepath.Join(t.TempDir(), "other.key")
	if err := pki.WriteKey(other, newKey(t), nil); err != nil {
		t.Fatal(err)
	}
	taken, err := pki.CreateKey(uri("taken"), ask(softPIN))
	if err != nil {
		t.Fatal(err)
	}
	if err := pki.CloseKey(taken); err != nil { // the login is the process's: it would take any PIN
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		m    Move
		want string
	}{
		"no such CA":          {Move{Base: "device-7", To: uri("x")}, "no \"device-7\" in"},
		"a path as CA":        {Move{Base: "../ca-b/root", To: uri("x")}, "in"},
		"relative":            {Move{Base: "root", To: "file:root2.key"}, "absolute path"},
		"no URI":              {Move{Base: "root", To: "/root2.key"}, "not a file: or pkcs11: URI"},
		"wrong PIN":           {Move{Base: "root", To: uri("x"), New: ask("87654321")}, "wrong PIN"},
		"no token":            {Move{Base: "root", To: strings.Replace(uri("x"), "safe", "gone", 1), New: ask(softPIN)}, "is not there"},
		"another's key":       {Move{Base: "root", To: "file:" + other, New: ask("long enough")}, "it is another key"},
		"another's object":    {Move{Base: "root", To: uri("taken"), New: ask(softPIN)}, "it is another key"},
		"short":               {Move{Base: "root", To: "file:" + other + "2", New: ask("1234567")}, "shorter than 8 bytes"},
		"no directory for it": {Move{Base: "root", To: "file:/nowhere/root.key", New: ask("long enough")}, "no such file or directory"},
	} {
		c.m.Dir = dir
		if _, err := c.m.Do(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	encrypted := Move{Dir: mustInit(t, false).CADir("a"), Base: "root", To: uri("x"), Old: ask(passB), New: ask(softPIN)}
	if _, err := encrypted.Do(); !errors.Is(err, pki.ErrPassphrase) {
		t.Error(err)
	}
	for _, gone := range []string{uriSuffix, oldSuffix} {
		if list, err := filepath.Glob(filepath.Join(dir, "*"+gone)); err != nil || len(list) > 0 {
			t.Error("something was done:", list, err)
		}
	}
	mustIssue(t, dir, "", "")
}

// A move that ends in the middle is finished by the same move, wherever it ended, and
// at every such moment the CA signs.
func TestMoveInterrupted(t *testing.T) {
	uri := softToken(t)
	for i, to := range []func(dir string) string{
		func(dir string) string { return "file:" + filepath.Join(filepath.Dir(dir), "moved.key") },
		func(dir string) string { return uri("root") },
	} {
		for steps := range 3 {
			t.Run(fmt.Sprint(i, steps), func(t *testing.T) { moveInterrupted(t, to, steps, fmt.Sprintf("root%d%d", i, steps)) })
		}
	}
}

func moveInterrupted(t *testing.T, place func(dir string) string, steps int, object string) {
	dir := mustInit(t, true).CADir("a")
	to := strings.Replace(place(dir), "object=root", "object="+object, 1)
	m := Move{Dir: dir, Base: "root", To: to, New: ask(softPIN)}
	u, err := m.target()
	if err != nil {
		t.Fatal(err)
	}
	from, err := caURI(dir, "root")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.bring(from, u); err != nil {
		t.Fatal(err)
	}
	if steps > 0 {
		if err := durable.WriteFile(m.path(oldSuffix), []byte(from.String()+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if steps > 1 {
		if err := durable.WriteFile(m.path(uriSuffix), []byte(u.String()+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mustIssue(t, dir, softPIN, softPIN)
	list, err := ListCA(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range list {
		if (k.Old != "") != (k.Base == "root" && steps == 2) {
			t.Errorf("%s: old is %q", k.Base, k.Old)
		}
	}
	got, err := m.Do()
	if err != nil || got.Cleared != filepath.Join(dir, "root.key") {
		t.Fatal(got, err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "root.*")); err != nil || len(left) != 2 {
		t.Error(left, err)
	}
}

// The old file stays while the new place does not prove that it has the key.
func TestMoveProvesBeforeItClears(t *testing.T) {
	dir := mustInit(t, true).CADir("a")
	other := filepath.Join(t.TempDir(), "root.key")
	if err := pki.WriteKey(other, newKey(t), nil); err != nil {
		t.Fatal(err)
	}
	old := filepath.Join(dir, "root.key")
	for suffix, text := range map[string]string{oldSuffix: "file:" + old, uriSuffix: "file:" + other} {
		if err := os.WriteFile(filepath.Join(dir, "root"+suffix), []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := (&Move{Dir: dir, Base: "root", To: "file:" + other, New: ask("x")}).Do(); err == nil || !strings.Contains(err.Error(), "does not verify") {
		t.Error(err)
	}
	if _, err := os.Stat(old); err != nil {
		t.Error("the last copy was removed:", err)
	}
}

// URI files in the fleet's directory count by where they lead.
func TestURIFilesBesideTheServer(t *testing.T) {
	l := mustInit(t, true)
	for _, d := range []string{"a", "b"} {
		if err := os.RemoveAll(l.CADir(d)); err != nil {
			t.Fatal(err)
		}
	}
	key, pin := filepath.Join(t.TempDir(), "root.key"), filepath.Join(t.TempDir(), "pin")
	for _, path := range []string{key, pin} {
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const token = "pkcs11:token=a;object=b?module-path=/m"
	for text, want := range map[string][2]int{ // CA keys, tokens
		"file:" + key:                         {1, 0},
		"file:/nowhere/root.key":              {0, 0},
		"file:root.key":                       {1, 0},
		"garbage":                             {1, 0},
		token:                                 {0, 1},
		token + "&pin-source=file:" + pin:     {1, 1},
		token + "&pin-source=file:/nowhere/x": {0, 1},
	} {
		if err := os.WriteFile(filepath.Join(l.ServerDir(), "root.uri"), []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if keys, tokens := l.CAKeysPresent(), l.TokensNamed(); len(keys) != want[0] || len(tokens) != want[1] {
			t.Errorf("%s: %v, %v", text, keys, tokens)
		}
	}
}

func TestListCA(t *testing.T) {
	l := mustInit(t, false)
	trial := mustInit(t, true)
	safe := filepath.Join(t.TempDir(), "ca-a")
	if err := os.Rename(l.CADir("a"), safe); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		dir   string
		l     *Layout
		kept  Keeping
		reach Reach
	}{
		"in the safe":       {safe, l, KeptEncrypted, ReachNo},
		"beside the server": {l.CADir("b"), l, KeptEncrypted, ReachYes},
		"trial":             {trial.CADir("a"), trial, KeptInClear, ReachYes},
		"no fleet here":     {safe, nil, KeptEncrypted, ReachUnknown},
	} {
		list, err := ListCA(c.dir, c.l)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range list {
			if k.Kept != c.kept || k.Reach != c.reach || k.Signs == "" || k.Problem != "" || k.NotAfter.IsZero() {
				t.Errorf("%s: %+v", name, k)
			}
		}
	}
	if err := os.Remove(filepath.Join(safe, "root.key")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(safe, "device-1.uri"), []byte("pkcs11:token=a;object=b?module-path=/m\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	list, err := ListCA(safe, l)
	if err != nil || len(list) != 3 || list[0].Base != "device-1" || !strings.Contains(list[0].Problem, "readable by others") ||
		list[1].Kept != KeptNowhere || list[1].Problem == "" || list[2].Problem != "" {
		t.Errorf("%+v, %v", list, err)
	}
	if _, err := ListCA(l.ServerDir(), l); err == nil || !strings.Contains(err.Error(), "is no CA directory") {
		t.Error(err)
	}
}

// A new generation's key is kept like that of the one before: never in the clear
// because nobody was asked for a passphrase.
func TestNewGenerationIsKeptLikeTheLast(t *testing.T) {
	uri, l := softToken(t), mustInit(t, true)
	dir, stick := l.CADir("a"), t.TempDir()
	make := func(n uint32, pass string, want Keeping) {
		t.Helper()
		ca, err := OpenCA(dir, ask(pass))
		if err != nil {
			t.Fatal(err)
		}
		_, err = ca.MakeGeneration(n, "", time.Now())
		_, errAgain := ca.MakeGeneration(n, "", time.Now())
		if err := errors.Join(err, errAgain, ca.Close()); err != nil {
			t.Fatal(err)
		}
		list, err := ListCA(dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range list {
			if k.Base == generationBase(n) && (k.Kept != want || k.Problem != "") {
				t.Errorf("generation %d: %+v", n, k)
			}
		}
	}
	move := func(base, to, old, new string) {
		t.Helper()
		if _, err := (&Move{Dir: dir, Base: base, To: to, Old: ask(old), New: ask(new)}).Do(); err != nil {
			t.Fatal(err)
		}
	}
	make(2, "", KeptInClear)
	move("device-2", "file:"+filepath.Join(stick, "device-2.key"), "", softPIN)
	make(3, softPIN, KeptEncrypted)
	if _, err := os.Stat(filepath.Join(stick, "device-3.key")); err != nil {
		t.Error(err)
	}
	move("device-3", uri("device-3"), softPIN, softPIN)
	stray, err := pki.CreateKey(uri("device-4"), ask(softPIN))
	if err := errors.Join(err, pki.CloseKey(stray)); err != nil {
		t.Fatal(err)
	}
	ca := mustCA(t, dir, softPIN)
	if _, err := ca.MakeGeneration(4, "", time.Now()); !errors.Is(err, pki.ErrKeyThere) {
		t.Error("somebody's key became the CA's:", err)
	}
	if err := ca.Close(); err != nil {
		t.Fatal(err)
	}
	deleteFromToken(t, "device-4")
	if err := os.Remove(filepath.Join(dir, "device-4.uri")); err != nil {
		t.Fatal(err)
	}
	make(4, softPIN, KeptOnToken)
}

func deleteFromToken(t *testing.T, label string) {
	t.Helper()
	if _, err := exec.LookPath("pkcs11-tool"); err != nil {
		t.Skip("the program pkcs11-tool is missing")
	}
	for _, kind := range []string{"privkey", "pubkey"} {
		out, err := exec.Command("pkcs11-tool", "--module", softModule, "--login", "--pin", softPIN, "--delete-object", "--type", kind, "--label", label).CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
}

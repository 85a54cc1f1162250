package main

import (
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/pki"
)

func (a *app) caList() *cobra.Command {
	var dirs []string
	cmd := &cobra.Command{
		Use:   "list [--ca DIR ...]",
		Short: "tell where each CA key is, and whether the server could use it",
		Long: `list tells of each CA in the directories --ca, else of those in the fleet directory:
what it signs, when its certificate ends, how its key is kept (a file, encrypted or in
the clear, or a token), where, and whether the server could sign with it: yes when the
key lies in the fleet directory, or the directory of its CA does; "with its PIN" when
that directory names a token. It asks for no passphrase and no PIN.`,
		Example: `  hawser ca list --dir fleet
  hawser ca list --ca /media/safe/ca-a --ca /media/safe/ca-b --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.listCAs(cmd, dirs) },
	}
	cmd.Flags().StringArrayVar(&dirs, "ca", nil, "a CA directory; may be given again (default: those of the fleet)")
	return a.withJSON(cmd)
}

// caKey is what list says of a key with --json.
type caKey struct {
	CA          string    `json:"ca"` // directory
	Key         string    `json:"key"`
	Name        string    `json:"name"`
	Signs       string    `json:"signs"`
	Until       time.Time `json:"until"`
	Kept        string    `json:"kept"`
	URI         string    `json:"uri,omitempty"`
	ServerReads string    `json:"server_reads"` // yes, no, with its PIN, unknown
	Old         string    `json:"old,omitempty"`
	Problem     string    `json:"problem,omitempty"`
}

func (a *app) listCAs(cmd *cobra.Command, dirs []string) error {
	l, err := fleet.OpenLayout(a.dir)
	if err != nil && len(dirs) == 0 {
		return err
	} // at the safe there is no fleet directory, and none is needed
	if dirs == nil {
		dirs = ownCAs(l)
	}
	var list []caKey
	for _, dir := range dirs {
		keys, err := fleet.ListCA(dir, l)
		if err != nil {
			return err
		}
		for i := range keys {
			list = append(list, caKeyOf(&keys[i]))
		}
	}
	return emitAll(a, list, func() { a.tableKeys(list) })
}

// ownCAs are the CA directories that still lie where init made them.
func ownCAs(l *fleet.Layout) []string {
	dirs := []string{}
	for _, root := range []string{"a", "b"} {
		if _, err := os.Stat(l.CADir(root)); err == nil {
			dirs = append(dirs, l.CADir(root))
		}
	}
	return dirs
}

func caKeyOf(k *fleet.CAKey) caKey {
	out := caKey{CA: k.Dir, Key: k.Base, Name: k.Name, Signs: k.Signs, Until: admin.UTC(k.NotAfter), Kept: string(k.Kept),
		ServerReads: string(k.Reach), Old: k.Old, Problem: k.Problem}
	if k.URI != (pki.KeyURI{}) {
		out.URI = k.URI.String()
	}
	return out
}

func (a *app) tableKeys(list []caKey) {
	if len(list) == 0 {
		a.note("no CA directory lies in the fleet directory: as it should be in production\nhint: --ca DIR, at the safe")
		return
	}
	var rows [][]string
	for _, k := range list {
		rows = append(rows, []string{k.CA, k.Key, k.Signs, k.Until.Format("2006-01-02") + endsSoon(k.Until), k.Kept, k.ServerReads, k.URI})
	}
	a.table([]string{"CA", "KEY", "SIGNS", "UNTIL", "KEPT", "SERVER READS", "WHERE"}, rows)
	for _, k := range list {
		if k.Problem != "" {
			a.note("%s in %s: %s", k.Key, k.CA, printable(k.Problem))
		}
		if k.Old != "" {
			a.note("%s in %s was moved, and the place before is not cleared: %s\nhint: hawser ca move --ca %s --key %s --to %s",
				k.Key, k.CA, printable(k.Old), shellWord(k.CA), k.Key, shellWord(k.URI))
		}
	}
}

// keyMove is what move is told.
type keyMove struct {
	sign    signer
	key, to string
}

func (a *app) caMove() *cobra.Command {
	var m keyMove
	cmd := &cobra.Command{
		Use:   "move --ca DIR --key NAME --to URI",
		Short: "keep a CA key elsewhere: in another file, or on a token",
		Long: `move puts the key of one CA where --to says and notes that place in the CA directory
(NAME.uri), so that whatever signs finds it there. --to is

  file:PATH                                            another file, encrypted anew
  pkcs11:token=NAME;object=NAME?module-path=LIBRARY    a PKCS#11 token

The key in its new place has to make a signature that the CA's certificate verifies;
only then the old file is removed. It is not written over: on a journaling file system
or on flash that would prove nothing. If it ever lay in the clear, destroy the medium.
A move that was interrupted is finished by the same command.

A key on a token stays there: a token gives no key out, and one that was made on it has
no copy. With --passphrase-fd the first line is the passphrase of the key as it is, if
it has one, the next the new passphrase or the PIN. A wrong PIN is tried once: the token
counts and locks itself.`,
		Example: `  hawser ca move --ca ca-b --key root --to file:/media/other/root-b.key
  hawser ca move --ca ca-b --key root --to file:/media/b.key --passphrase-fd 3 3<passphrases
  hawser ca move --ca ca-a --key device-1 \
    --to 'pkcs11:token=safe;object=device-1?module-path=/usr/lib/softhsm/libsofthsm2.so'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			to, err := m.check(cmd)
			if err != nil {
				return err
			}
			return a.moveKey(&m, to)
		},
	}
	m.sign.flags(cmd)
	cmd.Flags().Lookup("ca").Usage = "directory of the CA: ca-a or ca-b"
	cmd.Flags().StringVar(&m.key, "key", "", "which key: root, device-1 (2, ...) or service")
	cmd.Flags().StringVar(&m.to, "to", "", "where to: file:PATH or pkcs11:...")
	// The error is that there is no such flag: there is, two lines above.
	_ = cmd.RegisterFlagCompletionFunc("key", cobra.FixedCompletions([]string{"root", "device-1", "service"}, cobra.ShellCompDirectiveNoFileComp))
	return a.withJSON(cmd)
}

// check refuses what can be told from the command line. A path is made absolute: the
// note in the CA directory has to mean the same from everywhere.
func (m *keyMove) check(cmd *cobra.Command) (pki.KeyURI, error) {
	if m.sign.dir == "" || m.key == "" || m.to == "" {
		return pki.KeyURI{}, usagef(cmd, "which key, and where to? --ca DIR --key NAME --to URI")
	}
	u, err := pki.ParseKeyURI(m.to)
	if err == nil && !u.OnToken() {
		u.Path, err = filepath.Abs(u.Path)
	}
	if err != nil {
		return u, usage(cmd, err)
	}
	return u, nil
}

// keyMoved is what move says with --json.
type keyMoved struct {
	Key     string `json:"key"`
	From    string `json:"from"`
	To      string `json:"to"`
	Removed string `json:"removed,omitempty"`
}

func (a *app) moveKey(m *keyMove, to pki.KeyURI) error {
	fresh := func() ([]byte, error) { return m.sign.pass.fresh(strings.TrimPrefix(to.String(), "file:")) }
	if to.OnToken() {
		fresh = func() ([]byte, error) { return m.sign.pass.pin(to.Token + to.Serial) }
	}
	move := fleet.Move{Dir: m.sign.dir, Base: m.key, To: to.String(), New: fresh,
		Old: func() ([]byte, error) { return m.sign.pass.known(m.sign.dir) }}
	done, err := move.Do()
	if err != nil {
		return err
	}
	v := keyMoved{Key: m.key, From: done.From, To: done.To, Removed: done.Cleared}
	return emitOne(a, v, func() {
		a.say("the key of %s is now at %s", m.key, printable(done.To))
		if done.Cleared != "" {
			a.say("%s is removed; its blocks may still be on the medium", printable(done.Cleared))
		}
	})
}

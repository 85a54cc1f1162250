package fleet

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"hawser/internal/durable"
	"hawser/internal/pki"
)

// The key of a CA is BASE.key beside BASE.crt, unless BASE.uri is there: a private
// file of one line, the key's URI. BASE.old is there while a key is being moved: it
// holds the URI of the place that is to be cleared.
const (
	certSuffix = ".crt"
	keySuffix  = ".key"
	uriSuffix  = ".uri"
	oldSuffix  = ".old"
)

// CAKey is where the key of one CA is, and what it is good for.
type CAKey struct {
	Dir      string
	Base     string // root, device-1, service
	Name     string // common name of the certificate
	Signs    string // what it signs, for people
	NotAfter time.Time
	URI      pki.KeyURI
	Kept     Keeping
	Problem  string // why the key could not be looked at; "" if it could
	Old      string // place that a move that was interrupted has not cleared; ""
	Reach    Reach
}

// Keeping is how a key is kept.
type Keeping string

// How a key is kept.
const (
	KeptEncrypted Keeping = "file, encrypted"
	KeptInClear   Keeping = "file in the clear"
	KeptOnToken   Keeping = "token"
	KeptNowhere   Keeping = "not found"
)

// Reach says whether the server of a fleet could sign with a key.
type Reach string

// Whether the server could use a key.
const (
	ReachNo      Reach = "no"
	ReachYes     Reach = "yes"
	ReachWithPIN Reach = "with its PIN" // the fleet's directory names the token
	ReachUnknown Reach = "unknown"      // there is no fleet directory here
)

// caURI says where the key of the CA called base is.
func caURI(dir, base string) (pki.KeyURI, error) {
	path := filepath.Join(dir, base+uriSuffix)
	u, err := readURI(path)
	if errors.Is(err, fs.ErrNotExist) {
		abs, err := filepath.Abs(filepath.Join(dir, base+keySuffix))
		return pki.KeyURI{Path: abs}, err
	}
	return u, err
}

// readURI reads a URI file. It names what signs, so nobody else may write it.
func readURI(path string) (pki.KeyURI, error) {
	if err := durable.CheckPrivate(path); err != nil {
		return pki.KeyURI{}, err
	}
	text, err := readBounded(path, maxKeyFile)
	if err != nil {
		return pki.KeyURI{}, err
	}
	u, err := pki.ParseKeyURI(strings.TrimSuffix(string(text), "\n"))
	if err == nil && !u.OnToken() && !filepath.IsAbs(u.Path) {
		err = errors.New("file: is not followed by an absolute path")
	}
	if err != nil {
		return pki.KeyURI{}, fmt.Errorf("%s: %w", path, err)
	}
	return u, nil
}

func readBounded(path string, limit int64) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > limit {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", path, info.Size(), limit)
	}
	return os.ReadFile(path)
}

// ListCA tells of each CA in a CA directory where its key is. It asks for no
// passphrase and for no PIN. l is the fleet whose server is asked about, or nil.
func ListCA(dir string, l *Layout) ([]CAKey, error) {
	bases, err := caBases(dir)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(bases, "root") {
		return nil, notCADir(dir, fs.ErrNotExist)
	}
	var list []CAKey
	for _, base := range bases {
		k, err := lookAt(dir, base, l)
		if err != nil {
			return nil, err
		}
		list = append(list, *k)
	}
	return list, nil
}

func notCADir(dir string, err error) error {
	return fmt.Errorf("%s is no CA directory: %w\nhint: --ca DIR names ca-a or ca-b as init made it", dir, err)
}

// caBases lists the CAs in dir by name.
func caBases(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, notCADir(dir, err)
	}
	var bases []string
	for _, e := range entries {
		if base, ok := strings.CutSuffix(e.Name(), certSuffix); ok && signs(base) != "" {
			bases = append(bases, base)
		}
	}
	return bases, nil
}

// signs says what the CA called base signs; "" if it is none.
func signs(base string) string {
	switch {
	case base == "root":
		return "broker certificates, anchor sets"
	case base == "service":
		return "services"
	case deviceGeneration(base) > 0:
		return "devices, stations"
	}
	return ""
}

func lookAt(dir, base string, l *Layout) (*CAKey, error) {
	cert, err := caCert(dir, base)
	if err != nil {
		return nil, err
	}
	k := &CAKey{Dir: dir, Base: base, Name: cert.Subject.CommonName, Signs: signs(base), NotAfter: cert.NotAfter, Kept: KeptNowhere, Reach: ReachUnknown}
	if old, err := readURI(filepath.Join(dir, base+oldSuffix)); err == nil {
		k.Old = old.String()
	}
	if k.URI, err = caURI(dir, base); err != nil {
		k.Problem = err.Error()
		return k, nil
	}
	if k.Old == k.URI.String() { // interrupted before the new place was the one
		k.Old = ""
	}
	k.Kept, err = keeping(k.URI)
	if err != nil {
		k.Problem = err.Error()
	}
	if l != nil {
		k.Reach = l.reach(k)
	}
	return k, nil
}

// caCert reads the certificate of the CA called base.
func caCert(dir, base string) (*x509.Certificate, error) {
	path := filepath.Join(dir, base+certSuffix)
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, missing(err)
	}
	cert, err := pki.ParseCert(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return cert, nil
}

func keeping(u pki.KeyURI) (Keeping, error) {
	if u.OnToken() {
		return KeptOnToken, nil
	}
	text, err := readBounded(u.Path, maxKeyFile)
	switch {
	case err != nil:
		return KeptNowhere, err
	case !pki.IsKey(text):
		return KeptNowhere, fmt.Errorf("%s holds no key", u.Path)
	case plainKey(text) != nil:
		return KeptInClear, nil
	}
	return KeptEncrypted, nil
}

// reach says whether whoever has the fleet's directory could sign with k.
func (l *Layout) reach(k *CAKey) Reach {
	switch {
	case k.URI.OnToken() && k.URI.PINSource != "" && l.holds(k.URI.PINSource):
		return ReachYes
	case k.URI.OnToken() && l.holds(k.Dir):
		return ReachWithPIN
	case !k.URI.OnToken() && k.Problem == "" && (l.holds(k.URI.Path) || l.holds(k.Dir)):
		return ReachYes
	}
	return ReachNo
}

// holds reports whether path, links followed, lies in the fleet's directory.
func (l *Layout) holds(path string) bool {
	root, err := filepath.EvalSymlinks(l.Dir)
	if err != nil {
		return true
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	if path, err = filepath.Abs(path); err != nil {
		return true
	}
	rel, err := filepath.Rel(root, path)
	return err != nil || rel != ".." && !strings.HasPrefix(rel, ".."+string(filepath.Separator))
}

package fleet

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"hawser/internal/pki"
)

// maxKeyFile is the size in bytes beyond which a file is not looked into for keys.
const maxKeyFile = 64 << 10

// maxDepth is how many directories below the fleet's own are searched.
const maxDepth = 6

// CAKeysPresent lists the files within the fleet directory, relative to it, that
// hold a CA key: any encrypted key (the server has none of its own), any key that
// belongs to one of the fleet's CA certificates, any key that cannot be read, and
// any URI file that leads to a key which this process could use. A URI file that
// names a token whose PIN is not here does not count: see TokensNamed.
// In production there must be none when the server starts. A directory that
// cannot be searched is listed too: what was not seen is not known to be absent.
func (l *Layout) CAKeysPresent() []string {
	var found []string
	l.search(".", maxDepth, l.isCAKey, &found)
	return found
}

// TokensNamed lists the URI files within the fleet directory that name a token. A
// thief of the server who has the token too needs nothing but its PIN.
func (l *Layout) TokensNamed() []string {
	var found []string
	l.search(".", maxDepth, func(path string) bool {
		u, err := readURI(path)
		return strings.HasSuffix(path, uriSuffix) && err == nil && u.OnToken()
	}, &found)
	return found
}

// search follows links, to directories too: a linked key is a key that is here.
// The depth ends what a link to a parent would make endless.
func (l *Layout) search(rel string, depth int, counts func(path string) bool, found *[]string) {
	path := filepath.Join(l.Dir, rel)
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist): // a dangling link, or gone since it was listed
	case err != nil:
		*found = append(*found, rel)
	case info.Mode().IsRegular():
		if info.Size() <= maxKeyFile && counts(path) {
			*found = append(*found, rel)
		}
	case info.IsDir() && path != l.LogDir() && depth > 0:
		entries, err := os.ReadDir(path)
		if err != nil {
			*found = append(*found, rel)
		}
		for _, e := range entries {
			l.search(filepath.Join(rel, e.Name()), depth-1, counts, found)
		}
	}
}

func (l *Layout) isCAKey(path string) bool {
	if strings.HasSuffix(path, uriSuffix) {
		return leadsToKey(path)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return true
	}
	if !pki.IsKey(text) {
		return false
	}
	key := plainKey(text)
	return key == nil || slices.ContainsFunc(l.cas(), func(c *x509.Certificate) bool { return key.PublicKey.Equal(c.PublicKey) })
}

// leadsToKey takes what cannot be judged for a key.
func leadsToKey(path string) bool {
	u, err := readURI(path)
	switch {
	case err != nil:
		return true
	case u.OnToken():
		return u.PINSource != "" && readable(u.PINSource)
	}
	return readable(u.Path)
}

// readable reports whether this process can read a file. One that does not exist
// cannot be: the medium with the key is not in the machine.
func readable(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	f.Close()
	return true
}

func (l *Layout) cas() []*x509.Certificate {
	t := l.Trust()
	return slices.Concat(t.BrokerRoots, t.DeviceCAs, t.ServiceCAs)
}

// plainKey reads an unencrypted EC key, PKCS#8 or as openssl ec writes it; nil if it is not one.
func plainKey(text []byte) *ecdsa.PrivateKey {
	for b, rest := pem.Decode(text); b != nil; b, rest = pem.Decode(rest) {
		if k, err := x509.ParsePKCS8PrivateKey(b.Bytes); err == nil {
			key, _ := k.(*ecdsa.PrivateKey)
			return key
		}
		if k, err := x509.ParseECPrivateKey(b.Bytes); err == nil {
			return k
		}
	}
	return nil
}

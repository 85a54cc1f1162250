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

	"hawser/internal/pki"
)

// maxKeyFile is the size in bytes beyond which a file is not looked into for keys.
const maxKeyFile = 64 << 10

// maxDepth is how many directories below the fleet's own are searched.
const maxDepth = 6

// CAKeysPresent lists the files within the fleet directory, relative to it, that
// hold a CA key: any encrypted key (the server has none of its own), any key that
// belongs to one of the fleet's CA certificates, and any key that cannot be read.
// In production there must be none when the server starts. A directory that
// cannot be searched is listed too: what was not seen is not known to be absent.
func (l *Layout) CAKeysPresent() []string {
	var found []string
	l.search(".", maxDepth, &found)
	return found
}

// search follows links, to directories too: a linked key is a key that is here.
// The depth ends what a link to a parent would make endless.
func (l *Layout) search(rel string, depth int, found *[]string) {
	path := filepath.Join(l.Dir, rel)
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist): // a dangling link, or gone since it was listed
	case err != nil:
		*found = append(*found, rel)
	case info.Mode().IsRegular():
		if info.Size() <= maxKeyFile && l.isCAKey(path) {
			*found = append(*found, rel)
		}
	case info.IsDir() && path != l.LogDir() && depth > 0:
		entries, err := os.ReadDir(path)
		if err != nil {
			*found = append(*found, rel)
		}
		for _, e := range entries {
			l.search(filepath.Join(rel, e.Name()), depth-1, found)
		}
	}
}

func (l *Layout) isCAKey(path string) bool {
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

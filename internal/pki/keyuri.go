package pki

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
)

// maxKeyURI is in bytes. A path has up to 4096, and there can be two.
const maxKeyURI = 10 << 10

// KeyURI says where a private key is: in a file, or on a PKCS#11 token. It holds
// no secret: it stands in configuration, arguments and error texts.
type KeyURI struct {
	Path string // the file; "" for a token

	// What follows is of a token (RFC 7512).
	Module    string // module-path: the driver, an absolute path
	Token     string // token: the label that the token was given; or
	Serial    string // serial, where two tokens have one label
	Object    string // object: the key's CKA_LABEL
	ID        string // id: the key's CKA_ID, raw bytes
	PINSource string // pin-source: a private file with the PIN in its first line; "" is to ask
}

// ParseKeyURI reads a key's URI: "file:" and a path, relative or absolute, or
// "pkcs11:token=NAME;object=NAME?module-path=PATH". An attribute that would not be
// looked at is refused, and so is pin-value: arguments are there for all to see.
func ParseKeyURI(s string) (KeyURI, error) {
	if len(s) > maxKeyURI {
		return KeyURI{}, fmt.Errorf("key URI of %d bytes is longer than %d", len(s), maxKeyURI)
	}
	if strings.ContainsAny(s, "\x00\r\n") {
		return KeyURI{}, errors.New("key URI is not one line")
	}
	if path, ok := strings.CutPrefix(s, "file:"); ok && path != "" {
		return KeyURI{Path: path}, nil
	}
	rest, ok := strings.CutPrefix(s, "pkcs11:")
	if !ok {
		return KeyURI{}, fmt.Errorf("key %q is not a file: or pkcs11: URI\nhint: file:PATH, or 'pkcs11:token=NAME;object=NAME?module-path=PATH'", s)
	}
	u, err := parseToken(rest)
	if err != nil {
		return KeyURI{}, fmt.Errorf("key URI: %w", err)
	}
	return u, nil
}

func parseToken(s string) (u KeyURI, err error) {
	path, query, _ := strings.Cut(s, "?")
	seen := map[string]bool{}
	if err := u.attributes(path, ";", pathAttribute, seen); err != nil {
		return u, err
	}
	if err := u.attributes(query, "&", queryAttribute, seen); err != nil {
		return u, err
	}
	return u, u.check()
}

// attributes sets each name=value of list; to says where a name goes, nil for nowhere.
func (u *KeyURI) attributes(list, separator string, to func(*KeyURI, string) *string, seen map[string]bool) error {
	if list == "" {
		return nil
	}
	for _, a := range strings.Split(list, separator) {
		name, text, ok := strings.Cut(a, "=")
		if name == "pin-value" { // before anything of a is shown
			return errors.New("pin-value is refused: an argument is there for all to see\nhint: leave it out and be asked, or use --passphrase-fd N or pin-source=file:PATH")
		}
		field := to(u, name)
		if !ok || field == nil {
			return fmt.Errorf("%q is none of token, serial, object, id, type=private before the \"?\" and module-path, pin-source after it", name)
		}
		value, err := url.PathUnescape(text)
		if err != nil || value == "" {
			return fmt.Errorf("the value of %s is empty or badly escaped", name)
		}
		if seen[name] {
			return fmt.Errorf("%s stands there twice", name)
		}
		seen[name], *field = true, value
		if name == "type" && value != "private" {
			return fmt.Errorf("type=%s is not a private key", value)
		}
	}
	return nil
}

func pathAttribute(u *KeyURI, name string) *string {
	switch name {
	case "token":
		return &u.Token
	case "serial":
		return &u.Serial
	case "object":
		return &u.Object
	case "id":
		return &u.ID
	case "type":
		return new(string)
	}
	return nil
}

func queryAttribute(u *KeyURI, name string) *string {
	switch name {
	case "module-path":
		return &u.Module
	case "pin-source":
		return &u.PINSource
	}
	return nil
}

func (u *KeyURI) check() error {
	u.PINSource = strings.TrimPrefix(u.PINSource, "file:")
	switch {
	case u.Token == "" && u.Serial == "":
		return errors.New("which token? token=NAME is missing")
	case u.Token != "" && u.Serial != "":
		return errors.New("token and serial together are one too many: the token is looked for by one of them")
	case u.Object == "" && u.ID == "":
		return errors.New("which key on the token? object=NAME or id=%01 is missing")
	case !filepath.IsAbs(u.Module):
		return errors.New("the token's driver is missing: ?module-path=/usr/lib/softhsm/libsofthsm2.so, an absolute path")
	case u.PINSource != "" && !filepath.IsAbs(u.PINSource):
		return errors.New("pin-source is not file: with an absolute path")
	case len(u.Token) > 32 || len(u.Serial) > 16 || len(u.Object) > 255 || len(u.ID) > 255:
		return errors.New("a token's label has up to 32 bytes, its serial 16, an object's label and id 255")
	}
	return nil
}

// OnToken reports whether the key is on a PKCS#11 token.
func (u KeyURI) OnToken() bool { return u.Path == "" }

// String gives the URI back; ParseKeyURI reads it.
func (u KeyURI) String() string {
	if !u.OnToken() {
		return "file:" + u.Path
	}
	var path []string
	for _, a := range [][2]string{{"token", u.Token}, {"serial", u.Serial}, {"object", u.Object}, {"id", u.ID}} {
		if a[1] != "" {
			path = append(path, a[0]+"="+escape(a[1], ""))
		}
	}
	s := "pkcs11:" + strings.Join(path, ";") + "?module-path=" + escape(u.Module, "/")
	if u.PINSource != "" {
		s += "&pin-source=file:" + escape(u.PINSource, "/")
	}
	return s
}

// escape leaves what RFC 3986 calls unreserved, and the bytes of also.
func escape(s, also string) string {
	var b strings.Builder
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("-._~"+also, c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// on names the token for people.
func (u KeyURI) on() string {
	if u.Token == "" {
		return fmt.Sprintf("token with serial %q", u.Serial)
	}
	return fmt.Sprintf("token %q", u.Token)
}

// object names the key on it.
func (u KeyURI) object() string {
	if u.Object == "" {
		return fmt.Sprintf("key with id %x", u.ID)
	}
	return fmt.Sprintf("key %q", u.Object)
}

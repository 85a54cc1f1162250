//go:build cgo

package pki

import (
	"bytes"
	"crypto"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"

	"github.com/ThalesGroup/crypto11"
	"github.com/miekg/pkcs11"
)

// tokenKey is a key that never leaves its token. It may be used concurrently.
type tokenKey struct {
	crypto11.Signer
	ctx  *crypto11.Context
	once sync.Once // crypto11 does not stand being closed twice
}

// Sign signs the SHA-256 of a message; the token draws the randomness. go-cose gives
// no opts: then the length alone speaks for the hash.
func (k *tokenKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts != nil && opts.HashFunc() != crypto.SHA256 || len(digest) != crypto.SHA256.Size() {
		return nil, errors.New("will sign with SHA-256 only")
	}
	signature, err := k.Signer.Sign(rand.Reader, digest, opts)
	if err != nil {
		return nil, fmt.Errorf("the token does not sign: %w", err)
	}
	return signature, nil
}

// Close ends the session with the token. Whoever closes it again gets nil.
func (k *tokenKey) Close() (err error) {
	k.once.Do(func() { err = k.ctx.Close() })
	return err
}

// login opens the token, after it was seen to be there: nobody is asked for a PIN
// that then goes nowhere, and none goes to the wrong token.
func (u *KeyURI) login(ask func() ([]byte, error)) (*crypto11.Context, error) {
	if _, err := os.Stat(u.Module); err != nil {
		return nil, fmt.Errorf("%w: %w\nhint: install the token's driver, or correct module-path", ErrModule, err)
	}
	// It stays open until the login is done, so that the module is loaded once.
	seen, err := crypto11.Configure(u.config("", true))
	if err != nil {
		return nil, u.tokenError(err)
	}
	defer seen.Close()
	pin, err := u.pin(ask)
	if err != nil {
		return nil, err
	}
	ctx, err := crypto11.Configure(u.config(pin, false))
	if err != nil {
		return nil, u.tokenError(err)
	}
	return ctx, nil
}

// config selects the token by its serial where that is known: crypto11 wants one of both.
func (u *KeyURI) config(pin string, look bool) *crypto11.Config {
	c := &crypto11.Config{Path: u.Module, Pin: pin, LoginNotSupported: look, MaxSessions: runtime.GOMAXPROCS(0) + 1}
	if c.TokenSerial = u.Serial; u.Serial == "" {
		c.TokenLabel = u.Token
	}
	return c
}

// tokenError says what a PKCS#11 error means for whoever typed the URI.
func (u *KeyURI) tokenError(err error) error {
	var rv pkcs11.Error
	switch {
	case !errors.As(err, &rv) && strings.HasSuffix(err.Error(), "could not find PKCS#11 token"):
		return fmt.Errorf("the %s %w\nhint: plug it in, or correct the URI; pkcs11-tool --module %s --list-slots", u.on(), ErrNoToken, u.Module)
	case !errors.As(err, &rv):
		return fmt.Errorf("%w: %s: %w", ErrModule, u.Module, err)
	case rv == pkcs11.CKR_PIN_INCORRECT || rv == pkcs11.CKR_PIN_LEN_RANGE || rv == pkcs11.CKR_PIN_INVALID:
		return fmt.Errorf("%w for the %s: it was tried once; the token counts wrong tries and locks itself after a few", ErrPIN, u.on())
	case rv == pkcs11.CKR_PIN_LOCKED:
		return fmt.Errorf("the PIN of the %s is locked after too many wrong tries\nhint: unlock it with its SO PIN or PUK, with the tool of its maker", u.on())
	}
	return fmt.Errorf("the %s: %w", u.on(), err)
}

func openToken(u *KeyURI, ask func() ([]byte, error)) (crypto.Signer, error) {
	ctx, err := u.login(ask)
	if err != nil {
		return nil, err
	}
	key, err := u.find(ctx)
	if err != nil {
		return nil, errors.Join(err, ctx.Close())
	}
	return &tokenKey{Signer: key, ctx: ctx}, nil
}

// find wants exactly one key: of two with one name it would be chance which one signs.
func (u *KeyURI) find(ctx *crypto11.Context) (crypto11.Signer, error) {
	keys, err := ctx.FindKeyPairs([]byte(u.ID), []byte(u.Object))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s on the %s: %w", u.object(), u.on(), err)
	case len(keys) == 0:
		return nil, fmt.Errorf("%s %w: the %s has none of that name with both halves", u.object(), ErrNoKey, u.on())
	case len(keys) > 1:
		return nil, fmt.Errorf("%d keys on the %s match the URI\nhint: give object and id", len(keys), u.on())
	}
	if _, err := p256(keys[0].Public()); err != nil {
		return nil, fmt.Errorf("%s on the %s: %w", u.object(), u.on(), err)
	}
	return keys[0], nil
}

func createOnToken(u *KeyURI, ask func() ([]byte, error)) (crypto.Signer, error) {
	ctx, err := u.login(ask)
	if err != nil {
		return nil, err
	}
	key, err := u.create(ctx)
	if err != nil {
		return nil, errors.Join(err, ctx.Close())
	}
	return &tokenKey{Signer: key, ctx: ctx}, nil
}

func (u *KeyURI) create(ctx *crypto11.Context) (crypto11.Signer, error) {
	if err := u.checkFree(ctx); err != nil {
		return nil, err
	}
	public, private, err := u.template()
	if err != nil {
		return nil, err
	}
	key, err := ctx.GenerateECDSAKeyPairWithAttributes(public, private, elliptic.P256())
	if err != nil {
		return nil, fmt.Errorf("make a key on the %s: %w", u.on(), err)
	}
	if err := u.checkNew(ctx, key); err != nil {
		return nil, errors.Join(err, key.Delete())
	}
	return key, nil
}

// checkFree refuses a name that is taken: then two keys would match the URI.
func (u *KeyURI) checkFree(ctx *crypto11.Context) error {
	there, err := ctx.FindPrivateKeys([]byte(u.ID), []byte(u.Object))
	if err != nil {
		return u.tokenError(err)
	}
	if len(there) > 0 {
		return fmt.Errorf("%s %w (%s)\nhint: choose another name; a key is never made over another", u.object(), ErrKeyThere, u.on())
	}
	return nil
}

// template says all that matters and leaves nothing to the token's defaults.
func (u *KeyURI) template() (public, private crypto11.AttributeSet, err error) {
	id := []byte(u.ID)
	if len(id) == 0 {
		id = make([]byte, 16)
		if _, err := rand.Read(id); err != nil {
			return nil, nil, fmt.Errorf("draw a key id: %w", err)
		}
	}
	public, private = crypto11.NewAttributeSet(), crypto11.NewAttributeSet()
	for _, s := range []crypto11.AttributeSet{public, private} {
		err = errors.Join(err, s.Set(crypto11.CkaId, id), s.Set(crypto11.CkaToken, true))
		if u.Object != "" {
			err = errors.Join(err, s.Set(crypto11.CkaLabel, []byte(u.Object)))
		}
	}
	return public, private, errors.Join(err, private.Set(crypto11.CkaPrivate, true), private.Set(crypto11.CkaSign, true),
		private.Set(crypto11.CkaSensitive, true), private.Set(crypto11.CkaExtractable, false))
}

// checkNew asks the token what it made: some take a template for a wish.
func (u *KeyURI) checkNew(ctx *crypto11.Context, key crypto11.Signer) error {
	set, err := ctx.GetAttributes(key, []crypto11.AttributeType{crypto11.CkaSensitive, crypto11.CkaExtractable})
	if err != nil {
		return fmt.Errorf("ask the %s about its new key: %w", u.on(), err)
	}
	if !isTrue(set[crypto11.CkaSensitive]) || isTrue(set[crypto11.CkaExtractable]) {
		return fmt.Errorf("the %s would give the key out: it made one that is not sensitive, or extractable", u.on())
	}
	pub, err := p256(key.Public())
	if err != nil {
		return err
	}
	return ProveKey(&tokenKey{Signer: key, ctx: ctx}, pub)
}

func isTrue(a *pkcs11.Attribute) bool { return a != nil && bytes.Trim(a.Value, "\x00") != nil }

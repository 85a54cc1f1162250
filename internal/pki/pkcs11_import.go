//go:build cgo

package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"

	"github.com/ThalesGroup/crypto11"
	"github.com/miekg/pkcs11"
)

// crypto11 makes keys on a token and does not bring one there: that is done here, in
// a session of its own beside the one that crypto11 logged in.

func importToToken(u *KeyURI, key *ecdsa.PrivateKey, ask func() ([]byte, error)) (crypto.Signer, error) {
	ctx, err := u.login(ask)
	if err != nil {
		return nil, err
	}
	moved, err := u.bring(ctx, key)
	if err != nil {
		return nil, errors.Join(err, ctx.Close())
	}
	return &tokenKey{Signer: moved, ctx: ctx}, nil
}

// bring leaves nothing on the token unless the key there was seen to be key.
func (u *KeyURI) bring(ctx *crypto11.Context, key *ecdsa.PrivateKey) (crypto11.Signer, error) {
	if err := u.checkFree(ctx); err != nil {
		return nil, err
	}
	private, public, err := u.halves(key)
	if err != nil {
		return nil, err
	}
	undo, err := u.store(private, public)
	if err != nil {
		return nil, fmt.Errorf("bring the key to the %s: %w", u.on(), err)
	}
	moved, err := u.find(ctx)
	if err == nil {
		err = u.checkMoved(ctx, moved, &key.PublicKey)
	}
	if err != nil {
		return nil, errors.Join(err, undo())
	}
	return moved, nil
}

func (u *KeyURI) checkMoved(ctx *crypto11.Context, moved crypto11.Signer, pub *ecdsa.PublicKey) error {
	if err := u.checkNew(ctx, moved); err != nil {
		return err
	}
	return ProveKey(&tokenKey{Signer: moved, ctx: ctx}, pub)
}

// halves are the two objects of a key pair (PKCS#11 v2.40, mechanisms 2.3.3 and 2.3.4).
func (u *KeyURI) halves(key *ecdsa.PrivateKey) (private, public []*pkcs11.Attribute, err error) {
	scalar, err := key.Bytes()
	if err != nil {
		return nil, nil, fmt.Errorf("key: %w", err)
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		return nil, nil, fmt.Errorf("key: %w", err)
	}
	wrapped, err := asn1.Marshal(point) // CKA_EC_POINT is the DER of an OCTET STRING
	if err != nil {
		return nil, nil, fmt.Errorf("key: %w", err)
	}
	curve, err := asn1.Marshal(asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7})
	if err != nil {
		return nil, nil, fmt.Errorf("key: %w", err)
	}
	both := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, curve), pkcs11.NewAttribute(pkcs11.CKA_ID, u.idFor(point)),
	}
	if u.Object != "" {
		both = append(both, pkcs11.NewAttribute(pkcs11.CKA_LABEL, u.Object))
	}
	private = append(both[:len(both):len(both)], pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE, scalar))
	public = append(both[:len(both):len(both)], pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true), pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, wrapped))
	return private, public, nil
}

// idFor gives the CKA_ID by which the halves find each other.
func (u *KeyURI) idFor(point []byte) []byte {
	if u.ID != "" {
		return []byte(u.ID)
	}
	sum := sha256.Sum256(point)
	return sum[:16]
}

// store writes both halves, or none. undo takes them away again.
func (u *KeyURI) store(private, public []*pkcs11.Attribute) (undo func() error, err error) {
	err = u.session(func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		first, err := p.CreateObject(s, private)
		if err != nil {
			return err
		}
		second, err := p.CreateObject(s, public)
		if err != nil {
			return errors.Join(err, p.DestroyObject(s, first))
		}
		undo = func() error {
			return u.session(func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
				return errors.Join(p.DestroyObject(s, first), p.DestroyObject(s, second))
			})
		}
		return nil
	})
	return undo, err
}

// session runs do in a session with the token; the caller holds the login, which is
// the process's, and with it the module initialized.
func (u *KeyURI) session(do func(*pkcs11.Ctx, pkcs11.SessionHandle) error) (err error) {
	p := pkcs11.New(u.Module)
	if p == nil {
		return ErrModule
	}
	defer p.Destroy()
	slot, err := u.slot(p)
	if err != nil {
		return err
	}
	s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return err
	}
	return errors.Join(do(p, s), p.CloseSession(s))
}

// slot is where the token is: the first that fits, which is what crypto11 takes.
func (u *KeyURI) slot(p *pkcs11.Ctx) (uint, error) {
	slots, err := p.GetSlotList(true)
	if err != nil {
		return 0, err
	}
	for _, slot := range slots {
		info, err := p.GetTokenInfo(slot)
		if err != nil {
			return 0, err
		}
		if u.Serial != "" && info.SerialNumber == u.Serial || u.Serial == "" && info.Label == u.Token {
			return slot, nil
		}
	}
	return 0, fmt.Errorf("the %s %w", u.on(), ErrNoToken)
}

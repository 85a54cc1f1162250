//go:build !cgo

package pki

import (
	"crypto"
	"crypto/ecdsa"
)

// A PKCS#11 module is a C library: without cgo there is no way to it.

func openToken(*KeyURI, func() ([]byte, error)) (crypto.Signer, error)     { return nil, ErrNoPKCS11 }
func createOnToken(*KeyURI, func() ([]byte, error)) (crypto.Signer, error) { return nil, ErrNoPKCS11 }
func importToToken(*KeyURI, *ecdsa.PrivateKey, func() ([]byte, error)) (crypto.Signer, error) {
	return nil, ErrNoPKCS11
}

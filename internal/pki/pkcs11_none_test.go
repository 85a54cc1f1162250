//go:build !cgo

package pki

import (
	"errors"
	"testing"
)

// A build without cgo says so of every token, and does all else.
func TestNoPKCS11(t *testing.T) {
	const uri = "pkcs11:token=safe;object=root?module-path=/usr/lib/softhsm/libsofthsm2.so"
	_, open := OpenKey(uri, ask("12345678"))
	_, create := CreateKey(uri, ask("12345678"))
	_, bring := ImportKey(uri, newKey(t), ask("12345678"))
	for _, err := range []error{open, create, bring} {
		if !errors.Is(err, ErrNoPKCS11) {
			t.Error(err)
		}
	}
}

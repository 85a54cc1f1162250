//go:build cgo

package pki

import (
	"crypto/elliptic"
	"strings"
	"testing"

	"github.com/ThalesGroup/crypto11"
)

// SoftHSM2 makes what it is told to; this is what a token that takes a template for a
// wish would leave.
func TestTokenThatWouldGiveKeysOut(t *testing.T) {
	uri := softToken(t)
	for object, attribute := range map[string]crypto11.AttributeType{"clear": crypto11.CkaSensitive, "loose": crypto11.CkaExtractable} {
		u, err := ParseKeyURI(uri(object))
		must(t, u, err)
		ctx, err := u.login(ask("12345678"))
		must(t, ctx, err)
		public, private, err := u.template()
		must(t, public, err)
		if err := private.Set(attribute, attribute == crypto11.CkaExtractable); err != nil {
			t.Fatal(err)
		}
		key, err := ctx.GenerateECDSAKeyPairWithAttributes(public, private, elliptic.P256())
		must(t, key, err)
		if err := u.checkNew(ctx, key); err == nil || !strings.Contains(err.Error(), "would give the key out") {
			t.Errorf("%s: %v", object, err)
		}
		if err := ctx.Close(); err != nil {
			t.Error(err)
		}
	}
}

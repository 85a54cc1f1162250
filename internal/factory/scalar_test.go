package factory

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"testing"
)

// TestPublicKeyFollowsFromTheScalar: the identity block holds no public key, since 32
// bytes of scalar give it: a unit that computes it at boot gets the one of its certificate.
func TestPublicKeyFollowsFromTheScalar(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	scalar, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	block, err := EncodeIdentity(0xABCD1234, scalar, 0)
	if err != nil {
		t.Fatal(err)
	}
	unit, err := ParseIdentity(block[:])
	if err != nil {
		t.Fatal(err)
	}
	again, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), unit.Scalar)
	if err != nil || !again.PublicKey.Equal(&key.PublicKey) {
		t.Errorf("%v: another public key", err)
	}
}

// The cost of the public key beside that of a signature, which a handshake needs anyway:
// what carries over to a microcontroller is the ratio, not the figure.
func BenchmarkPublicKeyFromScalar(b *testing.B) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	scalar, err := key.Bytes()
	if err != nil {
		b.Fatal(err)
	}
	b.Run("public key", func(b *testing.B) {
		for b.Loop() {
			if _, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), scalar); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("signature", func(b *testing.B) {
		for b.Loop() {
			if _, err := ecdsa.SignASN1(rand.Reader, key, scalar); err != nil {
				b.Fatal(err)
			}
		}
	})
}

package pki

import (
	"crypto/ecdsa"
	"testing"
	"time"
)

func BenchmarkIssueDevice(b *testing.B) {
	k, _ := GenerateKey()
	d, _ := GenerateKey()
	ca, err := IssueDeviceCA(k, Name{"Acme", "DE"}, 1, time.Now())
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := IssueDeviceLeaf(ca, 0xABCD1234, d.Public().(*ecdsa.PublicKey), time.Now()); err != nil {
			b.Fatal(err)
		}
	}
}

package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"os"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"hawser/internal/pki"
)

// scriptForge is the command "forge KIND BENCH OUT": it copies the bench's journal and adds
// a unit that no honest bench writes, in a line that is chained and signed as it should
// be. It writes the format from PROTOCOL.md, and uses nothing of internal/factory.
func scriptForge(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: forge KIND BENCH OUT")
	}
	station, err := pki.ParseKey([]byte(ts.ReadFile(args[1]+"/station.key")), nil)
	ts.Check(err)
	text := ts.ReadFile(args[1] + "/line1.journal")
	lines := strings.Split(strings.TrimSpace(text), "\n")
	f := forger{ts: ts, station: station, key: newForgedKey(ts)}
	f.open(lines)
	if args[0] == "byte" {
		ts.Check(writeScriptFile(ts, args[2], strings.Replace(text, "sensor-a", "sensor-b", 1)))
		return
	}
	sum := sha256.Sum256([]byte(lines[len(lines)-1]))
	line := fmt.Sprintf(`{"n":%d,"prev":"%x","time":"2026-07-01T12:00:00Z","what":"unit","block":"%s","id":"%s","how":"csr","csr":"%s","cert":"%s"}`,
		len(lines)+1, sum, f.block, f.id(args[0]), base64.StdEncoding.EncodeToString(f.request(args[0])), base64.StdEncoding.EncodeToString(f.leaf()))
	digest := sha256.Sum256([]byte("hawser-journal-v1\n" + line))
	sig, err := ecdsa.SignASN1(rand.Reader, station, digest[:])
	ts.Check(err)
	ts.Check(writeScriptFile(ts, args[2], text+strings.TrimSuffix(line, "}")+fmt.Sprintf(`,"sig":"%x"}`+"\n", sig)))
}

func writeScriptFile(ts *testscript.TestScript, name, text string) error {
	return os.WriteFile(ts.MkAbs(name), []byte(text), 0o600)
}

type forger struct {
	ts      *testscript.TestScript
	station *ecdsa.PrivateKey
	cert    *x509.Certificate // the station's
	key     *ecdsa.PrivateKey // the unit's
	block   string
	unit    string // the last id that the bench used
}

func newForgedKey(ts *testscript.TestScript) *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ts.Check(err)
	return k
}

// open reads what is needed out of an honest journal.
func (f *forger) open(lines []string) {
	for _, line := range lines {
		var v struct {
			What, Block, ID string
			Cert            []byte
		}
		f.ts.Check(json.Unmarshal([]byte(line), &v))
		switch v.What {
		case "begin":
			c, err := x509.ParseCertificate(v.Cert)
			f.ts.Check(err)
			f.cert = c
		case "block":
			f.block = v.Block
		case "unit":
			f.unit = v.ID
		}
	}
}

func (f *forger) id(kind string) string {
	switch kind {
	case "lower-case":
		return "abcd1234"
	case "twice":
		return f.unit
	}
	return "ABCD1234"
}

// request is the unit's certificate request, with what is wrong with it.
func (f *forger) request(kind string) []byte {
	var key any = f.key
	var err error
	switch kind {
	case "other-key":
		key = newForgedKey(f.ts)
	case "rsa":
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	case "p384":
		key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	}
	f.ts.Check(err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	f.ts.Check(err)
	if kind == "bad-signature" {
		der = bytes.Clone(der)
		der[len(der)-1] ^= 1
	}
	return der
}

// leaf is a certificate by the station, for ABCD1234.
func (f *forger) leaf() []byte {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
	f.ts.Check(err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: serial.SetBit(serial, 127, 1), SignatureAlgorithm: x509.ECDSAWithSHA256,
		NotBefore: f.cert.NotBefore.Add(time.Minute), NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, Subject: pkix.Name{CommonName: "ABCD1234"}}, f.cert, &f.key.PublicKey, f.station)
	f.ts.Check(err)
	return der
}

package check

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"hawser/internal/check/tls13"
	"hawser/internal/mqtt"
	"hawser/internal/pki"
)

const admitClause = "RFC 9846 4.5.2, 4.5.3; ETSI EN 303 645 5.5"

func barrier(id, does string, who func(p *intruder) (*tls13.Client, error)) BrokerCase {
	return BrokerCase{Case: Case{ID: id, Does: does, Expect: "refuses, without a CONNACK", Clause: admitClause}, try: func(p *intruder) error {
		k, err := who(p)
		if err != nil {
			return err
		}
		return p.mustNotEnter(k)
	}}
}

// mustNotEnter connects with k as the first device, and wants to be refused.
func (p *intruder) mustNotEnter(k *tls13.Client) error {
	modern := len(k.Suites) > 0
	c, err := p.dial(k)
	if err != nil {
		return p.refusedBy(c, err)
	}
	id := p.o.Device.Name
	if p.as != "" {
		id = p.as
	}
	_, err = p.login(c, hello{id: id})
	switch {
	case err == nil && modern && p.o.Profile == General:
		return p.settle(Warn, "it was let in: legitimate for a general broker, outside the profile of a microcontroller's")
	case err == nil:
		return p.settle(Fail, "it was let in: CONNACK came")
	case errors.Is(err, errRefused):
		return p.settle(Pass, "%v", err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return p.undecided()
	}
	return err
}

func (p *intruder) refusedBy(c *tls13.Conn, err error) error {
	if c == nil {
		return err
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return p.undecided()
	}
	c.Drain(p.left(p.o.Step)) // a broker that closes while we write has said why before
	return p.settle(Pass, "refused in the handshake: %s", c.Seen.EndText())
}

// forged is a certificate with the first device's name under a CA of our own; change
// spoils it further. Where twin is set, the CA has name and key id of the real one.
func forged(p *intruder, twin bool, change func(*draft)) (*Credentials, error) {
	key, err := pki.GenerateKey()
	if err != nil {
		return nil, err
	}
	ca, err := newAuthority("Somebody's device CA")
	if twin {
		ca, err = twinCA(p)
	}
	if err != nil {
		return nil, err
	}
	return forgeUnder(ca, p.o.Device.Name, key, change)
}

func forgeUnder(ca *authority, name string, key *ecdsa.PrivateKey, change func(*draft)) (*Credentials, error) {
	der, err := forgeLeaf(ca, name, key.Public(), change)
	if err != nil {
		return nil, err
	}
	return newCredentials(der, key)
}

func forgeLeaf(ca *authority, name string, pub any, change func(*draft)) ([]byte, error) {
	spki, err := spkiOf(pub)
	if err != nil {
		return nil, err
	}
	d := newDraft(ca, pkix.Name{CommonName: name}, spki)
	d.ext = []pkix.Extension{keyUsage(0), extUsage(clientAuth), authorityKey(ca.ski)}
	if change != nil {
		change(d)
	}
	return d.sign(ca.key)
}

func forgery(id, does string, twin bool, change func(*draft)) BrokerCase {
	return barrier(id, does, func(p *intruder) (*tls13.Client, error) {
		who, err := forged(p, twin, change)
		if err != nil {
			return nil, err
		}
		return p.client(who), nil
	})
}

// kindred is a certificate that the devices' CA itself has signed, if one was given, and
// that is unfit; otherwise one that is unfit under a twin of that CA.
func kindred(id, does, flag string, own func(o *BrokerOptions) *Credentials, change func(*draft)) BrokerCase {
	return barrier(id, does, func(p *intruder) (*tls13.Client, error) {
		if who := own(p.o); who != nil {
			p.as = who.Name
			return p.client(who), nil
		}
		p.note = "forged under a twin of the CA; " + flag + " shows one of the CA itself"
		who, err := forged(p, true, change)
		if err != nil {
			return nil, err
		}
		return p.client(who), nil
	})
}

// twinCA is a CA with name and key id of that of the devices.
func twinCA(p *intruder) (*authority, error) {
	ca, err := newAuthority("Somebody's device CA")
	if err != nil {
		return nil, err
	}
	i := p.o.Device.cert.Issuer
	ca.name = pkix.Name{CommonName: i.CommonName, Organization: i.Organization, Country: i.Country}
	ca.ski = p.o.Device.cert.AuthorityKeyId
	return ca, nil
}

// otherKind is a client whose key is none of the profile.
func otherKind(p *intruder, key crypto.Signer) (*tls13.Client, error) {
	ca, err := twinCA(p)
	if err != nil {
		return nil, err
	}
	der, err := forgeLeaf(ca, p.o.Device.Name, key.Public(), nil)
	k := p.client(nil)
	k.Chain, k.Key = [][]byte{der}, key
	return k, err
}

// strangerCases: who must not come in at all.
func strangerCases() []BrokerCase {
	return []BrokerCase{
		barrier("B1.no-certificate", "a client without a certificate", func(p *intruder) (*tls13.Client, error) { return p.client(nil), nil }),
		forgery("B1.other-ca", "the device's name under another CA", false, nil),
		forgery("B1.twin-ca", "the device's name under a CA with the real one's name and key id", true, nil),
		kindred("B1.expired", "a certificate that has ended", "--expired", func(o *BrokerOptions) *Credentials { return o.Expired },
			func(d *draft) { d.to = time.Now().AddDate(0, 0, -1) }),
		kindred("B1.server-auth", "a certificate for serverAuth only", "--server-auth", func(o *BrokerOptions) *Credentials { return o.Server },
			func(d *draft) { d.ext = replaced(d.ext, extUsage(serverAuth)) }),
		barrier("B1.p384", "a certificate with a P-384 key, under a CA with the real one's name and key id", func(p *intruder) (*tls13.Client, error) {
			key, err := p384()
			if err != nil {
				return nil, err
			}
			return otherKind(p, key)
		}),
		barrier("B1.rsa", "a certificate with an RSA key, under a CA with the real one's name and key id", func(p *intruder) (*tls13.Client, error) {
			key, err := rsa.GenerateKey(rand.Reader, 2048)
			if err != nil {
				return nil, err
			}
			return otherKind(p, key)
		}),
		barrier("B1.self-signed", "the device's name, signed by itself", selfSignedClient),
		barrier("B2.wrong-key", "the device's own certificate, without its key", func(p *intruder) (*tls13.Client, error) {
			key, err := pki.GenerateKey()
			k := p.client(p.o.Device)
			k.Key = key
			return k, err
		}),
		barrier("B2.verify-omitted", "the device's certificate, and no CertificateVerify", func(p *intruder) (*tls13.Client, error) {
			k := p.client(p.o.Device)
			k.Say = instead(tls13.CertificateVerify, omit)
			return k, nil
		}),
		barrier("B2.verify-server", "a CertificateVerify made in the server's role", func(p *intruder) (*tls13.Client, error) {
			k := p.client(p.o.Device)
			k.Sign = func(content []byte) (uint16, []byte, error) {
				return tls13.Sign(p.o.Device.Key, tls13.VerifyContent("server", content[len(content)-sha256.Size:]))
			}
			return k, nil
		}),
		barrier("B2.verify-replayed", "a CertificateVerify of another handshake", func(p *intruder) (*tls13.Client, error) {
			k := p.client(p.o.Device)
			k.Sign = func([]byte) (uint16, []byte, error) {
				return tls13.Sign(p.o.Device.Key, tls13.VerifyContent("client", make([]byte, sha256.Size)))
			}
			return k, nil
		}),
		barrier("B2.verify-zero", "a CertificateVerify whose r and s are 0", func(p *intruder) (*tls13.Client, error) {
			k := p.client(p.o.Device)
			k.Sign = func([]byte) (uint16, []byte, error) {
				return tls13.ECDSAP256, []byte{0x30, 6, 2, 1, 0, 2, 1, 0}, nil
			}
			return k, nil
		}),
		barrier("B2.finished", "a Finished with one bit changed", func(p *intruder) (*tls13.Client, error) {
			k := p.client(p.o.Device)
			k.Say = instead(tls13.Finished, flipLast)
			return k, nil
		}),
		barrier("B2.finished-omitted", "no Finished, and MQTT", func(p *intruder) (*tls13.Client, error) {
			k := p.client(p.o.Device)
			k.Say = instead(tls13.Finished, omit)
			return k, nil
		}),
		{Case: Case{ID: "B1.revoked", Does: "a device that was revoked", Expect: "refuses, without a CONNACK", Clause: admitClause},
			needs: func(o *BrokerOptions) string { return given(o.Revoked, "--revoked") },
			try: func(p *intruder) error {
				g, err := p.join(p.o.Revoked, hello{id: p.o.Revoked.Name})
				return p.judgeEntry(g, err)
			}},
	}
}

// suiteCases: who speaks another TLS.
func suiteCases() []BrokerCase {
	cases := []BrokerCase{
		barrier("B3.aes256", "a client that knows nothing but TLS_AES_256_GCM_SHA384", func(p *intruder) (*tls13.Client, error) {
			k := p.client(p.o.Device)
			k.Suites = []uint16{tls13.AES256}
			return k, nil
		}),
		barrier("B3.draft-version", "a client of a TLS version that does not exist", func(p *intruder) (*tls13.Client, error) {
			k := p.client(p.o.Device)
			k.Versions = []uint16{0x0305}
			return k, nil
		}),
		{Case: Case{ID: "B3.other-suites", Does: "a client that knows nothing but CCM and a suite that does not exist", Expect: "refuses, without a ServerHello", Clause: "RFC 9846 9.1, 4.2.1"},
			try: otherSuites},
	}
	for i, v := range []struct {
		name string
		max  uint16
	}{{"1.2", tls.VersionTLS12}, {"1.1", tls.VersionTLS11}, {"1.0", tls.VersionTLS10}} {
		cases = append(cases, BrokerCase{Case: Case{ID: fmt.Sprintf("B3.tls1%d", 2-i), Does: "a client that knows nothing newer than TLS " + v.name,
			Expect: "refuses, without a CONNACK", Clause: "RFC 9325 3.1.1; RFC 8996"}, try: func(p *intruder) error { return p.old(v.max) }})
	}
	return cases
}

func given(c *Credentials, flag string) string {
	if c == nil {
		return "not given: " + flag
	}
	return ""
}

func (p *intruder) judgeEntry(g *guest, err error) error {
	switch {
	case err == nil && g != nil:
		return p.settle(Fail, "it was let in: CONNACK came")
	case errors.Is(err, errRefused):
		return p.settle(Pass, "%v", err)
	}
	return err
}

func selfSignedClient(p *intruder) (*tls13.Client, error) {
	key, err := pki.GenerateKey()
	if err != nil {
		return nil, err
	}
	ca := &authority{name: pkix.Name{CommonName: p.o.Device.Name}, ski: []byte("self"), key: key}
	who, err := forgeUnder(ca, p.o.Device.Name, key, nil)
	if err != nil {
		return nil, err
	}
	return p.client(who), nil
}

// otherSuites offers what is not spoken here: a ServerHello is already an answer too much.
func otherSuites(p *intruder) error {
	k := p.client(p.o.Device)
	k.Suites = []uint16{0x1304, 0x1305, 0x2a2a}
	raw, err := p.tcp()
	if err != nil {
		return err
	}
	c := &tls13.Conn{Raw: raw}
	p.last = c
	a, err := k.Handshake(c)
	switch {
	case a != nil && p.o.Profile == General && (a.Suite == 0x1304 || a.Suite == 0x1305):
		return p.settle(Warn, "it chose suite %#04x: legitimate for a general broker, outside the profile of a microcontroller's", a.Suite)
	case a != nil && a.Suite != 0:
		return p.settle(Fail, "it chose suite %#04x", a.Suite)
	}
	return p.refusedBy(c, err)
}

// old plays a client of an older TLS with the standard library.
func (p *intruder) old(max uint16) error {
	raw, err := p.tcp()
	if err != nil {
		return err
	}
	c := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, ServerName: p.o.Name, MinVersion: tls.VersionTLS10, MaxVersion: max, CipherSuites: allSuites(),
		Certificates: []tls.Certificate{{Certificate: [][]byte{p.o.Device.DER}, PrivateKey: p.o.Device.Key}}})
	if err := c.Handshake(); err != nil {
		return p.refusedOld("in the handshake", err)
	}
	connect := &mqtt.Connect{Version: mqtt.V311, CleanStart: true, ClientID: p.o.Device.Name}
	if _, err := c.Write(connect.Append(nil, mqtt.V311)); err != nil {
		return p.refusedOld("at CONNECT", err)
	}
	buf := make([]byte, 4)
	if _, err := io.ReadFull(c, buf); err != nil { // TLS 1.0 brings it in two records
		return p.refusedOld("after the handshake", err)
	}
	if buf[0] == 0x20 && buf[3] == 0 {
		if max == tls.VersionTLS12 && p.o.Profile == General {
			return p.settle(Warn, "it was let in over TLS 1.2: legitimate for a general broker, outside the profile of a microcontroller's")
		}
		return p.settle(Fail, "it was let in over %s", tls.VersionName(c.ConnectionState().Version))
	}
	return p.settle(Pass, "refused in CONNACK")
}

func (p *intruder) undecided() error {
	return p.settle(Inconclusive, "neither let in nor refused within %v", p.o.Step)
}

func (p *intruder) refusedOld(where string, err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return p.undecided()
	}
	return p.settle(Pass, "refused %s: %v", where, err)
}

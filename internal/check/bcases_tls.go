package check

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"os"
	"time"

	"hawser/internal/check/tls13"
	"hawser/internal/mqtt"
	"hawser/internal/pki"
)

func honestBroker() BrokerCase {
	return BrokerCase{Case: Case{ID: "B0.honest", Does: "two devices use the broker as they may", Expect: "serves them", Clause: "MQTT 3.1"},
		try: func(p *intruder) error {
			a, err := p.join(p.o.Device, hello{id: p.o.Device.Name})
			if err != nil {
				return p.settle(Fail, "the first device is not let in: %v", err)
			}
			b, err := p.join(p.o.Other, hello{id: p.o.Other.Name})
			if err != nil {
				return p.settle(Fail, "the second device is not let in: %v", err)
			}
			for who, g := range map[*Credentials]*guest{p.o.Device: a, p.o.Other: b} {
				if ok, err := g.subscribe(p.filter(who)); err != nil || !ok[0] {
					return p.settle(Fail, "%s may not subscribe to its own topics: %v", who.Name, err)
				}
				if ok, err := g.publish(mqtt.Publish{Topic: []byte(p.topic(who, "check/honest")), QoS: 1, Payload: []byte("x")}); err != nil || !ok {
					return p.settle(Fail, "%s may not publish to its own topics: %v", who.Name, err)
				}
			}
			return p.settle(Pass, "both connect, publish and subscribe under their own topics")
		}}
}

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
	_, err = p.login(c, hello{id: p.o.Device.Name})
	switch {
	case err == nil && modern && p.o.Profile == General:
		return p.settle(Warn, "it was let in: legitimate for a general broker, outside the profile of a microcontroller's")
	case err == nil:
		return p.settle(Fail, "it was let in: CONNACK came")
	case errors.Is(err, errRefused):
		return p.settle(Pass, "%v", err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return p.settle(Inconclusive, "neither let in nor refused within %v", p.o.Step)
	}
	return err
}

func (p *intruder) refusedBy(c *tls13.Conn, err error) error {
	if c == nil {
		return err
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return p.settle(Inconclusive, "neither let in nor refused within %v", p.o.Step)
	}
	c.Drain(p.o.Step) // a broker that closes while we write has said why before
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
	if err != nil {
		return nil, err
	}
	real := p.o.Device.cert
	if twin {
		i := real.Issuer
		ca.name = pkix.Name{CommonName: i.CommonName, Organization: i.Organization, Country: i.Country}
		ca.ski = real.AuthorityKeyId
	}
	return forgeUnder(ca, p.o.Device.Name, key, change)
}

func forgeUnder(ca *authority, name string, key *ecdsa.PrivateKey, change func(*draft)) (*Credentials, error) {
	spki, err := spkiOf(key.Public())
	if err != nil {
		return nil, err
	}
	d := newDraft(ca, pkix.Name{CommonName: name}, spki)
	d.ext = []pkix.Extension{keyUsage(0), extUsage(clientAuth), authorityKey(ca.ski)}
	if change != nil {
		change(d)
	}
	der, err := d.sign(ca.key)
	if err != nil {
		return nil, err
	}
	return newCredentials(der, key)
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

// strangerCases: who must not come in at all.
func strangerCases() []BrokerCase {
	cases := []BrokerCase{
		barrier("B1.no-certificate", "a client without a certificate", func(p *intruder) (*tls13.Client, error) { return p.client(nil), nil }),
		forgery("B1.other-ca", "the device's name under another CA", false, nil),
		forgery("B1.twin-ca", "the device's name under a CA with the real one's name and key id", true, nil),
		forgery("B1.expired", "the same, and ended yesterday", true, func(d *draft) { d.to = time.Now().AddDate(0, 0, -1) }),
		forgery("B1.server-auth", "the same, for serverAuth only", true, func(d *draft) { d.ext = replaced(d.ext, extUsage(serverAuth)) }),
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
			k.Sign = func([]byte) (uint16, []byte, error) {
				return tls13.Sign(p.o.Device.Key, tls13.VerifyContent("server", make([]byte, 32)))
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
		{Case: Case{ID: "B1.revoked", Does: "a device that was revoked", Expect: "refuses, without a CONNACK", Clause: admitClause},
			needs: func(o *BrokerOptions) string { return given(o.Revoked, "--revoked") },
			try: func(p *intruder) error {
				g, err := p.join(p.o.Revoked, hello{id: p.o.Revoked.Name})
				return p.judgeEntry(g, err)
			}},
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

// old plays a client of an older TLS with the standard library.
func (p *intruder) old(max uint16) error {
	raw, err := p.tcp()
	if err != nil {
		return err
	}
	c := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, ServerName: p.o.Name, MinVersion: tls.VersionTLS10, MaxVersion: max, CipherSuites: allSuites(),
		Certificates: []tls.Certificate{{Certificate: [][]byte{p.o.Device.DER}, PrivateKey: p.o.Device.Key}}})
	if err := c.Handshake(); err != nil {
		return p.settle(Pass, "refused in the handshake: %v", err)
	}
	connect := &mqtt.Connect{Version: mqtt.V311, CleanStart: true, ClientID: p.o.Device.Name}
	if _, err := c.Write(connect.Append(nil, mqtt.V311)); err != nil {
		return p.settle(Pass, "refused: %v", err)
	}
	buf := make([]byte, 4)
	if n, err := c.Read(buf); err != nil {
		return p.settle(Pass, "refused after the handshake: %v", err)
	} else if n >= 4 && buf[0] == 0x20 && buf[3] == 0 {
		if max == tls.VersionTLS12 && p.o.Profile == General {
			return p.settle(Warn, "it was let in over TLS 1.2: legitimate for a general broker, outside the profile of a microcontroller's")
		}
		return p.settle(Fail, "it was let in over %s", tls.VersionName(c.ConnectionState().Version))
	}
	return p.settle(Pass, "refused in CONNACK")
}

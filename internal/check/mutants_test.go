package check

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"maps"
	"net"
	"slices"
	"strings"
	"time"
)

// Each mutant is the strict subject with the flaws that its name lists, joined by "+", or
// a client of Go's crypto/tls whose name begins with "go". killers says which of them a
// case must turn red, separated by spaces.
func killers() map[string]string {
	all := map[string]string{}
	for _, part := range []map[string]string{certificateKillers(), helloKillers(), recordKillers(), packetKillers()} {
		maps.Copy(all, part)
	}
	return all
}

func certificateKillers() map[string]string {
	return map[string]string{
		"X1.unknown-ca":            "partial-chain no-trust go-insecure go-name-not-chain",
		"X1.self-signed":           "self-signed no-trust go-insecure",
		"X1.other-key":             "no-verify",
		"X1.unknown-ca-sent":       "sent-root no-trust go-insecure",
		"X2.twin":                  "pins-by-name no-trust go-name-not-chain",
		"X2.twin-sent":             "pins-by-name no-trust",
		"X3.other-host":            "no-name no-trust go-insecure go-chain-not-name",
		"X3.longer-host":           "prefix no-name",
		"X3.suffix":                "suffix no-name",
		"X3.nul":                   "c-string no-name",
		"X3.very-large-san":        "long-san no-name",
		"X4.common-name":           "cn-fallback no-name",
		"X4.common-name-beside":    "cn-always no-name",
		"X5.wrong-ip":              "any-address no-name go-chain-not-name",
		"X5.ip-as-name":            "address-is-name no-name",
		"X5.wildcard-across":       "star-crosses no-name",
		"X5.wildcard-none":         "star-is-nothing no-name",
		"X5.wildcard-embedded":     "star-in-label no-name",
		"X5.wildcard-top":          "star-on-top no-name",
		"X6.expired":               "no-end no-trust",
		"X6.not-yet":               "no-begin no-trust go-no-dates",
		"X7.client-auth":           "no-purpose no-trust go-no-purpose",
		"X7.code-signing":          "no-purpose go-no-purpose",
		"X7.empty-usage":           "empty-purpose no-purpose",
		"X7.no-signature":          "no-key-usage go",
		"X8.leaf-issuer":           "any-issuer no-trust",
		"X8.ca-false":              "ca-false any-issuer",
		"X8.no-constraints":        "no-constraints any-issuer",
		"X8.no-cert-sign":          "no-cert-sign any-issuer",
		"X9.malformed-constraints": "lax-constraints any-issuer",
		"X10.path-length":          "no-path-length any-issuer",
		"X10.critical-ca":          "no-critical-ca no-trust",
		"X10.critical-leaf":        "no-critical-leaf no-trust",
		"X11.name-constraint":      "no-name-constraints no-trust",
		"X12.rsa":                  "go",
		"X12.p384":                 "go",
		"X12.p384-ca":              "go",
		"X12.sha1":                 "sha1 no-trust",
		"X12.explicit-curve":       "any-parameters",
		"X12.zero-point":           "bad-key",
		"X12.infinity":             "bad-key",
		"X12.off-curve":            "bad-key",
		"X13.empty":                "empty-chain",
		"X13.root-first":           "sorts",
		"X13.missing-intermediate": "partial-chain no-trust",
		"X13.huge":                 "long-chain no-trust",
		"X13.deep":                 "any-depth go",
		"X13.larger":               "small-buffer",
		"C1.stale-root":            "sent-root no-trust go-insecure",
		"C1.standby-root":          "root-a-only",
		"C2.early-data":            "early-data",
		"C2.psk-chosen":            "unsolicited-psk",
		"C2.early-accepted":        "unsolicited-early",
	}
}

func helloKillers() map[string]string {
	return map[string]string{
		"H1.bad":               "no-verify",
		"H1.empty":             "empty-signature no-verify",
		"H1.zero":              "zero-signature no-verify",
		"H1.other-transcript":  "no-transcript no-verify",
		"H1.client-role":       "any-role no-verify",
		"H1.omitted":           "no-verify",
		"H1.hidden":            "no-verify+no-finished",
		"H1.no-certificate":    "anonymous",
		"H2.altered":           "no-finished",
		"H2.omitted":           "data-ends",
		"H2.short":             "short-finished no-finished",
		"H2.empty":             "empty-finished no-finished",
		"H3.tls12":             "go",
		"H3.tls11":             "go-any-version",
		"H3.tls10":             "go-any-version",
		"H3.sentinel":          "go-downgraded",
		"H3.draft":             "any-draft",
		"H4.chacha":            "suite-1303",
		"H4.ccm":               "suite-1304",
		"H4.ccm8":              "suite-1305",
		"H4.grease":            "suite-0a0a",
		"H4.null":              "suite-0000",
		"H4.integrity-only":    "suite-c0b4",
		"H4.aes256":            "suite-1302 go",
		"H5.unoffered-group":   "retry-group",
		"H5.no-change":         "retry-nothing",
		"H5.twice":             "retry-twice",
		"H5.suite-changed":     "retry-suite",
		"H5.huge-cookie":       "crash-cookie",
		"H6.off-curve":         "x-only",
		"H6.infinity":          "zero-secret",
		"H6.short":             "pads",
		"H6.declared":          "clamps",
		"H6.other-group":       "any-group",
		"H7.hello":             "unsolicited-hello",
		"H7.encrypted":         "unsolicited-encrypted",
		"H7.alpn":              "unsolicited-alpn",
		"H7.compressed":        "compression",
		"H7.session":           "any-session",
		"H8.across-keys":       "across-keys",
		"H8.data-first":        "data-first",
		"H8.two-hellos":        "clear-skip",
		"H8.late-ccs":          "late-ccs",
		"H8.certificate-twice": "repeats",
		"H9.connack":           "plain-fallback",
		"H9.http":              "plain-fallback",
		"H9.noise":             "plain-fallback",
	}
}

func recordKillers() map[string]string {
	return map[string]string{
		"R1.bytes":               "one-read",
		"R1.fragments":           "one-record-message",
		"R1.padding":             "no-padding",
		"R1.coalesced":           "one-message-record",
		"R2.zero-handshake":      "empty-fragment",
		"R2.zero-data":           "empty-is-end",
		"R3.over-plain":          "over-plain",
		"R3.over-limit":          "no-limit",
		"R3.over-cipher":         "over-cipher",
		"R3.bad-tag":             "no-tag",
		"R3.replay":              "replay",
		"R3.clear":               "clear-data",
		"R3.clear-handshake":     "clear-later",
		"R3.no-type":             "all-zero",
		"R4.update":              "crash-update",
		"R4.early":               "early-update",
		"R4.malformed":           "any-update",
		"R4.flood":               "crash-updates",
		"R5.one":                 "no-tickets",
		"R5.four":                "no-tickets",
		"R5.flood":               "crash-tickets",
		"R6.hello-request":       "ignores-request",
		"R6.certificate-request": "answers-request ignores-certificate-request",
		"R6.server-hello":        "ignores-hello",
		"R7.stall-tcp":           "waits-for-ever",
		"R7.stall-hello":         "waits-for-ever",
		"R7.stall-certificate":   "waits-for-ever",
		"R7.stall-finished":      "waits-for-ever",
		"R7.rst-tcp":             "no-retry",
		"R7.rst-hello":           "no-retry",
		"R7.rst-certificate":     "no-retry",
		"R7.rst-finished":        "no-retry",
		"R7.fin-tcp":             "no-retry",
		"R7.fin-hello":           "no-retry",
		"R7.fin-certificate":     "no-retry",
		"R7.fin-finished":        "no-retry",
		"R7.half-open":           "ignores-end",
	}
}

func packetKillers() map[string]string {
	return map[string]string{
		"A1.honest":        "root-b-only",
		"A2.name":          "wrong-sni",
		"M1.type":          "type-crash",
		"M1.flags":         "flags-crash",
		"M1.qos3":          "qos-crash",
		"M1.length5":       "long-length",
		"M1.length-max":    "trusts-length",
		"M1.topic":         "trusts-topic",
		"M1.early":         "early-crash",
		"M1.connack-short": "connack-crash",
		"M1.utf8":          "utf8-crash",
		"M1.wildcard":      "wildcard-crash",
		"M2.no-codes":      "suback-crash",
		"M2.other-id":      "suback-id-crash",
		"M2.refused":       "suback-refused-crash",
		"M3.foreign-topic": "any-topic",
		"M3.other-device":  "any-device any-topic",
		"M4.payload":       "trusts-length",
		"M4.retained":      "retained-crash",
		"M5.duplicate":     "runs-twice",
		"M5.replay":        "forgets runs-twice",
		"M6.present":       "believes-session",
		"M6.kicked":        "no-backoff",
		"M6.refused-1":     "no-retry-1",
		"M6.refused-2":     "no-retry-2",
		"M6.refused-3":     "no-retry-3",
		"M6.refused-4":     "no-retry-4",
		"M6.refused-5":     "no-retry-5",
		"M7.kicked":        "no-backoff flat-backoff",
		"M7.no-connack":    "waits-for-ever",
		"M8.no-puback":     "waits-puback waits-for-ever",
		"M8.no-suback":     "waits-suback waits-for-ever",
		"M8.no-pingresp":   "waits-pingresp waits-for-ever",
	}
}

// mutant makes the client of that name; "" is the strict one.
func mutant(w *World, name string) *subject {
	s := &subject{w: w, flaws: flaws{}}
	if strings.HasPrefix(name, "go") {
		s.dial = func(raw net.Conn) (talk, error) { return goTLS(w, raw, name) }
		return s
	}
	for f := range strings.FieldsFuncSeq(name, func(r rune) bool { return r == '+' }) {
		s.flaws[f] = true // none for the strict client
	}
	return s
}

// viaGo is a connection of crypto/tls.
type viaGo struct{ *tls.Conn }

func (v viaGo) data() ([]byte, error) {
	b := make([]byte, 1<<14)
	n, err := v.Read(b)
	return b[:n], err
}

func (v viaGo) write(kind byte, b []byte) error {
	if kind != 23 {
		return nil // its alerts are its own
	}
	_, err := v.Write(b)
	return err
}

// goTLS is a client of crypto/tls with what its name says wrong.
func goTLS(w *World, raw net.Conn, name string) (talk, error) {
	pool := w.pool()
	c := &tls.Config{RootCAs: pool, ServerName: w.Domain, Certificates: []tls.Certificate{{Certificate: [][]byte{w.deviceDER}, PrivateKey: w.deviceKey}}}
	verify := func(change func(o *x509.VerifyOptions, leaf *x509.Certificate)) {
		c.InsecureSkipVerify = true
		c.VerifyConnection = func(cs tls.ConnectionState) error {
			o := x509.VerifyOptions{Roots: pool, DNSName: w.Domain, Intermediates: x509.NewCertPool()}
			for _, i := range cs.PeerCertificates[1:] {
				o.Intermediates.AddCert(i)
			}
			change(&o, cs.PeerCertificates[0])
			_, err := cs.PeerCertificates[0].Verify(o)
			return err
		}
	}
	switch name {
	case "go-insecure":
		c.InsecureSkipVerify = true
	case "go-chain-not-name":
		verify(func(o *x509.VerifyOptions, _ *x509.Certificate) { o.DNSName = "" })
	case "go-name-not-chain":
		verify(func(o *x509.VerifyOptions, leaf *x509.Certificate) { o.Roots.AddCert(leaf) })
	case "go-no-dates":
		verify(func(o *x509.VerifyOptions, leaf *x509.Certificate) { o.CurrentTime = leaf.NotBefore.Add(2 * time.Hour) })
	case "go-no-purpose":
		verify(func(o *x509.VerifyOptions, _ *x509.Certificate) {
			o.KeyUsages = []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
		})
	case "go-any-version":
		c.MinVersion = tls.VersionTLS10
	case "go-downgraded":
		c.MinVersion, c.MaxVersion, raw = tls.VersionTLS11, tls.VersionTLS12, &boast{Conn: raw}
	}
	t := tls.Client(raw, c)
	return viaGo{t}, t.Handshake()
}

func (w *World) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, ca := range []*authority{w.rootA, w.rootB} {
		cert, err := x509.ParseCertificate(ca.der)
		must(err)
		pool.AddCert(cert)
	}
	return pool
}

// boast is the connection of a client that offers TLS 1.3 and takes TLS 1.2 without a
// look at the sentinel: its list of versions is changed on the way.
type boast struct {
	net.Conn
	done bool
}

// Write implements io.Writer.
func (b *boast) Write(p []byte) (int, error) {
	list := []byte{0, 43, 0, 5, 4, 3, 3, 3, 2}
	if i := bytes.Index(p, list); i >= 0 && !b.done {
		b.done, p = true, slices.Clone(p)
		copy(p[i:], []byte{0, 43, 0, 5, 4, 3, 4, 3, 3})
	}
	return b.Conn.Write(p)
}

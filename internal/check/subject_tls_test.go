package check

import (
	"bytes"
	"compress/zlib"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/big"
	"net"
	"slices"
)

// flaws are what is wrong with a client, by name. A client without any is strict.
type flaws map[string]bool

// wire is the TLS 1.3 of the client under test: written for this alone, so that it shares
// no mistake with the false broker. P-256, AES-128-GCM with SHA-256, nothing else.
type wire struct {
	flaws
	w         *World
	raw       net.Conn
	in, out   side
	sum       func() hash.Hash
	suite     uint16
	said      []byte // the transcript
	messages  []byte // handshake bytes that are not read yet
	received  []byte // of TCP
	done      bool   // after the handshake
	asked     bool
	limited   bool // the server has echoed record_size_limit
	early     bool // offer early data
	share     *ecdh.PrivateKey
	session   []byte
	retried   uint16 // suite of a HelloRetryRequest
	retries   int
	handshake []byte // secret
	clientHS  []byte
	serverHS  []byte
	key       *ecdsa.PublicKey // of the server
	tickets   int
	updates   int
}

// side is one direction of the record layer.
type side struct {
	block  cipher.Block
	aead   cipher.AEAD
	iv     []byte
	secret []byte
	seq    uint64
}

// recordLimit is the record_size_limit that is offered.
const recordLimit = 4096

var (
	errNoTLS   = errors.New("this is no TLS")
	errRefuse  = errors.New("refused")
	errEarly   = errors.New("application data in the handshake")
	retryValue = sha256.Sum256([]byte("HelloRetryRequest"))
)

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errRefuse}, args...)...)
}

func ext(kind uint16, body []byte) []byte {
	return append(binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, kind), uint16(len(body))), body...)
}

func sized(b []byte) []byte { return append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...) }

// hello is the ClientHello, with a cookie where one has to be echoed.
func (t *wire) hello(cookie []byte) []byte {
	name := t.w.Domain
	if t.flaws["wrong-sni"] {
		name = "elsewhere.invalid"
	}
	all := slices.Concat(ext(0, sized(append([]byte{0}, sized([]byte(name))...))), ext(10, []byte{0, 2, 0, 23}), ext(13, []byte{0, 2, 4, 3}),
		ext(43, []byte{2, 3, 4}), ext(51, sized(append([]byte{0, 23}, sized(t.share.PublicKey().Bytes())...))),
		ext(28, []byte{recordLimit >> 8, recordLimit & 255}))
	if cookie != nil {
		all = append(all, ext(44, cookie)...)
	}
	if t.early {
		all = append(all, ext(42, nil)...)
	}
	random := make([]byte, 32)
	rand.Read(random)
	b := slices.Concat([]byte{3, 3}, random, []byte{32}, t.session, []byte{0, 2, 0x13, 1, 1, 0}, sized(all))
	return append([]byte{1, 0, byte(len(b) >> 8), byte(len(b))}, b...)
}

// reply is a ServerHello that was taken apart.
type reply struct {
	random, session []byte
	suite           uint16
	version         []byte
	share           []byte // with its group
	cookie          []byte
	other           []string // the flaws that take the extensions that were not asked for
}

var errParse = refuse("it does not parse")

func parseReply(m []byte) (r reply, err error) {
	if len(m) < 4+2+32+1 {
		return r, errParse
	}
	r.random = m[6:38]
	m = m[38:]
	n := int(m[0])
	if len(m) < 1+n+3+2 {
		return r, errParse
	}
	r.session, r.suite, m = m[1:1+n], binary.BigEndian.Uint16(m[1+n:]), m[1+n+3:]
	if int(binary.BigEndian.Uint16(m)) != len(m)-2 {
		return r, errParse
	}
	for m = m[2:]; len(m) > 0; {
		if len(m) < 4 || len(m) < 4+int(binary.BigEndian.Uint16(m[2:])) {
			return r, errParse
		}
		body := m[4 : 4+int(binary.BigEndian.Uint16(m[2:]))]
		switch binary.BigEndian.Uint16(m) {
		case 43:
			r.version = body
		case 51:
			r.share = body
		case 44:
			r.cookie = body
		case 41:
			r.other = append(r.other, "unsolicited-psk")
		default:
			r.other = append(r.other, "unsolicited-hello")
		}
		m = m[4+len(body):]
	}
	return r, nil
}

// greet sends the ClientHello.
func (t *wire) greet() error {
	var err error
	if t.share, err = ecdh.P256().GenerateKey(rand.Reader); err != nil {
		return err
	}
	t.sum, t.session = sha256.New, make([]byte, 32)
	rand.Read(t.session)
	t.said = t.hello(nil)
	return t.write(22, t.said)
}

// shake is the whole handshake.
func (t *wire) shake() error {
	if err := t.greet(); err != nil {
		return err
	}
	if err := t.serverHello(); err != nil {
		return err
	}
	if err := t.flight(); err != nil {
		return err
	}
	return t.finish()
}

func (t *wire) serverHello() error {
	for {
		kind, m, err := t.message()
		if err != nil {
			return err
		}
		if kind != 2 {
			return refuse("message %d where ServerHello belongs", kind)
		}
		r, err := parseReply(m)
		if err != nil {
			return err
		}
		if bytes.Equal(r.random, retryValue[:]) {
			if err := t.retry(m, &r); err != nil {
				return err
			}
			continue
		}
		if err := t.judgeHello(&r); err != nil {
			return err
		}
		t.said = append(t.said, m...)
		return t.agree(&r)
	}
}

// retry answers a HelloRetryRequest. The only one that can be right asks for a cookie.
func (t *wire) retry(m []byte, r *reply) error {
	t.retries++
	right := t.retries == 1 && r.share == nil && r.cookie != nil && r.suite == 0x1301 && len(r.cookie) < 1024
	if len(r.cookie) > 1024 && t.flaws["crash-cookie"] {
		panic("a cookie larger than its buffer")
	}
	takes := "retry-group"
	switch {
	case t.retries > 1:
		takes = "retry-twice"
	case bytes.Equal(r.share, []byte{0, 23}):
		takes = "retry-nothing"
	}
	if !right && !t.flaws[takes] {
		return refuse("this HelloRetryRequest")
	}
	if t.retried = r.suite; t.retries == 1 {
		t.said = append([]byte{254, 0, 0, 32}, t.hashed(t.said)...)
	}
	second := t.hello(r.cookie)
	t.said = append(append(t.said, m...), second...)
	return t.write(22, second)
}

func (t *wire) judgeHello(r *reply) error {
	group := len(r.share) > 4 && binary.BigEndian.Uint16(r.share) == 23
	switch {
	case !bytes.Equal(r.session, t.session) && !t.flaws["any-session"]:
		return refuse("another session")
	case t.retried != 0 && t.retried != r.suite && !t.flaws["retry-suite"]:
		return refuse("another suite than it asked for")
	case r.suite != 0x1301 && !t.flaws[fmt.Sprintf("suite-%04x", r.suite)] && !(t.retried != 0 && t.flaws["retry-suite"]):
		return refuse("another suite")
	case !bytes.Equal(r.version, []byte{3, 4}) && !t.flaws["any-draft"]:
		return refuse("another version")
	case slices.ContainsFunc(r.other, func(f string) bool { return !t.flaws[f] }):
		return refuse("an extension that was not asked for")
	case !group && !t.flaws["any-group"] || len(r.share) < 37:
		return refuse("another group")
	}
	return nil
}

// agree computes the secrets, as carefully as it does.
func (t *wire) agree(r *reply) error {
	n, point := int(binary.BigEndian.Uint16(r.share[2:])), r.share[4:]
	if n != len(point) && !t.flaws["clamps"] {
		return errParse
	}
	shared, err := t.secret(point)
	if err != nil {
		return err
	}
	if t.suite = r.suite; t.suite == 0x1302 {
		t.sum = sha512.New384
	}
	zero := make([]byte, t.sum().Size())
	secret, err := hkdf.Extract(t.sum, zero, nil)
	must(err)
	t.handshake, err = hkdf.Extract(t.sum, shared, t.expand(secret, "derived", t.hashed(nil), len(zero)))
	must(err)
	t.clientHS = t.expand(t.handshake, "c hs traffic", t.hashed(t.said), len(zero))
	t.serverHS = t.expand(t.handshake, "s hs traffic", t.hashed(t.said), len(zero))
	if len(t.messages) > 0 && !t.flaws["across-keys"] {
		return refuse("a message across the change of keys")
	}
	t.in, t.out = t.side(t.serverHS), t.side(t.clientHS)
	return nil
}

func (t *wire) secret(point []byte) ([]byte, error) {
	theirs, err := ecdh.P256().NewPublicKey(point)
	switch {
	case err == nil:
		return t.share.ECDH(theirs)
	case t.flaws["zero-secret"]:
		return make([]byte, 32), nil
	case t.flaws["x-only"] && len(point) == 65, t.flaws["pads"] && len(point) < 65 && len(point) > 32: // y is whatever belongs to x
		x, y := elliptic.UnmarshalCompressed(elliptic.P256(), append([]byte{2}, point[1:33]...))
		if x == nil {
			return nil, errParse
		}
		full := append([]byte{4}, new(big.Int).Set(x).FillBytes(make([]byte, 32))...)
		if theirs, err = ecdh.P256().NewPublicKey(append(full, y.FillBytes(make([]byte, 32))...)); err != nil {
			return nil, err
		}
		return t.share.ECDH(theirs)
	}
	return nil, refuse("no point of the curve")
}

// flight reads from EncryptedExtensions to Finished.
func (t *wire) flight() error {
	for step := 0; ; {
		kind, m, err := t.message()
		if errors.Is(err, errEarly) && t.flaws["data-ends"] {
			return nil
		}
		if err != nil {
			return err
		}
		switch {
		case kind == 8 && step == 0:
			step, err = 1, t.encrypted(m)
		case kind == 13 && step == 1 && !t.asked:
			t.asked = true
		case kind == 25 && step == 1 && t.flaws["compression"]:
			step, err = 2, t.certificate(inflated(m))
		case kind == 11 && (step == 1 || step == 2 && t.flaws["repeats"]):
			step, err = 2, t.certificate(m)
		case kind == 15 && step == 2:
			step, err = 3, t.verify(m)
		case kind == 20 && (step == 3 || step == 2 && t.flaws["no-verify"] || step == 1 && t.flaws["anonymous"]):
			return t.finished(m)
		case kind == 24 && t.flaws["early-update"]:
			continue
		default:
			return refuse("message %d", kind)
		}
		if err != nil {
			return err
		}
		t.said = append(t.said, m...)
	}
}

// inflated takes CompressedCertificate for a Certificate message.
func inflated(m []byte) []byte {
	r, err := zlib.NewReader(bytes.NewReader(m[4+2+3+3:]))
	must(err)
	b, err := io.ReadAll(r)
	must(err)
	return append([]byte{11, 0, byte(len(b) >> 8), byte(len(b))}, b...)
}

func (t *wire) encrypted(m []byte) error {
	if len(m) < 6 {
		return errParse
	}
	for b := m[6:]; len(b) >= 4; {
		n := 4 + int(binary.BigEndian.Uint16(b[2:]))
		if n > len(b) {
			return errParse
		}
		kind := binary.BigEndian.Uint16(b)
		takes := map[uint16]string{16: "unsolicited-alpn", 42: "unsolicited-early", 0xfe01: "unsolicited-encrypted"}[kind]
		if kind != 28 && !t.flaws[takes] {
			return refuse("an extension that was not asked for")
		}
		t.limited = t.limited || kind == 28
		b = b[n:]
	}
	return nil
}

func (t *wire) certificate(m []byte) error {
	if len(m) < 8 {
		return errParse
	}
	var chain [][]byte
	for b := m[8:]; len(b) > 0; {
		if len(b) < 5 {
			return errParse
		}
		n := int(b[0])<<16 + int(b[1])<<8 + int(b[2])
		if len(b) < 3+n+2 {
			return errParse
		}
		chain, b = append(chain, b[3:3+n]), b[3+n+2+int(binary.BigEndian.Uint16(b[3+n:])):]
	}
	key, err := t.trust(chain)
	t.key = key
	return err
}

func (t *wire) verify(m []byte) error {
	if t.flaws["no-verify"] || t.key == nil && (t.flaws["bad-key"] || t.flaws["empty-chain"]) {
		return nil
	}
	if len(m) < 8 || binary.BigEndian.Uint16(m[4:]) != 0x0403 {
		return refuse("another scheme")
	}
	sig, role, over := m[8:], "server", t.hashed(t.said)
	valid := func() bool {
		content := append(bytes.Repeat([]byte{' '}, 64), "TLS 1.3, "+role+" CertificateVerify\x00"...)
		sum := sha256.Sum256(append(content, over...))
		return ecdsa.VerifyASN1(t.key, sum[:], sig)
	}
	if valid() || len(sig) == 0 && t.flaws["empty-signature"] || bytes.Equal(sig, []byte{0x30, 6, 2, 1, 0, 2, 1, 0}) && t.flaws["zero-signature"] {
		return nil
	}
	if role = "client"; t.flaws["any-role"] && valid() {
		return nil
	}
	if role, over = "server", make([]byte, 32); t.flaws["no-transcript"] && valid() {
		return nil
	}
	return refuse("CertificateVerify")
}

func (t *wire) mac(secret []byte) []byte {
	h := hmac.New(t.sum, t.expand(secret, "finished", nil, t.sum().Size()))
	h.Write(t.hashed(t.said))
	return h.Sum(nil)
}

func (t *wire) finished(m []byte) error {
	want := t.mac(t.serverHS)
	t.said = append(t.said, m...)
	got := m[4:]
	if t.flaws["short-finished"] && len(got) > 0 || t.flaws["empty-finished"] && len(got) == 0 {
		want = want[:min(len(want), len(got))]
	}
	if !hmac.Equal(got, want) && !t.flaws["no-finished"] {
		return refuse("Finished")
	}
	return nil
}

// finish sends the client's flight and turns the application keys on.
func (t *wire) finish() error {
	zero := make([]byte, t.sum().Size())
	master, err := hkdf.Extract(t.sum, zero, t.expand(t.handshake, "derived", t.hashed(nil), len(zero)))
	must(err)
	client := t.expand(master, "c ap traffic", t.hashed(t.said), len(zero))
	server := t.expand(master, "s ap traffic", t.hashed(t.said), len(zero))
	if t.asked {
		if err := t.prove(); err != nil {
			return err
		}
	}
	if err := t.write(22, append([]byte{20, 0, 0, byte(len(zero))}, t.mac(t.clientHS)...)); err != nil {
		return err
	}
	t.in, t.out, t.done = t.side(server), t.side(client), true
	return nil
}

// identity is the client's Certificate message.
func (t *wire) identity() []byte {
	der := t.w.deviceDER
	body := append([]byte{0, 0, byte((len(der) + 5) >> 8), byte(len(der) + 5), 0, byte(len(der) >> 8), byte(len(der))}, der...)
	body = append(body, 0, 0)
	return append([]byte{11, 0, byte(len(body) >> 8), byte(len(body))}, body...)
}

func (t *wire) prove() error {
	m := t.identity()
	t.said = append(t.said, m...)
	if err := t.write(22, m); err != nil {
		return err
	}
	content := append(bytes.Repeat([]byte{' '}, 64), "TLS 1.3, client CertificateVerify\x00"...)
	sum := sha256.Sum256(append(content, t.hashed(t.said)...))
	sig, err := ecdsa.SignASN1(rand.Reader, t.w.deviceKey, sum[:])
	must(err)
	m = append([]byte{15, 0, 0, byte(len(sig) + 4), 4, 3, 0, byte(len(sig))}, sig...)
	t.said = append(t.said, m...)
	return t.write(22, m)
}

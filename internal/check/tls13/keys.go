package tls13

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	_ "crypto/sha256" // the hashes that Suite names
	_ "crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
)

// Suite is a cipher suite that this stack can really speak.
type Suite struct {
	ID     uint16
	Hash   crypto.Hash
	keyLen int
}

// The suites of RFC 9846 B.4 that the standard library has the parts for.
const (
	AES128 uint16 = 0x1301 // TLS_AES_128_GCM_SHA256
	AES256 uint16 = 0x1302 // TLS_AES_256_GCM_SHA384
)

// SuiteOf gives what is needed to speak id.
func SuiteOf(id uint16) (Suite, error) {
	switch id {
	case AES128:
		return Suite{id, crypto.SHA256, 16}, nil
	case AES256:
		return Suite{id, crypto.SHA384, 32}, nil
	}
	return Suite{}, fmt.Errorf("suite %#04x is not spoken here", id)
}

// expandLabel is HKDF-Expand-Label (RFC 9846 7.1).
func (s Suite) expandLabel(secret []byte, label string, context []byte, n int) ([]byte, error) {
	info := binary.BigEndian.AppendUint16(nil, uint16(n))
	info = append(info, byte(6+len(label)))
	info = append(info, "tls13 "+label...)
	info = append(info, byte(len(context)))
	info = append(info, context...)
	return hkdf.Expand(s.hash(), secret, string(info), n)
}

func (s Suite) hash() func() hash.Hash { return s.Hash.New }

func (s Suite) sum(b []byte) []byte {
	h := s.Hash.New()
	h.Write(b)
	return h.Sum(nil)
}

// derive is Derive-Secret over the messages so far.
func (s Suite) derive(secret []byte, label string, messages []byte) ([]byte, error) {
	return s.expandLabel(secret, label, s.sum(messages), s.Hash.Size())
}

// schedule is the key schedule of one connection without a PSK.
type schedule struct {
	suite                            Suite
	handshake, master                []byte
	clientHandshake, serverHandshake []byte
	clientApp, serverApp             []byte
}

// afterHello derives the handshake secrets from the shared secret and the messages up
// to and including ServerHello.
func (k *schedule) afterHello(s Suite, shared, messages []byte) (err error) {
	k.suite = s
	zero := make([]byte, s.Hash.Size())
	early, err := hkdf.Extract(s.hash(), zero, nil)
	if err != nil {
		return err
	}
	salt, err := s.derive(early, "derived", nil)
	if err != nil {
		return err
	}
	if k.handshake, err = hkdf.Extract(s.hash(), shared, salt); err != nil {
		return err
	}
	if k.clientHandshake, err = s.derive(k.handshake, "c hs traffic", messages); err != nil {
		return err
	}
	k.serverHandshake, err = s.derive(k.handshake, "s hs traffic", messages)
	return err
}

// afterFinished derives the application secrets from the messages up to and including
// the server's Finished.
func (k *schedule) afterFinished(messages []byte) error {
	s := k.suite
	salt, err := s.derive(k.handshake, "derived", nil)
	if err != nil {
		return err
	}
	if k.master, err = hkdf.Extract(s.hash(), make([]byte, s.Hash.Size()), salt); err != nil {
		return err
	}
	if k.clientApp, err = s.derive(k.master, "c ap traffic", messages); err != nil {
		return err
	}
	k.serverApp, err = s.derive(k.master, "s ap traffic", messages)
	return err
}

// finished is verify_data (RFC 9846 4.5.3).
func (s Suite) finished(secret, messages []byte) ([]byte, error) {
	key, err := s.expandLabel(secret, "finished", nil, s.Hash.Size())
	if err != nil {
		return nil, err
	}
	m := hmac.New(s.hash(), key)
	m.Write(s.sum(messages))
	return m.Sum(nil), nil
}

// half is one direction of the record protection. The zero value is plaintext.
type half struct {
	suite  Suite
	secret []byte
	aead   cipher.AEAD
	iv     []byte
	seq    uint64
}

func newHalf(s Suite, secret []byte) (half, error) {
	h := half{suite: s, secret: secret}
	key, err := s.expandLabel(secret, "key", nil, s.keyLen)
	if err != nil {
		return h, err
	}
	if h.iv, err = s.expandLabel(secret, "iv", nil, 12); err != nil {
		return h, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return h, err
	}
	h.aead, err = cipher.NewGCM(block)
	return h, err
}

// next is the half after a KeyUpdate (RFC 9846 7.2).
func (h half) next() (half, error) {
	secret, err := h.suite.expandLabel(h.secret, "traffic upd", nil, h.suite.Hash.Size())
	if err != nil {
		return half{}, err
	}
	return newHalf(h.suite, secret)
}

func (h *half) nonce() []byte {
	n := append([]byte(nil), h.iv...)
	for i := range 8 {
		n[4+i] ^= byte(h.seq >> (56 - 8*i))
	}
	return n
}

// seal protects one TLSInnerPlaintext of content, its type and padding zeros.
func (h *half) seal(kind byte, content []byte, padding int) []byte {
	inner := append(append(append([]byte(nil), content...), kind), make([]byte, padding)...)
	head := header(TypeData, len(inner)+h.aead.Overhead())
	out := h.aead.Seal(head, h.nonce(), inner, head)
	h.seq++
	return out
}

var errTag = errors.New("a record does not decrypt")

// open removes the protection of one record's body.
func (h *half) open(body []byte) (kind byte, content []byte, err error) {
	plain, err := h.aead.Open(nil, h.nonce(), body, header(TypeData, len(body)))
	if err != nil {
		return 0, nil, errTag
	}
	h.seq++
	for i := len(plain) - 1; i >= 0; i-- {
		if plain[i] != 0 {
			return plain[i], plain[:i], nil
		}
	}
	return 0, nil, errors.New("a record of nothing but zeros")
}

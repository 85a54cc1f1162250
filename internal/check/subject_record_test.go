package check

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"encoding/binary"
	"io"
)

func (t *wire) expand(secret []byte, label string, context []byte, n int) []byte {
	info := append([]byte{byte(n >> 8), byte(n), byte(6 + len(label))}, "tls13 "+label...)
	info = append(append(info, byte(len(context))), context...)
	out, err := hkdf.Expand(t.sum, secret, string(info), n)
	must(err)
	return out
}

func must(err error) {
	if err != nil {
		panic("the test's own client: " + err.Error())
	}
}

func (t *wire) hashed(b []byte) []byte { h := t.sum(); h.Write(b); return h.Sum(nil) }

func (t *wire) side(secret []byte) side {
	n := map[uint16]int{0x1302: 32}[t.suite]
	block, err := aes.NewCipher(t.expand(secret, "key", nil, max(n, 16)))
	must(err)
	aead, err := cipher.NewGCM(block)
	must(err)
	return side{block, aead, t.expand(secret, "iv", nil, 12), secret, 0}
}

func (s *side) nonce(seq uint64) []byte {
	n := bytes.Clone(s.iv)
	for i := range 8 {
		n[4+i] ^= byte(seq >> (56 - 8*i))
	}
	return n
}

// write sends one record.
func (t *wire) write(kind byte, b []byte) error {
	for len(b) > 1<<14 {
		if err := t.write(kind, b[:1<<14]); err != nil {
			return err
		}
		b = b[1<<14:]
	}
	record := append([]byte{kind, 3, 3, byte(len(b) >> 8), byte(len(b))}, b...)
	if t.out.aead != nil {
		inner := append(bytes.Clone(b), kind)
		head := []byte{23, 3, 3, byte((len(inner) + 16) >> 8), byte(len(inner) + 16)}
		record = t.out.aead.Seal(head, t.out.nonce(t.out.seq), inner, head)
		t.out.seq++
	}
	_, err := t.raw.Write(record)
	return err
}

// alert says why the client goes; which one does not matter here.
func (t *wire) alert(code byte) { _ = t.write(21, []byte{2, code}) } // it goes anyway

// gather reads from TCP until there are n bytes.
func (t *wire) gather(n int) error {
	for len(t.received) < n {
		buf := make([]byte, 1<<15)
		k, err := t.raw.Read(buf)
		t.received = append(t.received, buf[:k]...)
		if err != nil {
			return err
		}
		if t.flaws["one-read"] && len(t.received) < n {
			return refuse("a record came in pieces")
		}
	}
	return nil
}

// record reads one record and unprotects it.
func (t *wire) record() (kind byte, content []byte, err error) {
	if err := t.gather(5); err != nil {
		return 0, nil, err
	}
	n := int(binary.BigEndian.Uint16(t.received[3:]))
	if kind = t.received[0]; kind < 20 || kind > 23 || t.received[1] != 3 {
		return 0, nil, errNoTLS
	}
	if n > 1<<14+256 && !t.flaws["over-cipher"] {
		return 0, nil, refuse("a record of %d bytes", n)
	}
	if err := t.gather(5 + n); err != nil {
		return 0, nil, err
	}
	body := t.received[5 : 5+n : 5+n]
	t.received = t.received[5+n:]
	switch {
	case kind == 20:
		return kind, body, t.changed(body)
	case t.in.aead == nil || kind == 23 && n < 17 && t.flaws["clear-data"]:
		return kind, body, nil
	case kind == 22 && (t.flaws["clear-skip"] && !t.done || t.flaws["clear-later"] && t.done):
		return t.record()
	case kind != 23:
		return 0, nil, refuse("a record in the clear")
	}
	return t.open(body)
}

// changed judges a ChangeCipherSpec.
func (t *wire) changed(body []byte) error {
	if t.done && !t.flaws["late-ccs"] || !bytes.Equal(body, []byte{1}) {
		return refuse("ChangeCipherSpec")
	}
	return nil
}

func (t *wire) open(body []byte) (kind byte, content []byte, err error) {
	head := []byte{23, 3, 3, byte(len(body) >> 8), byte(len(body))}
	plain, err := t.in.aead.Open(nil, t.in.nonce(t.in.seq), body, head)
	if err != nil && t.flaws["replay"] && t.in.seq > 0 {
		if plain, err = t.in.aead.Open(nil, t.in.nonce(t.in.seq-1), body, head); err == nil {
			t.in.seq--
		}
	}
	if err != nil && t.flaws["no-tag"] && len(body) > 16 {
		plain, err = make([]byte, len(body)-16), nil
		counter := append(t.in.nonce(t.in.seq), 0, 0, 0, 2)
		cipher.NewCTR(t.in.block, counter).XORKeyStream(plain, body[:len(plain)])
	}
	if err != nil {
		return 0, nil, refuse("bad tag")
	}
	t.in.seq++
	if len(plain) > recordLimit && t.limited && t.done && !t.flaws["no-limit"] {
		return 0, nil, refuse("over the limit")
	}
	return t.inner(plain)
}

// inner takes the type and the padding off.
func (t *wire) inner(plain []byte) (kind byte, content []byte, err error) {
	i := len(plain) - 1
	for !t.flaws["no-padding"] && i >= 0 && plain[i] == 0 {
		i--
	}
	switch {
	case i < 0 && t.flaws["all-zero"]:
		return t.record()
	case i < 0:
		return 0, nil, refuse("nothing but padding")
	case i > 1<<14 && !t.flaws["over-plain"]:
		return 0, nil, refuse("a record of %d bytes", i)
	case plain[i] == 21:
		return 0, nil, io.EOF
	}
	return plain[i], plain[:i], nil
}

// message reads one handshake message.
func (t *wire) message() (kind byte, m []byte, err error) {
	for {
		if n := t.whole(); n > 0 {
			m, t.messages = t.messages[:n:n], t.messages[n:]
			if t.flaws["one-message-record"] {
				t.messages = nil
			}
			return m[0], m, nil
		}
		kind, content, err := t.record()
		switch {
		case err != nil:
			return 0, nil, err
		case kind == 20 || kind == 23 && t.in.aead == nil && t.flaws["data-first"]:
			continue
		case kind == 21:
			return 0, nil, io.EOF
		case kind == 23:
			return 0, nil, errEarly
		case len(content) == 0 && !t.flaws["empty-fragment"]:
			return 0, nil, refuse("an empty fragment")
		}
		t.messages = append(t.messages, content...)
		if len(t.messages) > 1<<17 || t.flaws["small-buffer"] && len(t.messages) > len(t.w.broker[0])*11/10+16 {
			return 0, nil, refuse("no room for this message")
		}
		if t.flaws["one-record-message"] && t.whole() == 0 {
			return 0, nil, refuse("a message in pieces")
		}
	}
}

// whole is the length of the first message if all of it is there.
func (t *wire) whole() int {
	if len(t.messages) < 4 {
		return 0
	}
	n := 4 + int(t.messages[1])<<16 + int(t.messages[2])<<8 + int(t.messages[3])
	if n > len(t.messages) {
		return 0
	}
	return n
}

// data reads application data; what comes between is obeyed or refused.
func (t *wire) data() ([]byte, error) {
	for {
		kind, content, err := t.record()
		switch {
		case err != nil:
			return nil, err
		case kind == 23 && len(content) == 0 && t.flaws["empty-is-end"]:
			return nil, io.EOF
		case kind == 23 && len(content) > 0:
			return content, nil
		case kind == 22:
			if err := t.later(content); err != nil {
				return nil, err
			}
		}
	}
}

// later is a handshake message after the handshake.
func (t *wire) later(m []byte) error {
	switch {
	case len(m) == 5 && m[0] == 24:
		return t.update(m[4])
	case len(m) > 4 && m[0] == 4 && !t.flaws["no-tickets"]:
		if t.tickets++; t.tickets > 100 && t.flaws["crash-tickets"] {
			panic("no room for a ticket")
		}
		return nil
	case len(m) > 0 && m[0] == 13 && t.flaws["answers-request"]:
		return t.write(22, t.identity())
	case len(m) > 0 && t.flaws[map[byte]string{0: "ignores-request", 2: "ignores-hello", 13: "ignores-certificate-request"}[m[0]]]:
		return nil
	}
	return refuse("a message after the handshake")
}

func (t *wire) update(value byte) error {
	if t.updates++; t.flaws["crash-update"] || t.updates > 100 && t.flaws["crash-updates"] {
		panic("KeyUpdate")
	}
	if value > 1 && !t.flaws["any-update"] {
		return refuse("KeyUpdate")
	}
	next := func(s side) side { return t.side(t.expand(s.secret, "traffic upd", nil, t.sum().Size())) }
	if t.in = next(t.in); value != 1 {
		return nil
	}
	err := t.write(22, []byte{24, 0, 0, 1, 0})
	t.out = next(t.out)
	return err
}

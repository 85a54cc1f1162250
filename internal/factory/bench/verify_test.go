package bench

import (
	"crypto/ecdsa"
	"os"
	"strings"
	"testing"
	"time"

	"hawser/internal/factory"
	"hawser/internal/factory/probe"
	"hawser/internal/identity"
)

// verify reads the unit on the rig's probe.
func (r *rig) verify(dir, probe string) *Verdict {
	r.t.Helper()
	c, err := NewChecker(dir, probe)
	fatal(r.t, err)
	self, err := os.Executable()
	fatal(r.t, err)
	c.Child = []string{self, "unit-child"}
	v, err := c.Verify(r.t.Context())
	fatal(r.t, err)
	return v
}

// write puts bytes into the unit with a debugger.
func (r *rig) write(addr uint32, data []byte) {
	r.t.Helper()
	p, _ := r.probe()
	defer p.Close()
	fatal(r.t, p.Write(r.t.Context(), []probe.Region{{Addr: addr, Data: data}}))
}

func (r *rig) read(addr uint32, n int) []byte {
	r.t.Helper()
	p, _ := r.probe()
	defer p.Close()
	b, err := p.Read(r.t.Context(), addr, n)
	fatal(r.t, err)
	return b
}

func identityOf(t *testing.T, id identity.ID, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	scalar, err := key.Bytes()
	fatal(t, err)
	b, err := factory.EncodeIdentity(id, scalar, 0)
	fatal(t, err)
	return b[:]
}

// TestVerify: a whole unit, and everything about it that can be wrong.
func TestVerify(t *testing.T) {
	r := newRig(t, nil)
	r.load(5, nil)
	b := r.open()
	plug(t, r.port)
	_, err := r.run(t.Context(), b, 1, nil)
	fatal(t, err)
	fatal(t, b.Close())
	u := r.results[0]
	v := r.verify(r.dir, "")
	if len(v.Faults) > 0 || v.ID != u.ID || v.Certificate != u.Certificate || v.Key != u.Key || v.Anchors != 1 || v.Recorded != "unit" {
		t.Errorf("%+v", v)
	}
	if v = r.verify(t.TempDir(), r.spec()); len(v.Faults) > 0 || v.ID != u.ID || v.Recorded != "" {
		t.Errorf("without a bench: %+v", v)
	}
	id, trust := r.read(0x20010000, 128), r.read(0x20011000, 2048)
	_, size, err := factory.ParseTrust(trust)
	fatal(t, err)
	trust = trust[:size]
	other := newRig(t, nil)
	other.load(5, nil)
	e, err := other.open().Enrol(csrOf(t, newKey(t), nil)) // ABCD0001 of another fleet
	fatal(t, err)
	wrong := identityOf(t, 0xABCD0001, newKey(t))
	sound, err := factory.ParseIdentity(id)
	fatal(t, err)
	renamed, err := factory.EncodeIdentity(0xABCD0009, sound.Scalar, 0)
	fatal(t, err)
	for _, c := range []struct {
		words string
		addr  uint32
		data  []byte
	}{
		{"identity block: not an identity block: wrong checksum", 0x20010000, flip(id, 50)},
		{"for another key than the one in the identity block", 0x20010000, wrong},
		{`the certificate is for "ABCD0001", the identity block for ABCD0009`, 0x20010000, renamed[:]},
		{"trust region: not a trust region: wrong checksum", 0x20011000, flip(trust, 200)},
		{"not signed by this station", 0x20011000, e.Trust},
		{"the journal has another certificate for ABCD0001", 0x20011000, e.Trust},
	} {
		r.write(c.addr, c.data)
		if v := r.verify(r.dir, ""); !strings.Contains(strings.Join(v.Faults, "\n"), c.words) {
			t.Errorf("%q lacks %q", v.Faults, c.words)
		}
		r.write(0x20010000, id)
		r.write(0x20011000, trust)
	}
	b = r.open()
	next, block, err := b.reserve(time.Now())
	fatal(t, err)
	key := newKey(t)
	n, err := b.certify(next, block, csrOf(t, key, nil), factory.ByProbe)
	fatal(t, err)
	trust, err = trustOf(n.Cert, block)
	fatal(t, err)
	fatal(t, b.burn(next, "a test", time.Now()))
	fatal(t, b.Close())
	r.write(0x20010000, identityOf(t, next, key))
	r.write(0x20011000, trust)
	if v := r.verify(r.dir, ""); len(v.Faults) != 1 || !strings.Contains(v.Faults[0], "ABCD0002 is burnt") || v.Recorded != "burnt" {
		t.Errorf("%+v", v)
	}
	c, err := NewChecker(r.dir, "exec:identity=0,trust=0x1000:true")
	fatal(t, err)
	self, err := os.Executable()
	fatal(t, err)
	c.Child = []string{self, "unit-child"}
	_, err = c.Verify(t.Context())
	wants(t, err, "this probe cannot read", "hint: ")
}

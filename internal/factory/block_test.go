package factory

import (
	"bytes"
	"crypto/rand"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/veraison/go-cose"

	"hawser/internal/identity"
	"hawser/internal/pki"
)

func (r *rig) sign(t testing.TB, b *Block) []byte {
	t.Helper()
	file, err := SignBlock(r.deviceCA, b)
	return must(t, file, err)
}

// seal signs any payload with any external data.
func (r *rig) seal(t testing.TB, payload []byte, aad string) []byte {
	t.Helper()
	s, err := cose.NewSigner(cose.AlgorithmES256, r.deviceCA.Signer)
	must(t, s, err)
	h := cose.Headers{Protected: cose.ProtectedHeader{cose.HeaderLabelAlgorithm: cose.AlgorithmES256}}
	out, err := cose.Sign1(rand.Reader, s, h, payload, []byte(aad))
	return must(t, out, err)
}

func TestBlockRoundTrip(t *testing.T) {
	r := newRig(t)
	want := r.block()
	got, err := OpenBlock(r.sign(t, want))
	must(t, got, err)
	if got.Fleet != want.Fleet || got.Station != want.Station || got.ID != want.ID || len(got.IDs) != 3 || got.IDs[0] != 0xABCD1234 || !got.Expires.Equal(want.Expires) ||
		!got.DeviceCA.Equal(want.DeviceCA) || !got.StationCert.Equal(want.StationCert) || !bytes.Equal(got.Anchors, want.Anchors) {
		t.Errorf("%+v", got)
	}
	want.IDs = nil
	for i := range MaxBlockIDs {
		want.IDs = append(want.IDs, identity.ID(i*859_001+1))
	}
	if got, err = OpenBlock(r.sign(t, want)); err != nil || len(got.IDs) != MaxBlockIDs {
		t.Error("the largest block:", err)
	}
}

// Each byte that is changed, cut off or added is found.
func TestBlockDamage(t *testing.T) {
	r := newRig(t)
	file := r.sign(t, r.block())
	for i := range file {
		bad := bytes.Clone(file)
		bad[i] ^= 1
		if _, err := OpenBlock(bad); !errors.Is(err, ErrBlock) {
			t.Fatalf("byte %d: %v", i, err)
		}
	}
	for i := range file {
		if _, err := OpenBlock(file[:i]); !errors.Is(err, ErrBlock) {
			t.Fatalf("cut off at %d: %v", i, err)
		}
	}
	for name, bad := range map[string][]byte{"a byte more": append(bytes.Clone(file), 0), "huge": append(bytes.Clone(file), make([]byte, MaxBlock)...)} {
		if _, err := OpenBlock(bad); !errors.Is(err, ErrBlock) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A block that another key signed, or that was signed as something else, is none.
func TestBlockSignature(t *testing.T) {
	r := newRig(t)
	payload, err := r.block().payload()
	must(t, payload, err)
	for name, file := range map[string][]byte{
		"as an anchor set": r.seal(t, payload, "hawser-anchors-v1"),
		"by the station":   (&rig{deviceCA: r.station}).seal(t, payload, blockAAD),
		"by another CA":    (&rig{deviceCA: &pki.Issuer{Signer: newKey(t)}}).seal(t, payload, blockAAD),
	} {
		if _, err := OpenBlock(file); err == nil || !strings.Contains(err.Error(), "not signed by its device CA") {
			t.Errorf("%s: %v", name, err)
		}
	}
	other, err := pki.IssueDeviceCA(newKey(t), acme(), 2, testNow())
	must(t, other, err)
	if _, err := SignBlock(other, r.block()); err == nil {
		t.Error("another device CA signed it")
	}
}

// What is signed by the right key is refused all the same if it cannot be a block.
func TestBlockContents(t *testing.T) {
	r := newRig(t)
	ca, err := pki.IssueDeviceCA(newKey(t), acme(), 1, testNow())
	other := &rig{deviceCA: must(t, ca, err)}
	for want, bend := range map[string]func(*Block){
		"names no fleet":                   func(b *Block) { b.Fleet = [16]byte{} },
		"has no block id":                  func(b *Block) { b.ID = BlockID{} },
		"expiry is no time":                func(b *Block) { b.Expires = time.Unix(0, 0) },
		"0 ids, not 1 to 5000":             func(b *Block) { b.IDs = nil },
		"FFFFFFFF is never issued":         func(b *Block) { b.IDs = []identity.ID{0xFFFFFFFF} },
		"00000002 stands there twice":      func(b *Block) { b.IDs = []identity.ID{2, 1, 2} },
		`holds the certificate of "line1"`: func(b *Block) { b.Station = "line2" },
		"station's certificate":            func(b *Block) { b.StationCert = other.newStation(t, "line1", newKey(t)).Cert },
		"device CA":                        func(b *Block) { b.DeviceCA = b.StationCert },
		"belongs to another fleet":         func(b *Block) { b.Anchors = anchors(t, [16]byte{8}) },
		"anchor set is not a COSE_Sign1":   func(b *Block) { b.Anchors = []byte{1} },
	} {
		b := r.block()
		bend(b)
		if _, err := SignBlock(r.deviceCA, b); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("signing: %v, want %q", err, want)
		}
		payload, err := b.payload()
		must(t, payload, err)
		if _, err := OpenBlock(r.seal(t, payload, blockAAD)); !errors.Is(err, ErrBlock) || !strings.Contains(err.Error(), want) {
			t.Errorf("opening: %v, want %q", err, want)
		}
	}
}

func badBlockPayloads(t testing.TB, r *rig) map[string][]byte {
	t.Helper()
	b := r.block()
	good, err := b.payload()
	must(t, good, err)
	enc, err := cbor.CoreDetEncOptions().EncMode()
	must(t, enc, err)
	with := func(key int, v any) []byte {
		m := map[int]any{1: 1, 2: b.Fleet[:], 3: b.Station, 4: b.ID[:], 5: []byte{0, 0, 0, 1}, 6: b.Expires.Unix(), 7: b.DeviceCA.Raw, 8: b.StationCert.Raw, 9: b.Anchors}
		if v == nil {
			delete(m, key)
		} else {
			m[key] = v
		}
		out, err := enc.Marshal(m)
		return must(t, out, err)
	}
	return map[string][]byte{
		"version 2": with(1, 2), "unknown key": with(10, 1), "no expiry": with(6, nil), "short fleet id": with(2, b.Fleet[:15]), "long block id": with(4, make([]byte, 17)),
		"five bytes of ids": with(5, make([]byte, 5)), "6000 ids": with(5, make([]byte, 4*6000)), "an endless expiry": with(6, uint64(1)<<62), "no certificate": with(8, []byte{}),
		"bytes after the map": append(bytes.Clone(good), 0), "an indefinite-length map": append(append([]byte{0xbf}, good[1:]...), 0xff),
		"a key twice": append([]byte{0xaa, 1, 1}, good[1:]...), "a long form of a number": append([]byte{good[0], 1, 0x18, 1}, good[3:]...), "a number": {1}, "nothing": {},
	}
}

func TestBlockHasOneSpelling(t *testing.T) {
	r := newRig(t)
	for name, payload := range badBlockPayloads(t, r) {
		if _, err := OpenBlock(r.seal(t, payload, blockAAD)); !errors.Is(err, ErrBlock) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzOpenBlock(f *testing.F) {
	r := newRig(f)
	f.Add(r.sign(f, r.block()))
	f.Add(r.seal(f, []byte{0xa0}, blockAAD))
	f.Fuzz(func(t *testing.T, data []byte) {
		if b, err := OpenBlock(data); err == nil && (b.Station != "line1" || len(b.IDs) != 3) {
			t.Error("accepted a block that was never signed")
		}
	})
}

// The payload's parser, without a signature in front of it.
func FuzzBlockPayload(f *testing.F) {
	r := newRig(f)
	good, err := r.block().payload()
	f.Add(must(f, good, err))
	for _, p := range badBlockPayloads(f, r) {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := parseBlock(data)
		if err != nil {
			return
		}
		if again, err := b.payload(); err != nil || !bytes.Equal(again, data) {
			t.Errorf("two spellings of one block: %v", err)
		}
	})
}

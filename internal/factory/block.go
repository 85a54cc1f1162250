package factory

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/veraison/go-cose"

	"hawser/internal/identity"
	"hawser/internal/pki"
)

const (
	blockAAD     = "hawser-block-v1" // external_aad, RFC 9052 4.4
	blockVersion = 1
	// MaxBlockIDs is how many ids one block holds at most.
	MaxBlockIDs = 5000
	// MaxBlock bounds a block file, in bytes: the ids, two certificates and an anchor set.
	MaxBlock     = 32 << 10
	maxExpiry    = 253402300799                   // 9999-12-31T23:59:59Z, the last second that RFC 3339 can write
	coseSign1Tag = "\xd2\x84\x43\xa1\x01\x26\xa0" // tag 18, array of 4, {1: -7} (ES256), {}
)

// ErrBlock reports a file that is not a block, or one that was changed.
var ErrBlock = errors.New("not a block file, or a damaged one")

// Block is what a bench needs to make units offline: ids that nobody else was given, its own
// certificate, and what the units are born with.
type Block struct {
	Fleet       [16]byte
	Station     string
	ID          BlockID
	IDs         []identity.ID // 1 to MaxBlockIDs, none twice, in the order of use
	Expires     time.Time     // whole seconds; afterwards no further unit is begun
	DeviceCA    *x509.Certificate
	StationCert *x509.Certificate // signed by DeviceCA
	Anchors     []byte            // COSE_Sign1 of the same fleet
}

// blockMap is the payload: PROTOCOL.md, "Block file".
type blockMap struct {
	Version     uint64 `cbor:"1,keyasint"`
	Fleet       []byte `cbor:"2,keyasint"`
	Station     string `cbor:"3,keyasint"`
	Block       []byte `cbor:"4,keyasint"`
	IDs         []byte `cbor:"5,keyasint"`
	Expires     int64  `cbor:"6,keyasint"`
	DeviceCA    []byte `cbor:"7,keyasint"`
	StationCert []byte `cbor:"8,keyasint"`
	Anchors     []byte `cbor:"9,keyasint"`
}

// Check reports whether b can be a block at all: everything but the signature.
func (b *Block) Check() error {
	switch {
	case b.Fleet == [16]byte{}:
		return errors.New("it names no fleet")
	case b.ID == BlockID{}:
		return errors.New("it has no block id")
	case b.Expires.Unix() <= 0 || b.Expires.Unix() > maxExpiry || b.Expires.Nanosecond() != 0:
		return errors.New("its expiry is no time")
	case b.DeviceCA == nil || b.StationCert == nil:
		return errors.New("it lacks a certificate")
	}
	if err := checkIDs(b.IDs); err != nil {
		return err
	}
	return b.checkTrust()
}

func checkIDs(ids []identity.ID) error {
	if len(ids) == 0 || len(ids) > MaxBlockIDs {
		return fmt.Errorf("it holds %d ids, not 1 to %d", len(ids), MaxBlockIDs)
	}
	sorted := slices.Clone(ids)
	slices.Sort(sorted)
	for i, id := range sorted {
		if !id.Issuable() {
			return fmt.Errorf("id %s is never issued", id)
		}
		if i > 0 && sorted[i-1] == id {
			return fmt.Errorf("id %s stands there twice", id)
		}
	}
	return nil
}

func (b *Block) checkTrust() error {
	if err := pki.CheckCA(b.DeviceCA, pki.DeviceCA); err != nil {
		return err
	}
	name, _, _, err := pki.VerifyStationCA(b.StationCert.Raw, []*x509.Certificate{b.DeviceCA})
	if err != nil {
		return fmt.Errorf("station's certificate: %w", err)
	}
	if name != b.Station {
		return fmt.Errorf("it is for station %q and holds the certificate of %q", b.Station, name)
	}
	set, err := pki.InspectAnchors(b.Anchors)
	if err != nil {
		return err
	}
	if set.Fleet != b.Fleet {
		return errors.New("its anchor set belongs to another fleet")
	}
	return nil
}

// SignBlock gives the file of b, signed by the device CA that b names. At most MaxBlock bytes.
func SignBlock(ca *pki.Issuer, b *Block) ([]byte, error) {
	if err := b.Check(); err != nil {
		return nil, fmt.Errorf("sign block: %w", err)
	}
	if !ca.Cert.Equal(b.DeviceCA) {
		return nil, errors.New("sign block: it names another device CA")
	}
	payload, err := b.payload()
	if err != nil {
		return nil, err
	}
	signer, err := cose.NewSigner(cose.AlgorithmES256, ca.Signer)
	if err != nil {
		return nil, fmt.Errorf("sign block: %w", err)
	}
	h := cose.Headers{Protected: cose.ProtectedHeader{cose.HeaderLabelAlgorithm: cose.AlgorithmES256}}
	out, err := cose.Sign1(rand.Reader, signer, h, payload, []byte(blockAAD))
	if err != nil {
		return nil, fmt.Errorf("sign block: %w", err)
	}
	if len(out) > MaxBlock {
		return nil, fmt.Errorf("a block file of %d bytes is larger than %d", len(out), MaxBlock)
	}
	return out, nil
}

// payload gives the deterministic CBOR (RFC 8949 4.2.1) of b.
func (b *Block) payload() ([]byte, error) {
	enc, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		return nil, fmt.Errorf("encode block: %w", err)
	}
	ids := make([]byte, 0, 4*len(b.IDs))
	for _, id := range b.IDs {
		ids = binary.BigEndian.AppendUint32(ids, uint32(id))
	}
	out, err := enc.Marshal(blockMap{blockVersion, b.Fleet[:], b.Station, b.ID[:], ids, b.Expires.Unix(), b.DeviceCA.Raw, b.StationCert.Raw, b.Anchors})
	if err != nil {
		return nil, fmt.Errorf("encode block: %w", err)
	}
	return out, nil
}

// OpenBlock reads a block file and checks all that can be checked from it alone: that the
// device CA in it signed it, and everything that Check does. Whether that is the bench's fleet
// and the bench's key is for the bench to say, and the expiry is judged when a unit is begun.
// Errors are ErrBlock with what is wrong.
func OpenBlock(file []byte) (*Block, error) {
	b, err := openBlock(file)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBlock, err)
	}
	return b, nil
}

func openBlock(file []byte) (*Block, error) {
	if len(file) > MaxBlock {
		return nil, fmt.Errorf("%d bytes are more than %d", len(file), MaxBlock)
	}
	if !bytes.HasPrefix(file, []byte(coseSign1Tag)) {
		return nil, errors.New("it is no COSE_Sign1 with ES256 alone in its header")
	}
	var m cose.Sign1Message
	if err := m.UnmarshalCBOR(file); err != nil {
		return nil, errors.New("it is cut short or has bytes after its end")
	}
	b, err := parseBlock(m.Payload)
	if err != nil {
		return nil, err
	}
	v, err := cose.NewVerifier(cose.AlgorithmES256, b.DeviceCA.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("device CA: %w", err)
	}
	if err := m.Verify([]byte(blockAAD), v); err != nil {
		return nil, errors.New("it is not signed by its device CA")
	}
	return b, nil
}

// parseBlock reads the payload, which must be in its one deterministic spelling.
func parseBlock(payload []byte) (*Block, error) {
	dec, err := cbor.DecOptions{DupMapKey: cbor.DupMapKeyEnforcedAPF, ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden}.DecMode()
	if err != nil {
		return nil, err
	}
	var m blockMap
	if err := dec.Unmarshal(payload, &m); err != nil {
		return nil, err
	}
	b, err := m.block()
	if err != nil {
		return nil, err
	}
	if err := b.Check(); err != nil {
		return nil, err
	}
	again, err := b.payload()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, payload) {
		return nil, errors.New("it is not in deterministic CBOR")
	}
	return b, nil
}

func (m *blockMap) block() (*Block, error) {
	b := &Block{Station: m.Station, Expires: time.Unix(m.Expires, 0).UTC(), Anchors: m.Anchors}
	switch {
	case m.Version != blockVersion:
		return nil, fmt.Errorf("format version %d, not %d", m.Version, blockVersion)
	case len(m.Fleet) != len(b.Fleet):
		return nil, fmt.Errorf("fleet id of %d bytes", len(m.Fleet))
	case len(m.Block) != len(b.ID):
		return nil, fmt.Errorf("block id of %d bytes", len(m.Block))
	case len(m.IDs)%4 != 0 || len(m.IDs) > 4*MaxBlockIDs:
		return nil, fmt.Errorf("%d bytes of ids, not 4 each for 1 to %d", len(m.IDs), MaxBlockIDs)
	}
	b.Fleet, b.ID = [16]byte(m.Fleet), BlockID(m.Block)
	for i := 0; i < len(m.IDs); i += 4 {
		b.IDs = append(b.IDs, identity.ID(binary.BigEndian.Uint32(m.IDs[i:])))
	}
	var err error
	if b.DeviceCA, err = x509.ParseCertificate(m.DeviceCA); err != nil {
		return nil, fmt.Errorf("device CA: %w", err)
	}
	if b.StationCert, err = x509.ParseCertificate(m.StationCert); err != nil {
		return nil, fmt.Errorf("station's certificate: %w", err)
	}
	return b, nil
}

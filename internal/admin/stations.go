package admin

import (
	"context"
	"encoding/hex"
	"io"
	"time"

	"hawser/internal/identity"
)

// Station is one flashing bench.
type Station struct {
	Name       string    `json:"name"`
	State      string    `json:"state"` // active, revoked
	Reason     string    `json:"reason,omitempty"`
	Key        Hex       `json:"key"` // SHA-256 of its public key
	Created    time.Time `json:"created"`
	Until      time.Time `json:"until,omitzero"` // end of its certificate; zero = it waits for its first
	Generation uint32    `json:"generation,omitempty"`
	Left       int       `json:"left"` // ids that it may still use: in signed blocks that have not expired
	Units      int       `json:"units"`
	Burnt      int       `json:"burnt"`
	Lines      uint64    `json:"lines,string"` // of its journal that were imported
	Imported   time.Time `json:"imported,omitzero"`
	Blocks     []Block   `json:"blocks,omitempty"`
}

// Block is a number of ids that were reserved for a station.
type Block struct {
	ID      Hex       `json:"id"`
	IDs     int       `json:"ids"`
	Left    int       `json:"left"`
	Units   int       `json:"units"`
	Burnt   int       `json:"burnt"`
	Anchors uint64    `json:"anchors,string"` // number of the set that its units are born with
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	Signed  time.Time `json:"signed,omitzero"` // zero = it waits for the safe
}

// NewBlock asks for ids. CSR may be empty for a station that is known.
type NewBlock struct {
	CSR     Hex       `json:"csr,omitempty"` // DER
	Count   int       `json:"count"`
	Expires time.Time `json:"expires"`
}

// ReservedBlock is what was reserved and has to be signed now.
type ReservedBlock struct {
	Station string        `json:"station"`
	CSR     Hex           `json:"csr"` // of the key that is in force
	Block   Hex           `json:"block"`
	IDs     []identity.ID `json:"ids"`
	Expires time.Time     `json:"expires"`
}

// JournalReport tells what an import has brought.
type JournalReport struct {
	Station string   `json:"station"`
	Lines   uint64   `json:"lines,string"` // of the journal
	New     uint64   `json:"new,string"`   // lines that were not imported before
	Units   int      `json:"units"`        // new devices
	Burnt   int      `json:"burnt"`        // ids that will never be one
	Torn    int      `json:"torn,omitempty"`
	Notes   []string `json:"notes,omitempty"` // what was passed over, at most 100
}

// Stations lists all stations.
func (c *Client) Stations(ctx context.Context) (list []Station, err error) {
	return list, c.call(ctx, "GET", "stations", nil, nil, &list)
}

// ReserveBlock registers a station, if need be, and reserves ids for it for ever.
func (c *Client) ReserveBlock(ctx context.Context, station string, n NewBlock) (out ReservedBlock, err error) {
	return out, c.call(ctx, "POST", "stations/"+station+"/blocks", nil, n, &out)
}

// BlockSigned brings the block file that was made for a reserved block.
func (c *Client) BlockSigned(ctx context.Context, file []byte) error {
	return c.call(ctx, "POST", "blocks", nil, struct {
		File Hex `json:"file"`
	}{file}, nil)
}

// RenewStation brings a certificate for a station's key; csr is that of the key, DER.
func (c *Client) RenewStation(ctx context.Context, station string, csr, certificate []byte) (out Station, err error) {
	return out, c.call(ctx, "POST", "stations/"+station+"/certificate", nil, struct {
		CSR         Hex `json:"csr"`
		Certificate Hex `json:"certificate"`
	}{csr, certificate}, &out)
}

// RevokeStation ends a station for good.
func (c *Client) RevokeStation(ctx context.Context, station, reason string) error {
	return c.call(ctx, "POST", "stations/"+station+"/revoke", nil, struct {
		Reason string `json:"reason"`
	}{reason}, nil)
}

// ImportJournal takes in what a station's journal has beyond what was imported before:
// all of it or nothing.
func (c *Client) ImportJournal(ctx context.Context, journal io.Reader) (out JournalReport, err error) {
	return out, c.send(ctx, "journal", journal, &out)
}

// BlockID is the id of a block as 16 bytes.
func (b *ReservedBlock) BlockID() (id [16]byte) {
	copy(id[:], b.Block)
	return id
}

func (b *Block) String() string { return hex.EncodeToString(b.ID) }

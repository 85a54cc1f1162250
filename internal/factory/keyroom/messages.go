package keyroom

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"hawser/internal/identity"
)

// maxMessage bounds a message in bytes: the longest holds a trust region.
const maxMessage = 64 << 10

// The orders of the parent, in the order in which they come. Reset and Read are the last.
const (
	doWait  = "wait"  // until a unit is on the probe
	doMake  = "make"  // a key, and give its request
	doWrite = "write" // identity block and trust region
	doReset = "reset" // the unit, and end
	doRead  = "read"  // a unit's identity block and trust region, and end
)

// order is what the parent tells the process. It holds no secret: there is none outside.
type order struct {
	Do    string      `json:"do"`
	Probe string      `json:"probe,omitempty"` // wait
	Last  *Sight      `json:"last,omitempty"`  // wait: what must have changed first
	ID    identity.ID `json:"id,omitzero"`     // make
	Flags uint8       `json:"flags,omitempty"` // make
	Trust []byte      `json:"trust,omitempty"` // write
}

// answer is what the process says. Each order has one answer; notices come in between.
type answer struct {
	Notice   string   `json:"notice,omitempty"` // what it waits for
	Failed   string   `json:"failed,omitempty"` // why the order was not done; the process ends
	Hint     string   `json:"hint,omitempty"`   // with Failed
	Sight    *Sight   `json:"sight,omitempty"`  // wait; with Failed, when it could be read
	CSR      []byte   `json:"csr,omitempty"`    // make: PKCS#10 DER
	ReadBack bool     `json:"read_back,omitempty"`
	Unit     *Reading `json:"unit,omitempty"` // read
}

// send writes m with its length (4 bytes, big-endian) before it.
func send(w io.Writer, m any) error {
	text, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if len(text) > maxMessage {
		return fmt.Errorf("message of %d bytes is larger than %d", len(text), maxMessage)
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...))
	return err
}

// receive reads one message. io.EOF means that the other side has ended.
func receive(r io.Reader, m any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxMessage {
		return fmt.Errorf("message of %d bytes is larger than %d", n, maxMessage)
	}
	text := make([]byte, n)
	if _, err := io.ReadFull(r, text); err != nil {
		return errors.Join(io.ErrUnexpectedEOF, err)
	}
	if err := json.Unmarshal(text, m); err != nil {
		return fmt.Errorf("message: %w", err)
	}
	return nil
}

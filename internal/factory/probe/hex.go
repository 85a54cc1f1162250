package probe

// Intel HEX as every flashing tool reads it: data records of up to 16 bytes, a record of
// type 04 before the first data and wherever the upper half of the address changes, and the
// end record, which a tool that was cut off does not get.

const (
	hexData   = 0x00
	hexEnd    = 0x01
	hexUpper  = 0x04
	hexLine   = 16
	hexRecord = 1 + 2*(1+2+1+hexLine+1) + 1 // colon, bytes as digits, line end
)

// hexWriter makes HEX text in buf, which is the caller's, and hands it to flush whenever it
// is full.
type hexWriter struct {
	buf   []byte
	n     int
	sum   byte
	flush func([]byte) error
}

// regions writes all of the text.
func (h *hexWriter) regions(rs []Region) error {
	upper := -1
	for _, r := range rs {
		at, data := uint64(r.Addr), r.Data
		for len(data) > 0 {
			if int(at>>16) != upper {
				upper = int(at >> 16)
				if err := h.record(0, hexUpper, []byte{byte(upper >> 8), byte(upper)}); err != nil {
					return err
				}
			}
			n := min(uint64(len(data)), hexLine, 0x10000-at&0xFFFF)
			if err := h.record(uint16(at), hexData, data[:n]); err != nil {
				return err
			}
			at, data = at+n, data[n:]
		}
	}
	if err := h.record(0, hexEnd, nil); err != nil {
		return err
	}
	return h.out()
}

func (h *hexWriter) record(addr uint16, kind byte, data []byte) error {
	if len(h.buf)-h.n < hexRecord {
		if err := h.out(); err != nil {
			return err
		}
	}
	h.put(':')
	h.sum = 0
	h.byte(byte(len(data)))
	h.byte(byte(addr >> 8))
	h.byte(byte(addr))
	h.byte(kind)
	for _, b := range data {
		h.byte(b)
	}
	h.byte(-h.sum)
	h.put('\n')
	return nil
}

func (h *hexWriter) byte(b byte) {
	const digits = "0123456789ABCDEF"
	h.sum += b
	h.put(digits[b>>4])
	h.put(digits[b&15])
}

func (h *hexWriter) put(c byte) {
	h.buf[h.n] = c
	h.n++
}

func (h *hexWriter) out() error {
	err := h.flush(h.buf[:h.n])
	clear(h.buf[:h.n])
	h.n = 0
	return err
}

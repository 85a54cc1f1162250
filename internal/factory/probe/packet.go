package probe

// The frames of the GDB remote serial protocol: $data#xx, xx the sum of the data bytes
// modulo 256; %data#xx a notification; + and - acknowledgements. In data, } escapes the next
// byte (which comes XOR 0x20), and * repeats the byte before it.

const hexDigits = "0123456789abcdef"

// event is what a byte completed.
type event int

const (
	none     event = iota
	ack            // +
	nak            // -
	reply          // a whole packet
	damaged        // a packet whose checksum is wrong, or that repeats nothing
	tooLong        // a packet that does not fit
	notified       // a notification: nobody asked for it, nobody acknowledges it
)

// decoder takes bytes one by one and puts a packet's data, repetitions expanded, escapes
// kept, into out, which is the caller's and bounds it.
type decoder struct {
	out   []byte
	n     int // bytes in out
	state decoderState
	notif bool
	bad   bool
	over  bool
	sum   byte
	want  byte // first digit of the checksum
}

type decoderState int

const (
	idle decoderState = iota
	inData
	inRepeat
	inSum1
	inSum2
)

// data is the packet after the event reply, until the next push.
func (d *decoder) data() []byte { return d.out[:d.n] }

func (d *decoder) push(b byte) event {
	switch {
	case d.state == idle:
		return d.outside(b)
	case b == '$': // never in data, not even escaped: the packet before was cut off
		d.begin(false)
	case b == '#' && d.state < inSum1:
		d.bad = d.bad || d.state == inRepeat
		d.state = inSum1
	case d.state == inData:
		d.take(b)
	case d.state == inRepeat:
		d.repeat(b)
	case d.state == inSum1:
		d.want, d.state = b, inSum2
	default:
		return d.finish(b)
	}
	return none
}

func (d *decoder) outside(b byte) event {
	switch b {
	case '+':
		return ack
	case '-':
		return nak
	case '$', '%':
		d.begin(b == '%')
	}
	return none // anything else is noise on a line
}

func (d *decoder) begin(notif bool) {
	*d = decoder{out: d.out, state: inData, notif: notif}
}

func (d *decoder) take(b byte) {
	d.sum += b
	if b == '*' {
		d.state = inRepeat
		return
	}
	d.add(b)
}

// repeat: the byte after * is 29 more than the number of further copies.
func (d *decoder) repeat(b byte) {
	d.sum += b
	d.state = inData
	if b < 29+3 || b > 126 || d.n == 0 && !d.over {
		d.bad = true
		return
	}
	for range b - 29 {
		if d.over {
			return
		}
		d.add(d.out[d.n-1])
	}
}

func (d *decoder) add(b byte) {
	if d.n == len(d.out) {
		d.over = true
		return
	}
	d.out[d.n] = b
	d.n++
}

func (d *decoder) finish(b byte) event {
	d.state = idle
	hi, ok1 := unhex(d.want)
	lo, ok2 := unhex(b)
	switch {
	case d.notif:
		return notified
	case !ok1 || !ok2 || hi<<4|lo != d.sum || d.bad:
		return damaged
	case d.over:
		return tooLong
	}
	return reply
}

func unhex(c byte) (byte, bool) {
	switch {
	case c >= '0' && c <= '9':
		return c - '0', true
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10, true
	case c >= 'A' && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

// decodeHex puts the bytes that pairs of digits stand for into p, and says how many there
// were; ok is false if there are more than fit, or other characters.
func decodeHex(p, digits []byte) (n int, ok bool) {
	if len(digits)%2 != 0 || len(digits)/2 > len(p) {
		return 0, false
	}
	for i := 0; i < len(digits); i += 2 {
		hi, ok1 := unhex(digits[i])
		lo, ok2 := unhex(digits[i+1])
		if !ok1 || !ok2 {
			return 0, false
		}
		p[i/2] = hi<<4 | lo
	}
	return len(digits) / 2, true
}

// unescape undoes the binary encoding in place.
func unescape(p []byte) ([]byte, bool) {
	n := 0
	for i := 0; i < len(p); i++ {
		b := p[i]
		if b == '}' {
			if i++; i == len(p) {
				return nil, false
			}
			b = p[i] ^ 0x20
		}
		p[n] = b
		n++
	}
	return p[:n], true
}

// encoder makes one packet in out, which is the caller's. What does not fit is a mistake of
// this package and panics, as an index out of range.
type encoder struct {
	out []byte
	n   int
}

// frameBytes is what a frame adds to its data.
const frameBytes = 4

func (e *encoder) begin(text string) {
	e.out[0] = '$'
	e.n = 1
	e.text(text)
}

func (e *encoder) text(s string) {
	for i := range len(s) {
		e.byte(s[i])
	}
}

func (e *encoder) byte(b byte) {
	e.out[e.n] = b
	e.n++
}

func (e *encoder) hex(p []byte) {
	for _, b := range p {
		e.byte(hexDigits[b>>4])
		e.byte(hexDigits[b&15])
	}
}

func (e *encoder) binary(p []byte) {
	for _, b := range p {
		if escaped(b) {
			e.byte('}')
			b ^= 0x20
		}
		e.byte(b)
	}
}

func escaped(b byte) bool { return b == '#' || b == '$' || b == '}' || b == '*' }

// fitting says how many bytes from the start of p take up at most room bytes in binary.
func fitting(p []byte, room int) int {
	for i, b := range p {
		if escaped(b) {
			room--
		}
		if room--; room < 0 {
			return i
		}
	}
	return len(p)
}

// end closes the packet and gives it, ready to send.
func (e *encoder) end() []byte {
	sum := byte(0)
	for _, b := range e.out[1:e.n] {
		sum += b
	}
	e.byte('#')
	e.hex([]byte{sum})
	return e.out[:e.n]
}

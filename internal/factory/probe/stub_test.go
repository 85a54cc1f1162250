package probe

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
)

const (
	flashAt   = 0x08000000
	flashSize = 8 << 10
	blockSize = 1 << 10
	ramAt     = 0x20000000
	ramSize   = 16 << 10
)

// faults is what a stub does wrong, or differently.
type faults struct {
	naks, badSums int    // the first packets are answered with -, the first answers have a wrong checksum
	dropAcks      bool   // no + is ever sent
	noAckMode     bool   // QStartNoAckMode is offered
	oneByte       bool   // every byte leaves in a segment of its own
	noX           bool   // X is unknown
	chatter       bool   // notifications, console output and unasked stop replies before each answer
	repeats       bool   // answers are run-length encoded
	short         bool   // m gives fewer bytes than were asked for
	packetSize    int    // what it says it takes
	dieAt         string // the connection is closed when the second packet comes that begins so
	blindFrom     int    // flash bytes from here on cannot be read (0: all can)
	reset         string // the console's word for reset, "" if there is no console
	silent        string // packets that begin so are never answered
	noUnit        bool   // until swdp_scan and vAttach
	memoryMap     string // instead of its own
}

// stub is a debug server that follows the GDB manual: flash is to be erased by whole
// blocks before it is written, and nothing is done before vFlashDone.
type stub struct {
	t      *testing.T
	f      faults
	addr   string
	mu     sync.Mutex // guards what follows
	flash  []byte
	ram    []byte
	erased map[int]bool // flash bytes erased in this session and not yet written
	todo   []func()     // waits for vFlashDone
	last   int          // highest flash address written in this session
	log    []string     // first word of each packet
	seen   int          // packets that match dieAt
	there  bool
}

func newStub(t *testing.T, f faults) *stub {
	t.Helper()
	if f.packetSize == 0 {
		f.packetSize = 256
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &stub{t: t, f: f, addr: l.Addr().String(), ram: make([]byte, ramSize), erased: map[int]bool{}, last: -1, there: !f.noUnit}
	for i := range flashSize {
		s.flash = append(s.flash, byte(i>>3))
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
			all.Go(func() { s.serve(c) })
		}
	})
	t.Cleanup(all.Wait) // runs after what closes
	t.Cleanup(func() { l.Close() })
	return s
}

func (s *stub) serve(c net.Conn) {
	defer c.Close()
	r := bufio.NewReader(c)
	noAck := false
	var last []byte
	for {
		b, err := r.ReadByte()
		switch {
		case err != nil:
			return
		case b == '-':
			s.answer(c, last)
			continue
		case b == 3:
			s.send(c, frame("T02"))
			continue
		case b != '$':
			continue
		}
		body, err := r.ReadBytes('#')
		if err != nil {
			return
		}
		body = body[:len(body)-1]
		sum := make([]byte, 2)
		for i := range sum {
			if sum[i], err = r.ReadByte(); err != nil {
				return
			}
		}
		if string(frame(string(body))[len(body)+2:]) != string(sum) {
			s.t.Errorf("a packet of %d bytes has a wrong checksum", len(body))
		}
		if len(body) > s.f.packetSize {
			s.t.Errorf("a packet of %d bytes, %d are allowed", len(body), s.f.packetSize)
		}
		if s.f.naks > 0 && !noAck {
			s.f.naks--
			s.send(c, []byte("-"))
			continue
		}
		if !noAck && !s.f.dropAcks {
			s.send(c, []byte("+"))
		}
		answer, ok := s.handle(string(body))
		if !ok {
			return
		}
		if string(body) == "QStartNoAckMode" {
			noAck = true
		}
		if answer == quiet {
			continue
		}
		if s.f.chatter {
			s.send(c, []byte("%Stop:T05#c3"))
			s.send(c, frame("O"+hex.EncodeToString([]byte("still busy\n"))))
			s.send(c, frame("T05thread:01;"))
		}
		if last = frame(answer); s.f.repeats {
			last = frame(repeated(answer))
		}
		s.answer(c, last)
	}
}

// answer sends an answer, damaged while there are faults left.
func (s *stub) answer(c net.Conn, p []byte) {
	if s.f.badSums > 0 {
		s.f.badSums--
		p = append(bytes.Clone(p[:len(p)-1]), 'x')
	}
	s.send(c, p)
}

func (s *stub) send(c net.Conn, p []byte) {
	if !s.f.oneByte {
		c.Write(p)
		return
	}
	for _, b := range p {
		c.Write([]byte{b}) // TCP_NODELAY is Go's default
	}
}

func frame(body string) []byte {
	sum := byte(0)
	for i := range len(body) {
		sum += body[i]
	}
	return fmt.Appendf(nil, "$%s#%02x", body, sum)
}

// repeated encodes runs of at least four equal characters.
func repeated(body string) string {
	var out strings.Builder
	for i := 0; i < len(body); {
		n := 1
		for i+n < len(body) && body[i+n] == body[i] && n < 98 {
			n++
		}
		for n > 3 && (n-1+29 == '#' || n-1+29 == '$') {
			n--
		}
		out.WriteByte(body[i])
		if n > 3 {
			out.WriteByte('*')
			out.WriteByte(byte(n - 1 + 29))
		} else {
			n = 1
		}
		i += n
	}
	return out.String()
}

const quiet = "\x00" // no answer

// handle carries out one packet; false closes the connection.
func (s *stub) handle(p string) (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	word := strings.FieldsFunc(p+" ", func(r rune) bool { return strings.ContainsRune(":,; ", r) })[0]
	s.log = append(s.log, word)
	if s.f.dieAt != "" && strings.HasPrefix(p, s.f.dieAt) {
		if s.seen++; s.seen == 2 {
			return "", false
		}
	}
	if s.f.silent != "" && strings.HasPrefix(p, s.f.silent) {
		return quiet, true
	}
	switch {
	case word == "qSupported":
		return s.features(), true
	case word == "QStartNoAckMode":
		return "OK", true
	case word == "?" && !s.there:
		return "W00", true
	case word == "?":
		return "T05thread:01;", true
	case word == "vAttach":
		return "T05", true
	case word == "qXfer":
		return s.xfer(p), true
	case word == "qRcmd":
		return s.console(p), true
	case word == "D":
		return "OK", true
	case word == "vFlashDone":
		for _, f := range s.todo {
			f()
		}
		s.todo, s.last = nil, -1
		return "OK", true
	case word == "vFlashErase":
		return s.erase(p), true
	case word == "vFlashWrite":
		return s.write(p), true
	case p[0] == 'm':
		return s.read(p), true
	case p[0] == 'M', p[0] == 'X' && !s.f.noX:
		return s.poke(p), true
	}
	return "", true
}

func (s *stub) features() string {
	text := fmt.Sprintf("PacketSize=%x;qXfer:memory-map:read+;vContSupported+", s.f.packetSize)
	if s.f.noAckMode {
		text += ";QStartNoAckMode+"
	}
	return text
}

func (s *stub) xfer(p string) string {
	doc := s.f.memoryMap
	if doc == "" {
		doc = fmt.Sprintf(`<?xml version="1.0"?>
<!DOCTYPE memory-map PUBLIC "+//IDN gnu.org//DTD GDB Memory Map V1.0//EN" "http://sourceware.org/gdb/gdb-memory-map.dtd">
<memory-map>
<memory type="rom" start="0x0" length="0x1000"/>
<memory type="flash" start="%#x" length="%d"><property name="blocksize">%#x</property></memory>
<memory type="ram" start="%#x" length="%#x"/>
</memory-map>`, flashAt, flashSize, blockSize, ramAt, ramSize)
	}
	var from, n int
	if _, err := fmt.Sscanf(p, "qXfer:memory-map:read::%x,%x", &from, &n); err != nil || from > len(doc) {
		return "E00"
	}
	part := doc[from:min(from+n/2, len(doc))] // half, so that there is room to escape
	enc := encoder{out: make([]byte, 2*len(part)+8)}
	enc.binary([]byte(part))
	if from+len(part) == len(doc) {
		return "l" + string(enc.out[:enc.n])
	}
	return "m" + string(enc.out[:enc.n])
}

func (s *stub) console(p string) string {
	text, _ := hex.DecodeString(strings.TrimPrefix(p, "qRcmd,"))
	switch string(text) {
	case s.f.reset:
		s.log = append(s.log, "reset!")
		return "OK"
	case "swdp_scan":
		s.there = true
		return "OK"
	}
	return ""
}

func (s *stub) erase(p string) string {
	var addr, n int
	fmt.Sscanf(p, "vFlashErase:%x,%x", &addr, &n)
	at := addr - flashAt
	if at < 0 || at+n > flashSize || at%blockSize != 0 || n%blockSize != 0 || n == 0 {
		return "E.not whole blocks of flash"
	}
	s.todo = append(s.todo, func() {
		for i := range n {
			s.flash[at+i] = 0xFF
		}
	})
	for i := range n {
		s.erased[at+i] = true
	}
	return "OK"
}

func (s *stub) write(p string) string {
	head, body, _ := strings.Cut(strings.TrimPrefix(p, "vFlashWrite:"), ":")
	addr, _ := strconv.ParseUint(head, 16, 32)
	data, ok := unescape([]byte(body))
	at := int(addr) - flashAt
	if !ok || at < 0 || at+len(data) > flashSize || at < s.last {
		return "E.memtype"
	}
	for i := range data {
		if !s.erased[at+i] {
			return "E0a"
		}
		delete(s.erased, at+i)
	}
	s.last = at + len(data)
	s.todo = append(s.todo, func() {
		for i, b := range data {
			s.flash[at+i] &= b
		}
	})
	return "OK"
}

// place finds the memory at an address, nil if there is none.
func (s *stub) place(addr, n int) (mem []byte, at int) {
	switch {
	case addr >= flashAt && addr+n <= flashAt+flashSize:
		return s.flash, addr - flashAt
	case addr >= ramAt && addr+n <= ramAt+ramSize:
		return s.ram, addr - ramAt
	}
	return nil, 0
}

func (s *stub) read(p string) string {
	var addr, n int
	fmt.Sscanf(p, "m%x,%x", &addr, &n)
	mem, at := s.place(addr, n)
	if mem == nil || addr < ramAt && s.f.blindFrom > 0 && at+n > s.f.blindFrom {
		return "E14"
	}
	if s.f.short {
		n = (n + 1) / 2
	}
	return hex.EncodeToString(mem[at : at+n])
}

func (s *stub) poke(p string) string {
	var addr, n int
	head, body, _ := strings.Cut(p, ":")
	fmt.Sscanf(head[1:], "%x,%x", &addr, &n)
	data, ok := unescape([]byte(body))
	if p[0] == 'M' {
		var err error
		data, err = hex.DecodeString(body)
		ok = err == nil
	}
	mem, at := s.place(addr, n)
	if !ok || len(data) != n || mem == nil || addr < ramAt && n > 0 {
		return "E01"
	}
	copy(mem[at:], data)
	return "OK"
}

// count says how many packets began with a word.
func (s *stub) count(word string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.log {
		if w == word {
			n++
		}
	}
	return n
}

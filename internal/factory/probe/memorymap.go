package probe

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
)

// area is one entry of a server's memory map, within the first 4 GiB.
type area struct {
	kind       string // "ram", "rom" or "flash"
	start, end uint64
	block      uint64 // flash: what is erased at once; blocks are counted from start
}

const (
	maxMap   = 64 << 10 // bytes of XML
	maxAreas = 1024
	maxBlock = 4 << 20
)

// memoryMap fetches and reads the server's map.
func (g *GDB) memoryMap(ctx context.Context) ([]area, error) {
	var doc []byte
	for {
		answer, err := g.ask(ctx, fmt.Sprintf("qXfer:memory-map:read::%x,%x", len(doc), g.w.limit-1))
		if err != nil {
			return nil, fmt.Errorf("memory map: %w", err)
		}
		if len(answer) == 0 || answer[0] != 'm' && answer[0] != 'l' {
			return nil, fmt.Errorf("memory map: %w", errors.Join(refusal(answer, false), errNoMap))
		}
		more := answer[0] == 'm'
		part, ok := unescape(answer[1:])
		if !ok || more && len(part) == 0 || len(doc)+len(part) > maxMap {
			return nil, fmt.Errorf("memory map: %w: it is damaged or larger than %d bytes", ErrGone, maxMap)
		}
		if doc = append(doc, part...); !more {
			break
		}
	}
	areas, err := parseMap(doc)
	if err != nil {
		return nil, fmt.Errorf("memory map: %w: %w", ErrGone, err)
	}
	return areas, nil
}

var errNoMap = fmt.Errorf("%w: it offers a memory map and does not give it", ErrTarget)

// parseMap reads the XML of a memory map. A map that is wrong anywhere is refused: what is
// taken for RAM by mistake is flash that is not erased.
func parseMap(doc []byte) ([]area, error) {
	if len(doc) > maxMap {
		return nil, fmt.Errorf("more than %d bytes", maxMap)
	}
	dec := xml.NewDecoder(bytes.NewReader(doc))
	var m mapReader
	for {
		token, err := dec.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, errors.New("it is no XML")
		}
		if err := m.take(token); err != nil {
			return nil, err
		}
	}
	if !m.root {
		return nil, errors.New("it holds no memory-map")
	}
	return m.sorted()
}

// mapReader keeps what the tokens so far said.
type mapReader struct {
	root   bool
	areas  []area
	inSize bool // within <property name="blocksize">
	size   []byte
}

func (m *mapReader) take(token xml.Token) error {
	switch t := token.(type) {
	case xml.StartElement:
		switch t.Name.Local {
		case "memory-map":
			m.root = true
		case "memory":
			return m.memory(t.Attr)
		case "property":
			m.inSize, m.size = attribute(t.Attr, "name") == "blocksize", nil
		}
	case xml.CharData:
		if m.inSize && len(m.size) < 64 {
			m.size = append(m.size, t...)
		}
	case xml.EndElement:
		if t.Name.Local == "property" && m.inSize {
			m.inSize = false
			return m.blocksize()
		}
	}
	return nil
}

func (m *mapReader) memory(attrs []xml.Attr) error {
	start, err1 := mapNumber(attribute(attrs, "start"))
	length, err2 := mapNumber(attribute(attrs, "length"))
	a := area{kind: attribute(attrs, "type"), start: start, end: start + length}
	switch {
	case err1 != nil || err2 != nil:
		return errors.New("start or length of a memory is no number")
	case a.end < start:
		return errors.New("a memory goes past the end")
	case a.kind != "ram" && a.kind != "rom" && a.kind != "flash":
		return fmt.Errorf("unknown kind of memory %.20q", a.kind)
	case len(m.areas) == maxAreas:
		return fmt.Errorf("more than %d memories", maxAreas)
	}
	m.areas = append(m.areas, a)
	return nil
}

func (m *mapReader) blocksize() error {
	n, err := mapNumber(string(bytes.TrimSpace(m.size)))
	if err != nil || n == 0 || n > maxBlock || len(m.areas) == 0 {
		return errors.New("a block size that is of no use")
	}
	m.areas[len(m.areas)-1].block = n
	return nil
}

// sorted gives the areas by address, cut at 4 GiB, where Hawser's addresses end.
func (m *mapReader) sorted() ([]area, error) {
	var areas []area
	for _, a := range m.areas {
		if a.end = min(a.end, 1<<32); a.start < a.end {
			areas = append(areas, a)
		}
	}
	slices.SortFunc(areas, func(a, b area) int { return int(int64(a.start) - int64(b.start)) })
	for i, a := range areas {
		switch {
		case a.kind == "flash" && a.block == 0:
			return nil, fmt.Errorf("flash at %#x without a block size", a.start)
		case i > 0 && a.start < areas[i-1].end:
			return nil, fmt.Errorf("memories overlap at %#x", a.start)
		}
	}
	return areas, nil
}

func attribute(attrs []xml.Attr, name string) string {
	for _, a := range attrs {
		if a.Name.Local == name {
			return a.Value
		}
	}
	return ""
}

// mapNumber reads numbers as C does: decimal, or hexadecimal with 0x.
func mapNumber(text string) (uint64, error) {
	if len(text) > 2 && (text[:2] == "0x" || text[:2] == "0X") {
		return strconv.ParseUint(text[2:], 16, 64)
	}
	return strconv.ParseUint(text, 10, 64)
}

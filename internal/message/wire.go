package message

import (
	"encoding/hex"
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/fxamacker/cbor/v2"
)

// writer builds one message field by field, in the encoding it was made for.
type writer struct {
	enc    Encoding
	b      []byte
	fields byte // below 24, so that the map head is one byte
}

func newWriter(enc Encoding) *writer {
	w := &writer{enc: enc, b: make([]byte, 1, 64)}
	w.b[0] = '{'
	return w
}

func (w *writer) key(key byte, name string) {
	w.fields++
	if w.enc == CBOR {
		w.b = append(w.b, key) // below 24: the key is its own encoding
		return
	}
	if w.fields > 1 {
		w.b = append(w.b, ',')
	}
	w.b = append(append(append(w.b, '"'), name...), '"', ':')
}

func (w *writer) end() []byte {
	if w.enc == CBOR {
		w.b[0] = 0xA0 | w.fields
		return w.b
	}
	return append(w.b, '}')
}

// head appends the head of a CBOR item: its major type and argument (RFC 8949 3).
func head(dst []byte, major byte, v uint64) []byte {
	switch {
	case v < 24:
		return append(dst, major<<5|byte(v))
	case v < 1<<8:
		return append(dst, major<<5|24, byte(v))
	case v < 1<<16:
		return append(dst, major<<5|25, byte(v>>8), byte(v))
	case v < 1<<32:
		return append(dst, major<<5|26, byte(v>>24), byte(v>>16), byte(v>>8), byte(v))
	}
	dst = append(dst, major<<5|27)
	for shift := 56; shift >= 0; shift -= 8 {
		dst = append(dst, byte(v>>shift))
	}
	return dst
}

func (w *writer) number(key byte, name string, v uint64) {
	w.key(key, name)
	if w.enc == CBOR {
		w.b = head(w.b, 0, v)
		return
	}
	w.b = strconv.AppendUint(w.b, v, 10)
}

// number64 writes a number that JSON has as a string: many parsers read numbers as
// binary64, which holds 53 bits.
func (w *writer) number64(key byte, name string, v uint64) {
	if w.enc == CBOR {
		w.number(key, name, v)
		return
	}
	w.text(key, name, strconv.FormatUint(v, 10))
}

func (w *writer) text(key byte, name, v string) {
	w.key(key, name)
	w.rawText(v)
}

func (w *writer) rawText(v string) {
	v = strings.ToValidUTF8(v, "\uFFFD")
	if w.enc == CBOR {
		w.b = append(head(w.b, 3, uint64(len(v))), v...)
		return
	}
	w.b = appendJSONText(w.b, v)
}

func appendJSONText(dst []byte, v string) []byte {
	q, err := json.Marshal(v)
	if err != nil {
		panic("message: a string did not marshal: " + err.Error())
	}
	return append(dst, q...)
}

func (w *writer) texts(key byte, name string, v []string) {
	w.key(key, name)
	if w.enc == CBOR {
		w.b = head(w.b, 4, uint64(len(v)))
	} else {
		w.b = append(w.b, '[')
	}
	for i, s := range v {
		if i > 0 && w.enc == JSON {
			w.b = append(w.b, ',')
		}
		w.rawText(s)
	}
	if w.enc == JSON {
		w.b = append(w.b, ']')
	}
}

func (w *writer) bytes(key byte, name string, v []byte) {
	if w.enc == JSON {
		w.text(key, name, hex.EncodeToString(v))
		return
	}
	w.key(key, name)
	w.b = append(head(w.b, 2, uint64(len(v))), v...)
}

// choice is a number in CBOR and a name in JSON.
func (w *writer) choice(key byte, name string, v byte, names []string) {
	if w.enc == JSON {
		w.text(key, name, nameOf(names, v))
		return
	}
	w.number(key, name, uint64(v))
}

func (w *writer) value(key byte, name string, v Value) {
	if v == nil {
		return
	}
	w.key(key, name)
	if w.enc == CBOR {
		w.b = append(w.b, v...)
		return
	}
	w.b = v.appendJSON(w.b)
}

// reader has the fields of one message. The first error sticks.
type reader struct {
	enc  Encoding
	cbor map[any]cbor.RawMessage
	json map[string]any
	err  error
}

func newReader(payload []byte) *reader {
	r := &reader{}
	if r.enc, r.err = EncodingOf(payload); r.err != nil {
		return r
	}
	if len(payload) > MaxSize {
		r.err = bad("longer than %d bytes", MaxSize)
		return r
	}
	if r.enc == CBOR {
		if err := strict(MaxDepth+1).Unmarshal(payload, &r.cbor); err != nil {
			r.err = bad("%v", err)
		}
		return r
	}
	tree, err := parseJSON(payload, MaxDepth+1)
	if err != nil {
		r.err = err
		return r
	}
	r.json, _ = tree.(map[string]any) // EncodingOf has seen the {
	return r
}

func (r *reader) has(key uint64, name string) bool {
	if r.err != nil {
		return false
	}
	if r.enc == JSON {
		_, ok := r.json[name]
		return ok
	}
	_, ok := r.cbor[key]
	return ok
}

// field unpacks one field: into a Go value from CBOR, or as parsed from JSON.
func (r *reader) field(key uint64, name string) (v any) {
	if r.err != nil {
		return nil
	}
	if !r.has(key, name) {
		r.err = bad("%s (%d) is missing", name, key)
		return nil
	}
	if r.enc == JSON {
		return r.json[name]
	}
	if err := strict(MaxDepth).Unmarshal(r.cbor[key], &v); err != nil {
		r.err = bad("%s: %v", name, err)
	}
	return v
}

func (r *reader) number(key uint64, name string) uint64 {
	switch v := r.field(key, name).(type) {
	case uint64:
		return v
	case json.Number:
		return r.parse(name, string(v))
	case string:
		if r.enc == JSON {
			return r.parse(name, v)
		}
	}
	r.wrong(name, "an unsigned number")
	return 0
}

func (r *reader) parse(name, s string) uint64 {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		r.wrong(name, "an unsigned 64-bit number")
	}
	return n
}

func (r *reader) wrong(name, want string) {
	if r.err == nil {
		r.err = bad("%s is not %s", name, want)
	}
}

func (r *reader) nonzero(key uint64, name string) uint64 {
	v := r.number(key, name)
	if v == 0 {
		r.wrong(name, "above 0")
	}
	return v
}

func (r *reader) upTo(key uint64, name string, most uint64) uint64 {
	v := r.number(key, name)
	if v > most {
		r.wrong(name, "at most "+strconv.FormatUint(most, 10))
	}
	return v
}

func (r *reader) text(key uint64, name string) string {
	v, ok := r.field(key, name).(string)
	if !ok {
		r.wrong(name, "a text")
	}
	return r.checkText(name, v)
}

// checkText bounds a text and refuses control characters: it will be shown on terminals.
func (r *reader) checkText(name, v string) string {
	if len(v) > MaxText {
		r.wrong(name, "within "+strconv.Itoa(MaxText)+" bytes")
	}
	if strings.ContainsFunc(v, unicode.IsControl) {
		r.wrong(name, "free of control characters")
	}
	return v
}

func (r *reader) texts(key uint64, name string) []string {
	list, ok := r.field(key, name).([]any)
	if !ok || len(list) > MaxFeatures {
		r.wrong(name, "a list of at most "+strconv.Itoa(MaxFeatures)+" texts")
		return nil
	}
	out := make([]string, 0, len(list))
	for _, e := range list {
		s, ok := e.(string)
		if !ok {
			r.wrong(name, "a list of texts")
		}
		out = append(out, r.checkText(name, s))
	}
	return out
}

func (r *reader) bytes(key uint64, name string, most int) []byte {
	v := r.field(key, name)
	b, ok := v.([]byte)
	if s, isText := v.(string); isText && r.enc == JSON {
		var err error
		b, err = hex.DecodeString(s)
		ok = err == nil
	}
	if !ok || len(b) > most {
		r.wrong(name, "a byte string of at most "+strconv.Itoa(most)+" bytes")
		return nil
	}
	return b
}

func (r *reader) choice(key uint64, name string, names []string) byte {
	if r.enc == CBOR {
		return byte(r.upTo(key, name, uint64(len(names)-1)))
	}
	v := r.text(key, name)
	for i, s := range names {
		if s == v {
			return byte(i)
		}
	}
	r.wrong(name, "one of "+strings.Join(names, ", "))
	return 0
}

func (r *reader) value(key uint64, name string, required bool) Value {
	if !required && !r.has(key, name) {
		return nil
	}
	v := r.field(key, name)
	if r.err != nil {
		return nil
	}
	if r.enc == CBOR {
		return r.rawValue(name, r.cbor[key])
	}
	out, err := valueOfTree(v)
	if err != nil {
		r.err = bad("%s: %v", name, err)
	}
	return out
}

func (r *reader) rawValue(name string, raw []byte) Value {
	if len(raw) > MaxValue {
		r.wrong(name, "within "+strconv.Itoa(MaxValue)+" bytes")
		return nil
	}
	return slices.Clone(raw)
}

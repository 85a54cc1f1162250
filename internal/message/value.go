package message

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"math"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"
)

// Value is one item of the application's own data, kept as the CBOR it is on the wire: the
// args of a command, a result, a document. nil is none at all; null is {0xF6}.
type Value []byte

// ValueOf encodes v, which is anything that fxamacker/cbor can marshal.
func ValueOf(v any) (Value, error) {
	b, err := cbor.Marshal(v)
	if err != nil {
		return nil, bad("%v", err)
	}
	return ParseValue(b)
}

// ParseValue checks that b is one well-formed CBOR item of the kind that a Value may
// be: definite lengths, no tags, no duplicate keys, at most MaxDepth deep.
func ParseValue(b []byte) (Value, error) {
	if len(b) > MaxValue {
		return nil, bad("longer than %d bytes", MaxValue)
	}
	var v any
	if err := strict(MaxDepth).Unmarshal(b, &v); err != nil {
		return nil, bad("%v", err)
	}
	return slices.Clone(b), nil
}

// ValueFromJSON translates one JSON value. Integers stay integers, up to 64 bits; other
// numbers become binary64.
func ValueFromJSON(b []byte) (Value, error) {
	tree, err := parseJSON(b, MaxDepth)
	if err != nil {
		return nil, err
	}
	return valueOfTree(tree)
}

func valueOfTree(tree any) (Value, error) {
	b, err := appendCBOR(nil, tree)
	if err == nil && len(b) > MaxValue {
		err = bad("longer than %d bytes in CBOR", MaxValue)
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

// Unmarshal decodes v into the variable that out points to, as fxamacker/cbor does.
func (v Value) Unmarshal(out any) error {
	if err := strict(MaxDepth).Unmarshal(v, out); err != nil {
		return bad("%v", err)
	}
	return nil
}

// JSON shows v: byte strings in lower-case hex, integers beyond 53 bits as strings, keys
// that are not texts as texts, NaN and infinities as null. A nil Value is null.
func (v Value) JSON() []byte { return v.appendJSON(nil) }

func (v Value) appendJSON(dst []byte) []byte {
	var tree any
	if err := strict(MaxDepth).Unmarshal(v, &tree); err != nil {
		return append(dst, "null"...)
	}
	return appendJSON(dst, tree)
}

// strict is the decoder of everything that comes from outside. It is made anew where it
// is used: it costs less than a microsecond and leaves no package state.
func strict(depth int) cbor.DecMode {
	mode, err := cbor.DecOptions{
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
		IndefLength:      cbor.IndefLengthForbidden,
		TagsMd:           cbor.TagsForbidden,
		UTF8:             cbor.UTF8RejectInvalid,
		MaxNestedLevels:  depth,
		MaxArrayElements: MaxSize,
		MaxMapPairs:      MaxSize,
	}.DecMode()
	if err != nil {
		panic("message: options of the CBOR decoder: " + err.Error())
	}
	return mode
}

// parseJSON reads one value with nothing after it. Numbers stay json.Number.
func parseJSON(b []byte, depth int) (any, error) {
	switch {
	case len(b) > MaxSize:
		return nil, bad("longer than %d bytes", MaxSize)
	case !utf8.Valid(b):
		return nil, bad("JSON is not UTF-8")
	case !json.Valid(b):
		return nil, bad("malformed JSON")
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	return parseJSONValue(d, depth)
}

// parseJSONValue builds the tree itself: encoding/json would let the last of two equal
// keys win, and would recurse as deep as it is told to.
func parseJSONValue(d *json.Decoder, depth int) (any, error) {
	tok, err := d.Token()
	if err != nil {
		return nil, bad("%v", err)
	}
	delim, nested := tok.(json.Delim)
	switch {
	case !nested:
		return tok, nil
	case depth == 0:
		return nil, bad("nested too deep")
	case delim == '[':
		return parseJSONArray(d, depth-1)
	}
	return parseJSONObject(d, depth-1)
}

func parseJSONArray(d *json.Decoder, depth int) (any, error) {
	list := []any{}
	for d.More() {
		v, err := parseJSONValue(d, depth)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	_, err := d.Token()
	return list, err
}

func parseJSONObject(d *json.Decoder, depth int) (any, error) {
	m := map[string]any{}
	for d.More() {
		tok, err := d.Token()
		if err != nil {
			return nil, bad("%v", err)
		}
		key, _ := tok.(string) // json.Valid has seen to that
		if _, twice := m[key]; twice {
			return nil, bad("key %q twice", key)
		}
		if m[key], err = parseJSONValue(d, depth); err != nil {
			return nil, err
		}
	}
	_, err := d.Token()
	return m, err
}

// appendCBOR encodes a tree of parseJSON. Maps are in the order of their keys' encodings
// (RFC 8949 4.2.1), so that one document has one encoding.
func appendCBOR(dst []byte, tree any) ([]byte, error) {
	switch v := tree.(type) {
	case nil:
		return append(dst, 0xF6), nil
	case bool:
		if v {
			return append(dst, 0xF5), nil
		}
		return append(dst, 0xF4), nil
	case string:
		return append(head(dst, 3, uint64(len(v))), v...), nil
	case json.Number:
		return appendCBORNumber(dst, string(v))
	case []any:
		dst = head(dst, 4, uint64(len(v)))
		for _, e := range v {
			var err error
			if dst, err = appendCBOR(dst, e); err != nil {
				return nil, err
			}
		}
		return dst, nil
	case map[string]any:
		return appendCBORMap(dst, v)
	}
	return nil, bad("%T has no CBOR form", tree)
}

func appendCBORMap(dst []byte, m map[string]any) ([]byte, error) {
	dst = head(dst, 5, uint64(len(m)))
	for _, k := range sortedKeys(m) {
		var err error
		dst = append(head(dst, 3, uint64(len(k))), k...)
		if dst, err = appendCBOR(dst, m[k]); err != nil {
			return nil, err
		}
	}
	return dst, nil
}

func sortedKeys(m map[string]any) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b string) int {
		if len(a) != len(b) {
			return len(a) - len(b)
		}
		return strings.Compare(a, b)
	})
	return keys
}

func appendCBORNumber(dst []byte, s string) ([]byte, error) {
	if n, err := strconv.ParseUint(s, 10, 64); err == nil {
		return head(dst, 0, n), nil
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil && n < 0 {
		return head(dst, 1, uint64(-1-n)), nil
	}
	if !strings.ContainsAny(s, ".eE") && s != "-0" {
		return nil, bad("%s is beyond 64 bits", s)
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return nil, bad("%s is no binary64 number", s)
	}
	bits := math.Float64bits(f)
	dst = append(dst, 0xFB)
	for shift := 56; shift >= 0; shift -= 8 {
		dst = append(dst, byte(bits>>shift))
	}
	return dst, nil
}

// appendJSON shows a tree of the CBOR decoder.
func appendJSON(dst []byte, tree any) []byte {
	switch v := tree.(type) {
	case bool:
		return strconv.AppendBool(dst, v)
	case string:
		return appendJSONText(dst, v)
	case []byte:
		return appendJSONText(dst, hex.EncodeToString(v))
	case cbor.ByteString:
		return appendJSONText(dst, hex.EncodeToString([]byte(v)))
	case uint64:
		return appendJSONInt(dst, strconv.FormatUint(v, 10), v > 1<<53)
	case int64:
		return appendJSONInt(dst, strconv.FormatInt(v, 10), v < -1<<53)
	case big.Int: // below -2^63
		return appendJSONInt(dst, v.String(), true)
	case float64:
		if q, err := json.Marshal(v); err == nil {
			return append(dst, q...)
		}
	case []any:
		dst = append(dst, '[')
		for i, e := range v {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = appendJSON(dst, e)
		}
		return append(dst, ']')
	case map[any]any:
		return appendJSONMap(dst, v)
	}
	return append(dst, "null"...) // null, undefined, NaN, an infinity
}

func appendJSONInt(dst []byte, digits string, quote bool) []byte {
	if quote {
		return appendJSONText(dst, digits)
	}
	return append(dst, digits...)
}

// appendJSONMap sorts the keys, so that what is shown does not change from call to call.
// Keys that differ only in their type, 1 and "1", get their type in front.
func appendJSONMap(dst []byte, m map[any]any) []byte {
	named := make(map[string]any, len(m))
	for k, v := range m {
		name, isText := k.(string)
		if !isText {
			name = string(appendJSON(nil, k))
			if _, taken := m[name]; taken {
				name = "(" + name + ")"
			}
		}
		named[name] = v
	}
	dst = append(dst, '{')
	for i, k := range sortedKeys(named) {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(appendJSONText(dst, k), ':')
		dst = appendJSON(dst, named[k])
	}
	return append(dst, '}')
}

package config

import (
	_ "embed"
	"encoding"
	"fmt"
	"reflect"
	"strconv"
	"strings"
)

// manual is hawser.toml with the defaults and, above each key, the comment of its
// field. It is generated from config.go: go test ./internal/config -update
//
//go:embed manual.toml
var manual string

// Marshal gives c as the annotated file: the manual with c's values in it.
func Marshal(c *Config) ([]byte, error) {
	values, err := c.values()
	if err != nil {
		return nil, err
	}
	var out strings.Builder
	table := ""
	for line := range strings.Lines(manual) {
		if strings.HasPrefix(line, "[") {
			table = strings.Trim(line, "[]\n") + "."
		}
		key, _, isValue := strings.Cut(line, " = ")
		if !isValue || strings.HasPrefix(line, "#") {
			out.WriteString(line)
			continue
		}
		v, ok := values[table+key]
		if !ok {
			return nil, fmt.Errorf("the manual has the key %s%s, the config has not", table, key)
		}
		out.WriteString(key + " = " + v + "\n")
	}
	return []byte(out.String()), nil
}

// values maps each dotted key to its value as TOML text.
func (c *Config) values() (map[string]string, error) {
	out := map[string]string{}
	return out, collect(out, "", reflect.ValueOf(*c))
}

func collect(out map[string]string, prefix string, v reflect.Value) error {
	for i := range v.NumField() {
		key := prefix + v.Type().Field(i).Tag.Get("toml")
		f := v.Field(i)
		if f.Kind() == reflect.Struct {
			if err := collect(out, key+".", f); err != nil {
				return err
			}
			continue
		}
		text, err := literal(f)
		if err != nil {
			return fmt.Errorf("config key %s: %w", key, err)
		}
		out[key] = text
	}
	return nil
}

// literal writes one value as TOML.
func literal(v reflect.Value) (string, error) {
	if m, ok := v.Interface().(encoding.TextMarshaler); ok {
		b, err := m.MarshalText()
		return quote(string(b)), err
	}
	switch v.Kind() {
	case reflect.String:
		return quote(v.String()), nil
	case reflect.Bool:
		return strconv.FormatBool(v.Bool()), nil
	case reflect.Int:
		return strconv.FormatInt(v.Int(), 10), nil
	case reflect.Uint16:
		return strconv.FormatUint(v.Uint(), 10), nil
	case reflect.Float64:
		s := strconv.FormatFloat(v.Float(), 'f', -1, 64)
		if !strings.Contains(s, ".") {
			s += ".0"
		}
		return s, nil
	case reflect.Slice:
		var items []string
		for i := range v.Len() {
			items = append(items, quote(v.Index(i).String()))
		}
		return "[" + strings.Join(items, ", ") + "]", nil
	}
	return "", fmt.Errorf("no way to write a %s", v.Kind())
}

// quote writes a TOML basic string.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, "\\u%04X", r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

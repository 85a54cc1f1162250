package config

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write manual.toml from the comments of config.go")

// writer renders the manual from the parsed source of config.go.
type writer struct {
	out     strings.Builder
	structs map[string]*ast.StructType
	values  map[string]string
}

func (w *writer) fields(name, prefix string) {
	var tables []*ast.Field
	for _, f := range w.structs[name].Fields.List {
		if id, ok := f.Type.(*ast.Ident); ok && w.structs[id.Name] != nil {
			tables = append(tables, f)
			continue
		}
		w.comment(f.Doc)
		key := tomlKey(f)
		fmt.Fprintf(&w.out, "%s = %s\n", key, w.values[prefix+key])
	}
	for _, f := range tables {
		w.out.WriteString("\n")
		w.comment(f.Doc)
		key := prefix + tomlKey(f)
		fmt.Fprintf(&w.out, "[%s]\n\n", key)
		w.fields(f.Type.(*ast.Ident).Name, key+".")
	}
}

func (w *writer) comment(doc *ast.CommentGroup) {
	for _, line := range strings.Split(strings.TrimSpace(doc.Text()), "\n") {
		fmt.Fprintf(&w.out, "# %s\n", line)
	}
}

func tomlKey(f *ast.Field) string {
	return reflect.StructTag(strings.Trim(f.Tag.Value, "`")).Get("toml")
}

func render(t *testing.T) string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "config.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	w := &writer{structs: map[string]*ast.StructType{}}
	ast.Inspect(file, func(n ast.Node) bool {
		if ts, ok := n.(*ast.TypeSpec); ok {
			if st, ok := ts.Type.(*ast.StructType); ok {
				w.structs[ts.Name.Name] = st
			}
		}
		return true
	})
	c := Default()
	if w.values, err = c.values(); err != nil {
		t.Fatal(err)
	}
	w.out.WriteString("# hawser.toml: the configuration of one fleet. Keys that are left out have the values\n" +
		"# shown here; keys that do not exist are errors. Relative paths start at this directory.\n")
	w.fields("Config", "")
	return w.out.String()
}

// The manual in the file is the comments of the struct, word for word, and its
// values are the defaults.
func TestManualIsTheStruct(t *testing.T) {
	want := render(t)
	if *update {
		if err := os.WriteFile("manual.toml", []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if want != manual {
		t.Fatal("manual.toml differs from config.go: run go test ./internal/config -update")
	}
}

func filled() Config {
	c := Default()
	c.Fleet.ID = FleetID{1, 2, 3}
	c.Fleet.Domains = []string{"mqtt.example.com", "rescue.example.com"}
	return c
}

func TestMarshalThenParse(t *testing.T) {
	c := filled()
	c.Fleet.Organisation = "A \"quoted\" \\ näme\u0001"
	c.Fleet.Trial = true
	c.Limits.Device.MessagesPerSecond = 0.5
	c.Log.MaxAge = Duration(90 * 60e9)
	text, err := Marshal(&c)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(*got, c) {
		t.Fatalf("got %+v\nwant %+v", *got, c)
	}
}

func TestRefused(t *testing.T) {
	c := filled()
	good, err := Marshal(&c)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ old, new, want string }{
		{"trial = false", "trail = false", `unknown key "fleet.trail"`},
		{"[limits.device]", "[limits.devices]", `unknown key "limits.devices`},
		{"trial = false", "trial = maybe", "line "},
		{"trial = false", "trial = \"no\"", "line "},
		{"max_write = \"2KiB\"", "max_write = \"2KB\"", "size"},
		{"max_write = \"2KiB\"", "max_write = \"17KiB\"", "limits.max_write"},
		{"max_packet = \"256KiB\"", "max_packet = \"257KiB\"", "limits.max_packet"},
		{"log_share = 5.0", "log_share = nan", "limits.device.log_share"},
		{"pre_admission = \"10s\"", "pre_admission = \"-10s\"", "duration"},
		{"\"mqtt.example.com\", ", "\"rescue.example.com\", ", "twice"},
		{"id = \"01", "id = \"0G", "fleet id"},
		{"TLS_AES_128_GCM_SHA256", "TLS_RSA_WITH_RC4_128_SHA", "tls.suites"},
		{"on_clone = \"report\"", "on_clone = \"revoke\"", "devices.on_clone"},
		{"port = 8883", "port = 0", "fleet.port"},
		{"nats_credentials = \"\"", "nats_credentials = \"x\"", "nats_url"},
		{"listen = \":8883\"", "listen = \"8883\"", "serve.listen"},
	} {
		text := strings.Replace(string(good), tc.old, tc.new, 1)
		if text == string(good) {
			t.Errorf("%q is not in the file", tc.old)
			continue
		}
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q: got %v, want %q", tc.new, err, tc.want)
		}
	}
}

func TestUnknownKeyNamesItsLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hawser.toml")
	if err := os.WriteFile(path, []byte("[fleet]\n\nnonsense = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Load(path)
	if err == nil || !strings.Contains(err.Error(), path+`: line 3: unknown key "fleet.nonsense"`) {
		t.Fatal(err)
	}
}

func TestUnits(t *testing.T) {
	for text, want := range map[string]Size{"0B": 0, "512B": 512, "1536B": 1536, "16KiB": 16 * KiB, "8GiB": 8 * GiB} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want || s.String() != text {
			t.Errorf("%s: %d %s %v", text, s, s, err)
		}
	}
	for text, want := range map[string]Duration{"0s": 0, "15m": 15 * 60 * Second, "1h30m": 5400 * Second, "10h": 36000 * Second,
		"30d": 30 * Day, "1m30s": 90 * Second, "100ms": Second / 10} {
		var d Duration
		if err := d.UnmarshalText([]byte(text)); err != nil || d != want || d.String() != text {
			t.Errorf("%s: %d %s %v", text, d, d, err)
		}
	}
	for _, bad := range []string{"", "B", "KiB", "-1B", "1", "1.5KiB", "9223372036854775807KiB", "8388608TiB"} {
		if new(Size).UnmarshalText([]byte(bad)) == nil {
			t.Errorf("size %q was accepted", bad)
		}
	}
	for _, bad := range []string{"", "d", "-1d", "1.5d", "200000d", "5", "-5s"} {
		if new(Duration).UnmarshalText([]byte(bad)) == nil {
			t.Errorf("duration %q was accepted", bad)
		}
	}
}

func FuzzParse(f *testing.F) {
	c := filled()
	good, err := Marshal(&c)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte("[fleet]\nid = 1\n"))
	f.Add([]byte("limits.device = []"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse(text)
		if err != nil {
			return
		}
		out, err := Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(out)
		if err != nil || !reflect.DeepEqual(c, again) {
			t.Fatalf("a config that was read does not survive writing: %v", err)
		}
	})
}

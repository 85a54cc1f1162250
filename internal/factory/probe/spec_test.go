package probe

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]Spec{
		"gdb:127.0.0.1:3333":        {Kind: "gdb", Server: "127.0.0.1:3333"},
		"gdb:localhost:1":           {Kind: "gdb", Server: "127.0.0.1:1"},
		"gdb:127.9.8.7:65535":       {Kind: "gdb", Server: "127.9.8.7:65535"},
		"gdb:[::1]:3333,trust=4096": {Kind: "gdb", Server: "[::1]:3333", Trust: 4096, HasTrust: true},
		"gdb:127.0.0.1:2331,identity=0x10001080,trust=0x10002000": {Kind: "gdb", Server: "127.0.0.1:2331",
			Identity: 0x10001080, HasIdentity: true, Trust: 0x10002000, HasTrust: true},
		"exec:openocd -c a,b:c": {Kind: "exec", Command: "openocd -c a,b:c"},
		"exec: identity=1 cmd":  {Kind: "exec", Command: " identity=1 cmd"},
		"exec:identity=0x10001080,trust=0:flash --x=a,b:c": {Kind: "exec", Command: "flash --x=a,b:c",
			Identity: 0x10001080, HasIdentity: true, HasTrust: true},
	} {
		got, err := Parse(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if again, err := Parse(got.String()); err != nil || got.String() != again.String() {
			t.Errorf("%s: written as %s, which is not read: %v", text, got, err)
		}
		got.Buffer, want.Buffer = nil, nil
		if got.String() != want.String() || got.Kind != want.Kind || got.Command != want.Command || got.HasTrust != want.HasTrust {
			t.Errorf("%s: %+v", text, got)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for text, why := range map[string]string{
		"":                                           "neither",
		"gdb":                                        "neither",
		"uart:/dev/ttyUSB0":                          "neither",
		"gdb:":                                       "loopback address",
		"gdb:3333":                                   "loopback address",
		"gdb:127.0.0.1":                              "loopback address",
		"gdb:127.0.0.1:0":                            "port 0",
		"gdb:127.0.0.1:99999":                        "loopback address",
		"gdb:192.168.1.5:3333":                       "another machine",
		"gdb:0.0.0.0:3333":                           "another machine",
		"gdb:[::]:3333":                              "another machine",
		"gdb:[::1%lo]:3333":                          "loopback address",
		"gdb:[fe80::1]:3333":                         "another machine",
		"gdb:bench.example.org:3333":                 "loopback address",
		"gdb:localhost.example.org:3":                "loopback address",
		"gdb:127.0.0.1:1,":                           "unknown option",
		"gdb:127.0.0.1:1,identity":                   "no address",
		"gdb:127.0.0.1:1,identity=":                  "no address",
		"gdb:127.0.0.1:1,identity=-1":                "no address",
		"gdb:127.0.0.1:1,identity=010":               "no address",
		"gdb:127.0.0.1:1,identity=0x1_0":             "no address",
		"gdb:127.0.0.1:1,identity=0x100000000":       "no address",
		"gdb:127.0.0.1:1,identity=0xFFFFFF81":        "past the end",
		"gdb:127.0.0.1:1,identity=1,identity=1":      "twice",
		"gdb:127.0.0.1:1,identity=0x100,trust=0x17F": "in the identity block",
		"gdb:127.0.0.1:1,anchor=1":                   "unknown option",
		"exec:":                                      "no command",
		"exec:  ":                                    "no command",
		"exec:identity=1":                            "no colon",
		"exec:identity=1:":                           "no command",
		"exec:identity=x:y":                          "no address",
		"exec:a\nb":                                  "line end",
		"exec:" + strings.Repeat("a", maxSpec):       "longer",
	} {
		if _, err := Parse(text); err == nil || !strings.Contains(err.Error(), why) || !strings.Contains(err.Error(), "\nhint: ") {
			t.Errorf("%.60q: %v", text, err)
		}
	}
}

// TestOpenChecks: a Spec that was made by hand gets no further than one that was parsed.
func TestOpenChecks(t *testing.T) {
	for _, s := range []Spec{
		{Kind: "gdb", Server: "192.168.1.5:3333"},
		{Kind: "gdb", Server: "127.0.0.1:3333", Buffer: make([]byte, MinBuffer-1)},
		{Kind: "uart"},
	} {
		if _, err := s.Open(t.Context()); err == nil {
			t.Errorf("%s was opened", s)
		}
	}
}

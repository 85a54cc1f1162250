package probe

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestOpenOCD: a real OpenOCD, on an adapter that does nothing, gives its memory map and
// takes the flash packets. There is no unit: memory reads as ones, and a reset fails.
func TestOpenOCD(t *testing.T) {
	path := need(t, "openocd")
	port := freePort(t)
	config := filepath.Join(t.TempDir(), "openocd.cfg")
	text := fmt.Sprintf(`adapter driver dummy
adapter speed 100
transport select jtag
jtag newtap unit cpu -irlen 4
target create unit.cpu fa526 -chain-position unit.cpu
flash bank unit.flash faux 0x08000000 0x20000 4 4 unit.cpu
bindto 127.0.0.1
gdb_port %d
telnet_port disabled
tcl_port disabled
init
`, port)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, path, "-f", config)
	p := open(t, fmt.Sprintf("gdb:127.0.0.1:%d", port), nil)
	var flash *area
	for i, a := range p.(*GDB).areas {
		if a.kind == "flash" {
			flash = &p.(*GDB).areas[i]
		}
	}
	if flash == nil || flash.start != 0x08000000 || flash.end != 0x08020000 || flash.block != 0x10000 {
		t.Fatalf("memory map: %+v", p.(*GDB).areas)
	}
	if err := p.Write(t.Context(), []Region{{0x08008003, pattern(5000), true}, {0x08010000, pattern(1), false}}); err != nil {
		t.Error(err)
	}
	if got, err := p.Read(t.Context(), 0x08008003, 4); err != nil || string(got) != "\xff\xff\xff\xff" {
		t.Errorf("read back % x, %v", got, err)
	}
	if err := p.Reset(t.Context()); !errors.Is(err, ErrTarget) || !strings.Contains(err.Error(), "how to reset?") {
		t.Errorf("reset: %v", err)
	}
}

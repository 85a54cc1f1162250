package main

import (
	"context"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/factory/bench"
	"hawser/internal/factory/keyroom"
	"hawser/internal/identity"
)

const benchEnv = "HAWSER_BENCH"

// benchDir is the flag --dir of the commands at the bench: its directory, no fleet.
func benchDir(cmd *cobra.Command, dir *string) {
	def := os.Getenv(benchEnv)
	if def == "" {
		def = "bench"
	}
	cmd.Flags().StringVar(dir, "dir", def, "directory of the bench; also $"+benchEnv)
}

func (a *app) factoryInit() *cobra.Command {
	s := bench.Settings{}
	var dir string
	var pass passphrases
	cmd := &cobra.Command{
		Use:   "init --station NAME --probe SPEC",
		Short: "set up a flashing bench",
		Long: `init makes the directory of a bench: its settings (bench.toml), and the station's key
with a certificate request, station.csr. Carry that to the server, where "hawser factory
reserve" answers it with a block of ids, and "factory load" takes the block in here.

--key says where the station's key is. A file: that does not exist is made, encrypted with
a passphrase; --trial leaves it without one. A path that is not absolute lies in the
directory of the bench.

--probe says how units are reached: gdb:127.0.0.1:PORT,identity=ADDRESS,trust=ADDRESS for
a debug server on this machine (OpenOCD, J-Link, pyOCD, QEMU), or
exec:identity=ADDRESS,trust=ADDRESS:COMMAND for a command that takes Intel HEX on its
standard input. The identity block has 128 bytes, the trust region up to 8 KiB.

--lock is a command that closes a unit's debug port. Afterwards a debug read must be
refused, or the unit fails. $HAWSER_UNIT is its id.`,
		Example: `  hawser factory init --station line1 \
      --probe gdb:127.0.0.1:3333,identity=0x10001080,trust=0x7e000
  hawser factory init --dir bench --station line1 --trial --class sensor-a --hardware 3 \
      --probe gdb:127.0.0.1:1234,identity=0x20010000,trust=0x20011000`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := identity.CheckName(s.Station); err != nil {
				return usagef(cmd, "station %q: %v", s.Station, err)
			}
			if s.Probe == "" {
				return usagef(cmd, "how are units reached?\nhint: --probe gdb:127.0.0.1:3333,identity=ADDRESS,trust=ADDRESS")
			}
			return a.initBench(dir, s, &pass)
		},
	}
	benchDir(cmd, &dir)
	f := cmd.Flags()
	f.StringVar(&s.Station, "station", "", "name of the station, like line1")
	f.StringVar(&s.Key, "key", bench.KeyFile, "URI of the station's key")
	f.BoolVar(&s.Trial, "trial", false, "make the key file without a passphrase")
	f.StringVar(&s.Probe, "probe", "", "how units are reached")
	f.StringVar(&s.Class, "class", "", "class of the units: [a-z0-9][a-z0-9-]{0,30}")
	f.Uint32Var(&s.Hardware, "hardware", 0, "hardware revision of the units, 0 for none")
	f.StringVar(&s.Lock, "lock", "", "command that locks a unit's debug port")
	pass.flag(cmd)
	return a.withJSON(cmd)
}

func (a *app) initBench(dir string, s bench.Settings, pass *passphrases) error {
	if err := keyroom.Harden(); err != nil {
		return err
	}
	csr, err := bench.Init(dir, s, func() ([]byte, error) { return pass.fresh("the key of station " + s.Station) })
	if err != nil {
		return err
	}
	v := struct {
		Station string `json:"station"`
		Request string `json:"request"`
	}{s.Station, csr}
	return emitOne(a, v, func() {
		a.say("bench %s made in %s", s.Station, dir)
		if s.Trial {
			a.say("TRIAL: the station's key lies unencrypted in it")
		}
		a.say("next, on the server: hawser factory reserve --station %s --station-csr %s", s.Station, filepath.Base(csr))
		a.say("      then, here:    hawser factory load --dir %s FILE.block", dir)
	})
}

func (a *app) factoryLoad() *cobra.Command {
	var dir, ca string
	cmd := &cobra.Command{
		Use:   "load FILE",
		Short: "take a block of ids in",
		Long: `load takes a block in that "hawser factory reserve" wrote for this bench. The first one
pins the fleet and its device CA: compare the fingerprint with what the server shows.
Later blocks must come from the same two. Several blocks can be loaded; those that expire
first are used first. A block that is refused changes nothing.

When the fleet has a new device CA, --device-ca names its fingerprint.`,
		Example: `  hawser factory load --dir bench line1.block`,
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			file, err := readFile(args[0])
			if err != nil {
				return err
			}
			v, err := bench.Load(dir, file, ca)
			if err != nil {
				return err
			}
			return a.sayLoaded(v)
		},
	}
	benchDir(cmd, &dir)
	cmd.Flags().StringVar(&ca, "device-ca", "", "fingerprint of the device CA that the block must come from (SHA-256, hex)")
	return a.withJSON(cmd)
}

// loadedBlock is what load says with --json.
type loadedBlock struct {
	Block    string    `json:"block"`
	Fleet    string    `json:"fleet"`
	DeviceCA string    `json:"device_ca"`
	IDs      int       `json:"ids"`
	Expires  time.Time `json:"expires"`
	Again    bool      `json:"again"`
}

func (a *app) sayLoaded(l *bench.Loaded) error {
	v := loadedBlock{l.Block.ID.String(), hex.EncodeToString(l.Block.Fleet[:]), bench.Fingerprint(l.Block), len(l.Block.IDs), l.Block.Expires.UTC(), l.Again}
	return emitOne(a, v, func() {
		if l.Again {
			a.say("block %s was loaded before", v.Block)
			return
		}
		a.say("block %s: %d ids, until %s", v.Block, v.IDs, stamp(v.Expires))
		if l.First {
			a.say("pinned: fleet %s", v.Fleet)
			a.say("        device CA %s, SHA-256 %s", l.Block.DeviceCA.Subject.CommonName, v.DeviceCA)
		}
	})
}

// openBench opens the bench for a command that uses its key.
func (a *app) openBench(dir string, pass *passphrases) (*bench.Bench, error) {
	if err := keyroom.Harden(); err != nil {
		return nil, err
	}
	b, err := bench.Open(dir, func() ([]byte, error) { return pass.known("the key of the station") }, time.Now())
	if err != nil {
		return nil, err
	}
	for _, id := range b.Burnt {
		if err := a.sayBurnt(id); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func (a *app) sayBurnt(id identity.ID) error {
	if a.json {
		return a.emit(unitLine{Result: "burnt", ID: id.String(), Reason: "the bench stopped in the middle of the unit", Time: time.Now().UTC()})
	}
	a.note("%s is burnt: the bench stopped in the middle of the unit, which must be done again", id)
	return nil
}

// childCommand is how this program starts itself for one key.
func childCommand() ([]string, error) {
	self, err := os.Executable()
	return []string{self, "factory", "unit-child"}, err
}

func (a *app) factoryChild() *cobra.Command {
	return &cobra.Command{
		Use:    "unit-child",
		Hidden: true,
		Short:  "make the key of one unit (started by run and verify)",
		Long: `unit-child is the process in which "factory run" makes the key of one unit, and in which
"factory verify" reads one: it dumps no core, locks its memory, and talks to its parent
over the descriptors 3 and 4. There is no use in starting it by hand.`,
		Example: `  hawser factory unit-child 3<orders 4>answers`,
		Args:    cobra.NoArgs,
		RunE:    func(*cobra.Command, []string) error { return keyroom.Main() },
	}
}

func (a *app) factoryVerify() *cobra.Command {
	var dir, probe string
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "read a unit back and say whether it is whole",
		Long: `verify reads identity block and trust region of the unit on the probe, says which id it
is, and whether checksums, certificate and key agree, whether this station signed it, and
what the journal says about it. The unit is restarted. It ends with 1 if anything does not
fit. The key is read in a process of its own, as in "factory run", and not shown.

With --probe no bench is needed; then the unit is only held against itself.`,
		Example: `  hawser factory verify --dir bench
  hawser factory verify --probe gdb:127.0.0.1:3333,identity=0x10001080,trust=0x7e000 --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.verifyUnit(cmd.Context(), dir, probe) },
	}
	benchDir(cmd, &dir)
	cmd.Flags().StringVar(&probe, "probe", "", "how the unit is reached (default: as the bench does)")
	return a.withJSON(cmd)
}

// verified is what verify says with --json.
type verified struct {
	ID          string   `json:"id,omitempty"`
	Good        bool     `json:"good"`
	Certificate string   `json:"certificate,omitempty"`
	Key         string   `json:"key,omitempty"`
	Anchors     uint64   `json:"anchors,string"`
	Journal     string   `json:"journal,omitempty"`
	Faults      []string `json:"faults,omitempty"`
}

func (a *app) verifyUnit(ctx context.Context, dir, probe string) error {
	c, err := bench.NewChecker(dir, probe)
	if err != nil {
		return err
	}
	if c.Child, err = childCommand(); err != nil {
		return err
	}
	p := a.waiting()
	c.Wait = p.wait
	v, err := c.Verify(ctx)
	p.end()
	if ctx.Err() != nil {
		return errors.New("stopped before a unit was read")
	}
	if err != nil {
		return err
	}
	out := verified{Good: len(v.Faults) == 0, Certificate: v.Certificate, Key: v.Key, Anchors: v.Anchors, Journal: v.Recorded, Faults: v.Faults}
	if v.ID != 0 {
		out.ID = v.ID.String()
	}
	if err := emitOne(a, out, func() { a.sayVerdict(&out) }); err != nil || out.Good {
		return err
	}
	return exit(1)
}

func (a *app) sayVerdict(v *verified) {
	name := v.ID
	if name == "" {
		name = "the unit"
	}
	if v.Good {
		a.say("%s is whole: identity block, certificate and key agree", name)
	} else {
		a.say("%s is NOT whole", name)
	}
	journal := map[string]string{"unit": "it is there", "burnt": "the id is burnt", "no": "it is not there: made by another bench?"}[v.Journal]
	a.fields("certificate", v.Certificate, "key", v.Key, "journal", journal)
	for _, f := range v.Faults {
		a.say("wrong: %s", printable(f))
	}
}

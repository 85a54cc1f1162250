package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/durable"
	"hawser/internal/factory"
	"hawser/internal/fleet"
	"hawser/internal/pki"
)

// newBlock is what reserve is told.
type newBlock struct {
	station string
	count   int
	out     string
	csr     string // file, "" for a station that is known
	expires string
	sign    signer
}

func (a *app) factoryReserve() *cobra.Command {
	var n newBlock
	cmd := &cobra.Command{
		Use:   "reserve --station NAME --count N --out FILE",
		Short: "reserve ids for a flashing bench, and write its block file",
		Long: `reserve draws ids that nobody else will ever get and writes them, with the station's
certificate and the fleet's anchor set, into a signed block file: carry it to the bench,
"hawser factory load" it there. The first time, --station-csr names the request that
"hawser factory init" wrote on the bench; its key is then the station's for good.

A trial fleet signs at once. Elsewhere --ca names the CA directory, or a request file
is written, to be answered with "hawser ca sign" and "hawser ca import". Each block comes
with a new certificate for the station's key, for a year.

After --expires no unit is begun with the block. Units that were made are imported
whenever their journal comes.`,
		Example: `  hawser factory reserve --dir fleet --station line1 --count 500 --out line1.block \
      --station-csr station.csr
  hawser factory reserve --station line1 --count 500 --out more.block --expires 30d`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			order, err := n.check(cmd)
			if err != nil {
				return err
			}
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.reserveBlock(ctx, c, &n, order) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&n.station, "station", "", "name of the bench: [a-z][a-z0-9-]{0,30}")
	f.IntVar(&n.count, "count", 0, "how many ids, 1 to "+strconv.Itoa(factory.MaxBlockIDs))
	f.StringVar(&n.out, "out", "", "file for the block")
	f.StringVar(&n.csr, "station-csr", "", "certificate request of the bench, needed the first time; - is standard input")
	f.StringVar(&n.expires, "expires", "90d", "how long the bench may begin units with the block")
	// The error is that there is no such flag: there is, a few lines above.
	_ = cmd.RegisterFlagCompletionFunc("station", a.completeStation)
	n.sign.flags(cmd)
	return a.withJSON(cmd)
}

// check refuses what can be told before anything is opened.
func (n *newBlock) check(cmd *cobra.Command) (admin.NewBlock, error) {
	var order admin.NewBlock
	if err := pki.CheckStation(n.station); err != nil {
		return order, usagef(cmd, "station %q: %v", n.station, err)
	}
	if n.count < 1 || n.count > factory.MaxBlockIDs {
		return order, usagef(cmd, "--count is 1 to %d, not %d", factory.MaxBlockIDs, n.count)
	}
	if n.out == "" {
		return order, usagef(cmd, "where to? --out FILE gets the block")
	}
	if _, err := os.Lstat(n.out); err == nil {
		return order, fmt.Errorf("%s exists already: it is not written over, and nothing was reserved\nhint: --out FILE", n.out)
	}
	d, err := span(n.expires)
	if err != nil || d <= 0 {
		return order, usagef(cmd, "--expires: %q is not a duration like 90d", n.expires)
	}
	order.Count, order.Expires = n.count, time.Now().Add(d).UTC().Truncate(time.Second)
	if n.csr == "" {
		return order, nil
	}
	text, err := readFile(n.csr)
	if err != nil {
		return order, err
	}
	csr, err := pki.ParseCSR(text)
	if err != nil {
		return order, fmt.Errorf("%s: %w", n.csr, err)
	}
	order.CSR = csr.DER
	return order, nil
}

func (a *app) reserveBlock(ctx context.Context, c *admin.Client, n *newBlock, order admin.NewBlock) error {
	l, err := fleet.OpenLayout(a.dir)
	if err != nil {
		return err
	}
	// Before the ids are drawn, so that a wrong --ca costs none.
	ca, err := n.sign.open(l, "a")
	if err != nil {
		return err
	}
	done := a.busy(ctx, "reserving %d ids", n.count)
	v, err := c.ReserveBlock(ctx, n.station, order)
	done()
	if err != nil {
		return errors.Join(err, closeCA(ca))
	}
	o, err := stationOrder(l, &v)
	if err != nil {
		return errors.Join(err, closeCA(ca))
	}
	if ca == nil {
		return a.askBlock(ctx, c, l, n, o)
	}
	_, file, err := ca.SignStation(o, time.Now())
	if err := errors.Join(err, ca.Close()); err != nil {
		return err
	}
	if err := c.BlockSigned(ctx, file); err != nil {
		return err
	}
	if err := durable.CreateFile(n.out, file, 0o644); err != nil {
		return fmt.Errorf("the ids are reserved, but the block was not written, and they are lost: %w\nhint: reserve again", err)
	}
	return a.sayBlock(file, n.out)
}

func closeCA(ca *fleet.CA) error {
	if ca == nil {
		return nil
	}
	return ca.Close()
}

func stationOrder(l *fleet.Layout, v *admin.ReservedBlock) (*fleet.StationOrder, error) {
	csr, err := pki.ParseCSR(v.CSR)
	if err != nil {
		return nil, err
	}
	return &fleet.StationOrder{Station: v.Station, CSR: csr, Block: factory.BlockID(v.BlockID()), IDs: v.IDs, Expires: v.Expires, Anchors: l.AnchorChain()}, nil
}

// askBlock writes a request for the safe.
func (a *app) askBlock(ctx context.Context, c *admin.Client, l *fleet.Layout, n *newBlock, o *fleet.StationOrder) error {
	q, err := o.Request(l.FleetID())
	if err != nil {
		return err
	}
	file, err := q.Encode()
	if err != nil {
		return err
	}
	asked, err := c.NewRequest(ctx, file)
	if err != nil {
		return err
	}
	return a.sayRequest(&asked, "ca-a", n.out)
}

// blockText is what reserve and ca import say of a block with --json.
type blockText struct {
	Station string    `json:"station"`
	Block   string    `json:"block"`
	IDs     int       `json:"ids"`
	Expires time.Time `json:"expires"`
	Out     string    `json:"out"`
}

func (a *app) sayBlock(file []byte, out string) error {
	b, err := factory.OpenBlock(file)
	if err != nil {
		return err
	}
	v := blockText{b.Station, b.ID.String(), len(b.IDs), admin.UTC(b.Expires), out}
	return emitOne(a, v, func() {
		a.say("%s: %s for station %s, to be begun until %s", out, plural(len(b.IDs), "id"), b.Station, stamp(b.Expires))
		a.say("  on the bench:   hawser factory load --dir bench %s", shellWord(out))
	})
}

func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return strconv.Itoa(n) + " " + word + "s"
}

func (a *app) factoryImport() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "import JOURNAL",
		Short: "take what a bench has made into the fleet",
		Long: `import reads a station's journal whole: its chain and signatures, each unit's request
and certificate, and that each id was reserved for this station. If anything is wrong it
names the line and imports nothing. What was imported before is passed over, so the same
journal may come twice, and a longer one brings what is new; one that does not continue
what was imported last, since its end was cut off or it was written anew, is refused.

The devices are admitted at once. The journal stays with the bench.`,
		Example: `  hawser factory import --dir fleet line1.journal`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := os.Open(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			return a.with(cmd, func(ctx context.Context, c *admin.Client) error { return a.importJournal(ctx, c, f) })
		},
	}
	return a.withJSON(cmd)
}

func (a *app) importJournal(ctx context.Context, c *admin.Client, f *os.File) error {
	done := a.busy(ctx, "checking and importing %s", f.Name())
	v, err := c.ImportJournal(ctx, bufio.NewReaderSize(f, 1<<20))
	done()
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	return emitOne(a, v, func() {
		for _, n := range v.Notes {
			a.note("%s", printable(n))
		}
		if v.Torn > 0 {
			a.note("the last line is not whole and was passed over\nhint: a bench that lost power has called no unit of that line done; else copy the journal again")
		}
		if v.New == 0 {
			a.say("station %s: nothing new in %d lines", v.Station, v.Lines)
			return
		}
		text := plural(v.Units, "device")
		if v.Burnt > 0 {
			text += ", " + plural(v.Burnt, "burnt id")
		}
		a.say("station %s: %s imported, journal of %d lines, %d of them new", v.Station, text, v.Lines, v.New)
	})
}

func (a *app) factoryStation() *cobra.Command {
	list := a.withJSON(&cobra.Command{
		Use:   "list",
		Short: "list stations, their blocks and what they have made",
		Long: `list prints each station with the end of its certificate, the ids that it may still
use, and the devices that came from it. With --json it names the blocks too.`,
		Example: `  hawser factory station list
  hawser factory station list --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.with(cmd, a.listStations) },
	})
	return group("station", "the flashing benches of the fleet", `station holds what is known of flashing benches. One becomes known with its first block:
"hawser factory reserve".`, list)
}

func (a *app) listStations(ctx context.Context, c *admin.Client) error {
	list, err := c.Stations(ctx)
	if err != nil {
		return err
	}
	return emitAll(a, list, func() {
		var rows [][]string
		for _, s := range list {
			rows = append(rows, []string{s.Name, s.State, cmp.Or(stamp(s.Until), "waits for the safe"), strconv.Itoa(len(s.Blocks)),
				strconv.Itoa(s.Left), strconv.Itoa(s.Units), strconv.Itoa(s.Burnt), ago(s.Imported, time.Now())})
		}
		a.table([]string{"STATION", "STATUS", "CERTIFICATE UNTIL", "BLOCKS", "IDS LEFT", "DEVICES", "BURNT", "LAST IMPORT"}, rows)
	})
}

// completeStation proposes names of stations.
func (a *app) completeStation(_ *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
	return a.proposals(func(ctx context.Context, c *admin.Client) ([]string, error) {
		stations, err := c.Stations(ctx)
		var list []string
		for _, s := range stations {
			if strings.HasPrefix(s.Name, typed) {
				list = append(list, described(s.Name, s.State))
			}
		}
		return list, err
	})
}

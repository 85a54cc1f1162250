package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hawser/internal/admin"
	"hawser/internal/factory"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

func (a *app) factoryJournal() *cobra.Command {
	return group("journal", "check and read a station's journal", `journal reads the journal of a flashing bench, wherever the file lies. It needs no fleet
directory: what it cannot tell is whether the station is one of the fleet. "hawser
factory import" does.`, a.journalCheck(), a.journalShow())
}

func (a *app) journalCheck() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check FILE",
		Short: "verify the chain, the signatures and the units of a journal",
		Long: `check reads the journal whole: that each line continues the one before and is signed by
the station, and that each unit's request and certificate are of one key and the
station certified it. The first line that is wrong is named.`,
		Example: `  hawser factory journal check line1.journal`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			sum, err := a.readJournal(cmd.Context(), args[0], nil)
			if err != nil {
				return err
			}
			return a.saySummary(args[0], sum)
		},
	}
	return a.withJSON(cmd)
}

func (a *app) readJournal(ctx context.Context, path string, each func(*factory.Line) error) (*factory.Summary, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	defer a.busy(ctx, "checking %s", path)()
	sum, err := factory.ReadJournal(f, factory.Known{}, each)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return sum, nil
}

// journalText is what check says with --json.
type journalText struct {
	Fleet   admin.Hex `json:"fleet"`
	Station string    `json:"station"`
	Key     admin.Hex `json:"key"`   // SHA-256 of the station's public key
	Until   time.Time `json:"until"` // end of the station's certificate
	Lines   uint64    `json:"lines,string"`
	Head    admin.Hex `json:"head"` // SHA-256 of the last line
	Blocks  int       `json:"blocks"`
	Units   int       `json:"units"`
	Burnt   int       `json:"burnt"`
	Torn    int       `json:"torn,omitempty"` // bytes of a last line that is not whole
}

func (a *app) saySummary(path string, s *factory.Summary) error {
	pub, err := pki.PublicKey(s.Cert)
	if err != nil {
		return err
	}
	key, err := pki.KeyFingerprint(pub)
	if err != nil {
		return err
	}
	v := journalText{s.Fleet[:], s.Station, key[:], admin.UTC(s.Cert.NotAfter), s.Lines, s.Head[:], s.Blocks, s.Units, s.Burnt, s.Torn}
	return emitOne(a, v, func() {
		a.say("%s: %d lines, chain and signatures hold", path, s.Lines)
		a.fields("station", v.Station, "key", v.Key.String(), "until", stamp(v.Until), "fleet", v.Fleet.String(), "head", v.Head.String(),
			"blocks", strconv.Itoa(v.Blocks), "units", strconv.Itoa(v.Units), "burnt", strconv.Itoa(v.Burnt))
		if v.Torn > 0 {
			a.note("the last line is not whole (%d bytes) and was passed over", v.Torn)
		}
	})
}

// journalUnit is what show says of a line with --json.
type journalUnit struct {
	Line     uint64      `json:"line,string"`
	Time     time.Time   `json:"time"`
	What     string      `json:"what"`
	ID       identity.ID `json:"id,omitzero"`
	Class    string      `json:"class,omitempty"`
	Hardware uint32      `json:"hardware,omitempty"`
	How      string      `json:"how,omitempty"`
	Key      admin.Hex   `json:"key,omitempty"` // SHA-256 of the unit's public key
	Block    string      `json:"block,omitempty"`
	Reason   string      `json:"reason,omitempty"`
}

func (a *app) journalShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show FILE",
		Short: "list what a bench has made, after a check",
		Long:  `show checks the journal as check does, and then lists its lines: units, burnt ids, blocks.`,
		Example: `  hawser factory journal show line1.journal
  hawser factory journal show line1.journal --json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var list []journalUnit
			_, err := a.readJournal(cmd.Context(), args[0], func(l *factory.Line) error {
				v, err := unitText(l)
				list = append(list, v)
				return err
			})
			if err != nil {
				return err
			}
			return emitAll(a, list, func() { a.unitTable(list) })
		},
	}
	return a.withJSON(cmd)
}

func unitText(l *factory.Line) (v journalUnit, err error) {
	v = journalUnit{Line: l.Number, Time: l.When.UTC(), What: l.What, Class: l.Class, Hardware: l.Hardware, How: l.How, Block: l.Block, Reason: l.Reason}
	if l.Unit != nil {
		v.Key = l.Unit.Key[:]
	}
	if l.ID != "" {
		v.ID, err = identity.ParseID(l.ID)
	}
	return v, err
}

func (a *app) unitTable(list []journalUnit) {
	var rows [][]string
	for _, v := range list {
		id, note := "", cmp.Or(v.Reason, v.Class)
		if v.ID != 0 {
			id = v.ID.String()
		}
		if v.Hardware != 0 {
			note += " hardware " + strconv.Itoa(int(v.Hardware))
		}
		if v.What == factory.Load {
			note = v.Block
		}
		rows = append(rows, []string{strconv.FormatUint(v.Line, 10), stamp(v.Time), v.What, id, strings.TrimSpace(note)})
	}
	a.table([]string{"LINE", "TIME", "WHAT", "ID", ""}, rows)
}

package server

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"hawser/internal/admin"
	"hawser/internal/factory"
	"hawser/internal/identity"
	"hawser/internal/pki"
	"hawser/internal/registry"
)

const (
	maxJournal = 1 << 30 // bytes; a unit takes about 1.3 KB
	maxUnits   = 200_000 // new ones in one import: they are held in memory, about 1 KB each, until all are verified
	maxNotes   = 100
)

// importJournal answers POST /v1/journal, whose body is the journal itself.
func (b *backend) importJournal(w http.ResponseWriter, r *http.Request) {
	body := http.MaxBytesReader(w, r.Body, maxJournal)
	report, err := b.takeJournal(r, body)
	if err != nil {
		// A client that is still sending would take the refusal for a broken connection.
		_, _ = io.Copy(io.Discard, body)
		refuse(w, journalError(err))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(report) // a client that has gone hears nothing anyway
}

// journalError says that nothing was taken in.
func journalError(err error) error {
	e := apiError(err)
	var line *factory.LineError
	kind := e.Kind
	if errors.As(err, &line) || errors.Is(err, factory.ErrFork) || errors.Is(err, factory.ErrJournal) {
		kind = admin.Conflict // the command line was right
	}
	text, hint, hinted := strings.Cut(e.Text, "\n")
	if errors.Is(err, factory.ErrFork) {
		hint, hinted = "hint: copy the journal from the bench once more; if it is the same, the bench was set back or another has its key", true
	}
	text += ": nothing was imported"
	if hinted {
		text += "\n" + hint
	}
	return &admin.Error{Kind: kind, Text: text}
}

// takeJournal reads the whole journal, and only then changes anything.
func (b *backend) takeJournal(r *http.Request, body io.Reader) (*admin.JournalReport, error) {
	in := factory.JournalReader(body)
	fleet, name, err := factory.JournalOf(in)
	if err != nil {
		return nil, err
	}
	if fleet != b.layout.FleetID() {
		return nil, admin.Errorf(admin.Conflict, "the journal is of the fleet %s, this is %s", hex.EncodeToString(fleet[:]), b.layout.Config.Fleet.ID)
	}
	j, err := b.openImport(r, name)
	if err != nil {
		return nil, err
	}
	sum, err := factory.ReadJournal(in, factory.Known{Lines: j.part.FromLines, Head: j.part.FromHead}, j.take)
	if err != nil {
		return nil, err
	}
	j.part.Lines, j.part.Head = sum.Lines, sum.Head
	report := &admin.JournalReport{Station: name, Lines: sum.Lines, New: sum.Lines - j.part.FromLines, Units: len(j.part.Units),
		Burnt: len(j.part.Burnt), Torn: sum.Torn, Notes: j.notes}
	if report.New == 0 {
		return report, nil
	}
	return report, b.update(r, func(tx *registry.Tx, actor string) error { return tx.ImportJournal(actor, &j.part) })
}

// journalImport gathers what is new in a journal.
type journalImport struct {
	part        registry.JournalPart
	generations map[[32]byte]int // of the station's certificates that count, by fingerprint
	blocks      map[string]bool  // of the station
	notes       []string
}

func (b *backend) openImport(r *http.Request, name string) (*journalImport, error) {
	s, err := b.reg.Station(r.Context(), name)
	if errors.Is(err, registry.ErrNotFound) {
		return nil, admin.Errorf(admin.NotFound, "station %s is not known to this fleet\nhint: its ids are reserved with hawser factory reserve --station %s", name, name)
	}
	if err != nil {
		return nil, err
	}
	j := &journalImport{generations: map[[32]byte]int{}, blocks: map[string]bool{},
		part: registry.JournalPart{Station: name, FromLines: s.Lines, FromHead: s.Head}}
	certs, err := b.reg.StationCertificates(r.Context(), name)
	if err != nil {
		return nil, err
	}
	for _, c := range certs {
		// One of a generation that is no longer accepted does not count.
		if _, generation, _, err := pki.VerifyStationCA(c.DER, b.layout.Trust().DeviceCAs); err == nil {
			j.generations[c.Fingerprint] = generation
		}
	}
	blocks, err := b.reg.Blocks(r.Context(), name)
	for _, v := range blocks {
		j.blocks[hex.EncodeToString(v.ID[:])] = true
	}
	return j, err
}

// take is called for each line that was not imported before.
func (j *journalImport) take(l *factory.Line) error {
	switch l.What {
	case factory.Begin, factory.Renew:
		if _, ok := j.generations[pki.Fingerprint(l.Cert)]; !ok {
			return fmt.Errorf("the certificate in it is none that this fleet gave to station %s and still accepts", j.part.Station)
		}
	case factory.Load:
		if !j.blocks[l.Block] {
			return fmt.Errorf("block %s was not reserved for station %s", l.Block, j.part.Station)
		}
	case factory.Burnt:
		id, err := identity.ParseID(l.ID)
		j.part.Burnt = append(j.part.Burnt, registry.BurntID{Line: l.Number, ID: id, Reason: l.Reason})
		return err
	case factory.Made:
		return j.takeUnit(l)
	}
	return nil
}

func (j *journalImport) takeUnit(l *factory.Line) error {
	generation, ok := j.generations[pki.Fingerprint(l.StationCert.Raw)]
	if !ok {
		return fmt.Errorf("%s: it was certified under a device CA that is no longer accepted", l.ID)
	}
	if len(j.part.Units) == maxUnits {
		return fmt.Errorf("more than %d new units at once\nhint: import an older copy of the journal first, or its first %d lines", maxUnits, l.Number-1)
	}
	block, err := factory.ParseBlockID(l.Block)
	if err != nil {
		return err
	}
	u := l.Unit
	if len(u.CSR.Asks) > 0 {
		j.note("%s: its request asks for extensions (%s): ignored", l.ID, strings.Join(u.CSR.Asks, ", "))
	}
	who := identity.DevicePrincipal(u.ID)
	j.part.Units = append(j.part.Units, registry.Unit{Line: l.Number, ID: u.ID, Class: l.Class, Hardware: l.Hardware, KeyHash: u.Key,
		CSR: l.CSR, Block: block, Flashed: l.When, Certificate: registry.Certificate{Fingerprint: pki.Fingerprint(l.Cert), Principal: who,
			Generation: uint32(generation), DER: l.Cert, NotBefore: u.Cert.NotBefore, NotAfter: u.Cert.NotAfter}})
	return nil
}

func (j *journalImport) note(format string, args ...any) {
	if len(j.notes) < maxNotes {
		j.notes = append(j.notes, fmt.Sprintf(format, args...))
	}
}

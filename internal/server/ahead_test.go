package server

import (
	"fmt"
	"testing"

	"hawser/internal/pki"
)

// TestStationUnitNewerThanTheBackup: a unit whose journal was imported after the backup
// is refused by a restored registry, and listed; the station must be one that counts.
func TestStationUnitNewerThanTheBackup(t *testing.T) {
	r := serve(t, makeFleet(t))
	s, out := newStation(t, r.api, r.srv.Layout(), "line1", 5), newStation(t, r.api, r.srv.Layout(), "line2", 5)
	r.ok(r.api.RevokeStation(t.Context(), "line2", "stolen"))
	data := r.backUp()
	unit, pair := s.made(0)
	stolen, theirs := out.made(0)
	n := r.restored(data)
	if _, err := n.dial(theirs, stolen.ID.String()); err == nil {
		t.Fatal("a unit of a revoked station was let in")
	}
	n.logged("connection rejected", "never imported")
	n.settled()
	n.ahead()
	if _, err := n.dial(pair, unit.ID.String()); err == nil {
		t.Fatal("a unit that was never imported was let in")
	}
	n.ahead(fmt.Sprintf("%s false certificate %x", unit.ID, pki.Fingerprint(unit.Cert.Raw)))
}

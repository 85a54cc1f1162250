package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/registry"
	"hawser/internal/server"
)

// stationFleet makes a fleet with devices that line1 has flashed, one a minute from
// first on, and one of line2.
func stationFleet(t *testing.T, n int, first time.Time) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "fleet")
	o := fleet.InitOptions{Dir: dir, Domains: []string{"localhost"}, Trial: true}
	if _, err := server.Create(t.Context(), o, "test", slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "server", "registry.db")
	r, err := registry.Open(t.Context(), path, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	err = r.Update(t.Context(), func(tx *registry.Tx) error {
		for i := range n + 1 {
			id := identity.ID(0xAB000000 + i)
			err := tx.Enrol("test", registry.Enrolment{ID: id, KeyHash: sha256.Sum256(fmt.Append(nil, i)), CSR: []byte{1}, At: first})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil || r.Close() != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	const line = `UPDATE devices SET station = CASE WHEN id = ? THEN 'line2' ELSE 'line1' END, flashed = ? + 60000 * (id - ?)`
	if _, err := db.ExecContext(t.Context(), line, 0xAB000000+n, first.UnixMilli(), 0xAB000000); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestRevokeByStation: those of one station, from a time to before another, by the
// thousand; a second time, and with some revoked already, they are counted.
func TestRevokeByStation(t *testing.T) {
	first := time.Date(2026, 11, 24, 0, 0, 0, 0, time.UTC)
	c, done, err := server.Connect(t.Context(), stationFleet(t, 2500, first))
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	if _, err := c.Bar(t.Context(), 0xAB000005, "revoke", "before"); err != nil {
		t.Fatal(err)
	}
	f := admin.DeviceFilter{Station: "line1", FlashedSince: first, FlashedUntil: first.Add(2100 * time.Minute)}
	for _, want := range []string{`{"changed":2099,"already":1}`, `{"changed":0,"already":2100}`} {
		got := printed(t, func(a *app) error {
			return a.revokeMany(t.Context(), c, &revocation{reason: "bench stolen", yes: true}, nil, f)
		})
		if !got[want+"\n"] || len(got) != 1 {
			t.Errorf("%v, want %s", got, want)
		}
	}
	status, err := c.Status(t.Context())
	if err != nil || status.Devices["revoked"] != 2100 || status.Devices["active"] != 401 {
		t.Errorf("%v, %v", status.Devices, err)
	}
	for id, want := range map[identity.ID]string{0xAB000000: "revoked", 0xAB000000 + 2099: "revoked", 0xAB000000 + 2100: "active", 0xAB000000 + 2500: "active"} {
		if d, err := c.Device(t.Context(), id); err != nil || d.State != want {
			t.Errorf("%s is %s, not %s, %v", id, d.State, want, err)
		}
	}
}

// TestInterruptedRevocationSaysHowFar: what is done stays, and is told.
func TestInterruptedRevocationSaysHowFar(t *testing.T) {
	first := time.Date(2026, 11, 24, 0, 0, 0, 0, time.UTC)
	c, done, err := server.Connect(t.Context(), stationFleet(t, 1500, first))
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	var ids []identity.ID
	for i := range 1500 {
		ids = append(ids, identity.ID(0xAB000000+i))
	}
	ids = append(ids, 0xFF) // gone from the registry meanwhile: the second group fails
	var out admin.Barred
	err = new(app).revokeGroups(context.Background(), c, ids, "x", &out)
	if err == nil || !strings.HasPrefix(err.Error(), "1000 of 1501 revoked: device 000000FF: not found\nhint: ") || out.Changed != 1000 {
		t.Errorf("%+v, %v", out, err)
	}
	if out, err = c.RevokeMany(t.Context(), ids[500:1500], "x"); err != nil || out.Changed != 500 || out.Already != 500 {
		t.Errorf("again: %+v, %v", out, err)
	}
}

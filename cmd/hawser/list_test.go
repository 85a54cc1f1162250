package main

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"hawser/internal/admin"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/server"
)

// TestListsReadAllPages: a list of more than one page is whole, in order and
// without a row twice; a limit is kept over the pages.
func TestListsReadAllPages(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "fleet")
	o := fleet.InitOptions{Dir: dir, Domains: []string{"localhost"}, Trial: true}
	if _, err := server.Create(t.Context(), o, "test", slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	c, done, err := server.Connect(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	id := enrolOne(t, dir, c)
	const n = commandPage + 5
	for range n {
		if _, err := c.Send(t.Context(), id, admin.NewCommand{Name: "nod"}); err != nil {
			t.Fatal(err)
		}
	}
	for limit, want := range map[int]int{0: n, 3: 3, commandPage: commandPage, commandPage + 1: commandPage + 1} {
		got := printed(t, func(a *app) error { return a.listCommands(t.Context(), c, admin.CommandFilter{Limit: limit}) })
		if len(got) != want {
			t.Errorf("command list --limit %d: %d lines, not %d", limit, len(got), want)
		}
		got = printed(t, func(a *app) error {
			return a.listAudit(t.Context(), c, admin.AuditFilter{Action: "command.queue", Limit: limit})
		})
		if len(got) != want {
			t.Errorf("audit list --limit %d: %d lines, not %d", limit, len(got), want)
		}
	}
}

// printed gives the lines of JSON that fn prints, each of which must be another one.
func printed(t *testing.T, fn func(a *app) error) map[string]bool {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := fn(&app{out: out, err: os.Stderr, json: true}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	lines := map[string]bool{}
	for line := range bytes.Lines(text) {
		if lines[string(line)] {
			t.Errorf("printed twice: %s", line)
		}
		lines[string(line)] = true
	}
	return lines
}

// enrolOne gives the fleet one device.
func enrolOne(t *testing.T, dir string, c *admin.Client) identity.ID {
	t.Helper()
	l, err := fleet.OpenLayout(dir)
	if err != nil {
		t.Fatal(err)
	}
	key, err := makeKey(filepath.Join(t.TempDir(), "device.key"))
	if err != nil {
		t.Fatal(err)
	}
	csr, err := requestFor(key, "x")
	if err != nil {
		t.Fatal(err)
	}
	var n newDevice
	id := identity.ID(0xABCD1234)
	if _, _, err := n.certify(context.Background(), c, l, id, csr); err != nil {
		t.Fatal(err)
	}
	return id
}

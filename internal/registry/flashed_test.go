package registry

import (
	"testing"
	"time"

	"hawser/internal/identity"
)

// TestFlashedFilter: everything that a station has flashed on a day, up to just before
// the next.
func TestFlashedFilter(t *testing.T) {
	r := newRegistry(t, Options{})
	day := time.Date(2026, 11, 24, 0, 0, 0, 0, time.UTC)
	for i, d := range []struct {
		station string
		flashed time.Time
	}{
		{"", time.Time{}}, {"line1", day.Add(-time.Millisecond)}, {"line1", day}, {"line1", day.Add(24*time.Hour - time.Millisecond)},
		{"line1", day.Add(24 * time.Hour)}, {"line2", day.Add(time.Hour)},
	} {
		id := identity.ID(i + 1)
		must(t, r, enrol(id))
		must(t, r, func(tx *Tx) error {
			return tx.exec(`UPDATE devices SET station = ?, flashed = ? WHERE id = ?`, d.station, ms(d.flashed), int64(id))
		})
	}
	must(t, r, func(tx *Tx) error { return tx.TagDevice("test", 3, []string{"x"}, nil) })
	for _, c := range []struct {
		f    DeviceFilter
		want string
	}{
		{DeviceFilter{Station: "line1"}, "2345"},
		{DeviceFilter{Station: "line1", FlashedSince: day, FlashedUntil: day.Add(24 * time.Hour)}, "34"},
		{DeviceFilter{Station: "line2", FlashedSince: day, FlashedUntil: day.Add(24 * time.Hour)}, "6"},
		{DeviceFilter{Station: "line9"}, ""},
		{DeviceFilter{FlashedSince: day}, "3456"},
		{DeviceFilter{FlashedUntil: day}, "2"}, // what was never flashed was not flashed before
		{DeviceFilter{Station: "line1", Tag: "x"}, "3"},
		{DeviceFilter{Station: "line1", After: 3}, "45"},
	} {
		list, err := r.Devices(t.Context(), c.f)
		got := ""
		for _, d := range list {
			got += d.ID.String()[7:]
		}
		if err != nil || got != c.want {
			t.Errorf("%+v: %q, %v, want %q", c.f, got, err, c.want)
		}
	}
}

package e2e

import (
	"testing"

	"hawser/internal/factory"
)

// TestFactoryTwenty: twenty units in a row, each on the same probe after the one before was
// taken off.
func TestFactoryTwenty(t *testing.T) {
	needTools(t, "qemu-system-arm")
	s := newStation(t, 25)
	units := s.provision(20)
	recorded := map[string]bool{}
	for _, l := range s.journal() {
		if l.What == factory.Made {
			recorded[l.ID] = true
		}
	}
	for i, u := range units {
		if !u.ReadBack || u.Made != i+1 || u.Of != 25 || u.Left != 24-i || !recorded[u.ID] {
			t.Errorf("unit %d: %+v", i+1, u)
		}
	}
}

package broker

import (
	"math/rand/v2"
	"testing"

	"hawser/internal/identity"
)

// TestTreeFindsWhatMatchSays adds and removes random filters and compares what
// the tree finds with identity.Match over all of them.
func TestTreeFindsWhatMatchSays(t *testing.T) {
	m := newModel()
	m.topics = append(m.topics, "", "/", "//", "/u")
	r := rand.New(rand.NewPCG(5, 6))
	var tr tree
	live := map[*subscription]bool{}
	for range 3000 {
		if len(live) > 0 && r.IntN(3) == 0 {
			for s := range live {
				tr.remove(s)
				delete(live, s)
				break
			}
		} else {
			s := &subscription{filter: randomFilter(r)}
			tr.add(s)
			live[s] = true
		}
		topic := m.topics[r.IntN(len(m.topics))]
		got := map[*subscription]bool{}
		tr.find(topic, func(s *subscription) {
			if got[s] {
				t.Fatalf("%q found twice for %q", s.filter, topic)
			}
			got[s] = true
		})
		for s := range live {
			if got[s] != identity.Match(s.filter, topic) {
				t.Fatalf("filter %q topic %q: found %v", s.filter, topic, got[s])
			}
		}
	}
	for s := range live {
		tr.remove(s)
	}
	if len(tr.root.children) != 0 {
		t.Fatalf("an empty tree keeps %d nodes", len(tr.root.children))
	}
}

func TestRetainedFind(t *testing.T) {
	r := newRetained()
	for _, topic := range []string{"private/ABCD1234/d/cfg", "private/ABCD1234/x", "private/0000BEEF/x", "a/b"} {
		r.put(&message{topic: topic})
	}
	for filter, want := range map[string]int{"#": 4, "private/ABCD1234/#": 2, "private/+/x": 2, "a/b": 1, "a/+": 1, "nope": 0, "private/ABCD1234/d/cfg": 1} {
		if got := len(r.find(filter)); got != want {
			t.Errorf("%q finds %d, want %d", filter, got, want)
		}
	}
	r.remove("private/ABCD1234/x")
	r.remove("private/ABCD1234/d/cfg")
	if len(r.byDevice) != 1 || len(r.find("private/ABCD1234/#")) != 0 {
		t.Error("removed messages are still found")
	}
}

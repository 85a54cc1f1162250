package identity

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func TestParseIDHasOneSpelling(t *testing.T) {
	for _, s := range []string{"ABCD1234", "00000001", "1E234567", "FFFFFFFE"} {
		id, err := ParseID(s)
		if err != nil || id.String() != s {
			t.Errorf("ParseID(%q) = %v, %v", s, id, err)
		}
	}
	for _, s := range []string{"", "abcd1234", "ABCD123", "ABCD12345", "00000000", "FFFFFFFF", "ABCD+234", "+", "#", "ABCD123\x00", "ÄBCD123"} {
		if id, err := ParseID(s); !errors.Is(err, ErrID) {
			t.Errorf("ParseID(%q) = %v, %v; want ErrID", s, id, err)
		}
	}
}

func TestRandomIDNeverBlank(t *testing.T) {
	r := bytes.NewReader(append(append(make([]byte, 4), 0xFF, 0xFF, 0xFF, 0xFF), 0xAB, 0xCD, 0x12, 0x34))
	id, err := RandomID(r)
	if err != nil || id.String() != "ABCD1234" {
		t.Fatalf("got %v, %v", id, err)
	}
	if _, err := RandomID(r); err == nil {
		t.Fatal("an exhausted source gave an id")
	}
}

func TestCheckName(t *testing.T) {
	for _, s := range []string{"dash", "a", "backend-2", strings.Repeat("a", 31), "abcdefg1", "abcdef1"} {
		if err := CheckName(s); err != nil {
			t.Errorf("CheckName(%q) = %v", s, err)
		}
	}
	for _, s := range []string{"", "Dash", "2dash", "a/b", "a+", "a#", "abcdef12", "ABCD1234", strings.Repeat("a", 32), "a b", "é"} {
		if err := CheckName(s); err == nil {
			t.Errorf("CheckName(%q) passed", s)
		}
	}
}

func TestTopicAndFilterSyntax(t *testing.T) {
	long := strings.Repeat("x", MaxTopic+1)
	for _, s := range []string{"", "a\x00b", "\xff", "\xed\xa0\x80", long} {
		if CheckTopic(s) == nil || CheckFilter(s) == nil {
			t.Errorf("%.10q passed", s)
		}
	}
	for _, s := range []string{"a.b", "a*b", ">", "a b", "//", "/", strings.Repeat("x", MaxTopic), "$SYS/x"} {
		if err := CheckTopic(s); err != nil {
			t.Errorf("CheckTopic(%.10q) = %v", s, err)
		}
	}
	for _, s := range []string{"a/+", "#", "a#", "+"} {
		if CheckTopic(s) == nil {
			t.Errorf("CheckTopic(%q) passed", s)
		}
	}
	for _, s := range []string{"#", "+", "+/+/#", "/#", "a/+/b", "+/"} {
		if err := CheckFilter(s); err != nil {
			t.Errorf("CheckFilter(%q) = %v", s, err)
		}
	}
	for _, s := range []string{"a#", "#/a", "a/#/b", "a+", "+a/b", "a/#b", "##"} {
		if CheckFilter(s) == nil {
			t.Errorf("CheckFilter(%q) passed", s)
		}
	}
}

func TestSplitShare(t *testing.T) {
	cases := []struct {
		in, group, inner string
		ok               bool
	}{
		{"a/b", "", "a/b", true},
		{"$share/g/a/#", "g", "a/#", true},
		{"$share/g//x", "g", "/x", true},
		{"$share/g", "", "", false},
		{"$share/g/", "", "", false},
		{"$share//a", "", "", false},
		{"$share/+/a", "", "", false},
		{"$share", "", "", false},
		{"$sharex/g/a", "", "$sharex/g/a", true},
	}
	for _, c := range cases {
		g, in, err := SplitShare(c.in)
		if g != c.group || in != c.inner || (err == nil) != c.ok {
			t.Errorf("SplitShare(%q) = %q %q %v", c.in, g, in, err)
		}
	}
}

// universe is every topic of up to three levels over a small alphabet that has
// what is special in it: an empty level and a $ level.
func universe() (topics, filters []string) {
	var topicLevels = []string{"a", "b", "", "$x"}
	var filterLevels = []string{"a", "", "$x", "+"}
	grow := func(levels, tails []string) (all []string) {
		for _, l := range levels {
			all = append(all, l)
			for _, t := range tails {
				all = append(all, l+"/"+t)
			}
		}
		return all
	}
	topics = grow(topicLevels, grow(topicLevels, topicLevels))
	filters = grow(filterLevels, grow(filterLevels, append([]string{"#"}, filterLevels...)))
	filters = append(filters, "#")
	for _, l := range filterLevels {
		filters = append(filters, l+"/#")
	}
	return nonEmpty(topics), nonEmpty(filters)
}

func nonEmpty(in []string) (out []string) {
	for _, s := range in {
		if s != "" {
			out = append(out, s)
		}
	}
	return out
}

// modelMatch is MQTT 5.0 4.7 said again, in the plainest way.
func modelMatch(filter, topic string) bool {
	f, t := strings.Split(filter, "/"), strings.Split(topic, "/")
	if strings.HasPrefix(topic, "$") && (f[0] == "+" || f[0] == "#") {
		return false
	}
	for i, l := range f {
		if l == "#" {
			return len(t) >= i
		}
		if i >= len(t) || (l != "+" && l != t[i]) {
			return false
		}
	}
	return len(f) == len(t)
}

func TestMatchAgainstModel(t *testing.T) {
	topics, filters := universe()
	for _, f := range filters {
		for _, top := range topics {
			if Match(f, top) != modelMatch(f, top) {
				t.Fatalf("Match(%q, %q) = %v", f, top, Match(f, top))
			}
		}
	}
}

// TestCoversAndOverlapsAgainstTheirMeaning checks both over all pairs of filters:
// what they say must agree with the sets of topics that the filters match. The
// topics are one level deeper than the filters, so # differs from a run of +.
func TestCoversAndOverlapsAgainstTheirMeaning(t *testing.T) {
	topics, filters := universe()
	for _, tail := range []string{"/a/a", "/b/b"} {
		for _, top := range topics[:len(topics):len(topics)] {
			topics = append(topics, top+tail)
		}
	}
	topics = append(topics, "") // no valid topic, but what "/#" matches beyond "/+/#"
	sets := make([]map[string]bool, len(filters))
	for i, f := range filters {
		sets[i] = map[string]bool{}
		for _, top := range topics {
			if Match(f, top) {
				sets[i][top] = true
			}
		}
	}
	for i, outer := range filters {
		for j, inner := range filters {
			subset, common := true, false
			for top := range sets[j] {
				subset = subset && sets[i][top]
				common = common || sets[i][top]
			}
			if Covers(outer, inner) && !subset {
				t.Fatalf("Covers(%q, %q) but the sets say no", outer, inner)
			}
			if subset && len(sets[j]) > 0 && !Covers(outer, inner) {
				t.Fatalf("Covers(%q, %q) is false but the sets say yes", outer, inner)
			}
			if Overlaps(outer, inner) != common {
				t.Fatalf("Overlaps(%q, %q) = %v, the sets say %v", outer, inner, !common, common)
			}
		}
	}
}

func TestDeviceTopic(t *testing.T) {
	cases := []struct {
		topic, id, rest string
		ok              bool
	}{
		{"private/ABCD1234/u/x", "ABCD1234", "u/x", true},
		{"private/ABCD1234", "ABCD1234", "", true},
		{"private/ABCD1234/", "ABCD1234", "", true},
		{"private/abcd1234/u", "", "", false},
		{"private/ABCD12345/u", "", "", false},
		{"private/+/u", "", "", false},
		{"public/ABCD1234/u", "", "", false},
		{"private/", "", "", false},
	}
	for _, c := range cases {
		id, rest, ok := DeviceTopic(c.topic)
		if ok != c.ok || rest != c.rest || (ok && id.String() != c.id) {
			t.Errorf("DeviceTopic(%q) = %v %q %v", c.topic, id, rest, ok)
		}
	}
}

func FuzzParseID(f *testing.F) {
	f.Add("ABCD1234")
	f.Add("abcd1234")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID(s)
		if err == nil && (id.String() != s || strings.ContainsAny(s, "+#/$ \x00")) {
			t.Fatalf("ParseID(%q) = %v", s, id)
		}
	})
}

func FuzzFilters(f *testing.F) {
	f.Add("a/+/#", "a/b/c")
	f.Add("$share/g/a", "$SYS/x")
	f.Fuzz(func(t *testing.T, filter, topic string) {
		if CheckFilter(filter) != nil || CheckTopic(topic) != nil {
			return
		}
		if Match(filter, topic) != modelMatch(filter, topic) {
			t.Fatalf("Match(%q, %q) differs from the model", filter, topic)
		}
		if Covers(filter, topic) != Match(filter, topic) {
			t.Fatalf("Covers and Match differ for the topic %q under %q", topic, filter)
		}
		if Overlaps(filter, topic) != Match(filter, topic) {
			t.Fatalf("Overlaps and Match differ for the topic %q under %q", topic, filter)
		}
	})
}

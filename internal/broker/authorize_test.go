package broker

import (
	"math/rand/v2"
	"strings"
	"testing"

	"hawser/internal/identity"
)

func device(t testing.TB, s string) identity.Principal {
	t.Helper()
	id, err := identity.ParseID(s)
	if err != nil {
		t.Fatal(err)
	}
	return identity.DevicePrincipal(id)
}

func service(t testing.TB, s string) identity.Principal {
	t.Helper()
	p, err := identity.ServicePrincipal(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestAuthorizerTable(t *testing.T) {
	dev, dash := device(t, "ABCD1234"), service(t, "dash")
	all := []Grant{{false, "#"}, {true, "#"}}
	product := []Grant{{false, "private/+/u/#"}, {true, "private/+/d/app/#"}, {true, "private/+/x"}}
	cases := []struct {
		p       identity.Principal
		grants  []Grant
		action  Action
		subject string
		want    bool
	}{
		{dev, nil, Publish, "private/ABCD1234/u/temp", true},
		{dev, nil, Publish, "private/ABCD1234/own", true},
		{dev, nil, Publish, "private/ABCD1234", true},
		{dev, nil, Publish, "private/ABCD1234/d/cmd", false},
		{dev, nil, Publish, "private/ABCD1234/d", false},
		{dev, nil, Publish, "private/ABCD1234/d/app/x", false},
		{dev, nil, Publish, "private/ABCD1234/dx", true},
		{dev, nil, Publish, "private/ABCD1235/u/temp", false},
		{dev, nil, Publish, "public/x", false},
		{dev, all, Publish, "public/x", false},
		{dev, nil, Subscribe, "private/ABCD1234/#", true},
		{dev, nil, Subscribe, "private/ABCD1234/d/cmd", true},
		{dev, nil, Subscribe, "private/ABCD1234", true},
		{dev, nil, Subscribe, "#", false},
		{dev, nil, Subscribe, "private/+/u/#", false},
		{dev, nil, Subscribe, "+/ABCD1234/#", false},
		{dev, nil, Subscribe, "private/#", false},
		{dev, nil, Subscribe, "private/ABCD1235/#", false},
		{dev, nil, Subscribe, "$SYS/#", false},
		{dev, nil, Subscribe, "$share/g/#", false},
		{dev, nil, Subscribe, "$share/g/private/ABCD1234/#", false},
		{dev, all, Subscribe, "#", false},
		{dev, nil, Receive, "private/ABCD1234/d/cmd", true},
		{dev, nil, Receive, "private/ABCD1235/d/cmd", false},
		{dev, nil, NoAction, "private/ABCD1234/u", false},

		{dash, nil, Publish, "public/x", false},
		{dash, nil, Subscribe, "public/x", false},
		{dash, all, Publish, "public/x", true},
		{dash, all, Publish, "private/ABCD1234/own", true},
		{dash, all, Publish, "private/ABCD1234/d/cmd", false},
		{dash, all, Publish, "private/ABCD1234/d", false},
		{dash, all, Publish, "private/ABCD1234/d/app/led", true},
		{dash, all, Publish, "private/ABCD1234/d/app", true},
		{dash, all, Publish, "private/ABCD1234/d/apps", false},
		{dash, all, Publish, "private/ABCD1234/u/temp", false},
		{dash, all, Publish, "private/ABCD1234/u", false},
		{dash, all, Publish, "$SYS/x", false},
		{dash, all, Subscribe, "#", true},
		{dash, all, Subscribe, "$share/g/#", true},
		{dash, all, Subscribe, "$share/g/$SYS/#", false},
		{dash, all, Subscribe, "$SYS/#", false},
		{dash, []Grant{{false, "$SYS/#"}}, Subscribe, "$SYS/#", false},
		{dash, []Grant{{true, "$SYS/#"}}, Publish, "$SYS/x", false},
		{dash, product, Subscribe, "private/+/u/#", true},
		{dash, product, Subscribe, "private/ABCD1234/u/#", true},
		{dash, product, Subscribe, "private/#", false},
		{dash, product, Subscribe, "$share/g/private/+/u/temp", true},
		{dash, product, Subscribe, "$share/g/private/#", false},
		{dash, product, Subscribe, "private/+/d/app/#", false},
		{dash, product, Publish, "private/ABCD1234/d/app/led", true},
		{dash, product, Publish, "private/ABCD1234/x", true},
		{dash, product, Publish, "private/ABCD1234/y", false},
		{dash, product, Receive, "private/ABCD1234/u/temp", true},
		{dash, product, Receive, "private/ABCD1234/d/app/led", false},
		{dash, []Grant{{false, "a/b"}, {false, "a/+"}}, Subscribe, "a/#", false},

		{identity.Principal{}, all, Publish, "x", false},
		{identity.Principal{Kind: identity.Device, Name: "+"}, nil, Publish, "private/+/u", false},
		{identity.TheServer(), nil, Publish, "private/ABCD1234/d/cmd", true},
	}
	for _, c := range cases {
		if got := Allowed(c.p, c.grants, c.action, c.subject); got != c.want {
			t.Errorf("%v may %v %q with %v: %v, want %v", c.p, c.action, c.subject, c.grants, got, c.want)
		}
	}
}

// model is the rule book of design sections 3 and 4 on lists of levels, with no
// code in common with the authorizer: a subject is allowed when every topic name
// it stands for is allowed.
type model struct{ topics []string }

func (m model) topicAllowed(p identity.Principal, grants []Grant, publish bool, topic string) bool {
	l := strings.Split(topic, "/")
	isDevice := len(l) >= 2 && l[0] == "private" && (l[1] == "ABCD1234" || l[1] == "0000BEEF")
	level := func(i int) string {
		if i < len(l) {
			return l[i]
		}
		return ""
	}
	switch p.Kind {
	case identity.Device:
		return isDevice && l[1] == p.Name && !(publish && level(2) == "d" && len(l) > 2)
	case identity.Service:
		if strings.HasPrefix(topic, "$") {
			return false
		}
		if publish && isDevice && (level(2) == "u" || level(2) == "d" && level(3) != "app") {
			return false
		}
		for _, g := range grants {
			if g.Write == publish && modelMatches(g.Filter, topic) {
				return true
			}
		}
	}
	return false
}

func modelMatches(filter, topic string) bool {
	f, t := strings.Split(filter, "/"), strings.Split(topic, "/")
	if (strings.HasPrefix(topic, "$")) != strings.HasPrefix(filter, "$") {
		return false
	}
	for i := range f {
		if f[i] == "#" {
			return len(t) >= i
		}
		if i >= len(t) || f[i] != "+" && f[i] != t[i] {
			return false
		}
	}
	return len(f) == len(t)
}

// filterAllowed: one rule must cover the whole filter, so each rule is asked by
// itself whether it holds for every topic that the filter reaches.
func (m model) filterAllowed(p identity.Principal, grants []Grant, filter string) bool {
	if p.Kind == identity.Device {
		return !strings.HasPrefix(filter, "$") && m.everyTopic(filter, func(topic string) bool {
			return m.topicAllowed(p, nil, false, topic)
		})
	}
	if p.Kind != identity.Service {
		return false
	}
	if rest, ok := strings.CutPrefix(filter, "$share/g/"); ok {
		filter = rest
	}
	if strings.HasPrefix(filter, "$") {
		return false
	}
	for _, g := range grants {
		if !g.Write && m.everyTopic(filter, func(topic string) bool { return modelMatches(g.Filter, topic) }) {
			return true
		}
	}
	return false
}

func (m model) everyTopic(filter string, ok func(string) bool) bool {
	n := 0
	for _, topic := range m.topics {
		if modelMatches(filter, topic) {
			n++
			if !ok(topic) {
				return false
			}
		}
	}
	return n > 0
}

var propertyLevels = [][]string{
	{"private", "public", "$SYS"},
	{"ABCD1234", "0000BEEF", "abcd1234", "x"},
	{"u", "d", "x", "zz1"},
	{"app", "cmd", "zz2"},
	{"v", "zz3"},
}

// newModel lists every topic of up to five levels over words that the random
// filters use and some (zz) that they do not, so + and # reach further.
func newModel() model {
	var m model
	prefixes := []string{""}
	for _, words := range propertyLevels {
		var next []string
		for _, p := range prefixes {
			for _, w := range words {
				next = append(next, strings.TrimPrefix(p+"/"+w, "/"))
			}
		}
		m.topics = append(m.topics, next...)
		prefixes = next
	}
	m.topics = append(m.topics, "zz0", "zz0/zz1", "private/zz1/u/v", "public/zz1", "private/ABCD1234/u/app/v/zz4", "zz0/ABCD1234/u")
	return m
}

func randomFilter(r *rand.Rand) string {
	depth := 1 + r.IntN(len(propertyLevels))
	var levels []string
	for i := range depth {
		switch n := r.IntN(8); {
		case n == 0:
			return strings.Join(append(levels, "#"), "/")
		case n <= 2:
			levels = append(levels, "+")
		default:
			words := propertyLevels[i]
			levels = append(levels, words[r.IntN(len(words))])
		}
	}
	if r.IntN(3) == 0 {
		levels = append(levels, "#")
	}
	return strings.Join(levels, "/")
}

// TestAuthorizerAgainstModel asks the authorizer and the model 200,000 random
// questions over devices, services, grants, topics, filters and $share.
func TestAuthorizerAgainstModel(t *testing.T) {
	m := newModel()
	r := rand.New(rand.NewPCG(1, 2))
	who := []identity.Principal{device(t, "ABCD1234"), device(t, "0000BEEF"), service(t, "dash"), {}}
	yes := 0
	for range 200_000 {
		p := who[r.IntN(len(who))]
		var grants []Grant
		for range r.IntN(4) {
			grants = append(grants, Grant{Write: r.IntN(2) == 0, Filter: randomFilter(r)})
		}
		topic := m.topics[r.IntN(len(m.topics))]
		for a, publish := range map[Action]bool{Publish: true, Receive: false} {
			got, want := Allowed(p, grants, a, topic), m.topicAllowed(p, grants, publish, topic)
			if got != want {
				t.Fatalf("%v may %v %q with %v: authorizer %v, model %v", p, a, topic, grants, got, want)
			}
			if got {
				yes++
			}
		}
		if r.IntN(20) != 0 { // filters cost the model a walk over all topics
			continue
		}
		filter := randomFilter(r)
		if r.IntN(4) == 0 {
			filter = "$share/g/" + filter
		}
		got, want := Allowed(p, grants, Subscribe, filter), m.filterAllowed(p, grants, filter)
		if got != want {
			t.Fatalf("%v may subscribe %q with %v: authorizer %v, model %v", p, filter, grants, got, want)
		}
		if got {
			yes++
		}
	}
	if yes < 5_000 {
		t.Fatalf("only %d questions were answered yes: the test asks the wrong ones", yes)
	}
}

func TestFewerGrantsNeverAllowMore(t *testing.T) {
	m := newModel()
	r := rand.New(rand.NewPCG(3, 4))
	dash := service(t, "dash")
	for range 20_000 {
		grants := []Grant{{r.IntN(2) == 0, randomFilter(r)}, {r.IntN(2) == 0, randomFilter(r)}}
		for _, a := range []Action{Publish, Subscribe, Receive} {
			subject := m.topics[r.IntN(len(m.topics))]
			if a == Subscribe {
				subject = randomFilter(r)
			}
			if Allowed(dash, grants[:1], a, subject) && !Allowed(dash, grants, a, subject) {
				t.Fatalf("%v %q: %v gives more than %v", a, subject, grants[:1], grants)
			}
			if Allowed(dash, nil, a, subject) {
				t.Fatalf("%v %q without a grant", a, subject)
			}
		}
	}
}

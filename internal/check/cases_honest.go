package check

import (
	"errors"
	"io"
	"strings"

	"hawser/internal/mqtt"
)

// honestCases come first: what they do not see, nothing else can be judged by.
func honestCases() []Case {
	return []Case{
		{ID: "A1.honest", Does: "an honest broker answers everything", kind: probeOnly, play: playHonest,
			Expect: "connects, says who it is and does its work", Clause: "RFC 9846 2; MQTT 3.1"},
		{ID: "A2.name", Does: "an honest broker looks at the ClientHello", kind: probeOnly, play: playName,
			Expect: "names the broker (SNI), offers TLS 1.3 and a group that is spoken", Clause: "RFC 9846 9.2; RFC 6066 3"},
	}
}

// playHonest finds out what the client does, for the cases that need it.
func playHonest(s *stage) error {
	if err := s.welcome(); err != nil {
		return s.settle(Fail, "it does not connect to an honest broker: %v (%s)", err, s.Seen.EndText())
	}
	err := s.attend(s.limit/2, func(h mqtt.Header) bool { return s.did.subscribed && s.did.published })
	ended := s.did.bye || errors.Is(err, io.EOF)
	if s.did.subscribed {
		s.features = append(s.features, "subscribe")
	}
	if s.did.qos1 {
		s.features = append(s.features, "qos1")
	}
	if !ended {
		s.features = append(s.features, "stays")
	}
	s.note = "client id " + s.connect.ClientID + ", " + s.version.String() + "; does: " + orNone(strings.Join(s.features, ", "))
	return s.settle(Pass, "it connected and did its work")
}

func orNone(s string) string {
	if s == "" {
		return "publishes and goes"
	}
	return s
}

// playName judges what the client offers.
func playName(s *stage) error {
	if err := s.welcome(); err != nil {
		return s.settle(Fail, "it does not connect to an honest broker: %v", err)
	}
	h := s.p.Hello
	switch {
	case h.Name == "":
		return s.settle(Pass, "it connected, without naming the broker (SNI): a broker of several names cannot choose")
	case h.Name != s.w.Domain:
		return s.settle(Fail, "it names %q, not %q", h.Name, s.w.Domain)
	}
	return s.settle(Pass, "it names %q and offers %d suites and %d groups", h.Name, len(h.Suites), len(h.Groups))
}

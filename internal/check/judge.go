package check

import "fmt"

// judge gives the verdict on a case that was played.
func judge(c *Case, s *stage, o *DeviceOptions) (Verdict, string) {
	if s.verdict != "" {
		return s.verdict, s.why
	}
	switch c.kind {
	case reject, rejectMCU, rejectDated:
		return judgeReject(c, s, o)
	case accept:
		return judgeAccept(s)
	case survive:
		return judgeSurvive(s)
	case silence:
		if s.gave() {
			return Pass, "it gave up by itself: " + s.Seen.EndText()
		}
		return Inconclusive, "it was still waiting when the check's own time was over"
	}
	return Inconclusive, "the case came to no end: the client " + s.Seen.EndText()
}

func judgeReject(c *Case, s *stage, o *DeviceOptions) (Verdict, string) {
	leaked := s.leaked()
	switch {
	case leaked == "" && s.took && c.kind == rejectMCU && o.Profile == General:
		return Warn, "it took this, and waited for the certificate: legitimate for a general client, outside the profile of a microcontroller"
	case leaked == "" && s.took:
		return Fail, "it took this, and waited for the certificate"
	case leaked != "" && c.kind == rejectMCU && o.Profile == General:
		return Warn, "it sent " + leaked + ": legitimate for a general client, outside the profile of a microcontroller"
	case leaked != "" && c.kind == rejectDated && o.NoClock:
		return Warn, "it sent " + leaked + ": it was declared to have no clock, so it cannot judge these dates"
	case leaked != "":
		return Fail, "it sent " + leaked + " to a false broker"
	case !s.Seen.Hello:
		return Inconclusive, "it sent no ClientHello"
	case s.gave():
		return Pass, fmt.Sprintf("it gave up after %s: %s", s.Seen.Farthest(), s.Seen.EndText())
	}
	return Inconclusive, "it neither went on nor gave up while the check waited"
}

func judgeAccept(s *stage) (Verdict, string) {
	switch {
	case s.connect != nil:
		return Pass, "it connected: " + s.version.String()
	case !s.Seen.Hello:
		return Inconclusive, "it sent no ClientHello"
	case s.gave():
		return Fail, fmt.Sprintf("it gave up after %s, %s, though nothing was wrong", s.Seen.Farthest(), s.Seen.EndText())
	}
	return Inconclusive, "it did not go on while the check waited"
}

func judgeSurvive(s *stage) (Verdict, string) {
	switch {
	case !s.Seen.Hello:
		return Inconclusive, "it sent no ClientHello"
	case s.gave():
		return Pass, "it ended the connection: " + s.Seen.EndText()
	}
	return Pass, "it went on"
}

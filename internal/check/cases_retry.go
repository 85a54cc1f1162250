package check

import (
	"errors"
	"slices"

	"hawser/internal/check/tls13"
)

// retryRequest sends one HelloRetryRequest and reads what the client says to it.
func retryRequest(c *tls13.Conn, h *tls13.Hello, suite uint16, ext []tls13.Extension) (*tls13.Hello, error) {
	if err := c.Retry(h, suite, ext); err != nil {
		return nil, err
	}
	return c.ReadHello()
}

func suiteFor(h *tls13.Hello) (uint16, error) {
	for _, id := range []uint16{tls13.AES128, tls13.AES256} {
		if slices.Contains(h.Suites, id) {
			return id, nil
		}
	}
	return 0, errors.New("it offers no suite that is spoken here")
}

func groupRequest(group uint16) []tls13.Extension {
	return []tls13.Extension{
		{Type: tls13.ExtVersions, Body: []byte{3, 4}},
		{Type: tls13.ExtKeyShare, Body: []byte{byte(group >> 8), byte(group)}},
	}
}

// answered is what a client must not send after such a request: a second ClientHello.
func answered(s *stage, h *tls13.Hello) error {
	s.note = "it sent a second ClientHello"
	v := s.server()
	err := s.lureFrom(v, h)
	if err != nil && s.leaked() == "" {
		return s.settle(Fail, "it obeyed with a second ClientHello, which led nowhere: %v", err)
	}
	return err
}

// retry asks for a group.
func retry(group, suite uint16) func(*stage) error {
	return func(s *stage) error {
		h, err := s.ReadHello()
		if err != nil {
			return err
		}
		if suite == 0 {
			if suite, err = suiteFor(h); err != nil {
				return err
			}
		}
		second, err := retryRequest(s.Conn, h, suite, groupRequest(group))
		if err != nil {
			return err
		}
		return answered(s, second)
	}
}

func retryNothing(s *stage) error {
	h, err := s.ReadHello()
	if err != nil {
		return err
	}
	suite, err := suiteFor(h)
	if err != nil {
		return err
	}
	for _, g := range h.Groups { // the first that it has sent a share of
		if h.Shares[g] == nil {
			continue
		}
		second, err := retryRequest(s.Conn, h, suite, groupRequest(g))
		if err != nil {
			return err
		}
		return answered(s, second)
	}
	return skipf("it sends no key share at first")
}

// cookie is a request that a client can always obey: it repeats its hello with this.
func cookie(n int) []tls13.Extension {
	return []tls13.Extension{
		{Type: tls13.ExtVersions, Body: []byte{3, 4}},
		{Type: tls13.ExtCookie, Body: append([]byte{byte(n >> 8), byte(n)}, make([]byte, n)...)},
	}
}

func retryTwice(s *stage) error {
	h, err := s.ReadHello()
	if err != nil {
		return err
	}
	suite, err := suiteFor(h)
	if err != nil {
		return err
	}
	for range 2 {
		if h, err = retryRequest(s.Conn, h, suite, cookie(8)); err != nil {
			return err
		}
	}
	return answered(s, h)
}

func retrySuite(s *stage) error {
	h, err := s.ReadHello()
	if err != nil {
		return err
	}
	var both []uint16
	for _, id := range []uint16{tls13.AES128, tls13.AES256} {
		if slices.Contains(h.Suites, id) {
			both = append(both, id)
		}
	}
	if len(both) < 2 {
		both = append(both, tls13.AES256) // not offered either: refused for one reason or the other
	}
	second, err := retryRequest(s.Conn, h, both[0], cookie(8))
	if err != nil {
		return err
	}
	v := s.server()
	v.Suite = both[1]
	return s.lureFrom(v, second)
}

func hugeCookie(s *stage) error {
	h, err := s.ReadHello()
	if err != nil {
		return err
	}
	suite, err := suiteFor(h)
	if err != nil {
		return err
	}
	second, err := retryRequest(s.Conn, h, suite, cookie(60_000))
	if err != nil {
		return err
	}
	return s.lureFrom(s.server(), second)
}

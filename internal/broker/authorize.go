package broker

import (
	"strings"

	"hawser/internal/identity"
)

// Action is what a principal wants to do with a topic or a filter.
type Action uint8

// The actions. The zero value is none of them and is refused.
const (
	NoAction  Action = iota
	Publish          // a PUBLISH, a Will or a retained message; the subject is a topic name
	Subscribe        // a SUBSCRIBE; the subject is the whole filter, with its $share prefix
	Receive          // live, queued or retained delivery; the subject is a topic name
)

func (a Action) String() string {
	return [...]string{"nothing", "publish", "subscribe", "receive"}[a&3]
}

// Grant lets a service use the topics under one filter: to publish when Write is
// set, to subscribe and receive when it is not. A grant never does both.
type Grant struct {
	Write  bool
	Filter string
}

// Allowed is the one authorizer (design section 4). Everything that could carry
// a message from or to a client asks it: CONNECT for the Will, PUBLISH,
// SUBSCRIBE, retained, queued and live delivery. It is pure: grants are those of
// the principal, read at the moment of the question. What it does not know, it
// refuses.
//
// The subject must have passed identity.CheckTopic or identity.CheckFilter.
func Allowed(p identity.Principal, grants []Grant, a Action, subject string) bool {
	switch p.Kind {
	case identity.Server:
		return true
	case identity.Device:
		return deviceAllowed(p, a, subject)
	case identity.Service:
		return serviceAllowed(grants, a, subject)
	}
	return false
}

// deviceAllowed knows one subtree: private/<id>/#. What looks like the server's
// word there (d/#) must be the server's.
func deviceAllowed(p identity.Principal, a Action, subject string) bool {
	id, ok := p.ID()
	if !ok {
		return false
	}
	owner, rest, ok := identity.DeviceTopic(subject)
	if !ok || owner != id {
		return false
	}
	switch a {
	case Publish:
		return !under(rest, "d")
	case Subscribe, Receive:
		return true // the id is literal, so private/<id>/# covers whatever follows it
	}
	return false
}

func serviceAllowed(grants []Grant, a Action, subject string) bool {
	switch a {
	case Publish:
		return !reserved(subject) && granted(grants, true, subject)
	case Subscribe:
		_, inner, err := identity.SplitShare(subject)
		return err == nil && granted(grants, false, inner)
	case Receive:
		return granted(grants, false, subject)
	}
	return false
}

// granted reports whether one grant covers the whole subject. Two grants that
// cover it only together do not count: what could not be said in one grant was
// not granted.
func granted(grants []Grant, write bool, subject string) bool {
	if strings.HasPrefix(subject, "$") {
		return false
	}
	for _, g := range grants {
		if g.Write == write && identity.Covers(g.Filter, subject) {
			return true
		}
	}
	return false
}

// reserved reports the topics that no grant opens to a service: the device's
// word (u/#) and the server's (d/#, except the product's own downlink d/app/#).
func reserved(topic string) bool {
	_, rest, ok := identity.DeviceTopic(topic)
	if !ok {
		return false
	}
	return under(rest, "u") || under(rest, "d") && !under(rest, "d/app")
}

// under reports whether rest is level or below it: MQTT matching of level/#.
func under(rest, level string) bool {
	return rest == level || len(rest) > len(level) && rest[len(level)] == '/' && strings.HasPrefix(rest, level)
}

package identity

import (
	"errors"
	"strings"
	"unicode/utf8"
)

// MaxTopic is the longest topic or filter in bytes (design section 4). MQTT
// would allow 65,535; nobody needs them, and every copy of one costs memory.
const MaxTopic = 1024

// PrivatePrefix is where the topics of devices live: private/<id>/...
const PrivatePrefix = "private/"

// What can be wrong with a topic name or a topic filter.
var (
	ErrTopicEmpty    = errors.New("topic is empty")
	ErrTopicLong     = errors.New("topic is longer than 1024 bytes")
	ErrTopicUTF8     = errors.New("topic is not UTF-8")
	ErrTopicControl  = errors.New("topic holds U+0000")
	ErrTopicWildcard = errors.New("topic name holds a wildcard")
	ErrFilter        = errors.New("wildcard is not a whole level, or # is not the last one")
	ErrShare         = errors.New("shared subscription needs a group name and a filter")
)

// CheckTopic reports why topic is no topic name (MQTT 5.0 4.7.1, 4.7.3).
func CheckTopic(topic string) error {
	if err := checkText(topic); err != nil {
		return err
	}
	if strings.ContainsAny(topic, "+#") {
		return ErrTopicWildcard
	}
	return nil
}

// CheckFilter reports why filter is no topic filter (MQTT 5.0 4.7.1). A
// "$share/group/" prefix is not looked at: see SplitShare.
func CheckFilter(filter string) error {
	if err := checkText(filter); err != nil {
		return err
	}
	for rest, more := filter, true; more; {
		var level string
		level, rest, more = strings.Cut(rest, "/")
		if len(level) > 1 && strings.ContainsAny(level, "+#") {
			return ErrFilter
		}
		if level == "#" && more {
			return ErrFilter
		}
	}
	return nil
}

func checkText(s string) error {
	switch {
	case s == "":
		return ErrTopicEmpty
	case len(s) > MaxTopic:
		return ErrTopicLong
	case !utf8.ValidString(s):
		return ErrTopicUTF8
	case strings.IndexByte(s, 0) >= 0:
		return ErrTopicControl
	}
	return nil
}

// SplitShare takes "$share/group/filter" apart (MQTT 5.0 4.8.2). For any other
// filter group is "" and inner is the filter itself.
func SplitShare(filter string) (group, inner string, err error) {
	rest, ok := strings.CutPrefix(filter, "$share/")
	if !ok {
		if filter == "$share" {
			return "", "", ErrShare
		}
		return "", filter, nil
	}
	group, inner, ok = strings.Cut(rest, "/")
	if !ok || group == "" || inner == "" || strings.ContainsAny(group, "+#") {
		return "", "", ErrShare
	}
	return group, inner, nil
}

// Match reports whether the filter matches the topic name. Both must be valid.
// A wildcard in the first level does not match a topic that begins with $
// (MQTT 5.0 4.7.2), and "a/#" matches "a".
func Match(filter, topic string) bool {
	if topic != "" && topic[0] == '$' && (filter[0] == '+' || filter[0] == '#') {
		return false
	}
	f, t, moreF, moreT := filter, topic, true, true
	for moreF {
		var level string
		level, f, moreF = strings.Cut(f, "/")
		if level == "#" {
			return true
		}
		if !moreT {
			return false
		}
		var name string
		name, t, moreT = strings.Cut(t, "/")
		if level != "+" && level != name {
			return false
		}
	}
	return !moreT
}

// Covers reports whether every topic that inner matches is matched by outer
// too. Both are valid filters or topic names, without a $share prefix.
func Covers(outer, inner string) bool {
	if inner != "" && inner[0] == '$' && (outer[0] == '+' || outer[0] == '#') {
		return false
	}
	if inner == "#" {
		inner = "+/#" // the same topics: every topic has a first level
	}
	o, i, moreO, moreI := outer, inner, true, true
	for moreO {
		var lo, li string
		lo, o, moreO = strings.Cut(o, "/")
		if lo == "#" {
			return true
		}
		if !moreI {
			return false
		}
		li, i, moreI = strings.Cut(i, "/")
		if li == "#" { // inner is wider than anything but #
			return false
		}
		if lo != "+" && lo != li {
			return false
		}
	}
	return !moreI
}

// Overlaps reports whether some topic name is matched by both filters.
func Overlaps(a, b string) bool {
	if firstIsDollar(a) != firstIsDollar(b) {
		return false // a wildcard never reaches a $ topic
	}
	moreA, moreB := true, true
	for moreA && moreB {
		var la, lb string
		la, a, moreA = strings.Cut(a, "/")
		lb, b, moreB = strings.Cut(b, "/")
		if la == "#" || lb == "#" {
			return true
		}
		if la != lb && la != "+" && lb != "+" {
			return false
		}
	}
	switch {
	case moreA:
		return a == "#" // "x/#" and "x" share x
	case moreB:
		return b == "#"
	}
	return true
}

func firstIsDollar(s string) bool { return s != "" && s[0] == '$' }

// DeviceTopic takes private/<id>/<rest> apart. For "private/<id>" rest is "".
// ok is false for any other topic, and for an id that is not one.
func DeviceTopic(topic string) (id ID, rest string, ok bool) {
	tail, ok := strings.CutPrefix(topic, PrivatePrefix)
	if !ok || len(tail) < 8 || (len(tail) > 8 && tail[8] != '/') {
		return 0, "", false
	}
	id, err := ParseID(tail[:8])
	if err != nil {
		return 0, "", false
	}
	if len(tail) > 9 {
		rest = tail[9:]
	}
	return id, rest, true
}

// Topic gives private/<id>/<rest>.
func (id ID) Topic(rest string) string { return PrivatePrefix + id.String() + "/" + rest }

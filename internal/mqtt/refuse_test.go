package mqtt

import (
	"errors"
	"testing"
)

// TestRefused has one entry for each rule that Decode holds: taking the rule out turns its
// entry red.
func TestRefused(t *testing.T) {
	const connect5, connect4 = "0004 'MQTT' 05 02 0000 ", "0004 'MQTT' 04 "
	cases := []struct {
		rule  string
		v     Version
		typ   Type
		flags byte
		body  string
		code  ReasonCode
	}{
		{"connect: header flags", V311, CONNECT, 1, connect4 + "02 0000 0001 'a'", MalformedPacket},
		{"connect: reserved flag", V311, CONNECT, 0, connect4 + "03 0000 0001 'a'", MalformedPacket},
		{"connect: will qos 3", V311, CONNECT, 0, connect4 + "1E 0000 0001 'a' 0001 'w' 0000", MalformedPacket},
		{"connect: will qos without will", V311, CONNECT, 0, connect4 + "0A 0000 0001 'a'", MalformedPacket},
		{"connect: will retain without will", V311, CONNECT, 0, connect4 + "22 0000 0001 'a'", MalformedPacket},
		{"connect: password alone in 3.1.1", V311, CONNECT, 0, connect4 + "42 0000 0001 'a' 0001 'p'", MalformedPacket},
		{"connect: trailing bytes", V311, CONNECT, 0, connect4 + "02 0000 0001 'a' 00", MalformedPacket},
		{"connect: client id not UTF-8", V311, CONNECT, 0, connect4 + "02 0000 0001 FF", MalformedPacket},
		{"connect: surrogate", V311, CONNECT, 0, connect4 + "02 0000 0003 EDA080", MalformedPacket},
		{"connect: U+0000", V311, CONNECT, 0, connect4 + "02 0000 0001 00", MalformedPacket},
		{"connect: overlong UTF-8", V311, CONNECT, 0, connect4 + "02 0000 0002 C080", MalformedPacket},
		{"connect: will topic empty", V311, CONNECT, 0, connect4 + "06 0000 0001 'a' 0000 0000", MalformedPacket},
		{"connect: will topic wildcard", V311, CONNECT, 0, connect4 + "06 0000 0001 'a' 0001 '#' 0000", MalformedPacket},
		{"connect: receive maximum 0", V5, CONNECT, 0, connect5 + "03 21 0000 0001 'a'", ProtocolError},
		{"connect: maximum packet size 0", V5, CONNECT, 0, connect5 + "05 27 00000000 0001 'a'", ProtocolError},
		{"connect: request problem 2", V5, CONNECT, 0, connect5 + "02 17 02 0001 'a'", ProtocolError},
		{"connect: request response 2", V5, CONNECT, 0, connect5 + "02 19 02 0001 'a'", ProtocolError},
		{"connect: duplicate property", V5, CONNECT, 0, connect5 + "0A 11 00000001 11 00000001 0001 'a'", ProtocolError},
		{"connect: property of publish", V5, CONNECT, 0, connect5 + "03 23 0001 0001 'a'", ProtocolError},
		{"connect: unknown property", V5, CONNECT, 0, connect5 + "02 7F 00 0001 'a'", MalformedPacket},
		{"connect: property beyond 63", V5, CONNECT, 0, connect5 + "03 8101 00 0001 'a'", MalformedPacket},
		{"connect: auth data without method", V5, CONNECT, 0, connect5 + "04 16 0001 'd' 0001 'a'", ProtocolError},
		{"connect: property list too long", V5, CONNECT, 0, connect5 + "7F 11 00000001 0001 'a'", MalformedPacket},
		{"connect: property cut by its list", V5, CONNECT, 0, connect5 + "03 11 00000001 0001 'a'", MalformedPacket},
		{"connect: property length padded", V5, CONNECT, 0, connect5 + "80 00 0001 'a'", MalformedPacket},
		{"connect: user property not UTF-8", V5, CONNECT, 0, connect5 + "06 26 0000 0001 FF 0001 'a'", MalformedPacket},
		{"will: response topic wildcard", V5, CONNECT, 0, "0004 'MQTT' 05 06 0000 00 0001 'a' 04 08 0001 '+' 0001 'w' 0000", MalformedPacket},
		{"will: payload format 2", V5, CONNECT, 0, "0004 'MQTT' 05 06 0000 00 0001 'a' 02 01 02 0001 'w' 0000", ProtocolError},
		{"will: topic alias", V5, CONNECT, 0, "0004 'MQTT' 05 06 0000 00 0001 'a' 03 23 0001 0001 'w' 0000", ProtocolError},
		{"connack: reserved ack flags", V5, CONNACK, 0, "02 00 00", MalformedPacket},
		{"connack: session present in a refusal", V5, CONNACK, 0, "01 87 00", ProtocolError},
		{"connack: reserved return code", V311, CONNACK, 0, "00 06", MalformedPacket},
		{"connack: code of another packet", V5, CONNACK, 0, "00 10 00", ProtocolError},
		{"connack: maximum qos 2", V5, CONNACK, 0, "00 00 02 24 02", ProtocolError},
		{"connack: auth data without method", V5, CONNACK, 0, "00 00 04 16 0001 'd'", ProtocolError},
		{"publish: qos 3", V311, PUBLISH, 6, "0001 'a' 0001", MalformedPacket},
		{"publish: dup at qos 0", V311, PUBLISH, 8, "0001 'a'", MalformedPacket},
		{"publish: packet id 0", V311, PUBLISH, 2, "0001 'a' 0000", ProtocolError},
		{"publish: no topic", V311, PUBLISH, 0, "0000 'x'", ProtocolError},
		{"publish: no topic and no alias", V5, PUBLISH, 0, "0000 00 'x'", ProtocolError},
		{"publish: topic alias 0", V5, PUBLISH, 0, "0001 'a' 03 23 0000", TopicAliasInvalid},
		{"publish: wildcard +", V5, PUBLISH, 0, "0003 'a/+' 00", MalformedPacket},
		{"publish: wildcard #", V311, PUBLISH, 0, "0001 '#'", MalformedPacket},
		{"publish: U+0000 in the topic", V5, PUBLISH, 0, "0002 'a' 00 00", MalformedPacket},
		{"publish: subscription id 0", V5, PUBLISH, 0, "0001 'a' 02 0B 00", ProtocolError},
		{"publish: payload format 2", V5, PUBLISH, 0, "0001 'a' 02 01 02", ProtocolError},
		{"publish: response topic with a wildcard", V5, PUBLISH, 0, "0001 'a' 06 08 0003 'r/#'", MalformedPacket},
		{"publish: response topic empty", V5, PUBLISH, 0, "0001 'a' 03 08 0000", MalformedPacket},
		{"publish: duplicate expiry", V5, PUBLISH, 0, "0001 'a' 0A 02 00000001 02 00000001", ProtocolError},
		{"publish: reason string", V5, PUBLISH, 0, "0001 'a' 03 1F 0000", ProtocolError},
		{"puback: flags", V311, PUBACK, 1, "0001", MalformedPacket},
		{"pubrel: flags", V311, PUBREL, 0, "0001", MalformedPacket},
		{"puback: packet id 0", V311, PUBACK, 0, "0000", ProtocolError},
		{"puback: too long in 3.1.1", V311, PUBACK, 0, "0001 00", MalformedPacket},
		{"puback: too short", V5, PUBACK, 0, "00", MalformedPacket},
		{"puback: code of pubrel", V5, PUBACK, 0, "0001 92", ProtocolError},
		{"pubrel: code of puback", V5, PUBREL, 2, "0001 87", ProtocolError},
		{"puback: user property cut", V5, PUBACK, 0, "0001 00 04 26 0000 00", MalformedPacket},
		{"subscribe: flags", V311, SUBSCRIBE, 0, "0001 0001 'a' 00", MalformedPacket},
		{"subscribe: no filter", V311, SUBSCRIBE, 2, "0001", ProtocolError},
		{"subscribe: no filter in 5.0", V5, SUBSCRIBE, 2, "0001 00", ProtocolError},
		{"subscribe: packet id 0", V311, SUBSCRIBE, 2, "0000 0001 'a' 00", ProtocolError},
		{"subscribe: empty filter", V311, SUBSCRIBE, 2, "0001 0000 00", MalformedPacket},
		{"subscribe: a#", V311, SUBSCRIBE, 2, "0001 0002 'a#' 00", MalformedPacket},
		{"subscribe: #/a", V311, SUBSCRIBE, 2, "0001 0003 '#/a' 00", MalformedPacket},
		{"subscribe: +a", V5, SUBSCRIBE, 2, "0001 00 0002 '+a' 00", MalformedPacket},
		{"subscribe: qos 3", V5, SUBSCRIBE, 2, "0001 00 0001 'a' 03", MalformedPacket},
		{"subscribe: options of 5.0 in 3.1.1", V311, SUBSCRIBE, 2, "0001 0001 'a' 04", MalformedPacket},
		{"subscribe: reserved options", V5, SUBSCRIBE, 2, "0001 00 0001 'a' 40", MalformedPacket},
		{"subscribe: retain handling 3", V5, SUBSCRIBE, 2, "0001 00 0001 'a' 30", ProtocolError},
		{"subscribe: no local and shared", V5, SUBSCRIBE, 2, "0001 00 000A '$share/g/a' 04", ProtocolError},
		{"subscribe: share without a filter", V5, SUBSCRIBE, 2, "0001 00 0008 '$share/g' 00", ProtocolError},
		{"subscribe: share without a group", V5, SUBSCRIBE, 2, "0001 00 0009 '$share//a' 00", ProtocolError},
		{"subscribe: wildcard as a group", V5, SUBSCRIBE, 2, "0001 00 000A '$share/+/a' 00", ProtocolError},
		{"subscribe: subscription id 0", V5, SUBSCRIBE, 2, "0001 02 0B 00 0001 'a' 00", ProtocolError},
		{"subscribe: two subscription ids", V5, SUBSCRIBE, 2, "0001 04 0B 01 0B 02 0001 'a' 00", ProtocolError},
		{"suback: no code", V311, SUBACK, 0, "0001", ProtocolError},
		{"suback: code of 5.0 in 3.1.1", V311, SUBACK, 0, "0001 87", MalformedPacket},
		{"suback: code of another packet", V5, SUBACK, 0, "0001 00 11", ProtocolError},
		{"unsubscribe: flags", V311, UNSUBSCRIBE, 0, "0001 0001 'a'", MalformedPacket},
		{"unsubscribe: no filter", V5, UNSUBSCRIBE, 2, "0001 00", ProtocolError},
		{"unsubscribe: empty filter", V5, UNSUBSCRIBE, 2, "0001 00 0000", MalformedPacket},
		{"unsuback: no code in 5.0", V5, UNSUBACK, 0, "0001 00", ProtocolError},
		{"unsuback: codes in 3.1.1", V311, UNSUBACK, 0, "0001 00", MalformedPacket},
		{"pingreq: flags", V311, PINGREQ, 1, "", MalformedPacket},
		{"pingreq: body", V311, PINGREQ, 0, "00", MalformedPacket},
		{"disconnect: flags", V5, DISCONNECT, 1, "", MalformedPacket},
		{"disconnect: body in 3.1.1", V311, DISCONNECT, 0, "00", MalformedPacket},
		{"disconnect: unknown code", V5, DISCONNECT, 0, "7F", ProtocolError},
		{"auth: in 3.1.1", V311, AUTH, 0, "", MalformedPacket},
		{"auth: without a method", V5, AUTH, 0, "18 00", ProtocolError},
		{"auth: unknown code", V5, AUTH, 0, "80 04 15 0001 'm'", ProtocolError},
	}
	for _, c := range cases {
		p := newPacket(c.typ)
		body := unhex(t, c.body)
		for _, d := range []packet{p, atClient{p}} {
			var e *Error
			if err := d.Decode(c.v, c.flags, body); !errors.As(err, &e) || e.Code != c.code {
				t.Errorf("%s: got %v, want %v", c.rule, err, c.code)
			}
		}
	}
}

// TestDirection: what only the other side may send.
func TestDirection(t *testing.T) {
	cases := []struct {
		rule             string
		typ              Type
		body             string
		atServer, client bool // whether each side takes it
	}{
		{"subscription id", PUBLISH, "0001 'a' 02 0B 01", false, true},
		{"session expiry", DISCONNECT, "00 05 11 00000001", true, false},
		{"disconnect with will", DISCONNECT, "04", true, false},
		{"server reference", DISCONNECT, "00 04 1C 0001 's'", false, true},
		{"code of a server", DISCONNECT, "8E", false, true},
	}
	for _, c := range cases {
		p := newPacket(c.typ)
		if err := p.Decode(V5, 0, unhex(t, c.body)); (err == nil) != c.atServer {
			t.Errorf("%s at a server: %v", c.rule, err)
		}
		if err := (atClient{p}).Decode(V5, 0, unhex(t, c.body)); (err == nil) != c.client {
			t.Errorf("%s at a client: %v", c.rule, err)
		}
	}
}

package mqtt

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func pub(topic, payload string) *Publish {
	return &Publish{Topic: []byte(topic), Payload: []byte(payload)}
}

// TestWire holds each packet against the bytes that the specifications give it.
func TestWire(t *testing.T) {
	aliased := pub("", "x")
	aliased.Alias, aliased.QoS, aliased.PacketID = 3, 1, 10
	full := pub("a/b", "xyz")
	full.QoS, full.PacketID, full.Retain, full.Dup = 2, 7, true, true
	full.HasExpiry, full.Expiry, full.SubIDs = true, 30, []uint32{1, 200}
	full.Forward = unhex(t, "01 01 26 0001 'k' 0001 'v'")
	defaults := ConnectProps{ReceiveMaximum: 65535}
	cases := []struct {
		v    Version
		p    packet
		wire string
	}{
		{V311, &Connect{Version: V311, CleanStart: true, KeepAlive: 60, ClientID: "id"}, "10 0E 0004 'MQTT' 04 02 003C 0002 'id'"},
		{V311, &Connect{Version: V311, ClientID: "a", HasUsername: true, Username: "u", HasPassword: true, Password: []byte("p"),
			Will: &Will{Topic: "w", Payload: []byte("x"), QoS: 1, Retain: true}}, "10 19 0004 'MQTT' 04 EC 0000 0001 'a' 0001 'w' 0001 'x' 0001 'u' 0001 'p'"},
		{V5, &Connect{Version: V5, CleanStart: true, Props: defaults}, "10 0D 0004 'MQTT' 05 02 0000 00 0000"},
		{V5, &Connect{Version: V5, ClientID: "a", Props: ConnectProps{SessionExpiry: 60, ReceiveMaximum: 20, MaxPacketSize: 4096, TopicAliasMax: 5,
			RequestResponseInfo: true, NoProblemInfo: true, AuthMethod: "m", AuthData: []byte("d"), User: unhex(t, "26 0001 'k' 0001 'v'")}},
			"10 31 0004 'MQTT' 05 00 0000 23 11 0000003C 21 0014 27 00001000 22 0005 19 01 17 00 15 0001 'm' 16 0001 'd' 26 0001 'k' 0001 'v' 0001 'a'"},
		{V5, &Connect{Version: V5, ClientID: "a", Props: defaults, Will: &Will{Topic: "w", QoS: 2, DelayInterval: 3, HasExpiry: true, Expiry: 9, Forward: unhex(t, "01 01")}},
			"10 20 0004 'MQTT' 05 14 0000 00 0001 'a' 0C 18 00000003 02 00000009 01 01 0001 'w' 0000"},
		{V311, &Connack{SessionPresent: true}, "20 02 01 00"},
		{V311, &Connack{Code: NotAuthorized}, "20 02 00 05"},
		{V5, &Connack{Code: NotAuthorized, Props: ConnackProps{ReceiveMaximum: 65535, Reason: "no"}}, "20 08 00 87 05 1F 0002 'no'"},
		{V5, &Connack{Props: ConnackProps{ReceiveMaximum: 65535, HasSessionExpiry: true, SessionExpiry: 1, HasKeepAlive: true, ServerKeepAlive: 2, QoS1Only: true, NoRetain: true,
			NoWildcard: true, NoSubIDs: true, NoShared: true}}, "20 15 00 00 12 11 00000001 13 0002 24 01 25 00 28 00 29 00 2A 00"},
		{V311, pub("a/b", "hi"), "30 07 0003 'a/bhi'"},
		{V5, pub("a/b", "hi"), "30 08 0003 'a/b' 00 'hi'"},
		{V5, aliased, "32 09 0000 000A 03 23 0003 'x'"},
		{V5, full, "3D 1E 0003 'a/b' 0007 13 02 0000001E 0B 01 0B C801 01 01 26 0001 'k' 0001 'v' 'xyz'"},
		{V311, &Ack{Type: PUBACK, PacketID: 0x1234}, "40 02 1234"},
		{V5, &Ack{Type: PUBREL, PacketID: 1}, "62 02 0001"},
		{V5, &Ack{Type: PUBREC, PacketID: 1, Code: QuotaExceeded}, "50 03 0001 97"},
		{V5, &Ack{Type: PUBCOMP, PacketID: 1, Code: PacketIDNotFound, Reason: "x"}, "70 08 0001 92 04 1F 0001 'x'"},
		{V311, &Subscribe{PacketID: 1, Filters: []Subscription{{Filter: "a/#", QoS: 1}, {Filter: "+", QoS: 2}}}, "82 0C 0001 0003 'a/#' 01 0001 '+' 02"},
		{V5, &Subscribe{PacketID: 1, SubID: 200, Filters: []Subscription{{Filter: "$share/g/a", QoS: 1, RetainAsPublished: true, RetainHandling: 2}, {Filter: "b", NoLocal: true}}},
			"82 17 0001 03 0B C801 000A '$share/g/a' 29 0001 'b' 04"},
		{V311, &Suback{PacketID: 1, Codes: []ReasonCode{GrantedQoS2, UnspecifiedError}}, "90 04 0001 02 80"},
		{V5, &Suback{PacketID: 1, Codes: []ReasonCode{NotAuthorized}}, "90 04 0001 00 87"},
		{V311, &Unsubscribe{PacketID: 1, Filters: []string{"a", "b/+"}}, "A2 0A 0001 0001 'a' 0003 'b/+'"},
		{V5, &Unsubscribe{PacketID: 1, Filters: []string{"a"}}, "A2 06 0001 00 0001 'a'"},
		{V311, &Unsuback{PacketID: 1}, "B0 02 0001"},
		{V5, &Unsuback{PacketID: 1, Codes: []ReasonCode{NoSubscriptionExisted}}, "B0 04 0001 00 11"},
		{V5, &Ping{Type: PINGREQ}, "C0 00"},
		{V311, &Ping{Type: PINGRESP}, "D0 00"},
		{V311, &Disconnect{}, "E0 00"},
		{V5, &Disconnect{}, "E0 00"},
		{V5, &Disconnect{Code: ProtocolError, Reason: "x"}, "E0 06 82 04 1F 0001 'x'"},
		{V5, &Disconnect{Code: DisconnectWithWill, HasSessionExpiry: true, SessionExpiry: 5}, "E0 07 04 05 11 00000005"},
		{V5, &Disconnect{Code: SessionTakenOver, ServerReference: "s"}, "E0 06 8E 04 1C 0001 's'"},
		{V5, &Auth{}, "F0 00"},
		{V5, &Auth{Code: ContinueAuthentication, Method: "m", Data: []byte("d")}, "F0 0A 18 08 15 0001 'm' 16 0001 'd'"},
	}
	for _, c := range cases {
		wire := unhex(t, c.wire)
		if got := c.p.Append(nil, c.v); !bytes.Equal(got, wire) {
			t.Errorf("%+v is\n%x, want\n%x", c.p, got, wire)
		}
		h, n, err := ParseHeader(wire)
		if err != nil {
			t.Fatal(err)
		}
		p := newPacket(h.Type)
		err = p.Decode(c.v, h.Flags, wire[n:])
		if err != nil {
			err = atClient{p}.Decode(c.v, h.Flags, wire[n:])
		}
		if err != nil || !same(p, c.p) {
			t.Errorf("%s: %+v, %v, want %+v", c.wire, p, err, c.p)
		}
	}
}

// TestTruncated cuts every seed of the table short: no packet with a length or a string cut
// off may pass, and none may panic.
func TestTruncated(t *testing.T) {
	whole := unhex(t, "10 19 0004 'MQTT' 04 EC 0000 0001 'a' 0001 'w' 0001 'x' 0001 'u' 0001 'p'")[2:]
	for i := range whole {
		if err := new(Connect).Decode(0, 0, whole[:i]); err == nil {
			t.Errorf("CONNECT cut to %d bytes passed", i)
		}
	}
	sub := unhex(t, "0001 03 0B C801 000A '$share/g/a' 29")
	for i := range sub {
		if err := new(Subscribe).Decode(V5, 2, sub[:i]); err == nil {
			t.Errorf("SUBSCRIBE cut to %d bytes passed", i)
		}
	}
}

func TestParseHeader(t *testing.T) {
	good := []struct {
		wire string
		want Header
		n    int
	}{
		{"", Header{}, 0}, {"30", Header{}, 0}, {"30 80", Header{}, 0}, {"30 FF FF FF", Header{}, 0},
		{"3D 00", Header{PUBLISH, 13, 0}, 2}, {"C0 7F 01", Header{PINGREQ, 0, 127}, 2},
		{"30 80 01", Header{PUBLISH, 0, 128}, 3}, {"30 FF FF FF 7F", Header{PUBLISH, 0, MaxRemaining}, 5},
	}
	for _, c := range good {
		h, n, err := ParseHeader(unhex(t, c.wire))
		if err != nil || n != c.n || (n > 0 && h != c.want) {
			t.Errorf("%s: %+v %d %v", c.wire, h, n, err)
		}
	}
	for _, wire := range []string{"00", "0F 00", "30 80 80 80 80", "30 FF FF FF FF 01", "30 80 00", "30 81 80 00"} {
		if _, _, err := ParseHeader(unhex(t, wire)); err == nil {
			t.Errorf("%s passed", wire)
		}
	}
}

func TestConnectErrorsSayInWhichVersionToAnswer(t *testing.T) {
	cases := []struct {
		body string
		v    Version
		code ReasonCode
	}{
		{"0006 'MQIsdp' 03 02 0000 0001 'a'", V31, UnsupportedProtocolVersion},
		{"0004 'MQTT' 06 02 0000 0001 'a'", 6, UnsupportedProtocolVersion},
		{"0004 'mqtt' 04 02 0000 0001 'a'", 0, UnsupportedProtocolVersion},
		{"0004 'MQTT' 04 00 0000 0000", V311, ClientIdentifierNotValid},
		{"0004 'MQTT' 05 03 0000 00 0001 'a'", V5, MalformedPacket},
	}
	for _, c := range cases {
		var p Connect
		err := p.Decode(0, 0, unhex(t, c.body))
		var e *Error
		if !errors.As(err, &e) || e.Code != c.code || p.Version != c.v {
			t.Errorf("%s: version %v, %v", c.body, p.Version, err)
		}
	}
	var p Connect
	if err := p.Decode(0, 0, unhex(t, "0004 'MQTT' 05 00 0000 00 0000")); err != nil {
		t.Errorf("5.0 with an empty client id and no clean start: %v", err)
	}
}

func TestConnackCodesOf311(t *testing.T) {
	for code, want := range map[ReasonCode]byte{Success: 0, UnsupportedProtocolVersion: 1, ClientIdentifierNotValid: 2, ServerUnavailable: 3, ServerBusy: 3,
		BadUserNameOrPassword: 4, NotAuthorized: 5, Banned: 5, QuotaExceeded: 3} {
		if got := (&Connack{Code: code}).Append(nil, V311); got[3] != want {
			t.Errorf("%v is return code %d", code, got[3])
		}
	}
}

// TestForwardIsInOrder mixes what a broker passes on with what it does not, in every order.
func TestForwardIsInOrder(t *testing.T) {
	cases := []struct{ props, forward string }{
		{"", ""},
		{"0100 0300 01 'c'", "0100 0300 01 'c'"},
		{"23 0001 0100 26 0000 0000", "0100 26 0000 0000"},
		{"0100 26 0000 0000 23 0001", "0100 26 0000 0000"},
		{"26 0001 'a' 0000 02 00000005 26 0001 'b' 0000 23 0001 0101 26 0001 'c' 0000", "26 0001 'a' 0000 26 0001 'b' 0000 0101 26 0001 'c' 0000"},
		{"08 0001 'r' 02 00000005 09 0002 'xy'", "08 0001 'r' 09 0002 'xy'"},
	}
	for _, c := range cases {
		for _, room := range []int{0, 1000} {
			props := unhex(t, c.props)
			body := append([]byte{0, 1, 't', byte(len(props))}, props...)
			p := Publish{Scratch: make([]byte, 0, room)}
			if err := p.Decode(V5, 0, append(body, "payload"...)); err != nil || !bytes.Equal(p.Forward, unhex(t, c.forward)) || string(p.Payload) != "payload" {
				t.Errorf("%s: forward %x, %v", c.props, p.Forward, err)
			}
		}
	}
}

func TestPublishHead(t *testing.T) {
	p := pub("a/b", strings.Repeat("x", 300))
	p.QoS, p.PacketID = 1, 5
	whole := AppendPublish(nil, V5, p)
	payload := p.Payload
	p.Payload = nil
	if got := append(AppendPublishHead(nil, V5, p, len(payload)), payload...); !bytes.Equal(got, whole) {
		t.Fatalf("%x, want %x", got, whole)
	}
}

func TestNames(t *testing.T) {
	if got := CONNECT.String() + SUBACK.String() + AUTH.String() + Type(0).String() + UNSUBSCRIBE.String(); got != "CONNECTSUBACKAUTHRESERVEDUNSUBSCRIBE" {
		t.Error(got)
	}
	for c, want := range map[ReasonCode]string{0: "success", 0x87: "not authorized", 0x99: "payload format invalid", 0xA2: "wildcard subscriptions not supported", 0xA3: "reason code 0xa3", 0x19: "re-authenticate"} {
		if c.String() != want {
			t.Errorf("%02x is %q", byte(c), c)
		}
	}
}

func TestAppendPanicsBeyondTheWire(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a topic of 65,536 bytes was written")
		}
	}()
	pub(strings.Repeat("x", 65536), "").Append(nil, V5)
}

func TestPublishPathDoesNotAllocate(t *testing.T) {
	wire := unhex(t, "0003 'a/b' 0007 11 02 0000001E 23 0001 01 01 26 0001 'k' 0001 'v' 'xyz'")
	mixed := unhex(t, "0003 'a/b' 0007 11 01 01 02 0000001E 23 0001 26 0001 'k' 0001 'v' 'xyz'")
	ackWire := unhex(t, "0007 10")
	var p Publish
	p.Scratch = make([]byte, 0, 64)
	var ack Ack
	var ping Ping
	out := make([]byte, 0, 256)
	fail := false
	n := testing.AllocsPerRun(1000, func() {
		fail = fail || p.Decode(V5, 2, wire) != nil || p.Decode(V5, 2, mixed) != nil
		out = AppendPublish(out[:0], V5, &p)
		ack.Type = PUBACK
		fail = fail || ack.Decode(V5, 0, ackWire) != nil || ping.Decode(V5, 0, nil) != nil
		out = ack.Append(out, V5)
		out = ping.Append(out, V5)
	})
	if n != 0 || fail {
		t.Fatalf("%v allocations, failed %v", n, fail)
	}
}

func BenchmarkPublishDecode(b *testing.B) {
	wire := AppendPublish(nil, V5, &Publish{QoS: 1, PacketID: 1, Topic: []byte("private/ABCD1234/u/telemetry"), Payload: make([]byte, 100)})[3:]
	b.ReportAllocs()
	var p Publish
	for b.Loop() {
		if p.Decode(V5, 2, wire) != nil {
			b.Fatal("refused")
		}
	}
}

func BenchmarkPublishAppend(b *testing.B) {
	p := &Publish{QoS: 1, PacketID: 1, Topic: []byte("private/ABCD1234/u/telemetry"), Payload: make([]byte, 100)}
	out := make([]byte, 0, 256)
	b.ReportAllocs()
	for b.Loop() {
		out = AppendPublish(out[:0], V5, p)
	}
}

func BenchmarkPubackAppend(b *testing.B) {
	p := &Ack{Type: PUBACK, PacketID: 1}
	out := make([]byte, 0, 16)
	b.ReportAllocs()
	for b.Loop() {
		out = p.Append(out[:0], V5)
	}
}

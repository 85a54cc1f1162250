package mqtt

import "fmt"

// ReasonCode is a reason code of MQTT 5.0 (2.4). The packages above speak these only:
// Append and Decode translate to and from the few codes of 3.1.1.
type ReasonCode byte

// The reason codes. Success is also "normal disconnection" and "granted QoS 0".
const (
	Success                    ReasonCode = 0x00
	GrantedQoS1                ReasonCode = 0x01
	GrantedQoS2                ReasonCode = 0x02
	DisconnectWithWill         ReasonCode = 0x04
	NoMatchingSubscribers      ReasonCode = 0x10
	NoSubscriptionExisted      ReasonCode = 0x11
	ContinueAuthentication     ReasonCode = 0x18
	ReAuthenticate             ReasonCode = 0x19
	UnspecifiedError           ReasonCode = 0x80
	MalformedPacket            ReasonCode = 0x81
	ProtocolError              ReasonCode = 0x82
	ImplementationSpecific     ReasonCode = 0x83
	UnsupportedProtocolVersion ReasonCode = 0x84
	ClientIdentifierNotValid   ReasonCode = 0x85
	BadUserNameOrPassword      ReasonCode = 0x86
	NotAuthorized              ReasonCode = 0x87
	ServerUnavailable          ReasonCode = 0x88
	ServerBusy                 ReasonCode = 0x89
	Banned                     ReasonCode = 0x8A
	ServerShuttingDown         ReasonCode = 0x8B
	BadAuthenticationMethod    ReasonCode = 0x8C
	KeepAliveTimeout           ReasonCode = 0x8D
	SessionTakenOver           ReasonCode = 0x8E
	TopicFilterInvalid         ReasonCode = 0x8F
	TopicNameInvalid           ReasonCode = 0x90
	PacketIDInUse              ReasonCode = 0x91
	PacketIDNotFound           ReasonCode = 0x92
	ReceiveMaximumExceeded     ReasonCode = 0x93
	TopicAliasInvalid          ReasonCode = 0x94
	PacketTooLarge             ReasonCode = 0x95
	MessageRateTooHigh         ReasonCode = 0x96
	QuotaExceeded              ReasonCode = 0x97
	AdministrativeAction       ReasonCode = 0x98
	PayloadFormatInvalid       ReasonCode = 0x99
	RetainNotSupported         ReasonCode = 0x9A
	QoSNotSupported            ReasonCode = 0x9B
	UseAnotherServer           ReasonCode = 0x9C
	ServerMoved                ReasonCode = 0x9D
	SharedNotSupported         ReasonCode = 0x9E
	ConnectionRateExceeded     ReasonCode = 0x9F
	MaximumConnectTime         ReasonCode = 0xA0
	SubIDsNotSupported         ReasonCode = 0xA1
	WildcardNotSupported       ReasonCode = 0xA2
)

// Failed reports whether the code says that something was not done.
func (c ReasonCode) Failed() bool { return c >= 0x80 }

func (c ReasonCode) String() string {
	switch c {
	case Success:
		return "success"
	case GrantedQoS1:
		return "granted QoS 1"
	case GrantedQoS2:
		return "granted QoS 2"
	case DisconnectWithWill:
		return "disconnect with Will message"
	case NoMatchingSubscribers:
		return "no matching subscribers"
	case NoSubscriptionExisted:
		return "no subscription existed"
	case ContinueAuthentication:
		return "continue authentication"
	case ReAuthenticate:
		return "re-authenticate"
	}
	if name := c.failure(); name != "" {
		return name
	}
	return fmt.Sprintf("reason code 0x%02x", byte(c))
}

func (c ReasonCode) failure() string {
	names := [...]string{
		"unspecified error", "malformed packet", "protocol error", "implementation specific error",
		"unsupported protocol version", "client identifier not valid", "bad user name or password", "not authorized",
		"server unavailable", "server busy", "banned", "server shutting down",
		"bad authentication method", "keep alive timeout", "session taken over", "topic filter invalid",
		"topic name invalid", "packet identifier in use", "packet identifier not found", "receive maximum exceeded",
		"topic alias invalid", "packet too large", "message rate too high", "quota exceeded",
		"administrative action", "payload format invalid", "retain not supported", "QoS not supported",
		"use another server", "server moved", "shared subscriptions not supported", "connection rate exceeded",
		"maximum connect time", "subscription identifiers not supported", "wildcard subscriptions not supported",
	}
	if i := int(c) - 0x80; i >= 0 && i < len(names) {
		return names[i]
	}
	return ""
}

// returnCode is the CONNACK return code of 3.1.1 (3.2.2.3) nearest to c.
func (c ReasonCode) returnCode() byte {
	switch {
	case !c.Failed():
		return 0
	case c == UnsupportedProtocolVersion:
		return 1
	case c == ClientIdentifierNotValid:
		return 2
	case c == BadUserNameOrPassword:
		return 4
	case c == NotAuthorized, c == Banned, c == BadAuthenticationMethod:
		return 5
	}
	return 3
}

// fromReturnCode reads a CONNACK return code of 3.1.1; 6 and above are reserved.
func fromReturnCode(b byte) (ReasonCode, *Error) {
	codes := [...]ReasonCode{Success, UnsupportedProtocolVersion, ClientIdentifierNotValid,
		ServerUnavailable, BadUserNameOrPassword, NotAuthorized}
	if int(b) >= len(codes) {
		return 0, malformed("reserved CONNACK return code")
	}
	return codes[b], nil
}

// packetSet is a set of packet types, and of the Will, which has properties of its own.
type packetSet uint32

const inWill packetSet = 1

func in(types ...Type) (s packetSet) {
	for _, t := range types {
		s |= 1 << t
	}
	return s
}

// serverDisconnect is a DISCONNECT from a server, which has more codes than one from a client.
const serverDisconnect packetSet = 1 << 16

// codeUse says in which packets a reason code may stand (MQTT 5.0 2.4 and 3.14.2.1).
func codeUse(c ReasonCode) packetSet {
	switch c {
	case Success:
		return in(CONNACK, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBACK, UNSUBACK, DISCONNECT, AUTH)
	case GrantedQoS1, GrantedQoS2:
		return in(SUBACK)
	case DisconnectWithWill:
		return in(DISCONNECT)
	case NoMatchingSubscribers:
		return in(PUBACK, PUBREC)
	case NoSubscriptionExisted:
		return in(UNSUBACK)
	case ContinueAuthentication, ReAuthenticate:
		return in(AUTH)
	case UnspecifiedError, ImplementationSpecific:
		return in(CONNACK, PUBACK, PUBREC, SUBACK, UNSUBACK, DISCONNECT)
	case MalformedPacket, ProtocolError, PacketTooLarge:
		return in(CONNACK, DISCONNECT)
	case NotAuthorized:
		return in(CONNACK, PUBACK, PUBREC, SUBACK, UNSUBACK) | serverDisconnect
	case UnsupportedProtocolVersion, ClientIdentifierNotValid, BadUserNameOrPassword, ServerUnavailable, Banned:
		return in(CONNACK)
	}
	return laterCodeUse(c)
}

func laterCodeUse(c ReasonCode) packetSet {
	switch c {
	case BadAuthenticationMethod, ServerBusy, RetainNotSupported, QoSNotSupported, UseAnotherServer,
		ServerMoved, ConnectionRateExceeded:
		return in(CONNACK) | serverDisconnect
	case ServerShuttingDown, KeepAliveTimeout, SessionTakenOver, MaximumConnectTime:
		return serverDisconnect
	case TopicFilterInvalid:
		return in(SUBACK, UNSUBACK) | serverDisconnect
	case TopicNameInvalid, PayloadFormatInvalid:
		return in(CONNACK, PUBACK, PUBREC, DISCONNECT)
	case PacketIDInUse:
		return in(PUBACK, PUBREC, SUBACK, UNSUBACK)
	case PacketIDNotFound:
		return in(PUBREL, PUBCOMP)
	case ReceiveMaximumExceeded, TopicAliasInvalid, MessageRateTooHigh, AdministrativeAction:
		return in(DISCONNECT)
	case QuotaExceeded:
		return in(CONNACK, PUBACK, PUBREC, SUBACK, DISCONNECT)
	case SharedNotSupported, SubIDsNotSupported, WildcardNotSupported:
		return in(SUBACK) | serverDisconnect
	}
	return 0
}

func checkCode(c ReasonCode, where packetSet) *Error {
	if codeUse(c)&where == 0 {
		return violation("reason code not allowed in this packet")
	}
	return nil
}

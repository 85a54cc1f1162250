// Package e2e holds the tests that drive the real program as its users do: the
// hawser binary, mosquitto's clients, openssl and strace, and raw clients where
// those cannot do what has to be shown. There is nothing in it but tests.
//
// They show the bad days: a server that is killed, a full disk, damaged files,
// hostile and half-dead connections, and clients that reach for what is not theirs.
package e2e

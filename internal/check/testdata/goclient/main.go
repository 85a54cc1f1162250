// goclient is the plainest MQTT client that Go's crypto/tls gives: its defaults, two roots,
// a client certificate. It publishes one message at QoS 1, waits for the PUBACK and goes.
//
//	goclient HOST PORT CAFILE CERT KEY
package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

func main() {
	if len(os.Args) != 6 {
		fail(fmt.Errorf("usage: goclient HOST PORT CAFILE CERT KEY"))
	}
	fail(publish(os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5]))
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "goclient:", err)
		os.Exit(1)
	}
}

func publish(host, port, cafile, certFile, keyFile string) error {
	pem, err := os.ReadFile(cafile)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return err
	}
	d := &tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second},
		Config: &tls.Config{ServerName: host, RootCAs: roots, Certificates: []tls.Certificate{cert}}}
	conn, err := d.Dial("tcp", net.JoinHostPort("localhost", port))
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return err
	}
	for _, step := range []struct {
		send []byte
		want string
	}{
		{[]byte("\x10\x14\x00\x04MQTT\x04\x02\x00\x3c\x00\x08goclient"), "\x20\x02\x00\x00"}, // CONNECT, CONNACK
		{[]byte("\x32\x06\x00\x01t\x00\x01x"), "\x40\x02\x00\x01"},                           // PUBLISH, PUBACK
	} {
		if _, err := conn.Write(step.send); err != nil {
			return err
		}
		got := make([]byte, len(step.want))
		if _, err := io.ReadFull(conn, got); err != nil {
			return err
		}
		if string(got) != step.want {
			return fmt.Errorf("% x where % x was expected", got, step.want)
		}
	}
	_, err = conn.Write([]byte{0xe0, 0}) // DISCONNECT
	return err
}

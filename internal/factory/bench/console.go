package bench

import (
	"bufio"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strings"
)

// pemTrust is the label of a whole trust region in PEM.
const pemTrust = "HAWSER TRUST REGION"

const (
	maxConsoleLine = 4 << 10  // bytes
	maxRequest     = 16 << 10 // bytes of PEM between BEGIN and END
)

// EncodeTrustPEM gives the text of a trust region for a console.
func EncodeTrustPEM(trust []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: pemTrust, Bytes: trust})
}

// ReadRequest reads a unit's console until a whole certificate request in PEM has come by.
// What stands before it, like the messages of a boot, is passed over.
func ReadRequest(r io.Reader) ([]byte, error) {
	in := bufio.NewScanner(r)
	in.Buffer(make([]byte, 0, maxConsoleLine), maxConsoleLine)
	var text strings.Builder
	for in.Scan() {
		line := strings.TrimSpace(in.Text())
		switch {
		case line == "-----BEGIN CERTIFICATE REQUEST-----" || line == "-----BEGIN NEW CERTIFICATE REQUEST-----":
			text.Reset()
		case text.Len() == 0:
			continue
		}
		text.WriteString(line + "\n")
		if text.Len() > maxRequest {
			return nil, fmt.Errorf("a certificate request of more than %d bytes", maxRequest)
		}
		if strings.HasPrefix(line, "-----END ") {
			return []byte(text.String()), nil
		}
	}
	if errors.Is(in.Err(), bufio.ErrTooLong) {
		return nil, fmt.Errorf("a line of more than %d bytes", maxConsoleLine)
	}
	if in.Err() != nil {
		return nil, in.Err()
	}
	return nil, errors.New("it ended before a certificate request had come")
}

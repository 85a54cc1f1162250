package sim

import (
	"encoding/binary"
	"fmt"
	"math"
	"strings"
)

// celsius is the n-th value of a device: a slow wave around 20, shifted by who it is.
func celsius(who uint32, n uint64) float64 {
	return math.Round((20+4*math.Sin(float64(n)/9+float64(who%100)))*100) / 100
}

// payload is size bytes of JSON with the number of the message and its value. Where they
// do not fit, it is the number alone, binary; size 0 means as long as it takes.
func payload(n uint64, value float64, size int) []byte {
	head := fmt.Sprintf(`{"n":%d,"celsius":%.2f`, n, value)
	const pad = `,"pad":""`
	switch left := size - len(head) - 1; {
	case size == 0:
		return []byte(head + "}")
	case left >= len(pad):
		return []byte(head + pad[:len(pad)-1] + strings.Repeat("x", left-len(pad)) + `"}`)
	case left >= 0:
		return []byte(head + strings.Repeat(" ", left) + "}")
	}
	b := make([]byte, max(size, 8))
	binary.LittleEndian.PutUint64(b, n)
	return b[:size]
}

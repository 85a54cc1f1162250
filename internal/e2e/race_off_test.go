//go:build !race

package e2e

// raceFlags build the program as the tests are built.
var raceFlags []string

// memoryRoom is how much the server may grow under attack, in bytes.
const memoryRoom = 256 << 20

//go:build race

package e2e

// raceFlags build the program as the tests are built.
var raceFlags = []string{"-race"}

// memoryRoom is how much the server may grow under attack, in bytes: the detector's
// shadow memory included.
const memoryRoom = 768 << 20

package sim

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// buckets of a meter: eight to each doubling, from 1 µs on, so that a quantile is at most
// an eighth too high.
const buckets = 8 * 32

// meter counts durations. Any goroutine may use it.
type meter struct {
	n       [buckets]atomic.Uint64
	longest atomic.Int64 // nanoseconds
}

func (m *meter) note(d time.Duration) {
	m.n[bucket(d)].Add(1)
	for {
		old := m.longest.Load()
		if int64(d) <= old || m.longest.CompareAndSwap(old, int64(d)) {
			return
		}
	}
}

func bucket(d time.Duration) int {
	us := uint64(max(d.Microseconds(), 0))
	if us < 8 {
		return int(us)
	}
	exp := bits.Len64(us) - 4 // us>>exp is 8 to 15
	return min(8*(exp+1)+int(us>>exp)-8, buckets-1)
}

// upper is the end of bucket b.
func upper(b int) time.Duration {
	if b < 8 {
		return time.Duration(b+1) * time.Microsecond
	}
	return time.Duration(8+b%8+1) << (b/8 - 1) * time.Microsecond
}

// quantile gives a duration that part q of all did not exceed, 0 if there were none.
func (m *meter) quantile(q float64) time.Duration {
	var all uint64
	for i := range m.n {
		all += m.n[i].Load()
	}
	if all == 0 {
		return 0
	}
	left := uint64(q * float64(all))
	for i := range m.n {
		n := m.n[i].Load()
		if n > left {
			return min(upper(i), time.Duration(m.longest.Load()))
		}
		left -= n
	}
	return time.Duration(m.longest.Load())
}

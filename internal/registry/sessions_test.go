package registry

import (
	"context"
	"fmt"
	"reflect"
	"syscall"
	"testing"
	"time"

	"hawser/internal/identity"
)

func sessions(t testing.TB, r *Registry) []*StoredSession {
	t.Helper()
	var list []*StoredSession
	err := r.LoadSessions(context.Background(), func(s *StoredSession) error {
		list = append(list, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func testSession(r *Registry, i int) *Session {
	id := identity.ID(0x10000000 + i)
	return &Session{No: r.NextSession(), Key: SessionKey{identity.DevicePrincipal(id), id.String()}, Generation: 1,
		Version: 5, Expiry: NeverExpires, Created: testMeta.Created}
}

func TestSessionsComeBack(t *testing.T) {
	r := newRegistry(t, Options{})
	at := testMeta.Created
	full := testSession(r, 1)
	full.Cursor, full.QueueAcked, full.Dropped, full.Disconnected = 1<<63+5, 7, 2, at
	full.Will = &Will{Topic: "private/10000001/u/gone", Payload: []byte{1}, QoS: 2, Retain: true, Delay: 9,
		HasExpiry: true, Expiry: 0, Props: []byte{3}, Due: at}
	want := StoredSession{Session: *full,
		Subscriptions: []Subscription{{"$share/g/a/#", 1, 4, 1 << 63}, {"a/+", 0x2E, 0, 3}},
		Inflight:      []Inflight{{9, 1, 2}, {1, 2, 1}}, // in the order of Ref
		InboundQoS2:   []uint16{1, 65535}}
	bare := testSession(r, 2)
	last := testSession(r, 3)
	must(t, r, func(tx *Tx) error {
		for _, s := range []*Session{full, bare, last} {
			if err := tx.SaveSession(s); err != nil {
				return err
			}
		}
		return nil
	})
	must(t, r, func(tx *Tx) error { return tx.PutSubscriptions(full.No, 1, want.Subscriptions...) })
	must(t, r, func(tx *Tx) error {
		return tx.PutSubscriptions(last.No, 1, Subscription{Filter: "x"}, Subscription{Filter: "y"})
	})
	must(t, r, func(tx *Tx) error { return tx.DeleteSubscriptions(last.No, 1, "x", "none") })
	must(t, r, func(tx *Tx) error { return tx.PutInflight(full.No, append(want.Inflight, Inflight{PacketID: 5})...) })
	must(t, r, func(tx *Tx) error { return tx.DeleteInflight(full.No, 5, 6) })
	must(t, r, func(tx *Tx) error {
		return tx.ReplaceInboundQoS2(map[int64][]uint16{full.No: {1, 65535}, bare.No: nil, 999: {1}})
	})
	r.Close()
	r = reopen(t, r.Path(), Options{})
	got := sessions(t, r)
	if len(got) != 3 || !reflect.DeepEqual(*got[0], want) {
		t.Fatalf("got %+v\nwant %+v", *got[0], want)
	}
	if got[1].Will != nil || got[1].Subscriptions != nil || len(got[2].Subscriptions) != 1 || got[2].Subscriptions[0].Filter != "y" {
		t.Errorf("%+v %+v", got[1], got[2])
	}
	if n := r.NextSession(); n != last.No+1 {
		t.Errorf("next session %d after %d", n, last.No)
	}
	must(t, r, func(tx *Tx) error { return tx.DropSession(full.No) })
	if got = sessions(t, r); len(got) != 2 || got[0].No != bare.No {
		t.Errorf("after the drop: %v", got)
	}
}

func TestOldGenerationIsFenced(t *testing.T) {
	r := newRegistry(t, Options{})
	s := testSession(r, 1)
	must(t, r, func(tx *Tx) error { return tx.SaveSession(s) })
	old := *s
	s.Generation = 2
	must(t, r, func(tx *Tx) error { return tx.SaveSession(s) })
	refused(t, r, ErrFenced, func(tx *Tx) error { return tx.SaveSession(&old) })
	refused(t, r, ErrFenced, func(tx *Tx) error { return tx.PutSubscriptions(s.No, 1, Subscription{Filter: "a"}) })
	refused(t, r, ErrFenced, func(tx *Tx) error { return tx.DeleteSubscriptions(s.No, 1, "a") })
	must(t, r, func(tx *Tx) error { return tx.DropSession(s.No) })
	refused(t, r, ErrFenced, func(tx *Tx) error { return tx.PutInflight(s.No, Inflight{}) })
	refused(t, r, ErrFenced, func(tx *Tx) error { return tx.PutSubscriptions(s.No, 2, Subscription{Filter: "a"}) })
}

func TestCursorsNeverGoBack(t *testing.T) {
	r := newRegistry(t, Options{})
	s := testSession(r, 1)
	must(t, r, func(tx *Tx) error { return tx.SaveSession(s) })
	must(t, r, func(tx *Tx) error { return tx.SaveCursors([]Cursor{{s.No, 9, 8, 7}, {77, 1, 1, 1}}) })
	must(t, r, func(tx *Tx) error { return tx.SaveCursors([]Cursor{{s.No, 3, 9, 3}}) })
	got := sessions(t, r)[0]
	if got.Cursor != 9 || got.QueueAcked != 9 || got.Dropped != 7 {
		t.Errorf("%+v", got)
	}
}

func TestLogState(t *testing.T) {
	r := newRegistry(t, Options{})
	must(t, r, func(tx *Tx) error { return tx.AddStream("init", "LOG") })
	refused(t, r, ErrExists, func(tx *Tx) error { return tx.AddStream("init", "LOG") })
	want := LogState{5 << 16, []StreamState{{"LOG", 1, 5, 5, 0xFFFFFFFF}}}
	must(t, r, func(tx *Tx) error { return tx.SaveLogState(want) })
	refused(t, r, ErrNotFound, func(tx *Tx) error { return tx.SaveLogState(LogState{Streams: []StreamState{{Name: "Q"}}}) })
	must(t, r, func(tx *Tx) error { return tx.SaveLogState(LogState{Checkpoint: 1}) })
	if got, err := r.LogState(t.Context()); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
}

func BenchmarkSaveSession(b *testing.B) {
	for _, n := range []int{1, 5000} {
		b.Run(fmt.Sprintf("%d-at-once", n), func(b *testing.B) {
			r := newRegistry(b, Options{})
			list := make([]*Session, n)
			for i := range list {
				list[i] = testSession(r, i)
			}
			done := make(chan error, n)
			cpu := cpuTime(b)
			b.ResetTimer()
			for range b.N {
				for _, s := range list {
					s.Generation++
					r.Submit(func(tx *Tx) error {
						if err := tx.SaveSession(s); err != nil {
							return err
						}
						return tx.PutSubscriptions(s.No, s.Generation, Subscription{Filter: "private/" + s.Key.ClientID + "/d/#", Options: 1})
					}, func(err error) { done <- err })
				}
				for range list {
					if err := <-done; err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*n), "µs/session")
			b.ReportMetric(float64((cpuTime(b)-cpu).Microseconds())/float64(b.N*n), "cpu-µs/session")
		})
	}
}

// cpuTime is what this process has used until now.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// bigRegistry holds n devices with a certificate and a session each.
func bigRegistry(b testing.TB, n int) *Registry {
	r := newRegistry(b, Options{})
	for at := 0; at < n; at += 1000 {
		must(b, r, func(tx *Tx) error {
			for i := at; i < at+1000; i++ {
				s := testSession(r, i)
				id, _ := s.Key.Principal.ID()
				if err := enrol(id)(tx); err != nil {
					return err
				}
				if i%1000 == 0 {
					if err := tx.TagDevice("test", id, []string{"rare"}, nil); err != nil {
						return err
					}
				}
				if err := tx.SaveSession(s); err != nil {
					return err
				}
				if err := tx.PutSubscriptions(s.No, 1, Subscription{Filter: "private/" + s.Key.ClientID + "/d/#", Options: 1}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return r
}

// BenchmarkAtScale measures what a start and the lists cost with 100,000 devices.
func BenchmarkAtScale(b *testing.B) {
	r := bigRegistry(b, 100_000)
	ctx := context.Background()
	b.Run("open", func(b *testing.B) {
		for range b.N {
			again, err := Open(ctx, r.Path(), Options{})
			if err != nil {
				b.Fatal(err)
			}
			again.Close()
		}
	})
	b.Run("load-sessions", func(b *testing.B) {
		b.ReportAllocs()
		for range b.N {
			n := 0
			if err := r.LoadSessions(ctx, func(*StoredSession) error { n++; return nil }); err != nil || n != 100_000 {
				b.Fatal(n, err)
			}
		}
	})
	b.Run("active-certificates", func(b *testing.B) {
		b.ReportAllocs()
		for range b.N {
			if err := r.ActiveCertificates(ctx, func(ActiveCertificate) error { return nil }); err != nil {
				b.Fatal(err)
			}
		}
	})
	for name, f := range map[string]DeviceFilter{
		"first-page": {}, "prefix": {Prefix: "1000F"}, "tag": {Tag: "rare"}, "state": {State: DeviceRevoked},
		"active-late": {State: DeviceActive, After: 0x10000000 + 90_000}, "class": {Class: "none"},
	} {
		b.Run("list-"+name, func(b *testing.B) {
			for range b.N {
				if _, err := r.Devices(ctx, f); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("save-seen-5000", func(b *testing.B) {
		for k := range b.N {
			list := make([]Seen, 5000)
			for i := range list {
				list[i] = Seen{identity.ID(0x10000000 + i), time.UnixMilli(int64(k) + 1)}
			}
			must(b, r, func(tx *Tx) error { return tx.SaveSeen(list) })
		}
	})
}

package server

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"hawser/internal/admin"
	"hawser/internal/factory"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// station is a flashing bench as a server sees it.
type station struct {
	t       testing.TB
	api     *admin.Client
	layout  *fleet.Layout
	name    string
	key     *ecdsa.PrivateKey
	blocks  []*factory.Block
	journal *factory.Journal
	path    string
}

// newStation registers a bench with a first block of count ids.
func newStation(t testing.TB, api *admin.Client, l *fleet.Layout, name string, count int) *station {
	t.Helper()
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	s := &station{t: t, api: api, layout: l, name: name, key: key, path: filepath.Join(t.TempDir(), name+".journal")}
	s.reserve(count)
	b := s.blocks[0]
	s.ok(factory.CreateJournal(s.path, key, b.Fleet, b.StationCert, time.Now()))
	s.journal, err = factory.OpenJournal(s.path, key)
	s.ok(err)
	t.Cleanup(func() { s.journal.Close() })
	s.ok(s.journal.AppendBlock(b.ID, time.Now()))
	return s
}

func (s *station) ok(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// request is the certificate request of a key, DER.
func request(t testing.TB, key *ecdsa.PrivateKey, tmpl x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// reserve gets a further block.
func (s *station) reserve(count int) *factory.Block {
	s.t.Helper()
	v, err := s.api.ReserveBlock(s.t.Context(), s.name, admin.NewBlock{CSR: request(s.t, s.key, x509.CertificateRequest{}), Count: count, Expires: time.Now().Add(time.Hour)})
	s.ok(err)
	csr, err := pki.ParseCSR(v.CSR)
	s.ok(err)
	ca, err := fleet.OpenCA(s.layout.CADir("a"), nil)
	s.ok(err)
	o := &fleet.StationOrder{Station: s.name, CSR: csr, Block: v.BlockID(), IDs: v.IDs, Expires: v.Expires, Anchors: s.layout.AnchorChain()}
	_, file, err := ca.SignStation(o, time.Now())
	s.ok(errors.Join(err, ca.Close()))
	s.ok(s.api.BlockSigned(s.t.Context(), file))
	b, err := factory.OpenBlock(file)
	s.ok(err)
	s.blocks = append(s.blocks, b)
	return b
}

// unit makes a unit under id and gives its key.
func (s *station) unit(id identity.ID, block *factory.Block, tmpl x509.CertificateRequest) (factory.NewUnit, *ecdsa.PrivateKey) {
	s.t.Helper()
	key, err := pki.GenerateKey()
	s.ok(err)
	ca, err := pki.NewIssuer(s.blocks[0].StationCert, s.key, pki.StationCA)
	s.ok(err)
	cert, err := pki.IssueDeviceLeaf(ca, id, &key.PublicKey, time.Now())
	s.ok(err)
	return factory.NewUnit{ID: id, Block: block.ID, Class: "sensor-a", Hardware: 3, How: factory.ByProbe, CSR: request(s.t, key, tmpl), Cert: cert}, key
}

// made records a unit under the i-th id of the first block.
func (s *station) made(i int) (factory.NewUnit, tls.Certificate) {
	s.t.Helper()
	u, key := s.unit(s.blocks[0].IDs[i], s.blocks[0], x509.CertificateRequest{})
	s.ok(s.journal.AppendUnit(u, time.Now()))
	return u, tls.Certificate{Certificate: [][]byte{u.Cert.Raw}, PrivateKey: key}
}

func (s *station) text() []byte {
	s.t.Helper()
	b, err := os.ReadFile(s.path)
	s.ok(err)
	return b
}

func (s *station) imports() (admin.JournalReport, error) {
	return s.api.ImportJournal(s.t.Context(), bytes.NewReader(s.text()))
}

// refused imports text and wants a refusal with these words, and no device of the station more than before.
func (s *station) refused(text []byte, want string) {
	s.t.Helper()
	before := s.devices()
	_, err := s.api.ImportJournal(s.t.Context(), bytes.NewReader(text))
	if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "nothing was imported") || admin.ExitCode(err) != admin.ExitFailed {
		s.t.Errorf("%v, want %q", err, want)
	}
	if after := s.devices(); after != before {
		s.t.Errorf("%s: %d devices, %d before", want, after, before)
	}
}

func (s *station) devices() int {
	s.t.Helper()
	page, err := s.api.Devices(s.t.Context(), admin.DeviceFilter{Station: s.name, Limit: 10_000})
	s.ok(err)
	return len(page.Devices)
}

// What a bench has made gets in at once, and a second import changes nothing.
func TestImportJournal(t *testing.T) {
	r := serve(t, makeFleet(t))
	s := newStation(t, r.api, r.srv.Layout(), "line1", 10)
	u, cert := s.made(0)
	if _, err := r.dial(cert, u.ID.String()); err == nil {
		t.Error("a unit that was not imported got in")
	}
	odd, _ := s.unit(s.blocks[0].IDs[1], s.blocks[0], x509.CertificateRequest{DNSNames: []string{"a.b"}})
	s.ok(s.journal.AppendUnit(odd, time.Now()))
	s.ok(s.journal.AppendBurnt(s.blocks[0].IDs[2], "the probe vanished", time.Now()))
	v, err := s.imports()
	r.ok(err)
	want := admin.JournalReport{Station: "line1", Lines: 5, New: 5, Units: 2, Burnt: 1, Notes: []string{odd.ID.String() + ": its request asks for extensions (2.5.29.17): ignored"}}
	if fmt.Sprint(v) != fmt.Sprint(want) {
		t.Errorf("%+v", v)
	}
	r.connect(cert, u.ID.String()).ping()
	d, err := r.api.Device(t.Context(), u.ID)
	if err != nil || d.State != "active" || d.Station != "line1" || d.Hardware != 3 || d.Class != "sensor-a" || d.Flashed.IsZero() || !bytes.Equal(d.Block, u.Block[:]) ||
		len(d.Certificates) != 1 || d.Certificates[0].Generation != 1 {
		t.Errorf("%+v, %v", d, err)
	}
	if v, err = s.imports(); err != nil || v.New != 0 || v.Units != 0 {
		t.Errorf("the second time: %+v, %v", v, err)
	}
	late, _ := s.made(5)
	if v, err = s.imports(); err != nil || v.New != 1 || v.Units != 1 {
		t.Errorf("a longer one: %+v, %v", v, err)
	}
	if v, err = r.api.ImportJournal(t.Context(), bytes.NewReader(append(s.text(), `{"n":`...))); err != nil || v.Torn != 5 {
		t.Errorf("a torn line: %+v, %v", v, err)
	}
	r.stop()
	r.start()
	if _, err := r.api.Device(t.Context(), late.ID); err != nil {
		t.Error("after a restart:", err)
	}
	list, err := r.api.Stations(t.Context())
	if err != nil || len(list) != 1 || list[0].Units != 3 || list[0].Burnt != 1 || list[0].Left != 6 || list[0].Lines != 6 || list[0].Until.IsZero() {
		t.Errorf("%+v, %v", list, err)
	}
}

// A journal that does not continue what was imported last is refused.
func TestImportContinues(t *testing.T) {
	r := serve(t, makeFleet(t))
	s := newStation(t, r.api, r.srv.Layout(), "line1", 10)
	s.made(0)
	s.made(1)
	lines := bytes.SplitAfter(s.text(), []byte("\n"))
	_, err := s.imports()
	r.ok(err)
	s.refused(bytes.Join(lines[:3], nil), "it has 3 lines, and 4 were imported: its end was cut off")
	// The bench was set back to a copy of its journal and went on from there.
	r.ok(s.journal.Close())
	r.ok(os.WriteFile(s.path, bytes.Join(lines[:3], nil), 0o600))
	s.journal, err = factory.OpenJournal(s.path, s.key)
	r.ok(err)
	s.made(2)
	s.made(3)
	s.refused(s.text(), "line 4: the journal does not continue what was imported last")
	changed := bytes.Replace(bytes.Join(lines, nil), []byte("sensor-a"), []byte("sensor-b"), 1)
	s.refused(changed, "line 4: the journal is damaged or was changed: it does not continue the line before")
	s.refused(nil, "it has no first line")
	s.refused([]byte("hello\n"), "line 1: the journal is damaged or was changed")
}

// Chain and signatures hold, and still: not of this fleet, not of this station, not its ids.
func TestImportBelongs(t *testing.T) {
	r, stranger := serve(t, makeFleet(t)), serve(t, makeFleet(t))
	s := newStation(t, r.api, r.srv.Layout(), "line1", 10)
	other := newStation(t, r.api, r.srv.Layout(), "line2", 10)
	foreign := newStation(t, stranger.api, stranger.srv.Layout(), "line1", 10)
	s.refused(foreign.text(), "the journal is of the fleet ")
	fresh := func() *station {
		t.Helper()
		v := *s
		v.path = filepath.Join(t.TempDir(), "j")
		r.ok(factory.CreateJournal(v.path, v.key, v.blocks[0].Fleet, v.blocks[0].StationCert, time.Now()))
		var err error
		v.journal, err = factory.OpenJournal(v.path, v.key)
		r.ok(err)
		t.Cleanup(func() { v.journal.Close() })
		r.ok(v.journal.AppendBlock(v.blocks[0].ID, time.Now()))
		return &v
	}
	v := fresh()
	r.ok(v.journal.AppendBlock(other.blocks[0].ID, time.Now()))
	v.refused(v.text(), "line 3: block "+other.blocks[0].ID.String()+" was not reserved for station line1")
	v = fresh()
	u, _ := v.unit(other.blocks[0].IDs[0], v.blocks[0], x509.CertificateRequest{})
	r.ok(v.journal.AppendUnit(u, time.Now()))
	v.refused(v.text(), "line 3: "+u.ID.String()+": not one of the station's free ids: it was reserved for station line2")
	v = fresh()
	u, _ = v.unit(0x00000001, v.blocks[0], x509.CertificateRequest{})
	r.ok(v.journal.AppendUnit(u, time.Now()))
	v.refused(v.text(), "line 3: 00000001: not one of the station's free ids: it was never reserved")
	// The key of a device that was enrolled otherwise.
	_, _, cert := r.device("ABCD1234")
	v = fresh()
	key := cert.PrivateKey.(*ecdsa.PrivateKey)
	ca, err := pki.NewIssuer(v.blocks[0].StationCert, v.key, pki.StationCA)
	r.ok(err)
	id := v.blocks[0].IDs[0]
	leaf, err := pki.IssueDeviceLeaf(ca, id, &key.PublicKey, time.Now())
	r.ok(err)
	v.made(1)
	r.ok(v.journal.AppendUnit(factory.NewUnit{ID: id, Block: v.blocks[0].ID, How: factory.ByCSR, CSR: request(t, key, x509.CertificateRequest{}), Cert: leaf}, time.Now()))
	v.refused(v.text(), "line 4: "+id.String()+": id and key belong together for life: this key is that of ABCD1234")
	// A certificate that the device CA signed and this server was never told of.
	v = fresh()
	secret := r.ca(func(ca *fleet.CA) (*x509.Certificate, error) {
		csr, err := pki.ParseCSR(request(t, v.key, x509.CertificateRequest{}))
		r.ok(err)
		return ca.RenewStation("line1", csr, time.Now())
	})
	r.ok(v.journal.AppendRenew(secret, v.key, time.Now()))
	v.refused(v.text(), "line 3: the certificate in it is none that this fleet gave to station line1")
	_, err = r.api.RenewStation(t.Context(), "line1", request(t, v.key, x509.CertificateRequest{}), secret.Raw)
	r.ok(err)
	if _, err := v.imports(); err != nil {
		t.Error("after the renewal was imported:", err)
	}
}

// The units of a revoked station that were not imported before are refused; those that
// were stay.
func TestRevokedStation(t *testing.T) {
	r := serve(t, makeFleet(t))
	s := newStation(t, r.api, r.srv.Layout(), "line1", 10)
	_, cert := s.made(0)
	_, err := s.imports()
	r.ok(err)
	s.made(1)
	r.ok(r.api.RevokeStation(t.Context(), "line1", "stolen"))
	s.refused(s.text(), "station line1: not possible in this state: it is revoked")
	r.connect(cert, s.blocks[0].IDs[0].String()).ping()
	if _, err := r.api.ReserveBlock(t.Context(), "line1", admin.NewBlock{Count: 1, Expires: time.Now().Add(time.Hour)}); !admin.IsKind(err, admin.Conflict) {
		t.Error("a revoked station got ids:", err)
	}
}

// The end of a block stops the bench, not the import.
func TestExpiredBlockIsImported(t *testing.T) {
	r := serve(t, makeFleet(t))
	key, err := pki.GenerateKey()
	r.ok(err)
	s := &station{t: t, api: r.api, layout: r.srv.Layout(), name: "line1", key: key}
	expires := time.Now().Add(1500 * time.Millisecond).Truncate(time.Second).Add(time.Second)
	v, err := r.api.ReserveBlock(t.Context(), "line1", admin.NewBlock{CSR: request(t, key, x509.CertificateRequest{}), Count: 3, Expires: expires})
	r.ok(err)
	csr, err := pki.ParseCSR(v.CSR)
	r.ok(err)
	ca, err := fleet.OpenCA(s.layout.CADir("a"), nil)
	r.ok(err)
	_, file, err := ca.SignStation(&fleet.StationOrder{Station: "line1", CSR: csr, Block: v.BlockID(), IDs: v.IDs, Expires: v.Expires, Anchors: s.layout.AnchorChain()}, time.Now())
	r.ok(errors.Join(err, ca.Close(), r.api.BlockSigned(t.Context(), file)))
	b, err := factory.OpenBlock(file)
	r.ok(err)
	s.blocks, s.path = []*factory.Block{b}, filepath.Join(t.TempDir(), "j")
	r.ok(factory.CreateJournal(s.path, key, b.Fleet, b.StationCert, time.Now()))
	s.journal, err = factory.OpenJournal(s.path, key)
	r.ok(err)
	defer s.journal.Close()
	r.ok(s.journal.AppendBlock(b.ID, time.Now()))
	s.made(0)
	until(t, "the end of the block", func() bool { return time.Now().After(b.Expires) })
	if v, err := s.imports(); err != nil || v.Units != 1 {
		t.Error(v, err)
	}
	if list, err := r.api.Stations(t.Context()); err != nil || list[0].Left != 0 {
		t.Errorf("ids left in an expired block: %+v, %v", list, err)
	}
}

// A reserved id is given to nobody else, and a station keeps its key.
func TestReserveBlock(t *testing.T) {
	r := serve(t, makeFleet(t))
	s := newStation(t, r.api, r.srv.Layout(), "line1", 100)
	id := s.blocks[0].IDs[0]
	key, err := pki.GenerateKey()
	r.ok(err)
	csr := csrOf(t, key)
	cert := r.ca(func(ca *fleet.CA) (*x509.Certificate, error) { return ca.EnrollDevice(id, csr, "", time.Now()) })
	if _, err := r.api.Enroll(t.Context(), id, admin.Enrolment{CSR: csr.DER, Certificate: cert.Raw}); !admin.IsKind(err, admin.Conflict) || !strings.Contains(err.Error(), "reserved for a flashing bench: line1") {
		t.Error("a reserved id was enrolled:", err)
	}
	if err := r.api.CheckReserved(t.Context(), id); !admin.IsKind(err, admin.Conflict) {
		t.Error("a reserved id passes:", err)
	}
	_, _, _ = r.device("ABCD1234")
	for _, free := range []identity.ID{0xABCD1234, 0xABCD1235} {
		if err := r.api.CheckReserved(t.Context(), free); err != nil {
			t.Error(free, err)
		}
	}
	q, err := pki.NewRequest(r.srv.Layout().FleetID(), pki.KindDevice, id.String(), csr)
	r.ok(err)
	file, err := q.Encode()
	r.ok(err)
	if _, err := r.api.NewRequest(t.Context(), file); !admin.IsKind(err, admin.Conflict) {
		t.Error("a reserved id was asked for:", err)
	}
	again := admin.NewBlock{CSR: csr.DER, Count: 5, Expires: time.Now().Add(time.Hour)}
	if _, err := r.api.ReserveBlock(t.Context(), "line1", again); !admin.IsKind(err, admin.Conflict) || !strings.Contains(err.Error(), "registered with another key") {
		t.Error("another key got a block:", err)
	}
	for name, n := range map[string]admin.NewBlock{"no ids": {Count: 0, Expires: again.Expires}, "too many": {Count: 5001, Expires: again.Expires}, "past": {Count: 1, Expires: time.Now().Add(-time.Hour)}} {
		if _, err := r.api.ReserveBlock(t.Context(), "line1", n); !admin.IsKind(err, admin.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"Line1", "ABCD1234", "a_b"} {
		if _, err := r.api.ReserveBlock(t.Context(), name, again); !admin.IsKind(err, admin.Invalid) {
			t.Errorf("station %q: %v", name, err)
		}
	}
	if _, err := r.api.ReserveBlock(t.Context(), "line7", admin.NewBlock{Count: 1, Expires: again.Expires}); !admin.IsKind(err, admin.NotFound) {
		t.Error("a station without a key:", err)
	}
	// A block that was changed between reserving and signing is not taken.
	v, err := r.api.ReserveBlock(t.Context(), "line1", admin.NewBlock{Count: 5, Expires: again.Expires})
	r.ok(err)
	own, err := pki.ParseCSR(v.CSR)
	r.ok(err)
	o := &fleet.StationOrder{Station: "line1", CSR: own, Block: v.BlockID(), IDs: v.IDs[:4], Expires: v.Expires, Anchors: r.srv.Layout().AnchorChain()}
	var text []byte
	r.ca(func(ca *fleet.CA) (c *x509.Certificate, err error) {
		c, text, err = ca.SignStation(o, time.Now())
		return c, err
	})
	if err := r.api.BlockSigned(t.Context(), text); !admin.IsKind(err, admin.Conflict) {
		t.Error("a block of fewer ids was taken:", err)
	}
}

func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkImportJournal reads, verifies and takes in 5,000 units over the API, fsync
// included; the goal is 2,000 a second on two cores.
func BenchmarkImportJournal(b *testing.B) {
	const count = 5000
	dir := makeFleet(b)
	l, err := fleet.OpenLayout(dir)
	if err != nil {
		b.Fatal(err)
	}
	api, closeIt, err := Connect(b.Context(), dir)
	if err != nil {
		b.Fatal(err)
	}
	defer closeIt()
	used := time.Duration(0)
	for n := 0; b.Loop(); n++ {
		b.StopTimer()
		s := newStation(b, api, l, fmt.Sprintf("line%d", n), count)
		for i := range count {
			s.made(i)
		}
		b.StartTimer()
		before := cpuTime(b)
		if v, err := s.imports(); err != nil || v.Units != count {
			b.Fatal(v, err)
		}
		used += cpuTime(b) - before
	}
	// On a machine that others use too, this is what does not depend on them.
	b.ReportMetric(float64(used.Microseconds())/count/float64(b.N), "cpu-us/unit")
	b.ReportMetric(count*float64(b.N)/b.Elapsed().Seconds(), "units/s")
}

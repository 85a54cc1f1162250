package factory

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/internal/durable"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

func check(text []byte) (*Summary, error) { return ReadJournal(bytes.NewReader(text), Known{}, nil) }

func TestJournal(t *testing.T) {
	r := newRig(t)
	path := r.journal(t, 3)
	if err := CreateJournal(path, r.station.Signer, r.fleet, r.station.Cert, testNow()); !errors.Is(err, fs.ErrExist) {
		t.Error("a journal was overwritten:", err)
	}
	j := r.open(t, path)
	defer j.Close()
	if _, err := OpenJournal(path, r.station.Signer); !errors.Is(err, durable.ErrLocked) {
		t.Error(err)
	}
	if err := j.AppendBurnt(9, "the probe vanished: \"x\"\n", testNow()); err != nil {
		t.Fatal(err)
	}
	if err := j.AppendBlock(BlockID{1}, testNow()); err != nil || !j.HasBlock(BlockID{1}) || j.HasBlock(BlockID{2}) {
		t.Error("a block that is there is nothing new:", err)
	}
	if !j.Has(1) || !j.Has(9) || j.Has(8) {
		t.Error("it does not know its ids")
	}
	var got []string
	s, err := ReadJournal(bytes.NewReader(read(t, path)), Known{}, func(l *Line) error {
		got = append(got, fmt.Sprint(l.Number, l.What, l.ID, l.Unit != nil, l.When.Equal(testNow()), l.Reason))
		return nil
	})
	must(t, s, err)
	if want := "[1begin false true  2block false true  3unit00000001 true true  4unit00000002 true true  5unit00000003 true true  6burnt00000009 false true the probe vanished: ?x??]"; strings.ReplaceAll(fmt.Sprint(got), " ", "") != strings.ReplaceAll(want, " ", "") {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	if s.Fleet != r.fleet || s.Station != "line1" || s.Lines != 6 || s.Blocks != 1 || s.Units != 3 || s.Burnt != 1 || s.Torn != 0 || !s.Cert.Equal(r.station.Cert) {
		t.Errorf("%+v", s)
	}
	if _, err := OpenJournal(path+"x", r.station.Signer); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if _, err := os.Stat(path + "x"); err == nil {
		t.Error("a journal was made anew")
	}
}

// What the server would refuse is not recorded in the first place, and changes nothing.
func TestAppendRefuses(t *testing.T) {
	r := newRig(t)
	path := r.journal(t, 1)
	before := read(t, path)
	j := r.open(t, path)
	defer j.Close()
	other := r.newStation(t, "line1", newKey(t))
	first := r.unit(t, 7)
	if err := j.AppendUnit(first, testNow()); err != nil {
		t.Fatal(err)
	}
	before = read(t, path)
	for want, bend := range map[string]func(*NewUnit){
		"00000001 is in the journal already":                        func(u *NewUnit) { *u = r.unit(t, 1) },
		"has the key of 00000007":                                   func(u *NewUnit) { u.CSR, u.Cert = first.CSR, reissue(t, r.station, first.Cert, 8) },
		"block 02000000000000000000000000000000 was never taken in": func(u *NewUnit) { u.Block = BlockID{2} },
		"is for another key":                                        func(u *NewUnit) { u.CSR = first.CSR },
		"certificate is for 00000008":                               func(u *NewUnit) { u.ID = 9 },
		"no way to make a unit":                                     func(u *NewUnit) { u.How = "magic" },
		`class "Sensor"`:                                            func(u *NewUnit) { u.Class = "Sensor" },
		"00000000":                                                  func(u *NewUnit) { u.ID = 0 },
		`not signed by the station "line1"`:                         func(u *NewUnit) { u.Cert = reissue(t, other, u.Cert, 8) },
		"request of 0 bytes":                                        func(u *NewUnit) { u.CSR = nil },
		"request of 7000 bytes":                                     func(u *NewUnit) { u.CSR = make([]byte, 7000) },
	} {
		u := r.unit(t, 8)
		bend(&u)
		if err := j.AppendUnit(u, testNow()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if err := j.AppendBurnt(7, "x", testNow()); !errors.Is(err, ErrUsed) {
		t.Error("burnt a unit:", err)
	}
	if err := j.AppendBurnt(7, "", testNow()); err == nil {
		t.Error("burnt without a reason")
	}
	if !bytes.Equal(read(t, path), before) {
		t.Error("something that was refused was written")
	}
	if err := j.AppendUnit(r.unit(t, 8), testNow()); err != nil {
		t.Error("after the refusals:", err)
	}
}

// reissue certifies the key of c once more.
func reissue(t *testing.T, ca *pki.Issuer, c *x509.Certificate, id identity.ID) *x509.Certificate {
	t.Helper()
	out, err := pki.IssueDeviceLeaf(ca, id, c.PublicKey.(*ecdsa.PublicKey), testNow())
	return must(t, out, err)
}

func TestOpenWantsTheStationsKey(t *testing.T) {
	r := newRig(t)
	path := r.journal(t, 1)
	if _, err := OpenJournal(path, newKey(t)); err == nil || !strings.Contains(err.Error(), "not written with this key") {
		t.Error(err)
	}
	r.open(t, path).Close()
	if err := CreateJournal(path+"2", newKey(t), r.fleet, r.station.Cert, testNow()); !errors.Is(err, ErrJournal) {
		t.Error("made a journal that nobody could open:", err)
	}
}

// A new certificate, with the same key or another, is in force from the next line on.
func TestRenew(t *testing.T) {
	r := newRig(t)
	path := r.journal(t, 1)
	for _, key := range []*ecdsa.PrivateKey{fixedKey(t, 0x42), fixedKey(t, 0x52)} {
		j := r.open(t, path)
		next := r.newStation(t, "line1", key)
		if err := j.AppendRenew(next.Cert, newKey(t), testNow()); err == nil {
			t.Error("took a certificate for another key")
		}
		if err := j.AppendRenew(r.newStation(t, "line2", key).Cert, key, testNow()); !errors.Is(err, ErrJournal) {
			t.Error("became another station:", err)
		}
		if err := j.AppendRenew(next.Cert, key, testNow()); err != nil {
			t.Fatal(err)
		}
		old := r.station
		r.station = next
		id := identity.ID(key.D.Bytes()[0])
		if key.PublicKey.Equal(old.Cert.PublicKey) == false {
			u := r.unit(t, id)
			u.Cert = reissue(t, old, u.Cert, id)
			if err := j.AppendUnit(u, testNow()); err == nil {
				t.Error("the old certificate certifies after the new one")
			}
		}
		if err := errors.Join(j.AppendUnit(r.unit(t, id), testNow()), j.Close()); err != nil {
			t.Fatal(err)
		}
	}
	s, err := check(read(t, path))
	if must(t, s, err); s.Units != 3 || !s.Cert.Equal(r.station.Cert) {
		t.Errorf("%+v", s)
	}
}

// Every byte that is changed, and every line that is taken out, doubled or moved, is found by its line.
func TestJournalDamage(t *testing.T) {
	r := newRig(t)
	good := read(t, r.journal(t, 2))
	all := bytes.SplitAfter(good, []byte("\n"))[:4]
	for name, order := range map[string][]int{"no first line": {1, 2, 3}, "a line taken out": {0, 1, 3}, "a line twice": {0, 1, 1, 2, 3}, "lines swapped": {0, 2, 1, 3}, "two beginnings": {0, 0}, "nothing": {}} {
		var bad []byte
		for _, i := range order {
			bad = append(bad, all[i]...)
		}
		if _, err := check(bad); !errors.Is(err, ErrJournal) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for i := 0; i < len(good)-1; i++ {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		_, err := check(bad)
		var line *LineError
		if want := uint64(bytes.Count(good[:i], []byte("\n")) + 1); !errors.As(err, &line) || line.Line != want {
			t.Fatalf("byte %d (%q): %v, want line %d", i, good[i], err, want)
		}
	}
	path := filepath.Join(t.TempDir(), "j")
	if err := os.WriteFile(path, bytes.Replace(good, []byte("sensor-a"), []byte("sensor-b"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenJournal(path, r.station.Signer); !errors.Is(err, ErrJournal) {
		t.Error("the bench goes on with it:", err)
	}
	if _, err := check(append(bytes.Clone(good), bytes.Repeat([]byte("x"), maxLine+1)...)); err == nil || !strings.Contains(err.Error(), "line 5: ") {
		t.Error("a line of any length:", err)
	}
}

// forge appends a record that is signed and chained as it should be, whatever it says.
func (r *rig) forge(t testing.TB, journal []byte, bend func(*Record)) []byte {
	t.Helper()
	all := lines(journal)
	rec := Record{Prev: strings.Repeat("0", 64), Number: uint64(len(all) + 1), Time: "2026-07-01T12:00:00Z"}
	if len(all) > 0 {
		sum := sha256.Sum256(all[len(all)-1])
		rec.Prev = hex.EncodeToString(sum[:])
	}
	bend(&rec)
	unsigned, err := rec.encode()
	must(t, unsigned, err)
	digest := sha256.Sum256(append([]byte("hawser-journal-v1\n"), unsigned...))
	sig, err := ecdsa.SignASN1(rand.Reader, r.station.Signer.(*ecdsa.PrivateKey), digest[:])
	must(t, sig, err)
	line := append(unsigned[:len(unsigned)-1:len(unsigned)-1], fmt.Sprintf(`,"sig":"%x"}`+"\n", sig)...)
	return append(bytes.Clone(journal), line...)
}

func (r *rig) record(t testing.TB, id string, u NewUnit) func(*Record) {
	return func(rec *Record) {
		rec.What, rec.Block, rec.ID, rec.How, rec.CSR, rec.Cert = Made, BlockID{1}.String(), id, ByProbe, u.CSR, u.Cert.Raw
	}
}

// The bad units of a bench that is broken or not ours: the chain and the signatures hold,
// and each is refused by its line with what is wrong with it.
func TestBadUnits(t *testing.T) {
	r := newRig(t)
	good := read(t, r.journal(t, 1))
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	must(t, p384, err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, rsaKey, err)
	request := func(key any) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		return must(t, der, err)
	}
	u := r.unit(t, 0xABCD1234)
	if _, err := check(r.forge(t, good, r.record(t, "ABCD1234", u))); err != nil {
		t.Fatal("the good one:", err)
	}
	badSig := bytes.Clone(u.CSR)
	badSig[len(badSig)-1] ^= 1
	with := func(bend func(*NewUnit)) func(*Record) {
		v := u
		bend(&v)
		return r.record(t, "ABCD1234", v)
	}
	for want, bend := range map[string]func(*Record){
		"line 4: ABCD1234: certificate request is for another key than the one that was certified":               with(func(v *NewUnit) { v.CSR = request(newKey(t)) }),
		"line 4: ABCD1234: certificate request is signed with SHA256-RSA, not ECDSA-SHA256":                      with(func(v *NewUnit) { v.CSR = request(rsaKey) }),
		"line 4: ABCD1234: certificate request is signed with ECDSA-SHA384, not ECDSA-SHA256":                    with(func(v *NewUnit) { v.CSR = request(p384) }),
		"line 4: ABCD1234: certificate request does not prove possession of its key: wrong signature":            with(func(v *NewUnit) { v.CSR = badSig }),
		`line 4: the journal is damaged or was changed: id "abcd1234": ` + identity.ErrID.Error():                r.record(t, "abcd1234", u),
		"line 4: ABCD1235: certificate is for ABCD1234":                                                          r.record(t, "ABCD1235", u),
		`line 4: ABCD1234: certificate is not signed by the station "line1"`:                                     with(func(v *NewUnit) { v.Cert = reissue(t, r.newStation(t, "line1", newKey(t)), u.Cert, u.ID) }),
		"line 4: an id and a key are used once: 00000001 is in the journal already":                              r.record(t, "00000001", r.unit(t, 1)),
		"line 4: ABCD1234: block 09000000000000000000000000000000 was never taken in":                            func(rec *Record) { r.record(t, "ABCD1234", u)(rec); rec.Block = BlockID{9}.String() },
		"line 4: the journal is damaged or was changed: a unit record has fields that do not belong in it":       func(rec *Record) { r.record(t, "ABCD1234", u)(rec); rec.Reason = "x" },
		`line 4: the journal is damaged or was changed: "magic" is no kind of record`:                            func(rec *Record) { rec.What = "magic" },
		`line 4: the journal is damaged or was changed: time "2026-07-01T12:00:00+00:00" is not RFC 3339 in UTC`: func(rec *Record) { r.record(t, "ABCD1234", u)(rec); rec.Time = "2026-07-01T12:00:00+00:00" },
		`line 4: the journal is damaged or was changed: the journal of "line1" with a certificate of "line2"`:    func(rec *Record) { rec.What, rec.Cert = Renew, r.newStation(t, "line2", newKey(t)).Cert.Raw },
		"line 4: the journal is damaged or was changed: block 01000000000000000000000000000000 twice":            func(rec *Record) { rec.What, rec.Block = Load, BlockID{1}.String() },
	} {
		if _, err := check(r.forge(t, good, bend)); err == nil || err.Error() != want {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
}

// A unit that the station certified outside its own validity is refused, whenever it is looked at.
func TestUnitAfterTheStationsEnd(t *testing.T) {
	r := newRig(t)
	good := read(t, r.journal(t, 1))
	late := r.unit(t, 5)
	c := *late.Cert
	c.NotBefore = r.station.Cert.NotAfter.Add(time.Second)
	der, err := x509.CreateCertificate(rand.Reader, &c, r.station.Cert, c.PublicKey, r.station.Signer)
	must(t, der, err)
	late.Cert, err = x509.ParseCertificate(der)
	must(t, late.Cert, err)
	if _, err := check(r.forge(t, good, r.record(t, "00000005", late))); !errors.Is(err, pki.ErrStationDates) {
		t.Error(err)
	}
}

// A key that two units have is found, though the ids differ and each request is proper.
func TestOneKeyTwice(t *testing.T) {
	r := newRig(t)
	u := r.unit(t, 5)
	text := r.forge(t, read(t, r.journal(t, 1)), r.record(t, "00000005", u))
	u.Cert = reissue(t, r.station, u.Cert, 6)
	if _, err := check(r.forge(t, text, r.record(t, "00000006", u))); !errors.Is(err, ErrUsed) || !strings.Contains(err.Error(), "line 5: ") {
		t.Error(err)
	}
}

// Extensions in a request are no error; they are told.
func TestRequestWithExtensions(t *testing.T) {
	r := newRig(t)
	u := r.unit(t, 5)
	key := newKey(t)
	u.CSR, u.Cert = csr(t, key, x509.CertificateRequest{DNSNames: []string{"a.b"}}), nil
	c, err := pki.IssueDeviceLeaf(r.station, 5, &key.PublicKey, testNow())
	u.Cert = must(t, c, err)
	asks := ""
	_, err = ReadJournal(bytes.NewReader(r.forge(t, read(t, r.journal(t, 0)), r.record(t, "00000005", u))), Known{}, func(l *Line) error {
		if l.Unit != nil {
			asks = fmt.Sprint(l.Unit.CSR.Asks)
		}
		return nil
	})
	if err != nil || asks != "[2.5.29.17]" {
		t.Error(asks, err)
	}
}

// What was read before is held against its hash, and is not handed out again.
func TestContinuation(t *testing.T) {
	r := newRig(t)
	path := r.journal(t, 2)
	short := read(t, path)
	s, err := check(short)
	must(t, s, err)
	j := r.open(t, path)
	if err := errors.Join(j.AppendUnit(r.unit(t, 8), testNow()), j.Close()); err != nil {
		t.Fatal(err)
	}
	long := read(t, path)
	known := Known{s.Lines, s.Head}
	count := func(text []byte, known Known) (n int, err error) {
		_, err = ReadJournal(bytes.NewReader(text), known, func(*Line) error { n++; return nil })
		return n, err
	}
	for name, c := range map[string]struct {
		text []byte
		new  int
	}{"the same": {short, 0}, "a longer one": {long, 1}} {
		if n, err := count(c.text, known); err != nil || n != c.new {
			t.Errorf("%s: %d new lines, %v", name, n, err)
		}
	}
	cut := bytes.Join(lines(short)[:3], []byte("\n"))
	if _, err := count(append(cut, '\n'), known); !errors.Is(err, ErrFork) || !strings.Contains(err.Error(), "3 lines, and 4 were imported") {
		t.Error("a cut-off tail:", err)
	}
	fork := r.forge(t, append(cut, '\n'), r.record(t, "00000009", r.unit(t, 9)))
	if _, err := count(fork, known); !errors.Is(err, ErrFork) || !strings.Contains(err.Error(), "line 4: ") {
		t.Error("a fork:", err)
	}
	if _, err := count(read(t, r.journal(t, 9)), known); !errors.Is(err, ErrFork) {
		t.Error("another journal of the station:", err)
	}
}

// A line that was cut off was never acknowledged; the next one takes its place.
func TestTornLine(t *testing.T) {
	r := newRig(t)
	path := r.journal(t, 2)
	good := read(t, path)
	if err := os.WriteFile(path, append(bytes.Clone(good), `{"n":5,"pr`...), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := check(read(t, path))
	if must(t, s, err); s.Torn != 10 || s.Lines != 4 {
		t.Errorf("%+v", s)
	}
	j := r.open(t, path)
	if !bytes.Equal(read(t, path), good) {
		t.Error("the torn line is still there")
	}
	if err := errors.Join(j.AppendUnit(r.unit(t, 9), testNow()), j.Close()); err != nil {
		t.Fatal(err)
	}
	if s, err = check(read(t, path)); err != nil || s.Units != 3 {
		t.Error(s, err)
	}
}

// After a write that failed nobody knows what is on disk: nothing more is appended until the
// journal was read again, and then the unit is either there, whole, or not at all.
func TestFailedWrites(t *testing.T) {
	r := newRig(t)
	for name, c := range map[string]struct {
		keep func(n int) int // how many of the bytes get to the disk
		has  bool
	}{"not written": {func(int) int { return 0 }, false}, "half written": {func(n int) int { return n / 2 }, false},
		"all but the newline": {func(n int) int { return n - 1 }, false}, "written and not synced": {func(n int) int { return n }, true}} {
		path := r.journal(t, 1)
		j := r.open(t, path)
		broken := errors.New("input/output error")
		j.write = func(line []byte) error {
			_, err := j.f.Write(line[:c.keep(len(line))])
			return errors.Join(broken, err)
		}
		if err := j.AppendUnit(r.unit(t, 7), testNow()); !errors.Is(err, broken) {
			t.Errorf("%s: %v", name, err)
		}
		j.write = j.writeSync
		if err := j.AppendUnit(r.unit(t, 8), testNow()); !errors.Is(err, broken) || j.Has(7) || j.Has(8) {
			t.Errorf("%s: appended after a failed write: %v", name, err)
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		j = r.open(t, path)
		if j.Has(7) != c.has || j.Has(8) {
			t.Errorf("%s: 7 is there: %t", name, j.Has(7))
		}
		if err := errors.Join(j.AppendUnit(r.unit(t, 9), testNow()), j.Close()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if s, err := check(read(t, path)); err != nil || s.Torn != 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// No record holds anything but what PROTOCOL.md lists.
func TestJournalIsReadable(t *testing.T) {
	r := newRig(t)
	all := lines(read(t, r.journal(t, 1)))
	var m map[string]any
	if err := json.Unmarshal(all[2], &m); err != nil {
		t.Fatal(err)
	}
	for _, k := range strings.Fields("n prev time what block id class hardware how csr cert sig") {
		if m[k] == nil {
			t.Errorf("no %s in %s", k, all[2])
		}
		delete(m, k)
	}
	if len(m) > 0 {
		t.Errorf("what is %v", m)
	}
	if _, err := base64.StdEncoding.DecodeString("" + strings.Split(strings.SplitN(string(all[2]), `"csr":"`, 2)[1], `"`)[0]); err != nil {
		t.Error(err)
	}
}

func FuzzReadJournal(f *testing.F) {
	r := newRig(f)
	good := read(f, r.journal(f, 1))
	f.Add(good)
	f.Add(r.forge(f, good, func(rec *Record) { rec.What, rec.ID, rec.Reason = Burnt, "00000005", "x" }))
	f.Add([]byte(`{"n":1}` + "\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		n := uint64(0)
		s, err := ReadJournal(bytes.NewReader(text), Known{}, func(*Line) error { n++; return nil })
		if err == nil && n != s.Lines {
			t.Error(n, s.Lines)
		}
	})
}

// The parser of one line, without a chain and a signature in front of it.
func FuzzParseLine(f *testing.F) {
	r := newRig(f)
	for _, line := range lines(read(f, r.journal(f, 1))) {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		l, err := parseLine(text)
		if err != nil {
			return
		}
		if again, err := l.encode(); err != nil || !bytes.Equal(again, text) {
			t.Errorf("two spellings of one line: %v", err)
		}
	})
}

func BenchmarkReadJournal(b *testing.B) {
	r := newRig(b)
	text := read(b, r.journal(b, 2000))
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		if _, err := check(text); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(2000*float64(b.N)/b.Elapsed().Seconds(), "units/s")
}

package bench

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"hawser/internal/durable"
	"hawser/internal/factory"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// TestInit: what cannot be is refused, and nothing is left of it.
func TestInit(t *testing.T) {
	good := Settings{Station: "line1", Key: KeyFile, Trial: true, Probe: "gdb:127.0.0.1:1,identity=0x1000,trust=0x2000"}
	for want, change := range map[string]func(*Settings){
		"station":                  func(s *Settings) { s.Station = "Line 1" },
		"neither a file:":          func(s *Settings) { s.Key = "line1.key" },
		"debug server":             func(s *Settings) { s.Probe = "gdb:10.0.0.1:1,identity=0,trust=0x2000" },
		"does not say where":       func(s *Settings) { s.Probe = "gdb:127.0.0.1:1,identity=0" },
		"class":                    func(s *Settings) { s.Class = "Sensor A" },
		"an exec: probe cannot":    func(s *Settings) { s.Probe, s.Lock = "exec:identity=0x1000,trust=0x2000:true", "true" },
		"trial is for a key":       func(s *Settings) { s.Key = "pkcs11:token=x" },
		"the passphrase is empty":  func(s *Settings) { s.Trial = false },
		"as \"hawser factory load": func(s *Settings) { s.Fleet = "0a" },
	} {
		dir := filepath.Join(t.TempDir(), "bench")
		s := good
		change(&s)
		_, err := Init(dir, s, func() ([]byte, error) { return []byte{}, nil })
		wants(t, err, want)
		if _, err := os.Lstat(dir); err == nil {
			t.Errorf("%s: the directory is left", want)
		}
	}
	dir := filepath.Join(t.TempDir(), "bench")
	s := good
	s.Trial = false
	_, err := Init(dir, s, func() ([]byte, error) { return []byte("secret"), nil })
	fatal(t, err)
	text, err := os.ReadFile(filepath.Join(dir, "station.key"))
	if err != nil || !bytes.Contains(text, []byte("ENCRYPTED")) {
		t.Errorf("%v: %s", err, text)
	}
	_, err = Init(dir, good, nil)
	wants(t, err, "is not empty", "hint: ")
}

// TestLoadRefuses: a block that does not belong here changes nothing.
func TestLoadRefuses(t *testing.T) {
	r := newRig(t, nil)
	good := r.office.block(r.pub, 3, nil)
	before := tree(t, r.dir)
	other := newOffice(t)
	for want, file := range map[string][]byte{
		"not a block file":            good[:len(good)-1],
		"not signed by its device CA": flip(good, len(good)-1),
		"is for another key":          r.office.block(&newKey(t).PublicKey, 3, nil),
		`is for station "line2"`: r.office.block(r.pub, 3, func(l *factory.Block) {
			cert, err := pki.IssueStationCA(r.office.ca, "line2", r.pub, time.Now())
			fatal(t, err)
			l.Station, l.StationCert = "line2", cert
		}),
	} {
		_, err := Load(r.dir, file, "")
		wants(t, err, want)
	}
	for at := 7; at < len(good); at += 97 {
		_, err := Load(r.dir, flip(good, at), "")
		wants(t, err, "not a block file, or a damaged one")
	}
	_, err := Load(r.dir, good, strings.Repeat("00", 32))
	wants(t, err, "not from the one that was named")
	if after := tree(t, r.dir); after != before {
		t.Errorf("%s\nbefore:\n%s", after, before)
	}
	v, err := Load(r.dir, good, "")
	if err != nil || !v.First || v.Again {
		t.Errorf("%+v, %v", v, err)
	}
	v, err = Load(r.dir, good, "")
	if err != nil || v.First || !v.Again {
		t.Errorf("%+v, %v", v, err)
	}
	before = tree(t, r.dir)
	_, err = Load(r.dir, other.block(r.pub, 3, nil), "")
	wants(t, err, "another device CA", "hint: ")
	other.fleet, other.set = [16]byte{9}, nil
	other = newOfficeOf(t, [16]byte{9})
	_, err = Load(r.dir, other.block(r.pub, 3, nil), "")
	wants(t, err, "the block is of fleet 09")
	if after := tree(t, r.dir); after != before {
		t.Errorf("%s\nbefore:\n%s", after, before)
	}
	other = newOffice(t)
	file := other.block(r.pub, 3, func(l *factory.Block) { l.ID[0] = 7 })
	sum := pki.Fingerprint(other.ca.Cert.Raw)
	_, err = Load(r.dir, file, strings.ToUpper(hex.EncodeToString(sum[:])))
	fatal(t, err)
}

func newOfficeOf(t testing.TB, fleet [16]byte) *office {
	o := newOffice(t)
	o.fleet = fleet
	name := pki.Name{Organisation: "Acme", Country: "ZZ"}
	a, err := pki.IssueBrokerRoot(newKey(t), name, "A", time.Now())
	fatal(t, err)
	b, err := pki.IssueBrokerRoot(newKey(t), name, "B", time.Now())
	fatal(t, err)
	o.set, err = pki.SignAnchors(b.Signer, &pki.AnchorSet{Fleet: fleet, Sequence: 1, InUse: a.Cert, Standby: b.Cert, Port: 8883, Domains: []string{"localhost"}})
	fatal(t, err)
	return o
}

func flip(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 1
	return b
}

// tree is every file below dir with its content.
func tree(t testing.TB, dir string) string {
	t.Helper()
	var all []string
	fatal(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || d.Name() == fileLock {
			return err
		}
		text, err := os.ReadFile(path)
		all = append(all, path+"\n"+hex.EncodeToString(text))
		return err
	}))
	return strings.Join(all, "\n")
}

// TestOpenRefuses: what is missing, damaged or older than it was is named.
func TestOpenRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		harm  func(t *testing.T, r *rig, old []byte)
		words []string
	}{
		"no reserved file":      {func(t *testing.T, r *rig, _ []byte) { fatal(t, os.Remove(r.dir+"/reserved")) }, []string{"reserved is missing", "hint: "}},
		"damaged reserved file": {func(t *testing.T, r *rig, _ []byte) { fatal(t, os.WriteFile(r.dir+"/reserved", []byte("{"), 0o600)) }, []string{"reserved is damaged", "hint: "}},
		"no journal":            {func(t *testing.T, r *rig, _ []byte) { fatal(t, os.Remove(r.dir+"/line1.journal")) }, []string{"line1.journal is missing", "hint: "}},
		"an older journal": {func(t *testing.T, r *rig, old []byte) { fatal(t, os.WriteFile(r.dir+"/line1.journal", old, 0o600)) },
			[]string{"its end was cut off", "hint: "}},
		"a journal with another past": {func(t *testing.T, r *rig, old []byte) {
			path := r.dir + "/line1.journal"
			fatal(t, os.WriteFile(path, old, 0o600))
			key, err := pki.ReadKey(r.dir+"/station.key", nil)
			fatal(t, err)
			j, err := factory.OpenJournal(path, key)
			fatal(t, err)
			defer j.Close()
			for _, id := range []identity.ID{0xABCD0004, 0xABCD0005} {
				fatal(t, j.AppendBurnt(id, "another test", time.Now()))
			}
		}, []string{"this is not the line that was there", "hint: "}},
		"a changed journal": {func(t *testing.T, r *rig, _ []byte) {
			text, err := os.ReadFile(r.dir + "/line1.journal")
			fatal(t, err)
			fatal(t, os.WriteFile(r.dir+"/line1.journal", flip(text, len(text)/2), 0o600))
		}, []string{"line1.journal: line ", "the journal is damaged or was changed"}},
		"no block":         {func(t *testing.T, r *rig, _ []byte) { fatal(t, os.RemoveAll(r.dir+"/blocks")) }, []string{"blocks"}},
		"a block less":     {func(t *testing.T, r *rig, _ []byte) { fatal(t, os.Remove(glob(t, r.dir+"/blocks/*")[0])) }, []string{".block is missing", "hint: "}},
		"an open key file": {func(t *testing.T, r *rig, _ []byte) { fatal(t, os.Chmod(r.dir+"/station.key", 0o644)) }, []string{"readable by others", "hint: "}},
		"unknown settings": {func(t *testing.T, r *rig, _ []byte) { addLine(t, r.dir+"/bench.toml", "color = 1\n") }, []string{"bench.toml"}},
		"another's key": {func(t *testing.T, r *rig, _ []byte) {
			fatal(t, os.Remove(r.dir+"/station.key"))
			fatal(t, pki.WriteKey(r.dir+"/station.key", newKey(t), nil))
		}, []string{"not written with this key"}},
		"in use by another": {func(t *testing.T, r *rig, _ []byte) {
			l, err := durable.Lock(r.dir + "/lock")
			fatal(t, err)
			t.Cleanup(func() { l.Close() })
		}, []string{"another process uses this bench"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nil)
			r.load(5, nil)
			r.load(5, nil)
			b := r.open()
			old, err := os.ReadFile(b.JournalPath())
			fatal(t, err)
			for range 2 {
				id, _, err := b.reserve(time.Now())
				fatal(t, err)
				fatal(t, b.burn(id, "a test", time.Now()))
			}
			fatal(t, b.Close())
			c.harm(t, r, old)
			_, err = Open(r.dir, nil, time.Now())
			wants(t, err, c.words...)
		})
	}
	_, err := Open(t.TempDir(), nil, time.Now())
	wants(t, err, "is no bench directory", "hint: hawser factory init")
	_, err = Open(newRig(t, nil).dir, nil, time.Now())
	wants(t, err, "no block of ids is loaded", "hint: hawser factory load")
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	all, err := filepath.Glob(pattern)
	fatal(t, err)
	return all
}

func addLine(t *testing.T, path, line string) {
	t.Helper()
	text, err := os.ReadFile(path)
	fatal(t, err)
	fatal(t, os.WriteFile(path, append(text, line...), 0o600))
}

// TestLeftOpen: an id that was taken and came to no end is burnt at the next start, and
// never given out again.
func TestLeftOpen(t *testing.T) {
	r := newRig(t, nil)
	r.load(5, nil)
	b := r.open()
	id, _, err := b.reserve(time.Now())
	fatal(t, err)
	fatal(t, b.Close()) // as a loss of power would
	b = r.open()
	if !slices.Equal(b.Burnt, []identity.ID{id}) {
		t.Errorf("burnt: %v", b.Burnt)
	}
	again, _, err := b.reserve(time.Now())
	if err != nil || again == id {
		t.Errorf("%s again, %v", again, err)
	}
	if got := r.journal(); !slices.Equal(got, []string{"begin", "block", "burnt ABCD0001 the bench stopped in the middle of the unit"}) {
		t.Errorf("%q", got)
	}
}

// TestRenewed: a block with a newer certificate of the station brings it into force.
func TestRenewed(t *testing.T) {
	r := newRig(t, nil)
	r.load(1, func(l *factory.Block) {
		cert, err := pki.IssueStationCA(r.office.ca, "line1", r.pub, time.Now().AddDate(-2, 0, 0))
		fatal(t, err)
		l.StationCert = cert
	})
	fatal(t, r.open().Close())
	r.load(1, nil)
	b := r.open()
	if _, _, err := b.reserve(time.Now()); err != nil {
		t.Error(err)
	}
	if got := r.journal(); !slices.Equal(got, []string{"begin", "block", "block", "renew"}) {
		t.Errorf("%q", got)
	}
}

// csrOf makes a certificate request.
func csrOf(t *testing.T, key crypto.Signer, change func(*x509.CertificateRequest)) []byte {
	t.Helper()
	q := &x509.CertificateRequest{}
	if change != nil {
		change(q)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, q, key)
	fatal(t, err)
	return der
}

// TestEnrol: a unit's own key gets an id; the same request gets the same answer.
func TestEnrol(t *testing.T) {
	r := newRig(t, nil)
	r.load(5, nil)
	b := r.open()
	key := newKey(t)
	v, err := b.Enrol(pki.EncodeCSR(csrOf(t, key, nil)))
	fatal(t, err)
	cert, err := x509.ParseCertificate(v.Certificate)
	fatal(t, err)
	entries, _, err := factory.ParseTrust(v.Trust)
	fatal(t, err)
	if v.ID != 0xABCD0001 || v.Again || v.Ignored || !key.PublicKey.Equal(cert.PublicKey) || !bytes.Equal(factory.Value(entries, factory.TagCertificate), v.Certificate) || v.Count.Made != 1 {
		t.Errorf("%+v", v)
	}
	fatal(t, b.Close())
	b = r.open()
	again, err := b.Enrol(csrOf(t, key, nil))
	if err != nil || !again.Again || !bytes.Equal(again.Certificate, v.Certificate) || !bytes.Equal(again.Trust, v.Trust) {
		t.Errorf("%+v, %v", again, err)
	}
	if _, err := b.certify(0xABCD0005, b.blocks[0], csrOf(t, key, nil), factory.ByProbe); err == nil {
		t.Error("one key for two units")
	}
	more, err := b.Enrol(csrOf(t, newKey(t), func(q *x509.CertificateRequest) {
		q.Subject, q.DNSNames = pkix.Name{CommonName: "broker"}, []string{"mqtt.example.com"}
	}))
	fatal(t, err)
	cert, err = x509.ParseCertificate(more.Certificate)
	if err != nil || !more.Ignored || cert.Subject.CommonName != "ABCD0002" || len(cert.DNSNames) != 0 {
		t.Errorf("%+v, %v", more, err)
	}
	if got := r.journal(); !slices.Equal(got, []string{"begin", "block", "unit ABCD0001", "unit ABCD0002"}) {
		t.Errorf("%q", got)
	}
}

// TestEnrolRefuses: what is refused uses no id.
func TestEnrolRefuses(t *testing.T) {
	r := newRig(t, nil)
	r.load(5, nil)
	b := r.open()
	before := tree(t, r.dir)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	fatal(t, err)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	fatal(t, err)
	good := csrOf(t, newKey(t), nil)
	for want, q := range map[string][]byte{
		"not ECDSA-SHA256":      csrOf(t, rsaKey, nil),
		"P-256":                 csrOf(t, p384, func(q *x509.CertificateRequest) { q.SignatureAlgorithm = x509.ECDSAWithSHA256 }),
		"possession":            flip(good, len(good)-1),
		"parse":                 good[:len(good)-1],
		"not a certificate req": []byte("hello"),
	} {
		_, err := b.Enrol(q)
		wants(t, err, want, "no id was used")
	}
	if after := tree(t, r.dir); after != before {
		t.Error("the bench has changed")
	}
}

// TestReadRequest: a request is found in what a unit says at boot.
func TestReadRequest(t *testing.T) {
	want := pki.EncodeCSR(csrOf(t, newKey(t), nil))
	console := "boot v1.2\r\n-----BEGIN CERTIFICATE REQUEST-----\r\ncut off by a reset\r\nboot v1.2\r\n" + strings.ReplaceAll(string(want), "\n", "\r\n") + "> "
	got, err := ReadRequest(strings.NewReader(console))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%v: %s", err, got)
	}
	for text, words := range map[string]string{
		"boot\n": "ended before", strings.Repeat("x", 5000): "a line of more than",
		"-----BEGIN CERTIFICATE REQUEST-----\n" + strings.Repeat("AAAA\n", 4000): "more than 16384 bytes",
	} {
		_, err := ReadRequest(strings.NewReader(text))
		wants(t, err, words)
	}
}

// TestJournalThatCannotBeWritten: a unit whose record is not on disk is not called done,
// and the bench stops.
func TestJournalThatCannotBeWritten(t *testing.T) {
	r := newRig(t, nil)
	r.load(5, nil)
	b := r.open()
	fatal(t, b.journal.Close())
	_, err := b.Enrol(csrOf(t, newKey(t), nil))
	if err == nil || errors.Is(err, ErrStop) {
		t.Errorf("%v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"id":"ABCD1234","records":3,"head":"` + strings.Repeat("0a", 32) + `"}`))
	f.Add([]byte("station = \"line1\"\nkey = \"file:a\"\nprobe = \"gdb:127.0.0.1:1,identity=0,trust=0x1000\"\n"))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, err := parseReserved(data); err == nil && r.ID != 0 && (r.Records == 0 || !r.ID.Issuable()) {
			t.Fatalf("%+v", r)
		}
		if s, err := parseSettings(data); err == nil && s.check() != nil {
			t.Fatalf("%+v", s)
		}
		if text, err := ReadRequest(bytes.NewReader(data)); err == nil && len(text) > maxRequest+maxConsoleLine {
			t.Fatal(len(text))
		}
	})
}

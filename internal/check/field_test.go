package check

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// real is a broker of the world w as the standard library makes one: it answers whatever
// comes first with a CONNACK, and reads on.
func real(t *testing.T, w *World, auth tls.ClientAuthType) string {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{ClientAuth: auth,
		Certificates: []tls.Certificate{{Certificate: w.broker, PrivateKey: w.brokerKey}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go answerAll(c)
		}
	}()
	return l.Addr().String()
}

func answerAll(c net.Conn) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	buf := make([]byte, 1<<10)
	for first := true; ; first = false {
		if n, err := c.Read(buf); err != nil || n < 2 || buf[n-2] == 0xe0 {
			return
		}
		if first {
			if _, err := c.Write([]byte{0x20, 2, 0, 0}); err != nil {
				return
			}
		}
	}
}

// field runs cases against a client whose roots no key is at hand for.
func field(t *testing.T, auth tls.ClientAuthType, client string, ids ...string) map[string]Result {
	t.Helper()
	w, err := NewWorld("localhost")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "own")
	if err := w.Save(dir); err != nil {
		t.Fatal(err)
	}
	roots, err := LoadRoots(filepath.Join(dir, fileRoots))
	if err != nil {
		t.Fatal(err)
	}
	copied, err := OpenField(t.Context(), real(t, w, auth), "localhost", roots)
	if err != nil {
		t.Fatal(err)
	}
	if copied.brokerKey.Equal(w.brokerKey) || copied.rootA.key.Equal(w.rootA.key) {
		t.Fatal("a key of the real world is in the copy")
	}
	rep, err := Device(context.Background(), DeviceOptions{World: copied, Host: "localhost", Profile: General, Only: ids, Parallel: 4,
		Wait: 20 * time.Second, Step: 4 * time.Second, Patience: time.Second, Exec: strings.ReplaceAll(client, "DIR", dir)})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]Result{}
	for _, x := range rep.Results {
		got[x.ID] = x
		t.Logf("%-24s %-12s %s | %s", x.ID, x.Verdict, x.Why, x.EvidenceText())
	}
	return got
}

// TestField: a client that is right passes without a signature of its roots, by its
// reaction alone, and reaches the real broker through the relay afterwards.
func TestField(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("mosquitto_pub"); err != nil {
		t.Skip("mosquitto_pub is not installed: the field cases are not shown on it")
	}
	got := field(t, tls.RequestClientCert, "exec mosquitto_pub -h {host} -p {port} --cafile DIR/ca.crt --cert DIR/device.crt --key DIR/device.key -t t -m x",
		"X1", "X2", "H1", "H3.draft", "H3.sentinel", "H6", "H7.hello", "R7.rst-hello", "M7.cut")
	for id, x := range got {
		want := Pass
		switch id {
		case "H7.hello": // OpenSSL passes over what it does not know
			want = Fail
		case "M7.cut": // it does not stay
			want = NotApplicable
		}
		if x.Verdict != want {
			t.Errorf("%s: %s: %s", id, x.Verdict, x.Why)
		}
		if x.Recovers != nil && !*x.Recovers {
			t.Errorf("%s: it did not reach the real broker afterwards", id)
		}
	}
	if !strings.Contains(got["A1.relay"].Evidence.Note, "relayed") || !strings.Contains(got["A2.name"].Why, `"localhost"`) {
		t.Errorf("what the relay saw: %+v", got["A1.relay"])
	}
}

// TestFieldFindsTheCareless: a client that verifies nothing goes to the end with
// strangers, but not with somebody who cannot sign.
func TestFieldFindsTheCareless(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed: no careless client")
	}
	connect := `printf "\020\020\000\004MQTT\004\002\000\074\000\004test"`
	got := field(t, tls.RequestClientCert, connect+" | openssl s_client -quiet -connect localhost:{port} -servername {host} -cert DIR/device.crt -key DIR/device.key",
		"X1", "X2", "H1.bad")
	for id, x := range got {
		want := Fail
		if id == "X1.other-key" || id == "H1.bad" || strings.HasPrefix(id, "A") {
			want = Pass
		}
		if x.Verdict != want {
			t.Errorf("%s: %s, want %s: %s", id, x.Verdict, want, x.Why)
		}
	}
}

// TestFieldWhomTheRealBrokerRefuses: an alert under keys is no answer. Nothing else is
// judged of a client that does not reach its own broker.
func TestFieldWhomTheRealBrokerRefuses(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed: no client without a certificate")
	}
	got := field(t, tls.RequireAnyClientCert, "openssl s_client -quiet -connect localhost:{port} -servername {host}", "X1.unknown-ca")
	if got["A1.relay"].Verdict != Fail || got["X1.unknown-ca"].Verdict != Inconclusive {
		t.Errorf("%s: %s; %s", got["A1.relay"].Verdict, got["A1.relay"].Why, got["X1.unknown-ca"].Verdict)
	}
}

// TestFieldTakesNoKey: whatever file is named as the roots, a key in it is refused.
func TestFieldTakesNoKey(t *testing.T) {
	w, err := NewWorld("localhost")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "world")
	if err := w.Save(dir); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(dir, fileRootA))
	if err != nil {
		t.Fatal(err)
	}
	certs, err := os.ReadFile(filepath.Join(dir, fileRoots))
	if err != nil {
		t.Fatal(err)
	}
	both := filepath.Join(dir, "both")
	if err := os.WriteFile(both, append(certs, key...), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{both: "never a key", filepath.Join(dir, fileRootA): "never a key", filepath.Join(dir, fileDomain): "no certificate"} {
		if _, err := LoadRoots(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestFieldWantsTheRootsOfThisBroker: roots that have not signed what the real broker shows
// would make a twin of nobody.
func TestFieldWantsTheRootsOfThisBroker(t *testing.T) {
	w, err := NewWorld("localhost")
	if err != nil {
		t.Fatal(err)
	}
	other, err := x509.ParseCertificate(w.rootB.der)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenField(t.Context(), real(t, w, tls.NoClientCert), "localhost", []*x509.Certificate{other}); err == nil {
		t.Error("the standby root was taken for the signer")
	}
}

// TestFieldNeedsNoRootsKey: no field case asks for what only a real root's key could sign.
func TestFieldNeedsNoRootsKey(t *testing.T) {
	n := 0
	for _, c := range FieldCases() {
		n++
		for _, group := range []string{"X3", "X4", "X5", "X6", "X7", "X8", "X9", "X10", "X11", "X12", "H2", "C1"} {
			if c.Group() == group {
				t.Errorf("%s is a field case", c.ID)
			}
		}
	}
	if n < 55 {
		t.Errorf("%d field cases", n)
	}
}

// TestRecords: headers and bodies are told apart wherever TCP cuts.
func TestRecords(t *testing.T) {
	stream := append(header(22, 300), header(20, 1)...)
	stream = append(stream, header(23, 19)...)
	stream = append(stream, header(23, 0)...)
	stream = append(stream, header(21, 2)...)
	for size := 1; size <= len(stream); size++ {
		var r records
		var seen []string
		for b := range bytesOf(stream, size) {
			r.feed(b, func(kind byte, n int) { seen = append(seen, fmt.Sprint(kind, ":", n)) })
		}
		if s := strings.Join(seen, " "); s != "22:300 20:1 23:19 23:0 21:2" {
			t.Fatalf("cut at %d: %s", size, s)
		}
	}
}

func header(kind byte, n int) []byte {
	return append([]byte{kind, 3, 3, byte(n >> 8), byte(n)}, make([]byte, n)...)
}

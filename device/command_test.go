package device

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hawser/internal/message"
	"hawser/internal/mqtt"
)

func openStore(t testing.TB, dir string) *FileStore {
	t.Helper()
	store, err := OpenFileStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	return store
}

func writePEM(t testing.TB, path, kind string, ders ...[]byte) {
	t.Helper()
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
	}
	if err := os.WriteFile(path, out, 0o600); err != nil {
		t.Fatal(err)
	}
}

func writeCredentials(t testing.TB, dir string) {
	t.Helper()
	cert := deviceCertificate(t, testID)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, filepath.Join(dir, "device.crt"), "CERTIFICATE", cert.Certificate[0])
	writePEM(t, filepath.Join(dir, "device.key"), "PRIVATE KEY", key)
	writePEM(t, filepath.Join(dir, "ca.crt"), "CERTIFICATE", newAuthority(t, "a", nil).cert.Raw, newAuthority(t, "b", nil).cert.Raw)
}

// command sends one and gives the answer, and sees that the device acknowledges both.
func (p *peer) command(cmd message.Command, enc message.Encoding) message.Answer {
	p.t.Helper()
	p.say("d/cmd", 77, cmd.Encode(enc))
	a := p.answer()
	h, body := p.expect(mqtt.PUBACK)
	ack := mqtt.Ack{Type: mqtt.PUBACK}
	if err := ack.Decode(p.v, h.Flags, body); err != nil || ack.PacketID != 77 {
		p.t.Fatalf("PUBACK %+v, %v", ack, err)
	}
	return a
}

func (p *peer) answer() message.Answer {
	p.t.Helper()
	m := p.publish()
	if string(m.Topic) != "private/ABCD1234/u/cmd" || m.QoS != 1 {
		p.t.Fatalf("answer is %+v", m)
	}
	p.ack(m)
	a, err := message.DecodeAnswer(m.Payload)
	if err != nil {
		p.t.Fatal(err)
	}
	return a
}

func TestCommandRunsAtMostOnce(t *testing.T) {
	s := newServer(t)
	dir := filepath.Join(t.TempDir(), "state")
	var ran []uint64
	cfg := s.config(t)
	cfg.Command = func(_ context.Context, cmd Command) (Value, error) {
		onDisk, err := loadState(&FileStore{dir: dir})
		if err != nil || onDisk.cid != cmd.CID {
			t.Errorf("while command %d runs the disk says %d, %v", cmd.CID, onDisk.cid, err)
		}
		ran = append(ran, cmd.CID)
		return ValueOf(map[string]int{"n": len(ran)})
	}
	for boot := range 2 {
		store := openStore(t, dir)
		cfg.Store = store
		d, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		stop := run(t, d)
		p := s.peer()
		p.welcome(&mqtt.Connack{})
		for _, c := range []struct {
			cid  uint64
			want message.Status
		}{{10, message.OK}, {10, message.Duplicate}, {9, message.Duplicate}, {1<<32 | 1, message.OK}, {11, message.Duplicate}} {
			if boot == 1 {
				c.want = message.Duplicate
			}
			if a := p.command(message.Command{CID: c.cid, Name: "x"}, message.CBOR); a.Status != c.want || a.CID != c.cid {
				t.Errorf("boot %d, command %d: %v", boot, c.cid, a.Status)
			}
		}
		stop()
		store.Close()
	}
	if len(ran) != 2 || ran[0] != 10 || ran[1] != 1<<32|1 {
		t.Errorf("ran %v", ran)
	}
}

func TestCommandOutcomes(t *testing.T) {
	s := newServer(t)
	cfg := s.config(t)
	cfg.Command = func(_ context.Context, cmd Command) (Value, error) {
		switch cmd.Name {
		case "echo":
			return cmd.Args, nil
		case "fail":
			return nil, errors.New("no such\nrelay " + strings.Repeat("ü", 300))
		case "garbage":
			return Value{0xFF}, nil
		}
		return nil, ErrUnknownCommand
	}
	cfg.JSON = true
	start(t, cfg)
	p := s.peer()
	if hello := p.welcome(&mqtt.Connack{}); hello.Payload[0] != '{' {
		t.Fatalf("hello is %q", hello.Payload)
	}
	args, err := message.ValueFromJSON([]byte(`{"a":[1,2]}`))
	if err != nil {
		t.Fatal(err)
	}
	if a := p.command(message.Command{CID: 1, Name: "echo", Args: args}, message.JSON); a.Status != message.OK || string(a.Result.JSON()) != `{"a":[1,2]}` {
		t.Errorf("echo: %v %s", a.Status, a.Result.JSON())
	}
	if a := p.command(message.Command{CID: 2, Name: "echo"}, message.CBOR); a.Status != message.OK || a.Result != nil {
		t.Errorf("echo without args: %v %s", a.Status, a.Result.JSON())
	}
	a := p.command(message.Command{CID: 3, Name: "fail"}, message.CBOR)
	if text := string(a.Result.JSON()); a.Status != message.Failed || !strings.HasPrefix(text, `"no such relay ü`) || len(text) > message.MaxText+2 {
		t.Errorf("fail: %v %s", a.Status, text)
	}
	if a := p.command(message.Command{CID: 4, Name: "garbage"}, message.CBOR); a.Status != message.Failed {
		t.Errorf("garbage: %v", a.Status)
	}
	if a := p.command(message.Command{CID: 5, Name: "none"}, message.CBOR); a.Status != message.UnknownCommand {
		t.Errorf("none: %v", a.Status)
	}
	p.say("d/cmd", 0, []byte("no command at all")) // dropped, with the connection kept
	if a := p.command(message.Command{CID: 6, Name: "echo"}, message.CBOR); a.Status != message.OK {
		t.Errorf("after garbage: %v", a.Status)
	}
}

func TestCommandExpires(t *testing.T) {
	s := newServer(t)
	ran := make(chan string, 10)
	cfg := s.config(t)
	cfg.Command = func(_ context.Context, cmd Command) (Value, error) { ran <- cmd.Name; return nil, nil }
	start(t, cfg)
	p := s.peer()
	p.welcome(&mqtt.Connack{})
	now := uint64(time.Now().Unix())
	if a := p.command(message.Command{CID: 1, Expiry: 1, Name: "no clock yet"}, message.CBOR); a.Status != message.OK {
		t.Errorf("without a clock: %v", a.Status)
	}
	p.say("d/time", 0, message.Time{Seconds: now}.Encode(message.CBOR))
	for i, c := range []struct {
		expiry uint64
		want   message.Status
	}{{now - 1, message.Expired}, {now + 3600, message.OK}, {0, message.OK}} {
		if a := p.command(message.Command{CID: uint64(i) + 2, Expiry: c.expiry, Name: "x"}, message.CBOR); a.Status != c.want {
			t.Errorf("expiry %d at %d: %v", c.expiry, now, a.Status)
		}
	}
	if a := p.command(message.Command{CID: 2, Name: "x"}, message.CBOR); a.Status != message.Duplicate {
		t.Errorf("the expired one again: %v", a.Status)
	}
	if len(ran) != 3 {
		t.Errorf("%d handlers ran, want 3", len(ran))
	}
}

// TestNoCommandWithoutMemory: a number that cannot be stored is a command not run, not
// acknowledged and not answered.
func TestNoCommandWithoutMemory(t *testing.T) {
	s := newServer(t)
	dir := filepath.Join(t.TempDir(), "state")
	cfg := s.config(t)
	store := openStore(t, dir)
	defer store.Close()
	cfg.Store = store
	ran := make(chan uint64, 10)
	cfg.Command = func(_ context.Context, cmd Command) (Value, error) { ran <- cmd.CID; return nil, nil }
	start(t, cfg)
	p := s.peer()
	p.welcome(&mqtt.Connack{})
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	p.say("d/cmd", 1, message.Command{CID: 5, Name: "x"}.Encode(message.CBOR))
	for {
		h, _, err := p.packet()
		if err != nil {
			break
		}
		if h.Type == mqtt.PUBACK || h.Type == mqtt.PUBLISH {
			t.Fatalf("%v though nothing was stored", h.Type)
		}
	}
	if len(ran) != 0 {
		t.Fatal("the command ran")
	}
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	p = s.peer()
	p.welcome(&mqtt.Connack{})
	if a := p.command(message.Command{CID: 5, Name: "x"}, message.CBOR); a.Status != message.OK || len(ran) != 1 {
		t.Fatalf("with room again: %v, ran %d", a.Status, len(ran))
	}
}

func TestTimeCountsOnlyWithinTheLeaf(t *testing.T) {
	s := newServer(t)
	d := start(t, s.config(t))
	p := s.peer()
	p.welcome(&mqtt.Connack{})
	floor := d.floor()
	year := uint64(365 * 24 * 3600)
	now := uint64(time.Now().Unix())
	sync := func() { // the answer shows that all before it has been taken in
		p.command(message.Command{CID: d.state.cid + 1, Name: "x"}, message.CBOR)
	}
	for _, wrong := range []uint64{now - 50*year, now + 50*year, 0, 1<<64 - 1} {
		p.say("d/time", 0, message.Time{Seconds: wrong}.Encode(message.CBOR))
		sync()
		if got, ok := d.Time(); ok {
			t.Errorf("believes %v", got)
		}
	}
	p.say("d/time", 0, message.Time{Seconds: now + 1000, Millis: 5}.Encode(message.JSON))
	sync()
	got, ok := d.Time()
	if ahead := time.Until(got); !ok || ahead < 990*time.Second || ahead > 1001*time.Second {
		t.Errorf("time is %v, %v", got, ok)
	}
	if !d.floor().Equal(floor) {
		t.Errorf("the floor moved from %v to %v", floor, d.floor())
	}
}

func TestConfigurationIsAppliedOncePerVersion(t *testing.T) {
	s := newServer(t)
	cfg := s.config(t)
	applied := make(chan uint64, 10)
	cfg.Configure = func(_ context.Context, version uint64, doc Value) error {
		applied <- version
		var want struct {
			Interval int `cbor:"interval"`
		}
		if err := doc.Unmarshal(&want); err != nil || want.Interval < 5 {
			return errors.New("interval below 5")
		}
		return nil
	}
	start(t, cfg)
	p := s.peer()
	p.welcome(&mqtt.Connack{})
	for _, c := range []struct {
		version uint64
		doc     string
		want    message.ConfigStatus
		runs    bool
	}{{3, `{"interval":60}`, message.Applied, true}, {3, `{"interval":60}`, message.Applied, false}, {4, `{"interval":1}`, message.Refused, true}} {
		doc, err := message.ValueFromJSON([]byte(c.doc))
		if err != nil {
			t.Fatal(err)
		}
		old := message.Config{Version: 2, Document: doc}
		p.say("d/cfg", 0, message.Config{Version: c.version, Document: doc}.Encode(message.CBOR))
		m := p.publish()
		p.ack(m)
		r, err := message.DecodeConfigReport(m.Payload)
		if err != nil || string(m.Topic) != "private/ABCD1234/u/cfg" || !m.Retain || m.QoS != 1 || r.Version != c.version || r.Status != c.want {
			t.Errorf("report %+v in %+v, %v", r, m, err)
		}
		if got := len(applied); (got == 1) != c.runs {
			t.Errorf("version %d: handler ran %d times", c.version, got)
		}
		for len(applied) > 0 {
			<-applied
		}
		p.say("d/cfg", 0, old.Encode(message.CBOR)) // overtaken: no report
	}
}

func TestOtherDownlink(t *testing.T) {
	s := newServer(t)
	cfg := s.config(t)
	got := make(chan string, 1)
	cfg.Message = func(_ context.Context, topic string, payload []byte) { got <- topic + " " + string(payload) }
	start(t, cfg)
	p := s.peer()
	p.welcome(&mqtt.Connack{})
	p.say("d/app/light", 9, []byte("on"))
	if m := wait(t, got); m != "d/app/light on" {
		t.Fatal(m)
	}
	p.expect(mqtt.PUBACK)
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"hawser/internal/durable"
	"hawser/internal/factory/bench"
	"hawser/internal/pki"
)

// enrolOrder is what enrol-csr is told.
type enrolOrder struct {
	dir    string
	serial string
	baud   uint32
	out    string
	pass   passphrases
}

func (a *app) factoryEnrol() *cobra.Command {
	var o enrolOrder
	cmd := &cobra.Command{
		Use:   "enrol-csr [FILE]",
		Short: "certify a unit that made its own key",
		Long: `enrol-csr is for firmware that makes its key itself: no key is on the bench at all. The
unit sends a certificate request (PKCS#10, P-256), and gets an id, its certificate and the
trust region. Of the request only the public key and the proof that the unit has the key
are used. The journal tells of it as of any other unit, before the answer is given. A
request with a key that was enrolled before gets the same answer again.

The request comes from FILE (PEM or DER), or with --serial over a serial line: it is read
from the first line "-----BEGIN CERTIFICATE REQUEST-----" on, whatever was said before, and
the answer goes back as two PEM blocks, CERTIFICATE and HAWSER TRUST REGION (the bytes of
the region as the unit keeps them). --serial - is standard input and output.

Without --serial the answer goes to standard output, or with --out to the files ID.crt
(PEM) and ID.trust (bytes) in that directory.`,
		Example: `  hawser factory enrol-csr --dir bench unit.csr --out units
  hawser factory enrol-csr --dir bench --serial /dev/ttyUSB0 --baud 115200
  console | hawser factory enrol-csr --dir bench --serial -`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (len(args) == 1) == (o.serial != "") {
				return usagef(cmd, "where does the request come from? FILE or --serial DEVICE, one of them")
			}
			return a.enrolCSR(cmd.Context(), &o, strings.Join(args, ""))
		},
	}
	benchDir(cmd, &o.dir)
	f := cmd.Flags()
	f.StringVar(&o.serial, "serial", "", "device of a serial line, - for standard input and output")
	f.Uint32Var(&o.baud, "baud", 115200, "speed of the serial line; 8 data bits, no parity, 1 stop bit")
	f.StringVar(&o.out, "out", "", "directory for the answer (default: standard output)")
	o.pass.flag(cmd)
	return a.withJSON(cmd)
}

func (a *app) enrolCSR(ctx context.Context, o *enrolOrder, file string) error {
	b, err := a.openBench(o.dir, &o.pass)
	if err != nil {
		return err
	}
	v, err := a.enrolFrom(ctx, b, o, file)
	if err := errors.Join(err, b.Close()); err != nil {
		return err
	}
	if v.Ignored {
		a.note("the request names a subject or extensions: they are ignored, the certificate has what the fleet's profile says")
	}
	return a.sayEnrolled(o, v)
}

// enrolFrom gets the request, and with --serial sends the answer.
func (a *app) enrolFrom(ctx context.Context, b *bench.Bench, o *enrolOrder, file string) (*bench.Enrolled, error) {
	if o.serial == "" {
		request, err := readFile(file)
		if err != nil {
			return nil, err
		}
		return b.Enrol(request)
	}
	line, err := openLine(o.serial, o.baud)
	if err != nil {
		return nil, err
	}
	defer line.Close()
	stop := context.AfterFunc(ctx, func() { line.Close() })
	defer stop()
	done := a.busy(ctx, "waiting for a certificate request on %s", o.serial)
	request, err := bench.ReadRequest(line)
	done()
	if ctx.Err() != nil {
		return nil, errors.New("stopped before a request came: no id was used")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w: no id was used", o.serial, err)
	}
	v, err := b.Enrol(request)
	if err != nil {
		return nil, err
	}
	if _, err := line.Write(answerPEM(v)); err != nil {
		return nil, fmt.Errorf("%s is enrolled, but the answer did not reach the unit: %w\nhint: let the unit send its request again", v.ID, err)
	}
	return v, nil
}

// enrolledUnit is what enrol-csr says with --json.
type enrolledUnit struct {
	ID          string `json:"id"`
	Key         string `json:"key"`
	Certificate string `json:"certificate"` // PEM
	Trust       []byte `json:"trust"`       // base64
	Again       bool   `json:"again"`
	Ignored     bool   `json:"ignored"`
	Made        int    `json:"made"`
	Of          int    `json:"of"`
	Left        int    `json:"left"`
}

func (a *app) sayEnrolled(o *enrolOrder, v *bench.Enrolled) error {
	if o.out != "" {
		if err := writeEnrolled(o.out, v); err != nil {
			return fmt.Errorf("%s is enrolled, but its files were not written: %w\nhint: the same command again gives the same certificate", v.ID, err)
		}
	}
	c := v.Count
	line := enrolledUnit{v.ID.String(), v.Key, string(pki.EncodeCert(v.Certificate)), v.Trust, v.Again, v.Ignored, c.Made, c.Of, c.Left}
	if a.json && o.serial != "-" {
		return a.emit(line)
	}
	if o.out == "" && o.serial == "" {
		if _, err := a.out.Write(answerPEM(v)); err != nil {
			return err
		}
	}
	again := ""
	if v.Again {
		again = " (as before)"
	}
	a.note("%s is enrolled%s  %d of %d, %d ids left", v.ID, again, c.Made, c.Of, c.Left)
	return nil
}

func writeEnrolled(dir string, v *bench.Enrolled) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	name := filepath.Join(dir, v.ID.String())
	if err := durable.WriteFile(name+".crt", pki.EncodeCert(v.Certificate), 0o644); err != nil {
		return err
	}
	return durable.WriteFile(name+".trust", v.Trust, 0o644)
}

func answerPEM(v *bench.Enrolled) []byte {
	return append(pki.EncodeCert(v.Certificate), bench.EncodeTrustPEM(v.Trust)...)
}

// line is a serial line, or standard input and output.
type line struct {
	io.Reader
	io.Writer
	io.Closer
}

func openLine(name string, baud uint32) (*line, error) {
	if name == "-" {
		return &line{os.Stdin, os.Stdout, os.Stdin}, nil
	}
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := rawLine(f, baud); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), f.Close())
	}
	return &line{f, f, f}, nil
}

// rawLine sets 8N1 without echo, translation or flow control.
func rawLine(f *os.File, baud uint32) error {
	speed, ok := map[uint32]uint32{9600: unix.B9600, 19200: unix.B19200, 38400: unix.B38400, 57600: unix.B57600, 115200: unix.B115200,
		230400: unix.B230400, 460800: unix.B460800, 921600: unix.B921600, 1000000: unix.B1000000}[baud]
	if !ok {
		return fmt.Errorf("a speed of %d is not one that serial lines have", baud)
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = conn.Control(func(fd uintptr) {
		t, err := unix.IoctlGetTermios(int(fd), unix.TCGETS)
		if err != nil {
			inner = fmt.Errorf("not a serial line: %w", err)
			return
		}
		t.Iflag, t.Oflag, t.Lflag = unix.IGNBRK, 0, 0
		t.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | speed
		t.Ispeed, t.Ospeed = speed, speed
		t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
		inner = unix.IoctlSetTermios(int(fd), unix.TCSETS, t)
	})
	return errors.Join(err, inner)
}

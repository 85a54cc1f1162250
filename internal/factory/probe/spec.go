package probe

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Spec says how units are reached and where in them identity block and trust region go:
//
//	gdb:127.0.0.1:3333,identity=0x10001080,trust=0x10002000
//	exec:COMMAND
//	exec:identity=0x10001080,trust=0x10002000:COMMAND
//
// Numbers are decimal or hexadecimal with 0x. A command may hold commas and colons, so its
// options stand before it and end in a colon; they are options only at the very beginning
// and without a space, so a command that itself begins with "identity=" takes a space before.
// Either address may be left out and be given some other way: the caller sees which are there.
type Spec struct {
	Kind        string // "gdb" or "exec"
	Server      string // gdb: loopback address and port
	Command     string // exec: for /bin/sh -c
	Identity    uint32
	Trust       uint32
	HasIdentity bool
	HasTrust    bool

	// Buffer is where packets and HEX are made, best locked memory of BufferSize bytes. It must
	// not be used by anybody else until Close. nil: the heap, for what is no secret.
	Buffer []byte
	// Timeout is how long one answer may take, 5 s unless set; FlashTimeout the same for what
	// erases and programs flash, and for the whole run of an exec command: 60 s unless set.
	Timeout, FlashTimeout time.Duration
}

// maxSpec bounds a specification: a command line with some paths.
const maxSpec = 4096

// identitySize is the identity block's, which nothing else may overlap.
const identitySize = 128

const specHint = "\nhint: gdb:127.0.0.1:PORT,identity=ADDRESS,trust=ADDRESS or exec:identity=ADDRESS,trust=ADDRESS:COMMAND"

// Parse reads a specification.
func Parse(text string) (Spec, error) {
	s, err := parse(text)
	if err != nil {
		return Spec{}, fmt.Errorf("probe %.100q: %w%s", text, err, specHint)
	}
	return s, nil
}

func parse(text string) (s Spec, err error) {
	kind, rest, ok := strings.Cut(text, ":")
	switch {
	case len(text) > maxSpec:
		return s, fmt.Errorf("longer than %d bytes", maxSpec)
	case strings.ContainsAny(text, "\x00\n\r"):
		return s, errors.New("has a zero byte or a line end in it")
	case !ok || kind != "gdb" && kind != "exec":
		return s, errors.New("begins neither with gdb: nor with exec:")
	}
	s.Kind = kind
	if kind == "exec" {
		err = s.parseExec(rest)
	} else {
		err = s.parseGDB(rest)
	}
	if err == nil {
		err = s.check()
	}
	return s, err
}

func (s *Spec) parseGDB(rest string) error {
	server, options, has := strings.Cut(rest, ",")
	addr, err := loopback(server)
	if err != nil {
		return err
	}
	s.Server = addr.String()
	if !has {
		return nil
	}
	return s.options(options)
}

func (s *Spec) parseExec(rest string) error {
	s.Command = rest
	if strings.HasPrefix(rest, "identity=") || strings.HasPrefix(rest, "trust=") {
		options, command, ok := strings.Cut(rest, ":")
		if !ok {
			return errors.New("no colon between the addresses and the command")
		}
		s.Command = command
		if err := s.options(options); err != nil {
			return err
		}
	}
	if strings.TrimSpace(s.Command) == "" {
		return errors.New("no command")
	}
	return nil
}

func (s *Spec) options(text string) error {
	for _, o := range strings.Split(text, ",") {
		name, value, _ := strings.Cut(o, "=")
		at, has := &s.Identity, &s.HasIdentity
		switch name {
		case "identity":
		case "trust":
			at, has = &s.Trust, &s.HasTrust
		default:
			return fmt.Errorf("unknown option %.40q", name)
		}
		n, err := number(value)
		if err != nil {
			return fmt.Errorf("%s is no address of 32 bits", name)
		}
		if *has {
			return fmt.Errorf("%s is given twice", name)
		}
		*at, *has = n, true
	}
	return nil
}

// number takes decimal digits, or 0x and hexadecimal ones: no sign, no underscore, no octal.
func number(text string) (uint32, error) {
	digits, base := text, 10
	if hex, ok := strings.CutPrefix(text, "0x"); ok {
		digits, base = hex, 16
	} else if len(text) > 1 && text[0] == '0' {
		return 0, errors.New("leading zero")
	}
	n, err := strconv.ParseUint(digits, base, 32)
	return uint32(n), err
}

// check demands of the two addresses what holds wherever they come from.
func (s *Spec) check() error {
	end := uint64(s.Identity) + identitySize
	switch {
	case s.HasIdentity && end > 1<<32:
		return errors.New("the identity block goes past the end of memory")
	case s.HasIdentity && s.HasTrust && s.Trust >= s.Identity && uint64(s.Trust) < end:
		return errors.New("the trust region lies in the identity block")
	}
	return nil
}

// loopback takes an address of this machine only: the key goes over the socket in clear.
// "localhost" is taken as 127.0.0.1 and never asked of a resolver, which might say otherwise.
func loopback(server string) (netip.AddrPort, error) {
	if port, ok := strings.CutPrefix(server, "localhost:"); ok {
		server = "127.0.0.1:" + port
	}
	addr, err := netip.ParseAddrPort(server)
	switch {
	case err != nil || addr.Addr().Zone() != "":
		return addr, errors.New("the debug server is not given as a loopback address and a port, like 127.0.0.1:3333")
	case !addr.Addr().IsLoopback():
		return addr, errors.New("the debug server is on another machine: the unit's key would cross the network in clear")
	case addr.Port() == 0:
		return addr, errors.New("port 0 is none")
	}
	return addr, nil
}

// String gives the specification in a form that Parse reads.
func (s Spec) String() string {
	var options []string
	if s.HasIdentity {
		options = append(options, fmt.Sprintf("identity=%#x", s.Identity))
	}
	if s.HasTrust {
		options = append(options, fmt.Sprintf("trust=%#x", s.Trust))
	}
	text := strings.Join(options, ",")
	switch {
	case s.Kind == "exec" && text != "":
		return "exec:" + text + ":" + s.Command
	case s.Kind == "exec":
		return "exec:" + s.Command
	case text != "":
		return "gdb:" + s.Server + "," + text
	}
	return "gdb:" + s.Server
}

// Open makes the probe. It connects to nothing yet: Wait does.
func (s Spec) Open(ctx context.Context) (Probe, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if s.Buffer == nil {
		s.Buffer = make([]byte, BufferSize)
	}
	if len(s.Buffer) < MinBuffer {
		return nil, fmt.Errorf("probe: a buffer of %d bytes, at least %d are needed", len(s.Buffer), MinBuffer)
	}
	if s.Timeout <= 0 {
		s.Timeout = 5 * time.Second
	}
	if s.FlashTimeout <= 0 {
		s.FlashTimeout = time.Minute
	}
	switch s.Kind {
	case "gdb":
		addr, err := loopback(s.Server)
		if err != nil {
			return nil, fmt.Errorf("probe gdb: %w", err)
		}
		return newGDB(addr, s), nil
	case "exec":
		return &Exec{spec: s}, nil
	}
	return nil, fmt.Errorf("probe: unknown kind %q", s.Kind)
}

package main

// All text to users comes through this file and keeps these rules:
//   - lower case, no full stop at the end of a line that stands alone;
//   - an error says what happened, what is lost if anything is, and ends in a
//     line "hint: " with the next command where there is one;
//   - what a command is asked for goes to standard output, all else to standard
//     error;
//   - --json prints one object per line and nothing else;
//   - bytes from outside (topics, payloads, names) never reach a terminal raw.

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"hawser/internal/admin"
)

// exitError is an error with an exit code of its own. err may be nil: the
// command has said all there is to say.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// exit ends a command with a code and no further words.
func exit(code int) error { return &exitError{code: code} }

// usage makes err wrong use of cmd.
func usage(cmd *cobra.Command, err error) error {
	text := err.Error()
	if !strings.Contains(text, "\nhint:") {
		text += "\nhint: " + cmd.CommandPath() + " --help"
	}
	return &exitError{admin.ExitUsage, errors.New(text)}
}

// usagef is wrong use that the command found itself.
func usagef(cmd *cobra.Command, format string, args ...any) error {
	return usage(cmd, fmt.Errorf(format, args...))
}

func exitCode(err error) int {
	var e *exitError
	if errors.As(err, &e) {
		return e.code
	}
	return admin.ExitCode(err)
}

// fail tells the user of an error.
func (a *app) fail(err error) {
	if text := err.Error(); text != "" {
		fmt.Fprintf(a.err, "hawser: %s\n", printable(text))
	}
}

// say prints a line of what was asked for.
func (a *app) say(format string, args ...any) {
	fmt.Fprintf(a.out, format+"\n", args...)
}

// note prints a line beside it.
func (a *app) note(format string, args ...any) {
	fmt.Fprintf(a.err, "hawser: "+format+"\n", args...)
}

// emit prints v as one line of JSON.
func (a *app) emit(v any) error {
	enc := json.NewEncoder(a.out)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// emitAll prints each of list with --json, else calls text.
func emitAll[T any](a *app, list []T, text func()) error {
	if !a.json {
		text()
		return nil
	}
	for i := range list {
		if err := a.emit(&list[i]); err != nil {
			return err
		}
	}
	return nil
}

// emitOne is emitAll for one thing.
func emitOne[T any](a *app, v T, text func()) error { return emitAll(a, []T{v}, text) }

// table prints aligned columns. Cells are made printable.
func (a *app) table(head []string, rows [][]string) {
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	for _, r := range append([][]string{head}, rows...) {
		for i, cell := range r {
			if i > 0 {
				fmt.Fprint(w, "\t")
			}
			fmt.Fprint(w, strings.ReplaceAll(printable(cell), "\t", " "))
		}
		fmt.Fprintln(w)
	}
	w.Flush()
}

// fields prints name and value pairs, one per line; pairs without a value are left out.
func (a *app) fields(pairs ...string) {
	w := tabwriter.NewWriter(a.out, 13, 0, 2, ' ', 0)
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			fmt.Fprintf(w, "%s\t%s\n", pairs[i], printable(pairs[i+1]))
		}
	}
	w.Flush()
}

// printable takes out of s what could steer a terminal: line feeds stay, all
// else that does not print becomes an escape.
func printable(s string) string {
	clean := func(r rune) bool { return r == '\n' || r == '\t' || unicode.IsPrint(r) && r != unicode.ReplacementChar }
	if strings.IndexFunc(s, func(r rune) bool { return !clean(r) }) < 0 {
		return s
	}
	var b strings.Builder
	for i, r := range s {
		switch {
		case clean(r):
			b.WriteRune(r)
		case r == unicode.ReplacementChar:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		default:
			q := strconv.QuoteRune(r)
			b.WriteString(q[1 : len(q)-1])
		}
	}
	return b.String()
}

func quote(s string) string { return strconv.Quote(s) }

// ago is a time as people read it, "-" for never.
func ago(t, now time.Time) string {
	if t.IsZero() {
		return "-"
	}
	switch d := now.Sub(t); {
	case d < 0:
		return t.UTC().Format("2006-01-02 15:04")
	case d < time.Minute:
		return fmt.Sprintf("%d s ago", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(d.Hours()))
	default:
		return fmt.Sprintf("%d d ago", int(d.Hours()/24))
	}
}

// stamp is a time for people, to the second, "" for never.
func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02 15:04:05Z")
}

// bytesText is a size for people.
func bytesText(n uint64) string {
	const kib = 1024
	if n < kib {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n)/kib, "KiB"
	for _, u := range []string{"MiB", "GiB", "TiB"} {
		if v < kib {
			break
		}
		v, unit = v/kib, u
	}
	return fmt.Sprintf("%.1f %s", v, unit)
}

// span reads a duration as the commands take it: Go's, or whole days ("30d").
func span(s string) (time.Duration, error) {
	if n, ok := strings.CutSuffix(s, "d"); ok {
		if days, err := strconv.ParseUint(n, 10, 16); err == nil {
			return time.Duration(days) * 24 * time.Hour, nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is not a duration like 90s, 1h30m or 7d", s)
	}
	return d, nil
}

// terminal reports whether f is one.
func terminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// passphrases reads passphrases from a descriptor, one line each, or asks for
// them on the terminal.
type passphrases struct {
	fd    int // -1: ask
	lines *bufio.Reader
}

// flag gives a command --passphrase-fd.
func (p *passphrases) flag(cmd *cobra.Command) {
	cmd.Flags().IntVar(&p.fd, "passphrase-fd", -1, "read passphrases from this descriptor, one line each, in place of asking")
}

// prepare lets copies of p read the same lines.
func (p *passphrases) prepare() {
	if f := os.NewFile(uintptr(p.fd), "passphrase-fd"); p.fd >= 0 && p.lines == nil && f != nil {
		p.lines = bufio.NewReader(f)
	}
}

// known asks for a passphrase that exists.
func (p *passphrases) known(label string) ([]byte, error) {
	return p.read("passphrase for "+label, false)
}

// fresh asks for a new one; a person has to type it twice.
func (p *passphrases) fresh(label string) ([]byte, error) {
	return p.read("passphrase for "+label, true)
}

// pin asks for the PIN of a token, once: the token counts wrong ones.
func (p *passphrases) pin(token string) ([]byte, error) {
	return p.read("PIN of the token "+printable(token), false)
}

func (p *passphrases) read(what string, twice bool) ([]byte, error) {
	if p.fd >= 0 {
		return p.line(what)
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, errors.New("there is no terminal to ask on\nhint: --passphrase-fd N")
	}
	defer tty.Close()
	first, err := ask(tty, what+": ")
	if err != nil || !twice {
		return first, err
	}
	second, err := ask(tty, "the same again: ")
	if err == nil && string(first) != string(second) {
		err = errors.New("the two are not the same")
	}
	return first, err
}

func ask(tty *os.File, prompt string) ([]byte, error) {
	fmt.Fprint(tty, prompt)
	defer fmt.Fprintln(tty)
	return term.ReadPassword(int(tty.Fd()))
}

// line reads the next line of the descriptor.
func (p *passphrases) line(what string) ([]byte, error) {
	if p.lines == nil {
		f := os.NewFile(uintptr(p.fd), "passphrase-fd")
		if f == nil {
			return nil, fmt.Errorf("there is no descriptor %d", p.fd)
		}
		p.lines = bufio.NewReader(f)
	}
	text, err := p.lines.ReadBytes('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("descriptor %d: %w", p.fd, err)
	}
	if len(text) == 0 {
		return nil, fmt.Errorf("descriptor %d ended before the %s", p.fd, what)
	}
	if n := len(text); text[n-1] == '\n' {
		text = text[:n-1]
	}
	return text, nil
}

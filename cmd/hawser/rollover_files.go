package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"hawser/internal/admin"
	"hawser/internal/durable"
	"hawser/internal/fleet"
	"hawser/internal/identity"
	"hawser/internal/pki"
)

// waiting is what is said of a request of a rollover with --json.
type waiting struct {
	Request string `json:"request"` // path of the file
	CA      string `json:"ca"`      // directory that answers it
}

func (a *app) sayWaiting(path, ca, more string) error {
	base := filepath.Base(path)
	return emitOne(a, waiting{path, ca}, func() {
		a.say("the rollover waits for a signature")
		a.say("  request         %s", path)
		a.say("  at the safe:    hawser ca sign %s --ca %s%s", base, ca, more)
		a.say("  on the server:  hawser ca import %s --dir %s", resultName(base), shellWord(a.dir))
	})
}

// resultName is where sign puts the result of a request.
func resultName(request string) string {
	ext := filepath.Ext(request)
	if ext != ".json" && ext != ".jsonl" {
		ext = ".json"
		return request + ".result" + ext
	}
	return strings.TrimSuffix(request, ext) + ".result" + ext
}

func generationRequest(l *fleet.Layout, r *admin.Rollover) string {
	return filepath.Join(l.RequestsDir(), fmt.Sprintf("rollover-%d.jsonl", r.No))
}

func rootsRequest(l *fleet.Layout, sequence uint64) string {
	return filepath.Join(l.RequestsDir(), fmt.Sprintf("roots-%d.json", sequence))
}

// askGeneration writes the request for all certificates that are missing. One that waits
// already stays: its answer may be on its way.
func (a *app) askGeneration(ctx context.Context, c *admin.Client, l *fleet.Layout, r *admin.Rollover) (waits bool, err error) {
	path := generationRequest(l, r)
	if _, err := os.Stat(path); err == nil {
		return true, a.sayWaiting(path, "ca-a", "")
	}
	if r.State != "planned" && r.Unsigned == 0 {
		return false, nil
	}
	defer a.busy(ctx, "writing %d certificate requests", r.Unsigned)()
	tmp, err := os.CreateTemp(l.RequestsDir(), ".rollover-*")
	if err != nil {
		return false, err
	}
	defer os.Remove(tmp.Name()) // after the rename there is nothing left of that name
	err = writeRequests(ctx, c, l, r, tmp)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return false, err
	}
	if err := errors.Join(os.Rename(tmp.Name(), path), durable.SyncDir(l.RequestsDir())); err != nil {
		return false, err
	}
	return true, a.sayWaiting(path, "ca-a", "")
}

func writeRequests(ctx context.Context, c *admin.Client, l *fleet.Layout, r *admin.Rollover, out io.Writer) error {
	var nonce [16]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return err
	}
	w, err := fleet.NewBulkRequest(out, l.FleetID(), r.No, r.ToGeneration, nonce)
	if err != nil {
		return err
	}
	for after := identity.ID(0); ; {
		list, err := c.Unsigned(ctx, after, signPart)
		if err != nil {
			return err
		}
		if len(list) == 0 {
			return w.End()
		}
		for _, u := range list {
			after = u.ID
			if err := w.Add(&fleet.BulkLine{ID: u.ID, CSR: u.CSR, Certificate: u.Certificate}); err != nil {
				return err
			}
		}
	}
}

// askRoots writes the request for the next set and the leaves that go with it.
func (a *app) askRoots(l *fleet.Layout, r *admin.Rollover) error {
	path := rootsRequest(l, r.ToAnchors)
	_, set, err := l.Anchors()
	if err != nil {
		return err
	}
	next, err := pki.NextRootLabel(pki.RootLabel(set.Standby))
	if err != nil {
		return err
	}
	ca, more := "ca-"+strings.ToLower(pki.RootLabel(set.Standby)), " --new-root ca-"+strings.ToLower(next)
	if _, err := os.Stat(path); err == nil {
		return a.sayWaiting(path, ca, more)
	}
	domains, err := l.NextLeaves(r.OldestAnchors)
	if err != nil {
		return err
	}
	leaves := []fleet.LeafCSR{}
	for _, d := range domains {
		key, err := l.NewBrokerKey(d)
		if err != nil {
			return err
		}
		csr, err := requestFor(key, d)
		if err != nil {
			return err
		}
		leaves = append(leaves, fleet.LeafCSR{Domain: d, CSR: string(pki.EncodeCSR(csr.DER))})
	}
	q, err := l.NewRootsRequest(r.ToAnchors, leaves)
	if err != nil {
		return err
	}
	file, err := q.Encode()
	if err != nil {
		return err
	}
	if err := durable.CreateFile(path, file, 0o600); err != nil {
		return err
	}
	return a.sayWaiting(path, ca, more)
}

// safeSign is what sign is told beside the CA.
type safeSign struct {
	key     string
	newRoot string
}

// kindOf looks at the first bytes of a file; standard input is never one of a rollover.
func kindOf(name string) (fleet.FileKind, error) {
	if name == "-" {
		return fleet.FilePlain, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	head := make([]byte, 200)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return 0, err
	}
	return fleet.KindOfFile(head[:n]), nil
}

func (a *app) signAny(name, out string, s *signer, more *safeSign) error {
	if out == "" {
		out = resultName(name)
	}
	kind, err := kindOf(name)
	if err != nil {
		return err
	}
	switch kind {
	case fleet.FileBulkRequest:
		return a.signBulk(name, out, s, more)
	case fleet.FileRootsRequest:
		return a.signRoots(name, out, s, more)
	}
	return a.signRequest(name, out, s)
}

func mustNotBe(out string) error {
	if _, err := os.Lstat(out); err == nil {
		return fmt.Errorf("%s exists already: it is not written over, and nothing was signed\nhint: --out FILE", out)
	}
	return nil
}

func (a *app) signBulk(name, out string, s *signer, more *safeSign) error {
	if err := mustNotBe(out); err != nil {
		return err
	}
	ca, err := a.openCA(s)
	if err != nil {
		return err
	}
	p := &progress{app: a, live: terminal(a.err)}
	next := time.Now().Add(quietFor)
	sum, err := ca.SignBulk(name, out, more.key, time.Now(), func(done int) {
		if time.Now().After(next) {
			next = time.Now().Add(p.every())
			p.show("%d devices answered", done)
		}
	})
	p.end()
	if err := errors.Join(err, ca.Close()); err != nil {
		return err
	}
	v := struct {
		Result string `json:"result"`
		*fleet.SignedBulk
	}{out, sum}
	return emitOne(a, v, func() {
		for _, d := range sum.Refused {
			a.say("%s %s", d.ID, d.Refused)
		}
		a.say("signed: %s, %d certificates, %d refused", out, sum.Signed+sum.Before, len(sum.Refused))
		a.say("  on the server:  hawser ca import %s", filepath.Base(out))
	})
}

func (a *app) signRoots(name, out string, s *signer, more *safeSign) error {
	if more.newRoot == "" {
		return errors.New("where is the new root to be? nothing was signed\nhint: --new-root DIR, which is made if need be")
	}
	if err := mustNotBe(out); err != nil {
		return err
	}
	file, err := readFile(name)
	if err != nil {
		return err
	}
	s.pass.prepare()
	ca, err := a.openCA(s)
	if err != nil {
		return err
	}
	pass := func() ([]byte, error) { return s.pass.fresh(more.newRoot) }
	result, err := ca.SignRoots(file, a.confirm, func(label string, n pki.Name) (*x509.Certificate, error) {
		return fleet.MakeRoot(more.newRoot, label, n, ca.Fleet(), pass, time.Now())
	}, time.Now())
	if err := errors.Join(err, ca.Close()); err != nil {
		return err
	}
	if err := durable.CreateFile(out, result, 0o644); err != nil {
		return fmt.Errorf("signed, but the result was not written: %w\nhint: sign the request again, it does no harm", err)
	}
	v := struct {
		Result string `json:"result"`
	}{out}
	return emitOne(a, v, func() {
		a.say("signed: %s", out)
		a.say("  on the server:  hawser ca import %s", filepath.Base(out))
		a.note("%s holds the new standby root: put it into a safe of its own", more.newRoot)
	})
}

func (a *app) importAny(ctx context.Context, c *admin.Client, name, out string) error {
	kind, err := kindOf(name)
	if err != nil {
		return err
	}
	var answered string // the request
	switch kind {
	case fleet.FileBulkResult:
		answered, err = a.importBulk(ctx, c, name)
	case fleet.FileRootsResult:
		answered, err = a.importRoots(ctx, c, name)
	default:
		return a.importResult(ctx, c, name, out)
	}
	if err != nil {
		return err
	}
	return a.moveIfAll(ctx, c, answered)
}

// moveIfAll begins to move when nothing is missing any more. The request that was answered
// goes last: until then the import can be started again.
func (a *app) moveIfAll(ctx context.Context, c *admin.Client, answered string) error {
	r, err := c.Rollover(ctx, 0)
	if err != nil {
		return err
	}
	l, err := fleet.OpenLayout(a.dir)
	if err != nil {
		return err
	}
	for _, path := range []string{generationRequest(l, &r), rootsRequest(l, r.ToAnchors)} {
		if _, err := os.Stat(path); err == nil && path != answered {
			if err := durable.Remove(answered); err != nil {
				return err
			}
			return emitOne(a, r, func() { a.say("imported; the rollover still waits for the answer to %s", path) })
		}
	}
	if _, err = c.MoveRollover(ctx); err != nil {
		return err
	}
	if err := durable.Remove(answered); err != nil {
		return err
	}
	if r, err = c.RolloverIn(ctx, maxNames, "failed"); err != nil {
		return err
	}
	return emitOne(a, r, func() { a.sayStarted(&r, c.Running()) })
}

// importBulk reads the file twice: only a whole one is imported. It gives the path of the
// request that is answered.
func (a *app) importBulk(ctx context.Context, c *admin.Client, name string) (request string, err error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h, count, _, err := fleet.ReadBulk(f, nil)
	if err != nil {
		return "", fmt.Errorf("%s: %w: nothing was imported", name, err)
	}
	r, err := c.Rollover(ctx, 0)
	if err != nil {
		return "", err
	}
	l, err := fleet.OpenLayout(a.dir)
	if err != nil {
		return "", err
	}
	request = generationRequest(l, &r)
	if err := answers(request, h.Request); err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	if err := c.RolloverCA(ctx, h.CA); err != nil {
		return "", err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	if err := a.importParts(ctx, c, f, count); err != nil {
		return "", err
	}
	return request, nil
}

// answers holds a result against the request that waits here.
func answers(request, hash string) error {
	f, err := os.Open(request)
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("no request of this fleet waits for that result\nhint: a result is imported once, where its request was written")
	}
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return err
	}
	if hex.EncodeToString(sum.Sum(nil)) != hash {
		return errors.New("it answers another request than the one that waits here: nothing was imported")
	}
	return nil
}

func (a *app) importParts(ctx context.Context, c *admin.Client, in io.Reader, count int) error {
	p := &progress{app: a, live: terminal(a.err)}
	defer p.end()
	next, done := time.Now().Add(quietFor), 0
	var wait []admin.Resigned
	send := func() error {
		if len(wait) == 0 {
			return nil
		}
		if _, err := c.RolloverCertificates(ctx, wait); err != nil {
			return fmt.Errorf("%d of %d devices are imported, then: %w\nhint: import it again, it goes on there", done, count, err)
		}
		done += len(wait)
		wait = wait[:0]
		if time.Now().After(next) {
			next = time.Now().Add(p.every())
			p.show("%d of %d imported", done, count)
		}
		return nil
	}
	_, _, _, err := fleet.ReadBulk(in, func(_ *fleet.BulkHeader, l *fleet.BulkLine) error {
		wait = append(wait, admin.Resigned{ID: l.ID, Certificate: l.Certificate, Refused: l.Refused})
		if len(wait) < signPart {
			return nil
		}
		return send()
	})
	if err != nil {
		return err
	}
	return send()
}

func (a *app) importRoots(ctx context.Context, c *admin.Client, name string) (request string, err error) {
	file, err := readFile(name)
	if err != nil {
		return "", err
	}
	res, err := fleet.ParseRootsResult(file)
	if err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	r, err := c.Rollover(ctx, 0)
	if err != nil {
		return "", err
	}
	l, err := fleet.OpenLayout(a.dir)
	if err != nil {
		return "", err
	}
	request = rootsRequest(l, r.ToAnchors)
	if err := answers(request, res.Request); err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	if err := c.RolloverAnchors(ctx, res.Anchors); err != nil {
		return "", err
	}
	var ders [][]byte
	for _, text := range res.Leaves {
		cert, err := pki.ParseCert([]byte(text))
		if err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		ders = append(ders, cert.Raw)
	}
	if err := c.RolloverLeaves(ctx, ders); err != nil {
		return "", err
	}
	return request, nil
}

package fleet

import (
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"hawser/internal/durable"
	"hawser/internal/pki"
)

// Confirm shows a request to whoever holds the CA and returns what was typed;
// only want, letter for letter, confirms it.
type Confirm func(summary, want string) (typed string, err error)

// SignRequest answers a request file with the bytes of a result file. The request
// must be of this CA's fleet and, for a broker leaf, name this directory's root.
// What the journal does not vouch for (the same id with the same key) is signed
// only after confirm returned its subject: ErrNotConfirmed otherwise.
func (c *CA) SignRequest(file []byte, confirm Confirm, now time.Time) ([]byte, error) {
	req, err := pki.ParseRequest(file)
	if err != nil {
		return nil, err
	}
	if err := c.checkRequest(req); err != nil {
		return nil, err
	}
	if req.Kind == pki.KindStation {
		return c.signStationRequest(req, confirm, now)
	}
	key, err := pki.KeyFingerprint(req.ParsedCSR().Pub)
	if err != nil {
		return nil, err
	}
	hash := req.Hash()
	o := order{kind: req.Kind, subject: req.Subject, class: req.Class, pub: req.ParsedCSR().Pub,
		request: hex.EncodeToString(hash[:]), vouched: byJournal}
	if !c.journal.Vouches(req.Kind, req.Subject, hex.EncodeToString(key[:])) {
		o.vouched = byTyping
		typed, err := confirm(Summary(req), req.Subject)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNotConfirmed, err)
		}
		if typed != req.Subject {
			return nil, ErrNotConfirmed
		}
	}
	cert, err := c.sign(o, now)
	if err != nil {
		return nil, err
	}
	return pki.NewResult(req, []*x509.Certificate{cert})
}

func (c *CA) checkRequest(req *pki.Request) error {
	fleet := c.Fleet()
	if req.Fleet != hex.EncodeToString(fleet[:]) {
		return fmt.Errorf("the request is of the fleet %s, this CA belongs to %s", req.Fleet, hex.EncodeToString(fleet[:]))
	}
	if req.Kind != pki.KindBroker {
		return nil
	}
	text, err := os.ReadFile(filepath.Join(c.dir, "root.crt"))
	if err != nil {
		return missing(err)
	}
	root, err := pki.ParseCert(text)
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(c.dir, "root.crt"), err)
	}
	if label := strings.ToLower(pki.RootLabel(root)); label != req.Root {
		return fmt.Errorf("%w: the request asks for root %s, this is root %s\nhint: --ca names the directory of root %s",
			ErrNotHere, req.Root, label, req.Root)
	}
	return nil
}

// Summary says in a few lines what a request asks for. Every value in it was
// checked against its alphabet, so none can steer a terminal.
func Summary(r *pki.Request) string {
	var b strings.Builder
	fmt.Fprintf(&b, "kind     %s\nsubject  %s\n", r.Kind, r.Subject)
	if r.Class != "" {
		fmt.Fprintf(&b, "class    %s\n", r.Class)
	}
	if r.Root != "" {
		fmt.Fprintf(&b, "root     %s\n", r.Root)
	}
	key, err := pki.KeyFingerprint(r.ParsedCSR().Pub)
	if err != nil {
		return b.String() // a key that was verified encodes; without it the summary has no key line
	}
	hash := r.Hash()
	fmt.Fprintf(&b, "key      %x\nfleet    %s\nrequest  %x\n", key, r.Fleet, hash)
	return b.String()
}

// SaveRequest writes a request into server/requests, where its result will be held
// against it, and gives the path of the file to carry to the safe.
func (l *Layout) SaveRequest(r *pki.Request) (string, error) {
	if r.Fleet != l.Config.Fleet.ID.String() {
		return "", errors.New("the request is of another fleet")
	}
	file, err := r.Encode()
	if err != nil {
		return "", err
	}
	path := l.requestPath(r.Hash())
	return path, durable.CreateFile(path, file, 0o600)
}

func (l *Layout) requestPath(hash [32]byte) string {
	return filepath.Join(l.RequestsDir(), hex.EncodeToString(hash[:])+".json")
}

// OpenResult holds a result file against the request that was kept here and
// returns both; what to do with the certificates is the caller's. Nothing is
// changed: DropRequest follows when the certificates are in their place.
func (l *Layout) OpenResult(file []byte) (*pki.Request, []*x509.Certificate, error) {
	hash, err := pki.ResultRequest(file)
	if err != nil {
		return nil, nil, err
	}
	text, err := os.ReadFile(l.requestPath(hash))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("no request of this fleet waits for that result (%x)\nhint: a result is imported once, where its request was written", hash)
	}
	if err != nil {
		return nil, nil, err
	}
	req, err := pki.ParseRequest(text)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", l.requestPath(hash), err)
	}
	certs, err := pki.OpenResult(file, req, l.Trust())
	if err != nil {
		return nil, nil, err
	}
	return req, certs, nil
}

// DropRequest forgets a request that was answered.
func (l *Layout) DropRequest(r *pki.Request) error { return durable.Remove(l.requestPath(r.Hash())) }

package fleet

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"hawser/internal/pki"
)

const (
	formatRootsRequest = "hawser roots request 1"
	formatRootsResult  = "hawser roots result 1"
	maxRootsFile       = 64 << 10 // bytes
)

// RootsRequest asks the safe for the next anchor set, and for the certificates that the
// broker needs with it. PROTOCOL.md, "Rollover files".
type RootsRequest struct {
	Format   string    `json:"format"`
	Fleet    string    `json:"fleet"`    // 32 lower-case hex digits
	Sequence uint64    `json:"sequence"` // of the set
	Root     string    `json:"root"`     // letter of the root that signs: the standby root
	Port     uint16    `json:"port"`
	Domains  []string  `json:"domains"`
	Leaves   []LeafCSR `json:"leaves"` // domains to be served under that root
	Nonce    string    `json:"nonce"`  // 32 lower-case hex digits, random
}

// LeafCSR is the request for one broker certificate.
type LeafCSR struct {
	Domain string `json:"domain"`
	CSR    string `json:"csr"` // PEM
}

// RootsResult answers a RootsRequest.
type RootsResult struct {
	Format  string   `json:"format"`
	Request string   `json:"request"` // SHA-256 of the request's file, hex
	Anchors []byte   `json:"anchors"` // COSE_Sign1 in base64
	Leaves  []string `json:"leaves"`  // PEM, one each
}

// NewRootsRequest asks for the set with a number that follows the newest one. leaves are
// the domains that are to be served under the standby root; their keys wait here.
func (l *Layout) NewRootsRequest(sequence uint64, leaves []LeafCSR) (*RootsRequest, error) {
	_, set, err := l.Anchors()
	if err != nil {
		return nil, err
	}
	var nonce [16]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return nil, err
	}
	cfg := &l.Config.Fleet
	r := &RootsRequest{Format: formatRootsRequest, Fleet: cfg.ID.String(), Sequence: sequence, Root: strings.ToLower(pki.RootLabel(set.Standby)),
		Port: cfg.Port, Domains: cfg.Domains, Leaves: leaves, Nonce: hex.EncodeToString(nonce[:])}
	return r, r.check()
}

// NextLeaves lists the domains that have to be served under the standby root once the next
// set is in use, and are not yet. oldest is the lowest set that a device uses.
func (l *Layout) NextLeaves(oldest uint64) (domains []string, err error) {
	_, newest, err := l.Anchors()
	if err != nil {
		return nil, err
	}
	all := l.Config.Fleet.Domains
	for i, d := range all {
		if _, set, ok := l.AnchorSet(oldest); ok && len(all) > 1 && i == len(all)-1 && !set.Standby.Equal(newest.Standby) {
			continue // the rescue domain stays with those that are further behind
		}
		have, err := l.LeafRoot(d)
		if err != nil {
			return nil, err
		}
		if !have.Equal(newest.Standby) {
			domains = append(domains, d)
		}
	}
	return domains, nil
}

// Encode gives the bytes of the file.
func (r *RootsRequest) Encode() ([]byte, error) { return encodePlain(r) }

func encodePlain(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	err := e.Encode(v)
	return b.Bytes(), err
}

// ParseRootsRequest reads a request file in its one spelling.
func ParseRootsRequest(file []byte) (*RootsRequest, error) {
	r := new(RootsRequest)
	if len(file) > maxRootsFile {
		return nil, fmt.Errorf("a roots request of %d bytes is larger than %d", len(file), maxRootsFile)
	}
	if err := strict(file, r); err != nil {
		return nil, fmt.Errorf("roots request: %w", err)
	}
	again, err := r.Encode()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, file) {
		return nil, errors.New("the roots request was changed after it was written")
	}
	return r, r.check()
}

func (r *RootsRequest) check() error {
	if r.Format != formatRootsRequest {
		return fmt.Errorf("format is %q, not %q", r.Format, formatRootsRequest)
	}
	fleet, err := hex.DecodeString(r.Fleet)
	if err != nil || len(fleet) != 16 || r.Sequence < 2 || !pki.RootLetter(r.Root) || len(r.Nonce) != 32 || r.Port == 0 {
		return errors.New("the roots request lacks a fleet, a number above 1, a root, a port or a nonce")
	}
	for i, d := range r.Domains {
		if err := pki.CheckDomain(d); err != nil {
			return fmt.Errorf("%q: %w", d, err)
		}
		if slices.Contains(r.Domains[:i], d) {
			return fmt.Errorf("the domain %q twice", d)
		}
	}
	for _, leaf := range r.Leaves {
		if !slices.Contains(r.Domains, leaf.Domain) {
			return fmt.Errorf("%q is not among the domains", leaf.Domain)
		}
		if _, err := pki.ParseCSR([]byte(leaf.CSR)); err != nil {
			return fmt.Errorf("%s: %w", leaf.Domain, err)
		}
	}
	return nil
}

// Subject is what has to be typed to sign the request.
func (r *RootsRequest) Subject() string { return fmt.Sprintf("anchors %d", r.Sequence) }

// Summary says what the request asks for. Every value in it was checked.
func (r *RootsRequest) Summary() string {
	var leaves []string
	for _, v := range r.Leaves {
		leaves = append(leaves, v.Domain)
	}
	return fmt.Sprintf("kind     anchors\nsubject  %s\nroots    %s becomes the one in use, a new one the standby\nport     %d\ndomains  %s\nserved   %s\nfleet    %s\n",
		r.Subject(), strings.ToUpper(r.Root), r.Port, strings.Join(r.Domains, ", "), strings.Join(leaves, ", "), r.Fleet)
}

// SignRoots answers a roots request with this directory's root, after confirm returned the
// request's subject. next gives the root that becomes the standby, by its letter.
func (c *CA) SignRoots(file []byte, confirm Confirm, next func(label string, name pki.Name) (*x509.Certificate, error), now time.Time) ([]byte, error) {
	r, err := ParseRootsRequest(file)
	if err != nil {
		return nil, err
	}
	root, err := c.mayAnswer(r)
	if err != nil {
		return nil, err
	}
	typed, err := confirm(r.Summary(), r.Subject())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotConfirmed, err)
	}
	if typed != r.Subject() {
		return nil, ErrNotConfirmed
	}
	label, err := pki.NextRootLabel(pki.RootLabel(root))
	if err != nil {
		return nil, err
	}
	if _, err := c.issuer("root", pki.BrokerRoot); err != nil { // its passphrase is asked for first
		return nil, err
	}
	standby, err := next(label, subjectOf(root))
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(file)
	res := RootsResult{Format: formatRootsResult, Request: hex.EncodeToString(sum[:]), Leaves: []string{}}
	for _, leaf := range r.Leaves {
		csr, err := pki.ParseCSR([]byte(leaf.CSR))
		if err != nil {
			return nil, err
		}
		cert, err := c.sign(order{kind: pki.KindBroker, subject: leaf.Domain, pub: csr.Pub, request: res.Request, vouched: byTyping}, now)
		if err != nil {
			return nil, err
		}
		res.Leaves = append(res.Leaves, string(pki.EncodeCert(cert.Raw)))
	}
	res.Anchors, err = c.SignAnchors(&pki.AnchorSet{Fleet: c.Fleet(), Sequence: r.Sequence, InUse: root, Standby: standby, Port: r.Port, Domains: r.Domains}, now)
	if err != nil {
		return nil, err
	}
	return encodePlain(&res)
}

// mayAnswer: the request must be of this fleet and name this directory's root.
func (c *CA) mayAnswer(r *RootsRequest) (*x509.Certificate, error) {
	fleet := c.Fleet()
	if r.Fleet != hex.EncodeToString(fleet[:]) {
		return nil, fmt.Errorf("the request is of the fleet %s, this CA belongs to %x", r.Fleet, fleet)
	}
	root, err := caCert(c.dir, "root")
	if err != nil {
		return nil, err
	}
	if label := strings.ToLower(pki.RootLabel(root)); label != r.Root {
		return nil, fmt.Errorf("%w: the request asks for root %s, this is root %s\nhint: --ca names the directory of root %s", ErrNotHere, r.Root, label, r.Root)
	}
	return root, nil
}

// ParseRootsResult reads a result file. What it holds is verified where it is installed.
func ParseRootsResult(file []byte) (*RootsResult, error) {
	r := new(RootsResult)
	if len(file) > maxRootsFile {
		return nil, fmt.Errorf("a roots result of %d bytes is larger than %d", len(file), maxRootsFile)
	}
	if err := strict(file, r); err != nil {
		return nil, fmt.Errorf("roots result: %w", err)
	}
	if r.Format != formatRootsResult {
		return nil, fmt.Errorf("format is %q, not %q", r.Format, formatRootsResult)
	}
	return r, nil
}

// FileKind tells the kinds of files of the safe apart, by how they begin.
type FileKind int

// The kinds of files.
const (
	FilePlain       FileKind = iota // a request or a result for one certificate
	FileBulkRequest                 // a rollover's
	FileBulkResult
	FileRootsRequest
	FileRootsResult
)

// KindOfFile looks at the beginning of a file.
func KindOfFile(head []byte) FileKind {
	for kind, format := range map[FileKind]string{FileBulkRequest: formatBulkRequest, FileBulkResult: formatBulkResult,
		FileRootsRequest: formatRootsRequest, FileRootsResult: formatRootsResult} {
		if bytes.Contains(head[:min(len(head), 100)], []byte(`"`+format+`"`)) {
			return kind
		}
	}
	return FilePlain
}

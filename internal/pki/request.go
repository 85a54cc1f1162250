package pki

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"hawser/internal/identity"
)

// The kinds of request: which leaf is asked for.
const (
	KindDevice  = "device"
	KindService = "service"
	KindBroker  = "broker"
	KindStation = "station" // a station's certificate and a block of ids
)

const (
	formatRequest = "hawser request 1"
	formatResult  = "hawser result 1"
	maxCerts      = 8         // in one result: one per device CA generation
	maxFile       = 256 << 10 // bytes of a request or a result: 5000 ids and the anchor sets fit
)

// Request is what a server writes when it needs a signature that only the safe
// can give. It is a readable JSON file; its SHA-256 ties the result to it.
type Request struct {
	Format  string `json:"format"`            // "hawser request 1"
	Fleet   string `json:"fleet"`             // 32 lower-case hex digits
	Kind    string `json:"kind"`              // device, service, broker or station
	Subject string `json:"subject"`           // id, name or domain, by kind
	Class   string `json:"class,omitempty"`   // device only: its class, [a-z0-9][a-z0-9-]{0,30}
	Root    string `json:"root,omitempty"`    // broker only: a or b, the root to sign
	CSR     string `json:"csr"`               // PEM
	Nonce   string `json:"nonce"`             // 32 lower-case hex digits, random: no two requests are equal
	Station *Order `json:"station,omitempty"` // station only
	csr     *CSR   // parsed and verified by Check
	hash    [32]byte
}

// Order is what a station gets with its certificate: a block of ids. Whether its parts fit
// together is for internal/factory to say when the block is made.
type Order struct {
	Block   string   `json:"block"`   // id, 32 lower-case hex digits
	Expires string   `json:"expires"` // RFC 3339 UTC
	IDs     string   `json:"ids"`     // ascending, a space between two
	Anchors [][]byte `json:"anchors"` // all sets of the fleet, the first one first: COSE_Sign1, base64
}

// Result answers a request.
type Result struct {
	Format       string   `json:"format"`          // "hawser result 1"
	Request      string   `json:"request"`         // SHA-256 of the request file, lower-case hex
	Certificates []string `json:"certificates"`    // PEM, one each
	Block        []byte   `json:"block,omitempty"` // station only: the block file, base64
}

// Trust is what an importing server holds results against.
type Trust struct {
	DeviceCAs   []*x509.Certificate
	ServiceCAs  []*x509.Certificate
	BrokerRoots []*x509.Certificate
}

// NewRequest draws the nonce of a request for csr. The caller may set Class
// (device) and must set Root (broker), then Encode checks the whole.
func NewRequest(fleet [16]byte, kind, subject string, csr *CSR) (*Request, error) {
	var nonce [16]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return nil, fmt.Errorf("draw a nonce: %w", err)
	}
	return &Request{
		Format: formatRequest, Fleet: hex.EncodeToString(fleet[:]), Kind: kind, Subject: subject,
		CSR: string(EncodeCSR(csr.DER)), Nonce: hex.EncodeToString(nonce[:]),
	}, nil
}

// Encode checks r and gives the bytes of its file; Hash is valid afterwards.
func (r *Request) Encode() ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	b, err := encodeJSON(r)
	if err != nil {
		return nil, err
	}
	r.hash = sha256.Sum256(b)
	return b, nil
}

// ParseRequest reads a request file in the one spelling that Encode gives, and
// verifies the proof of possession in it.
func ParseRequest(file []byte) (*Request, error) {
	r := new(Request)
	if err := decodeJSON(file, r); err != nil {
		return nil, fmt.Errorf("request file: %w", err)
	}
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("request file: %w", err)
	}
	again, err := encodeJSON(r)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, file) {
		return nil, errors.New("request file was changed after it was written")
	}
	r.hash = sha256.Sum256(file)
	return r, nil
}

// Hash is the SHA-256 of the request's file.
func (r *Request) Hash() [32]byte { return r.hash }

// ParsedCSR gives the verified CSR of a request that came from ParseRequest or went through Encode.
func (r *Request) ParsedCSR() *CSR { return r.csr }

func (r *Request) check() error {
	if r.Format != formatRequest {
		return fmt.Errorf("format is %q, not %q", r.Format, formatRequest)
	}
	if !isHex(r.Fleet, 32) || !isHex(r.Nonce, 32) {
		return errors.New("fleet and nonce are 32 lower-case hex digits")
	}
	if err := r.checkNames(); err != nil {
		return err
	}
	csr, err := ParseCSR([]byte(r.CSR))
	if err != nil {
		return err
	}
	if string(EncodeCSR(csr.DER)) != r.CSR {
		return errors.New("certificate request is not plain PEM")
	}
	r.csr = csr
	return nil
}

func (r *Request) checkNames() error {
	if r.Class != "" && (r.Kind != KindDevice || !classOK(r.Class)) {
		return fmt.Errorf("class %q does not belong in a %s request", r.Class, r.Kind)
	}
	if (r.Root != "") != (r.Kind == KindBroker) || r.Root != "" && r.Root != "a" && r.Root != "b" {
		return fmt.Errorf("root %q does not belong in a %s request", r.Root, r.Kind)
	}
	if (r.Station != nil) != (r.Kind == KindStation) {
		return fmt.Errorf("a block of ids does not belong in a %s request", r.Kind)
	}
	if r.Station != nil {
		if err := r.Station.check(); err != nil {
			return err
		}
	}
	return checkSubject(r.Kind, r.Subject)
}

func (o *Order) check() error {
	t, err := time.Parse(time.RFC3339, o.Expires)
	if err != nil || rfc3339(t) != o.Expires || !isHex(o.Block, 32) {
		return errors.New("a block has an id of 32 lower-case hex digits and an expiry in RFC 3339")
	}
	if _, err := o.ParseIDs(); err != nil {
		return err
	}
	if len(o.Anchors) == 0 {
		return errors.New("a block needs the anchor sets of the fleet")
	}
	return nil
}

// ParseIDs reads the ids, which ascend.
func (o *Order) ParseIDs() ([]identity.ID, error) {
	var ids []identity.ID
	for word := range strings.SplitSeq(o.IDs, " ") {
		id, err := identity.ParseID(word)
		if err != nil {
			return nil, fmt.Errorf("id %.20q: %w", word, err)
		}
		if len(ids) > 0 && ids[len(ids)-1] >= id {
			return nil, errors.New("the ids of a block do not ascend")
		}
		ids = append(ids, id)
	}
	return ids, nil
}

func checkSubject(kind, subject string) error {
	switch kind {
	case KindDevice:
		return checkDeviceName(subject)
	case KindService:
		return identity.CheckName(subject)
	case KindBroker:
		return CheckDomain(subject)
	case KindStation:
		return CheckStation(subject)
	}
	return fmt.Errorf("kind %q is not device, service, broker or station", kind)
}

// CheckStation reports whether s can name a flashing bench.
func CheckStation(s string) error {
	if identity.CheckName(s) != nil {
		return errors.New("a station name is [a-z][a-z0-9-]{0,30} and not eight hex digits")
	}
	return nil
}

// CheckClass reports whether s can name a device class: [a-z0-9][a-z0-9-]{0,30}.
func CheckClass(s string) error {
	if !classOK(s) {
		return errors.New("a class is [a-z0-9][a-z0-9-]{0,30}")
	}
	return nil
}

func classOK(s string) bool {
	if len(s) == 0 || len(s) > 31 || s[0] == '-' {
		return false
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

func isHex(s string, n int) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(s) == n && hex.EncodeToString(b) == s
}

// NewResult answers r with certificates made for it.
func NewResult(r *Request, certs []*x509.Certificate) ([]byte, error) {
	return newResult(r, certs, nil)
}

// NewStationResult answers a station's request with its certificate and its block file.
func NewStationResult(r *Request, cert *x509.Certificate, block []byte) ([]byte, error) {
	return newResult(r, []*x509.Certificate{cert}, block)
}

func newResult(r *Request, certs []*x509.Certificate, block []byte) ([]byte, error) {
	res := Result{Format: formatResult, Request: hex.EncodeToString(r.hash[:]), Block: block}
	for _, c := range certs {
		res.Certificates = append(res.Certificates, string(EncodeCert(c.Raw)))
	}
	return encodeJSON(&res)
}

// OpenResult reads a result file and holds it against the request that the
// server itself kept: the hash, and for each certificate chain, profile, name
// and key. All certificates pass or none is returned.
func OpenResult(file []byte, r *Request, t Trust) ([]*x509.Certificate, error) {
	var res Result
	if err := decodeJSON(file, &res); err != nil {
		return nil, fmt.Errorf("result file: %w", err)
	}
	if res.Format != formatResult {
		return nil, fmt.Errorf("result file: format is %q, not %q", res.Format, formatResult)
	}
	if res.Request != hex.EncodeToString(r.hash[:]) {
		return nil, errors.New("result file answers another request")
	}
	if len(res.Certificates) == 0 || len(res.Certificates) > maxCerts {
		return nil, fmt.Errorf("result file: %d certificates", len(res.Certificates))
	}
	var out []*x509.Certificate
	for _, text := range res.Certificates {
		c, err := r.verify([]byte(text), t)
		if err != nil {
			return nil, fmt.Errorf("result file: %w", err)
		}
		out = append(out, c)
	}
	return out, nil
}

// ResultRequest reads which request (SHA-256) a result file answers, so that the
// importer can find the request it kept. Nothing else of the file is believed.
func ResultRequest(file []byte) ([32]byte, error) {
	var res Result
	var h [32]byte
	if err := decodeJSON(file, &res); err != nil {
		return h, fmt.Errorf("result file: %w", err)
	}
	if res.Format != formatResult || !isHex(res.Request, 64) {
		return h, errors.New("not a result file")
	}
	if _, err := hex.Decode(h[:], []byte(res.Request)); err != nil {
		return h, errors.New("not a result file")
	}
	return h, nil
}

// ResultBlock takes the block file out of a result, nil where there is none. It is
// believed only after OpenResult has passed and the block itself was opened.
func ResultBlock(file []byte) ([]byte, error) {
	var res Result
	if err := decodeJSON(file, &res); err != nil {
		return nil, fmt.Errorf("result file: %w", err)
	}
	return res.Block, nil
}

// verify checks one certificate of a result against what was asked for.
func (r *Request) verify(text []byte, t Trust) (*x509.Certificate, error) {
	c, err := ParseCert(text)
	if err != nil {
		return nil, err
	}
	name, err := r.verifyChain(c.Raw, t)
	if err != nil {
		return nil, err
	}
	if name != r.Subject {
		return nil, fmt.Errorf("certificate is for %q, not for %q", name, r.Subject)
	}
	if !r.csr.Pub.Equal(c.PublicKey) {
		return nil, errors.New("certificate is for another key than the request's")
	}
	return c, nil
}

func (r *Request) verifyChain(der []byte, t Trust) (name string, err error) {
	switch r.Kind {
	case KindDevice:
		id, _, _, err := VerifyDeviceLeaf(der, t.DeviceCAs)
		return id.String(), err
	case KindService:
		name, _, err = VerifyServiceLeaf(der, t.ServiceCAs)
		return name, err
	case KindStation:
		name, _, _, err := VerifyStationCA(der, t.DeviceCAs)
		return name, err
	}
	name, _, err = VerifyBrokerLeaf(der, t.BrokerRoots)
	return name, err
}

func encodeJSON(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	return b.Bytes(), nil
}

// decodeJSON reads one object: no unknown keys, nothing after it.
func decodeJSON(file []byte, v any) error {
	if len(file) > maxFile {
		return fmt.Errorf("%d bytes are more than %d", len(file), maxFile)
	}
	d := json.NewDecoder(bytes.NewReader(file))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("not ours or damaged: %w", err)
	}
	if len(bytes.TrimSpace(file[min(int(d.InputOffset()), len(file)):])) > 0 {
		return errors.New("text after the object")
	}
	return nil
}

package device

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"slices"
	"sync"
	"testing"

	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/mqtt"
	"hawser/internal/pki"
)

// pkiRig is a fleet in small: a server that shows what it is told to and turns away whom it is
// told to, and a device with certificates of two generations.
type pkiRig struct {
	*fakeServer
	a, b, c, d *pki.Issuer
	key        *ecdsa.PrivateKey
	old, fresh []byte // certificates of the device
	store      *MemStore

	mu      sync.Mutex
	leaves  map[string]*tls.Certificate // guarded by mu: by SNI
	refused map[[32]byte]bool           // guarded by mu
}

func newPKIRig(t testing.TB) *pkiRig {
	r := &pkiRig{a: brokerRoot(t, "A"), b: brokerRoot(t, "B"), c: brokerRoot(t, "C"), d: brokerRoot(t, "D"), key: newKey(t, elliptic.P256()),
		store: &MemStore{}, leaves: map[string]*tls.Certificate{}, refused: map[[32]byte]bool{}}
	r.old, r.fresh = r.certify(t, testID, &r.key.PublicKey), r.certify(t, testID, &r.key.PublicKey)
	r.fakeServer = serverWith(t, &authority{cert: r.a.Cert}, &tls.Config{
		GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			if leaf := r.leaves[h.ServerName]; leaf != nil {
				return leaf, nil
			}
			return nil, errors.New("no such name")
		},
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.refused[sha256.Sum256(raw[0])] {
				return errors.New("turned away")
			}
			return nil
		},
	})
	r.serve(testServer, r.a)
	return r
}

// certify signs a device certificate with a CA of its own: the device does not care whose.
func (r *pkiRig) certify(t testing.TB, id string, pub *ecdsa.PublicKey) []byte {
	t.Helper()
	ca, err := pki.IssueDeviceCA(newKey(t, elliptic.P256()), pki.Name{Organisation: "Acme", Country: "DE"}, 1, r.a.Cert.NotBefore)
	if err != nil {
		t.Fatal(err)
	}
	who, err := identity.ParseID(id)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.IssueDeviceLeaf(ca, who, pub, r.a.Cert.NotBefore)
	if err != nil {
		t.Fatal(err)
	}
	return cert.Raw
}

// serve shows a leaf under root to whoever asks for name.
func (r *pkiRig) serve(name string, root *pki.Issuer) {
	r.t.Helper()
	key := newKey(r.t, elliptic.P256())
	cert, err := pki.IssueBrokerLeaf(root, name, &key.PublicKey, r.a.Cert.NotBefore)
	if err != nil {
		r.t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leaves[name] = &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

func (r *pkiRig) turnAway(cert []byte, away bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refused[sha256.Sum256(cert)] = away
}

// config is that of a device born with {A, B}.
func (r *pkiRig) config() Config {
	cfg := r.fakeServer.config(r.t)
	cfg.Servers, cfg.Roots, cfg.Store = nil, nil, r.store
	cfg.Certificate = tls.Certificate{Certificate: [][]byte{r.old}, PrivateKey: r.key}
	cfg.Anchors = anchors(r.t, r.b, 1, r.a, r.b)
	return cfg
}

// come waits for the device and gives what it shows and reports.
func (r *pkiRig) come() (p *peer, cert []byte, reports []message.PKIReport) {
	r.t.Helper()
	p = r.peer()
	_, reports = p.welcomeReports(&mqtt.Connack{SessionPresent: true})
	return p, p.conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Raw, reports
}

// offer sends d/pki and gives the device's report on it, acknowledged.
func (p *peer) offer(m message.PKI) message.PKIReport {
	p.t.Helper()
	p.say("d/pki", uint16(m.No), m.Encode(message.CBOR))
	p.expect(mqtt.PUBACK)
	m2 := p.publish()
	r := p.report(m2)
	p.ack(m2)
	return r
}

func (r *pkiRig) want(got []message.PKIReport, want ...message.PKIReport) {
	r.t.Helper()
	for i := range got {
		got[i].Text = ""
	}
	if !slices.Equal(got, want) {
		r.t.Fatalf("reported %+v\nwant %+v", got, want)
	}
}

func inUse(no uint64, cert []byte, set uint64) message.PKIReport {
	return message.PKIReport{No: no, State: message.PKIInUse, Fingerprint: sha256.Sum256(cert), Anchors: set}
}

package message

// The lengths of what an offer carries, in bytes. An anchor set is at most what a device
// can hold in RAM to check it.
const (
	MaxCertificate = 2048
	MaxAnchors     = 4096
)

// PKI offers a device another certificate for its own key, another anchor set, or both
// (d/pki). Whether they are worth taking is the device's to judge.
type PKI struct {
	No          uint64 // of this offer, never 0: the report on it repeats it
	Certificate []byte // X.509 DER; nil: none is offered
	Anchors     []byte // COSE_Sign1; nil: none is offered
}

// Encode gives the message in enc.
func (m PKI) Encode(enc Encoding) []byte {
	w := newWriter(enc)
	w.number64(1, "no", m.No)
	if m.Certificate != nil {
		w.bytes(2, "certificate", m.Certificate)
	}
	if m.Anchors != nil {
		w.bytes(3, "anchors", m.Anchors)
	}
	return w.end()
}

// DecodePKI reads a PKI in either encoding.
func DecodePKI(payload []byte) (m PKI, err error) {
	r := newReader(payload)
	m.No = r.nonzero(1, "no")
	m.Certificate = r.offered(2, "certificate", MaxCertificate)
	m.Anchors = r.offered(3, "anchors", MaxAnchors)
	if r.err == nil && m.Certificate == nil && m.Anchors == nil {
		r.err = bad("offer of nothing")
	}
	if r.err != nil {
		return PKI{}, r.err
	}
	return m, nil
}

// offered reads a field that may be missing, but not empty.
func (r *reader) offered(key uint64, name string, most int) []byte {
	if !r.has(key, name) {
		return nil
	}
	b := r.bytes(key, name, most)
	if len(b) == 0 {
		r.wrong(name, "there: leave it out")
	}
	return b
}

// PKIState is what a PKIReport tells.
type PKIState byte

// The states. Installed: what was offered is stored beside the old and will be tried;
// InUse: a connection with it was admitted; Refused: it was not stored, the text says why.
const (
	PKIInstalled PKIState = iota
	PKIInUse
	PKIRefused
)

func pkiStateNames() []string { return []string{"installed", "in-use", "refused"} }

func (s PKIState) String() string { return nameOf(pkiStateNames(), byte(s)) }

// PKIReport is what a device says of its certificate and its anchors (u/pki).
type PKIReport struct {
	No          uint64 // the offer that it answers or completes; 0: none
	State       PKIState
	Fingerprint [32]byte // SHA-256 of the certificate in use
	Anchors     uint64   // sequence of the anchor set in use; 0: it has none
	Pending     uint64   // sequence of the set that is stored and not proven yet; 0: none
	Text        string   // why it was refused, or did not work; "": nothing to say
}

// Encode gives the message in enc.
func (m PKIReport) Encode(enc Encoding) []byte {
	w := newWriter(enc)
	w.number64(1, "no", m.No)
	w.choice(2, "state", byte(m.State), pkiStateNames())
	w.bytes(3, "fingerprint", m.Fingerprint[:])
	w.number64(4, "anchors", m.Anchors)
	w.number64(5, "pending", m.Pending)
	if m.Text != "" {
		w.text(6, "text", m.Text)
	}
	return w.end()
}

// DecodePKIReport reads a PKIReport in either encoding.
func DecodePKIReport(payload []byte) (m PKIReport, err error) {
	r := newReader(payload)
	m.No = r.number(1, "no")
	m.State = PKIState(r.choice(2, "state", pkiStateNames()))
	sum := r.bytes(3, "fingerprint", len(m.Fingerprint))
	m.Anchors = r.number(4, "anchors")
	m.Pending = r.number(5, "pending")
	if r.has(6, "text") {
		m.Text = r.text(6, "text")
	}
	if copy(m.Fingerprint[:], sum) != len(m.Fingerprint) {
		r.wrong("fingerprint", "a SHA-256")
	}
	if r.err != nil {
		return PKIReport{}, r.err
	}
	return m, nil
}

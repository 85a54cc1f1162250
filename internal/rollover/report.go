package rollover

import (
	"fmt"
	"strings"
	"time"
	"unicode"

	"hawser/internal/identity"
	"hawser/internal/message"
	"hawser/internal/registry"
)

// maxReason bounds what is kept of a device's own words, in bytes.
const maxReason = 200

// Report takes what a device says on u/pki. When it returns, what follows is submitted to
// the registry.
func (s *Service) Report(id identity.ID, payload []byte) error {
	m, err := message.DecodePKIReport(payload)
	if err != nil {
		return err
	}
	s.mu.Lock()
	last := s.last[id]
	newest := s.newest
	s.mu.Unlock()
	if m.Anchors > newest {
		s.save(id, func(tx *registry.Tx) error { return tx.AnchorsAhead(id, m.Anchors, time.Now()) })
	}
	switch why := s.contradiction(&m, last, newest); {
	case why != "":
		s.failed(id, why)
	case m.State == message.PKIRefused:
		s.failed(id, "refused: "+clean(m.Text))
	case m.State == message.PKIInstalled:
		why := ""
		if m.Text != "" { // it tried, and will try again
			why = clean(m.Text)
		}
		s.progress(id, registry.ProgressInstalled, why)
	default:
		s.save(id, func(tx *registry.Tx) error { return tx.SaveAnchors(id, m.Anchors, m.Pending) })
		if m.Text != "" {
			s.failed(id, clean(m.Text))
		} else {
			s.Ready(id) // the next set may be due
		}
	}
	return nil
}

// contradiction says what of a report cannot be true, "" if all can. What the broker saw
// counts; a report of a connection before the start of the server is believed.
func (s *Service) contradiction(m *message.PKIReport, last seen, newest uint64) string {
	if last.leaf != nil && last.print != short(m.Fingerprint) {
		return fmt.Sprintf("it says that it uses the certificate %x..., but connects with another", m.Fingerprint[:8])
	}
	if m.State != message.PKIInUse || m.Anchors == 0 {
		return ""
	}
	root := s.cfg.InUse(m.Anchors)
	switch {
	case root == nil:
		return fmt.Sprintf("it says that it uses anchor set %d, which does not exist", m.Anchors)
	case last.leaf != nil && m.Anchors == newest && newest > 1 && last.leaf.CheckSignatureFrom(root) != nil:
		return fmt.Sprintf("it says that it uses anchor set %d, but it accepted a server under another root", m.Anchors)
	}
	return ""
}

func (s *Service) failed(id identity.ID, why string) {
	s.cfg.Log.Warn("a device did not take what it was offered", "device", id, "reason", why)
	s.progress(id, registry.ProgressFailed, why)
	s.leave(id)
}

// progress notes a step without looking at the device again: it has had its offer.
func (s *Service) progress(id identity.ID, to registry.Progress, reason string) {
	s.cfg.Store.Submit(func(tx *registry.Tx) error { return tx.RolloverProgress(id, to, reason) }, func(err error) {
		if err != nil {
			s.cfg.Log.Warn("step of a device not recorded", "device", id, "step", string(to), "error", err)
		}
	})
}

// clean makes a device's words fit for a terminal and a row.
func clean(text string) string {
	text = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, text)
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason], "") + "..."
	}
	if text == "" {
		return "no reason given"
	}
	return text
}
